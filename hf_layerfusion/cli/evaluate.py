"""Evaluate a saved head on labelled images.

Runs backbone and head on the images of one split and prints the metrics as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile

from datasets import ClassLabel
from transformers import Trainer, TrainingArguments

from ..errors import LayerFusionError
from ..images import check_images
from ..training import ImageCollator, build_compute_metrics
from .options import (
    add_dataset_options,
    add_device_option,
    add_model_options,
    measure,
    open_model,
    open_split,
    output_file,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--output", help="write the JSON to this file instead of standard output")
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    with output_file(arguments.output) as out:
        out.write(json.dumps(_evaluate(arguments), indent=1) + "\n")


def _evaluate(arguments: argparse.Namespace) -> dict[str, float | str]:
    rows, image_column, label_column = open_split(arguments)
    model = open_model(arguments)
    feature = rows.features[label_column]
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if isinstance(feature, ClassLabel) and list(feature.names) != names:
        raise LayerFusionError(
            f"the dataset has {feature.num_classes} classes ({_some(feature.names)}), but the head has {len(names)} "
            f"({_some(names)}): evaluate on images of the head's own classes"
        )
    check_images(rows[image_column])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_eval_batch_size=arguments.batch_size,
                dataloader_num_workers=arguments.num_workers,
                remove_unused_columns=False,
                use_cpu=arguments.device == "cpu",
                report_to="none",
            ),
            eval_dataset=rows,
            data_collator=ImageCollator(model.image_processor, image_column, label_column, model.config.num_labels),
            compute_metrics=build_compute_metrics(model.config),
        )
        metrics = measure(trainer)
    return {"split": arguments.split, "images": len(rows), **metrics}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
