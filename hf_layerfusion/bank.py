"""The token bank: which activations a head reads, each with a coordinate `(layer, module, pool)`."""

from __future__ import annotations

import itertools
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors import LayerFusionError
from .layout import TokenLayout

LayerSpec = int | str | Sequence[int] | None

# Twice the tokens of all 24 layers at 1024 pixels and 14 a patch. Each takes a hundred bytes, and its name as many.
MAX_TOKENS = 2**18
# Of `"grid:k"`. Backbones at their own sizes have 7 to 64 patches a side.
MAX_GRID = 16


class TokenCoordinate(NamedTuple):
    """Where one token of the bank comes from.

    `layer` counts as transformers counts hidden states: 0 is the embedding output, k the output of block (or stage) k.
    The model's own pooled vector has module and pool `"pooler"`. Of all tokens, the pools are `"cls"` and
    `"patch 0"`, `"patch 1"`, ..., row by row; of a grid of cells `"grid:2 cell 0"`, `"grid:2 cell 1"`, ..., likewise; of the
    patches that differ most from their mean `"top 0"`, `"top 1"`, ..., the most different first.
    """

    layer: int
    module: str
    pool: str

    @property
    def name(self) -> str:
        module = "embeddings" if self.layer == 0 else self.module
        parts = [f"layer {self.layer}", module, self.pool]
        return " · ".join(dict.fromkeys(parts))


def resolve_layers(spec: LayerSpec, num_layers: int) -> list[int]:
    """Turn a choice of layers into ascending layer numbers.

    Args:
        spec: `None` or `"all"` for layers 1 to `num_layers`; an integer n for the last n; a list of layer numbers,
            where 0 is the embedding output and negative numbers count from the end (-1 is the last layer); `"last"`;
            `"middle"` for layer L / 2, rounded up;
            `"a:b"` for layers a to b, both included, either of them optional; `"spaced:n"` for n equally spaced
            layers that end with the last.
        num_layers: number of blocks L of the backbone.

    Raises:
        LayerFusionError: if a layer does not exist, is named twice, or the spec is not understood.
    """
    legal = f"choose from 0 (the embedding output) to {num_layers}, or from -{num_layers} to -1 to count from the end"
    if spec is None or spec == "all":
        return list(range(1, num_layers + 1))
    if spec == "last":
        return [num_layers]
    if spec == "middle":
        return [(num_layers + 1) // 2]
    if isinstance(spec, str):
        first, colon, last = spec.partition(":")
        try:
            if first == "spaced":
                count = int(last)
                if not 1 <= count <= num_layers:
                    raise LayerFusionError(f"layers='{spec}' asks for {count} of {num_layers} layers")
                return [num_layers * (i + 1) // count for i in range(count)]
            if colon:
                ends = [int(first) if first else 1, int(last) if last else num_layers]
                start, end = (layer if layer >= 0 else num_layers + 1 + layer for layer in ends)
                # A list as long as a config says could fill the memory; one end of such a range is out of range.
                spec = list(range(start, end + 1)) if end - start <= 2 * num_layers else [start, end]
            else:
                spec = [int(part) for part in spec.split(",")]
        except ValueError as error:
            if isinstance(error, LayerFusionError):
                raise
            raise LayerFusionError(
                f"layers='{spec}' is not understood: use 'all', 'middle', 'last', 'a:b', 'spaced:n' or numbers such as "
                "'3,6,12'"
            ) from error
    if isinstance(spec, int) and not isinstance(spec, bool):
        if not 1 <= spec <= num_layers:
            raise LayerFusionError(
                f"layers={spec} asks for the last {spec} layers, but the backbone has {num_layers} (1 to {num_layers})"
            )
        return list(range(num_layers - spec + 1, num_layers + 1))
    if isinstance(spec, bool) or not isinstance(spec, Sequence):
        raise LayerFusionError(f"layers={spec!r} is neither a number of layers, a list of them, nor a string")
    layers = []
    for layer in spec:
        if not isinstance(layer, int) or isinstance(layer, bool) or not -num_layers <= layer <= num_layers:
            raise LayerFusionError(f"layer {layer!r} is out of range for a backbone of {num_layers} layers: {legal}")
        layers.append(layer if layer >= 0 else num_layers + 1 + layer)
    if not layers:
        raise LayerFusionError(f"layers={spec!r} selects no layer: {legal}")
    if len(set(layers)) != len(layers):
        raise LayerFusionError(f"layers={list(spec)} names a layer twice")
    return sorted(layers)


_PATCH = "patch "


def patch_pool(number: int) -> str:
    """The pool that is one patch; patches are counted row by row from 0."""
    return f"{_PATCH}{number}"


def is_patch(pool: str) -> bool:
    return pool.startswith(_PATCH)


def patch_number(pool: str) -> int:
    return int(pool.removeprefix(_PATCH))


_TOP = "top "
_TOPS = re.compile(r"top:([1-9][0-9]{0,4})")


def is_top(pool: str) -> bool:
    """Whether this stands for the patches that differ most from their mean: `"top:1"` to `"top:99999"`."""
    return _TOPS.fullmatch(pool) is not None


def is_top_patch(pool: str) -> bool:
    """Whether a pool of a bank is one of those patches, which are ranked from 0."""
    return pool.startswith(_TOP)


def top_rank(pool: str) -> int:
    return int(pool.removeprefix(_TOP))


_GRID = "grid:"
_CELL = re.compile(r"grid:([1-9][0-9]?) cell (0|[1-9][0-9]{0,2})")


def is_grid(pool: str) -> bool:
    """Whether this stands for the cells of a grid: `"grid:1"` to `"grid:16"`, and no other spelling of them."""
    return pool in _GRIDS


def grid_pool(size: int) -> str:
    """The pool that stands for `size` x `size` cells."""
    return f"{_GRID}{size}"


_GRIDS = frozenset(map(grid_pool, range(1, MAX_GRID + 1)))


def grid_cells(pool: str) -> list[str]:
    """The pools that `"grid:k"` stands for, row by row.

    Raises:
        LayerFusionError: for another spelling, or a k that is out of range.
    """
    if not is_grid(pool):
        raise LayerFusionError(f"pool {reprlib.repr(pool)} is no grid: use 'grid:k' with k from 1 to {MAX_GRID}")
    return [f"{pool} cell {number}" for number in range(int(pool.removeprefix(_GRID)) ** 2)]


def pool_layers(pool: str, num_layers: int) -> tuple[str, list[int]]:
    """Take `"grid:4@spaced:4"`, a pool that is read at some layers only, apart: the pool, and those layers.

    Raises:
        LayerFusionError: if there are no such layers.
    """
    name, at, where = pool.partition("@")
    return name, resolve_layers(where, num_layers) if at else list(range(num_layers + 1))


def is_cell(pool: str) -> bool:
    """Whether a pool of a bank is one cell of a grid, well-formed or not; see `cell_place`."""
    return pool.startswith(_GRID)


def cell_place(pool: str) -> tuple[int, int]:
    """Of a cell, the k of its grid and its number, row by row from 0.

    Raises:
        LayerFusionError: if there is no such cell.
    """
    found = _CELL.fullmatch(pool)
    if found is None or not (int(found[1]) <= MAX_GRID and int(found[2]) < int(found[1]) ** 2):
        raise LayerFusionError(
            f"pool {reprlib.repr(pool)} is no cell of a grid: use 'grid:k cell n' with k from 1 to {MAX_GRID} and n below k * k"
        )
    return int(found[1]), int(found[2])


def is_local(pool: str) -> bool:
    """Whether a pool of a bank is of a part of the image: a patch, by place or by rank, or a cell."""
    return is_patch(pool) or is_top_patch(pool) or is_cell(pool)


def top_count(pool: str) -> int:
    """The k of `"top:k"`."""
    return int(pool.partition(":")[2])


def _members(
    pool: str, layer: int, module: str, layout: TokenLayout, image_size: Sequence[int] | None
) -> tuple[int, Iterable[str]]:
    """How many pools of a bank a pool stands for, and these, which are made only when asked for."""
    if pool == "tokens":
        count = layout.num_patches(layer, image_size)
        return count + 1, itertools.chain(("cls",), map(patch_pool, range(count)))
    if is_top(pool):
        count = min(top_count(pool), math.prod(layout.grid(layer, image_size, pool=pool)))
        return count, (f"{_TOP}{rank}" for rank in range(count))
    if pool.startswith(_GRID):
        if layout.kind(module) == "tokens":  # maps are grids in any case
            layout.grid(layer, image_size, pool=pool)
        return len(cells := grid_cells(pool)), cells
    return 1, (pool,)


def pool_group(pool: str) -> str:
    """What a pool is shown under where there is little room: `"patches"`, `"top patches"`, `"grid:2"`, or its own name."""
    if is_patch(pool):
        return "patches"
    if is_top_patch(pool):
        return "top patches"
    return pool.partition(" cell ")[0] if is_cell(pool) else pool


@dataclass(frozen=True)
class TokenBank:
    """An ordered set of token coordinates: the N axis of every `(B, N, D)` tensor in this library."""

    coordinates: tuple[TokenCoordinate, ...]

    @classmethod
    def build(
        cls,
        layers: Sequence[int],
        modules: Sequence[str],
        pools: Sequence[str],
        layout: TokenLayout,
        image_size: Sequence[int] | None = None,
    ) -> TokenBank:
        """All combinations that exist in a backbone: not every layer has every module, or a CLS token.

        Args:
            pools: `"cls"`, the patches' `"mean"` and `"max"`, `"tokens"` for CLS and every patch, `"grid:k"` for the means
                over k x k cells, and `"top:k"` for the k patches that differ most from their mean, or all where there are
                fewer; with `@` and layers behind it, such as `"grid:4@spaced:4"`, at those layers only.
            image_size: height and width in pixels, which decide the number of patches; `None` for the native size.

        Raises:
            LayerFusionError: for `"tokens"`, `"grid:k"` and `"top:k"` where the patches form no grid that is known, for a k
                that is out of range, and for more tokens than fit.
        """
        coordinates: list[TokenCoordinate] = []
        where = [pool_layers(pool, layout.num_layers) for pool in pools]
        for layer in layers:
            pools = [pool for pool, read_at in where if layer in read_at]
            for module in modules:
                if not layout.width(layer, module):
                    continue
                if layout.kind(module) == "vector":
                    coordinates.append(TokenCoordinate(layer, module, module))
                    continue
                names: list[str] = []
                for pool in pools:
                    count, members = _members(pool, layer, module, layout, image_size)
                    if len(coordinates) + len(names) + count > MAX_TOKENS:
                        raise LayerFusionError(
                            f"pools=['{pool}'] gives more than {MAX_TOKENS} tokens at layer {layer} for images of "
                            f"{list(image_size or layout.image_size or ())}: choose fewer layers or modules, smaller "
                            "images, or a smaller number"
                        )
                    names += members
                there = [pool for pool in names if pool != "cls" or layout.has_cls_at(layer, module)]
                coordinates += [TokenCoordinate(layer, module, pool) for pool in dict.fromkeys(there)]
        return cls(tuple(coordinates))

    @classmethod
    def from_list(cls, rows: Iterable[Sequence]) -> TokenBank:
        """Read what `to_list` wrote."""
        return cls(tuple(TokenCoordinate(int(layer), str(module), str(pool)) for layer, module, pool in rows))

    def to_list(self) -> list[list]:
        return [list(coordinate) for coordinate in self.coordinates]

    def __len__(self) -> int:
        return len(self.coordinates)

    @property
    def names(self) -> list[str]:
        return [coordinate.name for coordinate in self.coordinates]

    @property
    def taps(self) -> list[tuple[int, str]]:
        """The distinct `(layer, module)` pairs, in order."""
        return list(dict.fromkeys((c.layer, c.module) for c in self.coordinates))

    @property
    def pools(self) -> list[str]:
        """The distinct pools, in order."""
        return list(dict.fromkeys(c.pool for c in self.coordinates))

    @property
    def groups(self) -> dict[TokenCoordinate, list[int]]:
        """Positions by what figures show as one: the patches of an activation, the cells of a grid, or a single token.

        The pool of a group is that of `pool_group`, so that its name is such as `layer 7 · block · grid:2`.
        """
        groups: dict[TokenCoordinate, list[int]] = {}
        for position, (layer, module, pool) in enumerate(self.coordinates):
            groups.setdefault(TokenCoordinate(layer, module, pool_group(pool)), []).append(position)
        return groups

    def widths(self, layout: TokenLayout) -> list[int]:
        """The width of each token before it is padded."""
        return [layout.width(c.layer, c.module) for c in self.coordinates]

    def width(self, layout: TokenLayout) -> int:
        """D: the width of the widest token."""
        return max(self.widths(layout))

    def __or__(self, other: TokenBank) -> TokenBank:
        """The union, so that one extraction serves several recipes."""
        return TokenBank(tuple(dict.fromkeys(self.coordinates + other.coordinates)))

    def positions_of(self, wanted: TokenBank) -> list[int]:
        """The positions of another bank's tokens in this one, in the other's order.

        Raises:
            LayerFusionError: naming the tokens that this bank lacks.
        """
        position = {coordinate: i for i, coordinate in enumerate(self.coordinates)}
        missing = [c.name for c in wanted.coordinates if c not in position]
        if missing:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise LayerFusionError(
                f"the bank of {len(self)} tokens lacks {shown}; extract the features again with a bank that holds them"
            )
        return [position[c] for c in wanted.coordinates]

    def _singles(self, pool: str) -> list[str]:
        """The bank's pools that one stands for."""
        if is_top(pool):
            return [one for one in self.pools if is_top_patch(one) and top_rank(one) < top_count(pool)] or [pool]
        return grid_cells(pool) if is_grid(pool) else [pool]

    def select(
        self,
        layers: Sequence[int] | None = None,
        modules: Sequence[str] | None = None,
        pools: Sequence[str] | None = None,
    ) -> TokenBank:
        """The tokens whose coordinate is among the given ones; `None` keeps all. A pool `"grid:k"` keeps all its cells, and
        `"top:k"` the first k of such patches.

        Raises:
            LayerFusionError: if a layer, module or pool is not in the bank, or nothing is left.
        """
        kept = self.coordinates
        if pools is not None:
            pools = [single for pool in pools for single in self._singles(pool)]
        for field, wanted in (("layer", layers), ("module", modules), ("pool", pools)):
            if wanted is None:
                continue
            have = list(dict.fromkeys(getattr(c, field) for c in self.coordinates))
            absent = [value for value in wanted if value not in have]
            if absent:
                shown = list(
                    dict.fromkeys(
                        pool_group(pool) if is_cell(str(pool)) or is_top_patch(str(pool)) else pool for pool in have
                    )
                )
                raise LayerFusionError(f"no token of the bank has {field} {absent[0]!r}; it has {shown}")
            kept = tuple(c for c in kept if getattr(c, field) in wanted)
        if not kept:
            raise LayerFusionError(
                f"no token of the bank has layers={layers}, modules={modules} and pools={pools} at once"
            )
        return TokenBank(kept)
