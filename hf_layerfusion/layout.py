"""What a backbone's activations look like: measured once, stored in the head's config, read by everything else."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from .errors import LayerFusionError

# The points of a pre-norm block in the order of the data flow, in the terms of arXiv 2603.05280, section 2.
BLOCK_MODULES = ("ln1", "attention", "residual", "ln2", "fc1", "activation", "fc2", "block")
# And what stands after the last block: the last norm, and the model's own pooled vector.
MODULES = (*BLOCK_MODULES, "final_norm", "pooler")
KINDS = ("tokens", "channels_first", "channels_last", "vector")
READINGS = ("blocks", "hidden_states")
BATCHINGS = ("plain", "windows", "packed", "sequence_first")

# Three times the deepest, and five times the widest, that is known; a stranger's config may ask for anything.
MAX_LAYERS = 512
MAX_WIDTH = 2**18
MAX_SIDE = 2**16


@dataclass(frozen=True)
class TapLayout:
    """The activations of one module.

    Attributes:
        kind: `"tokens"` for `(B, T, D)`, `"channels_first"` for `(B, D, H, W)`, `"channels_last"` for `(B, H, W, D)`,
            `"vector"` for `(B, D)`.
        widths: D at layers 0 to L; 0 where the layer has no such activation.
    """

    kind: str
    widths: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "widths", _counts("widths", self.widths, MAX_WIDTH))
        _check("kind", self.kind, KINDS)


@dataclass(frozen=True)
class TokenLayout:
    """One description of a backbone's tokens.

    Attributes:
        taps: a [`TapLayout`] per module, or its dict; `"block"` is always there.
        num_prefix_tokens: tokens before the patches (CLS, distillation, registers) at layers 0 to L, or one number.
            Maps have none.
        num_suffix_tokens: tokens after the patches, likewise.
        cls_token: position of the CLS token, negative from the end; `None` if there is none.
        grids: height and width of the patch grid at layers 0 to L for an image of `image_size`; `None` where the
            patches form no grid.
        image_size: height and width in pixels that the layout was measured at, the backbone's native size.
        reading: `"blocks"` if each layer is the output of one block, taken by a hook; `"hidden_states"` if layers are
            stages, taken from `output_hidden_states`.
        tower: what the blocks' paths begin with, where a backbone has several towers in a row.
        first_hidden_state: position of layer 1 among the hidden states.
        final_norm: path of the norm behind the last block; `None` if there is none that reads its tokens.
        attention_in_windows: attention runs in windows, so its output is taken where it joins the stream: as the first
            residual minus the block's input.
        batching: `"windows"` if windows are folded into the batch axis, `"packed"` if all images stand in one row,
            `"sequence_first"` for `(T, B, D)`.
    """

    taps: Mapping[str, TapLayout]
    num_prefix_tokens: tuple[int, ...] = (0,)
    num_suffix_tokens: tuple[int, ...] = (0,)
    cls_token: int | None = None
    grids: tuple[tuple[int, int] | None, ...] = field(default=())
    image_size: tuple[int, int] | None = None
    reading: str = "blocks"
    tower: str = ""
    first_hidden_state: int = 1
    final_norm: str | None = None
    attention_in_windows: bool = False
    batching: str = "plain"

    def __post_init__(self):
        # JSON gives dicts and lists back.
        if not isinstance(self.taps, (dict, Mapping)) or "block" not in self.taps:
            described = list(self.taps) if isinstance(self.taps, Mapping) else self.taps
            raise LayerFusionError(f"the token layout describes {reprlib.repr(described)}, but not the blocks' output")
        for name in self.taps:
            _check("module", name, MODULES)
        taps = {
            name: tap if isinstance(tap, TapLayout) else _from_dict(TapLayout, tap) for name, tap in self.taps.items()
        }
        object.__setattr__(self, "taps", taps)
        if not 1 <= self.num_layers <= MAX_LAYERS:
            raise LayerFusionError(f"the token layout has {self.num_layers} layers: use 1 to {MAX_LAYERS}")
        _check("reading", self.reading, READINGS)
        _check("batching", self.batching, BATCHINGS)
        for name in ("num_prefix_tokens", "num_suffix_tokens"):
            object.__setattr__(self, name, _per_layer(getattr(self, name), self.num_layers + 1, name))
        if not isinstance(self.grids, list | tuple):
            raise LayerFusionError(f"token layout grids is {reprlib.repr(self.grids)}: give one for each hidden state")
        grids = tuple(None if grid is None else _sides("grids", grid) for grid in self.grids)
        object.__setattr__(self, "grids", grids or (None,) * (self.num_layers + 1))
        for name, values in {"grids": self.grids, **{name: tap.widths for name, tap in taps.items()}}.items():
            if len(values) != self.num_layers + 1:
                raise LayerFusionError(
                    f"token layout {name} has {len(values)} entries, but there are {self.num_layers + 1} hidden states"
                )
        if self.cls_token is not None and not (
            type(self.cls_token) is int
            and -max(self.num_suffix_tokens) <= self.cls_token < max(self.num_prefix_tokens)
        ):
            raise LayerFusionError(
                f"token layout cls_token is {reprlib.repr(self.cls_token)}, but there are at most {max(self.num_prefix_tokens)} tokens "
                f"before the patches and {max(self.num_suffix_tokens)} after them"
            )
        if self.image_size is not None:
            object.__setattr__(self, "image_size", _sides("image_size", self.image_size))
        for name, kinds in _KINDS_OF_VALUES.items():
            if not isinstance(getattr(self, name), kinds):
                raise LayerFusionError(f"token layout {name} is {reprlib.repr(getattr(self, name))}")
        if type(self.first_hidden_state) is not int or not -MAX_LAYERS <= self.first_hidden_state <= MAX_LAYERS:
            raise LayerFusionError(
                f"token layout first_hidden_state is {reprlib.repr(self.first_hidden_state)}: give a position"
            )

    @property
    def num_layers(self) -> int:
        """L, the number of the last layer."""
        return len(self.taps["block"].widths) - 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the blocks' output at layers 0 to L."""
        return self.taps["block"].widths

    @property
    def has_cls(self) -> bool:
        """Whether any activation has a CLS token."""
        return any(self.has_cls_at(layer, module) for layer in range(self.num_layers + 1) for module in self.taps)

    def has_cls_at(self, layer: int, module: str = "block") -> bool:
        """Whether this activation holds the CLS token."""
        tap = self.taps.get(module)
        if self.cls_token is None or tap is None or tap.kind != "tokens":
            return False
        return bool((self.num_prefix_tokens if self.cls_token >= 0 else self.num_suffix_tokens)[layer])

    def width(self, layer: int, module: str) -> int:
        """Width of an activation, 0 if it does not exist."""
        tap = self.taps.get(module)
        return tap.widths[layer] if tap is not None and 0 <= layer < len(tap.widths) else 0

    def kind(self, module: str) -> str:
        return self.taps[module].kind

    def num_patches(self, layer: int, image_size: Sequence[int] | None = None) -> int:
        """How many patches a layer has for images of `image_size` (height and width in pixels; `None`: the native size).

        Raises:
            LayerFusionError: if the patches form no grid, so that their number was not learned.
        """
        return math.prod(self.grid(layer, image_size))

    def grid(self, layer: int, image_size: Sequence[int] | None = None, *, pool: str = "tokens") -> tuple[int, int]:
        """Height and width of a layer's patch grid for images whose sides the backbone's strides divide.

        Args:
            layer: whose grid.
            image_size: height and width in pixels; `None` for the native size.
            pool: what needs the grid, for the message.

        Raises:
            LayerFusionError: if the patches form no grid, or none that was measured.
        """
        grid = self.grids[layer]
        if grid is None or self.image_size is None:
            raise LayerFusionError(
                f"pools=['{pool}'] needs a grid of patches, which layer {layer} of this backbone does not have, or which "
                "was not measured: build the head with from_backbone, or use pools=['cls', 'mean']"
            )
        return self._scaled(grid, image_size)

    def grid_of(
        self, layer: int, num_patches: int, image_size: Sequence[int] | None = None, *, pool: str = "tokens"
    ) -> tuple[int, int]:
        """Height and width of the grid that so many patches form.

        It is `grid` where the backbone's strides divide the image; else backbones leave the rest out or pad it. Where they
        do not divide native images, the stride itself is not known, and more grids are possible: the grid is told if only
        one of them has that many patches. What is inside a stage's last block stands on the grid of the layer before, in
        front of the stage's downsampling.

        Args:
            layer: whose grid.
            num_patches: as many as there are.
            image_size: height and width in pixels; `None` for the native size.
            pool: what needs the grid, for the message.

        Raises:
            LayerFusionError: if the patches form no grid, or none that can be told.
        """
        expected = self.grid(layer, image_size, pool=pool)
        before = [self.grids[layer - 1]] if self.reading == "hidden_states" and layer else []
        for native in (self.grids[layer], *before):
            if native is not None:
                found = self._possible(native, num_patches, image_size)
                if len(found) == 1:
                    return found.pop()
        pixels = image_size or self.image_size or ()
        raise LayerFusionError(
            f"pools=['{pool}'] needs the grid of the patches, but the {num_patches} patches of layer {layer} for images of "
            f"{' x '.join(map(str, pixels))} px are not the {expected[0]} x {expected[1]} that were expected: use images whose "
            "sides the backbone's strides divide"
        )

    def _scaled(self, grid: tuple[int, int], image_size: Sequence[int] | None) -> tuple[int, int]:
        """A grid of native images, for images of another size."""
        assert self.image_size is not None
        pixels = self.image_size if image_size is None else image_size
        height, width = (side * of // native for side, of, native in zip(grid, pixels, self.image_size, strict=True))
        return height, width

    def _possible(
        self, grid: tuple[int, int], num_patches: int, image_size: Sequence[int] | None
    ) -> set[tuple[int, int]]:
        """What a grid of native images may be for images of another size and so many patches."""
        assert self.image_size is not None
        pixels = self.image_size if image_size is None else image_size
        sides = list(zip(grid, pixels, self.image_size, strict=True))
        if all(native % side == 0 for side, _, native in sides):
            rounded_up = tuple(-(-side * of // native) for side, of, native in sides)
            either = (self._scaled(grid, image_size), (rounded_up[0], rounded_up[1]))
            return {possible for possible in either if math.prod(possible) == num_patches}
        # So many strides fit into a native image as the grid has, or less than one more or less.
        rows, columns = (
            range(max(1, (side - 1) * of // native), -(-(side + 1) * of // native) + 1) for side, of, native in sides
        )
        found = {(height, num_patches // height) for height in rows if num_patches % height == 0}
        is_square = len(set(sides)) == 1
        return {grid for grid in found if grid[1] in columns and (grid[0] == grid[1] or not is_square)}

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that exist in at least one layer, in the order of the data flow."""
        return tuple(name for name in MODULES if name in self.taps and any(self.taps[name].widths))

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it; `from_dict` reads it back."""
        return {
            "taps": {name: {"kind": tap.kind, "widths": list(tap.widths)} for name, tap in self.taps.items()},
            "num_prefix_tokens": list(self.num_prefix_tokens),
            "num_suffix_tokens": list(self.num_suffix_tokens),
            "cls_token": self.cls_token,
            "grids": [None if grid is None else list(grid) for grid in self.grids],
            "image_size": None if self.image_size is None else list(self.image_size),
            "reading": self.reading,
            "tower": self.tower,
            "first_hidden_state": self.first_hidden_state,
            "final_norm": self.final_norm,
            "attention_in_windows": self.attention_in_windows,
            "batching": self.batching,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenLayout:
        """Read what `to_dict` wrote.

        Raises:
            LayerFusionError: for an unknown field or a value that cannot be.
        """
        return _from_dict(cls, values)

    @classmethod
    def of_plain_vit(
        cls,
        hidden_size: int,
        num_layers: int,
        mlp_size: int | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
    ) -> TokenLayout:
        """A ViT with one CLS token, for configs that were not measured on a model."""
        inside = {name: (0, *[hidden_size] * num_layers) for name in BLOCK_MODULES}
        inside |= {name: (0, *[mlp_size or 4 * hidden_size] * num_layers) for name in ("fc1", "activation")}
        inside["block"] = (hidden_size,) * (num_layers + 1)
        inside["final_norm"] = (*[0] * num_layers, hidden_size)
        taps = {name: TapLayout("tokens", widths) for name, widths in inside.items()}
        if image_size is None or patch_size is None:
            return cls(taps, (1,), cls_token=0)
        grid = (image_size // patch_size,) * 2
        return cls(taps, (1,), cls_token=0, grids=(grid,) * (num_layers + 1), image_size=(image_size, image_size))


_Layout = TypeVar("_Layout", TapLayout, TokenLayout)
_KINDS_OF_VALUES = {"tower": (str,), "final_norm": (str, type(None)), "attention_in_windows": (bool,)}
_FIELDS = {layout: frozenset(entry.name for entry in fields(layout)) for layout in (TapLayout, TokenLayout)}
_REQUIRED = {TapLayout: {"kind", "widths"}, TokenLayout: {"taps"}}


def _from_dict(layout: type[_Layout], values: Any) -> _Layout:
    if not isinstance(values, (dict, Mapping)) or not _REQUIRED[layout] <= values.keys() <= _FIELDS[layout]:
        raise LayerFusionError(
            f"token layout {reprlib.repr(values)}: give {', '.join(sorted(_REQUIRED[layout]))}, and nothing but "
            f"{', '.join(sorted(_FIELDS[layout]))}"
        )
    return layout(**values)


def _check(field_name: str, value: str, legal: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in legal:
        raise LayerFusionError(f"token layout {field_name} {reprlib.repr(value)} is unknown: use one of {legal}")


def _counts(name: str, values: Any, limit: int) -> tuple[int, ...]:
    # A head asks for its layout in every forward pass, so this is no loop.
    is_list = type(values) in (list, tuple) and {*map(type, values)} <= {int}
    if not is_list or (values and not 0 <= min(values) <= max(values) <= limit):
        raise LayerFusionError(f"token layout {name} is {reprlib.repr(values)}: give numbers from 0 to {limit}")
    return tuple(values)


def _sides(name: str, values: Any) -> tuple[int, int]:
    """Height and width."""
    sides = _counts(name, values, MAX_SIDE)
    if len(sides) != 2 or 0 in sides:
        raise LayerFusionError(f"token layout {name} is {reprlib.repr(values)}: give height and width")
    return sides[0], sides[1]


def _per_layer(values: int | Sequence[int], length: int, name: str) -> tuple[int, ...]:
    each = (values,) if isinstance(values, int) else values
    numbers = _counts(
        name, tuple(each) * length if isinstance(each, list | tuple) and len(each) == 1 else each, MAX_WIDTH
    )
    if len(numbers) != length:
        raise LayerFusionError(f"token layout {name} is {numbers}, but there are {length} hidden states")
    return numbers
