"""What a head's checkpoint must hold, and the backbone it must be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from .backbones import BACKBONE_OPTIONS, OpenedBackbone, WeightFingerprint, open_backbone
from .configuration_layer_fusion import LayerFusionConfig
from .errors import LayerFusionError
from .heads import build_head

logger = logging.get_logger(__name__)

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


def open_pinned_backbone(
    config: LayerFusionConfig, backbone: str | Path | PreTrainedModel | None, strict: bool, kwargs: dict[str, Any]
) -> OpenedBackbone:
    """Open the backbone that a head was trained on, or the one handed in, and compare its weights.

    Args:
        config: of the head.
        backbone: used instead of the pinned one.
        strict: whether other weights are an error or a warning.
        kwargs: of `from_pretrained`.

    Raises:
        LayerFusionError: if it cannot be found, or is not the one the head was trained on.
    """
    source = backbone if backbone is not None else config.backbone_name_or_path
    if source is None:
        raise LayerFusionError("this head does not say where its backbone is: pass it as backbone=")
    if isinstance(source, PreTrainedModel):
        opened = open_backbone(source)
        verify_weights(config, opened.model, strict)
        return opened
    options = {key: kwargs[key] for key in BACKBONE_OPTIONS if key in kwargs}
    dtype = options.pop("dtype", None)
    if config.backbone_fingerprint is not None:
        # Loaded as it was, so that its weights can be compared; cast afterwards.
        options["dtype"] = getattr(torch, config.backbone_fingerprint["dtype"])
    opened = open_backbone(source, revision=config.backbone_revision if backbone is None else None, **options)
    verify_weights(config, opened.model, strict)
    if dtype not in (None, "auto"):
        opened.model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return opened


def verify_weights(config: LayerFusionConfig, backbone: PreTrainedModel, strict: bool) -> None:
    """Compare a backbone's weights with the fingerprint in a head's config.

    Raises:
        LayerFusionError: naming the parts that differ, if `strict`; otherwise that is a warning.
    """
    if config.backbone_fingerprint is None:
        return
    pinned = WeightFingerprint.from_dict(config.backbone_fingerprint)
    found = WeightFingerprint.of(backbone)
    if found.dtype != pinned.dtype:
        logger.warning(
            f"this head was trained on a {pinned.dtype} backbone and is given a {found.dtype} one: "
            "their weights cannot be compared"
        )
    elif difference := pinned.difference(found):
        message = (
            f"this is not the backbone that the head was trained on ({config.backbone_name_or_path}, revision "
            f"{config.backbone_revision}): {difference}"
        )
        if strict:
            raise LayerFusionError(message + "; pass the right one as backbone=, or verify_backbone=False")
        logger.warning(message)
