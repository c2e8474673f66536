"""What K heads of one shape read together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class StackInputs:
    """One batch for a stack of K heads.

    Attributes:
        tokens: `(B, N, D)`, normalised.
        training: whether the heads are trained: batch statistics, and dropout.
        scales: `(B, N)`, what the attentive head's `token_scales` gives for the tokens.
        attention_keep: dropout of the attention weights, `(B, N, K * Q * H)`, as multipliers; `None` for none.
        token_keep: dropout of whole tokens, `(K, B, N)`, likewise; for attentive heads it is part of `attention_keep`.
        projection_keep: dropout after the output projection, `(K, B, Q, D)`, likewise.
    """

    tokens: Tensor
    training: bool
    scales: Tensor | None = None
    attention_keep: Tensor | None = None
    token_keep: Tensor | None = None
    projection_keep: Tensor | None = None
