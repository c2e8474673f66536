"""The figures of a model card. They need the extra `hf-layerfusion[plots]`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import style
from ..files import staged_file
from .record import plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFUSION_NAME = "confusion_matrix.png"
ATTENTION_NAME = "layer_attention.png"

# Pixels per inch: a card is read on a screen, and its pictures travel with every head.
_DPI = 100
# The most classes whose counts, and whose names, can be read.
MOST_COUNTS, MOST_NAMES = 30, 60
_MOST_CELLS = 250
_NAME_LENGTH = 24


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return style.can_draw()


def draw_confusion_matrix(counts: Sequence[Sequence[int]], labels: Sequence[str], path: str | Path) -> None:
    """Write a confusion matrix as PNG: colours are shares of the true class, numbers are images.

    The colour scale is that of the square root, so that a few confusions show beside a full diagonal. Up to 30 classes
    have their counts, up to 60 their names; of more, rows and columns are numbered, and of more than 250, neighbours
    share a cell, since a picture has no room for each.

    Args:
        counts: C x C, rows are true classes.
        labels: C names.
        path: of the file.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    matrix = np.asarray(counts, dtype=np.float64)
    num_images = int(matrix.sum())
    size = len(matrix)
    names = [plain_text(label, _NAME_LENGTH) for label in labels]
    is_named = size <= MOST_NAMES
    cell = (
        0.7 if size <= 4 else 0.42 if size <= 12 else 0.26 if size <= MOST_COUNTS else 0.16 if is_named else 6 / size
    )
    margin = 0.075 * max(map(len, names)) if is_named else 0.4
    figure = style.new_figure(max(4.0, cell * size + margin + 1.9), max(3.2, cell * size + margin + 1.1))
    axis = figure.add_subplot()
    from matplotlib.colors import PowerNorm

    together = -(-size // _MOST_CELLS)
    if together > 1:
        matrix = np.add.reduceat(
            np.add.reduceat(matrix, np.arange(0, size, together)), np.arange(0, size, together), 1
        )
    extent = (-0.5, len(matrix) * together - 0.5, len(matrix) * together - 0.5, -0.5)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(
        shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), extent=extent, interpolation="nearest"
    )
    bar = figure.colorbar(
        image,
        ax=axis,
        label="share of the true class" + ("es" if together > 1 else ""),
        ticks=[0, 0.05, 0.2, 0.5, 1],
        shrink=0.8,
    )
    bar.ax.set_yticklabels(["0", "5 %", "20 %", "50 %", "100 %"], fontsize=8)
    if is_named:
        font = 9 if size <= 12 else 7
        turned = 0 if max(map(len, names)) <= 3 else 90
        axis.set_xticks(range(size), names, rotation=turned, fontsize=font, parse_math=False)
        axis.set_yticks(range(size), names, fontsize=font, parse_math=False)
    axis.set_xlabel("predicted class" if is_named else "number of the predicted class")
    axis.set_ylabel("true class" if is_named else "number of the true class")
    groups = f", {together} classes a cell" if together > 1 else ""
    axis.set_title(f"{num_images:,} images{groups}", fontsize=10)
    if size <= MOST_COUNTS:
        axis.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axis.grid(which="minor", color=style.GREY, linewidth=0.3, alpha=0.4)
        axis.tick_params(which="minor", length=0)
        for row, column in np.argwhere(matrix > 0).tolist():
            # Of the square root scale, the upper half is dark.
            colour = "white" if shares[row, column] > 0.3 else "black"
            count = f"{int(matrix[row, column])}"
            points = (9 if size <= 12 else 7) * min(1.0, 4 / (len(count) + 1))
            axis.text(column, row, count, ha="center", va="center", fontsize=points, color=colour)
    _save(figure, path)


def draw_attention(attention: dict[str, Any], path: str | Path) -> None:
    """Write the layer attention as PNG: the weight of each token, and below it a heatmap of attention heads x tokens.

    Patches of one layer are shown as one token, whose weight is their sum.

    Args:
        attention: `token_names`, `mean` (H x N) and `num_images`, as in a training record.
        path: of the file.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    names, weights, uniform = _by_layer(attention)
    num_heads, num_tokens = weights.shape
    shows_heads = num_heads > 1
    is_named = num_tokens <= MOST_NAMES
    panel = min(max(1.4, 0.13 * num_heads), 4.0)
    width = min(max(5.6, 0.27 * num_tokens + 2.2), 14.0)
    margin = 0.065 * max(map(len, names)) if is_named else 0.3
    figure = style.new_figure(width, 1.9 + (panel if shows_heads else 0) + margin + 0.7)
    ratios = [1.9, panel] if shows_heads else [1.9]
    rows = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    positions = np.arange(num_tokens)
    mean = weights.mean(axis=0)
    rows[0].bar(positions, mean, color=style.BLUE, width=0.8)
    rows[0].hlines(
        uniform, positions - 0.4, positions + 0.4, color=style.VERMILION, linewidth=1.5, label="if all were equal"
    )
    rows[0].set_ylim(0, 1.25 * max(mean.max(), uniform.max()))
    rows[0].set_ylabel("mean weight")
    rows[0].set_title(f"mean over {attention['num_images']:,} images", fontsize=10)
    rows[0].legend(loc="upper left", fontsize=8, frameon=False)
    if shows_heads:
        from matplotlib.ticker import MaxNLocator

        image = rows[1].imshow(weights, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        rows[1].yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        rows[1].set_ylabel("attention head")
        figure.colorbar(image, ax=rows[1], label="weight", pad=0.01)
    if is_named:
        rows[-1].set_xticks(positions, names, rotation=90, fontsize=8, parse_math=False)
    rows[-1].set_xlim(-0.5, num_tokens - 0.5)
    _save(figure, path)


def _by_layer(attention: dict[str, Any]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, weights `(H, M)` and equal shares `(M,)` of what is shown: tokens, and the patches of a layer together."""
    names = [re.sub(r"patch \d+$", "patches", plain_text(name, 40)) for name in attention["token_names"]]
    names = [re.sub(r"(grid:\d+) cell \d+$", r"\1", name) for name in names]
    mean = np.asarray(attention["mean"], dtype=np.float64)
    if not any(re.search(r"patches$|grid:\d+$", name) for name in names):
        return names, mean, np.full(len(names), 1 / len(names))
    shown = list(dict.fromkeys(names))
    belongs = np.array([[name == other for other in shown] for name in names], dtype=np.float64)  # (N, M)
    return shown, mean @ belongs, belongs.mean(axis=0)


def _save(figure: Figure, path: str | Path) -> None:
    with warnings.catch_warnings(), staged_file(Path(path)) as staged:
        # Names in scripts that matplotlib's font lacks are drawn as boxes; the card's text has them.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        figure.savefig(staged, format="png", dpi=_DPI)


__all__ = ["ATTENTION_NAME", "CONFUSION_NAME", "can_draw", "draw_attention", "draw_confusion_matrix"]
