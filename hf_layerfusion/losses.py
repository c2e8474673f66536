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


def stacked_loss(problem_type: str, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """`classification_loss` of K heads over one batch.

    Args:
        problem_type: of all heads.
        logits: `(K, B, C)`.
        labels: as for `classification_loss`; none of them is -100.
        class_weights: `(K, C)`, for single-label problems.

    Returns:
        `(K,)`.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if problem_type == "single_label_classification":
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
        losses = losses.view(logits.shape[:2])  # (K, B)
        if class_weights is None:
            return losses.mean(dim=1)
        weights = class_weights[:, labels]  # (K, B)
        return (losses * weights).sum(dim=1) / weights.sum(dim=1)
    targets = labels.to(logits.dtype).view(logits.shape[1:]).expand_as(logits)
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, targets, reduction="none").mean(dim=(1, 2))


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
