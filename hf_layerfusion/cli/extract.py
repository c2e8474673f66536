"""Extract the tokens of every image once, so that heads train in seconds.

Writes one feature cache per split, such as OUTPUT_DIR/train and OUTPUT_DIR/test. Run it again to go on after a kill, or
to reuse what is there. `layerfusion train` does this by itself, and takes these caches with --features_dir OUTPUT_DIR.
"""

from __future__ import annotations

import argparse
import os

from .options import (
    add_backbone_options,
    add_cache_options,
    add_dataset_options,
    add_device_option,
    build_model,
    extract_splits,
    open_splits,
    output_folder,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_backbone_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--output_dir", required=True, help="folder of the caches")
    add_cache_options(parser)
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    folder = output_folder("--output_dir", arguments.output_dir)
    splits, image_column, label_column = open_splits(arguments)
    model = build_model(arguments, splits["train"], label_column)
    for split, features in extract_splits(arguments, model, splits, folder, image_column, label_column).items():
        if int(os.environ.get("RANK", 0)):
            continue  # one process speaks for all
        size = sum(shard.num_bytes for shard in features.manifest.shards)
        skipped = f", {len(features.manifest.skipped)} skipped" if features.manifest.skipped else ""
        print(f"{split}: {len(features)} images{skipped}, {len(features.bank)} tokens each, {size / 1e6:.1f} MB")
