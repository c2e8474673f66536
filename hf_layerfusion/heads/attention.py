"""The fast order of the attentive head's arithmetic, for one head or a stack of heads over the same tokens.

With tokens x_n (D), a learned query q, and LN(x) = g * (x - mean(x)) * r(x) + b, an attention head h computes

    p_hn = softmax_n( scale * (W_q,h LN_q(q)) . (W_k,h LN_k(x_n)) )
    o_h  = sum_n p_hn W_v,h LN_v(x_n)

The query is a constant, so its product with W_k is one vector per head, and LN's mean and bias fold into parameters:

    u_h  = centre(g_k * W_k,h^T W_q,h LN_q(q)) * scale      score = r_n (x_n . u_h)      (b_k cancels in the softmax)
    o_h  = W'_h z_h + (sum_n p_hn) W_v,h b_v                W'_h  = centre_rows(W_v,h diag(g_v))
    z_h  = sum_n p_hn r_n x_n

which replaces two products of B x N x D x 2D multiply-adds by products over pooled vectors: 2 B N D H for scores and
z, B x D x 2D for W'. With few heads and many rows, the output projection is folded in too: o = sum_h (W_o,h W'_h) z_h.

K stacked heads are K times as many attention heads over one batch of tokens. Shapes below use B rows, N tokens, D
width, K stacked heads, Q queries, H attention heads of width d each, and P = K * Q * H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens and pooled vectors of the rows that are worked on at a time. Less does not fill the products by `values`, which
# are read anew for every block; more does not stay in cache. From 2 to 8 MB the time is the same to 5 %.
BLOCK_BYTES = 2**22


@dataclass
class FoldedParameters:
    """What is left of a stack's parameters once everything that does not depend on the tokens is done.

    Attributes:
        probes: u, `(P, D)`.
        values: maps of the pooled vectors: W', `(K, H, d, D)`, or with the output projection `(K, 1, D, H * D)`.
        output: the output projection, `(K, D, H * d)`; `None` where `values` contains it.
        value_bias: what a unit of attention of head h adds, whatever the tokens: `W_v,h b_v`, `(K, H, d)`, or
            `W_o,h W_v,h b_v`, `(K, H, D)`.
        output_bias: `(K, D)`.
    """

    probes: Tensor
    values: Tensor
    output: Tensor | None
    value_bias: Tensor
    output_bias: Tensor


def token_scales(tokens: Tensor, normalize: bool, eps: float, statistics: Tensor | None = None) -> Tensor:
    """r: what each token is multiplied with in front of the folded maps, `(B, N)`.

    `1 / sqrt(var(x) + eps)` of a token as it is; with `normalize`, that of `x / |x|`, times `1 / |x|`.

    Args:
        tokens: `(B, N, D)`.
        normalize: whether tokens are to be divided by their L2 norm.
        eps: of the LayerNorms.
        statistics: `(B, N, 2)`, norms and standard deviations, if known.
    """
    if statistics is not None:
        norm, variance = statistics[..., 0], statistics[..., 1].square()
    else:
        wide = tokens if tokens.dtype == torch.float64 else tokens.float()
        # From norm and mean: `torch.var` is ten times slower on CPU.
        norm = torch.linalg.vector_norm(wide, dim=-1)
        variance = (norm.square() / tokens.shape[-1] - wide.mean(dim=-1).square()).clamp_min(0)
    if not normalize:
        return (variance + eps).rsqrt()
    inverse_norm = norm.clamp_min(1e-12).reciprocal()  # the bound of `F.normalize`
    return inverse_norm * (variance * inverse_norm.square() + eps).rsqrt()


def fold_parameters(parameters: Mapping[str, Tensor], num_heads: int, num_rows: int, eps: float) -> FoldedParameters:
    """Fold K heads, given by their parameters with a leading axis K, for batches of `num_rows` rows."""
    query, key, value = (parameters[f"{name}_proj.weight"].unflatten(1, (num_heads, -1)) for name in "qkv")
    stack, _, head_dim, width = value.shape  # (K, H, d, D)
    normed = F.layer_norm(parameters["query"].flatten(1, 2), (width,), eps=eps)  # (K, Q, D)
    normed = normed * parameters["norm_q.weight"][:, None] + parameters["norm_q.bias"][:, None]
    queries = normed @ query.flatten(1, 2).mT  # (K, Q, H * d)
    queries = queries.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)  # (K, H, Q, d)
    probes = (queries @ key).transpose(1, 2)  # (K, Q, H, D)
    probes = probes * (parameters["norm_k.weight"] * head_dim**-0.5)[:, None, None]
    # b_k cancels in the softmax, but stays in the graph: its gradient is zero, not missing, which weight decay and
    # distributed training rely on.
    probes = probes + 0.0 * parameters["norm_k.bias"][:, None, None]
    values = _Centred.apply(value * parameters["norm_v.weight"][:, None, None])
    value_bias = (value.flatten(1, 2) @ parameters["norm_v.bias"][..., None]).view(stack, num_heads, head_dim)
    output = parameters["out_proj.weight"]  # (K, D, H * d)
    folded = FoldedParameters(
        _Centred.apply(probes).flatten(0, 2), values, output, value_bias, parameters["out_proj.bias"]
    )
    # Multiply-adds of both orders, forward and backward alike: B H 2 D d against B H D^2, and H D^2 d for the fold.
    if num_rows * (2 * head_dim - width) > width * head_dim:
        by_head = output.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)  # (K, H, D, d)
        folded.values = (by_head @ values).transpose(1, 2).flatten(2)[:, None]  # (K, 1, D, H * D)
        folded.value_bias = (by_head @ value_bias[..., None]).squeeze(-1)  # (K, H, D)
        folded.output = None
    return folded


class _Centred(torch.autograd.Function):
    """`x - mean(x)` over the last axis: a projection, so its gradient is itself, in two passes instead of six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(dim=-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient - gradient.mean(dim=-1, keepdim=True)


def attend(
    folded: FoldedParameters, tokens: Tensor, scales: Tensor, num_queries: int, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and output projection of K heads.

    Args:
        folded: the heads.
        tokens: `(B, N, D)`; of any floating dtype, and not normalised if `scales` contains the normalisation.
        scales: r, `(B, N)`: what each token is multiplied with.
        num_queries: Q.
        keep: dropout of the attention weights, `(B, N, P)`: 0, or one over the share that is kept.

    Returns:
        The gathered and projected tokens `(K, B, Q, D)`, and the attention weights before dropout `(B, N, P)`.
    """
    run = _BlockedAttention.apply if _can_run_in_blocks(tokens, scales, folded.probes) else _attend_at_once
    gathered, mass, attentions = run(tokens, scales, folded.probes, folded.values, keep, num_queries)
    stack, num_heads, _ = folded.value_bias.shape
    mass = mass.to(folded.value_bias.dtype).view(len(tokens), stack, num_queries, num_heads)
    mass = mass.permute(1, 0, 2, 3).flatten(1, 2)  # (K, B * Q, H)
    if folded.output is None:
        projected = gathered + torch.baddbmm(folded.output_bias[:, None], mass, folded.value_bias)
    else:
        by_head = gathered.unflatten(-1, (num_heads, -1))  # (K, B * Q, H, d)
        by_head = by_head + (mass[..., None] * folded.value_bias[:, None]).to(by_head.dtype)
        projected = torch.baddbmm(folded.output_bias[:, None], by_head.flatten(2), folded.output.mT)
    return projected.unflatten(1, (len(tokens), num_queries)), attentions


def _attend_at_once(
    tokens: Tensor, scales: Tensor, probes: Tensor, values: Tensor, keep: Tensor | None, num_queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A few large products: for GPUs, for compilers, and where the tokens need a gradient.

    Softmax and scales are in float32 at least, whatever the products are in.
    """
    if not torch.is_autocast_enabled(tokens.device.type):  # which casts by itself
        tokens = tokens.to(probes.dtype)
    scores = (tokens @ probes.mT) * scales[..., None]  # (B, N, P)
    attentions = scores.softmax(dim=1)
    dropped = attentions if keep is None else attentions * keep
    weights = (dropped * scales[..., None]).to(probes.dtype)
    pooled = _by_map(weights.mT @ tokens, values, num_queries)  # (K * M, B * Q, width)
    mapped = pooled @ values.flatten(0, 1).mT  # (K * M, B * Q, out)
    mapped = mapped.unflatten(0, values.shape[:2]).transpose(1, 2).flatten(2)  # (K, B * Q, M * out)
    return mapped, dropped.sum(dim=1), attentions


def _by_map(pooled: Tensor, values: Tensor, num_queries: int) -> Tensor:
    """`(B, P, D)` pooled vectors as `(K * M, B * Q, width)`: side by side, the vectors that one map reads."""
    stack, maps, _, width = values.shape
    return pooled.view(-1, stack, num_queries, maps, width).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)


def _can_run_in_blocks(tokens: Tensor, scales: Tensor, probes: Tensor) -> bool:
    return (
        tokens.device.type == "cpu"
        and probes.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (tokens.requires_grad or scales.requires_grad))
    )


class _BlockedAttention(torch.autograd.Function):
    """`_attend_at_once` in blocks of rows that stay in cache, with the pooled vectors recomputed in the backward pass.

    Neither the normalised tokens, nor the pooled vectors of the whole batch, nor their gradient are ever in memory:
    what is kept between the passes is the attention, and where it is small against the tokens the pooled vectors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        scales: Tensor,
        probes: Tensor,
        values: Tensor,
        keep: Tensor | None,
        num_queries: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stack, maps, out, _ = values.shape
        rows, num_tokens, _ = tokens.shape
        num_probes = len(probes)
        attentions = probes.new_empty(rows, num_tokens, num_probes)
        mapped = probes.new_empty(stack, rows, num_queries, maps, out)
        # To pool again costs as much as the scores did; to keep what was pooled costs memory, P vectors against N.
        keeps_pooled = any(ctx.needs_input_grad) and 4 * num_probes <= num_tokens
        all_pooled = probes.new_empty(rows, num_probes, probes.shape[1]) if keeps_pooled else None
        to_values = values.flatten(0, 1).mT
        to_scores = probes.t()
        for block in _blocks(tokens, num_probes):
            x, scale = tokens[block].to(probes.dtype), scales[block, :, None]
            attention = attentions[block]
            torch.softmax((x @ to_scores).mul_(scale), dim=1, out=attention)
            weights = attention * scale if keep is None else (attention * keep[block]).mul_(scale)
            pooled = torch.bmm(weights.mT, x)  # (b, P, D)
            if all_pooled is not None:
                all_pooled[block] = pooled
            result = torch.bmm(_by_map(pooled, values, num_queries), to_values)  # (K * M, b * Q, out)
            mapped[:, block] = result.view(stack, maps, -1, num_queries, out).permute(0, 2, 3, 1, 4)
        mass = probes.new_ones(rows, num_probes) if keep is None else torch.linalg.vecdot(attentions, keep, dim=1)
        ctx.save_for_backward(tokens, scales, probes, values, keep, attentions, all_pooled)
        ctx.num_queries = num_queries
        ctx.set_materialize_grads(False)
        return mapped.view(stack, rows * num_queries, maps * out), mass, attentions

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_mapped: Tensor | None, grad_mass: Tensor | None, grad_attentions: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tokens, scales, probes, values, keep, attentions, all_pooled = ctx.saved_tensors
        num_queries = ctx.num_queries
        stack, maps, out, width = values.shape
        grad_probes, grad_values = torch.zeros_like(probes), torch.zeros_like(values).flatten(0, 1)
        if grad_mapped is None:
            grad_mapped = probes.new_zeros(stack, len(tokens) * num_queries, maps * out)
        grad_mapped = grad_mapped.view(stack, -1, num_queries, maps, out)
        from_values = values.flatten(0, 1)
        for block in _blocks(tokens, len(probes)):
            x, scale, attention = tokens[block].to(probes.dtype), scales[block, :, None], attentions[block]
            if all_pooled is not None:
                pooled = all_pooled[block]
            else:
                weights = attention * scale if keep is None else (attention * keep[block]).mul_(scale)
                pooled = torch.bmm(weights.mT, x)
            grad_result = grad_mapped[:, block].permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
            grad_values.baddbmm_(grad_result.mT, _by_map(pooled, values, num_queries))
            grad_pooled = torch.bmm(grad_result, from_values)  # (K * M, b * Q, width)
            grad_pooled = grad_pooled.view(stack, maps, -1, num_queries, width).permute(2, 0, 3, 1, 4)
            grad_pooled = grad_pooled.reshape(len(x), len(probes), -1)  # (b, P, D)
            grad_attention = torch.bmm(x, grad_pooled.mT).mul_(scale)  # (b, N, P), with respect to what was kept
            if keep is not None:
                if grad_mass is not None:
                    grad_attention += grad_mass[block, None]
                grad_attention *= keep[block]
            if grad_attentions is not None:
                grad_attention += grad_attentions[block]
            grad_attention *= attention
            grad_scores = grad_attention.sub_(attention * grad_attention.sum(dim=1, keepdim=True)).mul_(scale)
            grad_probes.addmm_(grad_scores.flatten(0, 1).t(), x.flatten(0, 1))
        return None, None, grad_probes, grad_values.view_as(values), None, None


def _blocks(tokens: Tensor, num_probes: int) -> list[slice]:
    per_row = (tokens.shape[1] + num_probes) * tokens.shape[2] * 4
    size = max(1, BLOCK_BYTES // per_row)
    return [slice(start, start + size) for start in range(0, len(tokens), size)]
