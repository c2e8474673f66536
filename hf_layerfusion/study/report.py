"""The report of a study: Markdown, CSV, LaTeX and figures, made from its folder alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import numpy as np

from ..errors import LayerFusionError
from ..layout import BLOCK_MODULES
from ..recipes import FAMILIES, find_recipe
from . import figures
from .results import Run, StudyResults
from .statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    TIE,
    Estimate,
    ScoreSummary,
    SignedRankTest,
    adjust_p_values,
    bootstrap_gain,
    bootstrap_mean,
    mean_estimate,
    signed_rank_test,
    summarise_scores,
)

REPORT_FOLDER = "report"
REPORT_NAME = "report.md"
BASELINE = "linear-last"
# One recipe for each layer or module: shown as a map, since a hundred rows are no table.
MAP_FAMILIES = ("linear-layer", "aat-layer", "module-probe", "module-logistic")
# What arXiv 2601.09322 tests over datasets (its figure 2); of our two forms of ALF, whichever was run.
PAPER_COMPARISONS = (
    *itertools.product(("alf", "alf-paper"), ("alf-last", "linear-all", "aat")),
    ("linear-all", "linear-last-cls-mean"),
)
SIGNIFICANT = 0.05
# The recipes whose attention is shown, the first that was run.
_ATTENTION_RECIPES = ("alf", "alf-paper")
_FEWEST_FOR_CORRELATION = 5
_MARKDOWN_COLUMNS, _LATEX_COLUMNS = 4, 5
_NONE = "–"
_OWN_NAME = re.compile(
    r"(report\.md|(results|gains)\.csv"
    r"|(summary|accuracy|gains|tests)(-[^/]*)?\.tex"
    r"|(gains|layer-counts|attention|layers|taps|similarity|depth)(-[^/]*)?\.png)"
)


@dataclass(frozen=True)
class Score:
    """What one recipe reached on one dataset, as shares.

    Attributes:
        summary: mean and spreads.
        accuracy: balanced accuracy with its interval; `None` for recipes of `MAP_FAMILIES`, of which there are hundreds.
        gain: over the baseline on the same items; `None` for the baseline itself, and where it has no run.
    """

    summary: ScoreSummary
    accuracy: Estimate | None
    gain: Estimate | None


# By backbone, dataset and recipe.
Scores = dict[str, dict[str, dict[str, Score]]]


class Bold(str):
    """A cell that stands out."""

    __slots__ = ()


@dataclass
class Table:
    """A table of texts, to be written as Markdown or LaTeX."""

    headers: list[str]
    rows: list[list[str]]

    def markdown(self) -> list[str]:
        """Lines, padded so that the source can be read too; the first column is left-aligned, the others right."""
        shown = [[_markdown(cell) for cell in row] for row in [self.headers, *self.rows]]
        widths = [max(3, *(len(row[place]) for row in shown)) for place in range(len(self.headers))]
        lines = []
        for number, row in enumerate(shown):
            cells = [
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(f"| {' | '.join(cells)} |")
            if not number:
                marks = ["-" * width if not place else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
                lines.append(f"| {' | '.join(marks)} |")
        return [*lines, ""]

    def latex(self, caption: str, name: str) -> str:
        """A `table` environment for a document with `\\usepackage{booktabs}`; ASCII, so that any engine takes it."""
        lines = [
            r"\begin{table}[htbp]",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_latex(caption)}}}",
            rf"\label{{tab:{name}}}",
        ]
        lines.append(rf"\begin{{tabular}}{{l{'r' * (len(self.headers) - 1)}}}")
        lines += [r"\toprule", _latex_row(self.headers), r"\midrule"]
        lines += [_latex_row(row) for row in self.rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_|<>])", r"\\\1", str(text)).replace("\n", " ")
    return f"**{escaped}**" if isinstance(text, Bold) else escaped


_LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"±": r"$\pm$", "–": "--", "—": "---", "·": r"$\cdot$", "×": r"$\times$", "…": r"\dots{}", "\u00a0": "~"},
}
# Combining marks that LaTeX has an accent for.
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": '"',
    "\u030a": "r",
    "\u0327": "c",
    "\u030c": "v",
}


def _latex(text: str) -> str:
    """Escaped and in ASCII: accented letters by their commands, other characters by their code (`U+6570`)."""
    # `"` needs the T1 encoding as a command, so a plain closing quote stands for it.
    escaped = "".join(_latex_character(character) for character in str(text))
    escaped = re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped)
    return rf"\textbf{{{escaped}}}" if isinstance(text, Bold) else escaped


def _latex_character(character: str) -> str:
    if character == '"':
        return "''"
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii():
        return character
    letter, marks = (parts := unicodedata.normalize("NFD", character))[0], parts[1:]
    if len(marks) == 1 and marks[0] in _ACCENTS and letter.isascii():
        return rf"\{_ACCENTS[marks[0]]}{{{letter}}}"
    return f"U+{ord(character):04X}"


def _latex_row(cells: Sequence[str]) -> str:
    # Braces, or a cell that begins with a bracket would be taken for an option of the line break before it.
    return " & ".join(f"{{{_latex(cell)}}}" for cell in cells) + r" \\"


@dataclass
class _Pages:
    """The report while it is written."""

    results: StudyResults
    scores: Scores
    baseline: str
    num_resamples: int
    folder: Path
    with_figures: bool
    lines: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def write(self, *lines: str) -> None:
        self.lines += [*lines, ""]

    def table(self, table: Table) -> None:
        self.lines += table.markdown()

    def latex(self, name: str, tables: Sequence[tuple[str, Table]]) -> None:
        """One file with a caption and label for each table, if there is any."""
        if not tables:
            return
        parts = [table.latex(caption, f"{name}-{number}") for number, (caption, table) in enumerate(tables, start=1)]
        (self.folder / f"{name}.tex").write_text("\n".join(parts), encoding="utf-8")

    def figure(self, name: str, title: str, draw: Callable[[Path], None]) -> None:
        if not self.with_figures:
            return
        path = self.folder / f"{name}.png"
        draw(path)
        self.write(f"![{_markdown(title)}]({quote(path.name)})")

    @property
    def quantity(self) -> str:
        return f"gain over {self.baseline} (percentage points)" if self.has_baseline else "balanced accuracy (%)"

    @property
    def has_baseline(self) -> bool:
        return self.baseline in self.results.recipes

    def accuracy(self, backbone: str, dataset: str, recipe: str) -> Estimate:
        """With its interval, for a recipe of `MAP_FAMILIES` too."""
        runs = self.results.all_predictions(backbone, dataset, recipe)
        return bootstrap_mean(runs, num_resamples=self.num_resamples, seed=_seed(backbone, dataset))

    def difference(self, backbone: str, dataset: str, first: str, second: str) -> Estimate | None:
        """The first recipe's lead on the same images; `None` without a common split."""
        if second == self.baseline and (gain := self.scores[backbone][dataset][first].gain) is not None:
            return gain
        ours, theirs = (self.results.all_predictions(backbone, dataset, recipe) for recipe in (first, second))
        if not ours.keys() & theirs.keys():
            return None
        return bootstrap_gain(ours, theirs, num_resamples=self.num_resamples, seed=_seed(backbone, dataset))

    def differences(self, backbone: str, first: str, second: str) -> list[Estimate]:
        """The same for every dataset where there is one."""
        both = [dataset for dataset, found in self.scores[backbone].items() if {first, second} <= found.keys()]
        found = [self.difference(backbone, dataset, first, second) for dataset in both]
        return [estimate for estimate in found if estimate is not None]

    def estimates(self, backbone: str) -> dict[str, dict[str, Estimate]]:
        """By dataset and recipe, what the figures show: gains, or without a baseline accuracies."""
        found = {}
        for dataset, scores in self.scores.get(backbone, {}).items():
            picked = {r: s.gain if self.has_baseline else s.accuracy for r, s in scores.items()}
            kept = {recipe: estimate for recipe, estimate in picked.items() if estimate is not None}
            if kept:
                found[dataset] = kept
        return found


def write_report(
    folder: str | Path, *, baseline: str = BASELINE, num_resamples: int = NUM_RESAMPLES, with_figures: bool = True
) -> Path:
    """Write `report/` of a study: `report.md`, `results.csv`, `gains.csv`, tables as `.tex`, figures as `.png`.

    An unfinished study has a report too, which says what is missing. The same folder gives the same bytes (figures: with
    the same matplotlib). A report that is there is replaced; other files beside it stay.

    Args:
        folder: of the study.
        baseline: the recipe that gains are over.
        num_resamples: of the bootstrap.
        with_figures: draw them, if matplotlib is installed; the report says so if it is not.

    Returns:
        The path of `report.md`.

    Raises:
        LayerFusionError: if the folder holds no study, or a file of it is damaged.
    """
    results = StudyResults.load(folder)
    scores = score_recipes(results, baseline, num_resamples=num_resamples)
    final = results.folder / REPORT_FOLDER
    staged = results.folder / f"{REPORT_FOLDER}.{os.getpid()}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        pages = _Pages(results, scores, baseline, num_resamples, staged, with_figures and figures.can_draw())
        if with_figures and not pages.with_figures:
            pages.left_out.append("all of them: figures need matplotlib (pip install 'hf-layerfusion[plots]')")
        _write_pages(pages)
        (staged / "results.csv").write_text(_csv(results.table()), encoding="utf-8")
        (staged / "gains.csv").write_text(_csv(_gains_table(scores)), encoding="utf-8")
        (staged / REPORT_NAME).write_text("\n".join(pages.lines).rstrip("\n") + "\n", encoding="utf-8")
        final.mkdir(exist_ok=True)
        for file in list(final.iterdir()):
            if _OWN_NAME.fullmatch(file.name):
                file.unlink()
        # The last to come, so that where it stands all that it shows is there.
        for file in sorted(staged.iterdir(), key=lambda file: file.name == REPORT_NAME):
            file.replace(final / file.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return final / REPORT_NAME


def score_recipes(results: StudyResults, baseline: str = BASELINE, *, num_resamples: int = NUM_RESAMPLES) -> Scores:
    """Scores of all recipes with finished runs, by backbone, dataset and recipe.

    Raises:
        LayerFusionError: if predictions are damaged, or runs of one split were tested on different rows.
    """
    found: Scores = {}
    for backbone in results.backbones:
        for dataset in results.datasets:
            seed = _seed(backbone, dataset)
            there = {recipe: results.scores(backbone, dataset, recipe) for recipe in results.recipes}
            there = {recipe: scores for recipe, scores in there.items() if scores}
            theirs = results.all_predictions(backbone, dataset, baseline) if baseline in there else {}
            for recipe, scores in there.items():
                accuracy = gain = None
                if not is_mapped(recipe):
                    ours = theirs if recipe == baseline else results.all_predictions(backbone, dataset, recipe)
                    accuracy = bootstrap_mean(ours, num_resamples=num_resamples, seed=seed)
                    if recipe != baseline and ours.keys() & theirs.keys():
                        gain = bootstrap_gain(ours, theirs, num_resamples=num_resamples, seed=seed)
                score = Score(summarise_scores(scores), accuracy, gain)
                found.setdefault(backbone, {}).setdefault(dataset, {})[recipe] = score
    return found


def is_mapped(recipe: str) -> bool:
    """Whether a recipe is one of `MAP_FAMILIES`."""
    return recipe.partition(":")[0] in MAP_FAMILIES and ":" in recipe


def _seed(backbone: str, dataset: str) -> list[int]:
    """Other draws for every dataset: means over datasets take their samples for independent."""
    return [zlib.crc32(backbone.encode()), zlib.crc32(dataset.encode())]


def _csv(table: Any) -> str:
    return table.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _gains_table(scores: Scores) -> Any:
    import pandas

    rows = []
    for backbone, datasets in scores.items():
        for dataset, recipes in datasets.items():
            for recipe, score in recipes.items():
                row: dict[str, Any] = {"backbone": backbone, "dataset": dataset, "recipe": recipe}
                row |= dataclasses.asdict(score.summary)
                for name, estimate in (("", score.accuracy), ("gain_", score.gain)):
                    for part in ("low", "high") if not name else ("value", "low", "high"):
                        row[f"{name}{part}"] = math.nan if estimate is None else getattr(estimate, part)
                rows.append(row)
    return pandas.DataFrame(rows).rename(columns={"mean": "balanced_accuracy", "gain_value": "gain"})


# The pages


def _write_pages(pages: _Pages) -> None:
    results = pages.results
    pages.write(f"# Study: {_markdown(str(results.config.get('name', results.folder.name)))}")
    missing, planned = results.missing(), results.planned()
    if missing:
        done = len(planned) - len(missing)
        pages.write(
            f"**Unfinished: {done} of {len(planned)} planned runs are there.** What is missing stands at the end."
        )
    _write_setup(pages)
    if not results.runs:
        pages.write("There is no finished run yet.")
        return
    _write_how_to_read(pages)
    main = [recipe for recipe in results.recipes if not is_mapped(recipe)]
    if main:
        _write_summary(pages, main)
        _write_by_dataset(pages, main)
        _write_tests(pages, main)
    _write_taps(pages)
    _write_attention(pages)
    _write_similarity(pages)
    _write_cost(pages)
    _write_missing(pages)


def _write_setup(pages: _Pages) -> None:
    results, config = pages.results, pages.results.config
    pages.write("## What was run")
    rows = [[str(e["name"]), str(e.get("id", _NONE)), _text(e.get("revision")), _text(e.get("image_size")),
             "random" if e.get("random_weights") else "pretrained"] for e in config.get("backbones", ())]  # fmt: skip
    pages.table(Table(["backbone", "from", "revision", "image size", "weights"], rows))
    rows = []
    for entry in config.get("datasets", ()):
        runs = [run for run in results.runs.values() if run.key.dataset == entry["name"]]
        counts = [_range([run.values[part] for run in runs]) for part in ("num_labels", "train_rows", "test_rows")]
        source = " · ".join(str(entry[part]) for part in ("id", "config", "revision") if entry.get(part))
        rows.append([str(entry["name"]), source or _NONE, _text(entry.get("domain")), *counts])
    pages.table(Table(["dataset", "from", "domain", "classes", "training rows", "test rows"], rows))
    splits = config.get("splits", "own")
    pages.write(
        f"- protocol: {_plain(config.get('protocol', _NONE))}",
        f"- splits: {'those of the dataset' if splits == 'own' else f'{splits} new divisions of all rows into training and test'}",
        f"- training seeds: {_plain(config.get('seeds', _NONE))}",
        *(f"- {part}: {_plain(results.study[part])}" for part in ("versions", "machine") if part in results.study),
    )
    if results.recipes:
        pages.write("Recipes:")
        pages.write(*(f"- `{name}`: {text}" for name, text in _descriptions(results.recipes).items()))


def _text(value: Any) -> str:
    return _NONE if value in (None, "") else str(value)


def _plain(value: Any) -> str:
    """A value of the config in words."""
    if value is None:
        return _NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{_markdown(str(name))} {_plain(part)}" for name, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_plain, value))
    return _markdown(value if isinstance(value, str) else json.dumps(value))


def _range(values: Sequence[int]) -> str:
    if not values:
        return _NONE
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _descriptions(recipes: Sequence[str]) -> dict[str, str]:
    """In the words of `recipes.py`; recipes of a map are one line for each family."""
    found = {}
    for recipe in recipes:
        family = next(
            (name for name in FAMILIES if is_mapped(recipe) and name.split(":")[0] == recipe.split(":")[0]), None
        )
        try:
            found[family or recipe] = FAMILIES[family] if family else find_recipe(recipe).description
        except LayerFusionError:
            found[recipe] = "not a recipe of this version"
    return found


def _write_how_to_read(pages: _Pages) -> None:
    results = pages.results
    seeds, splits = _spreads(results)
    percent = f"{100 * CONFIDENCE:.0f} %"
    spread = "There is one run for each number, so there is no ±: how much a seed or a split matters is not known."
    if seeds and splits:
        spread = "± are standard deviations, the first over training seeds within a split, the second over splits. "
        spread += "Splits share rows, so neither is a standard error."
    elif seeds or splits:
        spread = f"± is the standard deviation over {'training seeds' if seeds else 'splits'}, and no standard error."
    pages.write("## How to read it")
    pages.write(
        "- Scores are **balanced accuracy** on test images, in percent: the mean recall over classes. No test image had a "
        "part in a choice.",
        f"- {spread}",
        f"- [Brackets] hold the {percent} bootstrap interval over **test images** ({pages.num_resamples} resamples): what "
        "other images of the same kind could have given, with the same heads. They say nothing about other training rows "
        "or datasets, and take images as independent.",
        f"- A **gain** is the difference to `{pages.baseline}` in percentage points on the same images, and its interval "
        "is that of the paired difference. A gain is *clear* if its interval does not hold 0.",
        "- Intervals are for one comparison each. Of many that differ by nothing, one in twenty is clear by chance.",
        "- **Bold** is the highest number of a column, whether or not the next one is distinguishable.",
        f"- {_NONE} means that there is no run. Means over datasets are over those with runs; compare them only where the "
        "number of datasets is the same.",
    )


def _spreads(results: StudyResults) -> tuple[bool, bool]:
    """Whether any recipe has several seeds, and several splits, on one dataset."""
    groups: dict[tuple, set[tuple[int, int]]] = {}
    for key in results.runs:
        groups.setdefault((key.backbone, key.dataset, key.recipe), set()).add((key.split, key.seed))
    splits = any(len({split for split, _ in group}) > 1 for group in groups.values())
    seeds = any(len(group) > len({split for split, _ in group}) for group in groups.values())
    return seeds, splits


def _points(value: float, sign: bool = False, digits: int = 1) -> str:
    """A share in percent or percentage points."""
    if not math.isfinite(value):
        return _NONE
    text = f"{100 * value:+.{digits}f}" if sign else f"{100 * value:.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"  # no -0.0


def _interval(estimate: Estimate, sign: bool = False) -> str:
    return f"[{_points(estimate.low, sign)}, {_points(estimate.high, sign)}]"


def _accuracy_cell(score: Score, spreads: tuple[bool, bool], with_interval: bool) -> str:
    text = _points(score.summary.mean)
    for shown, value in zip(spreads, (score.summary.std_seeds, score.summary.std_splits), strict=True):
        text += f" ± {_points(value)}" if shown else ""
    return f"{text} {_interval(score.accuracy)}" if with_interval and score.accuracy is not None else text


def _best(values: Mapping[str, float]) -> set[str]:
    """The names with the highest value; all of them if several have it."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return {name for name, value in finite.items() if value >= max(finite.values()) - TIE}


def _write_summary(pages: _Pages, recipes: Sequence[str]) -> None:
    pages.write("## Over datasets")
    if not pages.has_baseline:
        pages.write(f"There is no run of `{pages.baseline}`, so there are no gains.")
    tables = []
    for backbone, scores in pages.scores.items():
        table = _summary_table(pages, recipes, list(scores.values()), mean_estimate)
        pages.write(f"### {_markdown(backbone)}")
        pages.table(table)
        tables.append((f"Over datasets, backbone {backbone}", table))
    if len(pages.scores) > 1:
        every = [found for scores in pages.scores.values() for found in scores.values()]
        table = _summary_table(pages, recipes, every, None)
        pages.write(
            "### All backbones",
            "",
            "A row for each backbone and dataset. Backbones share test images, so there is no interval.",
        )
        pages.table(table)
        tables.append(("Over backbones and datasets", table))
    if pages.has_baseline:
        pages.write(
            "*Wins, ties, losses* count datasets by the sign of the gain, *clear* those wins and losses whose interval "
            "does not hold 0, *best* those on which no recipe of this table is ahead. The interval of the mean gain takes "
            "the datasets as given."
        )
    pages.latex("summary", tables)
    _write_domains(pages, recipes)


def _summary_table(
    pages: _Pages,
    recipes: Sequence[str],
    datasets: Sequence[Mapping[str, Score]],
    mean: Callable[[Sequence[Estimate]], Estimate] | None,
) -> Table:
    """A row for each recipe; `mean` gives the interval of the mean gain."""
    headers = ["recipe", "n", "mean accuracy", "best"]
    if pages.has_baseline:
        headers += [
            "mean gain",
            *(["interval"] if mean else []),
            "median",
            "min",
            "max",
            "wins, ties, losses",
            "clear",
        ]
    best = [_best({recipe: found[recipe].summary.mean for recipe in recipes if recipe in found}) for found in datasets]
    rows = []
    means: dict[str, float] = {}
    for recipe in recipes:
        found = [scores[recipe] for scores in datasets if recipe in scores]
        if not found:
            continue
        means[recipe] = float(np.mean([score.summary.mean for score in found]))
        row = [recipe, str(len(found)), _points(means[recipe]), str(sum(recipe in names for names in best))]
        gains = [score.gain for score in found if score.gain is not None]
        if pages.has_baseline and gains:
            values = [gain.value for gain in gains]
            row += [_points(float(np.mean(values)), sign=True), *([_interval(mean(gains), sign=True)] if mean else [])]
            row += [_points(value, sign=True) for value in (median(values), min(values), max(values))]
            counts = signed_rank_test(values)
            row += [f"{counts.wins}, {counts.ties}, {counts.losses}", _clear(gains)]
        rows.append(row + [_NONE] * (len(headers) - len(row)))
    for row in rows:
        if row[0] in _best(means):
            row[2] = Bold(row[2])
    return Table(headers, rows)


def _clear(gains: Sequence[Estimate]) -> str:
    wins = sum(gain.excludes_zero and gain.value > 0 for gain in gains)
    losses = sum(gain.excludes_zero and gain.value < 0 for gain in gains)
    return f"{wins}, {losses}"


def _write_domains(pages: _Pages, recipes: Sequence[str]) -> None:
    """The mean gain by kind of dataset, if the config tells kinds apart."""
    domains = {str(e["name"]): str(e["domain"]) for e in pages.results.config.get("datasets", ()) if e.get("domain")}
    names = list(dict.fromkeys(domains.values()))
    if len(names) < 2 or not pages.has_baseline:
        return
    pages.write("### Mean gain by domain", "", "In brackets: the number of datasets.")
    for backbone, scores in pages.scores.items():
        rows = []
        for recipe in recipes:
            row = [recipe]
            for domain in names:
                found = [s[recipe].gain for d, s in scores.items() if domains.get(d) == domain and recipe in s]
                values = [gain.value for gain in found if gain is not None]
                row.append(f"{_points(float(np.mean(values)), sign=True)} ({len(values)})" if values else _NONE)
            if set(row[1:]) != {_NONE}:
                rows.append(row)
        pages.table(Table([backbone, *names], rows))


def _blocks(cells: Mapping[str, Mapping[str, str]], recipes: Sequence[str], datasets_at_once: int) -> list[Table]:
    """Recipes as rows and datasets as columns, some datasets to a table; `cells` is by dataset and recipe."""
    tables = []
    names = [dataset for dataset, found in cells.items() if found]
    count = math.ceil(len(names) / datasets_at_once)
    for number in range(count):  # of about the same width
        shown = names[number * len(names) // count : (number + 1) * len(names) // count]
        rows = [[recipe, *(cells[name].get(recipe, _NONE) for name in shown)] for recipe in recipes]
        tables.append(Table(["recipe", *shown], [row for row in rows if set(row[1:]) != {_NONE}]))
    return tables


def _write_by_dataset(pages: _Pages, recipes: Sequence[str]) -> None:
    pages.write("## Balanced accuracy by dataset")
    spreads = _spreads(pages.results)
    latex = []
    for backbone, scores in pages.scores.items():
        pages.write(f"### {_markdown(backbone)}")
        for table in _blocks(_accuracy_cells(scores, recipes, spreads, True), recipes, _MARKDOWN_COLUMNS):
            pages.table(table)
        narrow = _blocks(_accuracy_cells(scores, recipes, spreads, False), recipes, _LATEX_COLUMNS)
        latex += [(f"Balanced accuracy (%), backbone {backbone}", table) for table in narrow]
    pages.latex("accuracy", latex)
    if not pages.has_baseline:
        pages.write("## The same as figures")
    else:
        pages.write(f"## Gain over {_markdown(pages.baseline)} by dataset")
    latex = []
    for backbone, slug in _slugs(pages.scores).items():
        pages.write(f"### {_markdown(backbone)}")
        shown = pages.estimates(backbone)
        if pages.has_baseline:
            cells = {
                dataset: {
                    recipe: f"{_points(e.value, sign=True)} {_interval(e, sign=True)}" for recipe, e in found.items()
                }
                for dataset, found in shown.items()
            }
            for table in _blocks(cells, recipes, _MARKDOWN_COLUMNS):
                pages.table(table)
            latex += [
                (f"G{pages.quantity[1:]}, backbone {backbone}", t) for t in _blocks(cells, recipes, _LATEX_COLUMNS)
            ]
        title = f"{pages.quantity} by {{}}, {backbone}"
        rows = [recipe for recipe in recipes if any(recipe in found for found in shown.values())]
        if rows:
            draw = partial(figures.plot_by_dataset, shown, rows, quantity=pages.quantity, title=backbone)
            pages.figure(f"gains-{slug}", title.format("dataset"), draw)
        else:
            pages.left_out.append(f"{title.format('dataset')}: there is no recipe besides {pages.baseline}")
        lines = figures.layer_count_panels(shown, mean_estimate)
        if lines:
            draw = partial(figures.plot_layer_counts, lines, quantity=pages.quantity, title=backbone)
            pages.figure(f"layer-counts-{slug}", title.format("number of layers"), draw)
        else:
            wanted = " or of ".join(", ".join(line) for line in figures.LAYER_COUNT_LINES.values())
            pages.left_out.append(
                f"{title.format('number of layers')}: it takes runs of two of {wanted} on one dataset"
            )
    if pages.has_baseline:
        pages.latex("gains", latex)


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


def _slugs(names: Iterable[str]) -> dict[str, str]:
    """Short file names, no two alike."""
    found: dict[str, str] = {}
    for name in names:
        slug = base = re.sub(r"[^\w.-]+", "_", name)[:40]
        number = 1
        while slug in found.values():
            number += 1
            slug = f"{base}-{number}"
        found[name] = slug
    return found


def _write_tests(pages: _Pages, recipes: Sequence[str]) -> None:
    pages.write("## Tests over datasets")
    paper = [pair for pair in PAPER_COMPARISONS if set(pair) <= set(recipes)]
    with_baseline = [(recipe, pages.baseline) for recipe in recipes if recipe != pages.baseline]
    families = {"The comparisons of arXiv 2601.09322": paper}
    families[f"Every recipe against {pages.baseline}"] = with_baseline if pages.has_baseline else []
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
        tested = _run_tests(pages, pairs)
        if not tested:
            continue
        adjusted = adjust_p_values([test.p_value for _, _, test in tested])
        rows = []
        for (names, differences, test), value in zip(tested, adjusted, strict=True):
            mean = mean_estimate(differences)
            row = [*names, str(len(differences)), _points(mean.value, sign=True), _interval(mean, sign=True)]
            row += [f"{test.wins}, {test.ties}, {test.losses}", _clear(differences)]
            shown = [_p_value(number) for number in (test.p_value, value, test.smallest_p)]
            rows.append([*row, shown[0], Bold(shown[1]) if value < SIGNIFICANT else shown[1], shown[2]])
        headers = ["backbone", "first", "second", "n", "mean difference", "interval", "wins, ties, losses", "clear"]
        table = Table([*headers, "p", "adjusted", "smallest"], rows)
        pages.write(f"### {_markdown(title)}")
        pages.table(table)
        latex.append((title, table))
        smallest = min(test.smallest_p for _, _, test in tested)
        if smallest >= SIGNIFICANT:
            most = max(test.wins + test.losses for _, _, test in tested)
            pages.write(
                f"**No test of this table can be significant**: over {most} datasets no p-value is below "
                f"{_p_value(smallest)}, whatever the numbers are. Five datasets that differ are the fewest that can give "
                f"less than {SIGNIFICANT}."
            )
        elif not any(value < SIGNIFICANT for value in adjusted):
            pages.write(f"No adjusted p-value is below {SIGNIFICANT}.")
    pages.latex("tests", latex)


def _run_tests(
    pages: _Pages, pairs: Sequence[tuple[str, str]]
) -> list[tuple[tuple[str, str, str], list[Estimate], SignedRankTest]]:
    """For each backbone and pair with common datasets: names, the differences, the test."""
    found = []
    for backbone in pages.scores:
        for first, second in pairs:
            differences = pages.differences(backbone, first, second)
            if differences:
                test = signed_rank_test([difference.value for difference in differences])
                found.append(((backbone, first, second), differences, test))
    return found


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _write_taps(pages: _Pages) -> None:
    """Maps of single layers and modules."""
    pages.write("## Single layers and modules")
    mapped = [recipe for recipe in pages.results.recipes if is_mapped(recipe)]
    if not mapped:
        pages.left_out.append(f"accuracy by layer and module: there are no runs of {', '.join(MAP_FAMILIES)}")
        pages.write("There are no runs of single layers or modules.")
        return
    pages.write(
        "The best of each family, and how far it is ahead of the last layer that was run (of its `block`, for modules) on the same "
        "images. It is the best of many on the test images themselves, so both numbers are **too good**: they show where to "
        "look, and not what a tap that is chosen without the test images would reach. Maps: the best tap is framed."
    )
    for backbone, slug in _slugs(pages.scores).items():
        panels: dict[str, dict[tuple[str, int], float]] = {}
        rows = []
        for dataset, found in pages.scores[backbone].items():
            for family in MAP_FAMILIES:
                names = [recipe for recipe in mapped if recipe in found and recipe.startswith(f"{family}:")]
                if names:
                    rows.append(_best_tap(pages, backbone, dataset, names))
            there = sorted((recipe for recipe in mapped if recipe in found), key=_map_place)
            if there:
                panels[dataset] = {_tap(recipe): found[recipe].summary.mean for recipe in there}
        if not rows:
            continue
        pages.write(f"### {_markdown(backbone)}")
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


def _tap(recipe: str) -> tuple[str, int]:
    """Row and column of the map: `("module-probe ln2", 7)`."""
    family, layer, *module = recipe.split(":")
    return " ".join([family, *module]), int(layer)


def _map_place(recipe: str) -> tuple:
    family, _, *module = recipe.split(":")
    modules = [*BLOCK_MODULES, *module]
    return MAP_FAMILIES.index(family), modules.index(module[0]) if module else 0


def _best_tap(pages: _Pages, backbone: str, dataset: str, recipes: Sequence[str]) -> list[str]:
    found = pages.scores[backbone][dataset]
    best = max(recipes, key=lambda recipe: found[recipe].summary.mean)
    last = [recipe for recipe in recipes if _tap(recipe)[1] == max(_tap(name)[1] for name in recipes)]
    last = [recipe for recipe in last if recipe.count(":") == 1 or recipe.endswith(":block")]
    interval = pages.accuracy(backbone, dataset, best)
    row = [dataset, best, _points(found[best].summary.mean), _interval(interval)]
    gain = pages.difference(backbone, dataset, best, last[0]) if last and last[0] != best else None
    row.append(_points(found[last[0]].summary.mean) if last else _NONE)
    row.append(_NONE if gain is None else f"{_points(gain.value, sign=True)} {_interval(gain, sign=True)}")
    return [*row, str(len(recipes))]


def _write_attention(pages: _Pages) -> None:
    results = pages.results
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
    for backbone, slug in _slugs(results.backbones).items():
        found = {dataset: results.select(backbone, dataset, recipe) for dataset in results.datasets}
        found = {dataset: _with_attention(runs) for dataset, runs in found.items()}
        found = {dataset: runs for dataset, runs in found.items() if runs}
        if found:
            pages.write(f"### {_markdown(backbone)}")
            _write_attention_of(pages, backbone, slug, recipe, found)


def _with_attention(runs: Sequence[Run]) -> list[Run]:
    """Those that did not diverge and attend to the same tokens as the first of them."""
    shapes = {
        run.key: run.attention.shape
        for run in runs
        if run.attention is not None and math.isfinite(run.balanced_accuracy) and math.isfinite(run.expected_depth)
    }
    there = [run for run in runs if run.key in shapes]
    return [run for run in there if (run.bank, shapes[run.key]) == (there[0].bank, shapes[there[0].key])]


def _write_attention_of(
    pages: _Pages, backbone: str, slug: str, recipe: str, found: Mapping[str, Sequence[Run]]
) -> None:
    rows = []
    masses: dict[str, dict[int, float]] = {}
    for dataset, runs in found.items():
        depths = [run.expected_depth for run in runs]
        entropy = float(np.mean([run.attention_entropy for run in runs]))
        spread = f" ± {np.std(depths, ddof=1):.3f}" if len(runs) > 1 else ""
        weights = np.mean([run.attention.mean(axis=0) for run in runs if run.attention is not None], axis=0)
        bank = runs[0].bank
        row = [
            dataset,
            str(len(runs)),
            f"{np.mean(depths):.3f}{spread}",
            f"{entropy:.2f} of {math.log(len(weights)):.2f}",
        ]
        if len(bank) == len(weights):
            names, _ = figures.token_labels(bank)
            top = np.argsort(-weights, kind="stable")[:3]
            row.append(", ".join(f"{names[place]} ({100 * weights[place]:.0f} %)" for place in top))
            masses[dataset] = {
                layer: float(sum(weights[n] for n, t in enumerate(bank) if t[0] == layer)) for layer in runs[0].layers
            }
        else:
            row.append(_NONE)
        rows.append(row)
    pages.table(
        Table(["dataset", "runs", "expected depth", "entropy, and of uniform attention", "most attended"], rows)
    )
    if masses:
        title = f"attention by layer, {recipe}, {backbone}"
        pages.figure(f"attention-{slug}", title, partial(figures.plot_attention_by_layer, masses, title=title))
    shown = pages.estimates(backbone)
    points = {
        dataset: (float(np.mean([run.expected_depth for run in runs])), shown[dataset][recipe])
        for dataset, runs in found.items()
        if recipe in shown.get(dataset, {})
    }
    points = {dataset: point for dataset, point in points.items() if math.isfinite(point[0])}
    if len(points) > 1:
        title = f"depth of the attention and {pages.quantity}, {recipe}, {backbone}"
        draw = partial(figures.plot_depth, points, quantity=pages.quantity, title=f"{recipe}, {backbone}")
        pages.figure(f"depth-{slug}", title, draw)
        _write_correlation(pages, list(points.values()))
    else:
        pages.left_out.append(f"depth of the attention against gain, {backbone}: it takes two datasets")
    slugs = _slugs(found)
    for dataset, runs in found.items():
        title = f"{recipe} on {dataset}, {backbone}"
        draw = partial(figures.plot_attention_heads, runs, title=title)
        pages.figure(f"attention-{slug}-{slugs[dataset]}", f"attention of {title}", draw)


def _write_correlation(pages: _Pages, points: Sequence[tuple[float, Estimate]]) -> None:
    from scipy.stats import spearmanr

    depths, values = [depth for depth, _ in points], [estimate.value for _, estimate in points]
    if len(points) < _FEWEST_FOR_CORRELATION or len(set(depths)) == 1 or len(set(values)) == 1:
        pages.write(f"{len(points)} datasets are too few, or too much alike, for a correlation.")
        return
    test = spearmanr(depths, values)
    pages.write(
        f"Rank correlation (Spearman) {test.statistic:+.2f} over {len(points)} datasets, two-sided p = "
        f"{_p_value(float(test.pvalue))}."
    )


def _write_similarity(pages: _Pages) -> None:
    pages.write("## Similarity of tokens")
    entries = pages.results.similarities()
    if not entries:
        pages.left_out.append("linear CKA between tokens: the folder has no similarity/")
        pages.write("No similarities were measured.")
        return
    images = _range([entry["num_images"] for entry in entries])
    pages.write(
        f"Linear CKA between all tokens, {images} images for each dataset. 1: the same up to rotation and scale."
    )
    backbones = list(dict.fromkeys(entry["backbone"] for entry in entries))
    for backbone, slug in _slugs(backbones).items():
        # Only the same tokens fit into one figure.
        groups: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
        for entry in entries:
            if entry["backbone"] == backbone:
                groups.setdefault(tuple(entry["token_names"]), {})[entry["dataset"]] = entry["linear_cka"]
        for number, (names, matrices) in enumerate(groups.items(), start=1):
            title = f"linear CKA between tokens, {backbone}"
            name = f"similarity-{slug}" + (f"-{number}" if len(groups) > 1 else "")
            pages.figure(name, title, partial(figures.plot_similarity, matrices, names, title=title))


def _write_cost(pages: _Pages) -> None:
    """What recipes cost, and what was chosen most often."""
    pages.write(
        "## What recipes cost, and what was chosen",
        "",
        "Parameters that were trained, bytes of cached features per image, median seconds of a run (choice of the setting "
        "included) on the machine named above, settings tried; ranges are over backbones and datasets.",
    )
    rows = []
    for recipe in pages.results.recipes:
        runs = [run for run in pages.results.runs.values() if run.key.recipe == recipe]
        if is_mapped(recipe):
            continue
        counts = [_range([run.values[part] for run in runs]) for part in ("num_parameters", "bytes_per_image")]
        seconds = [run.values["seconds"] for run in runs if math.isfinite(run.values["seconds"])]
        row = [recipe, str(len(runs)), *counts, f"{median(seconds):.3g}" if seconds else _NONE]
        rows.append([*row, _range([run.values["num_settings"] for run in runs]), _chosen(runs)])
    headers = [
        "recipe",
        "runs",
        "parameters",
        "bytes per image",
        "seconds",
        "settings",
        "chosen most often (share of runs)",
    ]
    pages.table(Table(headers, rows))


def _chosen(runs: Sequence[Run]) -> str:
    """For each field of the setting that is a number or a text, the most frequent value."""
    parts = []
    for name in dict.fromkeys(name for run in runs for name in run.setting):
        values = [run.setting[name] for run in runs if isinstance(run.setting.get(name), int | float | str)]
        if name == "recipe" or not values:
            continue
        counts = Counter(values)
        value = min(counts, key=lambda value: (-counts[value], str(value)))
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{name.replace('_', ' ')} {shown} ({100 * counts[value] / len(runs):.0f} %)")
    return ", ".join(parts) or _NONE


def _entry(recipe: str) -> str:
    """A recipe as a config would have it: the members of a map as one."""
    family, *values = recipe.split(":")
    return ":".join([family, *("*" for _ in values)]) if is_mapped(recipe) else recipe


def _write_missing(pages: _Pages) -> None:
    results = pages.results
    pages.write("## What is missing")
    lines = []
    for title, keys in (
        ("Runs that are not there", results.missing()),
        ("Runs that diverged, and are in no mean", results.diverged()),
    ):
        counts = Counter((key.backbone, _entry(key.recipe), key.dataset) for key in keys)
        if counts:
            lines.append(f"{title}:\n")
            for backbone, recipe in dict.fromkeys((backbone, recipe) for backbone, recipe, _ in counts):
                shown = [f"{_markdown(d)} ({n})" for (b, r, d), n in counts.items() if (b, r) == (backbone, recipe)]
                lines.append(f"- {_markdown(backbone)}, `{recipe}`: {', '.join(shown)}")
            lines.append("")
    if pages.left_out:
        lines += ["Figures that could not be drawn:\n", *(f"- {_markdown(reason)}" for reason in pages.left_out), ""]
    pages.write(*(lines or ["Nothing."]))
