"""Efficient probing (arXiv 2506.10178): learned queries attend to the tokens themselves, each with values of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LayerFusionError
from .attending import AttendingHead
from .attention import FoldedParameters


class EfficientHead(AttendingHead):
    """M queries pool a slice of the values each; BatchNorm and a linear classifier read the slices side by side.

    With tokens x_n (D), queries q_m, and LN a LayerNorm without parameters:

        p_mn = softmax_n( q_m . LN(x_n) / sqrt(D) )
        o_m  = sum_n p_mn W_v,m LN(x_n)                 W_v,m: (D // M, D)
        logits = W_c BatchNorm([o_1 ... o_M]) + b_c

    This is `EfficientProbing` of billpsomas/efficient-probing with `d_out=1` and one head, and the head that it stands
    in (`probe_heads.py`): no query, key and output projection, and no bias of the values. In the arithmetic of
    `attention.py` the probes u_h are then parameters. It differs in two points. Its tokens come out of the backbone's
    last norm, and those of a bank do not, so LN stands here; and BatchNorm has gain and bias, as in the other heads,
    which the classifier could as well contain.

    Args:
        hidden_size: D, the width of a token.
        num_tokens: N, tokens in the bank.
        num_labels: C.
        num_queries: M.
        attention_dropout: on the attention weights; the paper has none.
        implementation: `"fast"` or `"explicit"`, as for the attentive head.
        places: of the tokens, see `AttendingHead`.

    Raises:
        LayerFusionError: for more queries than D, or an unknown implementation.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tokens: int,
        num_labels: int,
        num_queries: int = 1,
        attention_dropout: float = 0.0,
        implementation: str = "fast",
        places: Sequence[tuple[int, int]] | None = None,
    ):
        if not 1 <= num_queries <= hidden_size:
            raise LayerFusionError(
                f"num_queries={num_queries} does not fit tokens of width {hidden_size}, which the queries of an efficient "
                f"head share out: set num_queries to something from 1 to {hidden_size}"
            )
        super().__init__(hidden_size, num_tokens, 1, num_queries, attention_dropout, 0.0, implementation, places)
        self.v_proj = nn.Linear(hidden_size, num_queries * (hidden_size // num_queries), bias=False)
        self._add_classifier(self.v_proj.out_features, num_labels)

    @property
    def _num_outputs(self) -> int:
        return 1  # in which the slices stand side by side

    def _fold(self, parameters: Mapping[str, Tensor], num_rows: int) -> FoldedParameters:
        # To `attend`, the queries are M attention heads of one query.
        probes = parameters["query"].flatten(0, 2) * self.hidden_size**-0.5  # (K * M, D)
        weight = parameters["v_proj.weight"]  # (K, M * d, D)
        values = weight.unflatten(1, (self.num_queries, -1))
        return FoldedParameters(
            probes=probes - probes.mean(dim=-1, keepdim=True),
            values=values - values.mean(dim=-1, keepdim=True),
            gain=None,
            shift=None,
            value_bias=values.new_zeros(*values.shape[:2], 1, values.shape[2]),
            output=None,
            output_bias=weight.new_zeros(weight.shape[:2]),
        )

    def _attend_explicit(self, tokens: Tensor, token_keep: Tensor | None) -> tuple[Tensor, Tensor]:
        normed = F.layer_norm(tokens, (self.hidden_size,), eps=self.eps)
        scores = torch.einsum("qd,bnd->bqn", self.query[0] * self.hidden_size**-0.5, normed)
        attentions = scores.softmax(dim=-1)[:, :, None]  # (B, M, 1, N)
        weights = self.attention_dropout(attentions)
        if token_keep is not None:
            weights = weights * token_keep[:, None, None]
        values = self.v_proj(normed).unflatten(-1, (self.num_queries, -1))  # (B, N, M, d)
        gathered = torch.einsum("bqn,bnqd->bqd", weights.squeeze(2).to(values.dtype), values)
        return gathered.flatten(1)[:, None], attentions
