"""Options that several commands share, and what they open."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from datasets import Dataset, DatasetDict, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import set_seed

from ..bank import MODULES, POOLS
from ..data import (
    encode_labels,
    find_image_column,
    find_label_column,
    label_options,
    open_dataset,
    resize_processor,
    with_test_split,
)
from ..errors import LayerFusionError
from ..images import check_image
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from ..recipes import RECIPES
from ..training.collators import ImageCollator

DTYPES = ("float32", "bfloat16", "float16")
# What `Trainer.evaluate` reports beside the metrics.
_TIMINGS = ("runtime", "per_second", "preparation_time")


def number(kind: type[int] | type[float], at_least: float | None = None, above: float | None = None) -> Callable:
    """An argparse type: a finite number with a lower bound."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (at_least is not None and value < at_least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {at_least} up")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above {above}")
        return value

    return parse


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--dataset",
        required=True,
        help="Hub id, folder of images (folder/class/picture.png, or train/ and test/ above), or saved dataset; "
        "without a test split, a fifth of the training images is held out, always the same one",
    )
    group.add_argument("--dataset_name", help="configuration of a Hub dataset")
    group.add_argument("--image_column", help="default: the only image column")
    group.add_argument("--label_column", help="default: 'label', or the only column of classes")
    group.add_argument("--batch_size", type=int, default=32, help="images per forward pass (default: 32)")
    group.add_argument("--num_workers", type=int, default=0, help="processes that decode images (default: 0)")


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("backbone and tokens")
    group.add_argument("--backbone", required=True, help="Hub id or folder of a vision model")
    group.add_argument("--revision", help="branch, tag or commit of the backbone; the commit is pinned in the head")
    group.add_argument("--recipe", default="alf", metavar="NAME", help=f"one of {', '.join(RECIPES)} (default: alf)")
    group.add_argument("--layers", help="all, last, numbers such as 3,6,12 or -1,-2 (0: embeddings), a:b, or spaced:n")
    group.add_argument("--modules", help=f"comma-separated, from {', '.join(MODULES)}")
    group.add_argument("--pools", help=f"comma-separated, from {', '.join(POOLS)}")
    group.add_argument("--image_size", type=int, help="pixels, if other than the backbone's processor says")
    group.add_argument("--dtype", default="float32", help="of the backbone: float32, bfloat16 or float16")


def add_seed_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_splits(arguments: argparse.Namespace) -> tuple[DatasetDict, str, str]:
    """The dataset's splits, with a test split, and its image and label columns."""
    splits = open_dataset(arguments.dataset, name=arguments.dataset_name)
    first = next(iter(splits.values()))
    image_column = find_image_column(first, arguments.image_column)
    label_column = find_label_column(first, arguments.label_column)
    splits = with_test_split(splits, label_column, seed=getattr(arguments, "seed", 0))
    return encode_labels(splits, label_column), image_column, label_column


def open_split(arguments: argparse.Namespace) -> tuple[Dataset, str, str]:
    """One split, the one named by `--split`."""
    splits, image_column, label_column = open_splits(arguments)
    if arguments.split not in splits:
        raise LayerFusionError(f"the dataset has no split {arguments.split!r}, only {list(splits)}")
    return splits[arguments.split], image_column, label_column


def build_model(
    arguments: argparse.Namespace, labels: Dataset, label_column: str, **overrides: Any
) -> ViTForAttentiveLayerFusionClassification:
    """A new head for the dataset's labels on the backbone that was asked for."""
    if not hasattr(torch, arguments.dtype):
        raise LayerFusionError(f"dtype {arguments.dtype!r} is unknown: use float32, bfloat16 or float16")
    set_seed(arguments.seed)
    for option in ("modules", "pools"):
        if value := getattr(arguments, option):
            overrides[option] = [part.strip() for part in value.split(",")]
    if arguments.layers:
        overrides["layers"] = arguments.layers
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        arguments.backbone,
        recipe=arguments.recipe,
        revision=arguments.revision,
        dtype=getattr(torch, arguments.dtype),
        **label_options(labels, label_column),
        **overrides,
    )
    if arguments.image_size:
        if model.image_processor is None:
            raise LayerFusionError(f"{arguments.backbone} has no image processor whose image_size could be set")
        model.image_processor = resize_processor(model.image_processor, arguments.image_size)
    return model.to(arguments.device)


def open_model(arguments: argparse.Namespace) -> ViTForAttentiveLayerFusionClassification:
    """The saved head that was asked for, with its backbone."""
    try:
        model = ViTForAttentiveLayerFusionClassification.from_pretrained(
            arguments.model, **({"backbone": arguments.backbone} if arguments.backbone else {})
        )
    except OSError as error:
        raise LayerFusionError(f"no head can be loaded from {arguments.model!r}: {error}") from error
    if model.image_processor is None:
        raise LayerFusionError(
            f"{arguments.model} holds no preprocessor_config.json: save the head with its processor"
        )
    return model.to(arguments.device)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("head")
    group.add_argument("--model", required=True, help="Hub id or folder of a head")
    group.add_argument("--backbone", help="use this backbone instead of the pinned one (its weights are compared)")


def image_batches(
    model: ViTForAttentiveLayerFusionClassification,
    images: Any,
    arguments: argparse.Namespace,
    collator: ImageCollator,
) -> DataLoader:
    """Batches of pixel values."""
    return DataLoader(images, arguments.batch_size, num_workers=arguments.num_workers, collate_fn=collator)


def output_folder(path: str) -> Path:
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise LayerFusionError(f"--output_dir {folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
