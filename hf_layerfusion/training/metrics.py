"""Metrics that need neither the Hub nor a cache folder, and the `compute_metrics` that `Trainer` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    recall_score,
    top_k_accuracy_score,
)

from ..errors import LayerFusionError
from ..losses import problem_type_of

if TYPE_CHECKING:
    from transformers import EvalPrediction

    from ..configuration_layer_fusion import LayerFusionConfig

# The loss ignores rows with this label, so the metrics do too.
IGNORED_LABEL = -100
_CITATION = "scikit-learn: Machine Learning in Python, Pedregosa et al., JMLR 12, 2011"
_INPUTS = """
Args:
    predictions: {predictions}.
    references: class indices.
"""


class _OfflineMetric(evaluate.Metric):
    """An `evaluate.Metric` that keeps its rows in memory unless told otherwise, and then writes no file or folder."""

    description = ""
    predictions_description = "class indices"
    predictions_feature: Any = datasets.Value("int64")

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any):
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        # evaluate creates the folder even where nothing will be written to it.
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=_CITATION,
            inputs_description=_INPUTS.format(predictions=self.predictions_description),
            features=datasets.Features(
                {"predictions": self.predictions_feature, "references": datasets.Value("int64")}
            ),
        )


class Accuracy(_OfflineMetric):
    """Share of rows whose class is predicted."""

    description = "Share of rows whose class is predicted."

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class BalancedAccuracy(_OfflineMetric):
    """Mean recall over the classes that occur among the references: the metric of arXiv 2601.09322."""

    description = "Mean recall over the classes that occur among the references."

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        # `balanced_accuracy_score` in other words, without its warning whenever an absent class is predicted.
        present = np.unique(references)
        recall = recall_score(references, predictions, labels=present, average="macro", zero_division=0.0)
        return {"balanced_accuracy": float(recall)}


class TopKAccuracy(_OfflineMetric):
    """Share of rows whose class is among the k highest scores; 1 if there are no more than k classes."""

    description = "Share of rows whose class is among the k highest scores."
    predictions_description = "one score per class and row"
    predictions_feature = datasets.Sequence(datasets.Value("float64"))

    def _compute(self, predictions: list[list[float]], references: list[int], k: int = 5) -> dict[str, float]:
        return {f"top{k}_accuracy": _top_k_accuracy(np.asarray(predictions), np.asarray(references), k)}


class MacroF1(_OfflineMetric):
    """Mean F1 over the classes that occur among references or predictions."""

    description = "Mean F1 over the classes that occur among references or predictions."

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0))}


def without_timings(logged: Mapping[str, float]) -> dict[str, float]:
    """Loss and metrics of what `Trainer.evaluate` gives or logs, without the prefix `eval_`."""
    timings = ("runtime", "per_second", "preparation_time")
    named = {name.removeprefix("eval_"): value for name, value in logged.items() if name.startswith("eval_")}
    return {name: value for name, value in named.items() if not name.endswith(timings)}


def build_compute_metrics(config: LayerFusionConfig) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` of a `Trainer` for this kind of problem.

    Single-label: `accuracy`, `balanced_accuracy`, `macro_f1` and, with more than five classes, `top5_accuracy`.
    Multi-label: `macro_f1`, `micro_f1` and `mean_average_precision`, at a probability of one half. Regression: `mse`,
    `mae`, `r2`.

    `Trainer` gathers the predictions of all processes before it calls this, so the numbers are those of one process.
    """
    by_class = evaluate.combine([Accuracy(), BalancedAccuracy(), MacroF1()])

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, np.asarray(prediction.label_ids)
        if isinstance(logits, tuple):
            logits = logits[0]  # (B, C); others are attentions
        problem = problem_type_of(config, torch.from_numpy(labels))
        if problem == "regression":
            return _regression_metrics(logits, labels)
        if problem == "multi_label_classification":
            return _multi_label_metrics(logits, labels)
        kept = labels != IGNORED_LABEL
        logits, labels = logits[kept], labels[kept]
        if not len(labels):
            raise LayerFusionError(f"there is nothing to evaluate: no row has a label other than {IGNORED_LABEL}")
        metrics = by_class.compute(predictions=logits.argmax(axis=-1), references=labels)
        if config.num_labels > 5:
            # Not through the metric object: Arrow and lists make gigabytes of 50,000 x 1,000 logits.
            metrics["top5_accuracy"] = _top_k_accuracy(logits, labels, k=5)
        return metrics

    return compute_metrics


def _top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    num_labels = scores.shape[1]
    if num_labels <= k:
        return 1.0  # scikit-learn warns here, and takes two classes in another shape
    return float(top_k_accuracy_score(labels, scores, k=k, labels=np.arange(num_labels)))


def _regression_metrics(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    values = values.reshape(labels.shape)  # (B, 1) or (B, C) to the labels' (B,), (B, 1) or (B, C)
    return {
        "mse": float(mean_squared_error(labels, values)),
        "mae": float(mean_absolute_error(labels, values)),
        "r2": float(r2_score(labels, values)),
    }


def _multi_label_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    truth, guess = labels > 0.5, logits > 0  # a logit of 0 is a probability of one half
    present = truth.any(axis=0)  # the precision of a label that no row has is undefined
    precision = average_precision_score(truth[:, present], logits[:, present]) if present.any() else np.nan
    return {
        "macro_f1": float(f1_score(truth, guess, average="macro", zero_division=0.0)),
        "micro_f1": float(f1_score(truth, guess, average="micro", zero_division=0.0)),
        "mean_average_precision": float(precision),
    }


__all__ = ["Accuracy", "BalancedAccuracy", "MacroF1", "TopKAccuracy", "build_compute_metrics", "without_timings"]
