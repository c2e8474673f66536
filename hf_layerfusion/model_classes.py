"""Which model class turns images into hidden states, for a config of transformers."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

_PIXEL_ARGUMENTS = ("pixel_values", "pixel_values_videos", "image", "flattened_patches")

# A forward that takes one of these reads more than an image, or goes on to a task: text, prompts, audio, queries.
_FOREIGN_ARGUMENTS = (
    *("input_ids", "decoder_input_ids", "input_points", "prompt_pixel_values", "input_values", "input_features"),
    *("pixel_mask", "encoder_outputs", "labels"),
)

_TOWER_ENDINGS = ("Model", "Transformer", "Encoder", "Backbone")


def pixel_argument(model: PreTrainedModel | type[PreTrainedModel]) -> str | None:
    """The name of the forward's argument that takes the image, the video or their patches; `None` if there is none."""
    named = _forward_arguments(model if isinstance(model, type) else type(model))
    if "grid_thw" in named and "hidden_states" in named:
        return "hidden_states"  # the Qwen family and its relatives: patches of all images in one row
    return next((name for name in _PIXEL_ARGUMENTS if name in named), None)


def backbone_class_of(config: PreTrainedConfig | type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """The model class that turns an image into hidden states, for a config or a config class.

    It is what `AutoModel` opens, else what `AutoBackbone` opens, else the tower beside the config: some thirty vision
    towers are in no mapping of transformers.

    Returns:
        `None` if there is no such class: a text model, a composite (see `vision_config_of`), a detector, a type of
        which only task heads exist, or a config that transformers does not know.
    """
    config_class = config if isinstance(config, type) else type(config)
    for model_class in _candidates(config_class):
        if _is_task_head(model_class) or pixel_argument(model_class) is None:
            continue
        return None if _forward_arguments(model_class) & {*_FOREIGN_ARGUMENTS} else model_class
    return None


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the vision tower inside a composite or a task model; the config itself where there is none."""
    return _tower_config(config) or config


def vision_tower_of(model: PreTrainedModel) -> PreTrainedModel:
    """The backbone inside a model with a head, a composite or a task model; the model itself where there is none."""
    config = vision_config_of(model.config)
    tower_class = backbone_class_of(config)
    if tower_class is None or isinstance(model, tower_class):
        return model
    tower = next((module for module in model.modules() if isinstance(module, tower_class)), None)
    return tower or _in_own_class(model, tower_class, config) or model


def _in_own_class(
    model: PreTrainedModel, tower_class: type[PreTrainedModel], config: PreTrainedConfig
) -> PreTrainedModel | None:
    """The tower of a composite that holds less than the class that opens alone, put into that class.

    `SamModel` holds a `SamVisionEncoder`, where `SamVisionModel` is what opens alone: with the names of the latter, its
    weights can be recognised whichever way it was opened.
    """
    with torch.device("meta"):
        tower = tower_class(config)
    for name, child in tower.named_children():
        inside = [module for module in model.modules() if type(module) is type(child)]
        if len(inside) == 1:  # of two, the other may be a text tower's
            setattr(tower, name, inside[0])
    tensors = [*tower.parameters(), *tower.buffers()]
    return None if any(tensor.device.type == "meta" for tensor in tensors) else tower


def _tower_config(config: Any) -> PreTrainedConfig | None:
    if not isinstance(config, PreTrainedConfig):
        return None
    if backbone_class_of(config) is not None:
        return config
    # Not every config of remote code declares its parts.
    names = dict.fromkeys(["vision_config", *(type(config).sub_configs or {})])
    towers = (_tower_config(getattr(config, name, None)) for name in names)
    return next((tower for tower in towers if tower is not None), None)


def _candidates(config_class: type[PreTrainedConfig]) -> Iterator[type[PreTrainedModel]]:
    for mapping in (MODEL_MAPPING, MODEL_FOR_BACKBONE_MAPPING):
        try:
            mapped: Any = mapping.get(config_class, ())
        except (ImportError, ValueError):  # the class needs a package that is missing, or is named but does not exist
            continue
        mapped = mapped if isinstance(mapped, (tuple, list)) else (mapped,)
        # transformers puts a class of its own in the place of a model whose packages are missing.
        yield from (model_class for model_class in mapped if issubclass(model_class, PreTrainedModel))
    yield from _classes_beside(config_class)


def _classes_beside(config_class: type[PreTrainedConfig]) -> Iterator[type[PreTrainedModel]]:
    """Models of exactly this config in transformers' modeling module beside it, the likeliest tower first."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    if not name.startswith("transformers.models.") or name == config_class.__module__:
        return
    try:
        module = importlib.import_module(name)
    except ImportError:  # a config without a model of its own, or a package that is not installed
        return
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == name
        and _config_class_of(value) is config_class
        and value.__name__.endswith(_TOWER_ENDINGS)
    ]
    yield from sorted(classes, key=lambda value: not value.__name__.endswith("Model"))


def _config_class_of(model_class: type[PreTrainedModel]) -> Any:
    """The config its constructor takes: `config_class` may be inherited from the composite that a tower belongs to."""
    parameter = inspect.signature(model_class.__init__).parameters.get("config")
    annotation = parameter.annotation if parameter is not None else None
    is_config = isinstance(annotation, type) and issubclass(annotation, PreTrainedConfig)
    return annotation if is_config else model_class.config_class


def _is_task_head(model_class: type[PreTrainedModel]) -> bool:
    return re.search("For[A-Z]", model_class.__name__) is not None


def _forward_arguments(model_class: type[PreTrainedModel]) -> set[str]:
    return {*inspect.signature(model_class.forward).parameters}
