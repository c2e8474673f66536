"""Show which layers a head attends to.

Writes layer_attention.png (a heatmap of heads x tokens, mean and spread over images) and layer_attention.json.
"""

from __future__ import annotations

import argparse

from .options import (
    add_dataset_options,
    add_device_option,
    add_model_options,
    add_seed_option,
    image_batches,
    open_model,
    open_split,
    output_folder,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--max_images", type=int, default=512, help="images to look at (default: 512)")
    parser.add_argument("--output_dir", required=True, help="folder of the two files")
    add_seed_option(parser)
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from datasets import Image
    from tqdm.auto import tqdm

    from ..analysis import summarise_attentions
    from ..analysis.plots import plot_attention
    from ..training import ImageCollator

    rows, image_column, label_column = open_split(arguments)
    if len(rows) > arguments.max_images:
        rows = rows.shuffle(seed=arguments.seed).select(range(arguments.max_images))
    model = open_model(arguments)
    collator = ImageCollator(model.image_processor, image_column, label_column)
    images = rows.cast_column(image_column, Image(decode=False))
    batches = image_batches(model, images, arguments, collator)
    summary = summarise_attentions(model, tqdm(batches, desc="explaining", unit="batch", delay=2))
    folder = output_folder(arguments.output_dir)
    plot_attention(summary, folder / "layer_attention.png", f"Layer attention, {model.config.recipe}")
    summary.save_json(folder / "layer_attention.json")
    heaviest = summary.token_weights.argsort(descending=True)[:3].tolist()
    shown = ", ".join(f"{summary.token_names[i]} ({summary.token_weights[i]:.3f})" for i in heaviest)
    print(f"heaviest of {len(summary.token_names)} tokens (uniform: {1 / len(summary.token_names):.3f}): {shown}")
    print(f"wrote {folder / 'layer_attention.png'} and {folder / 'layer_attention.json'}")
