"""From an activation to tokens. Nothing else in the library pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import LayerFusionError


@dataclass(frozen=True)
class TokenLayout:
    """What a backbone's activations look like, measured once and stored in the head's config.

    Attributes:
        kind: `"tokens"` for `(B, T, D)`, `"channels_first"` for `(B, D, H, W)`, `"channels_last"` for `(B, H, W, D)`.
        widths: D of hidden state 0 (the embedding output) to L.
        special_tokens: positions of tokens that are not patches (CLS, distillation, registers), ascending. The first
            one is the CLS token.
    """

    kind: str
    widths: tuple[int, ...]
    special_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        # JSON gives lists back.
        object.__setattr__(self, "widths", tuple(int(width) for width in self.widths))
        object.__setattr__(self, "special_tokens", tuple(int(token) for token in self.special_tokens))
        if self.kind not in ("tokens", "channels_first", "channels_last"):
            raise LayerFusionError(
                f"token layout kind {self.kind!r} is unknown: use 'tokens', 'channels_first' or 'channels_last'"
            )

    @property
    def num_layers(self) -> int:
        return len(self.widths) - 1

    @property
    def has_cls(self) -> bool:
        return bool(self.special_tokens)

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def pool_activation(activation: Tensor, layout: TokenLayout, pools: Sequence[str]) -> Tensor:
    """Pool one activation into one token per entry of `pools`.

    Args:
        activation: `(B, T, D)`, `(B, D, H, W)` or `(B, H, W, D)`, as `layout.kind` says.
        pools: `"cls"` takes the CLS token, `"mean"` averages the patch tokens, special tokens left out.

    Returns:
        `(B, len(pools), D)`, contiguous, in the activation's dtype.
    """
    if layout.kind == "channels_first":
        activation = activation.flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, H*W, D)
    elif layout.kind == "channels_last":
        activation = activation.flatten(1, 2)  # (B, H, W, D) -> (B, H*W, D)
    pooled = []
    for pool in pools:
        if pool == "cls":
            if not layout.has_cls:
                raise LayerFusionError("this backbone has no CLS token: use pools=['mean']")
            pooled.append(activation[:, layout.special_tokens[0]])
        elif pool == "mean":
            pooled.append(_patch_tokens(activation, layout.special_tokens).mean(dim=1))
        else:
            raise LayerFusionError(f"pool {pool!r} is unknown: use 'cls' or 'mean'")
    return torch.stack(pooled, dim=1)  # (B, P, D)


def _patch_tokens(tokens: Tensor, special_tokens: Sequence[int]) -> Tensor:
    num_special = len(special_tokens)
    if tuple(special_tokens) == tuple(range(num_special)):
        return tokens[:, num_special:]  # the common case needs no copy
    is_patch = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    is_patch[list(special_tokens)] = False
    return tokens[:, is_patch]


def pad_width(tokens: Tensor, width: int) -> Tensor:
    """Zero-pad `(B, P, d)` to `(B, P, width)`, as the reference does where widths differ."""
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[-1]))
