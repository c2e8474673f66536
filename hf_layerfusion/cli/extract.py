"""Extract the tokens of every image once, so that heads train in seconds.

Writes one feature cache per split, OUTPUT_DIR/train and OUTPUT_DIR/test. Run it again to go on after a kill, or to
reuse what is there. `layerfusion train` does this by itself.
"""

from __future__ import annotations

import argparse

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
    parser.add_argument("--output_dir", required=True, help="folder of the caches")
    parser.add_argument("--feature_dtype", default="float16", help="float16 or float32 (default: float16)")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that was made from something else")
    add_seed_option(parser)
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from ..features import extract_features

    splits, image_column, label_column = open_splits(arguments)
    model = build_model(arguments, splits["train"], label_column)
    folder = output_folder(arguments.output_dir)
    for split, rows in splits.items():
        features = extract_features(
            model,
            rows,
            folder / split,
            image_column=image_column,
            label_column=label_column,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            dtype=arguments.feature_dtype,
            overwrite=arguments.overwrite,
        )
        size = sum(shard.num_bytes for shard in features.manifest.shards)
        print(f"{split}: {len(features)} images, {len(features.bank)} tokens each, {size / 1e6:.1f} MB")
