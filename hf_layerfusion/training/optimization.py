"""The optimizer of arXiv 2601.09322, in the form that `Trainer` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification

# Weight decay of a fine-tuned backbone in the reference.
BACKBONE_WEIGHT_DECAY = 1e-6


def parameter_groups(
    model: ViTForAttentiveLayerFusionClassification,
    *,
    learning_rate: float,
    weight_decay: float,
    backbone_learning_rate: float | None = None,
    backbone_weight_decay: float = BACKBONE_WEIGHT_DECAY,
) -> list[dict[str, Any]]:
    """Parameter groups for a `torch.optim` optimizer: the head's and, if it is not frozen, the backbone's.

    Weight decay is on all parameters, norms, biases and the query too, as in the paper. `Trainer` by itself would
    leave norms and biases out.

    Args:
        model: the model to train.
        learning_rate: of the head.
        weight_decay: of the head.
        backbone_learning_rate: by default `config.backbone_lr_factor * learning_rate`.
        backbone_weight_decay: of the backbone.
    """
    head = _trainable(model.head) + _trainable(model.token_projection)
    groups = [{"params": head, "lr": learning_rate, "weight_decay": weight_decay}]
    if model.backbone is not None and not model.config.freeze_backbone:
        if backbone_learning_rate is None:
            backbone_learning_rate = model.config.backbone_lr_factor * learning_rate
        groups.append(
            {
                "params": _trainable(model.backbone),
                "lr": backbone_learning_rate,
                "weight_decay": backbone_weight_decay,
            }
        )
    return groups


def adamw(
    model: ViTForAttentiveLayerFusionClassification, args: TrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """AdamW over [`parameter_groups`], for `Trainer(optimizer_cls_and_kwargs=adamw(model, args))`.

    `Trainer` takes the groups out of the dict when it builds its optimizer, so every `Trainer` needs a fresh one.

    Args:
        model: the model to train.
        args: the trainer's; its learning rate, weight decay, betas and epsilon are used.
    """
    groups = parameter_groups(model, learning_rate=args.learning_rate, weight_decay=args.weight_decay)
    options = {
        "params": groups,
        "lr": args.learning_rate,  # the default that schedules with a `min_lr` measure against
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return torch.optim.AdamW, options


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


__all__ = ["adamw", "parameter_groups"]
