"""Classify pictures with a saved head.

Takes files and folders, prints one JSON object a line: {"file": ..., "predictions": [{"label": ..., "score": ...}]}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .options import add_device_option, add_model_options, open_model


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files or folders of pictures")
    add_model_options(parser)
    parser.add_argument("--top_k", type=int, default=5, help="labels to name per picture (default: 5)")
    parser.add_argument("--batch_size", type=int, default=16, help="images per forward pass (default: 16)")
    parser.add_argument("--output", help="write to this file instead of standard output")
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from tqdm.auto import tqdm
    from transformers import pipeline

    from ..images import check_image, decode_image

    files = list(_files(arguments.images))
    for file in files:
        check_image(file, str(file))
    model = open_model(arguments)
    classify: Any = pipeline(
        "image-classification", model=model, image_processor=model.image_processor, device=model.device
    )
    pictures = (decode_image(file, str(file)) for file in files)
    results = classify(pictures, batch_size=arguments.batch_size, top_k=arguments.top_k)
    with open(arguments.output, "w") if arguments.output else nullcontext(sys.stdout) as out:
        for file, predictions in zip(files, tqdm(results, total=len(files), unit="image", delay=2), strict=True):
            out.write(json.dumps({"file": str(file), "predictions": predictions}, ensure_ascii=False) + "\n")


def _files(paths: list[str]) -> Iterator[Path]:
    from ..errors import LayerFusionError
    from ..images import find_images

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
