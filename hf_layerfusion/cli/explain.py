"""Show which layers a head attends to.

Writes layer_attention.png (a heatmap of heads x tokens, mean and spread over images) and layer_attention.json.
"""

from __future__ import annotations

import argparse

from tqdm.auto import tqdm

from ..analysis import summarise_attentions
from ..analysis.plots import plot_attention
from ..images import check_images
from ..training import ImageCollator
from .options import (
    add_dataset_options,
    add_device_option,
    add_model_options,
    image_batches,
    number,
    open_model,
    open_split,
    output_folder,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument(
        "--max_images", type=number(int, at_least=1), default=512, help="images to look at (default: 512)"
    )
    parser.add_argument("--output_dir", required=True, help="folder of the two files")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: 0)")
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    folder = output_folder("--output_dir", arguments.output_dir)
    rows, image_column, label_column = open_split(arguments)
    if len(rows) > arguments.max_images:
        rows = rows.shuffle(seed=arguments.seed).select(range(arguments.max_images))
    model = open_model(arguments)
    check_images(rows[image_column])
    batches = image_batches(rows, arguments, ImageCollator(model.image_processor, image_column, label_column))
    summary = summarise_attentions(model, tqdm(batches, desc="explaining", unit="batch", delay=2))
    folder.mkdir(parents=True, exist_ok=True)
    plot_attention(summary, folder / "layer_attention.png", f"Layer attention, {model.config.recipe}")
    summary.save_json(folder / "layer_attention.json")
    heaviest = summary.token_weights.argsort(descending=True)[:3].tolist()
    shown = ", ".join(f"{summary.token_names[i]} ({summary.token_weights[i]:.3f})" for i in heaviest)
    print(f"heaviest of {len(summary.token_names)} tokens (uniform: {1 / len(summary.token_names):.3f}): {shown}")
    print(f"wrote {folder / 'layer_attention.png'} and {folder / 'layer_attention.json'}")
