"""What the recipes of a study reached, and by how much they differ, with intervals over test images."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .results import StudyResults
from .statistics import NUM_RESAMPLES, Estimate, ScoreSummary, bootstrap_gain, bootstrap_mean, summarise_scores

if TYPE_CHECKING:
    import pandas

BASELINE = "linear-last"
# One recipe for each layer or module: shown as a map, since a hundred rows are no table.
MAP_FAMILIES = ("linear-layer", "aat-layer", "module-probe", "module-logistic")


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


@dataclass(frozen=True)
class ScoredStudy:
    """The scores of all recipes with finished runs.

    Attributes:
        results: what was measured.
        baseline: the recipe that gains are over.
        num_resamples: of the bootstrap.
        scores: by backbone, dataset and recipe.
    """

    results: StudyResults
    baseline: str
    num_resamples: int
    scores: Mapping[str, Mapping[str, Mapping[str, Score]]]

    @classmethod
    def of(cls, results: StudyResults, baseline: str = BASELINE, *, num_resamples: int = NUM_RESAMPLES) -> ScoredStudy:
        """Score all runs.

        Raises:
            LayerFusionError: if predictions are damaged, or runs of one split were tested on different rows.
        """
        found: dict[str, dict[str, dict[str, Score]]] = {}
        for backbone in results.backbones:
            for dataset in results.datasets:
                scores = _score_recipes(results, backbone, dataset, baseline, num_resamples)
                if scores:
                    found.setdefault(backbone, {})[dataset] = scores
        return cls(results, baseline, num_resamples, found)

    @property
    def references(self) -> list[str]:
        """Recipes that all others are held against, besides the baseline."""
        return list(self.results.config.get("references", ()))

    @property
    def has_baseline(self) -> bool:
        return self.baseline in self.results.recipes

    @property
    def quantity(self) -> str:
        """What figures show, with its unit."""
        return f"gain over {self.baseline} (percentage points)" if self.has_baseline else "balanced accuracy (%)"

    @property
    def spreads(self) -> tuple[bool, bool]:
        """Whether any recipe has several seeds, and several splits, on one dataset."""
        groups: dict[tuple, set[tuple[int, int]]] = {}
        for key in self.results.runs:
            groups.setdefault((key.backbone, key.dataset, key.recipe), set()).add((key.split, key.seed))
        splits = any(len({split for split, _ in group}) > 1 for group in groups.values())
        seeds = any(len(group) > len({split for split, _ in group}) for group in groups.values())
        return seeds, splits

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

    def table(self) -> pandas.DataFrame:
        """A row for each backbone, dataset and recipe."""
        import pandas

        rows = []
        for backbone, datasets in self.scores.items():
            for dataset, recipes in datasets.items():
                for recipe, score in recipes.items():
                    row: dict[str, Any] = {"backbone": backbone, "dataset": dataset, "recipe": recipe}
                    row |= dataclasses.asdict(score.summary)
                    for name, estimate in (("", score.accuracy), ("gain_", score.gain)):
                        for part in ("low", "high") if not name else ("value", "low", "high"):
                            row[f"{name}{part}"] = math.nan if estimate is None else getattr(estimate, part)
                    rows.append(row)
        return pandas.DataFrame(rows).rename(columns={"mean": "balanced_accuracy", "gain_value": "gain"})


def _score_recipes(
    results: StudyResults, backbone: str, dataset: str, baseline: str, num_resamples: int
) -> dict[str, Score]:
    options: dict[str, Any] = {"num_resamples": num_resamples, "seed": _seed(backbone, dataset)}
    there = {recipe: results.scores(backbone, dataset, recipe) for recipe in results.recipes}
    there = {recipe: scores for recipe, scores in there.items() if scores}
    theirs = results.all_predictions(backbone, dataset, baseline) if baseline in there else {}
    found = {}
    for recipe, scores in there.items():
        accuracy = gain = None
        if not is_mapped(recipe):
            ours = theirs if recipe == baseline else results.all_predictions(backbone, dataset, recipe)
            accuracy = bootstrap_mean(ours, **options)
            if recipe != baseline and ours.keys() & theirs.keys():
                gain = bootstrap_gain(ours, theirs, **options)
        found[recipe] = Score(summarise_scores(scores), accuracy, gain)
    return found


def is_mapped(recipe: str) -> bool:
    """Whether a recipe is one of `MAP_FAMILIES`."""
    return recipe.partition(":")[0] in MAP_FAMILIES and ":" in recipe


def _seed(backbone: str, dataset: str) -> list[int]:
    """Other draws for every dataset: means over datasets take their samples for independent."""
    return [zlib.crc32(backbone.encode()), zlib.crc32(dataset.encode())]
