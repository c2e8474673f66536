"""From pixels to the token bank: run the backbone once, pool each tap as it appears, line the tokens up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .backbones import execution_device
from .bank import TokenBank, TokenCoordinate
from .layout import TokenLayout
from .pooling import pad_width, pool_activation
from .taps import Tap, read_taps

# What padding masks over patches are called in the forwards of backbones that take images of several sizes at once.
_PATCH_MASKS = ("pixel_attention_mask", "patch_attention_mask")


def read_bank(
    backbone: PreTrainedModel, layout: TokenLayout, bank: TokenBank, pixel_values: Tensor, **backbone_kwargs: Any
) -> Tensor:
    """Tokens `(B, N, D)` of a bank, in the bank's order and the backbone's dtype; narrow ones are zero-padded."""
    pools: dict[Tap, list[str]] = {}
    for layer, module, pool in bank.coordinates:
        pools.setdefault((layer, module), []).append(pool)
    batch_size = pixel_values.shape[0]  # not `len`, which torch.export takes for a constant
    masks = [backbone_kwargs[name] for name in _PATCH_MASKS if backbone_kwargs.get(name) is not None]
    patch_mask = masks[0].flatten(1) if masks else None
    image_size = pixel_values.shape[-2:] if pixel_values.ndim > 3 else None  # else they are patches already

    def pool_tap(tap: Tap, activation: Tensor) -> Tensor:
        return pool_activation(activation, layout, tap, pools[tap], batch_size, patch_mask, image_size)

    pooled = read_taps(backbone, layout, pools, pool_tap, pixel_values, **backbone_kwargs)
    width = bank.width(layout)
    device = execution_device(backbone)  # layers of a backbone that is split over devices give tokens on each
    tokens = torch.cat([pad_width(pooled[tap], width).to(device) for tap in pools], dim=1)  # (B, N, D), tap by tap
    tap_order = [TokenCoordinate(*tap, pool) for tap, names in pools.items() for pool in names]
    if tap_order == list(bank.coordinates):
        return tokens
    return tokens[:, [tap_order.index(coordinate) for coordinate in bank.coordinates]]
