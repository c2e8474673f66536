"""What changes the tokens of a training batch: the noise of arXiv 2601.09322, mixed rows, and dropped layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .bank import TokenBank

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


def layer_positions(bank: TokenBank) -> list[int]:
    """For each token, the number of its layer among those of the bank, from 0: what dropout of layers drops together."""
    layers = sorted({coordinate.layer for coordinate in bank.coordinates})
    return [layers.index(coordinate.layer) for coordinate in bank.coordinates]


@dataclass(frozen=True)
class Mixture:
    """Mixup (arXiv 1710.09412): each row of a batch mixed with another one, all in the same proportion.

    Attributes:
        share: of the row itself, 0 to 1.
        partners: `(B,)`, the row that each is mixed with.
    """

    share: float
    partners: Tensor

    @classmethod
    def draw(cls, alpha: float, num_rows: int, device: torch.device) -> Mixture:
        """The share from Beta(alpha, alpha), the partners from all permutations, with torch's own generators."""
        exponent = torch.tensor(alpha, dtype=torch.float64)
        share = torch.distributions.Beta(exponent, exponent).sample()
        return cls(float(share), torch.randperm(num_rows, device=device))

    def mix_(self, tokens: Tensor) -> Tensor:
        """Mix `(B, N, D)` in place."""
        return tokens.lerp_(tokens[self.partners], 1 - self.share)

    def loss(self, loss_of: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
        """The loss with the labels of the rows, and that with their partners', in the same proportion."""
        labels = labels.to(self.partners.device)
        return self.share * loss_of(labels) + (1 - self.share) * loss_of(labels[self.partners])
