"""Figures. They need the extra `hf-layerfusion[plots]`."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..style import BLACK, BLUE, GREEN, GREY, LIGHT_GREY, MARKERS, ORANGE, PURPLE, SKY_BLUE, VERMILION, new_figure
from ..sweeps.settings import idle_fields
from .attention import AttentionSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..sweeps import SweepResult

MIN_COLOUR_RANGE = 1e-3

# The chosen setting's colour is used for nothing else.
_CHOSEN_COLOUR = VERMILION
_LINE_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY_BLUE, BLACK)
_LINE_STYLES = ("-", "--", ":", "-.")
_SHORT_NAMES = {
    "learning_rate": "lr",
    "weight_decay": "decay",
    "attention_dropout": "dropout",
    "noise_std": "noise",
    "noise_probability": "noise probability",
    "num_queries": "queries",
    "num_heads": "heads",
    "ridge_penalty": "penalty",
    "mixup_alpha": "mixup",
    "layer_dropout": "layer dropout",
}
# More panels, rows or ticks than this nobody reads.
_MOST_PANELS, _MOST_ROWS, _MOST_TICKS = 4, 30, 7


def plot_attention(summary: AttentionSummary, path: str | Path, title: str = "Layer attention") -> None:
    """Write a heatmap (heads x tokens) of mean and spread, below the weight of each token, as PNG.

    The patches of an activation, and the cells of a grid, are shown as one token, whose weight is their sum.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    names, mean, std, sizes = summary.grouped
    num_heads, num_tokens = mean.shape
    shows_heads = num_heads > 1
    width = max(7.0, 0.34 * num_tokens + 2.2)
    panel = max(1.6, 0.16 * num_heads)
    figure = new_figure(width, 2.6 + (2 * panel if shows_heads else 0) + 2.0)
    ratios = [2.0, panel, panel] if shows_heads else [2.0]
    rows = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    positions = range(num_tokens)
    spread = None if shows_heads else std[0].tolist()
    rows[0].bar(positions, mean.mean(dim=0).tolist(), yerr=spread, color=BLUE, width=0.8)
    shares = [size / sum(sizes) for size in sizes]
    edges = [place - 0.5 for place in range(num_tokens + 1)]
    rows[0].stairs(shares, edges, baseline=None, color=GREY, linestyle="--", linewidth=1)
    uniform = rows[0].annotate(  # beside the axes, where no bar can hide it
        "uniform",
        (1, shares[-1]),
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
        from matplotlib.ticker import MaxNLocator

        for axis, values, name, colours in (
            (rows[1], mean, "mean over images", "viridis"),
            (rows[2], std, "spread over images (std)", "cividis"),
        ):
            # Without the lower limit, a spread of rounding errors would look like one of images.
            highest = max(float(values.max()), MIN_COLOUR_RANGE)
            image = axis.imshow(
                values.numpy(), aspect="auto", cmap=colours, vmin=0, vmax=highest, interpolation="nearest"
            )
            axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.set_ylabel("attention head")
            figure.colorbar(image, ax=axis, label=name, pad=0.01)
    rows[-1].set_xticks(list(positions), names, rotation=90, fontsize=8)
    rows[-1].set_xlim(-0.5, num_tokens - 0.5)
    figure.savefig(path)


def plot_sweep(result: SweepResult, path: str | Path | BinaryIO) -> None:
    """Write what a sweep found as PNG: validation curves on the left, the score of each setting on the right.

    Heads in closed form have no epochs: their curve is over penalties.

    On the right, scores stand over weight decay (or learning rate, if the grid varies no decay), with a panel for each
    combination of what else the grid varies; where that would be more than four panels, or the grid varies neither, each
    setting has a row, and the best 30 are shown. Error bars are standard deviations over seeds and folds.

    Raises:
        LayerFusionError: if matplotlib is not installed.
    """
    panels = _panels(result)
    rows = [row for row in result.summary() if not math.isnan(row["mean"])]
    down, along = min(len(panels), 2) or 1, 2 if len(panels) > 2 else 1
    width, height = 6.5 + 5.0 * along, 5.6 if down == 1 else 8.6
    if not panels:
        height = max(4.6, 1.8 + 0.26 * min(len(rows), _MOST_ROWS))
        width += 0.07 * max(0, len(_chosen_name(result)) - 25)
    figure = new_figure(width, height)
    layout = figure.add_gridspec(down, 1 + along)
    curves = figure.add_subplot(layout[:, 0])
    if all(setting.ridge_penalty is not None for setting in result.settings):
        _draw_penalties(curves, result, rows)
    else:
        _draw_curves(curves, result)
    if not panels:
        _draw_strip(figure.add_subplot(layout[0, 1]), result, rows)
    axes: list[Axes] = []
    for number, (title, members) in enumerate(panels.items()):
        first = axes[0] if axes else None
        place = layout[number // along, 1 + number % along]
        axes.append(figure.add_subplot(place, sharex=first, sharey=first))
        _draw_scores(axes[-1], result, [row for row in rows if row["setting"] in members])
        axes[-1].set_title(title)
    if panels:
        figure.legend(handles=_legend(result, rows), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(_sweep_title(result))
    figure.savefig(path, format="png")


def _panels(result: SweepResult) -> dict[str, set[int]]:
    """The numbers of the settings of each panel, by its title; empty if the scores are better shown one by one."""
    if not {"weight_decay", "learning_rate"} & set(result.varied):
        return {}
    others = [n for n in result.varied if n not in ("weight_decay", "learning_rate", "attention_dropout")]
    panels: dict[str, set[int]] = {}
    for number, setting in enumerate(result.settings):
        panels.setdefault(setting_name(setting.to_dict(), others) if others else "", set()).add(number)
    return panels if len(panels) <= _MOST_PANELS else {}


def setting_name(values: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Such as `lr 0.01 · decay 0.1`."""
    idle = idle_fields(values)
    shown = (name for name in fields if values.get(name) is not None and name not in idle)
    return " · ".join(_value_name(name, values[name]) for name in shown)


def _value_name(name: str, value: Any) -> str:
    if name == "recipe":
        return str(value)
    if name == "balance_classes":
        return "balanced\u00a0classes" if value else "plain\u00a0classes"
    return f"{_SHORT_NAMES[name]}\u00a0{value:.3g}"  # no line breaks here


def _chosen_name(result: SweepResult) -> str:
    return setting_name(result.best.to_dict(), result.varied or ["recipe", "learning_rate", "weight_decay"])


def _sweep_title(result: SweepResult) -> str:
    settings = {row["setting"]: row for row in result.trials}
    trained = len({row["trained_as"] for row in settings.values()})
    first = f"{len(settings)} setting{'s' if len(settings) > 1 else ''}"
    if trained < len(settings):
        first += f", {trained} of them trained"
    first += f": best {result.score_name} {result.best_score:.4g}"
    if not math.isnan(result.best_score_std):
        first += f" ± {result.best_score_std:.2g} over {len(result.scores())} runs"
    reasons: dict[int, str] = {}
    for row in result.trials:
        if row["score"] is None:
            reasons[row["setting"]] = "dropped on the way" if row["stopped"] == "halving" else "diverged"
    counts = [f"{list(reasons.values()).count(reason)} {reason}" for reason in sorted(set(reasons.values()))]
    return first + (f"\nwithout a score: {', '.join(counts)}" if counts else "")


def _draw_curves(axis: Axes, result: SweepResult) -> None:
    from matplotlib.ticker import MaxNLocator

    best = result.settings.index(result.best)
    # The last point has a dot: a head may stop early, or be evaluated once.
    style: dict[str, Any] = {"marker": "o", "markevery": [-1], "markersize": 3}
    for curve in sorted(result.curves, key=lambda curve: curve["setting"] == best):
        is_best = curve["setting"] == best
        look: dict[str, Any] = {"color": _CHOSEN_COLOUR, "linewidth": 2.0, "alpha": 1.0}
        if not is_best:
            look = {"color": LIGHT_GREY, "linewidth": 0.8, "alpha": 0.4}
        axis.plot(curve["epochs"], curve["scores"], **look, **style)
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"{result.score_name} (validation)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    axis.set_title(textwrap.fill(f"chosen: {_chosen_name(result)}", 50), color=_CHOSEN_COLOUR, fontsize=11)
    _limit(axis, [score for curve in result.curves for score in curve["scores"]])


def _draw_penalties(axis: Axes, result: SweepResult, rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean score over penalty, a line for each recipe."""
    for place, recipe in enumerate(dict.fromkeys(row["recipe"] for row in result.trials)):
        points = sorted((row["ridge_penalty"], row["mean"]) for row in rows if row["recipe"] == recipe)
        axis.plot(*zip(*points, strict=True), marker="o", color=_LINE_COLOURS[place % 6], label=recipe)
    axis.plot([result.best.ridge_penalty], [result.best_score], **_RING)  # type: ignore[arg-type]
    axis.set_xscale("log")
    axis.set_xlabel("penalty")
    axis.set_ylabel(f"{result.score_name} (validation)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    axis.set_title(textwrap.fill(f"chosen: {_chosen_name(result)}", 50), color=_CHOSEN_COLOUR, fontsize=11)
    _limit(axis, [row["mean"] for row in rows])


def _limit(axis: Axes, values: Sequence[float]) -> None:
    """Errors have no upper end: without a limit, one bad head would press all others into a line."""
    finite = sorted(value for value in values if math.isfinite(value))
    if finite and finite[0] < -1:
        best, middle = finite[-1], finite[len(finite) // 2]
        span = max(3 * (best - middle), 1e-3 * abs(best))
        lowest = max(finite[0] - 0.05 * span, best - span)
        axis.set_ylim(lowest, best + 0.05 * span)
        if finite[0] < lowest:
            axis.text(0.02, 0.02, "lower scores are cut off", transform=axis.transAxes, fontsize=8, color=GREY)


def _draw_scores(axis: Axes, result: SweepResult, rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean score over weight decay, a colour for each learning rate, a marker for each dropout."""
    across = _across(result)
    places = _places([getattr(setting, across) for setting in result.settings])
    colours, dropouts = _colours(result), _values(result, "attention_dropout")
    step = min(b / a for a, b in zip(list(places.values()), list(places.values())[1:], strict=False))
    best = result.settings.index(result.best)
    lines: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        rate = row["learning_rate"] if across != "learning_rate" else None
        lines.setdefault((rate, row["attention_dropout"]), []).append(row)
    for (rate, dropout), members in lines.items():
        members.sort(key=lambda row: row[across])
        number, shift = 0, 1.0
        if dropout is not None:
            number = dropouts.index(dropout)
            # Side by side: they often have the same score.
            shift = min(step, 10.0) ** (0.3 * (number - (len(dropouts) - 1) / 2) / len(dropouts))
        x = [places[row[across]] * shift for row in members]
        colour = colours[rate]
        means, stds = [row["mean"] for row in members], [row["std"] for row in members]
        bars = None if all(map(math.isnan, stds)) else [0.0 if math.isnan(std) else std for std in stds]
        style = _LINE_STYLES[number % len(_LINE_STYLES)]
        axis.errorbar(x, means, bars, color=colour, linestyle=style, linewidth=1.2, elinewidth=0.8, capsize=2)
        marker: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "color": colour}
        for is_own, fill in ((True, colour), (False, "white")):
            own = [(row["trained_as"] == row["setting"]) == is_own for row in members]
            points = [list(itertools.compress(values, own)) for values in (x, means)]
            axis.plot(*points, linestyle="none", markerfacecolor=fill, **marker)
        for place, row in zip(x, members, strict=True):
            if row["setting"] == best:
                axis.plot([place], [row["mean"]], zorder=5, **_RING)
    if not rows:
        axis.text(0.5, 0.5, "no score", transform=axis.transAxes, ha="center")
    axis.set_xscale("log")
    shown = list(places)[:: math.ceil(len(places) / _MOST_TICKS)]
    axis.set_xticks([places[value] for value in shown], [f"{value:.3g}" for value in shown], fontsize=9)
    axis.minorticks_off()
    axis.set_xlim(min(places.values()) / step**0.4, max(places.values()) * step**0.4)
    axis.set_xlabel(across.replace("_", " "))
    axis.set_ylabel(f"{result.score_name} (validation)")
    axis.grid(alpha=0.3)
    _limit(axis, [row["mean"] for row in rows])


_RING: dict[str, Any] = {
    **{"marker": "o", "markersize": 13, "linestyle": "none"},
    **{"markerfacecolor": "none", "markeredgecolor": _CHOSEN_COLOUR, "markeredgewidth": 2},
}


def _across(result: SweepResult) -> str:
    return "weight_decay" if "weight_decay" in result.varied else "learning_rate"


def _values(result: SweepResult, name: str) -> list:
    """What the grid has for a field, in rising order, without the `None` of linear heads."""
    return sorted({getattr(setting, name) for setting in result.settings} - {None})


def _places(values: Sequence[float]) -> dict[float, float]:
    """Where values stand on a logarithmic axis: 0 a decade below the smallest other."""
    ordered = sorted(set(values))
    positive = [value for value in ordered if value]
    return {value: value or positive[0] / 10 for value in ordered}


def _colours(result: SweepResult) -> dict[float | None, Any]:
    from matplotlib import colormaps

    rates = _values(result, "learning_rate") if _across(result) != "learning_rate" else [None]
    if len(rates) <= len(_LINE_COLOURS):
        return dict(zip(rates, _LINE_COLOURS, strict=False))
    return {rate: colormaps["viridis"](number / len(rates)) for number, rate in enumerate(rates)}


def _legend(result: SweepResult, rows: Sequence[Mapping[str, Any]]) -> list:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, label=f"learning rate {rate:.3g}")
        for rate, colour in _colours(result).items()
        if rate is not None
    ]
    dropouts = _values(result, "attention_dropout")
    for number, dropout in enumerate(dropouts):
        if len(dropouts) > 1:
            look: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "color": GREY}
            look["linestyle"] = _LINE_STYLES[number % len(_LINE_STYLES)]
            handles.append(Line2D([], [], label=f"attention dropout {dropout:.3g}", **look))
    if any(row["trained_as"] != row["setting"] for row in rows):
        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "linestyle": "none"}
        handles.append(Line2D([], [], color=GREY, label="same run as a stronger decay", **hollow))
    return [*handles, Line2D([], [], label="chosen", **_RING | {"markersize": 10})]


def _draw_strip(axis: Axes, result: SweepResult, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row for each setting, the best on top."""
    best = result.settings.index(result.best)
    shown = rows[:_MOST_ROWS]
    names = result.varied or ["recipe", "learning_rate", "weight_decay"]
    for place, row in enumerate(shown):
        colour = _CHOSEN_COLOUR if row["setting"] == best else _LINE_COLOURS[0]
        spread = None if math.isnan(row["std"]) else row["std"]
        axis.errorbar(row["mean"], place, xerr=spread, color=colour, marker="o", linestyle="none", capsize=2)
    axis.set_yticks(range(len(shown)), [setting_name(row, names) for row in shown], fontsize=9)
    for label, row in zip(axis.get_yticklabels(), shown, strict=True):
        if row["setting"] == best:
            label.set_color(_CHOSEN_COLOUR)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlabel(f"{result.score_name} (validation)")
    axis.grid(alpha=0.3)
    if len(shown) < len(rows):
        axis.set_title(f"the best {len(shown)} of {len(rows)} settings")
