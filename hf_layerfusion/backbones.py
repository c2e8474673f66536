"""Open, describe, freeze and recognise a backbone."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .errors import LayerFusionError
from .pooling import TokenLayout
from .taps import count_layers, read_taps

# A pooler reads the last hidden state, so no tap ever depends on it; in many checkpoints it is missing and random.
POOLER_PREFIX = "pooler."

# What decides the repository a file comes from, for every loading call of this library.
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "trust_remote_code", "force_download")

# Arguments of `from_backbone` and `from_pretrained` that concern the backbone's weights, not the head.
BACKBONE_OPTIONS = (*HUB_OPTIONS, "dtype", "device_map", "attn_implementation", "quantization_config")

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
    """

    dtype: str
    digest: str
    parts: dict[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> WeightFingerprint:
        hashes: dict[str, Any] = {}
        for name, tensor in sorted(model.state_dict().items()):
            if name.startswith(POOLER_PREFIX):
                continue
            part = hashes.setdefault(_part_of(name), hashlib.sha256())
            part.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            part.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        parts = {part: digest.hexdigest()[:16] for part, digest in hashes.items()}
        whole = hashlib.sha256("".join(digest.hexdigest() for digest in hashes.values()).encode())
        return cls(str(model.dtype).removeprefix("torch."), whole.hexdigest(), parts)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WeightFingerprint:
        return cls(values["dtype"], values["digest"], dict(values["parts"]))

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

    Args:
        revision: branch, tag or commit; what it resolves to is recorded.
        image_processor: used instead of the one stored beside the weights.
        kwargs: for `AutoModel.from_pretrained` (`dtype`, `device_map`, `attn_implementation`, `token`, ...).

    Raises:
        LayerFusionError: if it cannot be found, or if its checkpoint lacks weights that a tap would read.
    """
    if isinstance(backbone, PreTrainedModel):
        if kwargs:
            raise LayerFusionError(f"{sorted(kwargs)} can only be given when the backbone is a Hub id or a folder")
        name = backbone.name_or_path or None
        if name is not None and Path(name).is_dir():
            name = str(Path(name).resolve())  # a relative path means nothing from another folder
        return OpenedBackbone(_tower_of(backbone).eval(), name, revision, image_processor)
    name = str(backbone)
    hub_kwargs = {k: kwargs[k] for k in HUB_OPTIONS if k in kwargs}
    is_folder = Path(name).is_dir()
    if is_folder:
        name = str(Path(name).resolve())
        if not Path(name, "config.json").is_file():
            raise LayerFusionError(f"backbone folder {name} holds no config.json: is it a saved transformers model?")
    else:
        try:
            config_file = cached_file(name, "config.json", revision=revision, **_without_remote_code(hub_kwargs))
        except OSError as error:
            raise LayerFusionError(
                f"backbone {name!r} is neither a folder nor a Hub model that can be reached: {error}"
            ) from error
        revision = extract_commit_hash(config_file, None) or revision
    model = _load_model(name, revision, hub_kwargs, kwargs)
    if image_processor is None:
        image_processor = open_image_processor(name, {"revision": revision, **hub_kwargs})
    return OpenedBackbone(model, name, None if is_folder else revision, image_processor)


def _tower_of(model: PreTrainedModel) -> PreTrainedModel:
    """The backbone inside a model with a head, or the vision tower of an image-text model; else the model itself."""
    config: Any = getattr(model.config, "vision_config", model.config)
    tower_class: Any = MODEL_MAPPING.get(type(config), None)
    if tower_class is None or isinstance(model, tower_class):
        return model
    return next((module for module in model.modules() if isinstance(module, tower_class)), model)


def _load_model(
    name: str, revision: str | None, hub_kwargs: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise LayerFusionError(f"the config.json of backbone {name!r} cannot be used: {error}") from error
    config = getattr(config, "vision_config", config)
    try:
        model, info = AutoModel.from_pretrained(
            name,
            config=config,
            revision=revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **pooler_kwargs(config),
            **kwargs,
        )
    except (OSError, SafetensorError) as error:
        raise LayerFusionError(f"the weights of backbone {name!r} cannot be read: {error}") from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise LayerFusionError(
            f"backbone {name!r} is of type {config.model_type!r}, which AutoModel cannot open: "
            "load it yourself and pass the model instance"
        ) from error
    refuse_lacking(f"the checkpoint of {name!r}", model, info)
    return model.eval()


def refuse_lacking(checkpoint: str, model: PreTrainedModel, info: dict[str, Any], prefix: str = "") -> None:
    """Refuse a backbone some of whose weights were not in its checkpoint, by transformers' loading report.

    Raises:
        LayerFusionError: naming the tensors.
    """
    lacking = sorted(
        prefix + key for key in {*info["missing_keys"], *_mismatched_names(info)} if not key.startswith(POOLER_PREFIX)
    )
    if lacking:
        raise LayerFusionError(
            f"{checkpoint} lacks or misshapes {len(lacking)} tensors of {type(model).__name__} "
            f"({_some(lacking)}): they would be random, so it is not used"
        )


def _without_remote_code(hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hub_kwargs.items() if key != "trust_remote_code"}


def _mismatched_names(info: dict[str, Any]) -> list[str]:
    return [entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys", ())]


def pooler_kwargs(config: Any) -> dict[str, bool]:
    """`{"add_pooling_layer": False}` where the model class takes it."""
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    takes = model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters
    return {"add_pooling_layer": False} if takes else {}


def open_image_processor(name: str, hub_kwargs: dict[str, Any]) -> Any | None:
    """The image processor stored in a Hub repository or folder, or `None` if there is none."""
    try:
        return AutoImageProcessor.from_pretrained(name, **hub_kwargs)
    except (OSError, ValueError):
        return None  # weights without a processor: the caller says how images become pixel_values
    except ImportError:  # no torchvision; some versions say so before they look for a processor
        try:
            return _pil_processor(name, hub_kwargs)
        except OSError:
            return None


def _pil_processor(name: str, hub_kwargs: dict[str, Any]) -> Any:
    """The processor's PIL variant where torchvision is missing.

    Some types (DINOv3's, for one) exist for torchvision only. ViT's PIL processor takes the same settings; what it
    computes differs by rounding.
    """
    settings, _ = ViTImageProcessorPil.get_image_processor_dict(name, **hub_kwargs)
    type_name = str(settings.get("image_processor_type")).removesuffix("Fast")
    pil_class = getattr(transformers, type_name + "Pil", None)
    if pil_class is not None:
        return pil_class.from_dict(settings)
    logger.warning(f"{type_name} needs torchvision, which is not installed: ViTImageProcessorPil stands in for it")
    return ViTImageProcessorPil(**{k: v for k, v in settings.items() if k in _VIT_PROCESSOR_SETTINGS})


def describe_backbone(backbone: PreTrainedModel) -> TokenLayout:
    """Measure the layout of a backbone's activations with one probing forward of two random images.

    Tokens of the embedding output that are the same for both images are special (CLS, registers, ...), wherever they
    stand.

    Raises:
        LayerFusionError: if it has no hidden states, or its layout cannot be told safely.
    """
    pixel_values = _probe_images(backbone)
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            num_layers = count_layers(backbone, pixel_values)
            taps = [(layer, "block") for layer in range(num_layers + 1)]
            shapes: dict[int, tuple[int, ...]] = {}

            def keep_shape(tap: tuple[int, str], activation: Tensor) -> Tensor:
                shapes[tap[0]] = tuple(activation.shape)
                return activation if tap[0] == 0 else activation.new_empty(0)

            first = read_taps(backbone, taps, keep_shape, pixel_values)[0, "block"]
    finally:
        backbone.train(was_training)
    kinds = {len(shape) for shape in shapes.values()}
    if kinds == {3}:
        return _describe_tokens(backbone, first, shapes, pixel_values)
    if kinds == {4}:
        votes = sum(shape[1] == shape[2] != shape[3] for shape in shapes.values())
        kind = "channels_last" if 2 * votes > len(shapes) else "channels_first"
        axis = 3 if kind == "channels_last" else 1
        return TokenLayout(kind, tuple(shapes[layer][axis] for layer in sorted(shapes)))
    raise LayerFusionError(
        f"the hidden states of {type(backbone).__name__} have shapes {sorted(set(shapes.values()))}, "
        "neither tokens (B, T, D) nor maps: this backbone is not supported yet"
    )


def _describe_tokens(
    backbone: PreTrainedModel, first: Tensor, shapes: dict[int, tuple[int, ...]], pixel_values: Tensor
) -> TokenLayout:
    widths = [shapes[layer][2] for layer in sorted(shapes)]
    special = torch.nonzero((first[0] == first[1]).all(dim=-1)).flatten().tolist()
    counts = [shapes[layer][1] for layer in sorted(shapes)]
    patch = getattr(backbone.config, "patch_size", None)
    batch = {shape[0] for shape in shapes.values()}
    plausible = batch == {2} and len(special) < counts[0]
    if len(set(counts)) > 1:
        plausible = plausible and not special and all(int(count**0.5) ** 2 == count for count in counts)
    elif isinstance(patch, int):
        plausible = plausible and counts[0] - len(special) == (pixel_values.shape[-2] // patch) * (
            pixel_values.shape[-1] // patch
        )
    if not plausible:
        raise LayerFusionError(
            f"cannot tell the patch tokens of {type(backbone).__name__}: its hidden states have shapes "
            f"{list(shapes.values())[:3]} and {len(special)} special tokens; this backbone is not supported yet"
        )
    return TokenLayout("tokens", tuple(widths), tuple(special))


def _probe_images(backbone: PreTrainedModel) -> Tensor:
    size = getattr(backbone.config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(backbone.config, "num_channels", None) or 3
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, height, width, generator=generator)
    return images.to(device=backbone.device, dtype=backbone.dtype)
