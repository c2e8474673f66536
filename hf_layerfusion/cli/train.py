"""Train a head on labelled images and a frozen backbone, and evaluate it on the test split.

Extracts features once into OUTPUT_DIR/features, trains with transformers' Trainer, and writes the head, its card and
metrics.json to OUTPUT_DIR. Without a test split, a fifth of the training images is held out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from transformers import set_seed

from ..training import build_trainer
from .options import (
    add_backbone_options,
    add_cache_options,
    add_dataset_options,
    add_device_option,
    build_model,
    extract_splits,
    measure,
    number,
    open_splits,
    output_folder,
)


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
    group.add_argument("--seed", type=int, default=0, help="of first weights, order, dropout and noise (default: 0)")
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    folder = output_folder("--output_dir", arguments.output_dir)
    caches = output_folder("--features_dir", arguments.features_dir) if arguments.features_dir else folder / "features"
    splits, image_column, label_column = open_splits(arguments)
    overrides = {
        option: value
        for option in ("attention_dropout", "noise_std")
        if (value := getattr(arguments, option)) is not None
    }
    set_seed(arguments.seed)
    model = build_model(arguments, splits["train"], label_column, **overrides)
    wanted = {split: splits[split] for split in ("train", "test")}
    features = extract_splits(arguments, model, wanted, caches, image_column, label_column)
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
            seed=arguments.seed,
            balance_classes=not arguments.no_class_weights,
            use_cpu=arguments.device == "cpu",
        )
        trainer.train()
        seconds = time.perf_counter() - start
        metrics = measure(trainer)
    dataset = Path(arguments.dataset)
    model.training_summary = {
        "dataset": dataset.resolve().name if dataset.exists() else arguments.dataset,
        "split": "test",
        "metrics": {name: value for name, value in metrics.items() if name != "loss"},
        "hyperparameters": {
            "learning rate": trainer.args.learning_rate,
            "weight decay": trainer.args.weight_decay,
            "epochs": trainer.args.num_train_epochs,
            "batch size": trainer.args.per_device_train_batch_size,
            "training images": len(features["train"]),
            "seed": arguments.seed,
        },
    }
    model.save_pretrained(folder)
    report = {**metrics, "train_seconds": round(seconds, 2), "test_images": len(features["test"])}
    (folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"test: {shown}\nhead saved to {folder} (trained in {seconds:.1f} s)")
