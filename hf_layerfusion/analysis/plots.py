"""Figures. They need the extra `hf-layerfusion[plots]`."""

from __future__ import annotations

from pathlib import Path

from ..errors import LayerFusionError
from .attention import AttentionSummary

MIN_COLOUR_RANGE = 1e-3


def plot_attention(summary: AttentionSummary, path: str | Path, title: str = "Layer attention") -> None:
    """Write a heatmap (heads x tokens) of mean and spread, below the weight of each token, as PNG.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
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
    spread = None if shows_heads else summary.std[0].tolist()
    rows[0].bar(positions, summary.token_weights.tolist(), yerr=spread, color="#0072B2", width=0.8)
    rows[0].axhline(1 / num_tokens, color="#555555", linestyle="--", linewidth=1)
    uniform = rows[0].annotate(  # beside the axes, where no bar can hide it
        "uniform",
        (1, 1 / num_tokens),
        xycoords=rows[0].get_yaxis_transform(),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        annotation_clip=False,
    )
    uniform.set_in_layout(not shows_heads)  # above a colour bar there is room for it
    rows[0].set_ylabel("mean weight")
    rows[0].set_title(f"{title} ({summary.num_images} images)")
    if shows_heads:
        for axis, values, name, colours in (
            (rows[1], summary.mean, "mean over images", "viridis"),
            (rows[2], summary.std, "spread over images (std)", "cividis"),
        ):
            # Without the lower limit, a spread of rounding errors would look like one of images.
            highest = max(float(values.max()), MIN_COLOUR_RANGE)
            image = axis.imshow(
                values.numpy(), aspect="auto", cmap=colours, vmin=0, vmax=highest, interpolation="nearest"
            )
            axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.set_ylabel("attention head")
            figure.colorbar(image, ax=axis, label=name, pad=0.01)
    rows[-1].set_xticks(list(positions), summary.token_names, rotation=90, fontsize=8)
    rows[-1].set_xlim(-0.5, num_tokens - 0.5)
    figure.savefig(path, dpi=150)
