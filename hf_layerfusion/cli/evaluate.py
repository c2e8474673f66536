"""Evaluate a saved head on labelled images.

Runs backbone and head on the images of one split and prints the metrics as JSON, with 95 % confidence intervals of a
bootstrap over images. With --output_dir also what a model card shows: a row for each class, the confusion matrix and
the layer attention, as evaluation.json and as figures (which need matplotlib).
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel
from tqdm.auto import tqdm

from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..hub.cards import write_figures
from ..hub.record import software_versions, write_record
from ..images import check_images
from ..losses import classification_loss
from ..training import ImageCollator
from ..training.evaluation import HeadOutputs, collect_outputs, measure_outputs
from .options import (
    add_dataset_options,
    add_device_option,
    add_model_options,
    image_batches,
    open_model,
    open_split,
    output_file,
    output_folder,
)
from .sweep import dataset_name

RECORD_NAME = "evaluation.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--output", help="write the JSON to this file instead of standard output")
    parser.add_argument("--output_dir", help=f"also write {RECORD_NAME} and figures to this folder")
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    folder = output_folder("--output_dir", arguments.output_dir) if arguments.output_dir else None
    with output_file(arguments.output) as out:
        config, loss, measured = _evaluate(arguments)
        if folder is not None:
            _write(arguments, folder, config, measured)
        shown = {
            "split": arguments.split,
            "images": measured["test_images"],
            "loss": loss,
            **measured["metrics"],
            "confidence_intervals": measured.get("confidence_intervals", {}),
        }
        out.write(json.dumps(shown, indent=1) + "\n")


def _evaluate(arguments: argparse.Namespace) -> tuple[LayerFusionConfig, float, dict[str, Any]]:
    """The head's config, its loss, and what `measure_outputs` gives."""
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
    collator = ImageCollator(model.image_processor, image_column, label_column, model.config.num_labels)
    batches = image_batches(rows, arguments, collator)
    outputs = collect_outputs(model, tqdm(batches, desc="evaluating", unit="batch", delay=2))
    return model.config, _loss(model.config, outputs), measure_outputs(model.config, outputs)


def _loss(config: LayerFusionConfig, outputs: HeadOutputs) -> float:
    """Without class weights, which say what to learn from and not how well it was learned."""
    config = copy.copy(config)
    config.class_weights = None
    loss = classification_loss(config, torch.from_numpy(outputs.logits), torch.from_numpy(outputs.labels))
    return float(loss)


def _write(arguments: argparse.Namespace, folder: Path, config: LayerFusionConfig, measured: dict[str, Any]) -> None:
    record = {
        "dataset": dataset_name(arguments),
        "split": arguments.split,
        **measured,
        "environment": software_versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(folder, config, record)
    write_record(folder / RECORD_NAME, record)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
