"""Figures. They need the extra `hf-layerfusion[plots]`."""

from __future__ import annotations

from pathlib import Path

from ..errors import LayerFusionError
from .attention import AttentionSummary


def plot_attention(summary: AttentionSummary, path: str | Path, title: str = "Layer attention") -> None:
    """Write a heatmap (heads x tokens) of mean and spread, below the weight of each token, as PNG.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LayerFusionError("figures need matplotlib: pip install 'hf-layerfusion[plots]'") from error
    num_heads, num_tokens = summary.mean.shape
    shows_heads = num_heads > 1
    width = max(7.0, 0.34 * num_tokens + 2.2)
    panel = max(1.6, 0.16 * num_heads)
    figure = Figure(figsize=(width, 2.6 + (2 * panel if shows_heads else 0) + 2.0), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [2.0, panel, panel] if shows_heads else [2.0]
    rows = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    positions = range(num_tokens)
    rows[0].bar(positions, summary.token_weights.tolist(), color="#0072B2", width=0.8)
    rows[0].axhline(1 / num_tokens, color="#555555", linestyle="--", linewidth=1)
    rows[0].annotate(
        "uniform",
        (num_tokens - 0.5, 1 / num_tokens),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    rows[0].set_ylabel("mean weight")
    rows[0].set_title(f"{title} ({summary.num_images} images)")
    if shows_heads:
        for axis, values, name, colours in (
            (rows[1], summary.mean, "mean over images", "viridis"),
            (rows[2], summary.std, "spread over images (std)", "cividis"),
        ):
            image = axis.imshow(values, aspect="auto", cmap=colours, vmin=0, interpolation="nearest")
            axis.set_ylabel("attention head")
            figure.colorbar(image, ax=axis, label=name, pad=0.01)
    rows[-1].set_xticks(list(positions), summary.token_names, rotation=90, fontsize=8)
    rows[-1].set_xlim(-0.5, num_tokens - 0.5)
    figure.savefig(path, dpi=150)
