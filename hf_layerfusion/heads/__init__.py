"""Heads: `(B, N, D)` tokens to `(B, C)` logits, and nothing else."""

from torch import nn

from ..bank import TokenBank, is_local
from ..errors import LayerFusionError
from .attending import AttendingHead
from .attentive import AttentiveFusionHead
from .efficient import EfficientHead
from .ensemble import EnsembleHead
from .linear import LinearHead
from .scalar_mix import ScalarMixHead
from .standardizer import TokenStandardizer
from .two_stage import TwoStageHead
from .width_projection import WidthProjection


def build_head(config) -> nn.Module:
    """The head that a `LayerFusionConfig` describes, freshly initialised."""
    member = build_member(config)
    return member if config.num_members == 1 else EnsembleHead(member, config.num_members)


def build_member(config) -> nn.Module:
    """The single head, or one of the members of an ensemble: what is trained by itself."""
    shape = {"hidden_size": config.hidden_size, "num_tokens": len(config.bank), "num_labels": config.num_labels}
    attending = {
        "num_queries": config.num_queries,
        "attention_dropout": config.attention_dropout,
        "implementation": config.head_implementation,
        "places": _places(config.bank) if config.token_embeddings else None,
    }
    attentive = {
        "num_heads": config.num_heads,
        "head_dim_multiplier": config.head_dim_multiplier,
        "projection_dropout": config.projection_dropout,
        "query_fusion": config.query_fusion,
    }
    if config.head_type == "attentive":
        return AttentiveFusionHead(**shape, **attending, **attentive)
    if config.head_type == "two_stage":
        summarised = _patches_and_cells(config.bank)
        return TwoStageHead(
            **shape, **attending, **attentive, summarised=summarised, stage_queries=config.stage_queries
        )
    if config.head_type == "efficient":
        return EfficientHead(**shape, **attending)
    if config.head_type == "linear":
        return LinearHead(**shape)
    if config.head_type == "scalar_mix":
        return ScalarMixHead(**shape, num_pools=len(config.bank.pools))
    raise LayerFusionError(f"head_type {config.head_type!r} is unknown")


def _places(bank: TokenBank) -> list[tuple[int, int]]:
    """Of each token, which of the bank's taps and which of its pools it is of."""
    taps = {tap: number for number, tap in enumerate(bank.taps)}
    pools = {pool: number for number, pool in enumerate(bank.pools)}
    return [(taps[layer, module], pools[pool]) for layer, module, pool in bank.coordinates]


def _patches_and_cells(bank: TokenBank) -> list[list[int]]:
    """Positions of the patches and cells of each tap that has some."""
    positions: dict[tuple[int, str], list[int]] = {}
    for position, (layer, module, pool) in enumerate(bank.coordinates):
        if is_local(pool):
            positions.setdefault((layer, module), []).append(position)
    return list(positions.values())


def build_parts(config) -> dict[str, nn.Module]:
    """Everything that is trained or fitted beside the backbone, by the name it has in the model."""
    parts = {"head": build_head(config)}
    if config.token_normalization == "standardize":
        parts["token_standardizer"] = TokenStandardizer(len(config.bank), config.hidden_size)
    if config.width_alignment == "project":
        parts["token_projection"] = WidthProjection(config.bank.widths(config.layout), config.hidden_size)
    return parts


__all__ = [
    "AttendingHead",
    "AttentiveFusionHead",
    "EfficientHead",
    "EnsembleHead",
    "LinearHead",
    "ScalarMixHead",
    "TokenStandardizer",
    "TwoStageHead",
    "WidthProjection",
    "build_head",
    "build_member",
    "build_parts",
]
