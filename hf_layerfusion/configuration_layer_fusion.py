"""What a head is: its bank, its arithmetic, and the backbone it was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .bank import TokenBank, resolve_layers
from .errors import LayerFusionError
from .layout import MODULES, TokenLayout
from .pooling import POOLS
from .recipes import Recipe, find_recipe

HEAD_TYPES = ("attentive", "linear", "scalar_mix")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
NORMALIZATIONS = ("l2", "none")
WIDTH_ALIGNMENTS = ("pad", "project")


class LayerFusionConfig(PreTrainedConfig):
    r"""Configuration of a [`ViTForAttentiveLayerFusionClassification`].

    Everything is validated on construction, and every message says what is legal. Fields left at `None` are filled
    from the recipe, so a saved config is explicit.

    Args:
        backbone_config: nested config of the backbone, or its dict; `None` for a default ViT.
        backbone_name_or_path: Hub id or folder the backbone is loaded from.
        backbone_revision: the commit on the Hub.
        backbone_fingerprint: of its weights, as `WeightFingerprint.to_dict` gives it.
        token_layout: as `TokenLayout.to_dict` gives it; `None` derives it for a plain ViT-like config.
        recipe: a name from `RECIPES`, or of a family (`"linear-layer:7"`, see `find_recipe`).
        layers: `None` (all), an integer (the last n), a list (0 is the embedding output, negatives count from the
            end), or a string (`"last"`, `"2:"`, `"spaced:4"`); stored as the list of layer numbers.
        modules: points inside a layer: `"ln1"`, `"attention"`, `"residual"`, `"ln2"`, `"fc1"`, `"activation"`, `"fc2"`,
            `"block"`; of the last layer also `"final_norm"` and `"pooler"`. `layerfusion info` names those that a
            backbone has.
        pools: `"cls"`, `"mean"`, and `"tokens"` for CLS and every patch.
        image_size: height and width in pixels of the images, which `"tokens"` needs to know; `None` for the backbone's
            native size.
        width_alignment: how tokens of several widths come to one: `"pad"` with zeros (the reference), or `"project"`
            by a learned projection per width, which begins as padding.
        token_normalization: `"l2"` divides each token by its norm (paper, section 3), `"none"` leaves it.
        noise_std: standard deviation of Gaussian noise on the normalised tokens in training (the reference: 0.05);
            `None` for the recipe's, which is 0 but for `aat-quarterly`.
        noise_probability: share of the samples that get noise (the reference: 0.5).
        head_type: `"attentive"`, `"linear"`, `"scalar_mix"`.
        num_heads: attention heads; `None` for the recipe's, or one per token if it has none.
        num_queries: learned queries.
        head_dim_multiplier: the width of an attention head is this times `D // num_heads` (the reference: 2).
        attention_dropout: on the attention weights; `None` for the recipe's.
        projection_dropout: after the output projection.
        head_implementation: `"fast"` or `"explicit"`, the same function in two orders.
        freeze_backbone: keep the backbone fixed and in eval mode; `None` for yes, unless the recipe fine-tunes.
        backbone_lr_factor: learning rate of an unfrozen backbone relative to the head's (the reference: 1e-3).
        class_weights: one weight per class for the single-label loss.
        includes_backbone: whether the checkpoint beside this config holds the backbone too.

    Raises:
        LayerFusionError: for any value that cannot work.
    """

    if TYPE_CHECKING:  # never None after construction, unlike in the parent's annotations
        num_labels: int = 2  # type: ignore[assignment]
        id2label: dict[int, str] = {}
        backbone_config: PreTrainedConfig
        token_layout: dict[str, Any]
        layers: list[int]
        modules: list[str]
        pools: list[str]
        image_size: list[int] | None
        head_type: str
        attention_dropout: float
        noise_std: float
        noise_probability: float
        freeze_backbone: bool

    model_type = "layer_fusion"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (transformers' own convention)

    backbone_config: dict | PreTrainedConfig | None = None  # type: ignore[no-redef]
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: dict | None = None
    token_layout: dict | None = None  # type: ignore[no-redef]
    recipe: str = "alf"
    layers: Any = None  # type: ignore[no-redef]
    modules: list | None = None  # type: ignore[no-redef]
    pools: list | None = None  # type: ignore[no-redef]
    image_size: Any = None  # type: ignore[no-redef]
    width_alignment: str = "pad"
    token_normalization: str = "l2"
    noise_std: float | None = None  # type: ignore[no-redef]
    noise_probability: float | None = None  # type: ignore[no-redef]
    head_type: str | None = None  # type: ignore[no-redef]
    num_heads: int | None = None
    num_queries: int = 1
    head_dim_multiplier: int = 2
    attention_dropout: float | None = None  # type: ignore[no-redef]
    projection_dropout: float = 0.0
    head_implementation: str = "fast"
    freeze_backbone: bool | None = None  # type: ignore[no-redef]
    backbone_lr_factor: float = 1e-3
    class_weights: list | None = None
    includes_backbone: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        # Here, because some versions of transformers check this field's type before `__post_init__`.
        if name == "problem_type" and value is not None and value not in PROBLEM_TYPES:
            raise LayerFusionError(f"problem_type {value!r} is unknown: choose from {PROBLEM_TYPES}")
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        recipe = find_recipe(self.recipe)
        if recipe.kind == "estimator":
            raise LayerFusionError(
                f"recipe {self.recipe!r} is a model of scikit-learn and no head: use fit_estimator, or layerfusion study"
            )
        _check_label_maps(self.id2label, self.label2id, kwargs.get("num_labels"))
        self.backbone_config = _as_config(self.backbone_config)
        # The parent hands its attention implementation down, so without this it would reset the backbone's to None.
        kwargs.setdefault("attn_implementation", self.backbone_config._attn_implementation)
        super().__post_init__(**kwargs)
        self._fill_from_recipe(recipe)
        self._check_values()

    def _fill_from_recipe(self, recipe: Recipe) -> None:
        layout = TokenLayout(**self.token_layout) if self.token_layout else _plain_layout(self.backbone_config)
        self.token_layout = layout.to_dict()
        self.head_type = self.head_type or recipe.head_type
        chosen = _adapted(recipe, layout, self.layers, self.modules, self.pools, self.head_type)
        self.layers, self.modules, self.pools = chosen
        if self.image_size is not None:
            self.image_size = _as_size(self.image_size)
        elif "tokens" in self.pools and layout.image_size is not None:
            self.image_size = list(layout.image_size)
        if "cls" in self.pools and not layout.has_cls:
            raise LayerFusionError(f"pools={self.pools}: this backbone has no CLS token, use pools=['mean']")
        filled = {
            "attention_dropout": 0.0,
            "noise_std": 0.0,
            "noise_probability": 0.5,
            "freeze_backbone": recipe.kind != "fine_tune",
        }
        for option, value in {**filled, **recipe.head_options}.items():
            if getattr(self, option) is None:
                setattr(self, option, value)

    def _check_values(self) -> None:
        _check_choices("modules", self.modules, MODULES)
        if absent := [module for module in self.modules if module not in self.layout.modules]:
            raise LayerFusionError(
                f"this backbone has no {absent[0]!r}: its modules are {', '.join(self.layout.modules)}"
            )
        _check_choices("pools", self.pools, POOLS)
        _check_choices("head_type", [self.head_type], HEAD_TYPES)
        _check_choices("width_alignment", [self.width_alignment], WIDTH_ALIGNMENTS)
        _check_choices("token_normalization", [self.token_normalization], NORMALIZATIONS)
        _check_choices("head_implementation", [self.head_implementation], ("fast", "explicit"))
        if not len(self.bank):
            raise LayerFusionError(
                f"layers={self.layers}, modules={self.modules} and pools={self.pools} select no token: layer 0 has only "
                f"its 'block' output, 'final_norm' and 'pooler' stand at layer {self.num_backbone_layers}, and not "
                "every layer of every backbone has a CLS token"
            )
        if self.head_type == "scalar_mix" and len(self.bank) != len(self.bank.taps) * len(self.bank.pools):
            raise LayerFusionError(
                f"a scalar_mix head needs the same pools in every layer, but the bank is {', '.join(self.token_names)}: "
                "use pools=['mean'] and no 'pooler'"
            )
        for name in ("attention_dropout", "projection_dropout", "noise_probability"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise LayerFusionError(f"{name}={getattr(self, name)!r} is not a probability: use 0 to 1")
        for name in ("noise_std", "backbone_lr_factor"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise LayerFusionError(f"{name}={getattr(self, name)!r}: use 0 or a positive number")
        for name in ("num_queries", "head_dim_multiplier", "num_heads"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise LayerFusionError(f"{name}={value!r}: use 1 or more")
        if self.num_heads is not None and self.num_heads > self.hidden_size:
            raise LayerFusionError(f"num_heads={self.num_heads} does not fit tokens of width {self.hidden_size}")
        if self.class_weights is not None and len(self.class_weights) != self.num_labels:
            raise LayerFusionError(
                f"class_weights has {len(self.class_weights)} entries, but num_labels is {self.num_labels}"
            )
        if self.class_weights is not None and not all(_is_number(w) and w >= 0 for w in self.class_weights):
            raise LayerFusionError(f"class_weights={self.class_weights} must be 0 or positive numbers")

    @property
    def layout(self) -> TokenLayout:
        """The layout of the backbone's activations."""
        return TokenLayout(**self.token_layout)

    @property
    def num_backbone_layers(self) -> int:
        """L, the number of the backbone's last layer."""
        return self.layout.num_layers

    @property
    def bank(self) -> TokenBank:
        """The token bank: the meaning of the N axis."""
        return TokenBank.build(self.layers, self.modules, self.pools, self.layout, self.image_size)

    @property
    def token_names(self) -> list[str]:
        """One readable name per token, such as `layer 7 · block · mean`."""
        return self.bank.names

    @property
    def hidden_size(self) -> int:
        """D: the widest tapped token; narrower ones are zero-padded in `layer_features`."""
        return self.bank.width(self.layout)

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """Outputs that `Trainer` must not gather at evaluation."""
        return ["layer_attentions"]


# What a user may choose; the other fields are measured on the backbone or set when a checkpoint is written.
_NOT_CHOSEN = (
    *("backbone_config", "backbone_name_or_path", "backbone_revision", "backbone_fingerprint"),
    *("token_layout", "includes_backbone"),
)
HEAD_OPTIONS = (*(name for name in LayerFusionConfig.__annotations__ if name not in _NOT_CHOSEN), "problem_type")


def recipe_bank(name: str, layout: TokenLayout, image_size: Sequence[int] | None = None) -> TokenBank:
    """The tokens that a recipe of any kind reads from a backbone.

    Args:
        name: of the recipe.
        layout: of the backbone.
        image_size: height and width in pixels, for recipes that read all tokens; `None` for the native size.

    Raises:
        LayerFusionError: if the backbone has none of them.
    """
    recipe = find_recipe(name)
    layers, modules, pools = _adapted(recipe, layout, None, None, None, recipe.head_type)
    if absent := [module for module in modules if module not in layout.modules]:
        raise LayerFusionError(
            f"recipe {name!r} reads {absent[0]!r}, which this backbone does not have: its modules are "
            f"{', '.join(layout.modules)}"
        )
    bank = TokenBank.build(layers, modules, pools, layout, image_size)
    if not len(bank):
        raise LayerFusionError(f"recipe {name!r} finds none of its tokens in this backbone")
    return bank


def _adapted(
    recipe: Recipe, layout: TokenLayout, layers: Any, modules: Any, pools: Any, head_type: str
) -> tuple[list[int], list[str], list[str]]:
    """Layers, modules and pools: what was asked for, and what of a recipe's own a backbone has."""
    layers = resolve_layers(recipe.layers if layers is None else layers, layout.num_layers)
    if modules is None:
        # Not every backbone has a norm behind its last block: a recipe adapts, a module that was asked for does not.
        modules = [m for m in recipe.modules if m != "final_norm" or m in layout.modules] or ["block"]
    modules = _as_list(modules)
    if pools is None:
        # Likewise for the CLS token, which some hierarchical backbones have in their last stage only.
        has_cls = [layout.has_cls_at(layer, module) for layer in layers for module in modules]
        keeps_cls = all(has_cls) if head_type == "scalar_mix" else any(has_cls)
        pools = [pool for pool in recipe.pools if pool != "cls" or keeps_cls] or ["mean"]
    return layers, modules, _as_list(pools)


def _as_size(value: Any) -> list[int]:
    """Height and width; one number is both."""
    sides = [value, value] if isinstance(value, int) else list(value) if isinstance(value, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise LayerFusionError(f"image_size={value!r}: give height and width in pixels, or one number for both")
    return sides


def _as_config(value: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return deepcopy(value)  # a live model's config must not change with ours
    values = dict(value or {"model_type": "vit"})
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise LayerFusionError(
            f"backbone_config has model_type {model_type!r}, which this version of transformers does not know: "
            "upgrade transformers, or check the config"
        )
    return CONFIG_MAPPING[model_type](**values)


def _plain_layout(backbone_config: PreTrainedConfig) -> TokenLayout:
    """The layout of a constant-width ViT with one CLS token, for configs that were not measured on a model."""
    try:
        width, num_layers = backbone_config.hidden_size, backbone_config.num_hidden_layers
    except AttributeError as error:
        raise LayerFusionError(
            f"the token layout of a {backbone_config.model_type!r} backbone cannot be read off its config: "
            "build the head with from_backbone, which measures it"
        ) from error
    image_size, patch_size = (getattr(backbone_config, name, None) for name in ("image_size", "patch_size"))
    is_square = isinstance(image_size, int) and isinstance(patch_size, int)
    return TokenLayout.of_plain_vit(
        width,
        num_layers,
        getattr(backbone_config, "intermediate_size", None),
        **({"image_size": image_size, "patch_size": patch_size} if is_square else {}),
    )


def _as_list(values: str | Sequence[str]) -> list[str]:
    return [values] if isinstance(values, str) else list(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_choices(name: str, values: Sequence[str], legal: Sequence[str]) -> None:
    if not values:
        raise LayerFusionError(f"{name} is empty: choose from {list(legal)}")
    for value in values:
        if value not in legal:
            raise LayerFusionError(f"{name} {value!r} is unknown: choose from {list(legal)}")
    if len(set(values)) != len(values):
        raise LayerFusionError(f"{name}={list(values)} names a value twice")


def _check_label_maps(id2label: dict | None, label2id: dict | None, num_labels: int | None) -> None:
    if num_labels is not None and num_labels < 1:
        raise LayerFusionError(f"num_labels={num_labels}: use 1 or more")
    if id2label is None:
        return
    ids = sorted(int(key) for key in id2label)
    if ids != list(range(len(ids))):
        raise LayerFusionError(f"id2label must number its labels 0 to {len(ids) - 1}, but has {ids}")
    if num_labels is not None and num_labels != len(ids):
        raise LayerFusionError(f"num_labels={num_labels}, but id2label names {len(ids)} labels: give one of them")
    if label2id is not None and len(label2id) != len(ids):
        raise LayerFusionError(f"label2id has {len(label2id)} labels, but id2label has {len(ids)}")


__all__ = ["LayerFusionConfig"]
