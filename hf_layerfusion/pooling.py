"""From an activation to tokens. Nothing else in the library pools."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .bank import MAX_GRID, cell_place, grid_pool, is_cell, is_patch, is_top_patch, patch_number, top_rank
from .errors import LayerFusionError
from .layout import TokenLayout

# `"tokens"` stands for CLS and every patch, each of which is then a pool of its own, such as `"patch 17"`.
POOLS = ("cls", "mean", "max", "tokens")
# And what stands for families of pools, in messages and help.
POOL_FAMILIES = (
    f"'grid:k' for the means over a k x k grid of cells, k from 1 to {MAX_GRID}, or 'top:k' for the k patches that differ most "
    "from their mean"
)


def pool_activation(
    activation: Tensor,
    layout: TokenLayout,
    tap: tuple[int, str],
    pools: Sequence[str],
    batch_size: int,
    patch_mask: Tensor | None = None,
    image_size: Sequence[int] | None = None,
) -> Tensor:
    """Pool one activation into one token per entry of `pools`.

    Args:
        activation: of `tap`, in the shape that `layout` gives for it.
        pools: `"cls"` takes the CLS token, `"mean"` averages the patch tokens, special tokens left out, `"max"` takes the
            largest value of each of their coordinates, `"patch 0"`, `"patch 1"`, ... take single patches, all of which must
            be there, `"grid:k cell 0"`, ... average the patches of a cell of a k x k grid over the image; row i of k is the
            patches' rows floor(i h / k) to ceil((i + 1) h / k) of h, as in `torch.nn.AdaptiveAvgPool2d`. `"top 0"`, ... take
            the patches whose direction is furthest from that of the mean of all, the furthest first.
        batch_size: B; the activation of some backbones has another first axis.
        patch_mask: `(B, T)`, which patches are there, where images of several sizes are padded to one number of them.
        image_size: height and width of the images in pixels, which cells need; `None` for the native size.

    Returns:
        `(B, len(pools), D)`, contiguous, in the activation's dtype. A vector is one token already.

    Raises:
        LayerFusionError: for a pool that does not exist here, for a grid with more cells a side than there are patches, and
            for more `"top"` patches than there are.
    """
    layer, module = tap
    if layout.kind(module) == "vector":
        return activation.unsqueeze(1)  # (B, D) -> (B, 1, D)
    patches, special = split_tokens(activation, layout, tap, batch_size)
    wanted = [patch_number(pool) for pool in pools if is_patch(pool)]
    if wanted and (patch_mask is not None or sorted(wanted) != list(range(patches.shape[1]))):
        raise LayerFusionError(
            f"the bank has {len(wanted)} patches of {module!r} at layer {layer}, but these images give {patches.shape[1]}"
            f"{' in all, some of which are padding' if patch_mask is not None else ''}: all tokens need images of the one "
            "size that the head was built for (image_size=), and one that the backbone's strides divide"
        )
    pooled = []
    cells: dict[int, Tensor] = {}  # by k
    if ranks := [top_rank(pool) for pool in pools if is_top_patch(pool)]:
        num_tops = 1 + max(ranks)
        if patch_mask is not None or num_tops > patches.shape[1]:
            raise LayerFusionError(
                f"the bank has {num_tops} of the patches of {module!r} at layer {layer} that differ most from their mean, but "
                f"these images give {patches.shape[1]}{', some of which are padding' if patch_mask is not None else ''}: "
                "they need images of the size that the head was built for (image_size=)"
            )
        tops = _tops(patches, num_tops)
    for pool in pools:
        if pool == "cls":
            if not layout.has_cls_at(layer, module):
                raise LayerFusionError(f"layer {layer} of this backbone has no CLS token: use pools=['mean']")
            # Suffix tokens stand behind the prefix, so a negative position counts from the end here too.
            pooled.append(special[:, layout.cls_token])
        elif pool == "mean":
            pooled.append(patches.mean(dim=1) if patch_mask is None else _masked_mean(patches, patch_mask))
        elif pool == "max":
            pooled.append(patches.amax(dim=1) if patch_mask is None else _masked_max(patches, patch_mask))
        elif is_patch(pool):
            pooled.append(patches[:, patch_number(pool)])
        elif is_top_patch(pool):
            pooled.append(tops[:, top_rank(pool)])
        elif is_cell(pool):
            size, number = cell_place(pool)
            if size not in cells:
                if patch_mask is not None:
                    raise LayerFusionError(
                        f"pools=['{grid_pool(size)}'] needs images of one size, but these are padded to one number of "
                        "patches: use pools=['mean']"
                    )
                grid = _grid(activation, layout, tap, patches.shape[1], image_size, grid_pool(size))
                cells[size] = _cell_means(patches, grid, size, layer, image_size or layout.image_size)
            pooled.append(cells[size][:, number])
        else:
            raise LayerFusionError(f"pool {pool!r} is unknown: use one of {', '.join(POOLS)}, {POOL_FAMILIES}")
    return torch.stack(pooled, dim=1)  # (B, P, D)


def split_tokens(
    activation: Tensor, layout: TokenLayout, tap: tuple[int, str], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Patch tokens `(B, T, D)` and special tokens `(B, S, D)` of one activation, each in their order."""
    layer, module = tap
    kind = layout.kind(module)
    if kind == "channels_first":
        activation = activation.flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, H*W, D)
    elif kind == "channels_last":
        activation = activation.flatten(1, 2)  # (B, H, W, D) -> (B, H*W, D)
    prefix, suffix = 0, 0
    if kind == "tokens":
        prefix, suffix = layout.num_prefix_tokens[layer], layout.num_suffix_tokens[layer]
    if layout.batching == "sequence_first":
        activation = activation.transpose(0, 1)  # (T, B, D) -> (B, T, D)
    if layout.batching == "packed":
        activation = activation.unflatten(1, (batch_size, -1)).squeeze(0)  # (1, B*T, D) -> (B, T, D)
    end = activation.shape[1] - suffix
    patches, special = activation[:, prefix:end], activation[:, :prefix]
    if suffix:
        special = torch.cat([special, activation[:, end:]], dim=1)
    if layout.batching == "windows":  # (B*W, T, D) -> (B, W*T, D)
        patches, special = (part.unflatten(0, (batch_size, -1)).flatten(1, 2) for part in (patches, special))
    if patches.ndim != 3 or patches.shape[0] != batch_size:
        raise LayerFusionError(
            f"the activation of {module!r} at layer {layer} has shape {tuple(activation.shape)}, which is not what was "
            f"measured on this backbone ({kind}, {layout.batching} batches of {batch_size})"
        )
    return patches, special


def _grid(
    activation: Tensor,
    layout: TokenLayout,
    tap: tuple[int, str],
    num_patches: int,
    image_size: Sequence[int] | None,
    pool: str,
) -> tuple[int, int]:
    """Height and width of the grid of patches that an activation is."""
    layer, module = tap
    if layout.kind(module) == "tokens":
        return layout.grid_of(layer, num_patches, image_size, pool=pool)
    first = 2 if layout.kind(module) == "channels_first" else 1
    return activation.shape[first], activation.shape[first + 1]


def _cell_means(
    patches: Tensor, grid: tuple[int, int], size: int, layer: int, image_size: Sequence[int] | None
) -> Tensor:
    """`(B, T, D)` patches to `(B, size * size, D)` means over the cells, row by row."""
    if size > min(grid):
        pixels = "" if image_size is None else f" for images of {image_size[0]} x {image_size[1]} px"
        raise LayerFusionError(
            f"pools=['{grid_pool(size)}'] asks for {size} cells a side, but layer {layer} is {grid[0]} patches high and "
            f"{grid[1]} wide{pixels}: use 'grid:{min(grid)}' or less, larger images, or no layer that is so small"
        )
    maps = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, H, W)
    if maps.dtype in (torch.float16, torch.bfloat16):
        maps = maps.float()  # some devices would round each partial sum
    means = torch.nn.functional.adaptive_avg_pool2d(maps, size)  # (B, D, size, size)
    return means.flatten(2).transpose(1, 2).to(patches.dtype)


def _tops(patches: Tensor, count: int) -> Tensor:
    """Those of `(B, T, D)` with the smallest cosine similarity to their mean, `(B, count, D)`, in that order."""
    wide = patches.float()
    similarity = F.cosine_similarity(wide, wide.mean(dim=1, keepdim=True), dim=-1)
    ranked = similarity.topk(count, dim=1, largest=False).indices
    return patches.gather(1, ranked[..., None].expand(-1, -1, patches.shape[-1]))


def _masked_mean(patches: Tensor, mask: Tensor) -> Tensor:
    weights = _patch_weights(patches, mask)
    # `where` and not a product: what stands in padded places may be NaN.
    return torch.where(weights > 0, patches, 0).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _masked_max(patches: Tensor, mask: Tensor) -> Tensor:
    weights = _patch_weights(patches, mask)
    largest = torch.where(weights > 0, patches, -torch.inf).amax(dim=1)
    return torch.where(weights.any(dim=1), largest, 0)  # as the mean of no patch


def _patch_weights(patches: Tensor, mask: Tensor) -> Tensor:
    """`(B, T, 1)`, 1 for patches that are there."""
    if mask.shape != patches.shape[:2]:
        raise LayerFusionError(
            f"the patch mask has shape {tuple(mask.shape)}, but there are {tuple(patches.shape[:2])} patches"
        )
    return mask.to(device=patches.device, dtype=patches.dtype).unsqueeze(-1)


def pad_width(tokens: Tensor, width: int) -> Tensor:
    """Zero-pad `(B, P, d)` to `(B, P, width)`, as the reference does where widths differ."""
    if tokens.shape[-1] > width:  # a negative padding would crop
        raise LayerFusionError(
            f"a token of width {tokens.shape[-1]} does not fit into a bank of width {width}: the backbone is not as it "
            "was measured"
        )
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[-1]))
