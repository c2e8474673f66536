"""Which tokens, losses, regularisers and heads are worth their cost: cross-validated on training rows alone.

    python benchmarks/variants.py --backbone FOLDER --datasets DIR/emoji,DIR/materials [--group closed_form|steps] [--names ...]

For development: no test row is read. Each variant is a recipe with some options of its head, and is swept with
`--num_folds` folds (groups of rows stay together) over the same few settings: three penalties in closed form, or two
learning rates and `--steps` steps. The table has the balanced accuracy of the best setting on the held-out folds, which is
a little too good for all, and the bytes an image takes in the cache. Tokens are extracted once into `--features_dir`.
"""

from __future__ import annotations

import argparse
import functools
import math
import operator
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk

from hf_layerfusion import LayerFusionConfig, ViTForAttentiveLayerFusionClassification, extract_features, sweep
from hf_layerfusion.data import find_image_column, find_label_column, label_options

Variant = tuple[str, dict[str, Any]]

CLOSED_FORM: dict[str, Variant] = {
    "CLS and mean, last layer": ("ridge-last", {"pools": ["cls", "mean"]}),
    "CLS": ("ridge-all", {"pools": ["cls"]}),
    "mean": ("ridge-all", {"pools": ["mean"]}),
    "CLS and mean": ("ridge-all", {}),
    "CLS and mean, not L2-normalised": ("ridge-all", {"token_normalization": "none"}),
    "CLS and mean, last half of the layers": ("ridge-all", {"layers": 6}),
    "CLS and mean, four layers": ("ridge-all", {"layers": "spaced:4"}),
    "CLS and grid:2": ("ridge-all", {"pools": ["cls", "grid:2"]}),
    "CLS, mean and grid:2": ("ridge-all", {"pools": ["cls", "mean", "grid:2"]}),
    "CLS, mean and grid:3 of four layers": ("ridge-grid:3", {}),
    "CLS, mean and grid:4 of two layers": ("ridge-all", {"pools": ["cls", "mean", "grid:4@spaced:2"]}),
    "CLS, mean and grid:4 of four layers": ("ridge-grid", {}),
    "CLS, mean and grid:4 of layers 6 to 9": ("ridge-all", {"pools": ["cls", "mean", "grid:4@6:9"]}),
    "CLS, mean and grid:4 of all layers": ("ridge-all", {"pools": ["cls", "mean", "grid:4"]}),
    "CLS, mean and grid:4, four layers alone": (
        "ridge-all",
        {"layers": "spaced:4", "pools": ["cls", "mean", "grid:4"]},
    ),
    "CLS and mean of block and LN2": ("ridge-all", {"modules": ["block", "ln2"]}),
    "CLS and mean of block, LN2 and activation": ("ridge-all", {"modules": ["block", "ln2", "activation"]}),
    "CLS and mean of activation": ("ridge-all", {"modules": ["activation"]}),
}
STEPS: dict[str, Variant] = {
    "linear": ("linear-all", {}),
    "alf": ("alf", {}),
    "alf, squared loss": ("alf", {"loss": "squared"}),
    "alf, standardised tokens": ("alf", {"token_normalization": "standardize"}),
    "alf, layer dropout 0.3": ("alf", {"layer_dropout": 0.3}),
    "alf, mixup 0.2": ("alf", {"mixup_alpha": 0.2}),
    "alf, 4 queries": ("alf", {"num_queries": 4}),
    "alf, 8 heads": ("alf-heads:8", {}),
    # With a head for each of 72 tokens of width 1,536, 300 steps would take more than half an hour on a core.
    "alf, 8 heads, block, LN2 and activation": ("alf-heads:8", {"modules": ["block", "ln2", "activation"]}),
    "alf, 4 queries, averaged": ("alf", {"num_queries": 4, "query_fusion": "mean"}),
    "alf, embeddings of layer and pool": ("alf", {"token_embeddings": True}),
    "alf-grid": ("alf-grid", {}),
    "alf-grid, embeddings of layer and cell": ("alf-grid", {"token_embeddings": True}),
    "alf-two-stage": ("alf-two-stage", {}),
    "alf-two-stage, one query for all layers": ("alf-two-stage", {"stage_queries": "shared"}),
    "alf-grid, squared loss": ("alf-grid", {"loss": "squared"}),
    "alf-grid, squared loss, standardised tokens": (
        "alf-grid",
        {"loss": "squared", "token_normalization": "standardize"},
    ),
    "ep": ("ep", {}),
    "ep-all": ("ep-all", {}),
    "ep-grid": ("ep-grid", {}),
    "ep-grid, embeddings of layer and cell": ("ep-grid", {"token_embeddings": True}),
    "aat-quarterly": ("aat-quarterly", {}),
    "aat-quarterly, embeddings of layer and patch": ("aat-quarterly", {"token_embeddings": True}),
}
GROUPS = {"closed_form": CLOSED_FORM, "steps": STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--datasets", required=True, help="saved datasets, with commas between them")
    parser.add_argument("--group", choices=GROUPS, default="closed_form")
    parser.add_argument("--names", help="of variants, with semicolons between them (default: all of the group)")
    parser.add_argument("--features_dir", type=Path, default=Path("variants"))
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--max_rows", type=int, default=1000)
    parser.add_argument("--num_folds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    variants = GROUPS[arguments.group]
    if arguments.names:
        variants = {name: variants[name] for name in arguments.names.split(";")}
    scores: dict[str, list[float]] = {name: [] for name in variants}
    sizes: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    sets = [Path(folder) for folder in arguments.datasets.split(",")]
    for folder in sets:
        rows = load_from_disk(str(folder))["train"]
        if len(rows) > arguments.max_rows:
            rows = rows.select(
                np.sort(np.random.default_rng(0).choice(len(rows), arguments.max_rows, replace=False)).tolist()
            )
        image_column, label_column = find_image_column(rows, None), find_label_column(rows, None)
        model = ViTForAttentiveLayerFusionClassification.from_backbone(
            arguments.backbone, image_size=arguments.image_size, **label_options(rows, label_column)
        )
        layout = model.config.token_layout
        configs = {
            name: LayerFusionConfig(token_layout=layout, image_size=model.config.image_size, recipe=recipe, **options)
            for name, (recipe, options) in variants.items()
        }
        features = extract_features(
            model,
            rows,
            arguments.features_dir / f"{folder.name}-{arguments.group}",
            image_column=image_column,
            label_column=label_column,
            bank=functools.reduce(operator.or_, (config.bank for config in configs.values())),
        )
        groups = rows["group"][:] if "group" in rows.column_names else None
        steps_an_epoch = math.ceil(len(rows) / max(2, len(rows) // 5))
        for name, (recipe, options) in variants.items():
            start = time.perf_counter()
            result = sweep(
                features,
                recipe=recipe,
                grid={"learning_rate": [1e-2, 1e-3], "weight_decay": 1e-2} if arguments.group == "steps" else {},
                num_folds=arguments.num_folds,
                groups=groups,
                num_epochs=max(1, arguments.steps // steps_an_epoch),
                refit=False,
                progress=False,
                **options,
            )
            seconds[name].append(time.perf_counter() - start)
            scores[name].append(100 * result.best_score)
            sizes[name] = 2 * sum(configs[name].bank.widths(configs[name].layout))
            print(f"{folder.name}: {name}: {scores[name][-1]:.1f} ({seconds[name][-1]:.0f} s)", flush=True)
    print(f"\n| variant | bytes/image | {' | '.join(folder.name for folder in sets)} | mean | seconds |")
    print("|---|---:|" + "---:|" * (len(sets) + 2))
    for name, found in scores.items():
        cells = " | ".join(f"{score:.1f}" for score in found)
        print(f"| {name} | {sizes[name]:,} | {cells} | {np.mean(found):.1f} | {np.mean(seconds[name]):.0f} |")


if __name__ == "__main__":
    main()
