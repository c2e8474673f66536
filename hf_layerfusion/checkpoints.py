"""What a head's checkpoint must hold, and the backbone it must be given."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from .backbones import (
    BACKBONE_OPTIONS,
    HUB_OPTIONS,
    OpenedBackbone,
    WeightFingerprint,
    open_backbone,
    open_image_processor,
    pooler_kwargs,
    quantization_of,
    refuse_lacking,
)
from .configuration_layer_fusion import LayerFusionConfig
from .errors import LayerFusionError
from .files import write_file
from .heads import build_parts
from .hub.push import hub_id
from .hub.record import RECORD_NAME, load_record
from .hub.safety import (
    StoredTensor,
    check_processor_values,
    compare_checksum,
    is_from_the_hub,
    is_plain_name,
    json_digest,
    local_file,
    read_checksums,
    read_header,
    read_json,
    settings_digest,
    tensor_digest,
)
from .model_classes import backbone_class_of

logger = logging.get_logger(__name__)

BACKBONE_PREFIX = "backbone."
_OPTIONAL = {"_raise_exceptions_for_missing_entries": False}
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
SHARDED_WEIGHTS_NAME = "model.safetensors.index.json"
PROCESSOR_NAME = "preprocessor_config.json"

# What can be made of a backbone's settings without reading a checkpoint that was quantised beforehand.
_QUANTIZED_WHILE_LOADING = ("bitsandbytes", "torchao", "quanto", "hqq")
# The pooler and the buffers of a backbone, which its checkpoint does not hold; and what one of a checkpoint may become
# where versions of transformers split it.
_UNSAVED_ELEMENTS = 2**26
_UNSAVED_TENSORS = 256
_TENSORS_PER_SAVED = 4


def open_config(name_or_path: str, hub_kwargs: dict[str, Any]) -> LayerFusionConfig:
    """The config of a head.

    Raises:
        LayerFusionError: if a folder holds none, it is another model's, or it asks for what no head needs.
        OSError: if a repository cannot be reached or holds none.
    """
    if Path(name_or_path).is_dir():
        file = find_file(name_or_path, CONFIG_NAME, hub_kwargs)
        if file is None:
            raise LayerFusionError(f"{name_or_path} holds no config.json: it is not a saved head")
    else:
        file = Path(str(cached_file(name_or_path, CONFIG_NAME, **hub_kwargs)))  # which says what is missing
    values = read_json(file)
    if values.get("model_type") != LayerFusionConfig.model_type:
        raise LayerFusionError(
            f"{name_or_path} holds a {reprlib.repr(values.get('model_type'))} model, not a head: "
            "put a new head on it with from_backbone"
        )
    return LayerFusionConfig.from_dict(values, name_or_path=name_or_path)


def find_file(name_or_path: str, name: str, hub_kwargs: dict[str, Any]) -> Path | None:
    """A file of a head by its name, from its folder or from the Hub, `None` if there is none.

    Raises:
        LayerFusionError: if it is a link out of its folder.
        OSError: if a repository cannot be reached.
    """
    if Path(name_or_path).is_dir():
        return local_file(Path(name_or_path), str(Path(hub_kwargs.get("subfolder", ""), name)))
    file = cached_file(name_or_path, name, **_OPTIONAL, **hub_kwargs)
    return None if file is None else Path(file)


def read_head(
    name_or_path: str, config: LayerFusionConfig, hub_kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], Any | None]:
    """Everything of a head that is not in its config.

    The tensors are compared with the config by name, shape and kind before one of them is read, and by checksum
    afterwards.

    Args:
        name_or_path: Hub id or folder of the head.
        config: of the head.
        hub_kwargs: where its files come from.

    Returns:
        Its tensors by name, and its image processor, if it has one.

    Raises:
        LayerFusionError: naming tensors that are missing, unknown or of another shape; if the weights are not in
            safetensors format; or if a file changed since the head was saved.
    """
    files = _weight_files(name_or_path, hub_kwargs)
    found = {file: read_header(file) for file in files}
    _check_tensors(files[0], found, config)
    tensors: dict[str, Tensor] = {}
    for file, entries in found.items():
        tensors |= _read_tensors(file, [name for name in entries if not name.startswith(BACKBONE_PREFIX)])
    values = _saved_values(name_or_path, hub_kwargs)
    checksums = read_checksums(values)
    compare_checksum(checksums, "settings", settings_digest(values), f"config.json of {name_or_path}")
    compare_checksum(checksums, "head", tensor_digest(tensors), f"the head in {files[0]}")
    return tensors, _read_processor(name_or_path, checksums, hub_kwargs)


def read_summary(name_or_path: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The training record of a head, `{}` if there is none that can be read: it does nothing for the head."""
    try:
        return load_record(find_file(name_or_path, RECORD_NAME, hub_kwargs))
    except (OSError, LayerFusionError) as error:
        logger.warning(f"the training record of {name_or_path} is left out: {error}")
        return {}


def write_checksums(folder: str | Path) -> None:
    """Add to a saved head's `config.json` by what its files can be recognised when they are read again."""
    folder = Path(folder)
    values = {key: value for key, value in read_json(folder / CONFIG_NAME).items() if key != "checksums"}
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(str(folder), {}):
        tensors |= _read_tensors(file, [name for name in read_header(file) if not name.startswith(BACKBONE_PREFIX)])
    checksums = {"settings": settings_digest(values), "head": tensor_digest(tensors)}
    if (folder / PROCESSOR_NAME).is_file():
        checksums["image_processor"] = json_digest(read_json(folder / PROCESSOR_NAME))
    text = json.dumps({**values, "checksums": checksums}, indent=2, sort_keys=True)  # as transformers lays it out
    write_file(folder / CONFIG_NAME, f"{text}\n".encode())


def _saved_values(name_or_path: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What stands in `config.json`, whatever config the caller uses instead."""
    file = find_file(name_or_path, CONFIG_NAME, hub_kwargs)
    return {} if file is None else read_json(file)


def _read_processor(name_or_path: str, checksums: dict[str, str], hub_kwargs: dict[str, Any]) -> Any | None:
    file = find_file(name_or_path, PROCESSOR_NAME, hub_kwargs)
    if file is None:
        if "image_processor" in checksums:
            raise LayerFusionError(f"{name_or_path} lacks {PROCESSOR_NAME}, which was saved with the head")
        return None
    values = read_json(file)
    runs_code = values.get("auto_map") is not None and hub_kwargs.get("trust_remote_code") is True
    check_processor_values(str(file), values, runs_code)
    compare_checksum(checksums, "image_processor", json_digest(values), str(file))
    try:
        # Of code in the repository only its name leads there.
        processor = (
            open_image_processor(name_or_path, hub_kwargs) if runs_code else open_image_processor(str(file), {})
        )
    except MemoryError:
        raise
    except Exception as error:  # some hundred classes, each with checks of its own
        raise LayerFusionError(f"{file} cannot be used: {type(error).__name__}: {error}") from error
    if processor is None:
        raise LayerFusionError(
            f"{file} cannot be used: {reprlib.repr(values['image_processor_type'])} is not known here, or does not take "
            "these settings"
        )
    return processor


def _check_tensors(shown: Path, found: Mapping[Path, Mapping[str, StoredTensor]], config: LayerFusionConfig) -> None:
    """Compare what safetensors files say they hold with what a config asks for."""
    stored: dict[str, StoredTensor] = {}
    for file, entries in found.items():
        if twice := sorted(stored.keys() & entries.keys()):
            raise LayerFusionError(
                f"{file} holds {reprlib.repr(twice[0])}, which another file of {shown.parent} holds too"
            )
        stored |= entries
    try:
        with torch.device("meta"):
            expected = {
                f"{name}.{key}": value
                for name, part in build_parts(config).items()
                for key, value in part.state_dict().items()
            }
    except (RuntimeError, OverflowError) as error:  # more elements than can be counted
        raise LayerFusionError(f"{shown.parent}: no head has the sizes that its config asks for: {error}") from error
    head = {key: entry for key, entry in stored.items() if not key.startswith(BACKBONE_PREFIX)}
    if not config.includes_backbone:
        head = stored
    problems = []
    if missing := sorted(expected.keys() - head.keys()):
        problems.append(f"missing tensors: {', '.join(missing)}")
    if unknown := sorted(head.keys() - expected.keys()):
        names = ", ".join(name if name.isprintable() else ascii(name) for name in unknown[:5])
        problems.append(f"unknown tensors: {names}" + (" ..." if len(unknown) > 5 else ""))
    shared = sorted(expected.keys() & head.keys())
    misshapen = [key for key in shared if head[key].shape != tuple(expected[key].shape)]
    problems += [
        f"{key} has shape {head[key].shape}, but the config asks for {tuple(expected[key].shape)}"
        for key in misshapen[:5]
    ]
    if len(misshapen) > 5:
        problems.append(f"{len(misshapen) - 5} more have other shapes")
    for key in shared:
        if head[key].is_float != expected[key].is_floating_point():
            problems.append(f"{key} is of type {head[key].dtype}, which its values cannot have")
    if problems:
        raise LayerFusionError(f"{shown} does not match its config: " + "; ".join(problems))


def _weight_files(name_or_path: str, hub_kwargs: dict[str, Any]) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards of a bundled backbone of tens of gigabytes."""
    single = find_file(name_or_path, WEIGHTS_NAME, hub_kwargs)
    if single is not None:
        return [single]
    index = find_file(name_or_path, SHARDED_WEIGHTS_NAME, hub_kwargs)
    if index is None:
        raise LayerFusionError(
            f"{name_or_path} holds no {WEIGHTS_NAME}; heads are read from safetensors files only, never from pickles"
        )
    places = read_json(index).get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    if bad := sorted(name for name in names if not is_plain_name(name)):
        raise LayerFusionError(f"{index} names {reprlib.repr(bad[0])}, which is no safetensors file beside it")
    files = {name: find_file(name_or_path, name, hub_kwargs) for name in sorted(names)}
    if missing := [name for name, file in files.items() if file is None] or (not files and ["any file"]):
        raise LayerFusionError(f"{index} names {missing[0]}, which is not there")
    return [file for file in files.values() if file is not None]


def _read_tensors(weights: Path, names: list[str]) -> dict[str, Tensor]:
    """Copies, since safetensors maps the file into memory, which may be written anew while the head is in use."""
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in names}
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
    also: Mapping[str, LayerFusionConfig] | None = None,
) -> OpenedBackbone:
    """Open the backbone that a head was trained on, or the one handed in, and compare its weights.

    Args:
        name_or_path: of the head; its checkpoint may hold the backbone too.
        config: of the head.
        backbone: used instead of the pinned one.
        strict: whether other weights are an error or a warning.
        kwargs: of `from_pretrained`.
        also: configs of more heads that must belong to it, by the heads' names.

    Raises:
        LayerFusionError: if it cannot be found, or is not the one the head was trained on.
    """
    if backbone is not None and not isinstance(backbone, str | Path):
        opened = open_backbone(backbone)
        verify_weights({name_or_path: config, **(also or {})}, opened.model, strict)
        return opened
    options = {key: kwargs[key] for key in BACKBONE_OPTIONS if key in kwargs}
    dtype = options.pop("dtype", None)
    if config.backbone_fingerprint is not None:
        # Loaded as it was, so that its weights can be compared; cast afterwards.
        options["dtype"] = getattr(torch, config.backbone_fingerprint["dtype"])
    quantization = getattr(config.backbone_config, "quantization_config", None)
    if quantization is not None and not config.includes_backbone and backbone is None:
        _check_quantization(quantization)
    if quantization is not None and not config.includes_backbone:
        options.setdefault("quantization_config", quantization)
    if backbone is not None:
        opened = open_backbone(backbone, **options)
    elif config.includes_backbone:
        opened = _open_bundled(name_or_path, config, kwargs, options)
    elif config.backbone_name_or_path is not None:
        _check_pin(name_or_path, config.backbone_name_or_path)
        opened = open_backbone(config.backbone_name_or_path, revision=config.backbone_revision, **options)
    else:
        raise LayerFusionError("this head does not say where its backbone is: pass it as backbone=")
    verify_weights({name_or_path: config, **(also or {})}, opened.model, strict)
    if dtype not in (None, "auto"):
        if method := quantization_of(opened.model):
            raise LayerFusionError(f"dtype={dtype}: a {method}-quantised backbone keeps its dtype; leave dtype out")
        opened.model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return opened


def _open_bundled(
    name_or_path: str, config: LayerFusionConfig, kwargs: dict[str, Any], options: dict[str, Any]
) -> OpenedBackbone:
    hub_kwargs = hub_options(kwargs)
    weights: dict[str, Tensor] = {}
    files = _weight_files(name_or_path, hub_kwargs)
    entries = [entry for file in files for key, entry in read_header(file).items() if key.startswith(BACKBONE_PREFIX)]
    model_class: Any = _bundled_class(name_or_path, config, entries)
    for file in files:
        tensors = load_file(file)
        weights |= {k.removeprefix(BACKBONE_PREFIX): v for k, v in tensors.items() if k.startswith(BACKBONE_PREFIX)}
    if any(".base_layer." in name for name in weights):
        raise LayerFusionError(
            f"{name_or_path} holds a backbone with PEFT adapters, whose places only peft knows: merge them before saving "
            "(merge_and_unload), or save the adapters by themselves and the head with include_backbone=False"
        )
    loading = {key: value for key, value in options.items() if key not in HUB_OPTIONS}
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config.backbone_config,
            state_dict=weights,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **pooler_kwargs(config.backbone_config),
            **loading,
        )
    except MemoryError:
        raise
    except Exception as error:  # a config that fits its class and not itself
        raise LayerFusionError(
            f"the backbone in {name_or_path} cannot be built from its config: {type(error).__name__}: {error}"
        ) from error
    refuse_lacking(name_or_path, model, info, prefix=BACKBONE_PREFIX)
    return OpenedBackbone(model.eval(), config.backbone_name_or_path, config.backbone_revision, None)


def _bundled_class(
    name_or_path: str, config: LayerFusionConfig, saved: Sequence[StoredTensor]
) -> type[PreTrainedModel]:
    """The class of a backbone that is in a head's checkpoint, built once without memory to see that it fits.

    Raises:
        LayerFusionError: if its config asks for more than the tensors that the checkpoint holds.
    """
    settings = config.backbone_config
    model_class = backbone_class_of(settings)
    if model_class is None:
        raise LayerFusionError(f"{name_or_path} holds a {settings.model_type!r} model, which is no vision backbone")
    if getattr(settings, "quantization_config", None) is not None:
        raise LayerFusionError(f"{name_or_path} says that the backbone in it is quantised, which cannot be saved")
    # timm's own way of naming a model that it fetches.
    if ":" in str(getattr(settings, "architecture", "")):
        raise LayerFusionError(f"the backbone in {name_or_path} names an architecture to be fetched")
    try:
        with _building_limit(saved), torch.device("meta"):
            model_class(settings, **pooler_kwargs(settings))
    except (LayerFusionError, MemoryError):
        raise
    except Exception as error:  # a config that fits its class and not itself
        raise LayerFusionError(
            f"the backbone in {name_or_path} cannot be built from its config: {type(error).__name__}: {error}"
        ) from error
    return model_class


@contextmanager
def _building_limit(saved: Sequence[StoredTensor]) -> Iterator[None]:
    """Stop whatever builds modules with more or larger parameters and buffers than the saved ones explain."""
    elements = sum(entry.num_elements for entry in saved) + _UNSAVED_ELEMENTS
    tensors = len(saved) * _TENSORS_PER_SAVED + _UNSAVED_TENSORS

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal elements, tensors
        if tensor is not None:
            elements -= tensor.numel()
            tensors -= 1
        if elements < 0 or tensors < 0:
            raise LayerFusionError(
                "the config of the bundled backbone asks for more weights than the checkpoint holds"
            )

    hooks = [
        nn.modules.module.register_module_parameter_registration_hook(count),
        nn.modules.module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_pin(name_or_path: str, pinned: str) -> None:
    """Refuse a head from the Hub that names a folder of this machine: a stranger does not say what is opened here.

    A head that was saved here may, and so may one that was copied here: whoever put its folder there meant it.
    """
    if is_from_the_hub(name_or_path) and hub_id(pinned) is None:
        what = "a folder of this machine" if Path(pinned).is_dir() else "no repository of the Hub"
        raise LayerFusionError(
            f"head {name_or_path} names its backbone {reprlib.repr(pinned)}, which is {what}: pass the one you mean as "
            "backbone="
        )


def _check_quantization(settings: Any) -> None:
    """Refuse settings that no weights can be brought into while they are loaded."""
    method = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    method = getattr(method, "value", method)
    if method not in _QUANTIZED_WHILE_LOADING:
        raise LayerFusionError(
            f"this head's backbone is quantised by {reprlib.repr(method)}: load it yourself and pass it as backbone="
        )


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The part of `from_pretrained`'s arguments that says where files come from."""
    names = ("revision", "subfolder", *(name for name in HUB_OPTIONS if name != "trust_remote_code"))
    return {name: kwargs[name] for name in names if name in kwargs}


def verify_weights(configs: Mapping[str, LayerFusionConfig], backbone: PreTrainedModel, strict: bool) -> None:
    """Compare a backbone's weights with the fingerprints in the configs of heads, by their names.

    Raises:
        LayerFusionError: naming the parts that differ, if `strict`; otherwise that is a warning.
    """
    pins = [(name, config) for name, config in configs.items() if config.backbone_fingerprint is not None]
    if not pins:
        return
    found = WeightFingerprint.of(backbone)  # takes seconds for a large backbone, however many heads there are
    for name, config in pins:
        pinned = WeightFingerprint.from_dict(config.backbone_fingerprint or {})
        if found.kind != pinned.kind:
            logger.warning(
                f"this head was trained on a {pinned.kind} backbone and is given a {found.kind} one: "
                "their weights cannot be compared"
            )
        elif difference := pinned.difference(found):
            head = f"head {name}: " if len(configs) > 1 else ""
            message = (
                f"{head}this is not the backbone that the head was trained on ({config.backbone_name_or_path}, revision "
                f"{config.backbone_revision}): {difference}"
            )
            if strict:
                raise LayerFusionError(message + "; pass the right one as backbone=, or verify_backbone=False")
            logger.warning(message)
