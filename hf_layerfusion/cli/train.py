"""Train a head on labelled images and a frozen backbone, and evaluate it on the test split.

Extracts features once into OUTPUT_DIR/features, trains with transformers' Trainer, and writes the head, its card and
metrics.json to OUTPUT_DIR. Without a test split, a fifth of the training images is held out.
"""

from __future__ import annotations

import argparse
import json
import time

from .options import (
    add_backbone_options,
    add_dataset_options,
    add_device_option,
    add_seed_option,
    build_model,
    open_splits,
    output_folder,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_backbone_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--output_dir", required=True, help="folder of the trained head")
    parser.add_argument("--features_dir", help="folder of the feature caches (default: OUTPUT_DIR/features)")
    parser.add_argument("--overwrite", action="store_true", help="replace feature caches made from something else")
    group = parser.add_argument_group("training (defaults: the recipe's, with the paper's protocol)")
    group.add_argument("--learning_rate", type=float)
    group.add_argument("--weight_decay", type=float)
    group.add_argument("--num_train_epochs", type=float, help="default: 40, or as many as make 1000 steps")
    group.add_argument("--train_batch_size", type=int, help="default: up to 2048, and at least five batches an epoch")
    group.add_argument("--attention_dropout", type=float, default=None)
    group.add_argument("--noise_std", type=float, default=None, help="the paper trains with 0.05")
    group.add_argument("--no_class_weights", action="store_true", help="do not balance the classes in the loss")
    add_seed_option(parser)
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from ..features import extract_features
    from ..training import build_trainer

    splits, image_column, label_column = open_splits(arguments)
    overrides = {
        option: value
        for option in ("attention_dropout", "noise_std")
        if (value := getattr(arguments, option)) is not None
    }
    model = build_model(arguments, splits["train"], label_column, **overrides)
    folder = output_folder(arguments.output_dir)
    features_folder = output_folder(arguments.features_dir or str(folder / "features"))
    features = {
        split: extract_features(
            model,
            splits[split],
            features_folder / split,
            image_column=image_column,
            label_column=label_column,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            overwrite=arguments.overwrite,
        )
        for split in ("train", "test")
    }
    start = time.perf_counter()
    trainer = build_trainer(
        model,
        features["train"],
        folder / "checkpoints",
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
    measured = trainer.evaluate()
    metrics = {
        name.removeprefix("eval_"): value
        for name, value in measured.items()
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))
    }
    model.training_summary = {
        "dataset": arguments.dataset.rstrip("/").rsplit("/", 1)[-1],
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
    (folder / "metrics.json").write_text(
        json.dumps({**metrics, "train_seconds": round(seconds, 2), "test_images": len(features["test"])}, indent=1)
    )
    shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"test: {shown}\nhead saved to {folder} (trained in {seconds:.1f} s)")
