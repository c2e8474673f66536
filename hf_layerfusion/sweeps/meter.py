"""The scores of many heads at once, batch by batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..training.metrics import build_compute_metrics

# Smaller is better in these metrics.
LOSSES = ("mse", "mae")


class Meter:
    """The metric of K heads over batches of validation rows.

    Accuracy and balanced accuracy are counted as the batches go by; anything else `build_compute_metrics` computes, for
    one head after the other, from all logits.
    """

    def __init__(self, metric: str, config: LayerFusionConfig, num_heads: int):
        self.metric, self.config = metric, config
        is_single = config.problem_type == "single_label_classification"
        self.counts = is_single and metric in ("accuracy", "balanced_accuracy")
        self.hits: Tensor | None = None  # (K, C)
        self.rows: Tensor | None = None  # (C,)
        self.is_finite = torch.ones(num_heads, dtype=torch.bool)
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """`(K, B, C)` and `(B, ...)`."""
        self.is_finite = self.is_finite.to(logits.device) & torch.isfinite(logits).flatten(1).all(dim=1)
        if not self.counts:
            self.logits.append(logits.float().cpu())
            self.labels.append(labels.cpu())
            return
        if self.hits is None or self.rows is None:
            self.hits = logits.new_zeros(len(logits), self.config.num_labels, dtype=torch.long)
            self.rows = torch.zeros_like(self.hits[0])
        right = (logits.argmax(dim=-1) == labels).long()  # (K, B)
        self.hits.scatter_add_(1, labels.expand_as(right), right)
        self.rows.index_add_(0, labels, torch.ones_like(labels))

    def scores(self) -> list[float]:
        """One per head, larger is better; NaN where a logit was not finite."""
        if self.hits is not None and self.rows is not None:
            hits, rows = self.hits.double(), self.rows.double()
            if self.metric == "accuracy":
                values = hits.sum(dim=1) / rows.sum()
            else:
                present = rows > 0
                values = (hits[:, present] / rows[present]).mean(dim=1)
            found = values.tolist()
        else:
            compute = build_compute_metrics(self.config)
            labels, logits = torch.cat(self.labels).numpy(), torch.cat(self.logits, dim=1).numpy()
            found = [self._measure(compute, one, labels) for one in logits]
        return [score if finite else math.nan for score, finite in zip(found, self.is_finite.tolist(), strict=True)]

    def _measure(self, compute: Any, logits: np.ndarray, labels: np.ndarray) -> float:
        if not np.isfinite(logits).all():
            return math.nan
        metrics = compute(EvalPrediction(predictions=logits, label_ids=labels))
        if self.metric not in metrics:
            raise LayerFusionError(f"metric {self.metric!r} is unknown: choose from {', '.join(metrics)}")
        return -metrics[self.metric] if self.metric in LOSSES else metrics[self.metric]
