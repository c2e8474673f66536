"""What `sweep` is given, checked before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..bank import TokenBank
from ..configuration_layer_fusion import HEAD_OPTIONS, PROBLEM_TYPES, LayerFusionConfig
from ..errors import LayerFusionError
from ..features import LayerFeatures
from ..layout import TokenLayout
from ..losses import problem_type_of
from ..training.metrics import IGNORED_LABEL, build_compute_metrics
from .settings import FIELDS, Grid, Setting, expand_grid

# Fields of the config that mean nothing to a sweep.
_NOT_SWEPT = ("class_weights", "freeze_backbone", "backbone_lr_factor")


def check_choice(name: str, value: Any, legal: Sequence[Any]) -> None:
    if value not in legal:
        raise LayerFusionError(f"{name} {value!r} is unknown: choose from {', '.join(map(str, legal))}")


def settings_of(grid: Grid, recipe: str | Sequence[str], overrides: dict[str, Any]) -> list[Setting]:
    """The grid's settings; an option that a grid may vary, given by itself, is the same in all of them."""
    recipes = [recipe] if isinstance(recipe, str) else recipe
    if not isinstance(recipes, Sequence) or not recipes or not all(isinstance(name, str) for name in recipes):
        raise LayerFusionError(f"recipe={recipe!r}: give one name or a list of names")
    settings = expand_grid(grid, recipes)
    fixed = {name: overrides[name] for name in FIELDS if name in overrides}
    if not fixed:
        return settings
    return list(dict.fromkeys(expand_grid([{**setting.to_dict(), **fixed} for setting in settings])))


def labelled(
    features: LayerFeatures, num_labels: int | None, id2label: Any, problem_type: str | None
) -> tuple[LayerFeatures, np.ndarray, dict[str, Any]]:
    """The rows that have a label, their numbers, and what the config needs to know of the labels."""
    if problem_type is not None:
        check_choice("problem_type", problem_type, PROBLEM_TYPES)
    labels = features.labels
    if labels is None:
        raise LayerFusionError("the features have no labels: extract them with label_column=")
    is_classes = labels.ndim == 1 and labels.dtype.kind in "iu"
    kept = np.flatnonzero(labels != IGNORED_LABEL) if is_classes else np.arange(len(labels))
    if len(kept) < len(labels):
        features, labels = features.select_rows(kept), labels[kept]
    if not len(features):
        raise LayerFusionError("the features hold no labelled row: there is nothing to train on")
    names = id2label if id2label is not None else features.label_names
    if names is not None:
        if isinstance(names, str) or not isinstance(names, dict | Sequence):
            raise LayerFusionError(f"id2label={names!r}: give the class names as a list, or as a dict from 0 up")
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        try:
            options: dict[str, Any] = {"id2label": {int(number): name for number, name in pairs}}
        except (TypeError, ValueError) as error:
            raise LayerFusionError(f"id2label={names!r}: its keys must be the class indices, from 0 up") from error
        if num_labels is not None and num_labels != len(options["id2label"]):
            raise LayerFusionError(f"num_labels={num_labels}, but there are {len(options['id2label'])} class names")
    elif num_labels is not None:
        options = {"num_labels": num_labels}
    elif labels.ndim > 1:
        options = {"num_labels": labels.shape[1]}
    else:
        options = {"num_labels": int(labels.max()) + 1 if is_classes and problem_type != "regression" else 1}
    count = options["num_labels"] if "num_labels" in options else len(options["id2label"])
    if is_classes and problem_type is None:
        problem_type = "single_label_classification"
    if problem_type == "single_label_classification":
        if not is_classes:
            raise LayerFusionError(f"problem_type={problem_type!r} needs class indices, but the labels are numbers")
        if count < 2 or len(np.unique(labels)) < 2:
            raise LayerFusionError("all rows have one class: there is nothing to tell apart")
        return features, kept, {**options, "problem_type": problem_type}
    if not np.isfinite(labels).all():
        row = int(np.argwhere(~np.isfinite(labels))[0][0])
        raise LayerFusionError(f"row {row} has a label that is NaN or infinite: remove the row, or give its label")
    width = labels.shape[1] if labels.ndim > 1 else 1
    if count != width:
        raise LayerFusionError(
            f"the labels have {width} number{'s' * (width > 1)} per row, but the head {count} outputs: leave num_labels, "
            "id2label and problem_type out, or extract other labels"
        )
    return features, kept, {**options, "problem_type": problem_type}


def config_of(
    features: LayerFeatures,
    setting: Setting,
    options: dict[str, Any],
    overrides: dict[str, Any],
    *,
    check: bool = True,
) -> LayerFusionConfig:
    """Of a head that reads these features; `check` that they hold its tokens."""
    if unknown := sorted(overrides.keys() - set(HEAD_OPTIONS)):
        raise LayerFusionError(
            f"{unknown[0]!r} is no option of sweep or of a head; heads take {', '.join(HEAD_OPTIONS)}"
        )
    if idle := [name for name in _NOT_SWEPT if name in overrides]:
        raise LayerFusionError(
            f"{idle[0]!r} is no option of sweep: classes are weighted by the grid's balance_classes, and a backbone is "
            "fine-tuned with Trainer"
        )
    if overrides.get("width_alignment") == "project":
        raise LayerFusionError(
            "width_alignment='project' gives every head tokens of its own, which a sweep cannot share: "
            "train it with build_trainer"
        )
    for name, value in {"token_normalization": "standardize", "loss": "squared"}.items():
        if setting.ridge_penalty is not None and overrides.get(name) == value:
            raise LayerFusionError(f"{name}={value!r}: recipe {setting.recipe!r} does so by itself, leave it out")
    layout = features.fingerprint["token_layout"]
    size = features.fingerprint.get("image_size")
    config = LayerFusionConfig(
        **{"token_layout": layout, "image_size": size, **options, **overrides, **setting.config_options}
    )
    if config.problem_type is None:
        problem: Any = problem_type_of(config, torch.as_tensor(features.select_rows([0]).labels))
        config.problem_type = problem
    if check:
        features.bank.positions_of(config.bank)  # says which tokens are missing
    return config


def within_budget(
    settings: Sequence[Setting], banks: Mapping[str, TokenBank], layout: TokenLayout, dtype: str, max_bytes: int | None
) -> list[Setting]:
    """The settings whose tokens take up to so many bytes an image in a cache of `dtype`; `None` for all of them.

    Args:
        settings: in any order.
        banks: by recipe.
        layout: of the backbone.

    Raises:
        LayerFusionError: if none is left.
    """
    if max_bytes is None:
        return list(settings)
    if type(max_bytes) is not int or max_bytes < 1:
        raise LayerFusionError(f"max_bytes_per_image={max_bytes!r}: use a whole number from 1 up, or None")
    sizes = {recipe: len(bank) * bank.width(layout) * np.dtype(dtype).itemsize for recipe, bank in banks.items()}
    kept = [setting for setting in settings if sizes[setting.recipe] <= max_bytes]
    if not kept:
        shown = ", ".join(f"{recipe} {size:,}" for recipe, size in sizes.items())
        raise LayerFusionError(
            f"max_bytes_per_image={max_bytes} leaves no recipe; in {dtype} their tokens take {shown} bytes an image: allow "
            "more, or name recipes that read fewer layers or pools"
        )
    return kept


def checked_seeds(seeds: Sequence[int]) -> list[int]:
    is_list = isinstance(seeds, Sequence | np.ndarray) and not isinstance(seeds, str)
    checked = [int(seed) for seed in seeds if isinstance(seed, Integral)] if is_list else []
    if not checked or len(set(checked)) != len(seeds) or not all(0 <= seed < 2**32 for seed in checked):
        raise LayerFusionError(f"seeds={seeds!r}: give a list of one or several different whole numbers from 0 up")
    return checked


def describe_features(features: LayerFeatures, folds: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """What tells these rows and tokens, and how they are split, from any others."""
    digest = hashlib.sha256()
    for shard in features.manifest.shards:
        digest.update(shard.sha256.encode())
    if not features.manifest.shards:  # taken from a dataset, which keeps no checksums
        for batch in features.batches(1024):
            digest.update(batch["layer_features"].cpu().numpy().tobytes())
    for array in (features.cache_rows, features.labels, *(part for fold in folds for part in fold)):
        digest.update(np.ascontiguousarray(array).tobytes())
    backbone = features.fingerprint.get("backbone") or {}
    return {
        "rows": len(features),
        "digest": digest.hexdigest(),
        "backbone": backbone.get("digest"),
        "processor": features.fingerprint.get("processor"),
    }


def checked_groups(groups: Sequence[Any] | np.ndarray | None, kept: np.ndarray, num_rows: int) -> list[Any] | None:
    """The groups of the rows that have a label, of those of all rows."""
    if groups is None:
        return None
    if isinstance(groups, str) or not isinstance(groups, Sequence | np.ndarray) or len(groups) != num_rows:
        found = len(groups) if isinstance(groups, Sequence | np.ndarray) else repr(groups)
        raise LayerFusionError(f"groups is {found} entries long, but there are {num_rows} rows: give one per row")
    return [groups[row] for row in kept.tolist()]


def checked_device(device: str | torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown name; build without support for it
        reason = str(error).split("\n", 1)[0]
        raise LayerFusionError(f"device={str(device)!r} cannot be used on this machine: {reason}") from error
    return torch.device(device)


def writable_folder(output_dir: str | Path | None) -> Path | None:
    """The folder of a result, created now and not after hours of training."""
    if output_dir is None:
        return None
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LayerFusionError(f"output_dir={str(folder)!r} cannot be written to: {error}") from error
    return folder


def check_metric(metric: str, config: LayerFusionConfig, labels: np.ndarray) -> None:
    """Whether `build_compute_metrics` gives such a metric for these labels."""
    few = labels[:8]
    known = build_compute_metrics(config)(EvalPrediction(np.zeros((len(few), config.num_labels)), few))
    check_choice("metric", metric, tuple(known))
