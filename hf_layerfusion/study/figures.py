"""The figures of a study's report. They need the extra `hf-layerfusion[plots]`.

All are at most ten inches wide, so that a page shows them without shrinking the letters away; what does not fit beside
each other goes below each other. No colour is the only sign of anything.
"""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bank import TokenBank, TokenCoordinate
from ..errors import LayerFusionError
from ..style import BLACK, BLUE, GREEN, GREY, MARKERS, PURPLE, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .results import Run
    from .statistics import Estimate

_WIDTH = 10.0
_SMALL, _LONGEST_NAME = 8, 30
# By what a recipe's name begins with: what it is, colour, marker.
_KINDS = {
    "linear": ("linear", BLUE, MARKERS[0]),
    "alf": ("attentive over layers", VERMILION, MARKERS[1]),
    "aat": ("attentive over all tokens", GREEN, MARKERS[2]),
    "ridge": ("least squares", PURPLE, MARKERS[4]),
    "": ("other", BLACK, MARKERS[3]),
}
# The recipes of the lines of `plot_layer_counts`, from the fewest layers to all.
LAYER_COUNT_LINES = {
    "linear": ("linear-last-cls-mean", "linear-mid-last", "linear-quarterly", "linear-all"),
    "alf": ("alf-last", "alf-mid-last", "alf-quarterly", "alf"),
}
_LAYER_COUNTS = ("last", "middle\nand last", "quarterly", "all")
# More rows or ticks than this need smaller steps between their labels.
_MOST_TICKS = 32


def label(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name as text of a figure: no mathematics, and the middle of a long one left out."""
    if len(name) > longest:
        half = (longest - 1) // 2
        name = f"{name[: longest - 1 - half]}…{name[-half:]}"
    return name.replace("$", r"\$")


def _title(figure: Figure, *lines: str) -> None:
    figure.suptitle("\n".join(textwrap.fill(label(line, 200), 90) for line in lines), fontsize=11)


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Names in a script that the font lacks are drawn as boxes; the report has them as text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def _save(figure: Figure, path: Path) -> None:
    with _without_glyph_warnings():
        figure.savefig(path, format="png")


def _panels(
    count: int, most_columns: int, height: float, extra: float = 0.8, narrow: float = 3.3, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A grid of `count` axes of about that height each, in inches."""
    columns = min(count, most_columns)
    rows = math.ceil(count / columns)
    figure = new_figure(min(_WIDTH, 2.0 + narrow * columns), extra + rows * height)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    axes = list(grid.flat)
    for axis in axes[count:]:
        figure.delaxes(axis)
    return figure, axes[:count]


def _kind(recipe: str) -> tuple[str, str, str]:
    return _KINDS[next(start for start in _KINDS if recipe.startswith(start))]


def _kind_legend(figure: Figure, recipes: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=name)
        for name, colour, marker in dict.fromkeys(map(_kind, recipes))
    ]
    # Two inches hold the longest name; a legend that is wider than its figure is cut off.
    columns = max(1, min(len(handles), int(figure.get_figwidth() // 2.1)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def _bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """`(2, n)`: how far an interval reaches below and above its value, in points."""
    low = [max(0.0, estimate.value - estimate.low) for estimate in estimates]
    high = [max(0.0, estimate.high - estimate.value) for estimate in estimates]
    return 100 * np.array([low, high])


def plot_by_dataset(
    scores: Mapping[str, Mapping[str, Estimate]], recipes: Sequence[str], path: Path, *, title: str, quantity: str
) -> None:
    """A panel for each dataset, a row for each recipe: dots with their intervals.

    Args:
        scores: by dataset and recipe, as shares; what is missing leaves its row empty.
        recipes: from top to bottom.
        path: of the PNG.
        title: of the figure.
        quantity: what the scores are, with their unit; zero is marked if it begins with "gain".

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    height = 0.75 + 0.19 * len(recipes)
    figure, axes = _panels(len(scores), 4, height, extra=1.1, narrow=2.8, sharey=True)
    columns = min(len(scores), 4)
    for number, (axis, (dataset, found)) in enumerate(zip(axes, scores.items(), strict=True)):
        for place, recipe in enumerate(recipes):
            if recipe in found:
                _, colour, marker = _kind(recipe)
                point = [found[recipe]]
                style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "elinewidth": 1.2}
                axis.errorbar(100 * point[0].value, place, xerr=_bars(point), linestyle="none", **style)
        if quantity.startswith("gain"):
            axis.axvline(0, color=GREY, linewidth=1, linestyle="--", zorder=0)
        axis.set_title(textwrap.fill(label(dataset, 40), 22), fontsize=9)
        axis.set_yticks(range(len(recipes)), [label(recipe) for recipe in recipes], fontsize=_SMALL)
        axis.tick_params(axis="x", labelsize=_SMALL)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        if number % columns:
            axis.tick_params(axis="y", length=0)
    axes[0].set_ylim(len(recipes) - 0.4, -0.6)
    _title(figure, title, quantity)  # a common label of the x axes would lie under the legend
    _kind_legend(figure, recipes)
    _save(figure, path)


def layer_count_panels(
    scores: Mapping[str, Mapping[str, Estimate]], mean: Callable[[Sequence[Estimate]], Estimate]
) -> dict[str, Mapping[str, Estimate]]:
    """What `plot_layer_counts` draws: datasets on which a line has two of its recipes; of several also their mean."""
    panels = {name: found for name, found in scores.items() if any(_line(found, kind) for kind in LAYER_COUNT_LINES)}
    if len(panels) < 2:
        return dict(panels)
    return {f"mean of {len(panels)} datasets": _mean_panel(panels, mean), **panels}


def plot_layer_counts(panels: Mapping[str, Mapping[str, Estimate]], path: Path, *, title: str, quantity: str) -> None:
    """What more layers bring: a panel for each dataset, a line for each kind of head.

    Args:
        panels: by dataset and recipe, as shares; at least one.
        path: of the PNG.
        title: of the figure.
        quantity: what the scores are, with their unit.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    figure, axes = _panels(len(panels), 4, 2.2, extra=1.1, narrow=2.8)
    for axis, (dataset, found) in zip(axes, panels.items(), strict=True):
        for shift, kind in ((-0.06, "linear"), (0.06, "alf")):
            line = _line(found, kind)
            places = [LAYER_COUNT_LINES[kind].index(recipe) + shift for recipe in line]
            estimates = [found[recipe] for recipe in line]
            _, colour, marker = _KINDS[kind]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}
            axis.errorbar(places, [100 * e.value for e in estimates], _bars(estimates), capsize=2, **style)
        if quantity.startswith("gain"):
            axis.axhline(0, color=GREY, linewidth=1, linestyle="--", zorder=0)
        axis.set_title(textwrap.fill(label(dataset, 40), 22), fontsize=9)
        axis.set_xticks(range(len(_LAYER_COUNTS)), _LAYER_COUNTS, fontsize=7)
        axis.set_xlim(-0.4, len(_LAYER_COUNTS) - 0.6)
        axis.tick_params(axis="y", labelsize=_SMALL)
        axis.locator_params(axis="y", nbins=5)
        axis.grid(alpha=0.3)
    _title(figure, title, f"{quantity} by layers read")
    _kind_legend(figure, [kind for kind in LAYER_COUNT_LINES if any(_line(found, kind) for found in panels.values())])
    _save(figure, path)


def _line(found: Mapping[str, Estimate], kind: str) -> list[str]:
    there = [recipe for recipe in LAYER_COUNT_LINES[kind] if recipe in found]
    return there if len(there) > 1 else []


def _mean_panel(
    panels: Mapping[str, Mapping[str, Estimate]], mean: Callable[[Sequence[Estimate]], Estimate]
) -> dict[str, Estimate]:
    """Only recipes that every panel has: means of different datasets do not make a line."""
    common = set.intersection(*(set(found) for found in panels.values()))
    return {
        recipe: mean([found[recipe] for found in panels.values()])
        for line in LAYER_COUNT_LINES.values()
        for recipe in line
        if recipe in common
    }


def plot_attention_heads(runs: Sequence[Run], path: Path, *, title: str) -> None:
    """Above the weight of each token, a mean over heads and runs; below it what each head of the first run does.

    Heads of different runs have nothing in common but their number, so they are not averaged. The patches of an
    activation, and the cells of a grid, are shown as one token, whose weight is their sum.

    Args:
        runs: of one recipe, all with attention to the same tokens.
        path: of the PNG.
        title: of the figure.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    groups, first = group_weights(runs[0].bank, _attention(runs[0]))
    _, uniform = group_weights(runs[0].bank, np.full(_attention(runs[0]).shape[1], 1 / _attention(runs[0]).shape[1]))
    weights = np.array([group_weights(run.bank, _attention(run).mean(axis=0))[1] for run in runs])
    num_heads, num_tokens = first.shape
    panel = min(5.0, max(1.2, 0.16 * num_heads))
    with_heads = num_heads > 1
    figure = new_figure(_WIDTH, 3.4 + (panel if with_heads else 0))
    ratios = [1.6, panel] if with_heads else [1.6]
    rows = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    spread = 100 * np.std(weights, axis=0, ddof=1) if len(runs) > 1 else None
    rows[0].bar(range(num_tokens), 100 * weights.mean(axis=0), yerr=spread, color=BLUE, width=0.8)
    edges = np.arange(num_tokens + 1) - 0.5
    rows[0].stairs(100 * uniform, edges, baseline=None, color=GREY, linestyle="--", linewidth=1)
    runs_said = f"{len(runs)} runs, ± their standard deviation" if len(runs) > 1 else "1 run"
    rows[0].set_title(f"mean over heads ({runs_said}; dashed: uniform)", fontsize=9, loc="left")
    rows[0].set_ylabel("weight (%)", fontsize=9)
    if with_heads:
        from matplotlib.ticker import MaxNLocator

        image = rows[1].imshow(
            100 * first, aspect="auto", cmap="viridis", vmin=0, vmax=max(0.1, 100 * float(first.max())),
            interpolation="nearest",
        )  # fmt: skip
        rows[1].yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        rows[1].set_ylabel("attention head", fontsize=9)
        key = runs[0].key
        rows[1].set_title(f"heads of split {key.split}, seed {key.seed}", fontsize=9, loc="left")
        figure.colorbar(image, ax=rows[1], label="weight (%)", pad=0.01)
    _name_tokens(rows[-1], groups, num_tokens)
    rows[-1].set_xlim(-0.5, num_tokens - 0.5)
    _title(figure, title)
    _save(figure, path)


def _attention(run: Run) -> np.ndarray:
    if run.attention is None:
        raise LayerFusionError(f"the run {run.key.stem} has no attention to draw")
    return run.attention


def group_weights(
    bank: Sequence[tuple[int, str, str]], weights: np.ndarray
) -> tuple[list[TokenCoordinate], np.ndarray]:
    """The groups of a bank's tokens (`TokenBank.groups`), and `(..., N)` weights of tokens as `(..., G)` of groups."""
    groups = TokenBank.from_list(bank).groups
    if weights.shape[-1] != len(bank):  # all patches of a layer stand behind one coordinate
        return list(groups), weights
    return list(groups), np.stack([weights[..., positions].sum(axis=-1) for positions in groups.values()], axis=-1)


def _name_tokens(axis: Axes, bank: Sequence[tuple[int, str, str]], num_tokens: int) -> None:
    names, shared = token_labels(bank)
    if len(names) != num_tokens:  # all patches of a layer stand behind one coordinate
        axis.set_xlabel("token", fontsize=9)
        return
    step = math.ceil(num_tokens / (2 * _MOST_TICKS))
    axis.set_xticks(range(0, num_tokens, step), names[::step], rotation=90, fontsize=_SMALL)
    axis.set_xlabel(f"token: {shared}", fontsize=9)


def token_labels(bank: Sequence[tuple[int, str, str]]) -> tuple[list[str], str]:
    """Short names of tokens, without what all share, and what the names are made of."""
    coordinates = [TokenCoordinate(*row) for row in bank]
    modules, pools = ({row[place] for row in coordinates} for place in (1, 2))
    parts: list[str] = ["layer", *(["module"] if len(modules) > 1 else []), *(["pool"] if len(pools) > 1 else [])]
    names = [" · ".join(dict.fromkeys(str(getattr(row, part)) for part in parts)) for row in coordinates]
    shared = [str(next(iter(values))) for values in (modules, pools) if len(values) == 1]
    return names, " · ".join(parts) + (f" ({', '.join(shared)})" if shared else "")


def plot_attention_by_layer(masses: Mapping[str, Mapping[int, float]], path: Path, *, title: str) -> None:
    """The attention that each layer gets, a row for each dataset, those that look deepest at the bottom.

    Args:
        masses: by dataset, the share of each layer; the shares of a dataset sum to one.
        path: of the PNG.
        title: of the figure.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    layers = sorted({layer for found in masses.values() for layer in found})
    depth = {name: sum(layer * share for layer, share in found.items()) for name, found in masses.items()}
    order = sorted(masses, key=lambda name: (depth[name], name))
    values = 100 * np.array([[masses[name].get(layer, 0.0) for layer in layers] for name in order])
    figure = new_figure(min(_WIDTH, 3.6 + 0.48 * len(layers)), 1.9 + 0.27 * len(order))
    axis = figure.subplots()
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=max(0.1, values.max()))
    _write_values(axis, values, image, digits=0, fits=len(layers) <= 16)
    axis.set_xticks(range(len(layers)), map(str, layers), fontsize=_SMALL)
    axis.set_yticks(range(len(order)), [label(name) for name in order], fontsize=_SMALL)
    axis.set_xlabel("layer", fontsize=9)
    figure.colorbar(image, ax=axis, label="attention (%)", pad=0.02)
    _title(figure, title)
    _save(figure, path)


def _write_values(axis: Axes, values: np.ndarray, image: Any, digits: int, fits: bool) -> None:
    """Numbers into the cells of a heatmap, light on dark and dark on light."""
    if not fits:
        return
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axis.text(
                column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )  # fmt: skip


def plot_taps(panels: Mapping[str, Mapping[tuple[str, int], float]], path: Path, *, title: str) -> None:
    """Balanced accuracy by what is read (rows) and layer (columns), a panel for each dataset; the best is framed.

    Args:
        panels: by dataset, the score (a share) of each `(row name, layer)`.
        path: of the PNG.
        title: of the figure.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    rows = list(dict.fromkeys(row for found in panels.values() for row, _ in found))
    layers = sorted({layer for found in panels.values() for _, layer in found})
    # A panel is as wide as its cells need for their numbers.
    most_columns = 2 if len(layers) <= 13 else 1
    figure, axes = _panels(len(panels), most_columns, 1.0 + 0.2 * len(rows), extra=0.7, narrow=4.0, sharey=True)
    from matplotlib.patches import Rectangle

    for axis, (dataset, found) in zip(axes, panels.items(), strict=True):
        values = np.array([[100 * found.get((row, layer), math.nan) for layer in layers] for row in rows])
        image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        _write_values(axis, values, image, digits=1, fits=len(layers) <= 26)
        if np.isfinite(values).any():
            row, column = divmod(int(np.nanargmax(values)), len(layers))
            frame: dict[str, Any] = {"fill": False, "edgecolor": VERMILION, "linewidth": 2.2, "zorder": 3}
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
        axis.set_title(label(dataset, 40), fontsize=9)
        axis.set_xticks(range(len(layers)), map(str, layers), fontsize=_SMALL)
        axis.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=_SMALL)
        for edge in range(1, len(rows)):
            if rows[edge].partition(" ")[0] != rows[edge - 1].partition(" ")[0]:
                axis.axhline(edge - 0.5, color="white", linewidth=2)
    figure.supxlabel("layer", fontsize=9)
    _title(figure, title)
    _save(figure, path)


def _depth(token_name: str) -> tuple[int, bool]:
    """Sorts tokens of one pool by depth: banks are in the order in which recipes asked for them."""
    found = re.match(r"layer (\d+)", token_name)
    return int(found[1]) if found else -1, "final_norm" in token_name


def plot_similarity(matrices: Mapping[str, np.ndarray], token_names: Sequence[str], path: Path, *, title: str) -> None:
    """Linear CKA between all tokens, a panel for each dataset; tokens of one pool stand together.

    Args:
        matrices: by dataset, `(N, N)`; all of the same tokens.
        token_names: N names such as `layer 7 · block · mean`.
        path: of the PNG.
        title: of the figure.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    pools = [name.rpartition(" · ")[2] for name in token_names]
    order = sorted(range(len(pools)), key=lambda place: (pools.index(pools[place]), *_depth(token_names[place])))
    names = [token_names[place].removeprefix("layer ").replace(" · block · ", " · ") for place in order]
    columns = min(len(matrices), 3 if len(matrices) > 2 else 2)
    step = math.ceil(len(names) / (_MOST_TICKS if columns < 3 else 16))
    ticks = range(0, len(names), step)
    figure, axes = _panels(
        len(matrices), columns, 8.0 / columns + 0.6, extra=0.6, narrow=8.0 / columns, sharex=True, sharey=True
    )
    changes = [place for place in range(1, len(order)) if pools[order[place]] != pools[order[place - 1]]]
    for axis, (dataset, matrix) in zip(axes, matrices.items(), strict=True):
        # Of an unbiased estimator, values of unrelated tokens lie about zero, on either side.
        image = axis.imshow(matrix[np.ix_(order, order)], aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.set_title(label(dataset, 40), fontsize=9)
        axis.set_xticks(ticks, names[::step], rotation=90, fontsize=7)
        axis.set_yticks(ticks, names[::step], fontsize=7)
        axis.tick_params(labelbottom=True)
        for edge in changes:
            axis.axhline(edge - 0.5, color="white", linewidth=1.5)
            axis.axvline(edge - 0.5, color="white", linewidth=1.5)
    figure.colorbar(image, ax=axes, label="linear CKA", pad=0.01, shrink=0.8 if len(axes) <= columns else 0.4)
    _title(figure, title)
    _save(figure, path)


def plot_depth(points: Mapping[str, tuple[float, Estimate]], path: Path, *, title: str, quantity: str) -> None:
    """Where the attention lies against what it brings, a dot with its interval for each dataset.

    Args:
        points: by dataset, the expected depth and the score (a share).
        path: of the PNG.
        title: of the figure.
        quantity: what the scores are, with their unit.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    figure = new_figure(8.0, 5.6)
    axis = figure.subplots()
    x = [depth for depth, _ in points.values()]
    estimates = [estimate for _, estimate in points.values()]
    y = [100 * estimate.value for estimate in estimates]
    axis.errorbar(
        x, y, _bars(estimates), linestyle="none", color=VERMILION, marker=MARKERS[1], markersize=5, elinewidth=0.8
    )
    if quantity.startswith("gain"):
        axis.axhline(0, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axis.margins(x=0.15, y=0.1)
    axis.set_xlabel("expected depth of the attention (1 is the last layer)", fontsize=9)
    axis.set_ylabel(quantity, fontsize=9)
    axis.tick_params(labelsize=_SMALL)
    axis.grid(alpha=0.3)
    axis.set_title(textwrap.fill(label(title, 200), 80), fontsize=11)
    with _without_glyph_warnings():
        _name_points(figure, axis, list(zip(points, x, y, strict=True)))
    _save(figure, path)


def _name_points(figure: Figure, axis: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside dots, each at the first of some places around its dot that hides no other name or dot."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # gives the axes their place, on which all distances depend
    scale = figure.dpi / 72
    frame = axis.get_window_extent()
    dots = [axis.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox.from_extents(dx - 4 * scale, dy - 4 * scale, dx + 4 * scale, dy + 4 * scale) for dx, dy in dots]
    angles = [0, 180, 90, 270, 45, 135, 225, 315]
    for (name, x, y), dot in zip(points, dots, strict=True):
        text = axis.annotate(label(name, 24), (x, y), textcoords="offset points", xytext=(0, 0), fontsize=_SMALL)
        size = text.get_window_extent()
        best: tuple[float, tuple[float, float], Any] | None = None
        for distance in (6, 14, 24, 36, 50, 66):
            for angle in angles:
                across, along = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                left = dot[0] + across * distance * scale - size.width * (1 - across) / 2
                bottom = dot[1] + along * distance * scale - size.height * (1 - along) / 2
                box = Bbox.from_bounds(left, bottom, size.width, size.height)
                outside = not (frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1)
                cost = sum(box.overlaps(other) for other in taken) + 10 * outside + distance / 1000
                if best is None or cost < best[0]:
                    offset = ((left - dot[0]) / scale, (bottom - dot[1]) / scale)
                    best = (cost, offset, (box, distance))
        assert best is not None
        text.set_position(best[1])
        text.set_verticalalignment("bottom")
        box, distance = best[2]
        taken.append(box)
        if distance > 6:
            middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
            ends = [axis.transData.inverted().transform(place) for place in (dot, middle)]
            axis.plot(*zip(*ends, strict=True), color=GREY, linewidth=0.5, zorder=0, scalex=False, scaley=False)
