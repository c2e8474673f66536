"""The attentive fusion head of arXiv 2601.09322, and the same arithmetic in an order that costs ten times less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import LayerFusionError
from .attending import AttendingHead
from .attention import FoldedParameters, fold_parameters

# The reference's `AttentiveProbeModel` (lciernik/attentive-layer-fusion) on the left.
REFERENCE_NAMES = {
    "query_token": "query",
    "attn_block.norm_q.weight": "norm_q.weight",
    "attn_block.norm_q.bias": "norm_q.bias",
    "attn_block.norm_k.weight": "norm_k.weight",
    "attn_block.norm_k.bias": "norm_k.bias",
    "attn_block.norm_v.weight": "norm_v.weight",
    "attn_block.norm_v.bias": "norm_v.bias",
    "attn_block.cross_attn.q.weight": "q_proj.weight",
    "attn_block.cross_attn.k.weight": "k_proj.weight",
    "attn_block.cross_attn.v.weight": "v_proj.weight",
    "attn_block.cross_attn.proj.weight": "out_proj.weight",
    "attn_block.cross_attn.proj.bias": "out_proj.bias",
    "bn.weight": "batch_norm.weight",
    "bn.bias": "batch_norm.bias",
    "bn.running_mean": "batch_norm.running_mean",
    "bn.running_var": "batch_norm.running_var",
    "bn.num_batches_tracked": "batch_norm.num_batches_tracked",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
}


class AttentiveFusionHead(AttendingHead):
    """Learned queries attend over the bank; BatchNorm and a linear classifier read what they gather.

    With tokens x_n (D), a learned query q and three LayerNorms, per attention head h:

        p_hn = softmax_n( scale * (W_q,h LN_q(q)) . (W_k,h LN_k(x_n)) )
        o_h  = sum_n p_hn W_v,h LN_v(x_n)
        logits = W_c BatchNorm(W_o [o_1 ... o_H] + b_o) + b_c

    `implementation="fast"` computes exactly this in another order, which `attention.py` derives;
    `implementation="explicit"` is the textbook order. Both draw the same dropout mask from the same generator state. In
    float32 the fast order loses digits if tokens carry a common offset far larger than their spread (1e-3 at 100
    times); tokens of vision backbones do not.

    Args:
        hidden_size: D, the width of a token.
        num_tokens: N, tokens in the bank.
        num_labels: C.
        num_heads: H; `None` for one head per token, as the paper uses for layer fusion.
        num_queries: Q.
        query_fusion: what BatchNorm and classifier read of several queries: their outputs side by side (`"concat"`), or
            their mean (`"mean"`).
        head_dim_multiplier: the width of a head is `head_dim_multiplier * (D // H)`.
        attention_dropout: on the attention weights.
        projection_dropout: after the output projection.
        implementation: `"fast"` or `"explicit"`.
        places: of the tokens, see `AttendingHead`.

    Raises:
        LayerFusionError: for more heads than D, or an unknown implementation or fusion.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tokens: int,
        num_labels: int,
        num_heads: int | None = None,
        num_queries: int = 1,
        head_dim_multiplier: int = 2,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        implementation: str = "fast",
        query_fusion: str = "concat",
        places: Sequence[tuple[int, int]] | None = None,
    ):
        num_heads = num_tokens if num_heads is None else num_heads
        if not 1 <= num_heads <= hidden_size:
            raise LayerFusionError(
                f"num_heads={num_heads} does not fit tokens of width {hidden_size}: "
                f"set num_heads to something from 1 to {hidden_size}"
            )
        if num_queries < 1 or head_dim_multiplier < 1:
            raise LayerFusionError(
                f"num_queries={num_queries} and head_dim_multiplier={head_dim_multiplier} must be 1 or more"
            )
        if query_fusion not in ("concat", "mean"):
            raise LayerFusionError(f"query_fusion {query_fusion!r} is unknown: use 'concat' or 'mean'")
        super().__init__(
            hidden_size,
            num_tokens,
            num_heads,
            num_queries,
            attention_dropout,
            projection_dropout,
            implementation,
            places,
        )
        self.query_fusion = query_fusion
        self.head_dim = head_dim_multiplier * (hidden_size // num_heads)
        self.scale = self.head_dim**-0.5
        inner = num_heads * self.head_dim
        self.norm_q = nn.LayerNorm(hidden_size)
        self.norm_k = nn.LayerNorm(hidden_size)
        self.norm_v = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(hidden_size, inner, bias=False)
        self.out_proj = nn.Linear(inner, hidden_size)
        self._add_classifier(hidden_size * (num_queries if query_fusion == "concat" else 1), num_labels)

    def _fold(self, parameters: Mapping[str, Tensor], num_rows: int) -> FoldedParameters:
        return fold_parameters(parameters, self.num_heads, num_rows * self.num_queries, self.eps)

    def _fuse(self, projected: Tensor) -> Tensor:
        return projected.mean(dim=-2) if self.query_fusion == "mean" else projected.flatten(-2)

    def _attend_explicit(self, tokens: Tensor, token_keep: Tensor | None) -> tuple[Tensor, Tensor]:
        heads = (self.num_heads, self.head_dim)
        queries = self.q_proj(self.norm_q(self.query[0])).unflatten(-1, heads)  # (Q, H, d)
        keys = self.k_proj(self.norm_k(tokens)).unflatten(-1, heads)  # (B, N, H, d)
        values = self.v_proj(self.norm_v(tokens)).unflatten(-1, heads)  # (B, N, H, d)
        scores = torch.einsum("qhd,bnhd->bqhn", queries * self.scale, keys)
        attentions = scores.softmax(dim=-1)
        weights = self.attention_dropout(attentions)
        if token_keep is not None:
            weights = weights * token_keep[:, None, None]
        gathered = torch.einsum("bqhn,bnhd->bqhd", weights.to(values.dtype), values)
        return self.out_proj(gathered.flatten(2)), attentions

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a head trained with the paper's code, by its parameter names (see `REFERENCE_NAMES`).

        Raises:
            LayerFusionError: naming the tensors that are missing, unknown or of another shape.
        """
        own = self.state_dict()
        missing = sorted(REFERENCE_NAMES.keys() - state_dict.keys())
        unknown = sorted(state_dict.keys() - REFERENCE_NAMES.keys())
        if missing or unknown:
            raise LayerFusionError(f"not a reference head: missing tensors {missing}, unknown tensors {unknown}")
        for name, tensor in state_dict.items():
            expected = own[REFERENCE_NAMES[name]].shape
            if tensor.shape != expected:
                raise LayerFusionError(
                    f"{name} has shape {tuple(tensor.shape)}, but this head expects {tuple(expected)}: "
                    "check hidden_size, num_heads and num_labels"
                )
        self.load_state_dict({REFERENCE_NAMES[name]: tensor for name, tensor in state_dict.items()})
