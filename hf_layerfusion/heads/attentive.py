"""The attentive fusion head of arXiv 2601.09322, and the same arithmetic in an order that costs ten times less."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..errors import LayerFusionError
from .attention import attend, fold_parameters, token_scales
from .batch_norm import GlobalBatchNorm1d
from .stack_inputs import StackInputs

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


class AttentiveFusionHead(nn.Module):
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
        num_queries: Q; the outputs of several queries are concatenated before BatchNorm.
        head_dim_multiplier: the width of a head is `head_dim_multiplier * (D // H)`.
        attention_dropout: on the attention weights.
        projection_dropout: after the output projection.
        implementation: `"fast"` or `"explicit"`.

    Raises:
        LayerFusionError: for more heads than D, or an unknown implementation.
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
    ):
        super().__init__()
        if implementation not in ("fast", "explicit"):
            raise LayerFusionError(f"head implementation {implementation!r} is unknown: use 'fast' or 'explicit'")
        self.hidden_size, self.num_tokens, self.num_queries = hidden_size, num_tokens, num_queries
        self.num_heads = num_tokens if num_heads is None else num_heads
        if not 1 <= self.num_heads <= hidden_size:
            raise LayerFusionError(
                f"num_heads={self.num_heads} does not fit tokens of width {hidden_size}: "
                f"set num_heads to something from 1 to {hidden_size}"
            )
        self.implementation = implementation
        if num_queries < 1 or head_dim_multiplier < 1:
            raise LayerFusionError(
                f"num_queries={num_queries} and head_dim_multiplier={head_dim_multiplier} must be 1 or more"
            )
        self.head_dim = head_dim_multiplier * (hidden_size // self.num_heads)
        self.scale = self.head_dim**-0.5
        inner = self.num_heads * self.head_dim
        self.query = nn.Parameter(torch.empty(1, num_queries, hidden_size))
        self.norm_q = nn.LayerNorm(hidden_size)
        self.norm_k = nn.LayerNorm(hidden_size)
        self.norm_v = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(hidden_size, inner, bias=False)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.out_proj = nn.Linear(inner, hidden_size)
        self.projection_dropout = nn.Dropout(projection_dropout)
        self.batch_norm = GlobalBatchNorm1d(num_queries * hidden_size)
        self.classifier = nn.Linear(num_queries * hidden_size, num_labels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Query N(0, 0.02^2); norms at identity; linear layers at PyTorch's default, as in the reference."""
        init.normal_(self.query, std=0.02)
        for norm in (self.norm_q, self.norm_k, self.norm_v, self.batch_norm):
            init.ones_(norm.weight)
            init.zeros_(norm.bias)
        init.zeros_(self.batch_norm.running_mean)
        init.ones_(self.batch_norm.running_var)
        init.zeros_(self.batch_norm.num_batches_tracked)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.classifier):
            bound = linear.in_features**-0.5
            init.uniform_(linear.weight, -bound, bound)
            if linear.bias is not None:
                init.uniform_(linear.bias, -bound, bound)

    def forward(
        self,
        tokens: Tensor,
        output_attentions: bool = False,
        *,
        normalize: bool = False,
        token_statistics: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classify a batch of banks.

        Args:
            tokens: `(B, N, D)`, of any floating dtype: cached tokens need no copy in that of the head.
            output_attentions: also return the attention weights `(B, Q, H, N)`, before dropout.
            normalize: divide each token by its L2 norm first. In the fast order this costs nothing.
            token_statistics: `(B, N, 2)`, the L2 norm and the standard deviation of each token as given, as
                `hf_layerfusion.features.token_statistics` computes them; they save the fast order one pass.

        Returns:
            Logits `(B, C)`, or `(logits, attentions)`.
        """
        if self.implementation == "fast":
            projected, attentions = self._attend_fast(tokens, normalize, token_statistics)
        else:
            tokens = tokens.to(self.query.dtype)
            projected, attentions = self._attend_explicit(F.normalize(tokens, dim=-1) if normalize else tokens)
        logits = self.classifier(self.batch_norm(self.projection_dropout(projected).flatten(1)))
        return (logits, attentions) if output_attentions else logits

    def _attend_fast(self, tokens: Tensor, normalize: bool, statistics: Tensor | None) -> tuple[Tensor, Tensor]:
        parameters = {name: parameter.unsqueeze(0) for name, parameter in self.named_parameters()}
        folded = fold_parameters(parameters, self.num_heads, len(tokens) * self.num_queries, self.norm_k.eps)
        scales = token_scales(tokens, normalize, self.norm_k.eps, statistics)
        keep = None
        if self.training and self.attention_dropout.p:
            # In the shape of the explicit order, whose draws these are.
            shape = (len(tokens), self.num_queries, self.num_heads, self.num_tokens)
            keep = self.attention_dropout(scales.new_ones(shape)).flatten(1, 2).mT
        projected, attentions = attend(folded, tokens, scales, self.num_queries, keep)
        return projected.squeeze(0), attentions.mT.unflatten(1, (self.num_queries, self.num_heads))

    def _attend_explicit(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.num_heads, self.head_dim)
        queries = self.q_proj(self.norm_q(self.query[0])).unflatten(-1, heads)  # (Q, H, d)
        keys = self.k_proj(self.norm_k(tokens)).unflatten(-1, heads)  # (B, N, H, d)
        values = self.v_proj(self.norm_v(tokens)).unflatten(-1, heads)  # (B, N, H, d)
        scores = torch.einsum("qhd,bnhd->bqhn", queries * self.scale, keys)
        attentions = scores.softmax(dim=-1)
        gathered = torch.einsum("bqhn,bnhd->bqhd", self.attention_dropout(attentions).to(values.dtype), values)
        return self.out_proj(gathered.flatten(2)), attentions

    def run_stack(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: StackInputs
    ) -> Tensor:
        """K heads of this shape over one batch, in the fast order: logits `(K, B, C)`.

        Args:
            parameters: of all heads, by name, with a leading axis K.
            buffers: likewise; running statistics are updated in place when training.
            inputs: the batch.
        """
        tokens, scales = inputs.tokens, inputs.scales
        if scales is None:
            scales = token_scales(tokens, False, self.norm_k.eps)
        folded = fold_parameters(parameters, self.num_heads, len(tokens) * self.num_queries, self.norm_k.eps)
        projected, _ = attend(folded, tokens, scales, self.num_queries, inputs.attention_keep)  # (K, B, Q, D)
        if inputs.projection_keep is not None:
            projected = projected * inputs.projection_keep
        # K heads with a norm each are one norm over K times as many channels.
        channels = projected.flatten(2).transpose(0, 1).flatten(1)  # (B, K * Q * D)
        normed = F.batch_norm(
            channels,
            buffers["batch_norm.running_mean"].view(-1),
            buffers["batch_norm.running_var"].view(-1),
            parameters["batch_norm.weight"].flatten(),
            parameters["batch_norm.bias"].flatten(),
            training=inputs.training and len(tokens) > 1,  # as `GlobalBatchNorm1d`
            momentum=self.batch_norm.momentum,
            eps=self.batch_norm.eps,
        )
        normed = normed.unflatten(1, (len(projected), -1)).transpose(0, 1)  # (K, B, Q * D)
        bias = parameters["classifier.bias"][:, None]
        return torch.baddbmm(bias, normed, parameters["classifier.weight"].mT)

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
