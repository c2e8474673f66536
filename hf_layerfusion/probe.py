"""Measure a backbone: one forward pass of two random images tells what its activations are.

Names suggest where things stand (`anatomy.py`); this pass decides. A module counts as a block's LN1 only if what goes
in is the block's input, as its LN2 only if what comes out goes into FC1, and so on. Tokens that two different images
share before the first block are special (CLS, distillation, registers), wherever they stand. What cannot be told
safely is an error that says how to state it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .anatomy import Block, blocks_by_layer, find_blocks, find_norms
from .backbones import execution_device, pooler_kwargs
from .errors import LayerFusionError
from .layout import TapLayout, TokenLayout
from .taps import first_tensor, forward_arguments, pooled_vector, run_backbone

BATCH_SIZE = 2

# Tokens of later stages are learned groups of patches: all of them are content, and none has a place on a grid.
_GROUPING = ("groupvit_vision_model",)


def describe_backbone(
    backbone: PreTrainedModel, *, num_prefix_tokens: int | None = None, grid_size: Sequence[int] | None = None
) -> TokenLayout:
    """Measure the layout of a backbone's activations.

    Args:
        num_prefix_tokens: states how many tokens stand before the patches, where that cannot be measured.
        grid_size: states the height and width of the patch grid, where that cannot be measured.

    Raises:
        LayerFusionError: if its layers cannot be read, its layout cannot be told safely, or what is stated contradicts
            what is measured.
    """
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            return _Probe(backbone, num_prefix_tokens, grid_size).describe()
    finally:
        for module, training in modes.items():
            module.training = training


def probe_arguments(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """Two random images at the backbone's native size, as its forward takes them."""
    config = backbone.config
    generator = torch.Generator().manual_seed(0)
    if _is_naflex(backbone):  # patches, not pixels
        side = math.isqrt(config.num_patches)
        patches = torch.randn(BATCH_SIZE, side * side, config.num_channels * config.patch_size**2, generator=generator)
        return {
            "pixel_values": patches.to(device=execution_device(backbone), dtype=backbone.dtype),
            "pixel_attention_mask": torch.ones(
                BATCH_SIZE, side * side, dtype=torch.int32, device=execution_device(backbone)
            ),
            "spatial_shapes": torch.tensor([[side, side]] * BATCH_SIZE, device=execution_device(backbone)),
        }
    shape = [_first_of(config, "num_channels", "in_channels") or 3, *image_size_of(backbone)]
    if frames := _num_frames(config):
        shape = [frames, *shape]
    images = torch.randn(BATCH_SIZE, *shape, generator=generator)
    return {"pixel_values": images.to(device=execution_device(backbone), dtype=backbone.dtype)}


def timm_model_of(backbone: PreTrainedModel) -> Any:
    """The timm model inside a `TimmWrapperModel`, whose config says nothing of layers or sizes; else `None`."""
    return getattr(backbone, "timm_model", None)


def image_size_of(backbone: PreTrainedModel) -> tuple[int, int]:
    """Height and width that a backbone was trained at; 224 where its config does not say."""
    config = backbone.config
    if (timm_model := timm_model_of(backbone)) is not None:
        size = getattr(getattr(timm_model, "patch_embed", None), "img_size", None)
        height, width = size or (timm_model.pretrained_cfg or {}).get("input_size", (3, 224, 224))[-2:]
        return int(height), int(width)
    for holder in (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None)):
        size = _first_of(holder, "image_size", "img_size", "crop_size")
        if isinstance(size, dict):
            size = (size["height"], size["width"])
        if size:
            return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))
    return (224, 224)


def _first_of(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _num_frames(config: Any) -> int | None:
    return _first_of(config, "num_frames", "frames_per_clip")


def _is_naflex(backbone: PreTrainedModel) -> bool:
    return backbone.config.model_type == "siglip2_vision_model"


@dataclass
class _Trace:
    """What was seen in one block during the probing pass."""

    calls: int = 0
    input: Tensor | None = None
    output: Tensor | None = None
    inside: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, tuple[str, int]] = field(default_factory=dict)  # module -> (kind, width)
    in_windows: bool = False


class _Probe:
    """One probing pass and what follows from it."""

    def __init__(self, backbone: PreTrainedModel, num_prefix_tokens: int | None, grid_size: Sequence[int] | None):
        self.backbone, self.name = backbone, type(backbone).__name__
        self.stated_prefix = num_prefix_tokens
        self.stated_grid = None if grid_size is None else (int(grid_size[0]), int(grid_size[1]))
        self.blocks = find_blocks(backbone)
        self.norms: dict[str, tuple[Tensor, ...]] = {}
        self.traces = {block.path: _Trace() for block in self.blocks}
        self.sums: dict[str, tuple[float, float]] = {}

    def describe(self) -> TokenLayout:
        self.inputs = probe_arguments(self.backbone)
        pixels = self.inputs["pixel_values"]
        self.image_size = None if _is_naflex(self.backbone) else (pixels.shape[-2], pixels.shape[-1])
        self.outputs = self._run()
        hidden = [first_tensor(state) for state in getattr(self.outputs, "hidden_states", None) or ()]
        seen = [*hidden, *(trace.output for trace in self.traces.values() if trace.output is not None)]
        if not all(torch.isfinite(state).all() for state in seen):
            # Nothing equals NaN, so no token would be found to be special.
            raise LayerFusionError(
                f"the activations of {self.name} are not finite: look for NaN in its weights, or use another dtype than "
                f"{self.backbone.dtype}"
            )
        if getattr(timm_model_of(self.backbone), "num_prefix_tokens", None) is not None:
            hidden = []  # timm hands out maps of the patches; its blocks give all tokens
        return self._describe_blocks(hidden) or self._describe_stages(hidden)

    # ---- the pass --------------------------------------------------------------------------------------------------

    def _run(self) -> Any:
        on_inputs: list[tuple[str, Callable]] = []
        on_outputs: list[tuple[str, Callable]] = []
        for block in self.blocks:
            trace = self.traces[block.path]
            on_inputs.append((block.path, _store_input(trace)))
            for part, path in block.parts.items():
                on_inputs.append((f"{block.path}.{path}", _store(trace, f"{part} input")))
                on_outputs.append((f"{block.path}.{path}", _store(trace, f"{part} output")))
            module = self.backbone.get_submodule(block.path)
            for name, _ in module.named_children():
                on_outputs.append((f"{block.path}.{name}", _store(trace, f"child {name}")))
            on_outputs.append((block.path, self._judge(block, trace)))
        for path in find_norms(self.backbone, self.blocks):
            on_inputs.append((path, self._store_norm(path)))
        for path, module in self.backbone.named_modules():
            if isinstance(module, nn.ModuleList | nn.Sequential):
                on_outputs += [(f"{path}.{name}", self._store_sums(f"{path}.{name}")) for name, _ in _named(module)]
        pixels = self.inputs["pixel_values"]
        others = {name: value for name, value in self.inputs.items() if name != "pixel_values"}
        arguments = forward_arguments(self.backbone, pixels, others, self.image_size)
        try:
            return run_backbone(self.backbone, {**arguments, "output_hidden_states": True}, on_inputs, on_outputs)
        except LayerFusionError:
            raise
        except Exception as error:
            # Whatever a model raises on the inputs that its own config describes, the user needs to know which model.
            raise LayerFusionError(
                f"{self.name} cannot be read from pixel_values of shape {tuple(pixels.shape)}: {error}"
            ) from error

    def _judge(self, block: Block, trace: _Trace) -> Callable[[Any], None]:
        def callback(value: Any) -> None:
            trace.calls += 1
            trace.output = first_tensor(value)
            trace.modules = _judge_block(self.backbone.get_submodule(block.path), block, trace)
            trace.inside = {}  # dropped block by block, so that memory does not grow with depth

        return callback

    def _store_norm(self, path: str) -> Callable[[Any], None]:
        def callback(value: Any) -> None:
            self.norms[path] = (*self.norms.get(path, ()), first_tensor(value))

        return callback

    def _store_sums(self, path: str) -> Callable[[Any], None]:
        def callback(value: Any) -> None:
            try:
                self.sums[path] = _sums(first_tensor(value))
            except (IndexError, KeyError, StopIteration, TypeError, AttributeError):
                self.sums.pop(path, None)  # a helper that returns no activation

        return callback

    # ---- layers that are blocks ------------------------------------------------------------------------------------

    def _describe_blocks(self, hidden: list[Tensor]) -> TokenLayout | None:
        """The layout if every layer is the output of one block; `None` if layers are something else."""
        towers = dict.fromkeys(["", *(block.path.rpartition(".")[0] + "." for block in self.blocks)])
        for tower in towers:
            traces = [self.traces[block.path] for block in self._blocks_in(tower)]
            if not traces or any(trace.calls != 1 for trace in traces):
                continue
            outputs = [first_tensor(trace.output) for trace in traces]
            first = _position_among(outputs, hidden) if hidden else 1
            if first is not None:
                layers = [first_tensor(traces[0].input), *outputs]
                return self._assemble(layers, [[trace] for trace in traces], "blocks", first, tower)
        return None

    def _blocks_in(self, tower: str) -> list[Block]:
        return [block for block in self.blocks if block.path.startswith(tower)]

    # ---- layers that are stages ------------------------------------------------------------------------------------

    def _describe_stages(self, hidden: list[Tensor]) -> TokenLayout:
        if not hidden:
            raise LayerFusionError(
                f"{self.name} returns no hidden states, and its blocks could not be told, so its layers cannot be "
                "read: use a backbone whose forward supports output_hidden_states"
            )
        pixels = self.inputs["pixel_values"]
        is_image = hidden[0].shape == pixels.shape and torch.equal(hidden[0], pixels)
        # timm's features are the outputs of its stages, or of the stem as the first of them.
        is_timm = timm_model_of(self.backbone) is not None
        has_embeddings = not is_image and not is_timm and not self._is_list_of_stages(hidden)
        first = 1 if is_image or has_embeddings else 0
        layers = [hidden[0] if has_embeddings else hidden[0].new_empty(0), *hidden[first:]]
        if len(layers) < 2:
            raise LayerFusionError(f"{self.name} returns one hidden state only: it has no layers to read")
        by_layer = blocks_by_layer(self.blocks, len(layers) - 1) or []
        stages = [[self.traces[block.path] for block in stage] for stage in by_layer]
        return self._assemble(layers, stages, "hidden_states", first)

    def _is_list_of_stages(self, hidden: list[Tensor]) -> bool:
        """Whether the hidden states are the outputs of all modules of one list, so that none is the embedding's."""
        sums = [_sums(state) for state in hidden]
        for path, module in self.backbone.named_modules():
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == len(hidden):
                found = [self._sums_of(f"{path}.{name}", child) for name, child in _named(module)]
                if all(a is not None and _close(a, b) for a, b in zip(found, sums, strict=True)):
                    return True
        return False

    def _sums_of(self, path: str, module: nn.Module) -> tuple[float, float] | None:
        """Of a module's output; a list is never called, but its last module is."""
        if path not in self.sums and isinstance(module, nn.ModuleList) and len(module):
            name, child = _named(module)[-1]
            return self._sums_of(f"{path}.{name}", child)
        return self.sums.get(path)

    # ---- from activations to a layout ------------------------------------------------------------------------------

    def _assemble(
        self, layers: list[Tensor], stages: list[list[_Trace]], reading: str, first_hidden_state: int, tower: str = ""
    ) -> TokenLayout:
        present = [layer for layer in layers if layer.numel()]
        ranks = {layer.ndim for layer in present}
        if ranks == {3}:
            kind, axis = "tokens", 2
        elif ranks == {4}:
            kind = self._kind_of_maps(present)
            axis = 3 if kind == "channels_last" else 1
        else:
            raise self._unclear(layers, "neither tokens (B, T, D) nor maps")
        taps = {"block": TapLayout(kind, tuple(layer.shape[axis] if layer.numel() else 0 for layer in layers))}
        last_block = self._blocks_in(tower)[-1].path if reading == "blocks" else None
        batching = self._batching(present, last_block) if kind == "tokens" else "plain"
        counts = self._special_tokens(layers, stages, kind, batching)
        in_windows = any(trace.in_windows for trace in self.traces.values())
        for module in ("ln1", "attention", "residual", "ln2", "fc1", "activation", "fc2"):
            if (tap := self._inner_tap(module, stages, layers, kind, in_windows)) is not None:
                taps[module] = tap
        last, num_layers = layers[-1], len(layers) - 1
        grids = self._grids(layers, kind, batching, counts)
        final_norm = self._final_norm(last, counts["cls_token"])
        if final_norm is not None:
            taps["final_norm"] = TapLayout(kind, (*[0] * num_layers, taps["block"].widths[-1]))
        if (width := self._pooler_width()) is not None:
            taps["pooler"] = TapLayout("vector", (*[0] * num_layers, width))
        return TokenLayout(
            taps,
            grids=grids,
            image_size=self.image_size,
            reading=reading,
            tower=tower,
            first_hidden_state=first_hidden_state,
            final_norm=final_norm,
            attention_in_windows=in_windows and "attention" in taps,
            batching=batching,
            **counts,
        )

    def _inner_tap(
        self,
        module: str,
        stages: list[list[_Trace]],
        layers: Sequence[Tensor],
        kind: str,
        in_windows: bool,
    ) -> TapLayout | None:
        """A module inside the last block of every stage; `None` if no block has it, or not all in one form."""
        if self.backbone.config.model_type in _GROUPING:
            return None
        widths, kinds = [0], set()
        for layer, stage in zip(layers[1:], stages, strict=False):
            block = stage[-1]
            found = block.modules.get(module)
            if module == "attention" and in_windows and "residual" not in block.modules:
                found = None
            if found is not None and found[0] == "tokens" and kind == "tokens" and len(stages) != len(self.blocks):
                # Learned tokens that leave at the end of the stage would be taken for patches.
                stays = block.output is not None and layer.shape == block.output.shape
                found = found if stays or self._shared_entering(stage) == (0, 0) else None
            widths.append(0 if found is None else found[1])
            kinds |= set() if found is None else {found[0]}
        return TapLayout(kinds.pop(), tuple(widths)) if len(kinds) == 1 else None

    def _unclear(self, layers: Sequence[Tensor], why: str) -> LayerFusionError:
        shapes = [tuple(layer.shape) for layer in layers if layer.numel()]
        shown = ", ".join(map(str, dict.fromkeys(shapes)))
        return LayerFusionError(
            f"the activations of {self.name} have shapes {shown}: {why}; if you know the layout, state it with "
            "num_prefix_tokens= (tokens before the patches) and grid_size=(height, width)"
        )

    def _kind_of_maps(self, maps: Sequence[Tensor]) -> str:
        """Which axis holds the channels: the one that does not change when the image does."""
        pixels = self.inputs["pixel_values"]
        height, width = pixels.shape[-2:]
        kinds = set()
        for shape in [tuple(layer.shape) for layer in maps]:
            # Rows and columns are as many as the image's shape demands.
            is_last, is_first = shape[1] * width == shape[2] * height, shape[2] * width == shape[3] * height
            if is_last != is_first:
                kinds.add("channels_last" if is_last else "channels_first")
        if len(kinds) == 1 and height == width:
            return kinds.pop()
        larger = nn.functional.interpolate(pixels[:1], scale_factor=2)
        try:
            outputs = run_backbone(
                self.backbone, forward_arguments(self.backbone, larger, {}, self.image_size), output_hidden_states=True
            )
        except (RuntimeError, ValueError, LayerFusionError) as error:
            if len(kinds) == 1:
                return kinds.pop()
            raise self._unclear(maps, "it is not clear which axis holds the channels") from error
        before, after = maps[-1].shape, first_tensor(outputs.hidden_states[-1]).shape
        fixed = [axis for axis in (1, 3) if before[axis] == after[axis]]
        if len(fixed) != 1:
            raise self._unclear(maps, "it is not clear which axis holds the channels")
        return "channels_first" if fixed == [1] else "channels_last"

    def _batching(self, layers: Sequence[Tensor], last_block: str | None) -> str:
        """Where the images stand in tokens `(B, T, D)`: if not one in each row, each candidate is tried by value."""
        rows, columns = ({layer.shape[axis] for layer in layers} for axis in (0, 1))
        if rows == {BATCH_SIZE}:
            return "plain"
        candidates = []
        if rows == {1} and all(number % BATCH_SIZE == 0 for number in columns):
            candidates.append("packed")
        elif len(rows) == 1 and min(rows) % BATCH_SIZE == 0:
            candidates.append("windows")
        if columns == {BATCH_SIZE}:
            candidates.append("sequence_first")
        again = self._last_layer_of_one_image_twice(last_block)
        for batching in candidates:
            before, after = (_by_image(states, batching) for states in (layers[-1], again))
            # The first image stays where it is, the second one becomes the first.
            if _same(before[0], after[0]) and _same(before[0], after[1]) and not _same(before[0], before[1]):
                return batching
        raise self._unclear(layers, f"it is not clear where the {BATCH_SIZE} images stand")

    def _last_layer_of_one_image_twice(self, last_block: str | None) -> Tensor:
        """The last layer for a batch of the first probe image only: a block's output, or the last hidden state."""
        inputs = dict(self.inputs)
        pixels = inputs.pop("pixel_values")[:1]
        arguments = forward_arguments(self.backbone, torch.cat([pixels] * BATCH_SIZE), inputs, self.image_size)
        if last_block is None:
            return first_tensor(run_backbone(self.backbone, arguments, output_hidden_states=True).hidden_states[-1])
        kept: list[Any] = []
        run_backbone(self.backbone, arguments, on_outputs=[(last_block, kept.append)])
        return first_tensor(kept[0])

    def _special_tokens(
        self, layers: Sequence[Tensor], stages: list[list[_Trace]], kind: str, batching: str
    ) -> dict[str, Any]:
        """Tokens that both images share before attention mixes them, by layer; of maps, those inside their blocks."""
        counts: list[tuple[int, int]] = []
        for number, layer in enumerate(layers):
            stage = stages[number - 1] if stages and number else []
            if kind != "tokens":
                counts.append(self._shared_entering(stage))
            elif not layer.numel():
                counts.append((0, 0))
            elif number and layers[number - 1].numel() and layer.shape[:2] == layers[number - 1].shape[:2]:
                counts.append(counts[-1])
            else:
                # Where the number of tokens changes, a token may have joined: look at what goes into that layer.
                entering = stage[0].input if stage else None
                if entering is None or entering.shape[:2] != layer.shape[:2]:
                    entering = layer
                counts.append(self._shared_tokens(_by_image(entering, batching)))
        prefixes, suffixes = (list(numbers) for numbers in zip(*counts, strict=True))
        if self.stated_prefix is not None and kind != "tokens" and self.stated_prefix != max(prefixes):
            raise LayerFusionError(
                f"num_prefix_tokens={self.stated_prefix}, but the layers of {self.name} are maps: leave it out"
            )
        if self.stated_prefix is not None and kind == "tokens":
            measured = max(prefixes)
            present = [_by_image(layer, batching) for layer in layers if layer.numel()]
            num_patches = present[0].shape[1] - measured - max(suffixes)
            if self.stated_prefix > measured and num_patches == math.prod(self._patches_of_config() or (0,)):
                raise LayerFusionError(
                    f"num_prefix_tokens={self.stated_prefix}, but beside the {measured} that were measured the tokens of "
                    f"{self.name} are the {num_patches} patches of its config: leave it out"
                )
            if self.stated_prefix < measured:
                raise LayerFusionError(
                    f"num_prefix_tokens={self.stated_prefix}, but the first {measured} tokens of {self.name} are the "
                    "same for every image before the first block, so they are no patches"
                )
            prefixes = [self.stated_prefix] * len(layers)
        cls_token: int | None = None
        if batching != "windows" and not self._are_registers(max(prefixes) + max(suffixes)):
            # Several tokens behind the patches are queries of a later model, not a CLS token.
            cls_token = 0 if any(prefixes) else -1 if max(suffixes) == 1 else None
        return {
            "num_prefix_tokens": tuple(prefixes),
            "num_suffix_tokens": tuple(suffixes),
            "cls_token": cls_token,
        }

    def _shared_entering(self, stage: list[_Trace]) -> tuple[int, int]:
        """Shared tokens where the tokens enter a stage of blocks."""
        entering = stage[0].input if stage else None
        if entering is None or entering.ndim != 3 or entering.shape[0] != BATCH_SIZE:
            return 0, 0
        return self._shared_tokens(entering)

    def _shared_tokens(self, tokens: Tensor) -> tuple[int, int]:
        """How many tokens at the beginning and at the end are the same for both images; `tokens` is `(2, ..., T, D)`."""
        shared = (tokens[0] == tokens[1]).all(dim=-1)  # (..., T)
        shared = shared.reshape(-1, shared.shape[-1]).all(dim=0)
        if shared.all():
            raise LayerFusionError(
                f"the tokens of {self.name} are the same for two different images: is it a vision backbone, and are "
                "its weights finite?"
            )
        own = torch.nonzero(~shared).flatten()
        first, last = int(own[0]), int(own[-1])
        if shared[first : last + 1].any():
            raise LayerFusionError(
                f"special tokens of {self.name} stand among its patches (positions "
                f"{torch.nonzero(shared).flatten().tolist()[:5]}): this layout is not supported"
            )
        return first, len(shared) - 1 - last

    def _are_registers(self, num_special: int) -> bool:
        """Whether all special tokens are registers, so that none is a CLS."""
        registers = _first_of(self.backbone.config, "num_register_tokens", "num_registers", "num_reg_tokens")
        return registers is not None and registers == num_special

    def _grids(
        self, layers: Sequence[Tensor], kind: str, batching: str, counts: dict[str, Any]
    ) -> tuple[tuple[int, int] | None, ...]:
        if kind != "tokens":
            axes = (1, 2) if kind == "channels_last" else (2, 3)
            found = tuple((layer.shape[axes[0]], layer.shape[axes[1]]) if layer.numel() else None for layer in layers)
            if self.stated_grid is not None and set(found) - {None, self.stated_grid}:
                raise LayerFusionError(f"grid_size={self.stated_grid}, but the maps of {self.name} are {found}")
            return found
        is_clip = self.inputs["pixel_values"].ndim == 5
        if is_clip or batching == "windows" or self.backbone.config.model_type in _GROUPING:
            return (None,) * len(layers)
        grids: list[tuple[int, int] | None] = []
        for number, layer in enumerate(layers):
            if not layer.numel():
                grids.append(None)
                continue
            special = counts["num_prefix_tokens"][number] + counts["num_suffix_tokens"][number]
            num_tokens = _by_image(layer, batching).shape[1]
            grids.append(self._grid(num_tokens - special, special, layers))
        return tuple(grids)

    def _grid(self, num_patches: int, num_special: int, layers: Sequence[Tensor]) -> tuple[int, int]:
        if self.stated_grid is not None:
            if math.prod(self.stated_grid) != num_patches:
                raise LayerFusionError(
                    f"grid_size={self.stated_grid} has {math.prod(self.stated_grid)} places, but {self.name} has "
                    f"{num_patches} patch tokens beside {num_special} special ones"
                )
            return self.stated_grid
        patches = self._patches_of_config()
        if patches is not None and math.prod(patches) == num_patches:
            return patches
        height, width = self.image_size or (1, 1)
        # Patches may have been merged since, so any smaller grid of the image's shape will do.
        grid = (math.isqrt(num_patches * height // width), math.isqrt(num_patches * width // height))
        is_merged = patches is None or num_patches < math.prod(patches)
        if is_merged and math.prod(grid) == num_patches and grid[0] * width == grid[1] * height:
            return grid
        raise self._unclear(
            layers, f"{num_patches} patch tokens beside {num_special} special ones form no grid of the image's shape"
        )

    def _patches_of_config(self) -> tuple[int, int] | None:
        """The grid of patches that the config asks for, if it says how large they are."""
        patch = _first_of(self.backbone.config, "patch_stride", "patch_size")  # patches may overlap
        if isinstance(patch, int):
            patch = (patch, patch)
        if not isinstance(patch, tuple | list) or len(patch) != 2 or self.image_size is None:
            return None
        return self.image_size[0] // patch[0], self.image_size[1] // patch[1]

    def _final_norm(self, last: Tensor, cls_token: int | None) -> str | None:
        """The norm that reads the last layer: all of its tokens, or its CLS token alone, as in CLIP."""
        readers: dict[str, str] = {}
        for path, seen in self.norms.items():
            for value in seen:
                if _same(value, last):
                    readers.setdefault("tokens", path)
                elif cls_token is not None and _same(value, last[:, cls_token]):
                    readers.setdefault("cls", path)
        return readers.get("tokens") or readers.get("cls")

    def _pooler_width(self) -> int | None:
        pooled = getattr(self.outputs, "pooler_output", None)
        pooler = self.backbone._modules.get("pooler")
        # Poolers that are optional or learned are missing, or random, in many checkpoints.
        is_optional = bool(pooler_kwargs(self.backbone.config))
        is_learned = pooler is not None and any(True for _ in pooler.parameters())
        if not isinstance(pooled, Tensor) or is_optional or is_learned:
            return None
        vector = pooled_vector(self.outputs)
        return vector.shape[1] if vector.ndim == 2 and len(vector) == BATCH_SIZE else None


def _store_input(trace: _Trace) -> Callable[[Any], None]:
    def callback(value: Any) -> None:
        trace.input = first_tensor(value)

    return callback


def _store(trace: _Trace, key: str) -> Callable[[Any], None]:
    def callback(value: Any) -> None:
        try:
            trace.inside[key] = first_tensor(value)
        except (IndexError, KeyError, StopIteration, TypeError, AttributeError):
            trace.inside.pop(key, None)  # a helper that takes or returns no activation

    return callback


def _judge_block(module: nn.Module, block: Block, trace: _Trace) -> dict[str, tuple[str, int]]:
    """Which points of a block exist, each checked by value; `{module: (kind, width)}`."""
    entering, leaving, seen = trace.input, trace.output, trace.inside
    found: dict[str, tuple[str, int]] = {}
    if entering is None or leaving is None:
        return found
    before = seen.get("ln1 input", seen.get("ln2 input"))
    if entering.ndim == 4 and before is not None and before.shape != entering.shape == leaving.shape:
        # Some blocks of maps turn them to channels-last at once, and back at the end.
        entering, leaving = entering.permute(0, 2, 3, 1), leaving.permute(0, 2, 3, 1)
    positions = _num_positions(entering)

    def accept(name: str, value: Tensor | None, part: str, end: str = "out") -> None:
        if value is None:
            return
        size = _num_features(module.get_submodule(block.parts[part]), end)
        tap = _kind_and_width(value, positions, size)
        if tap is not None and value.shape[0] == entering.shape[0]:
            found[name] = tap

    if _same(seen.get("ln1 input"), entering):
        accept("ln1", seen.get("ln1 output"), "ln1")
    if _same(seen.get("ln2 output"), seen.get("fc1 input")):
        accept("ln2", seen.get("ln2 output"), "ln2")
        residual = seen.get("ln2 input")
        if "ln1" in found and _is_residual(residual, entering, leaving, seen):
            accept("residual", residual, "ln2")
    if "attention" in block.parts:
        accept("attention", seen.get("attention output"), "fc1", "in")  # as wide as the stream
        trace.in_windows = "attention" not in found
        if trace.in_windows and "residual" in found:
            found["attention"] = found["residual"]
    accept("fc1", seen.get("fc1 output"), "fc1", "out")
    accept("activation", seen.get("fc2 input"), "fc2", "in")
    accept("fc2", seen.get("fc2 output"), "fc2", "out")
    return found


def _is_residual(residual: Tensor | None, entering: Tensor, leaving: Tensor, seen: dict[str, Tensor]) -> bool:
    """Whether the block's output is this tensor plus a branch, and it is no longer the block's input."""
    # Equal, not close: beside a few huge values of the stream, a branch is lost in the tolerance of half precision.
    if residual is None or residual.numel() != leaving.numel() or torch.equal(residual, entering):
        return False
    branch = leaving - residual.reshape(leaving.shape)
    branches = [value for key, value in seen.items() if key.startswith("child ") or key == "fc2 output"]
    allowed = _tolerance(branch) * leaving.abs().max()
    for value in branches:
        if value.numel() == branch.numel():
            value = value.reshape(branch.shape)
            # A layer scale may stand between: one factor per channel.
            over_tokens = tuple(range(branch.ndim - 1))
            factor = (branch * value).sum(over_tokens) / (value * value).sum(over_tokens).clamp(min=1e-12)
            if min((branch - value).abs().max(), (branch - factor * value).abs().max()) <= allowed:
                return True
    return False


def _num_positions(value: Tensor) -> set[int]:
    """How many places a block's input may have: one reading per axis that may hold the channels."""
    if value.ndim == 3:
        return {value.shape[1]}
    if value.ndim == 4:
        return {value.shape[1] * value.shape[2], value.shape[2] * value.shape[3]}
    return set()


def _num_features(module: nn.Module, end: str) -> int | None:
    """How many features a part of a block takes or gives, by its own word; norms keep the number they were built for."""
    for name in (f"{end}_features", f"{end}_channels", "num_channels", "num_features", "normalized_shape"):
        value = getattr(module, name, None)
        if value is not None:
            return int(value[-1]) if isinstance(value, tuple | list | torch.Size) else int(value)
    return None


def _kind_and_width(value: Tensor, positions: set[int], features: int | None) -> tuple[str, int] | None:
    if value.ndim == 3 and value.shape[1] in positions:
        return "tokens", value.shape[2]
    if value.ndim == 4 and value.shape[1] * value.shape[2] in positions and features in (None, value.shape[3]):
        return "channels_last", value.shape[3]
    if value.ndim == 4 and value.shape[2] * value.shape[3] in positions and features in (None, value.shape[1]):
        return "channels_first", value.shape[1]
    return None


def _position_among(outputs: Sequence[Tensor], hidden: Sequence[Tensor]) -> int | None:
    """Where the blocks' outputs begin among the hidden states; `None` if hidden states are something else.

    The last one need not agree: some models put their last_hidden_state in its place.
    """
    for first in (1, 0):
        rest = hidden[first:]
        checked = outputs[:-1] or outputs
        if len(outputs) <= len(rest) <= len(outputs) + 1 - first and all(map(_same, checked, rest)):
            return first
    return None


def _named(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_children())


def _by_image(tokens: Tensor, batching: str) -> Tensor:
    """`(B, ..., T, D)`, one entry per probe image."""
    if batching == "sequence_first":
        return tokens.transpose(0, 1)
    if batching == "packed":
        return tokens.unflatten(1, (BATCH_SIZE, -1)).squeeze(0)
    if batching == "windows":
        return tokens.unflatten(0, (BATCH_SIZE, -1))
    return tokens


def _sums(value: Tensor) -> tuple[float, float]:
    """What does not change when a map is reshaped into tokens."""
    value = value.detach().double()
    return float(value.sum()), float(value.abs().sum())


def _close(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return all(
        math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-5 * max(abs(b[1]), 1e-6)) for x, y in zip(a, b, strict=True)
    )


def _tolerance(value: Tensor) -> float:
    return 1e-4 if value.dtype in (torch.float32, torch.float64) else 3e-2


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.numel() == 0:
        return False
    return bool((a - b).abs().max() <= _tolerance(a) * b.abs().max().clamp(min=1e-12))
