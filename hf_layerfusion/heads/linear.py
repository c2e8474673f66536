"""The linear probe."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .stack_inputs import StackInputs


class LinearHead(nn.Module):
    """One linear layer on the concatenation of all tokens: `logits = W vec(x) + b`, W of shape `(C, N * D)`."""

    def __init__(self, hidden_size: int, num_tokens: int, num_labels: int):
        super().__init__()
        self.classifier = nn.Linear(num_tokens * hidden_size, num_labels)

    def reset_parameters(self) -> None:
        """PyTorch's default for a linear layer, as the reference uses: uniform in +-1/sqrt(N * D)."""
        bound = self.classifier.in_features**-0.5
        init.uniform_(self.classifier.weight, -bound, bound)
        init.uniform_(self.classifier.bias, -bound, bound)

    def forward(self, tokens: Tensor, output_attentions: bool = False) -> Tensor | tuple[Tensor, None]:
        """`(B, N, D)` to `(B, C)`; with `output_attentions` also `None`, since a linear probe has no weights to show."""
        logits = self.classifier(tokens.flatten(1))
        return (logits, None) if output_attentions else logits

    def run_stack(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: StackInputs
    ) -> Tensor:
        """K heads of this shape over one batch, in one product: logits `(K, B, C)`."""
        weight = parameters["classifier.weight"]  # (K, C, N * D)
        if inputs.token_keep is not None:
            # What each token adds to each logit, so that no head needs a copy of the tokens without those it drops.
            num_tokens = inputs.tokens.shape[1]
            by_token = weight.flatten(0, 1).unflatten(1, (num_tokens, -1)).transpose(0, 1)  # (N, K * C, D)
            terms = (inputs.tokens.transpose(0, 1) @ by_token.mT).unflatten(2, weight.shape[:2])  # (N, B, K, C)
            summed = torch.einsum("nbkc,kbn->kbc", terms, inputs.token_keep.to(terms.dtype))
            return summed + parameters["classifier.bias"][:, None]
        flat = inputs.tokens.flatten(1) @ weight.flatten(0, 1).mT  # (B, K * C)
        return flat.unflatten(1, weight.shape[:2]).transpose(0, 1) + parameters["classifier.bias"][:, None]
