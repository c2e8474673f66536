"""The noise of arXiv 2601.09322: on all tokens of some of the samples."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of noise that are drawn at a time on a CPU: drawing into memory that is in cache is several times faster.
_BLOCK_BYTES = 2**20


def add_noise_(
    tokens: Tensor, std: float, probability: float, uniform: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Add Gaussian noise to the tokens of some rows, in place.

    Args:
        tokens: `(B, N, D)`, normalised; they are changed.
        std: standard deviation of the noise on each entry (the reference: 0.05).
        probability: share of the rows that get noise (the reference: 0.5).
        uniform: `(B,)`, numbers in [0, 1): rows below `probability` are hit.
        generator: of the noise.
    """
    hit = (uniform < probability).nonzero().squeeze(1)
    size = len(hit)
    if tokens.device.type == "cpu":
        size = max(1, _BLOCK_BYTES // (tokens[0].numel() * tokens.itemsize)) if len(tokens) else 1
    if not size:
        return tokens
    buffer = torch.empty(min(size, len(hit)), *tokens.shape[1:], dtype=tokens.dtype, device=tokens.device)
    for rows in hit.split(size):
        tokens.index_add_(0, rows, buffer[: len(rows)].normal_(std=std, generator=generator))
    return tokens
