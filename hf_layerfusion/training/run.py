"""Train one head on cached features with `transformers.Trainer`, with the protocol of arXiv 2601.09322."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..configuration_layer_fusion import ATTENDING_HEADS
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..heads import TokenStandardizer
from ..losses import problem_type_of
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from ..recipes import find_recipe
from .class_weights import class_weights
from .collators import LayerFeatureCollator
from .metrics import build_compute_metrics
from .optimization import adamw
from .trainer import LayerFusionTrainer

# Protocol of the reference (its appendix and `scripts/`): at least 40 epochs and 1000 steps, batches of up to 2048 rows
# but at least five an epoch, cosine to 1e-6 without warm-up, gradient norm clipped at 5.
MIN_EPOCHS = 40
MIN_STEPS = 1000
MAX_BATCH_SIZE = 2048
MIN_BATCHES = 5
MIN_LEARNING_RATE = 1e-6
MAX_GRADIENT_NORM = 5.0


def default_batch_size(num_rows: int) -> int:
    """Rows per batch."""
    return max(2, min(MAX_BATCH_SIZE, num_rows // MIN_BATCHES))


def default_epochs(num_rows: int, batch_size: int) -> int:
    """Epochs that make enough steps."""
    return max(MIN_EPOCHS, math.ceil(MIN_STEPS / math.ceil(num_rows / batch_size)))


def build_trainer(
    model: ViTForAttentiveLayerFusionClassification,
    train_features: LayerFeatures,
    output_dir: str | Path,
    *,
    eval_features: LayerFeatures | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    num_train_epochs: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    balance_classes: bool = True,
    **training_arguments: Any,
) -> LayerFusionTrainer:
    """A trainer for one head on cached features, with the paper's protocol where nothing else is said.

    A head that standardises its tokens gets its statistics from `train_features`, unless it has some already.

    Args:
        model: its head is trained; it reads its own tokens out of the features' bank.
        train_features: rows to train on.
        output_dir: for checkpoints.
        eval_features: rows to evaluate on.
        learning_rate: by default the recipe's.
        weight_decay: on every parameter of the head; by default the recipe's.
        num_train_epochs: by default `default_epochs`.
        batch_size: rows per batch and process; by default `default_batch_size`.
        seed: of the order of the rows, dropout and noise.
        balance_classes: weight the classes by n / (C * count), as the reference does.
        training_arguments: for `transformers.TrainingArguments`.

    Raises:
        LayerFusionError: if the features do not hold the model's tokens, are not finite, or have other labels.
    """
    config = model.config
    train_features = train_features.select_bank(config.bank)
    if train_features.labels is None:
        raise LayerFusionError("the features have no labels: extract them with label_column=")
    is_single_label = problem_type_of(config, torch.from_numpy(train_features.labels)) == "single_label_classification"
    train_features.check(config.num_labels if is_single_label else None)
    if balance_classes and is_single_label:
        config.class_weights = class_weights(train_features.labels, config.num_labels)
    if isinstance(model.token_standardizer, TokenStandardizer) and not model.token_standardizer.is_fitted:
        model.fit_token_statistics(train_features)
    if config.head_type in ATTENDING_HEADS and config.token_normalization != "standardize":
        train_features = train_features.with_statistics()
    recipe = find_recipe(config.recipe)
    batch_size = batch_size or default_batch_size(len(train_features))
    arguments = TrainingArguments(
        **{
            "output_dir": str(output_dir),
            "learning_rate": recipe.learning_rate if learning_rate is None else learning_rate,
            "weight_decay": recipe.weight_decay if weight_decay is None else weight_decay,
            "num_train_epochs": num_train_epochs or default_epochs(len(train_features), batch_size),
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 1024,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": MIN_LEARNING_RATE},
            "max_grad_norm": MAX_GRADIENT_NORM,
            "seed": seed,
            "save_strategy": "no",
            "report_to": "none",
            # Removing columns would take a gathered batch apart into rows.
            "remove_unused_columns": False,
            **training_arguments,
        }
    )
    return LayerFusionTrainer(
        model=model,
        args=arguments,
        train_dataset=train_features,
        eval_dataset=None if eval_features is None else eval_features.select_bank(config.bank),
        data_collator=LayerFeatureCollator(len(config.bank), config.num_labels),
        compute_metrics=build_compute_metrics(config),
        optimizer_cls_and_kwargs=adamw(model, arguments),
    )
