"""From a tap `(layer, module)` to the activation inside a backbone.

Activations inside blocks are read by forward hooks that hand each one to the caller at once, so memory does not grow
with depth. Where layers are stages and not single blocks, their outputs come from `output_hidden_states`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .anatomy import Block, blocks_by_layer, find_blocks
from .errors import LayerFusionError
from .layout import TokenLayout
from .model_classes import pixel_argument

_IMAGE_ARGUMENTS = ("pixel_values", "pixel_values_videos", "image")

Tap = tuple[int, str]
Reduce = Callable[[Tap, Tensor], Tensor]

# Where an activation inside a block is found: the part of the block, and whether it goes in or comes out. The first
# residual has no module of its own, and a gated activation none either.
_ENDS = {
    "ln1": ("ln1", "output"),
    "attention": ("attention", "output"),
    "residual": ("ln2", "input"),
    "ln2": ("ln2", "output"),
    "fc1": ("fc1", "output"),
    "activation": ("fc2", "input"),
    "fc2": ("fc2", "output"),
}


def read_taps(
    backbone: PreTrainedModel,
    layout: TokenLayout,
    taps: Iterable[Tap],
    reduce: Reduce,
    pixel_values: Tensor,
    **backbone_kwargs: Any,
) -> dict[Tap, Tensor]:
    """Run the backbone once and return `reduce(tap, activation)` for every tap.

    Args:
        layout: of the backbone, as `describe_backbone` measured it.
        taps: `(layer, module)` pairs; layer 0 is the embedding output. `"final_norm"` is the backbone's last norm
            applied to every token of the last block's output, also where the model itself applies it to CLS only.
        reduce: called as soon as the activation exists; what it returns is all that is kept.
        pixel_values: `(B, 3, H, W)`, or what else the backbone takes (clips, packed patches).
        backbone_kwargs: passed to the backbone's forward.

    Raises:
        LayerFusionError: if the backbone has no such activation, or cannot read these inputs.
    """
    taps = list(taps)
    for layer, module in taps:
        if not layout.width(layer, module):
            raise LayerFusionError(_absent(backbone, layout, layer, module))
    captured: dict[Tap, Tensor] = {}

    def keep(tap: Tap) -> Callable[[Any], None]:
        def callback(value: Any) -> None:
            captured[tap] = reduce(tap, first_tensor(value))

        return callback

    def keep_last(value: Any) -> None:
        last = first_tensor(value)
        if (tap := (layout.num_layers, "block")) in taps:
            captured[tap] = reduce(tap, last)
        if (tap := (layout.num_layers, "final_norm")) in taps:
            captured[tap] = reduce(tap, _final_norm(backbone, layout)(last))

    blocks = _layer_blocks(backbone, layout)
    inputs: list[tuple[str, Callable]] = []
    outputs: list[tuple[str, Callable]] = []
    by_stage = layout.reading == "hidden_states"
    reads_last = any(tap in taps for tap in ((layout.num_layers, "block"), (layout.num_layers, "final_norm")))
    for tap in taps:
        layer, module = tap
        if module == "attention" and layout.attention_in_windows:
            block = blocks[layer - 1]
            branch = _BranchReader(keep(tap))
            inputs += [(block.path, branch.enter), (f"{block.path}.{block.parts['ln2']}", branch.leave)]
        elif module in _ENDS:
            part, end = _ENDS[module]
            path = f"{blocks[layer - 1].path}.{blocks[layer - 1].parts[part]}"
            (inputs if end == "input" else outputs).append((path, keep(tap)))
        elif module == "block" and not by_stage and layer < layout.num_layers:
            (outputs if layer else inputs).append((blocks[max(layer, 1) - 1].path, keep(tap)))
    if reads_last and not by_stage:
        outputs.append((blocks[-1].path, keep_last))
    arguments = forward_arguments(backbone, pixel_values, backbone_kwargs, layout.image_size)
    wants_hidden_states = by_stage and any(module in ("block", "final_norm") for _, module in taps)
    try:
        result = run_backbone(backbone, arguments, inputs, outputs, wants_hidden_states)
    except (AssertionError, RuntimeError, ValueError) as error:
        is_ours = isinstance(error, LayerFusionError | torch.OutOfMemoryError)
        if is_ours or _is_native(pixel_values, layout.image_size):
            raise
        raise LayerFusionError(
            f"{type(backbone).__name__} cannot read images of {_pixels(pixel_values.shape[-2:])}: {error}; "
            f"its own size is {_pixels(layout.image_size)}"
        ) from error
    if by_stage:
        for layer, module in taps:
            if module == "block" and layer < layout.num_layers:
                keep((layer, module))(result.hidden_states[layer - 1 + layout.first_hidden_state])
        if reads_last:
            keep_last(result.hidden_states[layout.num_layers - 1 + layout.first_hidden_state])
    if (tap := (layout.num_layers, "pooler")) in taps:
        captured[tap] = reduce(tap, pooled_vector(result))
    if lacking := [tap for tap in taps if tap not in captured]:
        raise LayerFusionError(
            f"the activation of {lacking[0][1]!r} at layer {lacking[0][0]} of {type(backbone).__name__} was not seen: were "
            "its blocks compiled one by one, or replaced? Compile the whole backbone instead"
        )
    return captured


def _absent(backbone: PreTrainedModel, layout: TokenLayout, layer: int, module: str) -> str:
    name = type(backbone).__name__
    if not 0 <= layer <= layout.num_layers:
        return f"layer {layer} cannot be read: {name} has layers 0 to {layout.num_layers}"
    here = [known for known in layout.modules if layout.width(layer, known)]
    return f"module {module!r} cannot be read at layer {layer} of {name}: choose from {here}"


def _layer_blocks(backbone: PreTrainedModel, layout: TokenLayout) -> list[Block]:
    blocks = blocks_by_layer(find_blocks(backbone, layout.tower), layout.num_layers)
    if blocks is None and layout.reading == "blocks":
        raise LayerFusionError(
            f"the {layout.num_layers} blocks of {type(backbone).__name__} are not where they were when this head was "
            "made: use the version of transformers that it was made with"
        )
    return [stage[-1] for stage in blocks or ()]


def _final_norm(backbone: PreTrainedModel, layout: TokenLayout) -> nn.Module:
    try:
        return backbone.get_submodule(str(layout.final_norm))
    except AttributeError as error:
        raise LayerFusionError(
            f"{type(backbone).__name__} has no {layout.final_norm!r}, the norm that this head was made with: "
            "use the version of transformers that it was made with"
        ) from error


class _BranchReader:
    """The difference between the stream behind a branch and before it."""

    def __init__(self, callback: Callable[[Any], None]):
        self.callback = callback

    def enter(self, value: Any) -> None:
        self.before = first_tensor(value)

    def leave(self, value: Any) -> None:
        self.callback(first_tensor(value).reshape(self.before.shape) - self.before)
        del self.before


def first_tensor(value: Any) -> Tensor:
    """The activation in what a module takes or returns: alone, first in a tuple, or in a model output."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


def pooled_vector(outputs: Any) -> Tensor:
    """The model's own pooled vector `(B, D)`; poolers of convolutional families return `(B, D, 1, 1)`."""
    return outputs.pooler_output.flatten(1)


def forward_arguments(
    backbone: PreTrainedModel,
    pixel_values: Tensor,
    kwargs: dict[str, Any],
    native_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Arguments of the backbone's forward for these pixels."""
    name = pixel_argument(backbone)
    if name is None:
        raise LayerFusionError(f"{type(backbone).__name__} takes no pixels: it is not a vision backbone")
    if name not in _IMAGE_ARGUMENTS:
        raise LayerFusionError(f"{type(backbone).__name__} takes packed patches ({name}), not images: not supported")
    if backbone.config.model_type == "xclip_vision_model" and pixel_values.ndim == 5:
        pixel_values = pixel_values.flatten(0, 1)  # clips (B, T, 3, H, W); it takes their frames in the batch axis
    arguments = {name: pixel_values.to(backbone.dtype), **kwargs}
    # Some forwards swallow unknown arguments silently, so these are given only where they are named.
    named = inspect.signature(backbone.forward).parameters
    if "interpolate_pos_encoding" in named and not _is_native(pixel_values, native_size):
        arguments.setdefault("interpolate_pos_encoding", True)
    if "noise" in named and _masks(backbone):
        # Masked autoencoders order their patches by this noise; ascending noise keeps them in place.
        patch = backbone.config.patch_size
        num_patches = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
        noise = torch.arange(num_patches, dtype=torch.float32, device=pixel_values.device)
        arguments.setdefault("noise", noise.expand(pixel_values.shape[0], -1))
    required = [
        parameter.name
        for parameter in named.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in arguments
    ]
    if required:
        raise LayerFusionError(
            f"{type(backbone).__name__} needs {', '.join(required)} beside {name}: it does not read plain images "
            "(B, 3, H, W), and is not supported"
        )
    return arguments


def _is_native(pixel_values: Tensor, native_size: tuple[int, int] | None) -> bool:
    return native_size is None or pixel_values.ndim < 4 or tuple(pixel_values.shape[-2:]) == native_size


def _pixels(size: Any) -> str:
    return f"{size[0]} x {size[1]} px"


def _masks(backbone: PreTrainedModel) -> bool:
    return backbone.config.model_type == "vit_mae"


@contextmanager
def _whole_images(backbone: PreTrainedModel) -> Iterator[None]:
    """Masking off: a masked autoencoder hides patches in eval mode too."""
    if not _masks(backbone):
        yield
        return
    ratio = backbone.config.mask_ratio
    backbone.config.mask_ratio = 0.0
    try:
        yield
    finally:
        backbone.config.mask_ratio = ratio


def run_backbone(
    backbone: PreTrainedModel,
    arguments: dict[str, Any],
    on_inputs: Iterable[tuple[str, Callable[[Any], None]]] = (),
    on_outputs: Iterable[tuple[str, Callable[[Any], None]]] = (),
    output_hidden_states: bool = False,
) -> Any:
    """One forward pass, with callbacks for what goes into and comes out of submodules, by path.

    Raises:
        LayerFusionError: if the backbone cannot read these inputs, or returns no hidden states although asked.
    """

    def before(callback: Callable[[Any], None]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            callback(args[0] if args else kwargs.get("hidden_states", kwargs))

        return hook

    def after(callback: Callable[[Any], None]) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            callback(output)

        return hook

    handles = []
    options = {"output_hidden_states": True} if output_hidden_states else {}
    try:
        for path, callback in on_inputs:
            module = backbone.get_submodule(path)
            handles.append(module.register_forward_pre_hook(before(callback), with_kwargs=True))
        for path, callback in on_outputs:
            handles.append(backbone.get_submodule(path).register_forward_hook(after(callback)))
        with _whole_images(backbone):
            outputs = backbone(**arguments, **options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise LayerFusionError(
            f"{type(backbone).__name__} cannot be read from {', '.join([*arguments, *options])}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if output_hidden_states and not getattr(outputs, "hidden_states", None):
        raise LayerFusionError(
            f"{type(backbone).__name__} returns no hidden states, so its layers cannot be read: "
            "use a backbone whose forward supports output_hidden_states"
        )
    return outputs
