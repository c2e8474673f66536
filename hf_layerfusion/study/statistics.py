"""What the numbers of a study are worth: spreads, intervals over test items, tests over datasets.

Three sources of chance are kept apart, because they answer different questions:

- **test items**: would another test set of the same kind say the same of these heads? `bootstrap_mean`, `bootstrap_gain`.
- **seeds and splits**: would another training run, or another division of the rows? `summarise_scores`.
- **datasets**: would the finding hold on other datasets? `signed_rank_test`, which needs many of them.

How items are resampled. All items of the test set are drawn together, with replacement, so the class counts of a
resample vary as those of a random test set do; a class that is not drawn has no recall and is left out of the mean, as
the metric itself leaves out classes without items. Resampling within each class would hold the counts fixed. That is
right only where they are part of the design, and takes away some of the uncertainty elsewhere; recall is a ratio with
the class count below, so to first order both give the same variance, and they part only where classes have a handful
of items, where ours is the wider. Neither can see a mistake that no test item shows: where all items of a class are
right, its recall is 1 in every resample, so intervals at 100 % are too narrow.

Items are taken as independent. Where several come from one source (crops of one photograph), the intervals are too
narrow; nothing in a study's folder says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import LayerFusionError

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
# Scores are ratios of counts: what differs by less than this differs by rounding.
TIE = 1e-9
# 32 MB of int64 counts at a time.
_MOST_COUNTS = 1 << 22


class Predictions(NamedTuple):
    """What a head said of the images of a test set.

    Attributes:
        rows: `(T,)` int64, the row of the whole dataset that each image is; each once.
        labels: `(T,)` int64.
        predictions: `(T,)` int64.
    """

    rows: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray


# The runs of one recipe on one dataset: by split, those of all seeds.
Runs = Mapping[int, Sequence[Predictions]]


@dataclass(frozen=True)
class Estimate:
    """A number with its percentile interval.

    Attributes:
        value: from all test items, as they are.
        low: lower end of the interval.
        high: upper end.
        samples: `(R,)` float64, the value in each resample.
    """

    value: float
    low: float
    high: float
    samples: np.ndarray

    @classmethod
    def of(cls, value: float, samples: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
        """With the percentile interval of the samples (Efron and Tibshirani, 1993, section 13.3)."""
        low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
        return cls(float(value), float(low), float(high), samples)

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def balanced_accuracy(predictions: Predictions) -> float:
    """Mean recall over the classes that occur among the labels.

    Raises:
        LayerFusionError: if there is no item.
    """
    if not len(predictions.labels):
        raise LayerFusionError("a test set without an item has no balanced accuracy")
    _, classes = np.unique(predictions.labels, return_inverse=True)
    hits = np.bincount(classes, weights=predictions.predictions == predictions.labels)
    return float(np.mean(hits / np.bincount(classes)))


def mean_score(runs: Runs) -> float:
    """Balanced accuracy: the mean over seeds, then over splits, so that a split with fewer finished seeds counts as much."""
    return float(np.mean([np.mean([balanced_accuracy(run) for run in seeds]) for seeds in runs.values()]))


def bootstrap_mean(
    runs: Runs, *, num_resamples: int = NUM_RESAMPLES, confidence: float = CONFIDENCE, seed: int | Sequence[int] = 0
) -> Estimate:
    """The mean balanced accuracy of a recipe (`mean_score`) with its interval over test items.

    An item that several runs were tested on is drawn for all of them at once, so seeds do not pass for new items.

    Args:
        runs: by split, the predictions of all seeds. One run is `{0: [run]}`.
        num_resamples: R.
        confidence: share of the resamples within the interval.
        seed: of the draws. Give datasets different ones if their samples are to be averaged.

    Raises:
        LayerFusionError: if there is no run, or runs disagree on the label of a row.
    """
    samples = _resample([runs], num_resamples, seed)[0]
    return Estimate.of(mean_score(runs), samples, confidence)


def bootstrap_gain(
    runs: Runs,
    baseline: Runs,
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int | Sequence[int] = 0,
) -> Estimate:
    """By how much one recipe is ahead of another on the same items: the paired difference of `mean_score`.

    Only splits that both have enter; within a split, all seeds of each do (their numbers may differ: seeds of two
    recipes have nothing in common, items have).

    Args:
        runs: by split, the predictions of all seeds.
        baseline: what is subtracted.
        num_resamples: R.
        confidence: share of the resamples within the interval.
        seed: of the draws.

    Raises:
        LayerFusionError: if no split is common, or the two were tested on different rows of one.
    """
    common = [split for split in runs if split in baseline]
    if not common:
        raise LayerFusionError(
            f"the two recipes have no split in common ({sorted(runs)} and {sorted(baseline)}): nothing can be paired"
        )
    ours, theirs = ({split: side[split] for split in common} for side in (runs, baseline))
    for split in common:
        tested = [np.sort(run.rows) for run in (*ours[split], *theirs[split])]
        if not all(np.array_equal(rows, tested[0]) for rows in tested[1:]):
            raise LayerFusionError(
                f"the runs of split {split} were tested on different rows, so their items cannot be paired: run the "
                "study again with one setting of the test rows"
            )
    first, second = _resample([ours, theirs], num_resamples, seed)
    return Estimate.of(mean_score(ours) - mean_score(theirs), first - second, confidence)


def mean_estimate(estimates: Sequence[Estimate], confidence: float = CONFIDENCE) -> Estimate:
    """The mean over datasets, whose test items are independent of each other; the datasets themselves are taken as given.

    Raises:
        LayerFusionError: if there is none.
    """
    if not estimates:
        raise LayerFusionError("there is no dataset to take the mean of")
    value = float(np.mean([estimate.value for estimate in estimates]))
    return Estimate.of(value, np.mean([estimate.samples for estimate in estimates], axis=0), confidence)


def _resample(sides: Sequence[Runs], num_resamples: int, seed: int | Sequence[int]) -> np.ndarray:
    """`(len(sides), R)`: `mean_score` of each side in each resample, all sides on the same draws.

    Items that no run tells apart (same class, in the same test sets, right in the same runs) form a cell. The counts of
    the cells of a resample are multinomial, so they are drawn directly: the same distribution as drawing items, for the
    price of the cells, of which there are far fewer.
    """
    places = [(number, split) for number, side in enumerate(sides) for split, seeds in side.items() for _ in seeds]
    runs = [run for side in sides for seeds in side.values() for run in seeds]
    if not runs or any(not len(run.rows) for run in runs):
        raise LayerFusionError("there is nothing to resample: no run, or a run without a test item")
    cells, counts = np.unique(_item_table(runs), axis=0, return_counts=True)
    starts = np.flatnonzero(np.diff(cells[:, 0], prepend=cells[0, 0] - 1))  # cells are sorted by class
    tested, hit = (cells[:, 1:].T > 0).astype(np.int64), (cells[:, 1:].T > 1).astype(np.int64)
    random = np.random.default_rng(seed)
    total = int(counts.sum())
    # Of all runs of a side, a share: the mean over seeds, then over splits.
    shares = [1 / (places.count(place) * len(sides[place[0]])) for place in places]
    sums, weights = np.zeros((2, len(sides), num_resamples))
    step = max(1, _MOST_COUNTS // len(cells))
    for begin in range(0, num_resamples, step):
        drawn = random.multinomial(total, counts / total, size=min(step, num_resamples - begin))
        part = slice(begin, begin + len(drawn))
        for (side, _), share, there, right in zip(places, shares, tested, hit, strict=True):
            items = np.add.reduceat(drawn * there, starts, axis=1)
            hits = np.add.reduceat(drawn * right, starts, axis=1)
            classes = np.count_nonzero(items, axis=1)
            recalls = np.sum(hits / np.maximum(items, 1), axis=1)
            # A run none of whose few items was drawn has no score in this resample.
            sums[side, part] += share * recalls / np.maximum(classes, 1)
            weights[side, part] += share * (classes > 0)
    return sums / weights


def _item_table(runs: Sequence[Predictions]) -> np.ndarray:
    """`(items, 1 + runs)` int64: the class, then for each run 0 (not in its test set), 1 (wrong) or 2 (right)."""
    rows = np.unique(np.concatenate([run.rows for run in runs]))
    table = np.zeros((len(rows), 1 + len(runs)), dtype=np.int64)
    known = np.zeros(len(rows), dtype=bool)
    for number, run in enumerate(runs, start=1):
        places = np.searchsorted(rows, run.rows)
        differs = known[places] & (table[places, 0] != run.labels)
        if differs.any():
            row = int(run.rows[np.argmax(differs)])
            raise LayerFusionError(f"two runs disagree on the label of row {row}: they were not made from one dataset")
        table[places, 0] = run.labels
        known[places] = True
        table[places, number] = 1 + (run.predictions == run.labels)
    return table


@dataclass(frozen=True)
class ScoreSummary:
    """Scores of one recipe on one dataset.

    Attributes:
        mean: over seeds, then over splits.
        std_seeds: standard deviation over the seeds of a split, pooled over splits; NaN if no split has two seeds.
        std_splits: standard deviation of the splits' means; NaN of one split. Splits of one dataset share training
            rows, so this is a spread and no standard error (Nadeau and Bengio, Machine Learning 52, 2003). What is
            left of the seeds' spread is in it.
        num_splits: splits with a score.
        num_runs: scores.
    """

    mean: float
    std_seeds: float
    std_splits: float
    num_splits: int
    num_runs: int


def summarise_scores(scores: Mapping[int, Sequence[float]]) -> ScoreSummary:
    """Mean and spreads of scores that are listed by split.

    Raises:
        LayerFusionError: if there is none.
    """
    groups = [np.asarray(values, dtype=np.float64) for values in scores.values() if len(values)]
    if not groups:
        raise LayerFusionError("there is no score to summarise")
    means = [group.mean() for group in groups]
    freedom = sum(len(group) - 1 for group in groups)
    within = sum(float(np.square(group - group.mean()).sum()) for group in groups)
    return ScoreSummary(
        mean=float(np.mean(means)),
        std_seeds=math.sqrt(within / freedom) if freedom else math.nan,
        std_splits=float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        num_splits=len(groups),
        num_runs=sum(map(len, groups)),
    )


@dataclass(frozen=True)
class SignedRankTest:
    """A comparison of two recipes over datasets.

    Attributes:
        wins: datasets on which the first is ahead.
        ties: on which both are the same.
        losses: on which the second is.
        p_value: of the one-sided Wilcoxon signed-rank test: how likely are differences at least as much in favour of
            the first one if neither is better; 1 where all are ties.
        smallest_p: the smallest p-value that this many datasets can give, `2 ** -(wins + losses)`.
    """

    wins: int
    ties: int
    losses: int
    p_value: float
    smallest_p: float


def signed_rank_test(differences: Sequence[float]) -> SignedRankTest:
    """Is the first recipe better over datasets? One-sided, as in arXiv 2601.09322 (figure 2); ties are left out.

    Of n datasets that differ, all in favour of the first have rank sum n(n+1)/2, which one of the 2 ** n equally likely
    assignments of signs gives: no p-value is smaller than `2 ** -n`.

    Args:
        differences: first minus second, one for each dataset.

    Raises:
        LayerFusionError: if there is none, or one is not finite.
    """
    from scipy.stats import wilcoxon

    values = np.asarray(differences, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise LayerFusionError(f"a test over datasets needs finite differences, not {list(differences)}")
    values = np.where(np.abs(values) < TIE, 0.0, values)
    wins, losses = int((values > 0).sum()), int((values < 0).sum())
    p_value = 1.0
    if wins + losses:
        # Rounded, because rounding errors would break ties between the ranks.
        p_value = float(wilcoxon(np.round(values[values != 0], 12), alternative="greater").pvalue)
    return SignedRankTest(wins, len(values) - wins - losses, losses, p_value, 0.5 ** (wins + losses))


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's (1995) adjusted p-values: reject those below q, and a share q of them is expected wrong."""
    from scipy.stats import false_discovery_control

    return [float(value) for value in false_discovery_control(p_values, method="bh")] if len(p_values) else []
