"""Tokens on one scale: each coordinate minus its mean and over its standard deviation in the training rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

if TYPE_CHECKING:
    from ..features import LayerFeatures

# Added to the standard deviations.
EPSILON = 1e-6
# Of tokens in float64 that are worked on at a time.
_BATCH_BYTES = 2**26


class TokenStandardizer(nn.Module):
    """`(x - mean) / (std + 1e-6)` of tokens `(B, N, D)`, per token and coordinate.

    The statistics are buffers, of the training rows alone, and are saved with the head. A coordinate that does not vary
    over the training rows, such as the padding of a narrow token, is left at its scale, as scikit-learn does: it would
    otherwise be blown up where another row differs.

    Attributes:
        mean: `(N, D)`, float32.
        std: `(N, D)`, float32; population standard deviation, 1 where nothing varies.
        count: rows that they were taken of, int64; 0 as long as there are no statistics.
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(self, num_tokens: int, hidden_size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_tokens, hidden_size, dtype=torch.float32))
        self.register_buffer("std", torch.ones(num_tokens, hidden_size, dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._is_fitted = False

    def reset_parameters(self) -> None:
        """No statistics."""
        init.zeros_(self.mean)
        init.ones_(self.std)
        init.zeros_(self.count)
        self._is_fitted = False

    @property
    def is_fitted(self) -> bool:
        """Whether there are statistics."""
        # Read back once: in every step it would stall a GPU.
        self._is_fitted = self._is_fitted or bool(self.count > 0)
        return self._is_fitted

    @torch.no_grad()
    def fit(self, features: LayerFeatures) -> None:
        """Take the statistics of all rows, in one pass over them in float64.

        Batches are joined by the formulas of Chan, Golub and LeVeque (1983), which subtract no large numbers.

        Args:
            features: rows of exactly the N tokens, in their order.
        """
        count = 0
        mean = torch.zeros(self.mean.shape, dtype=torch.float64, device=self.mean.device)
        squares = torch.zeros_like(mean)
        for batch in features.batches(max(1, _BATCH_BYTES // (mean.numel() * mean.itemsize)), device=mean.device):
            tokens = batch["layer_features"].double()
            batch_mean = tokens.mean(dim=0)
            difference = batch_mean - mean
            total = count + len(tokens)
            squares += (tokens - batch_mean).square_().sum(dim=0) + difference.square() * (count * len(tokens) / total)
            mean += difference * (len(tokens) / total)
            count = total
        std = (squares / max(count, 1)).sqrt()
        # Rounded as they are kept, whatever dtype a model has in training.
        self.mean.copy_(mean.float())
        self.std.copy_(torch.where(std > EPSILON, std, 1.0).float())
        self.count.fill_(count)
        self._is_fitted = count > 0

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` to `(B, N, D)` in the wider of their dtype and float32."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return (tokens.to(wide) - self.mean.to(wide)) / (self.std.to(wide) + EPSILON)
