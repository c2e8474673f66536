"""Metrics agree with scikit-learn, and need neither network nor files."""

import socket
import warnings
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import sklearn.metrics
import sklearn.utils.class_weight
import torch
from transformers import EvalPrediction

from hf_layerfusion import LayerFusionError
from hf_layerfusion.training import (
    Accuracy,
    BalancedAccuracy,
    MacroF1,
    TopKAccuracy,
    build_compute_metrics,
    class_weights,
)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 7, 60)
CASES = {
    "all classes": (RNG.integers(0, 7, 60), LABELS),
    "unbalanced": (RNG.integers(0, 3, 50), np.array([0] * 45 + [1] * 4 + [2])),
    "classes missing from the labels": (RNG.integers(0, 7, 60), LABELS % 3),
    "classes missing from the predictions": (LABELS % 2, LABELS),
    "one class only": (RNG.integers(0, 3, 20), np.full(20, 2)),
    "perfect": (LABELS, LABELS),
    "all wrong": ((LABELS + 1) % 7, LABELS),
    "one row": (np.array([1]), np.array([1])),
}


@pytest.fixture(autouse=True)
def _no_network_no_files(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise AssertionError("a metric opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    cache = tmp_path / "metrics"
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(cache))
    yield
    assert not cache.exists()


def _balanced_accuracy(labels, predictions):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "y_pred contains classes not in y_true"
        return sklearn.metrics.balanced_accuracy_score(labels, predictions)


def _prediction(logits, labels):
    return EvalPrediction(predictions=np.asarray(logits), label_ids=np.asarray(labels))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("metric", "name", "reference"),
    [
        (Accuracy, "accuracy", sklearn.metrics.accuracy_score),
        (BalancedAccuracy, "balanced_accuracy", _balanced_accuracy),
        (MacroF1, "macro_f1", lambda y, p: sklearn.metrics.f1_score(y, p, average="macro")),
    ],
)
def test_class_metrics(metric, name, reference, case):
    predictions, labels = CASES[case]
    expected = reference(labels, predictions)
    measure = metric()
    for values in (predictions, predictions.tolist(), torch.from_numpy(predictions)):  # one object serves again
        result = measure.compute(predictions=values, references=labels)
        assert list(result) == [name]
        assert type(result[name]) is float
        assert result[name] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("present", [range(7), [2], [0, 6]], ids=["all classes", "one class", "two classes"])
def test_top_k(k, present):
    labels = RNG.choice(list(present), 40)
    scores = RNG.normal(size=(40, 7))
    expected = np.mean([label in np.argsort(row)[-k:] for row, label in zip(scores, labels, strict=True)])
    result = TopKAccuracy().compute(predictions=scores, references=labels, k=k)
    assert result == {f"top{k}_accuracy": pytest.approx(expected, abs=1e-12)}
    assert 0 < expected < 1
    sklearn_score = sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(7))
    assert result[f"top{k}_accuracy"] == pytest.approx(sklearn_score, abs=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_labels", [2, 5])
def test_top_5_of_few_classes_is_1(num_labels):
    labels = RNG.integers(0, num_labels, 10)
    scores = RNG.normal(size=(10, num_labels))
    assert TopKAccuracy().compute(predictions=scores, references=labels) == {"top5_accuracy": 1.0}


def test_batches_and_combination():
    predictions, labels = CASES["all classes"]
    combined = evaluate.combine([Accuracy(), BalancedAccuracy(keep_in_memory=True), MacroF1()])
    combined.add_batch(predictions=predictions[:20], references=labels[:20])
    combined.add_batch(predictions=predictions[20:], references=labels[20:])
    assert combined.compute() == {
        "accuracy": pytest.approx(sklearn.metrics.accuracy_score(labels, predictions)),
        "balanced_accuracy": pytest.approx(_balanced_accuracy(labels, predictions)),
        "macro_f1": pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="macro")),
    }


def test_metrics_can_use_a_cache_folder(tmp_path):
    """`evaluate`'s own way to gather over processes stays open to those who ask for it."""
    metric = Accuracy(keep_in_memory=False, cache_dir=str(tmp_path / "asked for"))
    assert metric.compute(predictions=[0, 1], references=[0, 0]) == {"accuracy": 0.5}
    assert (tmp_path / "asked for").is_dir()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("problem_type", ["single_label_classification", None])
@pytest.mark.parametrize("num_labels", [3, 5, 6, 20])
def test_single_label(num_labels, problem_type):
    logits = RNG.normal(size=(50, num_labels)).astype(np.float32)
    labels = RNG.integers(0, num_labels - 1, 50)  # the last class is missing
    compute = build_compute_metrics(SimpleNamespace(num_labels=num_labels, problem_type=problem_type))
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, logits.argmax(-1)),
        "balanced_accuracy": _balanced_accuracy(labels, logits.argmax(-1)),
        "macro_f1": sklearn.metrics.f1_score(labels, logits.argmax(-1), average="macro"),
    }
    if num_labels > 5:
        expected["top5_accuracy"] = sklearn.metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(num_labels))
    assert compute(_prediction(logits, labels)) == pytest.approx(expected, abs=1e-12)
    with_attentions = EvalPrediction(predictions=(logits, RNG.normal(size=(50, 1, 4, 4))), label_ids=labels)
    assert compute(with_attentions) == pytest.approx(expected, abs=1e-12)


def test_ignored_rows_do_not_count():
    compute = build_compute_metrics(SimpleNamespace(num_labels=6, problem_type="single_label_classification"))
    logits, labels = RNG.normal(size=(30, 6)), RNG.integers(0, 6, 30)
    masked = np.where(np.arange(30) < 10, -100, labels)
    assert compute(_prediction(logits, masked)) == compute(_prediction(logits[10:], labels[10:]))
    with pytest.raises(LayerFusionError, match="nothing to evaluate: no row has a label other than -100"):
        compute(_prediction(logits, np.full(30, -100)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("problem_type", ["multi_label_classification", None])
def test_multi_label(problem_type):
    compute = build_compute_metrics(SimpleNamespace(num_labels=4, problem_type=problem_type))
    logits = RNG.normal(size=(40, 4)).astype(np.float32)
    labels = RNG.integers(0, 2, (40, 4)).astype(np.float32)
    labels[:, 2] = 0  # no row has this label
    guess = torch.from_numpy(logits).sigmoid().numpy() > 0.5
    present = [0, 1, 3]
    expected = {
        "macro_f1": sklearn.metrics.f1_score(labels, guess, average="macro", zero_division=0),
        "micro_f1": sklearn.metrics.f1_score(labels, guess, average="micro"),
        "mean_average_precision": np.mean(
            [sklearn.metrics.average_precision_score(labels[:, c], logits[:, c]) for c in present]
        ),
    }
    assert compute(_prediction(logits, labels)) == pytest.approx(expected, abs=1e-12)


def test_multi_label_without_any_label_has_no_precision():
    compute = build_compute_metrics(SimpleNamespace(num_labels=2, problem_type="multi_label_classification"))
    result = compute(_prediction(np.ones((5, 2)), np.zeros((5, 2))))
    assert np.isnan(result["mean_average_precision"])
    assert result["micro_f1"] == 0


@pytest.mark.parametrize(("outputs", "label_shape"), [(1, (30,)), (1, (30, 1)), (3, (30, 3))])
def test_regression(outputs, label_shape):
    problem_type = None if outputs == 1 else "regression"
    compute = build_compute_metrics(SimpleNamespace(num_labels=outputs, problem_type=problem_type))
    values, labels = RNG.normal(size=(30, outputs)), RNG.normal(size=label_shape)
    square = labels.reshape(30, outputs)
    expected = {
        "mse": ((values - square) ** 2).mean(),
        "mae": np.abs(values - square).mean(),
        "r2": sklearn.metrics.r2_score(square, values),
    }
    assert compute(_prediction(values, labels)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor], ids=["list", "array", "tensor"])
def test_class_weights(kind):
    labels = [0, 0, 0, 1, 3, 3]
    assert class_weights(kind(labels), 4) == [6 / (4 * 3), 6 / (4 * 1), 0.0, 6 / (4 * 2)]


def test_class_weights_of_full_classes_are_sklearns():
    labels = RNG.integers(0, 5, 200)
    expected = sklearn.utils.class_weight.compute_class_weight("balanced", classes=np.arange(5), y=labels)
    assert class_weights(labels, 5) == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "row 2 has label 3, but num_labels=3: labels must be 0 to 2"),
        ([0, -1, 1], "row 1 has label -1"),
        ([], "at least one label"),
        ([0.5, 1.0], "one class index per row, but the labels are float64"),
        ([[0, 1], [1, 0]], r"of shape \(2, 2\)"),
    ],
)
def test_class_weights_refuse(labels, message):
    with pytest.raises(LayerFusionError, match=message):
        class_weights(labels, 3)
