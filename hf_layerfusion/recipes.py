"""Recipes: which tokens are in the bank, and which head reads them. The table of both papers, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .bank import LayerSpec


@dataclass(frozen=True)
class Recipe:
    """One row of the table; every field is a default that a user may override."""

    description: str
    layers: LayerSpec = "all"
    modules: tuple[str, ...] = ("block",)
    pools: tuple[str, ...] = ("cls", "mean")
    head_type: str = "attentive"
    # Fields of the config that are `None` unless a user sets them.
    head_options: dict[str, Any] = field(default_factory=dict)
    # What `build_trainer` uses unless told otherwise; how they were chosen stands in docs/architecture.md.
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2


# The reference chooses from 0, 0.1 and 0.3 on validation rows; `alf-paper` leaves that choice to the user.
_DROPOUT = {"attention_dropout": 0.3}

RECIPES = {
    "linear-last": Recipe(
        "linear probe on the last CLS token (the usual baseline)",
        layers="last",
        modules=("final_norm",),
        pools=("cls",),
        head_type="linear",
        learning_rate=3e-1,
        weight_decay=1e-4,
    ),
    "linear-last-cls-mean": Recipe(
        "linear probe on CLS and patch mean of the last layer",
        layers="last",
        modules=("final_norm",),
        head_type="linear",
        learning_rate=1e-1,
        weight_decay=1e-4,
    ),
    "linear-all": Recipe(
        "linear probe on CLS and patch mean of all layers, concatenated", head_type="linear", weight_decay=1e-4
    ),
    "alf": Recipe(
        "Attentive Layer Fusion over the block outputs of all layers (arXiv 2601.09322)", head_options=_DROPOUT
    ),
    "alf-paper": Recipe(
        "Attentive Layer Fusion with the reference's taps: LN2 of blocks 2 to L and the final norm",
        layers="2:",
        modules=("ln2", "final_norm"),
    ),
    "alf-mid-last": Recipe(
        "Attentive Layer Fusion over the middle and the last layer", layers="spaced:2", head_options=_DROPOUT
    ),
    "alf-quarterly": Recipe(
        "Attentive Layer Fusion over four equally spaced layers", layers="spaced:4", head_options=_DROPOUT
    ),
    "scalar-mix": Recipe(
        "softmax-weighted sum over all layers, then linear",
        head_type="scalar_mix",
        learning_rate=1e-1,
        weight_decay=1e-4,
    ),
}
