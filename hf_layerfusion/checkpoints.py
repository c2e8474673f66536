"""What a head's checkpoint must hold, and the backbone it must be given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from .backbones import (
    BACKBONE_OPTIONS,
    HUB_OPTIONS,
    OpenedBackbone,
    WeightFingerprint,
    open_backbone,
    pooler_kwargs,
    quantization_of,
    refuse_lacking,
)
from .configuration_layer_fusion import LayerFusionConfig
from .errors import LayerFusionError
from .heads import build_parts
from .model_classes import backbone_class_of

logger = logging.get_logger(__name__)

BACKBONE_PREFIX = "backbone."
_OPTIONAL = {"_raise_exceptions_for_missing_entries": False}
WEIGHTS_NAME = "model.safetensors"
SHARDED_WEIGHTS_NAME = "model.safetensors.index.json"


def open_config(name_or_path: str, hub_kwargs: dict[str, Any]) -> LayerFusionConfig:
    """The config of a head.

    Raises:
        LayerFusionError: if a folder holds none, or it is another model's.
        OSError: if a repository cannot be reached or holds none.
    """
    folder = Path(name_or_path, hub_kwargs.get("subfolder", ""))
    # transformers takes a folder without the file for an empty config; of a repository it says so itself.
    if Path(name_or_path).is_dir() and not (folder / "config.json").is_file():
        raise LayerFusionError(f"{name_or_path} holds no config.json: it is not a saved head")
    values, _ = LayerFusionConfig.get_config_dict(name_or_path, **hub_kwargs)
    if values.get("model_type") != LayerFusionConfig.model_type:
        raise LayerFusionError(
            f"{name_or_path} holds a {values.get('model_type')!r} model, not a head: "
            "put a new head on it with from_backbone"
        )
    return LayerFusionConfig.from_pretrained(name_or_path, **hub_kwargs)


def check_checkpoint(name_or_path: str, config: LayerFusionConfig, hub_kwargs: dict[str, Any]) -> None:
    """Compare the tensors of a checkpoint's head, by name and shape, with what the config asks for.

    Raises:
        LayerFusionError: naming tensors that are missing, unknown or of another shape; or if the weights are not in
            safetensors format.
    """
    files = _weight_files(name_or_path, hub_kwargs)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= _shapes_in(file)
    with torch.device("meta"):
        expected = {
            f"{name}.{key}": tuple(value.shape)
            for name, part in build_parts(config).items()
            for key, value in part.state_dict().items()
        }
    head = {key: shape for key, shape in found.items() if not key.startswith(BACKBONE_PREFIX)}
    if not config.includes_backbone:
        head = found
    problems = []
    if missing := sorted(expected.keys() - head.keys()):
        problems.append(f"missing tensors: {', '.join(missing)}")
    if unknown := sorted(head.keys() - expected.keys()):
        problems.append(f"unknown tensors: {', '.join(unknown[:5])}" + (" ..." if len(unknown) > 5 else ""))
    misshapen = [key for key in sorted(expected.keys() & head.keys()) if head[key] != expected[key]]
    problems += [f"{key} has shape {head[key]}, but the config asks for {expected[key]}" for key in misshapen[:5]]
    if len(misshapen) > 5:
        problems.append(f"{len(misshapen) - 5} more have other shapes")
    if problems:
        raise LayerFusionError(f"{files[0]} does not match its config: " + "; ".join(problems))


def _weight_files(name_or_path: str, hub_kwargs: dict[str, Any]) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards of a bundled backbone of tens of gigabytes."""
    single = cached_file(name_or_path, WEIGHTS_NAME, **_OPTIONAL, **hub_kwargs)
    if single is not None:
        return [Path(single)]
    index = cached_file(name_or_path, SHARDED_WEIGHTS_NAME, **_OPTIONAL, **hub_kwargs)
    if index is None:
        raise LayerFusionError(
            f"{name_or_path} holds no {WEIGHTS_NAME}; heads are read from safetensors files only, never from pickles"
        )
    shards, _ = get_checkpoint_shard_files(name_or_path, index, **hub_kwargs)
    return [Path(shard) for shard in shards]


def _shapes_in(weights: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(weights, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise LayerFusionError(
            f"{weights} is not a whole safetensors file ({error}): it may be truncated, or a renamed pickle"
        ) from error


def open_pinned_backbone(
    name_or_path: str,
    config: LayerFusionConfig,
    backbone: str | Path | PreTrainedModel | None,
    strict: bool,
    kwargs: dict[str, Any],
    also: Sequence[LayerFusionConfig] = (),
) -> OpenedBackbone:
    """Open the backbone that a head was trained on, or the one handed in, and compare its weights.

    Args:
        name_or_path: of the head; its checkpoint may hold the backbone too.
        config: of the head.
        backbone: used instead of the pinned one.
        strict: whether other weights are an error or a warning.
        kwargs: of `from_pretrained`.
        also: configs of more heads that must belong to it.

    Raises:
        LayerFusionError: if it cannot be found, or is not the one the head was trained on.
    """
    if backbone is not None and not isinstance(backbone, str | Path):
        opened = open_backbone(backbone)
        verify_weights([config, *also], opened.model, strict)
        return opened
    options = {key: kwargs[key] for key in BACKBONE_OPTIONS if key in kwargs}
    dtype = options.pop("dtype", None)
    if config.backbone_fingerprint is not None:
        # Loaded as it was, so that its weights can be compared; cast afterwards.
        options["dtype"] = getattr(torch, config.backbone_fingerprint["dtype"])
    quantization = getattr(config.backbone_config, "quantization_config", None)
    if quantization is not None and not config.includes_backbone:
        options.setdefault("quantization_config", quantization)
    if backbone is not None:
        opened = open_backbone(backbone, **options)
    elif config.includes_backbone:
        opened = _open_bundled(name_or_path, config, kwargs, options)
    elif config.backbone_name_or_path is not None:
        opened = open_backbone(config.backbone_name_or_path, revision=config.backbone_revision, **options)
    else:
        raise LayerFusionError("this head does not say where its backbone is: pass it as backbone=")
    verify_weights([config, *also], opened.model, strict)
    if dtype not in (None, "auto"):
        if method := quantization_of(opened.model):
            raise LayerFusionError(f"dtype={dtype}: a {method}-quantised backbone keeps its dtype; leave dtype out")
        opened.model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return opened


def _open_bundled(
    name_or_path: str, config: LayerFusionConfig, kwargs: dict[str, Any], options: dict[str, Any]
) -> OpenedBackbone:
    hub_kwargs = hub_options(kwargs)
    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(name_or_path, hub_kwargs):
        tensors = load_file(file)
        weights |= {k.removeprefix(BACKBONE_PREFIX): v for k, v in tensors.items() if k.startswith(BACKBONE_PREFIX)}
    if any(".base_layer." in name for name in weights):
        raise LayerFusionError(
            f"{name_or_path} holds a backbone with PEFT adapters, whose places only peft knows: merge them before saving "
            "(merge_and_unload), or save the adapters by themselves and the head with include_backbone=False"
        )
    without_pooler = pooler_kwargs(config.backbone_config)
    model_class: Any = backbone_class_of(config.backbone_config)
    loading = {key: value for key, value in options.items() if key not in HUB_OPTIONS}
    model, info = model_class.from_pretrained(
        None,
        config=config.backbone_config,
        state_dict=weights,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by name
        **without_pooler,
        **loading,
    )
    refuse_lacking(name_or_path, model, info, prefix=BACKBONE_PREFIX)
    return OpenedBackbone(model.eval(), config.backbone_name_or_path, config.backbone_revision, None)


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The part of `from_pretrained`'s arguments that says where files come from."""
    names = ("revision", "subfolder", *(name for name in HUB_OPTIONS if name != "trust_remote_code"))
    return {name: kwargs[name] for name in names if name in kwargs}


def verify_weights(configs: Sequence[LayerFusionConfig], backbone: PreTrainedModel, strict: bool) -> None:
    """Compare a backbone's weights with the fingerprints in heads' configs.

    Raises:
        LayerFusionError: naming the parts that differ, if `strict`; otherwise that is a warning.
    """
    pins = [(config, config.backbone_fingerprint) for config in configs if config.backbone_fingerprint is not None]
    if not pins:
        return
    found = WeightFingerprint.of(backbone)  # takes seconds for a large backbone, however many heads there are
    for config, pin in pins:
        pinned = WeightFingerprint.from_dict(pin)
        if found.kind != pinned.kind:
            logger.warning(
                f"this head was trained on a {pinned.kind} backbone and is given a {found.kind} one: "
                "their weights cannot be compared"
            )
        elif difference := pinned.difference(found):
            head = f"head {config.name_or_path}: " if len(configs) > 1 else ""
            message = (
                f"{head}this is not the backbone that the head was trained on ({config.backbone_name_or_path}, revision "
                f"{config.backbone_revision}): {difference}"
            )
            if strict:
                raise LayerFusionError(message + "; pass the right one as backbone=, or verify_backbone=False")
            logger.warning(message)
