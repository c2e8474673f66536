"""The parts of a report that look into the backbone: maps of single taps, attention, similarity of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from ..layout import BLOCK_MODULES
from . import figures
from .pages import Pages, file_slugs
from .results import Run
from .scores import MAP_FAMILIES, ScoredStudy, is_mapped
from .statistics import Estimate
from .tables import NONE, Table, format_gain, format_interval, format_p_value, format_points, format_range

# The recipes whose attention is shown, the first that was run.
_ATTENTION_RECIPES = ("alf", "alf-paper")
_FEWEST_FOR_CORRELATION = 5


def write_taps(pages: Pages, study: ScoredStudy) -> None:
    """Maps of single layers and modules."""
    pages.write("## Single layers and modules")
    mapped = [recipe for recipe in study.results.recipes if is_mapped(recipe)]
    if not mapped:
        pages.left_out.append(f"accuracy by layer and module: there are no runs of {', '.join(MAP_FAMILIES)}")
        pages.write("There are no runs of single layers or modules.")
        return
    pages.write(
        "The best of each family, and how far it is ahead of the last layer that was run (of its `block`, for modules) on the same "
        "images. It is the best of many on the test images themselves, so both numbers are **too good**: they show where to "
        "look, and not what a tap that is chosen without the test images would reach. Maps: the best tap is framed."
    )
    for backbone, slug in file_slugs(study.scores).items():
        panels: dict[str, dict[tuple[str, int], float]] = {}
        rows = []
        for dataset, found in study.scores[backbone].items():
            for family in MAP_FAMILIES:
                names = [recipe for recipe in mapped if recipe in found and recipe.startswith(f"{family}:")]
                if names:
                    rows.append(_best_tap(study, backbone, dataset, names))
            there = sorted((recipe for recipe in mapped if recipe in found), key=_map_place)
            if there:
                panels[dataset] = {_tap(recipe): found[recipe].summary.mean for recipe in there}
        if not rows:
            continue
        pages.heading(backbone)
        headers = [
            "dataset",
            "best of its family",
            "balanced accuracy",
            "interval",
            "last layer",
            "difference",
            "taps",
        ]
        pages.table(Table(headers, rows))
        title = f"balanced accuracy (%) by layer and module, {backbone}"
        pages.figure(f"taps-{slug}", title, partial(figures.plot_taps, panels, title=title))


def _best_tap(study: ScoredStudy, backbone: str, dataset: str, recipes: Sequence[str]) -> list[str]:
    """A row of the table."""
    found = study.scores[backbone][dataset]
    best = max(recipes, key=lambda recipe: found[recipe].summary.mean)
    last = [recipe for recipe in recipes if _tap(recipe)[1] == max(_tap(name)[1] for name in recipes)]
    last = [recipe for recipe in last if recipe.count(":") == 1 or recipe.endswith(":block")]
    accuracy = study.accuracy(backbone, dataset, best)
    row = [dataset, best, format_points(found[best].summary.mean), format_interval(accuracy)]
    gain = study.difference(backbone, dataset, best, last[0]) if last and last[0] != best else None
    row.append(format_points(found[last[0]].summary.mean) if last else NONE)
    row.append(NONE if gain is None else format_gain(gain))
    return [*row, str(len(recipes))]


def _tap(recipe: str) -> tuple[str, int]:
    """Row and column of the map: `("module-probe ln2", 7)`."""
    family, layer, *module = recipe.split(":")
    return " ".join([family, *module]), int(layer)


def _map_place(recipe: str) -> tuple:
    family, _, *module = recipe.split(":")
    modules = [*BLOCK_MODULES, *module]
    return MAP_FAMILIES.index(family), modules.index(module[0]) if module else 0


def write_attention(pages: Pages, study: ScoredStudy) -> None:
    results = study.results
    """Where the heads of one recipe look, and whether that goes with what they gain."""
    pages.write("## Attention")
    several = {run.key.recipe for run in results.runs.values() if run.attention is not None and len(run.layers) > 1}
    recipe = next((name for name in (*_ATTENTION_RECIPES, *results.recipes) if name in several), None)
    if recipe is None:
        pages.left_out.append("attention by layer: no run has attention to several layers")
        pages.write("No run has attention to several layers.")
        return
    pages.write(
        f"Of `{recipe}`: the mean over the test images, the heads and all runs. Expected depth is the mean layer, weighted "
        "by attention, as a share of the last; ± is the standard deviation over runs. Entropy is in nats."
    )
    for backbone, slug in file_slugs(results.backbones).items():
        found = {dataset: results.select(backbone, dataset, recipe) for dataset in results.datasets}
        found = {dataset: _with_attention(runs) for dataset, runs in found.items()}
        found = {dataset: runs for dataset, runs in found.items() if runs}
        if found:
            pages.heading(backbone)
            _write_attention_table(pages, backbone, slug, recipe, found)
            _write_depth(pages, study, backbone, slug, recipe, found)
            slugs = file_slugs(found)
            for dataset, runs in found.items():
                title = f"{recipe} on {dataset}, {backbone}"
                draw = partial(figures.plot_attention_heads, runs, title=title)
                pages.figure(f"attention-{slug}-{slugs[dataset]}", f"attention of {title}", draw)


def _with_attention(runs: Sequence[Run]) -> list[Run]:
    """Those that did not diverge and attend to the same tokens as the first of them."""
    shapes = {
        run.key: run.attention.shape
        for run in runs
        if run.attention is not None and math.isfinite(run.balanced_accuracy) and math.isfinite(run.expected_depth)
    }
    there = [run for run in runs if run.key in shapes]
    return [run for run in there if (run.bank, shapes[run.key]) == (there[0].bank, shapes[there[0].key])]


def _write_attention_table(
    pages: Pages, backbone: str, slug: str, recipe: str, found: Mapping[str, Sequence[Run]]
) -> None:
    """A row for each dataset, and the attention of each layer as a figure."""
    rows = []
    masses: dict[str, dict[int, float]] = {}
    for dataset, runs in found.items():
        depths = [run.expected_depth for run in runs]
        spread = f" ± {np.std(depths, ddof=1):.3f}" if len(runs) > 1 else ""
        entropy = float(np.mean([run.attention_entropy for run in runs]))
        weights = np.mean([run.attention.mean(axis=0) for run in runs if run.attention is not None], axis=0)
        row = [dataset, str(len(runs)), f"{np.mean(depths):.3f}{spread}"]
        row.append(f"{entropy:.2f} of {math.log(len(weights)):.2f}")
        bank = runs[0].bank
        if len(bank) == len(weights):
            groups, shares = figures.group_weights(bank, weights)
            names, _ = figures.token_labels(groups)
            top = np.argsort(-shares, kind="stable")[:3]
            row.append(", ".join(f"{names[place]} ({100 * shares[place]:.0f} %)" for place in top))
            masses[dataset] = {
                layer: float(sum(weights[n] for n, t in enumerate(bank) if t[0] == layer)) for layer in runs[0].layers
            }
        else:  # all patches of a layer stand behind one coordinate
            row.append(NONE)
        rows.append(row)
    pages.table(
        Table(["dataset", "runs", "expected depth", "entropy, and of uniform attention", "most attended"], rows)
    )
    if masses:
        title = f"attention by layer, {recipe}, {backbone}"
        pages.figure(f"attention-{slug}", title, partial(figures.plot_attention_by_layer, masses, title=title))


def _write_depth(
    pages: Pages, study: ScoredStudy, backbone: str, slug: str, recipe: str, found: Mapping[str, Sequence[Run]]
) -> None:
    """The expected depth against the gain, a point for each dataset."""
    shown = study.estimates(backbone)
    depths = {dataset: float(np.mean([run.expected_depth for run in runs])) for dataset, runs in found.items()}
    points = {
        dataset: (depth, shown[dataset][recipe])
        for dataset, depth in depths.items()
        if recipe in shown.get(dataset, {}) and math.isfinite(depth)
    }
    if len(points) < 2:
        pages.left_out.append(f"depth of the attention against gain, {backbone}: it takes two datasets")
        return
    title = f"depth of the attention and {study.quantity}, {recipe}, {backbone}"
    draw = partial(figures.plot_depth, points, quantity=study.quantity, title=f"{recipe}, {backbone}")
    pages.figure(f"depth-{slug}", title, draw)
    _write_correlation(pages, list(points.values()))


def _write_correlation(pages: Pages, points: Sequence[tuple[float, Estimate]]) -> None:
    from scipy.stats import spearmanr

    depths, values = [depth for depth, _ in points], [estimate.value for _, estimate in points]
    if len(points) < _FEWEST_FOR_CORRELATION or len(set(depths)) == 1 or len(set(values)) == 1:
        pages.write(f"{len(points)} datasets are too few, or too much alike, for a correlation.")
        return
    test = spearmanr(depths, values)
    pages.write(
        f"Rank correlation (Spearman) {test.statistic:+.2f} over {len(points)} datasets, two-sided p = "
        f"{format_p_value(float(test.pvalue))}."
    )


def write_similarity(pages: Pages, study: ScoredStudy) -> None:
    """Maps of linear CKA."""
    pages.write("## Similarity of tokens")
    entries = study.results.similarities()
    if not entries:
        pages.left_out.append("linear CKA between tokens: the folder has no similarity/")
        pages.write("No similarities were measured.")
        return
    images = format_range([entry["num_images"] for entry in entries])
    pages.write(
        f"Linear CKA between all tokens, {images} images for each dataset. 1: the same up to rotation and scale."
    )
    backbones = list(dict.fromkeys(entry["backbone"] for entry in entries))
    for backbone, slug in file_slugs(backbones).items():
        # Only the same tokens fit into one figure.
        groups: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
        for entry in entries:
            if entry["backbone"] == backbone:
                groups.setdefault(tuple(entry["token_names"]), {})[entry["dataset"]] = entry["linear_cka"]
        for number, (names, matrices) in enumerate(groups.items(), start=1):
            title = f"linear CKA between tokens, {backbone}"
            name = f"similarity-{slug}" + (f"-{number}" if len(groups) > 1 else "")
            pages.figure(name, title, partial(figures.plot_similarity, matrices, names, title=title))
