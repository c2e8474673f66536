"""Check a head's checkpoint against its config before anything is loaded from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from .configuration_layer_fusion import LayerFusionConfig
from .errors import LayerFusionError
from .heads import build_head

HEAD_PREFIX = "head."
BACKBONE_PREFIX = "backbone."
WEIGHTS_NAME = "model.safetensors"
SHARDED_WEIGHTS_NAME = "model.safetensors.index.json"


def check_checkpoint(name_or_path: str, config: LayerFusionConfig, hub_kwargs: dict[str, Any]) -> None:
    """Compare the tensors of a checkpoint's head, by name and shape, with what the config asks for.

    Raises:
        LayerFusionError: naming tensors that are missing, unknown or of another shape; or if the weights are not in
            safetensors format.
    """
    optional = {"_raise_exceptions_for_missing_entries": False}
    weights = cached_file(name_or_path, WEIGHTS_NAME, **optional, **hub_kwargs)
    if weights is None:
        if cached_file(name_or_path, SHARDED_WEIGHTS_NAME, **optional, **hub_kwargs) is not None:
            return  # only a bundled backbone of tens of gigabytes is sharded; loading reports what it lacks
        raise LayerFusionError(
            f"{name_or_path} holds no {WEIGHTS_NAME}; heads are read from safetensors files only, never from pickles"
        )
    found = _shapes_in(Path(weights))
    with torch.device("meta"):
        expected = {HEAD_PREFIX + key: tuple(value.shape) for key, value in build_head(config).state_dict().items()}
    head = {key: shape for key, shape in found.items() if not key.startswith(BACKBONE_PREFIX)}
    if not config.includes_backbone:
        head = found
    problems = []
    if missing := sorted(expected.keys() - head.keys()):
        problems.append(f"missing tensors: {', '.join(missing)}")
    if unknown := sorted(head.keys() - expected.keys()):
        problems.append(f"unknown tensors: {', '.join(unknown[:5])}" + (" ..." if len(unknown) > 5 else ""))
    problems += [
        f"{key} has shape {head[key]}, but the config asks for {expected[key]}"
        for key in sorted(expected.keys() & head.keys())
        if head[key] != expected[key]
    ]
    if problems:
        raise LayerFusionError(f"{weights} does not match its config: " + "; ".join(problems))


def _shapes_in(weights: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(weights, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise LayerFusionError(
            f"{weights} is not a whole safetensors file ({error}): it may be truncated, or a renamed pickle"
        ) from error
