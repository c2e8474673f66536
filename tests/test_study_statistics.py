"""Spreads, intervals over test items, and tests over datasets, against direct computations."""

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from hf_layerfusion import LayerFusionError
from hf_layerfusion.study.statistics import (
    Estimate,
    Predictions,
    adjust_p_values,
    balanced_accuracy,
    bootstrap_gain,
    bootstrap_mean,
    mean_estimate,
    mean_score,
    signed_rank_test,
    summarise_scores,
)


def made(seed, size=200, classes=4, share=0.8, first_row=0):
    """Labels that depend on the row alone, as those of a dataset do."""
    random = np.random.default_rng(seed)
    rows = np.arange(first_row, first_row + size)
    labels = np.random.default_rng(99).integers(0, classes, 10_000)[rows]
    wrong = (labels + 1) % classes
    return Predictions(rows, labels, np.where(random.random(size) < share, labels, wrong))


@pytest.mark.parametrize("seed", range(3))
def test_balanced_accuracy_is_that_of_scikit_learn(seed):
    found = made(seed)
    assert balanced_accuracy(found) == pytest.approx(balanced_accuracy_score(found.labels, found.predictions))


def test_classes_without_items_have_no_recall():
    found = Predictions(np.arange(3), np.array([5, 5, 9]), np.array([5, 0, 9]))
    assert balanced_accuracy(found) == pytest.approx(0.75)
    with pytest.raises(LayerFusionError, match="without an item"):
        balanced_accuracy(Predictions(*np.zeros((3, 0), dtype=np.int64)))


def naive_bootstrap(sides, count, seed):
    """Draws items one by one: rows of the union of all test sets, and each run is scored on the drawn ones it has."""
    random = np.random.default_rng(seed)
    runs = [run for side in sides for seeds in side.values() for run in seeds]
    union = np.unique(np.concatenate([run.rows for run in runs]))
    samples = np.empty((len(sides), count))
    for number in range(count):
        drawn = random.choice(union, len(union))
        for place, side in enumerate(sides):
            means = []
            for seeds in side.values():
                scores = []
                for run in seeds:
                    kept = drawn[np.isin(drawn, run.rows)] - run.rows[0]  # rows of a run are consecutive here
                    scores.append(balanced_accuracy(Predictions(*(values[kept] for values in run))))
                means.append(np.mean(scores))
            samples[place, number] = np.mean(means)
    return samples


def test_interval_is_that_of_drawing_items_one_by_one():
    # Two splits whose test sets overlap, two seeds each: an item is drawn for all four at once.
    ours = {split: [made(10 * split + seed, 120, first_row=60 * split) for seed in (0, 1)] for split in (0, 1)}
    theirs = {split: [made(7 + split, 120, share=0.7, first_row=60 * split)] for split in (0, 1)}
    expected = naive_bootstrap([ours, theirs], 1500, 3)
    mean = bootstrap_mean(ours, num_resamples=6000)
    gain = bootstrap_gain(ours, theirs, num_resamples=6000)
    assert mean.value == pytest.approx(np.mean([balanced_accuracy(run) for runs in ours.values() for run in runs]))
    for found, samples in ((mean, expected[0]), (gain, expected[0] - expected[1])):
        # Five standard errors of a mean and of a standard deviation from 1500 draws.
        std = samples.std()
        assert found.samples.mean() == pytest.approx(samples.mean(), abs=5 * std / math.sqrt(1500))
        assert found.samples.std() == pytest.approx(std, rel=5 / math.sqrt(2 * 1500))
        assert [found.low, found.high] == pytest.approx(np.quantile(samples, [0.025, 0.975]).tolist(), abs=0.3 * std)


def test_interval_holds_the_truth_as_often_as_it_says():
    """Heads with known recalls on new test sets; 95 % of 300 is 285, its standard deviation 3.8."""
    recalls = np.array([0.9, 0.7, 0.5])
    held = 0
    for number in range(300):
        random = np.random.default_rng(number)
        labels = random.choice(3, 300, p=[0.6, 0.3, 0.1])
        predictions = np.where(random.random(300) < recalls[labels], labels, (labels + 1) % 3)
        found = bootstrap_mean({0: [Predictions(np.arange(300), labels, predictions)]}, num_resamples=400, seed=number)
        held += found.low <= recalls.mean() <= found.high
    assert 285 - 4 * 3.8 < held < 285 + 4 * 3.8


def test_seeds_do_not_pass_for_new_items():
    run = made(0)
    one, three = bootstrap_mean({0: [run]}), bootstrap_mean({0: [run] * 3})
    assert (three.value, three.low, three.high) == pytest.approx((one.value, one.low, one.high))


def test_items_are_paired():
    base = made(0, 400)
    better = base._replace(predictions=np.where(base.rows < 8, base.labels, base.predictions))
    gain = bootstrap_gain({0: [better]}, {0: [base]})
    apart = bootstrap_mean({0: [better]}).samples - bootstrap_mean({0: [base]}, seed=1).samples
    assert gain.samples.std() < apart.std() / 3
    same = bootstrap_gain({0: [base]}, {0: [base]})
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero


def test_only_common_splits_are_compared():
    ours = {0: [made(0)], 1: [made(1, share=0.1, first_row=300)]}
    theirs = {0: [made(2), made(3)]}
    gain = bootstrap_gain(ours, theirs)
    assert gain.value == pytest.approx(mean_score({0: ours[0]}) - mean_score(theirs))


def test_draws_depend_on_the_seed_alone():
    runs = {0: [made(0)]}
    first, second, other = (bootstrap_mean(runs, seed=seed).samples for seed in (1, 1, [1, 2]))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("constant", [0, 3])
def test_constant_predictions(constant):
    run = made(0)
    found = bootstrap_mean({0: [run._replace(predictions=np.full_like(run.labels, constant))]})
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


def test_few_items():
    """Some resamples miss a class, some a whole split: they are scored on what they have."""
    runs = {0: [made(0, 1)], 1: [made(1, 3, share=0.0, first_row=50)]}
    found = bootstrap_mean(runs)
    assert np.isfinite(found.samples).all()
    assert (found.samples.min(), found.samples.max()) == (0, 1)


def test_what_cannot_be_paired():
    base = made(0)
    with pytest.raises(LayerFusionError, match=r"no split in common \(\[0\] and \[1\]\)"):
        bootstrap_gain({0: [base]}, {1: [base]})
    with pytest.raises(LayerFusionError, match="split 4 were tested on different rows"):
        bootstrap_gain({4: [base]}, {4: [made(0, 199)]})
    changed = base.labels.copy()
    changed[2] += 1
    with pytest.raises(LayerFusionError, match="disagree on the label of row 2"):
        bootstrap_gain({0: [base]}, {0: [base._replace(labels=changed)]})
    for nothing in ({}, {0: []}, {0: [made(0, 0)]}):
        with pytest.raises(LayerFusionError, match="nothing to resample"):
            bootstrap_mean(nothing)


def test_order_of_rows_does_not_matter():
    base, other = made(0), made(1)
    shuffled = Predictions(*(values[::-1] for values in other))
    first, second = (bootstrap_gain({0: [base]}, {0: [run]}).samples for run in (other, shuffled))
    assert np.array_equal(first, second)


def test_mean_over_datasets():
    parts = [bootstrap_mean({0: [made(number)]}, seed=number) for number in range(4)]
    mean = mean_estimate(parts)
    assert mean.value == pytest.approx(np.mean([part.value for part in parts]))
    # Datasets are independent, so the spread of their mean is half that of one.
    widths = [part.samples.std() for part in parts]
    assert mean.samples.std() == pytest.approx(np.sqrt(np.square(widths).sum()) / 4, rel=0.1)
    with pytest.raises(LayerFusionError, match="no dataset"):
        mean_estimate([])


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.2, True), (-0.2, -0.1, True), (0.0, 0.1, False), (-0.1, 0.1, False)]
)
def test_excludes_zero(low, high, expected):
    assert Estimate(0.0, low, high, np.empty(0)).excludes_zero is expected


@pytest.mark.parametrize(
    ("scores", "mean", "std_seeds", "std_splits"),
    [
        ({0: [0.5]}, 0.5, math.nan, math.nan),
        ({0: [0.4, 0.6]}, 0.5, np.std([0.4, 0.6], ddof=1), math.nan),
        ({0: [0.4], 1: [0.8]}, 0.6, math.nan, np.std([0.4, 0.8], ddof=1)),
        # Pooled by degrees of freedom: sums of squares 0.02 and 0.02, over 1 + 2.
        ({0: [0.4, 0.6], 1: [0.7, 0.8, 0.9]}, 0.65, math.sqrt(0.04 / 3), np.std([0.5, 0.8], ddof=1)),
        ({0: [0.4, 0.6], 1: [0.9], 2: []}, 0.7, np.std([0.4, 0.6], ddof=1), np.std([0.5, 0.9], ddof=1)),
    ],
)
def test_spreads_are_kept_apart(scores, mean, std_seeds, std_splits):
    found = summarise_scores(scores)
    assert (found.mean, found.std_seeds, found.std_splits) == pytest.approx((mean, std_seeds, std_splits), nan_ok=True)
    assert found.num_runs == sum(map(len, scores.values()))
    assert found.num_splits == sum(bool(values) for values in scores.values())


def test_no_score():
    with pytest.raises(LayerFusionError, match="no score"):
        summarise_scores({0: []})


def exact_p_value(values):
    """By all assignments of signs: how many have a rank sum as large."""
    values = [value for value in values if value]
    order = sorted(map(abs, values))
    ranks = [order.index(abs(value)) + 1 for value in values]
    observed = sum(rank for rank, value in zip(ranks, values, strict=True) if value > 0)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(values))]
    return sum(total >= observed for total in sums) / len(sums)


@pytest.mark.parametrize(
    ("differences", "counts"),
    [
        ([1.0, 2.0, 3.0], (3, 0, 0)),
        ([1.0, -2.0, 3.0, 4.5, -0.5], (3, 0, 2)),
        ([0.0, 0.2, 1e-13, -0.1], (1, 2, 1)),
        ([-1.0, -2.0], (0, 0, 2)),
        ([0.3], (1, 0, 0)),
        ([*range(1, 13), -13], (12, 0, 1)),
    ],
)
def test_signed_rank_test(differences, counts):
    found = signed_rank_test(differences)
    assert (found.wins, found.ties, found.losses) == counts
    assert found.p_value == pytest.approx(exact_p_value([value for value in differences if abs(value) > 1e-9]))
    assert found.smallest_p == 0.5 ** (counts[0] + counts[2])
    assert found.p_value >= found.smallest_p


def test_all_ties():
    found = signed_rank_test([0.0, 0.0])
    assert (found.p_value, found.smallest_p, found.ties) == (1, 1, 2)


@pytest.mark.parametrize("differences", [[], [0.1, math.nan]])
def test_differences_that_cannot_be_tested(differences):
    with pytest.raises(LayerFusionError, match="needs finite differences"):
        signed_rank_test(differences)


def test_benjamini_and_hochberg():
    # By hand: p times 4 over its rank, and then none above the next.
    assert adjust_p_values([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert adjust_p_values([]) == []
