"""From pixels to the token bank: run the backbone once, pool each tap as it appears, line the tokens up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .bank import TokenBank, TokenCoordinate
from .pooling import TokenLayout, pad_width, pool_activation
from .taps import Tap, read_taps


def read_bank(
    backbone: PreTrainedModel, layout: TokenLayout, bank: TokenBank, pixel_values: Tensor, **backbone_kwargs: Any
) -> Tensor:
    """Tokens `(B, N, D)` of a bank, in the bank's order and the backbone's dtype; narrow ones are zero-padded."""
    pools: dict[Tap, list[str]] = {}
    for layer, module, pool in bank.coordinates:
        pools.setdefault((layer, module), []).append(pool)

    def pool_tap(tap: Tap, activation: Tensor) -> Tensor:
        return pool_activation(activation, layout, pools[tap])

    pooled = read_taps(backbone, pools, pool_tap, pixel_values, **backbone_kwargs)
    width = bank.width(layout.widths)
    tokens = torch.cat([pad_width(pooled[tap], width) for tap in pools], dim=1)  # (B, N, D), tap by tap
    tap_order = [TokenCoordinate(*tap, pool) for tap, names in pools.items() for pool in names]
    if tap_order == list(bank.coordinates):
        return tokens
    return tokens[:, [tap_order.index(coordinate) for coordinate in bank.coordinates]]
