"""Evaluate a saved head on labelled images.

Runs backbone and head on the images of one split and prints the metrics as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .options import add_dataset_options, add_device_option, add_model_options, add_seed_option, open_model, open_split


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--output", help="also write the JSON to this file")
    add_seed_option(parser)
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    import tempfile

    from datasets import ClassLabel, Image
    from transformers import Trainer, TrainingArguments

    from ..errors import LayerFusionError
    from ..training import ImageCollator, build_compute_metrics

    rows, image_column, label_column = open_split(arguments)
    model = open_model(arguments)
    feature = rows.features[label_column]
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if isinstance(feature, ClassLabel) and list(feature.names) != names:
        raise LayerFusionError(
            f"the dataset's classes {feature.names[:5]} are not the head's {names[:5]}: labels would not mean the same"
        )
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
            data_collator=ImageCollator(model.image_processor, image_column, label_column, model.config.num_labels),
            compute_metrics=build_compute_metrics(model.config),
        )
        measured = trainer.evaluate(rows.cast_column(image_column, Image(decode=False)))
    metrics = {
        name.removeprefix("eval_"): value
        for name, value in measured.items()
        if not name.endswith(("runtime", "per_second"))
    }
    text = json.dumps({"split": arguments.split, "images": len(rows), **metrics}, indent=1)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    print(text)
