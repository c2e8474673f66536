"""The losses of the three problem types, and squared loss for classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_layer_fusion import LayerFusionConfig
from .errors import LayerFusionError

# Logits of heads that learn classes as 0 and 1 under squared loss, so that a softmax over them says something.
LOGIT_SCALE = 10.0


def problem_type_of(config: LayerFusionConfig, labels: Tensor) -> str:
    """The config's problem type, or, as transformers' sequence classifiers do, what the labels suggest."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(config: LayerFusionConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy or `squared_losses` (with class weights), binary cross-entropy or mean squared error.

    In float32 at least.

    Args:
        config: says the problem type, the loss, the number of labels and the class weights.
        logits: `(B, C)`.
        labels: class indices `(B,)`; floats `(B, C)` for multi-label; floats `(B,)` or `(B, C)` for regression.

    Raises:
        LayerFusionError: for labels out of range or of another shape, or squared loss where labels are no classes.
    """
    labels = labels.to(logits.device)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    problem_type = problem_type_of(config, labels)
    if problem_type == "single_label_classification":
        check_labels(labels, config.num_labels)
        weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
        if config.loss == "squared":
            rows = labels != -100
            of_rows = rows.to(logits.dtype) if weights is None else rows * weights[labels.clamp_min(0)]
            return (squared_losses(logits, labels) * of_rows).sum() / of_rows.sum()
        return F.cross_entropy(logits, labels, weights)
    if config.loss == "squared":
        raise LayerFusionError(
            f"loss='squared' is for single-label classification, and these labels say {problem_type}"
        )
    if labels.numel() != logits.numel() or (labels.ndim > 1 and labels.shape != logits.shape):
        raise LayerFusionError(f"labels of shape {tuple(labels.shape)} do not fit logits of {tuple(logits.shape)}")
    targets = labels.to(logits.dtype).view_as(logits)
    if problem_type == "regression":
        return F.mse_loss(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets)


def scaled_logits(outputs: Tensor, loss: str) -> Tensor:
    """The logits that a head's outputs stand for: under squared loss it learns 0 and 1, and a softmax needs more.

    The head itself is left to learn on the scale of 0 and 1: AdamW's steps have a size of their own, and outputs on the
    scale of the logits would take ten times as many of them.
    """
    return outputs * LOGIT_SCALE if loss == "squared" else outputs


def squared_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """sum_c (logit_c / LOGIT_SCALE - y_c)^2 of each row, y being 1 for the row's class and 0 for the others.

    For classification on a par with cross-entropy or better where it has been compared (Hui and Belkin, arXiv 2006.07322).

    Args:
        logits: `(..., C)`.
        labels: class indices, of a shape that fits `(...)`; rows of the label -100 have none for their class.

    Returns:
        `(...)`.
    """
    targets = F.one_hot(labels.clamp_min(0), logits.shape[-1]) * (labels != -100)[..., None]
    return (logits / LOGIT_SCALE - targets).square().sum(dim=-1)


def stacked_loss(
    problem_type: str,
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    loss: str = "cross_entropy",
) -> Tensor:
    """`classification_loss` of K heads over one batch.

    Args:
        problem_type: of all heads.
        logits: `(K, B, C)`.
        labels: as for `classification_loss`; none of them is -100.
        class_weights: `(K, C)`, for single-label problems.
        loss: of all heads, as the config names it.

    Returns:
        `(K,)`.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if problem_type == "single_label_classification":
        if loss == "squared":
            losses = squared_losses(logits, labels)
        else:
            losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
            losses = losses.view(logits.shape[:2])  # (K, B)
        if class_weights is None:
            return losses.mean(dim=1)
        weights = class_weights[:, labels]  # (K, B)
        return (losses * weights).sum(dim=1) / weights.sum(dim=1)
    targets = labels.to(logits.dtype).view(logits.shape[1:]).expand_as(logits)
    loss_of = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return loss_of(logits, targets, reduction="none").mean(dim=(1, 2))


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
