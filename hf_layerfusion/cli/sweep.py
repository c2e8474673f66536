"""Train a whole grid of heads in one pass, choose the best setting on validation rows, and train it again on all rows.

From a feature cache of the training images (`--features features/train`, as `layerfusion extract` makes it; a Hub id
works too), or from a backbone and images, whose features are then extracted first. The test split is never read.

  layerfusion sweep --features features/train --output_dir sweep --recipe alf,linear-all --seeds 0,1,2
  layerfusion sweep --backbone facebook/dinov2-small --dataset path/to/images --output_dir sweep --grid grid.yaml

A grid file names values; all combinations are tried. What it leaves out is the recipe's, or off:

  learning_rate: [0.1, 0.01, 0.001]
  weight_decay: [0.0001, 0.01, 1]
  attention_dropout: [0, 0.3]
  noise_std: 0.05

Fields are recipe, learning_rate, weight_decay, attention_dropout, noise_std, noise_probability, num_queries, num_heads,
mixup_alpha, layer_dropout and balance_classes. A list of such mappings is the grids one after another.

OUTPUT_DIR gets sweep.json, trials.csv (a row for every trial), sweep.png, the trained heads' weights, and with a
backbone the folder head, which `layerfusion evaluate` and `pipeline` load. After a kill, the same command goes on.
Under `accelerate launch` the heads are shared out over the processes.
"""

from __future__ import annotations

import argparse
import functools
import math
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ..bank import TokenBank
from ..configuration_layer_fusion import ATTENDING_HEADS, MULTI_HEAD_TYPES, LayerFusionConfig
from ..data import SPLIT_NAMES, open_dataset, prepare_splits, training_groups
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..features.manifest import MANIFEST_NAME
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification
from ..recipes import find_recipe
from ..sweeps import Setting, SweepResult, expand_grid, sweep
from ..sweeps.inputs import within_budget
from ..sweeps.result import RESULT_NAME, TABLE_NAME
from ..sweeps.run import STRATEGIES, member_seeds
from ..sweeps.settings import idle_fields
from .options import (
    TRAINING_OPTIONS,
    OptionsError,
    add_backbone_options,
    add_cache_options,
    add_dataset_options,
    add_device_option,
    add_training_options,
    build_model,
    check_device,
    extract_splits,
    given_options,
    is_main_process,
    number,
    output_folder,
    token_options,
    training_options,
    whole_numbers,
)

# Options of the search itself, by the names of `sweep`'s arguments; the library's defaults hold where none is given.
SEARCH_OPTIONS = (
    *("strategy", "metric", "validation_size", "num_folds", "seeds", "patience"),
    *("heads_at_once", "max_memory", "save_seconds", "max_bytes_per_image", "num_members"),
)
SEARCH_TITLE = "sweep (defaults: the paper's protocol)"
# Options that say how to extract, and are None or False unless they are given.
_EXTRACTION_OPTIONS = (
    *("backbone", "revision", "image_size", "num_prefix_tokens", "grid_size", "width_alignment"),
    *("dataset", "dataset_name", "image_column", "label_column", "group_column"),
    *("features_dir", "autocast", "torch_compile", "overwrite"),
)
_SHOWN_SETTINGS = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", help="feature cache of the training rows: folder or Hub id")
    add_backbone_options(parser, required=False)
    add_dataset_options(parser, required=False)
    parser.add_argument("--output_dir", required=True, help="folder of the result")
    parser.add_argument("--features_dir", help="folder of the feature caches (default: OUTPUT_DIR/features)")
    add_cache_options(parser)
    group = parser.add_argument_group(SEARCH_TITLE)
    group.add_argument(
        "--grid",
        default="paper",
        help="paper (63 settings an attentive recipe), fast (12), or a YAML or JSON file (default: paper)",
    )
    add_search_options(group)
    group.add_argument(
        "--num_epochs",
        type=number(int, at_least=1),
        help="of every head (default: 40, or as many as make 1000 steps)",
    )
    group.add_argument(
        "--train_batch_size",
        type=number(int, at_least=1),
        help="default: up to 2048, and at least five batches an epoch",
    )
    group.add_argument("--no_refit", action="store_true", help="choose only: train no head on all rows")
    add_training_options(parser)
    add_device_option(parser)


def add_search_options(group: argparse._ArgumentGroup) -> None:
    """What `layerfusion sweep` and `layerfusion train --sweep` share; all are `None` or `False` unless given."""
    group.add_argument(
        "--strategy",
        choices=STRATEGIES,
        help="full trains every setting; merged leaves out those that weight decay makes the same run; halving also drops "
        "the worse ones on the way, and may lose the best (default: merged)",
    )
    group.add_argument(
        "--metric", help="to choose by, on the validation rows (default: balanced_accuracy for classes)"
    )
    validation = group.add_mutually_exclusive_group()
    validation.add_argument(
        "--validation_size", type=number(float, above=0), help="share of the training rows (default: 0.2)"
    )
    validation.add_argument("--num_folds", type=number(int, at_least=2), help="cross-validate instead")
    group.add_argument(
        "--group_column",
        help="of the dataset: images with the same value (a patient, a film) are never on both sides of a split",
    )
    group.add_argument(
        "--seeds", type=whole_numbers, metavar="0,1,2", help="train every setting from each of these (default: 0)"
    )
    group.add_argument(
        "--patience", type=number(int, at_least=1), help="stop a head after so many epochs without a better score"
    )
    group.add_argument(
        "--num_members",
        type=number(int, at_least=1),
        help="train the chosen setting so many times on all rows, each from another seed, for one head whose logits are the "
        "mean of theirs (default: the recipe's, which is 1 but for alf-ensemble)",
    )
    group.add_argument(
        "--heads_at_once", type=number(int, at_least=1), help="heads in one pass (default: 2 on a CPU, all on a GPU)"
    )
    group.add_argument(
        "--max_memory_gb",
        dest="max_memory",
        type=number(float, above=0),
        metavar="GB",
        help="for parameters, gradients and moments (default: 0.6 of what is free)",
    )
    group.add_argument(
        "--max_bytes_per_image",
        type=number(int, at_least=1),
        help="leave out recipes whose tokens take more of the cache (layerfusion info says how much each takes)",
    )
    group.add_argument(
        "--save_seconds",
        type=number(float, at_least=0),
        help="least time between two saves of the state (default: 120)",
    )
    group.add_argument("--overwrite_sweep", action="store_true", help="replace another sweep in the output folder")


def run(arguments: argparse.Namespace) -> None:
    _check_source(arguments)
    folder = output_folder("--output_dir", arguments.output_dir)
    check_device(arguments.device)
    settings = grid_settings(arguments, arguments.grid)
    model = groups = None
    if arguments.features:
        features = _open_features(arguments.features)
    else:
        caches = output_folder("--features_dir", arguments.features_dir or str(folder / "features"))
        opened = open_dataset(arguments.dataset, name=arguments.dataset_name)
        groups = training_groups(opened, arguments.group_column) if arguments.group_column else None
        splits, image_column, label_column = prepare_splits(opened, arguments.image_column, arguments.label_column)
        model = build_model(arguments, splits["train"], label_column, recipe=settings[0].recipe)
        settings = affordable(arguments, model, settings)
        bank = union_bank(arguments, model, settings)
        # Those of training alone: the test split stays unread.
        wanted = {"train": splits["train"]}
        features = extract_splits(arguments, model, wanted, caches, image_column, label_column, bank)["train"]
    found = search(
        arguments,
        features,
        folder,
        settings,
        model,
        groups=groups,
        num_epochs=arguments.num_epochs,
        refit=not arguments.no_refit,
    )
    if not is_main_process():
        return
    print(describe(found))
    print(f"result: {folder / RESULT_NAME}; every trial: {folder / TABLE_NAME}")
    if arguments.no_refit:
        return
    if model is None:
        print(
            f"head of seed {next(iter(found.result.heads))}, trained on all rows: "
            f"hf_layerfusion.SweepResult.load({str(folder)!r}).build_model(BACKBONE)"
        )
        return
    head = chosen_head(arguments, model, found.result)
    head.training_summary = {"dataset": dataset_name(arguments), "hyperparameters": hyperparameters(found.result)}
    head.save_pretrained(folder / "head")
    print(f"head of seed {next(iter(found.result.heads))}, trained on all rows: {folder / 'head'}")


def _check_source(arguments: argparse.Namespace) -> None:
    given = given_options(arguments, _EXTRACTION_OPTIONS)
    if arguments.features and given:
        raise OptionsError(
            f"--features is an extracted cache, to which --{given[0]} does not apply: "
            "give either --features, or --backbone and --dataset"
        )
    if not arguments.features and not (arguments.backbone and arguments.dataset):
        raise OptionsError("give either --features, or both --backbone and --dataset")
    if arguments.width_alignment == "project":
        raise OptionsError(
            "--width_alignment project gives every head tokens of its own, which a sweep cannot share: "
            "use layerfusion train"
        )


def _open_features(name: str) -> LayerFeatures:
    """The cache that was asked for, unless its name says that it holds test images."""
    folder = Path(name)
    if folder.is_dir() and folder.resolve().name in SPLIT_NAMES["test"]:
        raise LayerFusionError(
            f"--features {name}: a setting is never chosen on the test split, give the training rows"
        )
    if not (folder / MANIFEST_NAME).is_file() and (folder / "train" / MANIFEST_NAME).is_file():
        raise LayerFusionError(f"--features {name} holds caches of several splits: give {folder / 'train'}")
    return LayerFeatures.open(name)


def grid_settings(arguments: argparse.Namespace, grid: str) -> list[Setting]:
    """The settings of the grid that was asked for, by name or file, with `--recipe` where it names none."""
    return expand_grid(grid, _asked(arguments))


def _asked(arguments: argparse.Namespace) -> list[str]:
    return [recipe.strip() for recipe in arguments.recipe.split(",")]


def union_bank(
    arguments: argparse.Namespace, model: ViTForAttentiveLayerFusionClassification, settings: Sequence[Setting]
) -> TokenBank:
    """The tokens of all recipes of a grid."""
    return functools.reduce(operator.or_, _banks(arguments, model, settings).values())


def affordable(
    arguments: argparse.Namespace, model: ViTForAttentiveLayerFusionClassification, settings: Sequence[Setting]
) -> list[Setting]:
    """Those settings whose tokens fit `--max_bytes_per_image`, so that no others are extracted."""
    layout = model.config.layout
    banks = _banks(arguments, model, settings)
    return within_budget(settings, banks, layout, arguments.feature_dtype, arguments.max_bytes_per_image)


def _banks(
    arguments: argparse.Namespace, model: ViTForAttentiveLayerFusionClassification, settings: Sequence[Setting]
) -> dict[str, TokenBank]:
    """The tokens of each recipe."""
    options = {"token_layout": model.config.token_layout, **token_options(arguments)}
    recipes = dict.fromkeys(setting.recipe for setting in settings)
    return {recipe: LayerFusionConfig(recipe=recipe, **options).bank for recipe in recipes}


@dataclass
class Found:
    """A sweep's result and the seconds it took; `None` if it was there already."""

    result: SweepResult
    seconds: float | None


def search(
    arguments: argparse.Namespace,
    features: LayerFeatures,
    folder: Path,
    settings: Sequence[Setting],
    model: ViTForAttentiveLayerFusionClassification | None,
    *,
    groups: np.ndarray | None,
    num_epochs: int | None,
    refit: bool = True,
) -> Found:
    """Run the sweep that was asked for, on training rows; `model` knows the labels if the features came from it.

    `groups` has what each image of the training split belongs to.
    """
    # Without CUDA, accelerate makes one group of several processes only if it is told that they use the CPU.
    PartialState(cpu=torch.device(arguments.device).type == "cpu")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in given_options(arguments, SEARCH_OPTIONS)}
    if "max_memory" in options:
        options["max_memory"] = int(options["max_memory"] * 1e9)
    if model is not None:
        options |= {"id2label": model.config.id2label, "problem_type": model.config.problem_type}
    before = _time_of(folder)
    start = time.perf_counter()
    result = sweep(
        features,
        recipe=_names(arguments, settings),
        grid=[setting.to_dict() for setting in settings],
        groups=None if groups is None else groups[features.source_rows],
        num_epochs=num_epochs,
        batch_size=arguments.train_batch_size,
        refit=refit,
        output_dir=folder,
        overwrite=arguments.overwrite_sweep,
        device=arguments.device,
        **token_options(arguments),
        **training_options(arguments),
        **options,
    )
    seconds = time.perf_counter() - start
    return Found(result, None if before is not None and _time_of(folder) == before else seconds)


def _names(arguments: argparse.Namespace, settings: Sequence[Setting]) -> list[str]:
    """The recipes of the settings, or the one that stands for them."""
    asked, swept = _asked(arguments), list(dict.fromkeys(setting.recipe for setting in settings))
    is_choice = len(asked) == 1 and set(swept) <= set(find_recipe(asked[0]).candidates)
    return asked if is_choice else swept


def _time_of(folder: Path) -> int | None:
    path = folder / RESULT_NAME
    return path.stat().st_mtime_ns if path.exists() else None


def chosen_head(
    arguments: argparse.Namespace, model: ViTForAttentiveLayerFusionClassification, result: SweepResult
) -> ViTForAttentiveLayerFusionClassification:
    """The head that the sweep trained, on the backbone that `model` extracted the tokens with."""
    return result.build_model(
        arguments.backbone,
        revision=model.config.backbone_revision,
        dtype=getattr(torch, arguments.dtype),
        num_prefix_tokens=arguments.num_prefix_tokens,
        grid_size=arguments.grid_size,
        image_processor=model.image_processor,
    ).to(arguments.device)


def dataset_name(arguments: argparse.Namespace) -> str:
    """For a card: a Hub id, or the name of a folder, whose path means nothing elsewhere."""
    folder = Path(arguments.dataset)
    return folder.resolve().name if folder.exists() else arguments.dataset


def hyperparameters(result: SweepResult) -> dict[str, Any]:
    """What a card says of how a sweep's head came about."""
    chosen = {name.replace("_", " "): value for name, value in chosen_values(result).items()}
    for_all = {name: value for name, value in result.protocol["overrides"].items() if name in TRAINING_OPTIONS}
    steps = {"epochs": result.protocol["refit_epochs"], "batch size": result.protocol["refit_batch_size"]}
    seed, members = next(iter(result.heads)), result.config.num_members
    seeds = member_seeds(seed, members)
    return {
        **chosen,
        **{name.replace("_", " "): value for name, value in for_all.items()},
        **(steps if result.best.ridge_penalty is None else {}),
        "training images": result.protocol["features"]["rows"],
        "seed": seed,
        **({"members": f"{members}, of seeds {seeds[0]} to {seeds[-1]}"} if members > 1 else {}),
        "chosen from": f"{result.protocol['settings']} settings, on {_validation(result)}",
        f"validation {result.score_name}": _score(result.best_score, result.best_score_std),
    }


def chosen_values(result: SweepResult) -> dict[str, Any]:
    """The chosen setting, with the recipe's values where the grid had none."""
    attends = result.config.head_type in ATTENDING_HEADS
    idle = [] if attends else ["attention_dropout", "num_queries"]
    idle += [] if result.config.head_type in MULTI_HEAD_TYPES else ["num_heads"]
    idle += [] if result.best.noise_std else ["noise_probability"]
    idle += idle_fields(result.best.to_dict())
    values = {name: getattr(result.config, name, value) for name, value in result.best.to_dict().items()}
    return {name: value for name, value in values.items() if name not in idle and value is not None}


def describe(found: Found) -> str:
    """The best settings as a table, the chosen one first, and how they were found."""
    result = found.result
    protocol = result.protocol
    took = "it was finished already" if found.seconds is None else f"took {found.seconds:.1f} s"
    merged = protocol["settings"] - protocol["trained_settings"]
    same = f" (the other {merged} would be the same run as one of these)" if merged else ""
    seeds = protocol["seeds"]
    names = result.varied
    rows = [row for row in result.summary() if row["trained_as"] == row["setting"] and not math.isnan(row["mean"])]
    table = [[result.score_name, *(name.replace("_", " ") for name in names)]]
    for row in rows[:_SHOWN_SETTINGS]:
        idle = idle_fields(row)
        values = ("-" if row[name] is None or name in idle else str(row[name]) for name in names)
        table.append([_score(row["mean"], row["std"]), *values])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    lines[1] += "  <- chosen"
    if len(rows) > _SHOWN_SETTINGS:
        lines.append(f"and {len(rows) - _SHOWN_SETTINGS} more")
    chosen = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen_values(result).items())
    notes = [
        f"note: this {name.replace('_', ' ')} is the {end} of the grid, and a wider grid may do better"
        for name, end in result.at_edge.items()
    ]
    highest = max(rows, key=lambda row: row["mean"])
    if "standard_error" in protocol and highest["recipe"] != rows[0]["recipe"]:
        notes.append(
            f"note: {highest['recipe']} scored higher by less than the standard error ({protocol['standard_error']:.3f}), so "
            f"{rows[0]['recipe']}, which comes before it in {protocol['recipe'][0]}, is taken"
        )
    return "\n".join(
        [
            f"{', '.join(protocol['recipe'])}: {protocol['trained_settings']} of {protocol['settings']} settings "
            f"trained{same}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, chosen on {_validation(result)}; {took}",
            *("", *lines, "", f"chosen: {chosen}", *notes),
        ]
    )


def _validation(result: SweepResult) -> str:
    rows, validation = result.protocol["features"]["rows"], result.protocol["validation"]
    kept = ", groups kept together" if result.protocol.get("grouped") else ""
    if "num_folds" in validation:
        return f"{validation['num_folds']} folds of {rows} rows{kept}"
    return f"{validation['validation_size']:.0%} of {rows} rows{kept}"


def _score(mean: float, std: float) -> str:
    """Mean and, over several seeds or folds, standard deviation."""
    return f"{mean:.4f}" + ("" if math.isnan(std) else f" ± {std:.4f}")
