"""Which tokens of a given backbone a recipe reads."""

from __future__ import annotations

import functools
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

from .bank import TokenBank, pool_layers, resolve_layers
from .errors import LayerFusionError
from .layout import TokenLayout
from .recipes import Recipe, find_recipe


def recipe_bank(name: str, layout: TokenLayout, image_size: Sequence[int] | None = None) -> TokenBank:
    """The tokens that a recipe of any kind reads from a backbone.

    Args:
        name: of the recipe.
        layout: of the backbone.
        image_size: height and width in pixels, for recipes that read all tokens; `None` for the native size.

    Raises:
        LayerFusionError: if the backbone has none of them.
    """
    recipe = find_recipe(name)
    if recipe.candidates:
        banks = (recipe_bank(candidate, layout, image_size) for candidate in recipe.candidates)
        return functools.reduce(operator.or_, banks)
    layers, modules, pools = adapt_recipe(recipe, layout, None, None, None, recipe.head_type)
    if absent := [module for module in modules if module not in layout.modules]:
        raise LayerFusionError(
            f"recipe {name!r} reads {absent[0]!r}, which this backbone does not have: its modules are "
            f"{', '.join(layout.modules)}"
        )
    bank = TokenBank.build(layers, modules, pools, layout, image_size)
    if not len(bank):
        raise LayerFusionError(f"recipe {name!r} finds none of its tokens in this backbone")
    return bank


def adapt_recipe(
    recipe: Recipe, layout: TokenLayout, layers: Any, modules: Any, pools: Any, head_type: str
) -> tuple[list[int], list[str], list[str]]:
    """Layers, modules and pools: what was asked for, and what of a recipe's own a backbone has."""
    layers = resolve_layers(recipe.layers if layers is None else layers, layout.num_layers)
    if modules is None:
        # Not every backbone has a norm behind its last block: a recipe adapts, a module that was asked for does not.
        modules = [m for m in recipe.modules if m != "final_norm" or m in layout.modules] or ["block"]
    modules = _as_list(modules)
    if pools is None:
        # Likewise for the CLS token, which some hierarchical backbones have in their last stage only.
        has_cls = [layout.has_cls_at(layer, module) for layer in layers for module in modules]
        keeps_cls = all(has_cls) if head_type == "scalar_mix" else any(has_cls)
        pools = [pool for pool in recipe.pools if pool != "cls" or keeps_cls]
        pools = [_fitted(pool, layout.num_layers) for pool in pools]
        pools = [pool for pool in pools if "grid:" not in pool or _has_grid(pool, layers, layout)]
        pools = [pool for pool in pools if "top:" not in pool or _has_patches(pool, layers, layout)] or ["mean"]
    return layers, modules, _as_list(pools)


def _fitted(pool: str, num_layers: int) -> str:
    """A recipe's pool; one of n equally spaced or of the last n layers is read at all of a backbone that has fewer."""
    name, _, where = pool.partition("@")
    count = where.removeprefix("spaced:").removeprefix("-").removesuffix(":")
    return name if count.isdigit() and int(count) > num_layers else pool


def _has_patches(pool: str, layers: Sequence[int], layout: TokenLayout) -> bool:
    """Whether the number of patches is known at every layer at which a pool is read."""
    _, where = pool_layers(pool, layout.num_layers)
    return all(layout.grids[layer] for layer in layers if layer in where)


def _has_grid(pool: str, layers: Sequence[int], layout: TokenLayout) -> bool:
    """Whether every layer at which a pool is read has a grid of at least as many cells a side."""
    name, where = pool_layers(pool, layout.num_layers)
    sides = [min(layout.grids[layer] or (0,)) for layer in layers if layer in where]
    return bool(sides) and min(sides) >= int(name.removeprefix("grid:"))


def _as_list(values: Any) -> list[str]:
    if not isinstance(values, str | list | tuple):
        raise LayerFusionError(f"modules and pools are lists of names, not {reprlib.repr(values)}")
    return [values] if isinstance(values, str) else list(values)
