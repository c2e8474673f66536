"""Heads: `(B, N, D)` tokens to `(B, C)` logits, and nothing else."""

from torch import nn

from ..errors import LayerFusionError
from .attentive import AttentiveFusionHead
from .linear import LinearHead
from .scalar_mix import ScalarMixHead
from .width_projection import WidthProjection


def build_head(config) -> nn.Module:
    """The head that a `LayerFusionConfig` describes, freshly initialised."""
    shape = {"hidden_size": config.hidden_size, "num_tokens": len(config.bank), "num_labels": config.num_labels}
    if config.head_type == "attentive":
        return AttentiveFusionHead(
            **shape,
            num_heads=config.num_heads,
            num_queries=config.num_queries,
            head_dim_multiplier=config.head_dim_multiplier,
            attention_dropout=config.attention_dropout,
            projection_dropout=config.projection_dropout,
            implementation=config.head_implementation,
        )
    if config.head_type == "linear":
        return LinearHead(**shape)
    if config.head_type == "scalar_mix":
        return ScalarMixHead(**shape, num_pools=len(config.bank.pools))
    raise LayerFusionError(f"head_type {config.head_type!r} is unknown")


def build_parts(config) -> dict[str, nn.Module]:
    """Everything that is trained beside the backbone, by the name it has in the model."""
    parts = {"head": build_head(config)}
    if config.width_alignment == "project":
        parts["token_projection"] = WidthProjection(config.bank.widths(config.layout), config.hidden_size)
    return parts


__all__ = ["AttentiveFusionHead", "LinearHead", "ScalarMixHead", "WidthProjection", "build_head", "build_parts"]
