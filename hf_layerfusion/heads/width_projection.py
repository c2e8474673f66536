"""Bring tokens of several widths to one by learned projections."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import initialization as init


class WidthProjection(nn.Module):
    """`(B, N, D)` zero-padded tokens to `(B, N, D)`: one bias-free linear map per width d < D, shared by its tokens.

    Tokens of the full width stay as they are: their space is the one the others are brought to. A map begins as the
    padding it replaces, so training starts from the same function.

    Args:
        widths: of each token before padding.
        hidden_size: D.
    """

    def __init__(self, widths: Sequence[int], hidden_size: int):
        super().__init__()
        self.positions = {
            width: [token for token, other in enumerate(widths) if other == width]
            for width in sorted(set(widths) - {hidden_size})
        }
        self.maps = nn.ModuleDict({str(width): nn.Linear(width, hidden_size, bias=False) for width in self.positions})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.maps.parameters():
            init.eye_(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.positions:
            return tokens
        projected = tokens.clone()
        for width, positions in self.positions.items():
            projected[:, positions] = self.maps[str(width)](tokens[:, positions, :width]).to(tokens.dtype)
        return projected
