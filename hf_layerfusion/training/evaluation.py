"""What a head is worth on images it was not trained on: metrics with intervals, every class, confusions, attention.

Intervals are percentile intervals (Efron and Tibshirani, 1993, section 13.3) of a bootstrap over test images: images of
all classes are drawn together, with replacement, as `study/statistics.py` does for balanced accuracy, and says why. They
answer whether another test set of the same kind would give the same number; they say nothing about another training run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from transformers import EvalPrediction

from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..losses import check_labels, problem_type_of
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from .metrics import IGNORED_LABEL, build_compute_metrics

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
# A larger confusion matrix nobody reads, and its file would be larger than the head's.
MAX_CONFUSION_CLASSES = 1000
# Seven digits of a weight are more than float32 holds.
_ATTENTION_DIGITS = 6

Metrics = dict[str, float]


@dataclass
class HeadOutputs:
    """What a head said of T test images.

    Attributes:
        logits: `(T, C)`.
        labels: `(T,)` class indices or numbers, or `(T, C)`.
        attention: `(H, N)` float64, the weight of each token by attention head, averaged over images; those of several
            queries stand below each other. `None` for a head without attention.
    """

    logits: np.ndarray
    labels: np.ndarray
    attention: np.ndarray | None


def evaluate_head(
    model: ViTForAttentiveLayerFusionClassification,
    features: LayerFeatures,
    *,
    batch_size: int = 1024,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a head on cached features that it was not trained on.

    Args:
        model: left in eval mode. It reads its own tokens out of the features' bank.
        features: with labels.
        batch_size: images per forward pass of the head.
        seed: of the bootstrap.

    Returns:
        The measured part of a training summary, as `measure_outputs` describes it.

    Raises:
        LayerFusionError: if the features lack the head's tokens, labels, or rows.
    """
    batches = features.select_bank(model.config.bank).batches(batch_size)
    return measure_outputs(model.config, collect_outputs(model, batches), seed=seed)


def collect_outputs(
    model: ViTForAttentiveLayerFusionClassification, batches: Iterable[dict[str, Tensor]]
) -> HeadOutputs:
    """Run labelled batches through a model.

    Args:
        model: left in eval mode.
        batches: each holds `labels`, and `layer_features` or `pixel_values` with what else the backbone reads.

    Raises:
        LayerFusionError: if there are no batches, or one has no labels.
    """
    model.eval()
    logits, labels = [], []
    attention: Tensor | None = None
    for batch in batches:
        if "labels" not in batch:
            raise LayerFusionError("these images have no labels to compare with: give a label column")
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            output = model(**inputs, output_attentions=True)
        logits.append(output.logits.float().cpu())
        # Several labels an image may be whole numbers in a cache; floats say that they are no class indices.
        labels.append((batch["labels"].float() if batch["labels"].ndim > 1 else batch["labels"]).cpu())
        if output.layer_attentions is not None:
            total = output.layer_attentions.flatten(1, 2).double().sum(dim=0).cpu()  # (H, N)
            attention = total if attention is None else attention + total
    if not logits:
        raise LayerFusionError("there are no images to evaluate on")
    count = sum(map(len, logits))
    mean = None if attention is None else (attention / count).numpy()
    return HeadOutputs(torch.cat(logits).numpy(), torch.cat(labels).numpy(), mean)


def measure_outputs(config: LayerFusionConfig, outputs: HeadOutputs, *, seed: int = 0) -> dict[str, Any]:
    """The measured part of a training summary.

    Args:
        config: of the head.
        outputs: on the test images.
        seed: of the bootstrap.

    Returns:
        `test_images`; `metrics` by name, those of `build_compute_metrics` that are defined; `confidence_intervals` by the
        same names, `[low, high]` at 95 %, if there are at least two images; `per_class`, for classes and for several
        labels per image, with `None` where the test images do not say; `confusion_matrix`, for at most 1,000 classes
        (rows: true class); and `attention`, for heads that have one. JSON can hold all of it. A regression has metrics
        alone.

    Raises:
        LayerFusionError: if no image has a label, or one is out of range.
    """
    logits, labels = outputs.logits, outputs.labels
    problem = problem_type_of(config, torch.from_numpy(labels))
    compute = build_compute_metrics(config)
    if problem == "single_label_classification":
        check_labels(torch.from_numpy(labels), config.num_labels)
        kept = labels != IGNORED_LABEL
        logits, labels = logits[kept], labels[kept]
    metrics = compute(EvalPrediction(predictions=logits, label_ids=labels))
    measured: dict[str, Any] = {
        "test_images": len(labels),
        "metrics": {name: float(value) for name, value in metrics.items() if math.isfinite(value)},
    }
    if len(labels) > 1:
        num_resamples = NUM_RESAMPLES
        if problem == "multi_label_classification":
            # Each resample goes through all logits: 0.1 s for 3 million. The intervals of so many images are narrow.
            num_resamples = max(200, min(NUM_RESAMPLES, 200_000_000 // logits.size))
        metrics_of = weighted_metrics(problem, logits, labels)
        intervals = bootstrap_intervals(metrics_of, len(labels), num_resamples=num_resamples, seed=seed)
        measured["confidence_intervals"] = {name: intervals[name] for name in measured["metrics"] if name in intervals}
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    if problem == "single_label_classification":
        predictions = logits.argmax(axis=-1)
        measured["per_class"] = _per_class(names, labels, predictions)
        if len(names) <= MAX_CONFUSION_CLASSES:
            counts = confusion_matrix(labels, predictions, labels=np.arange(len(names)))
            measured["confusion_matrix"] = counts.tolist()
    elif problem == "multi_label_classification":
        measured["per_class"] = _per_class(names, labels > 0.5, logits > 0)
    if outputs.attention is not None:
        measured["attention"] = {
            "token_names": config.token_names,
            "mean": np.round(outputs.attention, _ATTENTION_DIGITS).tolist(),
            "num_images": len(outputs.labels),
        }
    return measured


def _per_class(names: list[str], labels: np.ndarray, predictions: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of every class; of labels that exclude each other, or of a column for each."""
    numbers = np.arange(len(names))
    scores = precision_recall_fscore_support(labels, predictions, labels=numbers, average=None, zero_division=np.nan)
    rows = zip(names, *(values.tolist() for values in scores), strict=True)
    return [
        {
            "label": name,
            **{
                measure: None if math.isnan(value) else value
                for measure, value in (("precision", precision), ("recall", recall), ("f1", f1))
            },
            "support": int(support),
        }
        for name, precision, recall, f1, support in rows
    ]


def bootstrap_intervals(
    metrics: Callable[[np.ndarray], Metrics],
    num_images: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Percentile intervals of metrics over test images.

    Args:
        metrics: gives the metrics where each image counts as often as `(num_images,)` weights say.
        num_images: T.
        num_resamples: R.
        confidence: share of the resamples within the interval.
        seed: of the draws.

    Returns:
        `[low, high]` by name; without metrics that some resample leaves undefined.
    """
    random = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {}
    for _ in range(num_resamples):
        drawn = random.integers(num_images, size=num_images)
        for name, value in metrics(np.bincount(drawn, minlength=num_images).astype(np.float64)).items():
            samples.setdefault(name, []).append(value)
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    return {name: np.quantile(values, ends).tolist() for name, values in samples.items() if np.isfinite(values).all()}


def weighted_metrics(problem: str, logits: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], Metrics]:
    """The metrics of `build_compute_metrics` as a function of how often each image counts.

    Everything that does not depend on the weights is done here, once: a bootstrap asks thousands of times.

    Args:
        problem: type of the problem.
        logits: `(T, C)`.
        labels: `(T,)` or `(T, C)`; none is -100.
    """
    if problem == "regression":
        return _weighted_regression_metrics(logits, labels)
    if problem == "multi_label_classification":
        return _weighted_multi_label_metrics(logits, labels)
    return _weighted_class_metrics(logits, labels)


def _weighted_class_metrics(logits: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], Metrics]:
    num_labels = logits.shape[1]
    predictions = logits.argmax(axis=-1)
    hit = predictions == labels
    better = (logits > np.take_along_axis(logits, labels[:, None], axis=1)).sum(axis=1)

    def metrics(weights: np.ndarray) -> Metrics:
        support = np.bincount(labels, weights, num_labels)
        predicted = np.bincount(predictions, weights, num_labels)
        hits = np.bincount(labels, weights * hit, num_labels)
        there, occurs = support > 0, support + predicted > 0
        values = {
            "accuracy": float(hits.sum() / weights.sum()),
            "balanced_accuracy": float(np.mean(hits[there] / support[there])),
            "macro_f1": float(np.mean(2 * hits[occurs] / (support + predicted)[occurs])),
        }
        if num_labels > 5:
            values["top5_accuracy"] = float((weights * (better < 5)).sum() / weights.sum())
        return values

    return metrics


def _weighted_multi_label_metrics(logits: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], Metrics]:
    truth, guess = labels > 0.5, logits > 0
    both, either = (truth & guess).astype(np.float64), truth.astype(np.float64) + guess
    # Average precision, label by label: images in falling order of their logit. Equal logits are one threshold, whose
    # precision is that of the last of them. All of it `(C, T)`, so that sums run along memory.
    falling = np.ascontiguousarray(-logits.T)
    order = np.argsort(falling, axis=1, kind="stable")
    ranked = np.take_along_axis(falling, order, axis=1)
    ranked_truth = np.take_along_axis(truth.T, order, axis=1).astype(np.float64)
    last = np.stack([np.searchsorted(row, row, side="right") - 1 for row in ranked])

    def metrics(weights: np.ndarray) -> Metrics:
        hits, sizes = weights @ both, weights @ either  # (C,)
        drawn = weights[order]
        true = drawn * ranked_truth
        found = np.take_along_axis(np.cumsum(true, axis=1), last, axis=1)
        shown = np.take_along_axis(np.cumsum(drawn, axis=1), last, axis=1)
        positives = true.sum(axis=1)
        average_precision = (true * found / np.maximum(shown, 1)).sum(axis=1) / np.maximum(positives, 1)
        present = positives > 0
        return {
            "macro_f1": float(np.mean(2 * hits / np.where(sizes > 0, sizes, 1))),
            "micro_f1": float(2 * hits.sum() / sizes.sum()) if sizes.sum() else 0.0,
            "mean_average_precision": float(average_precision[present].mean()) if present.any() else math.nan,
        }

    return metrics


def _weighted_regression_metrics(logits: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], Metrics]:
    truth = labels.reshape(len(labels), -1).astype(np.float64)
    errors = logits.reshape(truth.shape) - truth

    def metrics(weights: np.ndarray) -> Metrics:
        shares = weights / weights.sum()
        squared = shares @ np.square(errors)  # of each output, and so on
        variance = shares @ np.square(truth - shares @ truth)
        # Of images that all have one value, nothing is left to explain.
        explained = np.where(variance > 0, 1 - squared / np.where(variance > 0, variance, 1), math.nan)
        return {
            "mse": float(squared.mean()),
            "mae": float((shares @ np.abs(errors)).mean()),
            "r2": float(explained.mean()),
        }

    return metrics


__all__ = [
    "HeadOutputs",
    "bootstrap_intervals",
    "collect_outputs",
    "evaluate_head",
    "measure_outputs",
    "weighted_metrics",
]
