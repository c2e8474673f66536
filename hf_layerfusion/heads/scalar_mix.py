"""A softmax-weighted sum over layers, then a linear layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..errors import LayerFusionError
from .stack_inputs import StackInputs


class ScalarMixHead(nn.Module):
    """`logits = W vec(gamma * sum_t softmax(w)_t x_t) + b` over the taps t, each holding `num_pools` tokens.

    The scalar mix of ELMo (arXiv 1802.05365, equation 1), with the pools of a layer kept side by side.
    """

    def __init__(self, hidden_size: int, num_tokens: int, num_labels: int, num_pools: int = 1):
        super().__init__()
        if num_tokens % num_pools:
            raise LayerFusionError(f"{num_tokens} tokens cannot be {num_pools} pools of each tap")
        self.num_pools = num_pools
        self.layer_logits = nn.Parameter(torch.zeros(num_tokens // num_pools))
        self.gamma = nn.Parameter(torch.ones(1))
        self.classifier = nn.Linear(num_pools * hidden_size, num_labels)

    def reset_parameters(self) -> None:
        """All layers weigh the same at the start."""
        init.zeros_(self.layer_logits)
        init.ones_(self.gamma)
        bound = self.classifier.in_features**-0.5
        init.uniform_(self.classifier.weight, -bound, bound)
        init.uniform_(self.classifier.bias, -bound, bound)

    def forward(self, tokens: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """`(B, N, D)` to `(B, C)`; with `output_attentions` also the weights `(B, 1, 1, N)`, which sum to one.

        A layer's weight is shared out evenly over its pools.
        """
        weights = self.layer_logits.softmax(dim=0)  # (T,)
        by_layer = tokens.unflatten(1, (-1, self.num_pools))  # (B, T, P, D)
        mixed = self.gamma * torch.einsum("t,btpd->bpd", weights.to(tokens.dtype), by_layer)
        logits = self.classifier(mixed.flatten(1))
        if not output_attentions:
            return logits
        shares = (weights / self.num_pools).repeat_interleave(self.num_pools)
        return logits, shares.expand(tokens.shape[0], 1, 1, -1)

    def run_stack(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: StackInputs
    ) -> Tensor:
        """K heads of this shape over one batch: logits `(K, B, C)`."""
        weights = parameters["layer_logits"].softmax(dim=-1) * parameters["gamma"]  # (K, T)
        by_layer = inputs.tokens.unflatten(1, (-1, self.num_pools))  # (B, T, P, D)
        if inputs.token_keep is None:
            mixed = torch.einsum("kt,btpd->kbpd", weights.to(by_layer.dtype), by_layer).flatten(2)
        else:  # all tokens of a tap are of one layer, and dropped together
            kept = weights[:, None] * inputs.token_keep[..., :: self.num_pools]  # (K, B, T)
            mixed = torch.einsum("kbt,btpd->kbpd", kept.to(by_layer.dtype), by_layer).flatten(2)
        bias = parameters["classifier.bias"][:, None]
        return torch.baddbmm(bias, mixed, parameters["classifier.weight"].mT)
