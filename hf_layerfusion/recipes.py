"""Recipes: which tokens are in the bank, and what reads them. The tables of both papers, as data."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .bank import MAX_GRID, LayerSpec
from .errors import LayerFusionError
from .layout import BLOCK_MODULES, TokenLayout

# What a recipe is trained by: `sweep` or `build_trainer`, scikit-learn, or `Trainer` on images with the backbone. A
# choice stands for several recipes, among which `sweep` chooses.
KINDS = ("head", "estimator", "fine_tune", "choice")


@dataclass(frozen=True)
class Recipe:
    """One row of the table; every field is a default that a user may override.

    Attributes:
        description: in a line.
        layers: as `LayerFusionConfig` takes them, and so are `modules`, `pools` and `head_type`.
        head_options: fields of the config that are `None` unless a user sets them.
        learning_rate: what `build_trainer` uses unless told otherwise; how it was chosen stands in docs/architecture.md.
        weight_decay: likewise.
        kind: `"head"`; `"estimator"` for a model of scikit-learn on the tokens, fitted by `fit_estimator`; `"fine_tune"`
            for a backbone that is trained too, by `fine_tune`; `"choice"` for one of `candidates`, chosen on
            validation rows by `sweep`.
        estimator: which one.
        candidates: names of recipes, of a choice; where validation rows cannot tell them apart, the first is taken.
        solver: of a head, `"steps"` by AdamW, or `"ridge"`, the closed form of a linear head (`solve_ridge`).
    """

    description: str
    layers: LayerSpec = "all"
    modules: tuple[str, ...] = ("block",)
    pools: tuple[str, ...] = ("cls", "mean")
    head_type: str = "attentive"
    head_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    kind: str = "head"
    estimator: str | None = None
    solver: str = "steps"
    candidates: tuple[str, ...] = ()


# The reference chooses from 0, 0.1 and 0.3 on validation rows; `alf-paper` leaves that choice to the user.
_DROPOUT: dict[str, Any] = {"attention_dropout": 0.3}
# Heads of the reference's probe on all tokens (its `scripts/`).
_ALL_TOKENS: dict[str, Any] = {"num_heads": 8}

_LINEAR: dict[str, Any] = {"head_type": "linear", "weight_decay": 1e-4}
_GRID = ("cls", "mean", "grid:4@spaced:4")
_MAX = ("cls", "mean", "max@-8:", "grid:4@spaced:4")
_LAST: dict[str, Any] = {"layers": "last", "modules": ("final_norm",)}
_EFFICIENT: dict[str, Any] = {"head_type": "efficient", "head_options": {"num_queries": 12}}
_RIDGE: dict[str, Any] = {"head_type": "linear", "solver": "ridge"}
_FINE_TUNED: dict[str, Any] = {**_LAST, **_LINEAR, "pools": ("cls",), "kind": "fine_tune", "learning_rate": 1e-1}

RECIPES = {
    "linear-last": Recipe(
        "linear probe on the last CLS token (the usual baseline)",
        **{**_LAST, **_LINEAR, "pools": ("cls",), "learning_rate": 3e-1},
    ),
    "linear-last-cls-mean": Recipe(
        "linear probe on CLS and patch mean of the last layer", **_LAST, **_LINEAR, learning_rate=1e-1
    ),
    "linear-mid-last": Recipe(
        "linear probe on CLS and patch mean of the middle and the last layer, concatenated",
        layers="spaced:2",
        **_LINEAR,
        learning_rate=1e-1,
    ),
    "linear-quarterly": Recipe(
        "linear probe on CLS and patch mean of four equally spaced layers, concatenated",
        layers="spaced:4",
        **_LINEAR,
        learning_rate=3e-2,
    ),
    "linear-all": Recipe("linear probe on CLS and patch mean of all layers, concatenated", **_LINEAR),
    "linear-all-paper": Recipe(
        "linear probe on the tokens of `alf-paper`, concatenated",
        layers="2:",
        modules=("ln2", "final_norm"),
        **_LINEAR,
    ),
    "ridge-last": Recipe(
        "least squares on the last CLS token, standardised, in closed form", **{**_LAST, **_RIDGE, "pools": ("cls",)}
    ),
    "ridge-all": Recipe("least squares on CLS and patch mean of all layers, standardised, in closed form", **_RIDGE),
    "ridge-grid": Recipe(
        "least squares on CLS and patch mean of all layers and the means of 4 x 4 cells of four layers, in closed form",
        pools=_GRID,
        **_RIDGE,
    ),
    "ridge-max": Recipe(
        "least squares on the tokens of `ridge-grid` and the patches' largest values in the last eight layers",
        pools=_MAX,
        **_RIDGE,
    ),
    "alf": Recipe(
        "Attentive Layer Fusion over the block outputs of all layers (arXiv 2601.09322)", head_options=_DROPOUT
    ),
    "alf-paper": Recipe(
        "Attentive Layer Fusion with the reference's taps: LN2 of blocks 2 to L and the final norm",
        layers="2:",
        modules=("ln2", "final_norm"),
    ),
    "alf-last": Recipe("attentive probe over CLS and patch mean of the last layer", **_LAST, head_options=_DROPOUT),
    "alf-mid-last": Recipe(
        "Attentive Layer Fusion over the middle and the last layer", layers="spaced:2", head_options=_DROPOUT
    ),
    "alf-quarterly": Recipe(
        "Attentive Layer Fusion over four equally spaced layers", layers="spaced:4", head_options=_DROPOUT
    ),
    "alf-cls": Recipe(
        "Attentive Layer Fusion over the CLS tokens of all layers alone", pools=("cls",), head_options=_DROPOUT
    ),
    "alf-mean": Recipe(
        "Attentive Layer Fusion over the patch means of all layers alone", pools=("mean",), head_options=_DROPOUT
    ),
    "alf-squared": Recipe(
        "Attentive Layer Fusion over the block outputs of all layers, under squared loss",
        head_options={**_DROPOUT, "loss": "squared"},
    ),
    "alf-ensemble": Recipe(
        "the mean of the logits of five `alf` heads, trained from different seeds",
        head_options={**_DROPOUT, "num_members": 5},
    ),
    "alf-grid": Recipe(
        "Attentive Layer Fusion over the tokens of `ridge-grid`, 16 heads",
        pools=_GRID,
        head_options={**_DROPOUT, "num_heads": 16},
    ),
    "alf-top": Recipe(
        "Attentive Layer Fusion over all layers and the 64 patches of the middle one that differ most from their mean, 8 heads",
        pools=("cls", "mean", "top:64@middle"),
        head_options={**_DROPOUT, "num_heads": 8},
        learning_rate=1e-3,
    ),
    "alf-two-stage": Recipe(
        "as `alf-grid`, after a learned query per layer has pooled its cells",
        pools=_GRID,
        head_type="two_stage",
        head_options={**_DROPOUT, "num_heads": 16},
    ),
    "ep": Recipe(
        "efficient probing over all tokens of the last layer, 12 queries (arXiv 2506.10178)",
        **{**_LAST, **_EFFICIENT, "pools": ("tokens",)},
    ),
    "ep-all": Recipe("efficient probing over CLS and patch mean of all layers, 12 queries", **_EFFICIENT),
    "ep-grid": Recipe(
        "efficient probing over the tokens of `ridge-grid`, 12 queries", **{**_EFFICIENT, "pools": _GRID}
    ),
    "aat": Recipe(
        "attentive probe over all tokens of the last layer, 8 heads",
        **_LAST,
        pools=("tokens",),
        head_options=_ALL_TOKENS,
        learning_rate=1e-3,
    ),
    "aat-quarterly": Recipe(
        "attentive probe over all tokens of four equally spaced layers, 24 heads, with the reference's one setting",
        layers="spaced:4",
        pools=("tokens",),
        # Its `scripts/`: 24 heads, dropout 0.5, noise on 90 % of the samples, learning rate 1e-3, decay 1.
        head_options={"num_heads": 24, "attention_dropout": 0.5, "noise_std": 0.05, "noise_probability": 0.9},
        learning_rate=1e-3,
        weight_decay=1.0,
    ),
    "scalar-mix": Recipe(
        "softmax-weighted sum over all layers, then linear",
        head_type="scalar_mix",
        learning_rate=1e-1,
        weight_decay=1e-4,
    ),
    "auto": Recipe(
        "the first of `ridge-grid`, `ridge-all`, `alf-top` and `alf` within a standard error of the best on validation rows",
        kind="choice",
        candidates=("ridge-grid", "ridge-all", "alf-top", "alf"),
    ),
    "knn-last": Recipe(
        "k nearest neighbours by the last CLS token",
        **{**_LAST, **_LINEAR, "pools": ("cls",), "kind": "estimator", "estimator": "knn"},
    ),
    "linear-all-pca": Recipe(
        "CLS and patch mean of all layers, concatenated, the components with 99 % of the variance, then linear",
        **_LINEAR,
        kind="estimator",
        estimator="pca",
    ),
    "fine-tune": Recipe("the whole backbone trained with a linear head on the last CLS token", **_FINE_TUNED),
    "lora": Recipe("low-rank adapters trained with a linear head on the last CLS token", **_FINE_TUNED),
}

# `NAME:K` and `NAME:K:MODULE`, one recipe for each layer, number of heads, or layer and module.
FAMILIES = {
    "linear-layer:K": "linear probe on CLS and patch mean of layer K",
    "aat-layer:K": "attentive probe over all tokens of layer K, 8 heads",
    "ridge-grid:K": "`ridge-grid` with K x K cells",
    "alf-grid:K": "`alf-grid` with K x K cells",
    "alf-heads:H": "`alf` with H attention heads",
    "aat-heads:H": "`aat` with H attention heads",
    "module-probe:K:MODULE": "linear probe on the patch mean at one point of block K (arXiv 2603.05280)",
    "module-logistic:K:MODULE": "that paper's logistic regression on the patch mean at one point of block K",
}


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or one of a family, such as `"linear-layer:7"` or `"module-probe:7:activation"`.

    Raises:
        LayerFusionError: for an unknown name, with those that are known.
    """
    if not isinstance(name, str) or (name not in RECIPES and ":" not in name):
        near = difflib.get_close_matches(name, RECIPES, 1) if isinstance(name, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise LayerFusionError(
            f"recipe {reprlib.repr(name)} is unknown: choose from {', '.join((*RECIPES, *FAMILIES))}{hint}"
        )
    if name in RECIPES:
        return RECIPES[name]
    family, number, *rest = name.split(":")
    pattern = next((pattern for pattern in FAMILIES if pattern.split(":")[0] == family), None)
    if pattern is None or len(rest) != pattern.count(":") - 1:
        raise LayerFusionError(f"recipe {reprlib.repr(name)} is unknown: families are {', '.join(FAMILIES)}")
    if not number.isascii() or not number.isdigit() or str(int(number)) != number:
        raise LayerFusionError(f"recipe {name!r}: {number!r} is no number, as in {pattern.replace('K', '7')!r}")
    description = FAMILIES[pattern].replace(" K", f" {number}").replace(" H ", f" {number} ")
    if family.endswith("-heads"):
        parent = RECIPES[family.removesuffix("-heads")]
        if number == "0":
            raise LayerFusionError(f"recipe {name!r} has no attention head: use 1 or more")
        return replace(parent, description=description, head_options={**parent.head_options, "num_heads": int(number)})
    if family.endswith("-grid"):
        if not 1 <= int(number) <= MAX_GRID:
            raise LayerFusionError(f"recipe {name!r}: use a grid of 1 to {MAX_GRID} cells a side")
        return replace(RECIPES[family], description=description, pools=("cls", "mean", f"grid:{number}@spaced:4"))
    layers = [int(number)]
    if family == "linear-layer":
        return Recipe(description, layers, **_LINEAR, learning_rate=1e-1)
    if family == "aat-layer":
        return replace(RECIPES["aat"], description=description, layers=layers, modules=("block",))
    if rest[0] not in BLOCK_MODULES:
        raise LayerFusionError(f"recipe {name!r}: {rest[0]!r} is no module; choose from {', '.join(BLOCK_MODULES)}")
    probe = Recipe(description, layers, (rest[0],), ("mean",), **_LINEAR, learning_rate=1e-1)
    return probe if family == "module-probe" else replace(probe, kind="estimator", estimator="logistic")


def number_advice(family: str) -> str | None:
    """What to write instead of a `*` in a family whose number no backbone limits; `None` for the others."""
    for ending, things in (("-heads", "heads"), ("-grid", "cells a side")):
        if family.endswith(ending):
            return f"name the numbers of {things}, such as {family}:4"
    return None


def expand_recipes(names: Sequence[str], layout: TokenLayout) -> list[str]:
    """The names with every `*` replaced by all layers (1 to L) and all modules that a backbone has, each name once.

    Raises:
        LayerFusionError: for an unknown name, or a `*` in place of a number of heads.
    """
    expanded: list[str] = []
    for name in names:
        family, *places = str(name).split(":")
        if "*" not in places:
            find_recipe(name)
            expanded.append(name)
            continue
        if advice := number_advice(family):
            raise LayerFusionError(f"recipe {name!r}: {advice}")
        layers = [str(layer) for layer in range(1, layout.num_layers + 1)]
        modules = [module for module in BLOCK_MODULES if module in layout.modules]
        choices = [
            choice if place == "*" else [place] for place, choice in zip(places, (layers, modules), strict=False)
        ]
        if len(choices) < len(places):
            raise LayerFusionError(f"recipe {name!r} is unknown: families are {', '.join(FAMILIES)}")
        before = len(expanded)
        for layer in choices[0]:
            for module in choices[1] if len(choices) > 1 else [None]:
                if module is None:
                    expanded.append(f"{family}:{layer}")
                elif places[1] != "*" or (layer.isdigit() and layout.width(int(layer), module)):
                    expanded.append(f"{family}:{layer}:{module}")
        if len(expanded) == before:
            raise LayerFusionError(
                f"recipe {name!r} finds none of its tokens: this backbone has layers 1 to {layout.num_layers} and the "
                f"modules {', '.join(modules)}"
            )
        find_recipe(expanded[-1])
    return list(dict.fromkeys(expanded))
