"""The report of a study: Markdown, CSV, LaTeX and figures, made from its folder alone."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..errors import LayerFusionError
from ..recipes import FAMILIES, find_recipe
from ..style import can_draw
from .comparisons import write_against_references, write_by_dataset, write_summary, write_tests
from .layers import write_attention, write_similarity, write_taps
from .pages import Pages
from .results import Run, StudyResults
from .scores import BASELINE, ScoredStudy, is_mapped
from .statistics import CONFIDENCE, NUM_RESAMPLES
from .tables import NONE, Table, escape_markdown, format_range

if TYPE_CHECKING:
    import pandas

REPORT_FOLDER = "report"
REPORT_NAME = "report.md"
_OWN_NAME = re.compile(
    r"(report\.md|(results|gains)\.csv"
    r"|(summary|accuracy|gains|tests|references)(-[^/]*)?\.tex"
    r"|(gains|layer-counts|attention|layers|taps|similarity|depth)(-[^/]*)?\.png)"
)


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
    study = ScoredStudy.of(results, baseline, num_resamples=num_resamples)
    final = results.folder / REPORT_FOLDER
    staged = results.folder / f"{REPORT_FOLDER}.{os.getpid()}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        pages = Pages(staged, with_figures and can_draw())
        if with_figures and not pages.with_figures:
            pages.left_out.append("all of them: figures need matplotlib (pip install 'hf-layerfusion[plots]')")
        _write_pages(pages, study)
        (staged / "results.csv").write_text(_csv(results.table()), encoding="utf-8")
        (staged / "gains.csv").write_text(_csv(study.table()), encoding="utf-8")
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


def _csv(table: pandas.DataFrame) -> str:
    return table.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _write_pages(pages: Pages, study: ScoredStudy) -> None:
    results = study.results
    pages.write(f"# Study: {escape_markdown(str(results.config.get('name', results.folder.name)))}")
    missing, planned = results.missing(), results.planned()
    if missing:
        done = len(planned) - len(missing)
        pages.write(
            f"**Unfinished: {done} of {len(planned)} planned runs are there.** What is missing stands at the end."
        )
    _write_setup(pages, study)
    if not results.runs:
        pages.write("There is no finished run yet.")
        return
    _write_how_to_read(pages, study)
    main = [recipe for recipe in results.recipes if not is_mapped(recipe)]
    if main:
        write_summary(pages, study, main)
        write_by_dataset(pages, study, main)
        write_against_references(pages, study, main)
        write_tests(pages, study, main)
    write_taps(pages, study)
    write_attention(pages, study)
    write_similarity(pages, study)
    _write_cost(pages, study)
    _write_missing(pages, study)


def _write_setup(pages: Pages, study: ScoredStudy) -> None:
    results, config = study.results, study.results.config
    pages.write("## What was run")
    rows = [[str(e["name"]), str(e.get("id", NONE)), _text(e.get("revision")), _text(e.get("image_size")),
             "random" if e.get("random_weights") else "pretrained"] for e in config.get("backbones", ())]  # fmt: skip
    pages.table(Table(["backbone", "from", "revision", "image size", "weights"], rows))
    rows = []
    for entry in config.get("datasets", ()):
        runs = [run for run in results.runs.values() if run.key.dataset == entry["name"]]
        counts = [
            format_range([run.values[part] for run in runs]) for part in ("num_labels", "train_rows", "test_rows")
        ]
        source = " · ".join(str(entry[part]) for part in ("id", "config", "revision") if entry.get(part))
        rows.append([str(entry["name"]), source or NONE, _text(entry.get("domain")), *counts])
    pages.table(Table(["dataset", "from", "domain", "classes", "training rows", "test rows"], rows))
    splits = config.get("splits", "own")
    pages.write(
        f"- protocol: {_plain(config.get('protocol', NONE))}",
        f"- splits: {'those of the dataset' if splits == 'own' else f'{splits} new divisions of all rows into training and test'}",
        f"- training seeds: {_plain(config.get('seeds', NONE))}",
        *(f"- {part}: {_plain(results.study[part])}" for part in ("versions", "machine") if part in results.study),
    )
    if results.recipes:
        pages.write("Recipes:")
        pages.write(*(f"- `{name}`: {text}" for name, text in _descriptions(results.recipes).items()))


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


def _text(value: Any) -> str:
    return NONE if value in (None, "") else str(value)


def _plain(value: Any) -> str:
    """A value of the config in words."""
    if value is None:
        return NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{escape_markdown(str(name))} {_plain(part)}" for name, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_plain, value))
    return escape_markdown(value if isinstance(value, str) else json.dumps(value))


def _write_how_to_read(pages: Pages, study: ScoredStudy) -> None:
    seeds, splits = study.spreads
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
        f"- [Brackets] hold the {percent} bootstrap interval over **test images** ({study.num_resamples} resamples): what "
        "other images of the same kind could have given, with the same heads. They say nothing about other training rows "
        "or datasets, and take images as independent.",
        f"- A **gain** is the difference to `{study.baseline}` in percentage points on the same images, and its interval "
        "is that of the paired difference. A gain is *clear* if its interval does not hold 0.",
        "- Intervals are for one comparison each. Of many that differ by nothing, one in twenty is clear by chance.",
        "- **Bold** is the highest number of a column, whether or not the next one is distinguishable.",
        f"- {NONE} means that there is no run. Means over datasets are over those with runs; compare them only where the "
        "number of datasets is the same.",
    )


def _write_cost(pages: Pages, study: ScoredStudy) -> None:
    """What recipes cost, and what was chosen most often."""
    runs: dict[str, list[Run]] = {recipe: [] for recipe in study.results.recipes if not is_mapped(recipe)}
    for run in study.results.runs.values():
        if run.key.recipe in runs:
            runs[run.key.recipe].append(run)
    varied, same = _compare_settings([run.setting for found in runs.values() for run in found])
    pages.write(
        "## What recipes cost, and what was chosen",
        "",
        "Parameters that were trained, bytes of cached features per image, median seconds of a run (choice of the setting "
        "included) on the machine named above, settings tried; ranges are over backbones and datasets.",
    )
    rows = []
    for recipe, found in runs.items():
        counts = [format_range([run.values[part] for run in found]) for part in ("num_parameters", "bytes_per_image")]
        seconds = [run.values["seconds"] for run in found if math.isfinite(run.values["seconds"])]
        row = [recipe, str(len(found)), *counts, f"{median(seconds):.3g}" if seconds else NONE]
        rows.append([*row, format_range([run.values["num_settings"] for run in found]), _chosen(found, varied)])
    headers = ["recipe", "runs", "parameters", "bytes per image", "seconds", "settings"]
    pages.table(Table([*headers, "chosen most often (share of runs)"], rows))
    if same:
        pages.write(f"In all runs that have them: {', '.join(_field(*item) for item in same.items())}.")


def _compare_settings(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Fields that are a number or a text: those in which runs that have them differ, and the values of the others."""
    varied, same = [], {}
    for name in dict.fromkeys(name for setting in settings for name in setting):
        there = [setting[name] for setting in settings if name in setting]
        # `None` is a value too: a linear head has no dropout, and so differs from an attentive one.
        values = {value for value in there if value is None or isinstance(value, int | float | str)}
        if name == "recipe" or values <= {None}:
            continue
        if len(values) > 1:
            varied.append(name)
        else:
            same[name] = values.pop()
    return varied, same


def _chosen(runs: Sequence[Run], fields: Sequence[str]) -> str:
    """For each of these fields that the runs have, the most frequent value."""
    parts = []
    for name in fields:
        values = [run.setting[name] for run in runs if isinstance(run.setting.get(name), int | float | str)]
        if values:
            counts = Counter(values)
            value = min(counts, key=lambda value: (-counts[value], str(value)))
            parts.append(f"{_field(name, value)} ({100 * counts[value] / len(runs):.0f} %)")
    return ", ".join(parts) or NONE


def _field(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"


def _write_missing(pages: Pages, study: ScoredStudy) -> None:
    results = study.results
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
                shown = [
                    f"{escape_markdown(d)} ({n})" for (b, r, d), n in counts.items() if (b, r) == (backbone, recipe)
                ]
                lines.append(f"- {escape_markdown(backbone)}, `{recipe}`: {', '.join(shown)}")
            lines.append("")
    if pages.left_out:
        lines += [
            "Figures that could not be drawn:\n",
            *(f"- {escape_markdown(reason)}" for reason in pages.left_out),
            "",
        ]
    pages.write(*(lines or ["Nothing."]))


def _entry(recipe: str) -> str:
    """A recipe as a config would have it: the members of a map as one."""
    family, *values = recipe.split(":")
    return ":".join([family, *("*" for _ in values)]) if is_mapped(recipe) else recipe
