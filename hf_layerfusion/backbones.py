"""Open, describe, freeze and recognise a backbone."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available, logging
from transformers.utils.hub import extract_commit_hash

from .errors import LayerFusionError
from .model_classes import backbone_class_of, vision_config_of, vision_tower_of

# A pooler reads the last hidden state, so no tap ever depends on it; in many checkpoints it is missing and random.
POOLER_PREFIX = "pooler."

ADAPTER_CONFIG = "adapter_config.json"

# What decides the repository a file comes from, for every loading call of this library.
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "trust_remote_code", "force_download")

# Arguments of `from_backbone` and `from_pretrained` that concern the backbone's weights, not the head.
LOADING_OPTIONS = (
    *("dtype", "device_map", "max_memory", "offload_folder", "offload_buffers"),
    *("attn_implementation", "quantization_config"),
)
BACKBONE_OPTIONS = (*HUB_OPTIONS, *LOADING_OPTIONS)

_VIT_PROCESSOR_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)

logger = logging.get_logger(__name__)


@dataclass
class OpenedBackbone:
    """A backbone in memory, and where it came from.

    Attributes:
        model: the backbone, in eval mode.
        name_or_path: Hub id or absolute folder, `None` for a model built in memory.
        revision: the commit the weights came from, `None` off the Hub.
        image_processor: the processor stored beside the weights, `None` if there is none.
    """

    model: PreTrainedModel
    name_or_path: str | None
    revision: str | None
    image_processor: Any | None


@dataclass(frozen=True)
class WeightFingerprint:
    """SHA-256 over a backbone's weights: names, shapes, dtypes and bytes, the pooler left out.

    Attributes:
        dtype: of the weights it was taken from; fingerprints of different dtypes cannot be compared.
        digest: over all parts.
        parts: a short digest per part (`embeddings`, `layers.0`, ...), so that a mismatch can be located.
        quantization: the method (`bitsandbytes`, `torchao`, ...); weights of different ones cannot be compared either.
    """

    dtype: str
    digest: str
    parts: dict[str, str]
    quantization: str | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> WeightFingerprint:
        hashes: dict[str, Any] = {}
        for name, tensor in _plain_tensors(model):
            if name.startswith(POOLER_PREFIX):
                continue
            part = hashes.setdefault(_part_of(name), hashlib.sha256())
            part.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            part.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        parts = {part: digest.hexdigest()[:16] for part, digest in hashes.items()}
        whole = hashlib.sha256("".join(digest.hexdigest() for digest in hashes.values()).encode())
        return cls(str(model.dtype).removeprefix("torch."), whole.hexdigest(), parts, quantization_of(model))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WeightFingerprint:
        return cls(values["dtype"], values["digest"], dict(values["parts"]), values.get("quantization"))

    @property
    def kind(self) -> str:
        """What must be the same for two fingerprints to be comparable, in words."""
        return self.dtype if self.quantization is None else f"{self.dtype} {self.quantization}-quantised"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def difference(self, other: WeightFingerprint) -> str | None:
        """Which parts differ, in words; `None` if the weights are the same."""
        if self.digest == other.digest:
            return None
        missing = sorted(self.parts.keys() - other.parts.keys())
        added = sorted(other.parts.keys() - self.parts.keys())
        changed = sorted(p for p in self.parts.keys() & other.parts.keys() if self.parts[p] != other.parts[p])
        words = [f"{len(changed)} of {len(self.parts)} parts have other weights ({_some(changed)})"] if changed else []
        words += [f"parts missing: {_some(missing)}"] if missing else []
        words += [f"parts added: {_some(added)}"] if added else []
        return "; ".join(words)


def _plain_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The state dict by name; offloaded weights are fetched one at a time, quantised ones taken apart."""
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            owner, _, own_name = name.rpartition(".")
            module = model.get_submodule(owner)
            with align_module_device(module, "cpu"):
                tensor = module.state_dict()[own_name]
        yield from _taken_apart(name, tensor)


def _taken_apart(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor subclass (a torchao weight) is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for attribute in flatten()[0]:
        yield from _taken_apart(f"{name}.{attribute}", getattr(tensor, attribute))


def quantization_of(model: PreTrainedModel) -> str | None:
    """The quantisation method of a model's weights, `None` for plain weights."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    method = settings["quant_method"] if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def execution_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its inputs: of an offloaded model, the device that its weights are brought to."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return model.device if device is None else torch.device(device)


def _part_of(name: str) -> str:
    """`encoder.layer.3.norm1.weight` belongs to `encoder.layer.3`, `layernorm.weight` to `layernorm`."""
    pieces = name.split(".")
    for position, piece in enumerate(pieces):
        if piece.isdigit():
            return ".".join(pieces[: position + 1])
    return pieces[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_backbone(
    backbone: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    image_processor: Any | None = None,
    **kwargs: Any,
) -> OpenedBackbone:
    """Open a backbone by Hub id, folder or instance; of an image-text model, its vision tower.

    A PEFT model is opened with its adapters active; so is the id or folder of an adapter, on the base that it names.

    Args:
        revision: branch, tag or commit; what it resolves to is recorded.
        image_processor: used instead of the one stored beside the weights.
        kwargs: for `AutoModel.from_pretrained` (`dtype`, `device_map`, `attn_implementation`, `token`, ...).

    Raises:
        LayerFusionError: if it cannot be found, or if its checkpoint lacks weights that a tap would read.
    """
    if not isinstance(backbone, str | Path):
        backbone = unwrap_backbone(backbone)
        if kwargs:
            raise LayerFusionError(f"{sorted(kwargs)} can only be given when the backbone is a Hub id or a folder")
        # The base's name alone does not give the weights of an adapted model.
        name = None if has_adapters(backbone) else backbone.name_or_path or None
        if name is not None and Path(name).is_dir():
            name = str(Path(name).resolve())  # a relative path means nothing from another folder
        return OpenedBackbone(vision_tower_of(backbone).eval(), name, revision, image_processor)
    name = str(backbone)
    hub_kwargs = {k: kwargs[k] for k in HUB_OPTIONS if k in kwargs}
    is_folder = Path(name).is_dir()
    if is_folder:
        name = str(Path(name).resolve())
        if not any(Path(name, file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise LayerFusionError(f"backbone folder {name} holds no config.json: is it a saved transformers model?")
    else:
        try:
            options = {"revision": revision, **_without_remote_code(hub_kwargs)}
            config_file = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False, **options)
            config_file = config_file or cached_file(name, ADAPTER_CONFIG, **options)
        except OSError as error:
            raise LayerFusionError(
                f"backbone {name!r} is neither a folder nor a Hub model that can be reached: {error}"
            ) from error
        revision = extract_commit_hash(config_file, None) or revision
    model = _load_model(name, revision, hub_kwargs, kwargs)
    if image_processor is None:
        image_processor = open_image_processor(name, {"revision": revision, **hub_kwargs})
    return OpenedBackbone(model, name, None if is_folder else revision, image_processor)


def unwrap_backbone(backbone: Any) -> PreTrainedModel:
    """The transformers model in what a caller gave: a model, or a PEFT model around one, whose adapters stay active.

    Raises:
        LayerFusionError: for anything else, and for PEFT methods that act outside the model.
    """
    model = backbone
    if not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config"):
        if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
            raise LayerFusionError(
                "PEFT prompt learning acts outside the backbone: use adapters inside it, such as LoRA"
            )
        model = model.base_model.model  # a PeftModel holds a tuner, which holds the model that it changed
    if not isinstance(model, PreTrainedModel):
        raise LayerFusionError(
            f"backbone is a {type(backbone).__name__}: give a Hub id, a folder, a transformers model or a PEFT model"
        )
    return model


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether PEFT adapters stand in a model."""
    if "peft" not in sys.modules:  # not imported, so it cannot have changed a model; importing it takes seconds
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _load_model(
    name: str, revision: str | None, hub_kwargs: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    base = _base_of_adapter(name, revision, hub_kwargs)
    # transformers would otherwise ask on the terminal whether code of the repository may be run.
    hub_kwargs = {"trust_remote_code": False, **hub_kwargs}
    try:
        # Of an adapter, transformers opens the base that it names, and then loads the adapter into it.
        whole_config: Any = AutoConfig.from_pretrained(
            base or name, **({} if base else {"revision": revision}), **hub_kwargs
        )
    except (OSError, ValueError, ImportError) as error:
        raise LayerFusionError(f"the config.json of backbone {base or name!r} cannot be used: {error}") from error
    if getattr(whole_config, "quantization_config", None) is not None:
        # What is quantised on disk brings its settings along; transformers takes no second ones.
        kwargs = {key: value for key, value in kwargs.items() if key != "quantization_config"}
    config = vision_config_of(whole_config)
    model_class: Any = backbone_class_of(config)
    if model_class is None:
        if not getattr(whole_config, "auto_map", None):
            raise LayerFusionError(
                f"backbone {name!r} is of type {config.model_type!r}, which turns no pixels into hidden states: "
                "use a vision model, or an image-text model with a vision tower"
            )
        model_class = AutoModel  # the repository's own code; transformers asks for trust_remote_code
    model, info = _read_weights(model_class, name, config, revision, kwargs, is_part=config is not whole_config)
    if config is not whole_config and _lacking(info):
        # transformers takes the prefix of the tower's weights off for some composites only. Of the others, all is
        # loaded, and all but the tower dropped.
        architectures = getattr(whole_config, "architectures", None) or [None]
        named = getattr(transformers, str(architectures[0]), None)
        whole_class = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else AutoModel
        whole, info = _read_weights(whole_class, name, whole_config, revision, kwargs)
        model = vision_tower_of(whole)
        path = next(path for path, module in whole.named_modules() if module is model)
        refuse_lacking(f"the checkpoint of {name!r}", model, info, within=f"{path}." if path else "")
    else:
        refuse_lacking(f"the checkpoint of {name!r}", model, info)
    return vision_tower_of(model).eval()


def _read_weights(
    model_class: Any, name: str, config: Any, revision: str | None, kwargs: dict[str, Any], is_part: bool = False
) -> tuple[Any, dict[str, Any]]:
    """A model and transformers' loading report, which is not printed if the model is a part of the checkpoint."""
    verbosity = logging.get_verbosity()
    if is_part:
        logging.set_verbosity_error()
    try:
        return model_class.from_pretrained(
            name,
            config=config,
            revision=revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by `refuse_lacking`, by name
            **pooler_kwargs(config),
            **kwargs,
        )
    except (OSError, SafetensorError) as error:
        raise LayerFusionError(f"the weights of backbone {name!r} cannot be read: {error}") from error
    except (ImportError, ValueError, RuntimeError) as error:
        # A package that is not installed, or an option that this model or this machine does not support.
        chosen = ", ".join(f"{key}={kwargs[key]!r}" for key in LOADING_OPTIONS if key in kwargs)
        raise LayerFusionError(
            f"backbone {name!r} cannot be loaded{f' with {chosen}' if chosen else ''}: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _base_of_adapter(name: str, revision: str | None, hub_kwargs: dict[str, Any]) -> str | None:
    """The base model that a PEFT adapter names, if `name` holds an adapter and not a whole model."""
    options = {"revision": revision, **_without_remote_code(hub_kwargs)}
    file = find_adapter_config_file(name, **options)
    if file is None or Path(file).with_name("config.json").is_file():
        return None
    if not is_peft_available():
        raise LayerFusionError(f"{name} holds a PEFT adapter, which needs peft: pip install peft")
    return json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]


def build_backbone(config: Any) -> PreTrainedModel:
    """A backbone with random weights.

    Raises:
        LayerFusionError: if the config is not that of a vision backbone.
    """
    model_class: Any = backbone_class_of(config)
    if model_class is None:
        raise LayerFusionError(f"a {config.model_type!r} model turns no pixels into hidden states: it is no backbone")
    return model_class._from_config(config, **pooler_kwargs(config))


def refuse_lacking(
    checkpoint: str, model: PreTrainedModel, info: dict[str, Any], prefix: str = "", within: str = ""
) -> None:
    """Refuse a backbone some of whose weights were not in its checkpoint, by transformers' loading report.

    Args:
        prefix: of the tensors in the checkpoint, for the message.
        within: what the names of the backbone's tensors begin with in the report.

    Raises:
        LayerFusionError: naming the tensors.
    """
    lacking = [prefix + name for name in _lacking(info, within)]
    if lacking:
        raise LayerFusionError(
            f"{checkpoint} lacks or misshapes {len(lacking)} tensors of {type(model).__name__} "
            f"({_some(lacking)}): they would be random, so it is not used"
        )


def _lacking(info: dict[str, Any], within: str = "") -> list[str]:
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys", ())]
    names = [name.removeprefix(within) for name in {*info["missing_keys"], *mismatched} if name.startswith(within)]
    return sorted(name for name in names if not name.startswith(POOLER_PREFIX))


def _without_remote_code(hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hub_kwargs.items() if key != "trust_remote_code"}


def pooler_kwargs(config: Any) -> dict[str, bool]:
    """`{"add_pooling_layer": False}` where the model class takes it."""
    model_class = backbone_class_of(config)
    takes = model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if takes else {}


def open_image_processor(name: str, hub_kwargs: dict[str, Any]) -> Any | None:
    """The image processor stored in a Hub repository, a folder or a file, or `None` if there is none.

    Code that comes with it is not run, nor is anybody asked whether to, unless `trust_remote_code` is given.
    """
    hub_kwargs = {"trust_remote_code": False, **hub_kwargs}
    try:
        return AutoImageProcessor.from_pretrained(name, **hub_kwargs)
    except (OSError, ValueError):
        return None  # weights without a processor: the caller says how images become pixel_values
    except ImportError:  # no torchvision; some versions say so before they look for a processor
        try:
            return _pil_processor(name, hub_kwargs)
        except OSError:
            return None


def _pil_processor(name: str, hub_kwargs: dict[str, Any]) -> Any | None:
    """The processor's PIL variant where torchvision is missing, `None` for a type that transformers does not know.

    Some types (DINOv3's, for one) exist for torchvision only. ViT's PIL processor takes the same settings; what it
    computes differs by rounding.
    """
    settings, _ = ViTImageProcessorPil.get_image_processor_dict(name, **_without_remote_code(hub_kwargs))
    type_name = str(settings.get("image_processor_type")).removesuffix("Fast")
    pil_class = getattr(transformers, type_name + "Pil", None)
    if isinstance(pil_class, type) and issubclass(pil_class, BaseImageProcessor):
        return pil_class.from_dict(settings)
    if not {type_name, f"{type_name}Fast"} & {*dir(transformers)}:
        return None
    logger.warning(f"{type_name} needs torchvision, which is not installed: ViTImageProcessorPil stands in for it")
    return ViTImageProcessorPil(**{k: v for k, v in settings.items() if k in _VIT_PROCESSOR_SETTINGS})
