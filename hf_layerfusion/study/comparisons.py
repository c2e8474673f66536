"""The parts of a report that set recipes against each other: over datasets, by dataset, and in tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import numpy as np

from . import figures
from .pages import Pages, file_slugs
from .scores import Score, ScoredStudy
from .statistics import TIE, Estimate, SignedRankTest, adjust_p_values, mean_estimate, signed_rank_test
from .tables import NONE, Bold, Table, escape_markdown, format_gain, format_interval, format_p_value, format_points

# What arXiv 2601.09322 tests over datasets (its figure 2); of our two forms of ALF, whichever was run.
PAPER_COMPARISONS = (
    *itertools.product(("alf", "alf-paper"), ("alf-last", "linear-all", "aat")),
    ("linear-all", "linear-last-cls-mean"),
)
SIGNIFICANT = 0.05
_MARKDOWN_COLUMNS, _LATEX_COLUMNS = 4, 5
# Backbone, first and second recipe; by how much they differ on each dataset; the test.
_Tested = tuple[tuple[str, str, str], list[Estimate], SignedRankTest]


def write_summary(pages: Pages, study: ScoredStudy, recipes: Sequence[str]) -> None:
    """What each recipe reached over datasets, and over datasets of a kind."""
    pages.write("## Over datasets")
    if not study.has_baseline:
        pages.write(f"There is no run of `{study.baseline}`, so there are no gains.")
    tables = []
    for backbone, scores in study.scores.items():
        table = _summary_table(study, recipes, list(scores.values()), mean_estimate)
        pages.heading(backbone)
        pages.table(table)
        tables.append((f"Over datasets, backbone {backbone}", table))
    if len(study.scores) > 1:
        every = [found for scores in study.scores.values() for found in scores.values()]
        table = _summary_table(study, recipes, every, None)
        pages.write(
            "### All backbones",
            "",
            "A row for each backbone and dataset. Backbones share test images, so there is no interval.",
        )
        pages.table(table)
        tables.append(("Over backbones and datasets", table))
    if study.has_baseline:
        pages.write(
            "*Wins, ties, losses* count datasets by the sign of the gain, *clear* those wins and losses whose interval "
            "does not hold 0, *best* those on which no recipe of this table is ahead. The interval of the mean gain takes "
            "the datasets as given."
        )
    pages.latex("summary", tables)
    _write_domains(pages, study, recipes)


def _summary_table(
    study: ScoredStudy,
    recipes: Sequence[str],
    datasets: Sequence[Mapping[str, Score]],
    mean: Callable[[Sequence[Estimate]], Estimate] | None,
) -> Table:
    """A row for each recipe; `mean` gives the interval of the mean gain."""
    headers = ["recipe", "n", "mean accuracy", "best"]
    if study.has_baseline:
        headers += ["mean gain", *(["interval"] if mean else [])]
        headers += ["median", "min", "max", "wins, ties, losses", "clear"]
    best = [_best({recipe: found[recipe].summary.mean for recipe in recipes if recipe in found}) for found in datasets]
    rows = []
    means: dict[str, float] = {}
    for recipe in recipes:
        found = [scores[recipe] for scores in datasets if recipe in scores]
        if not found:
            continue
        means[recipe] = float(np.mean([score.summary.mean for score in found]))
        row = [recipe, str(len(found)), format_points(means[recipe]), str(sum(recipe in names for names in best))]
        gains = [score.gain for score in found if score.gain is not None]
        if study.has_baseline and gains:
            values = [gain.value for gain in gains]
            row += [format_points(float(np.mean(values)), sign=True)]
            row += [format_interval(mean(gains), sign=True)] if mean else []
            row += [format_points(value, sign=True) for value in (median(values), min(values), max(values))]
            counts = signed_rank_test(values)
            row += [f"{counts.wins}, {counts.ties}, {counts.losses}", _clear_counts(gains)]
        rows.append(row + [NONE] * (len(headers) - len(row)))
    for row in rows:
        if row[0] in _best(means):
            row[2] = Bold(row[2])
    return Table(headers, rows)


def _clear_counts(gains: Sequence[Estimate]) -> str:
    """Wins and losses whose interval does not hold 0."""
    wins = sum(gain.excludes_zero and gain.value > 0 for gain in gains)
    losses = sum(gain.excludes_zero and gain.value < 0 for gain in gains)
    return f"{wins}, {losses}"


def _best(values: Mapping[str, float]) -> set[str]:
    """The names with the highest value; all of them if several have it."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return {name for name, value in finite.items() if value >= max(finite.values()) - TIE}


def _write_domains(pages: Pages, study: ScoredStudy, recipes: Sequence[str]) -> None:
    """The mean gain by kind of dataset, if the config tells kinds apart."""
    domains = {str(e["name"]): str(e["domain"]) for e in study.results.config.get("datasets", ()) if e.get("domain")}
    names = list(dict.fromkeys(domains.values()))
    if len(names) < 2 or not study.has_baseline:
        return
    pages.write("### Mean gain by domain", "", "In brackets: the number of datasets.")
    for backbone, scores in study.scores.items():
        rows = []
        for recipe in recipes:
            row = [recipe]
            for domain in names:
                found = [s[recipe].gain for d, s in scores.items() if domains.get(d) == domain and recipe in s]
                values = [gain.value for gain in found if gain is not None]
                row.append(f"{format_points(float(np.mean(values)), sign=True)} ({len(values)})" if values else NONE)
            if set(row[1:]) != {NONE}:
                rows.append(row)
        pages.table(Table([backbone, *names], rows))


def write_by_dataset(pages: Pages, study: ScoredStudy, recipes: Sequence[str]) -> None:
    """Balanced accuracies as tables, gains as tables and figures; without a baseline, accuracies as figures too."""
    pages.write("## Balanced accuracy by dataset")
    latex = []
    for backbone, scores in study.scores.items():
        pages.heading(backbone)
        for table in _blocks(_accuracy_cells(scores, recipes, study.spreads, True), recipes, _MARKDOWN_COLUMNS):
            pages.table(table)
        narrow = _blocks(_accuracy_cells(scores, recipes, study.spreads, False), recipes, _LATEX_COLUMNS)
        latex += [(f"Balanced accuracy (%), backbone {backbone}", table) for table in narrow]
    pages.latex("accuracy", latex)
    if study.has_baseline:
        pages.write(f"## Gain over {escape_markdown(study.baseline)} by dataset")
    else:
        pages.write("## The same as figures")
    latex = []
    for backbone, slug in file_slugs(study.scores).items():
        pages.heading(backbone)
        shown = study.estimates(backbone)
        if study.has_baseline:
            cells = {
                name: {recipe: format_gain(gain) for recipe, gain in found.items()} for name, found in shown.items()
            }
            for table in _blocks(cells, recipes, _MARKDOWN_COLUMNS):
                pages.table(table)
            narrow = _blocks(cells, recipes, _LATEX_COLUMNS)
            latex += [(f"G{study.quantity[1:]}, backbone {backbone}", table) for table in narrow]
        _draw_by_dataset(pages, study, recipes, shown, backbone, slug)
    pages.latex("gains", latex)


def _draw_by_dataset(
    pages: Pages,
    study: ScoredStudy,
    recipes: Sequence[str],
    shown: Mapping[str, Mapping[str, Estimate]],
    backbone: str,
    slug: str,
) -> None:
    title = f"{study.quantity} by dataset, {backbone}"
    rows = [recipe for recipe in recipes if any(recipe in found for found in shown.values())]
    if rows:
        draw = partial(figures.plot_by_dataset, shown, rows, quantity=study.quantity, title=backbone)
        pages.figure(f"gains-{slug}", title, draw)
    else:
        pages.left_out.append(f"{title}: there is no recipe besides {study.baseline}")
    title = f"{study.quantity} by number of layers, {backbone}"
    lines = figures.layer_count_panels(shown, mean_estimate)
    if lines:
        draw = partial(figures.plot_layer_counts, lines, quantity=study.quantity, title=backbone)
        pages.figure(f"layer-counts-{slug}", title, draw)
    else:
        wanted = " or of ".join(", ".join(line) for line in figures.LAYER_COUNT_LINES.values())
        pages.left_out.append(f"{title}: it takes runs of two of {wanted} on one dataset")


def _blocks(cells: Mapping[str, Mapping[str, str]], recipes: Sequence[str], datasets_at_once: int) -> list[Table]:
    """Recipes as rows and datasets as columns, some datasets to a table; `cells` is by dataset and recipe."""
    tables = []
    names = [dataset for dataset, found in cells.items() if found]
    count = math.ceil(len(names) / datasets_at_once)
    for number in range(count):  # of about the same width
        shown = names[number * len(names) // count : (number + 1) * len(names) // count]
        rows = [[recipe, *(cells[name].get(recipe, NONE) for name in shown)] for recipe in recipes]
        tables.append(Table(["recipe", *shown], [row for row in rows if set(row[1:]) != {NONE}]))
    return tables


def _accuracy_cells(
    scores: Mapping[str, Mapping[str, Score]], recipes: Sequence[str], spreads: tuple[bool, bool], with_interval: bool
) -> dict[str, dict[str, str]]:
    cells: dict[str, dict[str, str]] = {}
    for dataset, found in scores.items():
        there = {recipe: found[recipe] for recipe in recipes if recipe in found}
        best = _best({recipe: score.summary.mean for recipe, score in there.items()})
        texts = {recipe: _accuracy_cell(score, spreads, with_interval) for recipe, score in there.items()}
        cells[dataset] = {recipe: Bold(text) if recipe in best else text for recipe, text in texts.items()}
    return cells


def _accuracy_cell(score: Score, spreads: tuple[bool, bool], with_interval: bool) -> str:
    text = format_points(score.summary.mean)
    for shown, value in zip(spreads, (score.summary.std_seeds, score.summary.std_splits), strict=True):
        text += f" ± {format_points(value)}" if shown else ""
    return f"{text} {format_interval(score.accuracy)}" if with_interval and score.accuracy is not None else text


def write_against_references(pages: Pages, study: ScoredStudy, recipes: Sequence[str]) -> None:
    """Every recipe against the best of the study's references, which may be another one for each dataset."""
    references = [recipe for recipe in study.references if recipe in recipes]
    if len(references) < 2 or len(recipes) == len(references):
        return
    pages.write(f"## Lead over the best of {', '.join(references)}")
    pages.write(
        "In percentage points, on the same test images. The best of them is told by its score on those images, which "
        "favours it: nobody could have chosen it beforehand. *Least* is the dataset on which a recipe does worst against it."
    )
    tables = []
    for backbone, scores in study.scores.items():
        best = {}
        for dataset, found in scores.items():
            means = {recipe: found[recipe].summary.mean for recipe in references if recipe in found}
            if len(means) == len(references):
                best[dataset] = max(means, key=lambda recipe: means[recipe])
        rows = []
        for recipe in recipes:
            leads = [
                study.difference(backbone, dataset, recipe, rival)
                for dataset, rival in best.items()
                if recipe in scores[dataset]
            ]
            there = [lead for lead in leads if lead is not None]
            if len(there) < len(best) or not there:
                continue
            mean, least = mean_estimate(there), min(lead.value for lead in there)
            cells = [format_points(lead.value, sign=True) for lead in there]
            summary = f"{format_points(mean.value, sign=True)} {format_interval(mean, sign=True)}"
            rows.append([recipe, *cells, summary, format_points(least, sign=True), _clear_counts(there)])
        if rows:
            table = Table(
                ["recipe", *(f"{dataset} ({rival})" for dataset, rival in best.items()), "mean", "least", "clear"],
                rows,
            )
            pages.heading(backbone)
            pages.table(table)
            tables.append((f"Lead over the best of {', '.join(references)}, backbone {backbone}", table))
    pages.latex("references", tables)


def write_tests(pages: Pages, study: ScoredStudy, recipes: Sequence[str]) -> None:
    """The paper's comparisons, and every recipe against the baseline."""
    pages.write("## Tests over datasets")
    paper = [pair for pair in PAPER_COMPARISONS if set(pair) <= set(recipes)]
    with_baseline = [(recipe, study.baseline) for recipe in recipes if recipe != study.baseline]
    families = {"The comparisons of arXiv 2601.09322": paper}
    families[f"Every recipe against {study.baseline}"] = with_baseline if study.has_baseline else []
    for reference in study.references:
        if reference in recipes and reference != study.baseline:
            others = [(recipe, reference) for recipe in recipes if recipe not in study.references]
            families[f"Every recipe against {reference}"] = others
    families = {title: pairs for title, pairs in families.items() if pairs}
    if not families:
        pages.write("There are no two recipes to compare.")
        return
    pages.write(
        "One-sided Wilcoxon signed-rank tests over datasets: is the first recipe better than the second? *adjusted* is "
        "corrected for the number of tests of the table (Benjamini and Hochberg). *smallest* is the smallest p that a test "
        "over so many datasets can give, before the correction. An interval is that of the mean difference, over test "
        "images."
    )
    latex = []
    for title, pairs in families.items():
        tested = _run_tests(study, pairs)
        if not tested:
            continue
        adjusted = adjust_p_values([test.p_value for _, _, test in tested])
        table = _test_table(tested, adjusted)
        pages.heading(title)
        pages.table(table)
        latex.append((title, table))
        smallest = min(test.smallest_p for _, _, test in tested)
        if smallest >= SIGNIFICANT:
            most = max(test.wins + test.losses for _, _, test in tested)
            pages.write(
                f"**No test of this table can be significant**: over {most} datasets no p-value is below "
                f"{format_p_value(smallest)}, whatever the numbers are. Five datasets that differ are the fewest that can "
                f"give less than {SIGNIFICANT}."
            )
        elif not any(value < SIGNIFICANT for value in adjusted):
            pages.write(f"No adjusted p-value is below {SIGNIFICANT}.")
    pages.latex("tests", latex)


def _run_tests(study: ScoredStudy, pairs: Sequence[tuple[str, str]]) -> list[_Tested]:
    """For each backbone and pair with common datasets: names, the differences, the test."""
    found = []
    for backbone in study.scores:
        for first, second in pairs:
            differences = study.differences(backbone, first, second)
            if differences:
                test = signed_rank_test([difference.value for difference in differences])
                found.append(((backbone, first, second), differences, test))
    return found


def _test_table(tested: Sequence[_Tested], adjusted: Sequence[float]) -> Table:
    rows = []
    for (names, differences, test), value in zip(tested, adjusted, strict=True):
        mean = mean_estimate(differences)
        row = [*names, str(len(differences)), format_points(mean.value, sign=True), format_interval(mean, sign=True)]
        row += [f"{test.wins}, {test.ties}, {test.losses}", _clear_counts(differences)]
        shown = [format_p_value(number) for number in (test.p_value, value, test.smallest_p)]
        rows.append([*row, shown[0], Bold(shown[1]) if value < SIGNIFICANT else shown[1], shown[2]])
    headers = ["backbone", "first", "second", "n", "mean difference", "interval", "wins, ties, losses", "clear"]
    return Table([*headers, "p", "adjusted", "smallest"], rows)
