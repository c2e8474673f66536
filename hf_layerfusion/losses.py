"""The losses of the three problem types."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_layer_fusion import LayerFusionConfig
from .errors import LayerFusionError


def problem_type_of(config: LayerFusionConfig, labels: Tensor) -> str:
    """The config's problem type, or, as transformers' sequence classifiers do, what the labels suggest."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(config: LayerFusionConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (with class weights), binary cross-entropy or mean squared error, in float32 at least.

    Args:
        config: says the problem type, the number of labels and the class weights.
        logits: `(B, C)`.
        labels: class indices `(B,)`; floats `(B, C)` for multi-label; floats `(B,)` or `(B, C)` for regression.

    Raises:
        LayerFusionError: for labels out of range or of another shape.
    """
    labels = labels.to(logits.device)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    problem_type = problem_type_of(config, labels)
    if problem_type == "single_label_classification":
        check_labels(labels, config.num_labels)
        weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
        return F.cross_entropy(logits, labels, weights)
    if labels.numel() != logits.numel() or (labels.ndim > 1 and labels.shape != logits.shape):
        raise LayerFusionError(f"labels of shape {tuple(labels.shape)} do not fit logits of {tuple(logits.shape)}")
    targets = labels.to(logits.dtype).view_as(logits)
    if problem_type == "regression":
        return F.mse_loss(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets)


def check_labels(labels: Tensor, num_labels: int) -> None:
    """Refuse class indices outside 0 to C - 1 (-100 is ignored by the loss).

    Only on CPU: reading them back from a GPU in every step would stall it, and collators check before.

    Raises:
        LayerFusionError: naming the first label that is out of range.
    """
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    bad = labels[(labels >= num_labels) | ((labels < 0) & (labels != -100))]
    if bad.numel():
        raise LayerFusionError(
            f"label {int(bad.flatten()[0])} is out of range: this head has {num_labels} labels, 0 to {num_labels - 1}"
        )
