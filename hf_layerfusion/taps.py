"""From a tap `(layer, module)` to the activation inside a backbone.

A backbone of a known family is read by forward hooks that hand each activation to the caller at once, so memory does
not grow with depth. Any other backbone is read through `output_hidden_states`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import LayerFusionError

Tap = tuple[int, str]


@dataclass(frozen=True)
class BlockFamily:
    """Where the modules of a pre-norm transformer stand, as attribute paths."""

    blocks: str
    ln2: str
    final_norm: str


_VIT = BlockFamily(blocks="layers", ln2="layernorm_after", final_norm="layernorm")
_DINOV2 = BlockFamily(blocks="encoder.layer", ln2="norm2", final_norm="layernorm")
_CLIP = BlockFamily(blocks="encoder.layers", ln2="layer_norm2", final_norm="post_layernorm")

# By `config.model_type`. A family is listed here once its taps have been compared by value with the block's arithmetic.
FAMILIES = {
    "beit": _VIT,
    "clip_vision_model": _CLIP,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": BlockFamily(blocks="model.layer", ln2="norm2", final_norm="norm"),
    "siglip_vision_model": _CLIP,
    "vit": _VIT,
}


def family_of(backbone: PreTrainedModel) -> BlockFamily | None:
    """The backbone's family, or `None` where only hidden states can be read."""
    return FAMILIES.get(backbone.config.model_type)


def available_modules(backbone: PreTrainedModel) -> tuple[str, ...]:
    """The modules that `read_taps` can read in this backbone."""
    return ("block", "final_norm") if family_of(backbone) is None else ("block", "ln2", "final_norm")


def read_taps(
    backbone: PreTrainedModel,
    taps: Iterable[Tap],
    reduce: Callable[[Tap, Tensor], Tensor],
    pixel_values: Tensor,
    **backbone_kwargs: Any,
) -> dict[Tap, Tensor]:
    """Run the backbone once and return `reduce(tap, activation)` for every tap.

    Args:
        taps: `(layer, module)` pairs; layer 0 is the embedding output. `"final_norm"` is the backbone's last norm
            applied to every token of the last block's output, also where the model itself applies it to CLS only.
        reduce: called as soon as the activation exists; what it returns is all that is kept.
        pixel_values: `(B, 3, H, W)`.
        backbone_kwargs: passed to the backbone's forward.

    Raises:
        LayerFusionError: if the backbone has no such module, or returns no hidden states.
    """
    taps = list(taps)
    legal = available_modules(backbone)
    for _, module in taps:
        if module not in legal:
            raise LayerFusionError(
                f"module {module!r} cannot be read in a {backbone.config.model_type!r} backbone: choose from {legal}"
            )
    arguments = _forward_arguments(backbone, pixel_values, backbone_kwargs)
    family = family_of(backbone)
    if family is None:
        return _read_hidden_states(backbone, taps, reduce, arguments)
    return _read_hooks(backbone, family, taps, reduce, arguments)


def _forward_arguments(backbone: PreTrainedModel, pixel_values: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments = {"pixel_values": pixel_values.to(backbone.dtype), **kwargs}
    # Some forwards swallow unknown arguments silently, so interpolation is asked for only where it is named.
    named = inspect.signature(backbone.forward).parameters
    if "interpolate_pos_encoding" in named and not _is_native_size(backbone, pixel_values):
        arguments.setdefault("interpolate_pos_encoding", True)
    return arguments


def _is_native_size(backbone: PreTrainedModel, pixel_values: Tensor) -> bool:
    size = getattr(backbone.config, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else tuple(size or pixel_values.shape[-2:])
    return tuple(pixel_values.shape[-2:]) == (height, width)


def _blocks(backbone: PreTrainedModel, family: BlockFamily) -> nn.ModuleList:
    return cast(nn.ModuleList, backbone.get_submodule(family.blocks))


def _read_hooks(
    backbone: PreTrainedModel,
    family: BlockFamily,
    taps: list[Tap],
    reduce: Callable[[Tap, Tensor], Tensor],
    arguments: dict[str, Any],
) -> dict[Tap, Tensor]:
    captured: dict[Tap, Tensor] = {}
    handles = []
    blocks = _blocks(backbone, family)
    final_norm = backbone.get_submodule(family.final_norm)

    def on_input(tap: Tap) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            captured[tap] = reduce(tap, args[0] if args else kwargs["hidden_states"])

        return hook

    def on_output(tap: Tap) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            activation = output[0] if isinstance(output, tuple) else output
            captured[tap] = reduce(tap, final_norm(activation) if tap[1] == "final_norm" else activation)

        return hook

    if deepest := max((layer for layer, _ in taps if layer > len(blocks)), default=0):
        raise LayerFusionError(f"layer {deepest} cannot be read: this backbone has layers 0 to {len(blocks)}")
    try:
        for tap in taps:
            layer, module = tap
            if layer == 0:
                handles.append(blocks[0].register_forward_pre_hook(on_input(tap), with_kwargs=True))
            elif module == "ln2":
                handles.append(blocks[layer - 1].get_submodule(family.ln2).register_forward_hook(on_output(tap)))
            else:
                handles.append(blocks[layer - 1].register_forward_hook(on_output(tap)))
        backbone(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _read_hidden_states(
    backbone: PreTrainedModel,
    taps: list[Tap],
    reduce: Callable[[Tap, Tensor], Tensor],
    arguments: dict[str, Any],
) -> dict[Tap, Tensor]:
    outputs = _run_with_hidden_states(backbone, arguments)
    captured = {}
    for tap in taps:
        layer, module = tap
        activation = outputs.hidden_states[layer]
        if module == "final_norm":
            shape, activation = activation.shape, outputs.last_hidden_state
            if activation.shape != shape:
                raise LayerFusionError(
                    f"{type(backbone).__name__} returns a last_hidden_state of shape {tuple(activation.shape)} beside "
                    f"hidden states of {tuple(shape)}: use modules=['block'] with this backbone"
                )
        captured[tap] = reduce(tap, activation)
    return captured


def _run_with_hidden_states(backbone: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    try:
        outputs = backbone(**arguments, output_hidden_states=True, return_dict=True)
    except TypeError as error:
        raise LayerFusionError(
            f"{type(backbone).__name__} cannot be read from pixel_values with output_hidden_states=True: {error}"
        ) from error
    if not getattr(outputs, "hidden_states", None):
        raise LayerFusionError(
            f"{type(backbone).__name__} returns no hidden states, so its layers cannot be read: "
            "use a backbone whose forward supports output_hidden_states"
        )
    return outputs


def count_layers(backbone: PreTrainedModel, pixel_values: Tensor) -> int:
    """L: the number of hidden states after the embedding output.

    Raises:
        LayerFusionError: if the backbone returns no hidden states.
    """
    family = family_of(backbone)
    if family is not None:
        return len(_blocks(backbone, family))
    return len(_run_with_hidden_states(backbone, _forward_arguments(backbone, pixel_values, {})).hidden_states) - 1
