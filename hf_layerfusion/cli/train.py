"""Train a head on labelled images and a frozen backbone, and evaluate it on the test split.

Extracts features once into OUTPUT_DIR/features, trains with transformers' Trainer, and writes the head, its card with
confidence intervals, a row for each class and figures (which need matplotlib), and metrics.json to OUTPUT_DIR. Without a
test split, a fifth of the training images is held out.

With --sweep, learning rate, weight decay and the rest are chosen first, on a part of the training images, and the head
is trained with them on all of those (see `layerfusion sweep --help`, which also shows a grid file):

  layerfusion train --backbone facebook/dinov2-small --dataset path/to/images --output_dir my-head --sweep paper

The sweep's own files go to OUTPUT_DIR/sweep. After a kill, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, set_seed

from ..data import open_dataset, prepare_splits, training_groups
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..hub.push import hub_id
from ..hub.record import software_versions
from ..images import processed_size
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from ..recipes import find_recipe
from ..sweeps import Setting
from ..training import build_trainer
from ..training.evaluation import evaluate_head
from ..training.run import MAX_GRADIENT_NORM, MIN_LEARNING_RATE
from .options import (
    OptionsError,
    add_backbone_options,
    add_cache_options,
    add_dataset_options,
    add_device_option,
    add_training_options,
    build_model,
    extract_splits,
    given_options,
    is_main_process,
    measure,
    number,
    output_folder,
    training_options,
)
from .sweep import (
    SEARCH_OPTIONS,
    SEARCH_TITLE,
    Found,
    add_search_options,
    affordable,
    chosen_head,
    chosen_values,
    dataset_name,
    describe,
    grid_settings,
    hyperparameters,
    search,
    union_bank,
)

# Options that a sweep takes out of one's hands, and what to use in their place.
_CHOSEN_BY_SWEEP = {
    "learning_rate": "a grid file with learning_rate",
    "weight_decay": "a grid file with weight_decay",
    "attention_dropout": "a grid file with attention_dropout",
    "noise_std": "a grid file with noise_std",
    "no_class_weights": "a grid file with balance_classes: false",
    "seed": "--seeds",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_backbone_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--output_dir", required=True, help="folder of the trained head")
    parser.add_argument("--features_dir", help="folder of the feature caches (default: OUTPUT_DIR/features)")
    add_cache_options(parser)
    group = parser.add_argument_group("training (defaults: the recipe's, with the paper's protocol)")
    group.add_argument("--learning_rate", type=number(float, above=0))
    group.add_argument("--weight_decay", type=number(float, at_least=0))
    group.add_argument(
        "--num_train_epochs", type=number(float, above=0), help="default: 40, or as many as make 1000 steps"
    )
    group.add_argument(
        "--train_batch_size",
        type=number(int, at_least=1),
        help="default: up to 2048, and at least five batches an epoch",
    )
    group.add_argument("--attention_dropout", type=float, help="on the weights of the layers")
    group.add_argument("--noise_std", type=float, help="on the tokens; the paper trains with 0.05")
    group.add_argument("--no_class_weights", action="store_true", help="do not balance the classes in the loss")
    group.add_argument("--seed", type=int, help="of first weights, order, dropout and noise (default: 0)")
    add_training_options(parser)
    group = parser.add_argument_group(SEARCH_TITLE)
    group.add_argument(
        "--sweep",
        metavar="GRID",
        help="choose the settings first: paper (63 of an attentive recipe), fast (12), or a YAML or JSON file; --recipe "
        "may then name several, such as alf,linear-all",
    )
    add_search_options(group)
    group = parser.add_argument_group("model card")
    group.add_argument(
        "--note",
        action="append",
        metavar="SENTENCE",
        help="what else a reader of the card should know of the images or the backbone, among its limits; may be repeated",
    )
    group.add_argument("--license", help="of the head, as the Hub names it, such as apache-2.0")
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    folder = output_folder("--output_dir", arguments.output_dir)
    caches = output_folder("--features_dir", arguments.features_dir or str(folder / "features"))
    opened = open_dataset(arguments.dataset, name=arguments.dataset_name)
    groups = training_groups(opened, arguments.group_column) if arguments.group_column else None
    splits, image_column, label_column = prepare_splits(opened, arguments.image_column, arguments.label_column)
    overrides = {
        option: value
        for option in ("attention_dropout", "noise_std")
        if (value := getattr(arguments, option)) is not None
    }
    set_seed(arguments.seed or 0)
    recipe = settings[0].recipe if settings else arguments.recipe
    if find_recipe(recipe).kind == "fine_tune":
        raise LayerFusionError(
            f"recipe {recipe!r} trains the backbone, which cached features cannot: use fine_tune of "
            "hf_layerfusion.training, or layerfusion study"
        )
    model = build_model(arguments, splits["train"], label_column, recipe=recipe, **overrides)
    settings = affordable(arguments, model, settings) if settings else settings
    bank = union_bank(arguments, model, settings) if settings else None
    wanted = {split: splits[split] for split in ("train", "test")}
    features = extract_splits(arguments, model, wanted, caches, image_column, label_column, bank)
    trained = (
        _choose_and_train(arguments, model, features, folder / "sweep", settings, groups)
        if settings
        else _train(arguments, model, features)
    )
    if is_main_process():
        _save(arguments, trained, features, folder, "test" if "test" in opened else "train, a fifth held out")


def _settings(arguments: argparse.Namespace) -> list[Setting]:
    """The settings to choose from; none without `--sweep`, unless the recipe cannot be trained otherwise."""
    recipes = [find_recipe(name.strip()) for name in arguments.recipe.split(",")]
    needs_sweep = any(
        recipe.candidates or recipe.solver == "ridge" or recipe.head_options.get("num_members", 1) > 1
        for recipe in recipes
    )
    if needs_sweep and not arguments.sweep:
        arguments.sweep = "fast"
    if not arguments.sweep:
        if given := given_options(arguments, (*SEARCH_OPTIONS, "group_column", "overwrite_sweep")):
            shown = {"max_memory": "max_memory_gb"}.get(given[0], given[0])
            raise OptionsError(f"--{shown} is an option of a sweep: add --sweep paper, fast or FILE.yaml")
        return []
    if given := given_options(arguments, _CHOSEN_BY_SWEEP):
        raise OptionsError(
            f"--{given[0]} contradicts --sweep, which chooses it: leave it out, or use {_CHOSEN_BY_SWEEP[given[0]]}"
        )
    if arguments.num_train_epochs is not None and not float(arguments.num_train_epochs).is_integer():
        raise OptionsError(f"--num_train_epochs {arguments.num_train_epochs}: a sweep trains whole epochs")
    if arguments.width_alignment == "project":
        raise OptionsError("--width_alignment project gives every head tokens of its own, which a sweep cannot share")
    return grid_settings(arguments, arguments.sweep)


@dataclass
class _Trained:
    """A head, its test metrics, and what its card and metrics.json say of the training.

    `seconds` is `None` where a finished sweep was found.
    """

    model: ViTForAttentiveLayerFusionClassification
    metrics: dict[str, float]
    seconds: float | None
    hyperparameters: dict[str, Any]
    found: Found | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def _train(
    arguments: argparse.Namespace,
    model: ViTForAttentiveLayerFusionClassification,
    features: Mapping[str, LayerFeatures],
) -> _Trained:
    """One head, with the settings that were given."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(
            model,
            features["train"],
            scratch,
            eval_features=features["test"],
            learning_rate=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            num_train_epochs=arguments.num_train_epochs,
            batch_size=arguments.train_batch_size,
            seed=arguments.seed or 0,
            balance_classes=not arguments.no_class_weights,
            use_cpu=arguments.device == "cpu",
        )
        trainer.train()
        seconds = time.perf_counter() - start
        metrics = measure(trainer)
    values = {
        "learning rate": trainer.args.learning_rate,
        "weight decay": trainer.args.weight_decay,
        "epochs": trainer.args.num_train_epochs,
        "batch size": trainer.args.per_device_train_batch_size,
        "training images": len(features["train"]),
        "attention dropout": model.config.attention_dropout,
        "noise std": model.config.noise_std,
        **{name.replace("_", " "): value for name, value in training_options(arguments).items()},
        "balance classes": not arguments.no_class_weights,
        "seed": arguments.seed or 0,
        "chosen from": "no search: the recipe's defaults, and what was given",
    }
    return _Trained(model, metrics, seconds, values)


def _choose_and_train(
    arguments: argparse.Namespace,
    model: ViTForAttentiveLayerFusionClassification,
    features: Mapping[str, LayerFeatures],
    folder: Path,
    settings: list[Setting],
    groups: np.ndarray | None,
) -> _Trained:
    """The head of a sweep over the training rows; the test rows are read once, at the end."""
    epochs = arguments.num_train_epochs
    found = search(
        arguments,
        features["train"],
        folder,
        settings,
        model,
        groups=groups,
        num_epochs=None if epochs is None else int(epochs),
    )
    result = found.result
    head = chosen_head(arguments, model, result)
    with tempfile.TemporaryDirectory() as scratch:
        trainer: Trainer = build_trainer(
            head,
            features["train"],
            scratch,
            eval_features=features["test"],
            balance_classes=result.best.balance_classes,
            use_cpu=arguments.device == "cpu",
        )
        metrics = measure(trainer)
    extra = {
        "setting": chosen_values(result),
        "validation": {
            "metric": result.metric,
            "mean": result.best_score,
            "std": None if math.isnan(result.best_score_std) else result.best_score_std,
            **result.protocol["validation"],
        },
        "settings": result.protocol["settings"],
        "strategy": result.protocol["strategy"],
        "seed": next(iter(result.heads)),
    }
    return _Trained(head, metrics, found.seconds, hyperparameters(result), found, {"sweep": extra})


def _save(
    arguments: argparse.Namespace, trained: _Trained, features: Mapping[str, LayerFeatures], folder: Path, split: str
) -> None:
    metrics = trained.metrics
    measured = evaluate_head(trained.model, features["test"])
    trained.model.training_summary = {
        "dataset": dataset_name(arguments),
        **_hub_dataset(arguments),
        "split": split,
        "train_images": len(features["train"]),
        **measured,
        "hyperparameters": {**trained.hyperparameters, **_protocol(trained.model)},
        "environment": software_versions(),
        **({} if trained.seconds is None else {"seconds": round(trained.seconds, 2)}),
        **({"license": arguments.license} if arguments.license else {}),
        **({"notes": arguments.note} if arguments.note else {}),
    }
    trained.model.save_pretrained(folder)
    report: dict[str, Any] = {**metrics, "test_images": len(features["test"]), **trained.extra}
    took = ""
    if trained.seconds is not None:
        report["train_seconds"] = round(trained.seconds, 2)
        took = f" (trained in {trained.seconds:.1f} s)"
    (folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if trained.found is not None:
        print(describe(trained.found))
    intervals = measured.get("confidence_intervals", {})
    shown = ", ".join(
        f"{name} {value:.4f}"
        + (f" ({intervals[name][0]:.4f} to {intervals[name][1]:.4f})" if name in intervals else "")
        for name, value in metrics.items()
    )
    brackets = " (in brackets: 95 % intervals over test images)" if intervals else ""
    print(f"test: {shown}{brackets}\nhead saved to {folder}{took}")


def _hub_dataset(arguments: argparse.Namespace) -> dict[str, str]:
    """The dataset's id, if it came from the Hub."""
    is_local = Path(arguments.dataset).exists()
    return {} if is_local or hub_id(arguments.dataset) is None else {"dataset_id": arguments.dataset}


def _protocol(model: ViTForAttentiveLayerFusionClassification) -> dict[str, Any]:
    """What is the same for every head of these commands that is fitted as this one."""
    size = None if model.image_processor is None else processed_size(model.image_processor)
    steps = {
        "optimizer": f"AdamW, decay on all parameters, gradients clipped at a norm of {MAX_GRADIENT_NORM:g}",
        "learning rate schedule": f"cosine to {MIN_LEARNING_RATE:g}, no warm-up",
    }
    closed_form = {"solver": "least squares on standardised tokens, in closed form"}
    return {
        **(closed_form if find_recipe(model.config.recipe).solver == "ridge" else steps),
        **({} if size is None else {"image size": " x ".join(map(str, size))}),
    }
