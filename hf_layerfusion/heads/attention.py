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

# Of tokens, and of pooled vectors, that are worked on at a time. Less does not fill the products by `values`, which are
# read anew for every block; more does not stay in cache.
BLOCK_BYTES = 2**22


@dataclass
class FoldedParameters:
    """What is left of a stack's parameters once everything that does not depend on the tokens is done.

    The maps of the pooled vectors are `values` = W', `(K, H, d, D)`, in front of the output projection, or with few
    heads and many rows W_o,h W', `(K, 1, D, H * D)`, instead of it. M stands for their number, H or 1.

    Attributes:
        probes: u, `(P, D)`.
        values: W_v,h, not yet W', `(K, H, d, D)`; or W_o,h W', `(K, 1, D, H * D)`.
        gain: g_v, `(K, D)`, which makes W' of W_v; `None` if that is done.
        shift: b_v, `(K, D)`, likewise.
        value_bias: what a unit of attention of head h adds, whatever the tokens: W_o,h W_v,h b_v, `(K, 1, H, D)`;
            `None` where `shift` says it.
        output: the output projection, `(K, D, H * d)`; `None` where `values` contains it.
        output_bias: `(K, D)`.
    """

    probes: Tensor
    values: Tensor
    gain: Tensor | None
    shift: Tensor | None
    value_bias: Tensor | None
    output: Tensor | None
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
    _, _, head_dim, width = value.shape  # (K, H, d, D)
    normed = F.layer_norm(parameters["query"].flatten(1, 2), (width,), eps=eps)  # (K, Q, D)
    normed = normed * parameters["norm_q.weight"][:, None] + parameters["norm_q.bias"][:, None]
    # This way round the gradient of W_q comes in its own layout.
    queries = query.flatten(1, 2) @ normed.mT  # (K, H * d, Q)
    queries = queries.unflatten(1, (num_heads, head_dim)).mT  # (K, H, Q, d)
    probes = (queries @ key).transpose(1, 2)  # (K, Q, H, D)
    probes = probes * (parameters["norm_k.weight"] * head_dim**-0.5)[:, None, None]
    # b_k cancels in the softmax, but stays in the graph: its gradient is zero, not missing, which weight decay and
    # distributed training rely on.
    probes = probes + 0.0 * parameters["norm_k.bias"][:, None, None]
    probes = (probes - probes.mean(dim=-1, keepdim=True)).flatten(0, 2)
    gain, shift = parameters["norm_v.weight"], parameters["norm_v.bias"]
    output, output_bias = parameters["out_proj.weight"], parameters["out_proj.bias"]
    # Multiply-adds of both orders, forward and backward alike: B H 2 D d against B H D^2, and H D^2 d for the fold.
    if num_rows * (2 * head_dim - width) <= width * head_dim:
        return FoldedParameters(probes, value, gain, shift, None, output, output_bias)
    values, value_bias = _fold_norm(value, gain, shift)
    by_head = output.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)  # (K, H, D, d)
    values = (by_head @ values).transpose(1, 2).flatten(2)[:, None]  # (K, 1, D, H * D)
    value_bias = (by_head @ value_bias.mT).squeeze(-1)[:, None]  # (K, 1, H, D)
    return FoldedParameters(probes, values, None, None, value_bias, None, output_bias)


def _fold_norm(value: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """W' `(K, H, d, D)` and W_v,h b_v `(K, H, 1, d)` of W_v `(K, H, d, D)`, g_v and b_v `(K, D)`."""
    values = value * gain[:, None, None]
    values -= values.mean(dim=-1, keepdim=True)  # in place: fresh memory costs more than the arithmetic
    value_bias = (value.flatten(1, 2) @ shift[..., None]).view(*value.shape[:2], 1, -1)
    return values, value_bias


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
    gathered, attentions = run(
        tokens, scales, folded.probes, folded.values, folded.gain, folded.shift, folded.value_bias, keep, num_queries
    )  # (K, B * Q, H * d), (B, N, P)
    if folded.output is None:
        projected = gathered + folded.output_bias[:, None]
    else:
        projected = _StackedLinear.apply(gathered, folded.output, folded.output_bias)
    return projected.unflatten(1, (len(tokens), num_queries)), attentions


class _StackedLinear(torch.autograd.Function):
    """`x W^T + b` of K layers, `(K, B, in)` to `(K, B, out)`.

    `baddbmm` would do, but gives the gradient of W transposed, which costs a copy of it.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if torch.is_autocast_enabled(inputs.device.type):
            dtype = torch.get_autocast_dtype(inputs.device.type)
            inputs, weight, bias = inputs.to(dtype), weight.to(dtype), bias.to(dtype)
        ctx.save_for_backward(inputs, weight)
        return torch.baddbmm(bias[:, None], inputs, weight.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        return gradient @ weight, gradient.mT @ inputs, gradient.sum(dim=1)


def _attend_at_once(
    tokens: Tensor,
    scales: Tensor,
    probes: Tensor,
    values: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    value_bias: Tensor | None,
    keep: Tensor | None,
    num_queries: int,
) -> tuple[Tensor, Tensor]:
    """A few large products: for GPUs, for compilers, and where the tokens need a gradient.

    Softmax and scales are in float32 at least, whatever the products are in.
    """
    if gain is not None and shift is not None:
        values, value_bias = _fold_norm(values, gain, shift)
    assert value_bias is not None
    if not torch.is_autocast_enabled(tokens.device.type):  # which casts by itself
        tokens = tokens.to(probes.dtype)
    scores = (tokens @ probes.mT) * scales[..., None]  # (B, N, P)
    attentions = scores.softmax(dim=1)
    dropped = attentions if keep is None else attentions * keep
    weights = (dropped * scales[..., None]).to(probes.dtype)
    pooled = _by_map(weights.mT @ tokens, values, num_queries)  # (K * M, B * Q, width)
    mapped = pooled @ values.flatten(0, 1).mT  # (K * M, B * Q, out)
    mass = _by_map(dropped.sum(dim=1)[..., None].to(probes.dtype), value_bias.mT, num_queries)
    mapped = mapped + mass @ value_bias.flatten(0, 1)
    mapped = mapped.unflatten(0, values.shape[:2]).transpose(1, 2).flatten(2)  # (K, B * Q, M * out)
    return mapped, attentions


def _by_map(pooled: Tensor, values: Tensor, num_queries: int) -> Tensor:
    """`(B, P, D)` pooled vectors as `(K * M, B * Q, width)`: side by side, the vectors that one map reads."""
    stack, maps, _, width = values.shape
    return pooled.view(-1, stack, num_queries, maps, width).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)


def _from_map(by_map: Tensor, values: Tensor, num_queries: int, num_probes: int) -> Tensor:
    """The way back: `(K * M, B * Q, width)` as `(B, P, D)`."""
    stack, maps, _, width = values.shape
    rows = by_map.shape[1] // num_queries
    by_row = by_map.view(stack, maps, rows, num_queries, width).permute(2, 0, 3, 1, 4)
    return by_row.reshape(rows, num_probes, -1)


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
    W_v is folded here too, since its gradient can then be made in one array, and fresh memory costs more than
    arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        scales: Tensor,
        probes: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        value_bias: Tensor | None,
        keep: Tensor | None,
        num_queries: int,
    ) -> tuple[Tensor, Tensor]:
        values = weight
        if gain is not None and shift is not None:
            values, value_bias = _fold_norm(weight, gain, shift)
        assert value_bias is not None
        stack, maps, out, _ = values.shape
        rows, num_tokens, _ = tokens.shape
        num_probes = len(probes)
        attentions = probes.new_empty(rows, num_tokens, num_probes)
        mapped = probes.new_empty(stack, rows, num_queries, maps, out)
        # To pool again costs as much as the scores did; to keep what was pooled costs memory, P vectors against N.
        keeps_pooled = any(ctx.needs_input_grad) and 4 * num_probes <= num_tokens
        all_pooled = probes.new_empty(rows, *probes.shape) if keeps_pooled else None
        to_values, to_scores, bias = values.flatten(0, 1).mT, probes.t(), value_bias.flatten(0, 1)
        whole_bias = bias.sum(dim=1, keepdim=True)  # without dropout, the weights of every head sum to one
        blocks = _blocks(tokens, probes)
        buffer = _Buffer(blocks, probes)
        for block, parts in blocks:
            kept = None if keep is None else keep[block]
            pooled = buffer.take(block) if all_pooled is None else all_pooled[block]
            for part in parts:
                x, scale = tokens[part].to(probes.dtype), scales[part, :, None]
                torch.softmax((x @ to_scores).mul_(scale), dim=1, out=attentions[part])
                _pool(pooled, block, part, x, scale, attentions, keep)
            result = torch.bmm(_by_map(pooled, values, num_queries), to_values)  # (K * M, b * Q, out)
            if kept is None:
                result += whole_bias
            else:
                mass = torch.linalg.vecdot(attentions[block], kept, dim=1)[..., None]  # (b, P, 1)
                result.baddbmm_(_by_map(mass, value_bias.mT, num_queries), bias)
            mapped[:, block] = result.view(stack, maps, -1, num_queries, out).permute(0, 2, 3, 1, 4)
        ctx.save_for_backward(
            tokens, scales, probes, weight, values, gain, shift, value_bias, keep, attentions, all_pooled
        )
        ctx.num_queries = num_queries
        ctx.set_materialize_grads(False)
        return mapped.view(stack, rows * num_queries, maps * out), attentions

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_mapped: Tensor | None, grad_attentions: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tokens, scales, probes, weight, values, gain, shift, value_bias, keep, attentions, all_pooled = (
            ctx.saved_tensors
        )
        num_queries = ctx.num_queries
        stack, maps, out, width = values.shape
        grad_probes = torch.zeros_like(probes)
        grad_values = torch.empty_like(values).flatten(0, 1)
        grad_bias = torch.zeros_like(value_bias).flatten(0, 1)
        if grad_mapped is None:
            grad_mapped = probes.new_zeros(stack, len(tokens) * num_queries, maps * out)
        grad_mapped = grad_mapped.view(stack, -1, num_queries, maps, out)
        from_values, from_bias = values.flatten(0, 1), value_bias.flatten(0, 1).mT
        beta = 0  # the first block overwrites: no pass to clear the array
        blocks = _blocks(tokens, probes)
        buffer, grad_buffer = _Buffer(blocks, probes), _Buffer(blocks, probes)
        for block, parts in blocks:
            kept = None if keep is None else keep[block]
            if all_pooled is None:
                pooled = buffer.take(block)
                for part in parts:
                    x = tokens[part].to(probes.dtype)
                    _pool(pooled, block, part, x, scales[part, :, None], attentions, keep)
            else:
                pooled = all_pooled[block]
            grad_result = grad_mapped[:, block].permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
            grad_values.baddbmm_(grad_result.mT, _by_map(pooled, values, num_queries), beta=beta)
            beta = 1
            grad_by_map = grad_buffer.take(block).view(*grad_result.shape[:2], width)
            torch.bmm(grad_result, from_values, out=grad_by_map)
            grad_pooled = _from_map(grad_by_map, values, num_queries, len(probes))  # (b, P, D)
            if kept is None:
                grad_bias += grad_result.sum(dim=1, keepdim=True)
                grad_mass = None
            else:
                mass = torch.linalg.vecdot(attentions[block], kept, dim=1)[..., None]
                grad_bias.baddbmm_(_by_map(mass, value_bias.mT, num_queries).mT, grad_result)
                grad_mass = _from_map(torch.bmm(grad_result, from_bias), value_bias.mT, num_queries, len(probes))
            for part in parts:
                x, scale, attention = tokens[part].to(probes.dtype), scales[part, :, None], attentions[part]
                inside = slice(part.start - block.start, part.stop - block.start)
                grad_attention = torch.bmm(x, grad_pooled[inside].mT).mul_(scale)  # (b, N, P)
                if keep is not None and grad_mass is not None:
                    grad_attention = grad_attention.add_(grad_mass[inside].mT).mul_(keep[part])
                if grad_attentions is not None:
                    grad_attention += grad_attentions[part]
                grad_attention *= attention
                grad_scores = grad_attention.sub_(attention * grad_attention.sum(dim=1, keepdim=True)).mul_(scale)
                grad_probes.addmm_(grad_scores.flatten(0, 1).t(), x.flatten(0, 1))
        grad_values, grad_bias = grad_values.view_as(values), grad_bias.view_as(value_bias)
        if gain is None:
            return None, None, grad_probes, grad_values, None, None, grad_bias, None, None
        grad_values -= grad_values.mean(dim=-1, keepdim=True)
        grad_gain = torch.zeros_like(gain)
        for head in range(maps):  # one head at a time stays in cache
            grad_gain += (grad_values[:, head] * weight[:, head]).sum(dim=1)
        grad_values *= gain[:, None, None]
        flat_bias = grad_bias.flatten(1)[..., None]  # (K, H * d, 1)
        grad_values.flatten(1, 2).baddbmm_(flat_bias, shift[:, None])
        grad_shift = (weight.flatten(1, 2).mT @ flat_bias).squeeze(-1)
        return None, None, grad_probes, grad_values, grad_gain, grad_shift, None, None, None


class _Buffer:
    """Memory for the pooled vectors of one block after the other: fresh memory costs more than what is done with it."""

    def __init__(self, blocks: list[tuple[slice, list[slice]]], probes: Tensor):
        largest = max((block.stop - block.start for block, _ in blocks), default=0)
        self.memory = probes.new_empty(largest, *probes.shape)

    def take(self, block: slice) -> Tensor:
        """`(b, P, D)`, with whatever the last block left in it."""
        return self.memory[: block.stop - block.start]


def _pool(
    pooled: Tensor, block: slice, part: slice, x: Tensor, scale: Tensor, attentions: Tensor, keep: Tensor | None
) -> None:
    """z of the rows `part` into the vectors `(b, P, D)` of `block`, of which they are part."""
    weights = attentions[part] * scale  # (b, N, P)
    if keep is not None:
        weights *= keep[part]
    torch.bmm(weights.mT, x, out=pooled[part.start - block.start : part.stop - block.start])


def _blocks(tokens: Tensor, probes: Tensor) -> list[tuple[slice, list[slice]]]:
    """Rows whose pooled vectors are worked on at a time, and within them rows whose tokens are."""
    rows, num_tokens, width = tokens.shape
    size = max(1, BLOCK_BYTES // (probes.numel() * probes.itemsize))
    part = max(1, BLOCK_BYTES // (num_tokens * width * probes.itemsize))
    blocks = []
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        parts = [slice(first, min(first + part, stop)) for first in range(start, stop, part)]
        blocks.append((slice(start, stop), parts))
    return blocks
