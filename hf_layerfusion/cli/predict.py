"""Classify pictures with a saved head.

Takes files and folders, prints one JSON object a line: {"file": ..., "predictions": [{"label": ..., "score": ...}]}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import pipeline

from ..errors import LayerFusionError
from ..images import check_image, decode_image, find_images
from .options import add_batch_option, add_device_option, add_model_options, number, open_model, output_file


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files or folders of pictures")
    add_model_options(parser)
    parser.add_argument(
        "--top_k", type=number(int, at_least=1), default=5, help="labels to name per picture (default: 5)"
    )
    add_batch_option(parser)
    parser.add_argument("--output", help="write to this file instead of standard output")
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    with output_file(arguments.output) as out:
        for line in _predict(arguments):
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def _predict(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    files = list(_files(arguments.images))
    for file in tqdm(files, desc="checking images", unit="image", delay=2):
        check_image(file, str(file))
    model = open_model(arguments)
    classify: Any = pipeline(
        "image-classification", model=model, image_processor=model.image_processor, device=model.device
    )
    pictures = (decode_image(file, str(file)) for file in files)
    results = classify(pictures, batch_size=arguments.batch_size, top_k=arguments.top_k)
    progress = tqdm(results, total=len(files), desc="classifying", unit="image", delay=2)
    for file, predictions in zip(files, progress, strict=True):
        yield {"file": str(file), "predictions": predictions}


def _files(paths: list[str]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            found = find_images(path)
            if not found:
                raise LayerFusionError(f"folder {path} holds no pictures")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise LayerFusionError(f"no such file or folder: {path}")
