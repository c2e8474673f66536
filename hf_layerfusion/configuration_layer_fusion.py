"""What a head is: its bank, its arithmetic, and the backbone it was trained on."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .bank import TokenBank, is_grid, is_local, is_top
from .errors import LayerFusionError
from .hub.safety import FLOAT_TYPES, MAX_LABELS, check_backbone_values, check_dtype
from .layout import MAX_SIDE, MODULES, TokenLayout
from .pooling import POOL_FAMILIES, POOLS
from .recipe_tokens import adapt_recipe
from .recipes import Recipe, find_recipe
from .version import __version__

HEAD_TYPES = ("attentive", "efficient", "two_stage", "linear", "scalar_mix")
# Those whose learned queries attend over the bank.
ATTENDING_HEADS = ("attentive", "efficient", "two_stage")
# And of these, those with attention heads (`num_heads`) and an output projection.
MULTI_HEAD_TYPES = ("attentive", "two_stage")
STAGE_QUERIES = ("per_layer", "shared")
QUERY_FUSIONS = ("concat", "mean")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
NORMALIZATIONS = ("l2", "none", "standardize")
LOSSES = ("cross_entropy", "squared")
WIDTH_ALIGNMENTS = ("pad", "project")

MAX_QUERIES = 2**12
MAX_HEAD_DIM_MULTIPLIER = 2**8
MAX_MEMBERS = 2**6
# A mixture of two rows in equal parts, to one in a hundred; what draws from a Beta distribution stays finite.
MAX_MIXUP_ALPHA = 1000
# Backbones whose tokens stand unit by unit of their masks, and not row by row.
_NOT_ROW_BY_ROW = ("hiera",)

# Fields of transformers' configs that Trainer and older versions write, and that mean nothing to a head.
_IDLE = (
    *("use_cache", "is_decoder", "add_cross_attention", "tie_word_embeddings", "tie_encoder_decoder", "torchscript"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "pruned_heads"),
    *("cross_attention_hidden_size", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix"),
    *("output_attentions", "use_bfloat16", "tf_legacy_loss", "_commit_hash", "is_encoder_decoder"),
)
# Fields that make transformers fetch or run something, and what to say of them.
_FOREIGN = {
    "auto_map": "it asks for code of its own to be run, which no head needs",
    "attn_implementation": "it may name code from elsewhere: pass attn_implementation= yourself",
    "_attn_implementation": "it may name code from elsewhere: pass attn_implementation= yourself",
    "configuration_files": "a head has one config.json, and no others",
    "transformers_weights": "a head's weights are in model.safetensors",
    "quantization_config": "heads are not quantised; a backbone's settings stand in backbone_config",
}


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
        pools: `"cls"`, the patches' `"mean"` and `"max"` (of each coordinate), `"tokens"` for CLS and every patch, and
            `"grid:k"`, such as `"grid:2"`, for the means over the cells of a k x k grid over the image, k from 1 to 16,
            which exist at any image size, and `"top:k"`, such as `"top:64"`, for the k patches that differ most from their
            mean, the most different first, or all where there are fewer: for heads with attention, since a linear head
            has different weights for the first and the second. With `@` and layers behind it, such as `"grid:4@spaced:4"`, a
            pool is read at those of `layers` only.
        image_size: height and width in pixels of the images, which `"tokens"` needs to know; `None` for the backbone's
            native size.
        width_alignment: how tokens of several widths come to one: `"pad"` with zeros (the reference), or `"project"`
            by a learned projection per width, which begins as padding.
        token_normalization: `"l2"` divides each token by its norm (paper, section 3), `"none"` leaves it, `"standardize"`
            takes the mean of the training rows from each coordinate of each token, and divides by their standard
            deviation; `None` for the recipe's, or `"l2"`.
        noise_std: standard deviation of Gaussian noise on the normalised tokens in training (the reference: 0.05);
            `None` for the recipe's, which is 0 but for `aat-quarterly`.
        noise_probability: share of the samples that get noise (the reference: 0.5).
        mixup_alpha: in training, mix each normalised row with another of its batch in the proportion of one draw per batch
            from Beta(alpha, alpha), and their losses likewise (arXiv 1710.09412); `None` for the recipe's, or 0: off.
        layer_dropout: probability, in training, that a row goes without all tokens of a layer; `None` for the recipe's, or
            0. Those left are scaled up as in dropout.
        loss: `"cross_entropy"` (of labels that are no classes: binary cross-entropy or mean squared error), or
            `"squared"`, for classes alone: the squared distance of the head's outputs from 1 for the row's class and 0 for
            the others (arXiv 2006.07322), and logits that are ten times these outputs; `None` for the recipe's, or
            `"cross_entropy"`.
        head_type: `"attentive"`, `"efficient"` (arXiv 2506.10178: the queries attend to the tokens themselves, and each has
            values of its own), `"two_stage"` (a learned query pools the patches or cells of each layer and module, and an
            attentive head reads the summaries beside the other tokens), `"linear"`, `"scalar_mix"`.
        stage_queries: of a two-stage head, `"per_layer"` for one pooling query for each layer and module, or `"shared"` for
            one in all; `None` for the recipe's, or `"per_layer"`. Other heads have none.
        num_heads: attention heads; `None` for the recipe's, or one per token if it has none.
        num_queries: learned queries of an attentive or efficient head; `None` for the recipe's, or one.
        query_fusion: how the outputs of several queries of an attentive head come together: `"concat"` or `"mean"`; `None`
            for the recipe's, or `"concat"`.
        token_embeddings: whether an attentive or efficient head learns a vector for each layer and module, and one for each
            pool or cell, and adds both to the normalised tokens; `None` for the recipe's, or `False`.
        num_members: heads with attention that are one head, an ensemble: its logits are the mean of theirs, and `sweep`
            trains each from a seed of its own; `None` for the recipe's, or 1.
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
        num_queries: int
        query_fusion: str
        token_embeddings: bool
        num_members: int
        attention_dropout: float
        token_normalization: str
        noise_std: float
        noise_probability: float
        mixup_alpha: float
        layer_dropout: float
        loss: str
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
    token_normalization: str | None = None  # type: ignore[no-redef]
    noise_std: float | None = None  # type: ignore[no-redef]
    noise_probability: float | None = None  # type: ignore[no-redef]
    mixup_alpha: float | None = None  # type: ignore[no-redef]
    layer_dropout: float | None = None  # type: ignore[no-redef]
    loss: str | None = None  # type: ignore[no-redef]
    head_type: str | None = None  # type: ignore[no-redef]
    stage_queries: str | None = None
    num_heads: int | None = None
    num_queries: int | None = None  # type: ignore[no-redef]
    query_fusion: str | None = None  # type: ignore[no-redef]
    token_embeddings: bool | None = None  # type: ignore[no-redef]
    num_members: int | None = None  # type: ignore[no-redef]
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
        if name == "problem_type" and value is not None and self.loss is not None:  # set on a finished config
            _check_loss(self.loss, value)
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a file holds, which may come from anybody.

        Raises:
            LayerFusionError: for a field that is not known, one that would fetch or run code, or a value that cannot work.
        """
        _check_fields(config_dict)
        try:
            return super().from_dict(config_dict, **kwargs)
        except (LayerFusionError, MemoryError):
            raise
        except Exception as error:  # what transformers raises for values of the wrong kind is no closed list
            raise LayerFusionError(f"this config.json cannot be used: {type(error).__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it, with the version of this library, so that a later field can be told from a mistake."""
        values = {**super().to_dict(), "hf_layerfusion_version": __version__}
        # Of a single head it stands there only where the recipe says otherwise, so that older files are the same.
        if values["num_members"] == find_recipe(self.recipe).head_options.get("num_members", 1) == 1:
            del values["num_members"]
        if values["stage_queries"] is None:  # of other heads, likewise
            del values["stage_queries"]
        return values

    def __post_init__(self, **kwargs):
        # They belong to files: the one was checked, and the other is written anew.
        for name in ("checksums", "hf_layerfusion_version"):
            kwargs.pop(name, None)
        recipe = find_recipe(self.recipe)
        if recipe.kind == "estimator":
            raise LayerFusionError(
                f"recipe {self.recipe!r} is a model of scikit-learn and no head: use fit_estimator, or layerfusion study"
            )
        if recipe.kind == "choice":
            raise LayerFusionError(
                f"recipe {self.recipe!r} chooses among {', '.join(recipe.candidates)} on validation rows: give it to sweep "
                "or layerfusion train, or name one of them"
            )
        _check_label_maps(self.id2label, self.label2id, kwargs.get("num_labels"))
        self.backbone_config = _as_config(self.backbone_config)
        # The parent hands its attention implementation down, so without this it would reset the backbone's to None.
        kwargs.setdefault("attn_implementation", self.backbone_config._attn_implementation)
        super().__post_init__(**kwargs)
        self._fill_from_recipe(recipe)
        self._check_values()

    def _fill_from_recipe(self, recipe: Recipe) -> None:
        measured = self.token_layout
        layout = _plain_layout(self.backbone_config) if measured is None else TokenLayout.from_dict(measured)
        self.token_layout = layout.to_dict()
        self.head_type = self.head_type or recipe.head_type
        chosen = adapt_recipe(recipe, layout, self.layers, self.modules, self.pools, self.head_type)
        self.layers, self.modules, self.pools = chosen
        if self.image_size is not None:
            self.image_size = _as_size(self.image_size)
        elif "tokens" in _pool_names(self.pools) and layout.image_size is not None:
            self.image_size = list(layout.image_size)
        if "cls" in _pool_names(self.pools) and not layout.has_cls:
            raise LayerFusionError(f"pools={self.pools}: this backbone has no CLS token, use pools=['mean']")
        filled = {
            "token_normalization": "l2",
            "attention_dropout": 0.0,
            "noise_std": 0.0,
            "noise_probability": 0.5,
            "mixup_alpha": 0.0,
            "layer_dropout": 0.0,
            "loss": "cross_entropy",
            "num_queries": 1,
            "query_fusion": "concat",
            "token_embeddings": False,
            "num_members": 1,
            "freeze_backbone": recipe.kind != "fine_tune",
        }
        if self.head_type == "two_stage":
            filled["stage_queries"] = "per_layer"
        for option, value in {**filled, **recipe.head_options}.items():
            if getattr(self, option) is None:
                setattr(self, option, value)

    def _check_values(self) -> None:
        self._check_kinds()
        _check_choices("modules", self.modules, MODULES)
        if absent := [module for module in self.modules if module not in self.layout.modules]:
            raise LayerFusionError(
                f"this backbone has no {absent[0]!r}: its modules are {', '.join(self.layout.modules)}"
            )
        _check_choices("pools", _pool_names(self.pools), POOLS, _is_family, f", {POOL_FAMILIES}")
        model_type = self.backbone_config.model_type
        if model_type in _NOT_ROW_BY_ROW and any(map(is_grid, _pool_names(self.pools))):
            raise LayerFusionError(
                f"pools={self.pools}: the tokens of a {model_type!r} backbone do not stand row by row, so no cell of a grid "
                "is known: use pools=['cls', 'mean'], or those of them that it has"
            )
        _check_choices("head_type", [self.head_type], HEAD_TYPES)
        _check_choices("width_alignment", [self.width_alignment], WIDTH_ALIGNMENTS)
        _check_choices("token_normalization", [self.token_normalization], NORMALIZATIONS)
        _check_choices("head_implementation", [self.head_implementation], ("fast", "explicit"))
        _check_choices("query_fusion", [self.query_fusion], QUERY_FUSIONS)
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
        _check_choices("loss", [self.loss], LOSSES)
        is_number = self.problem_type is None and self.num_labels == 1
        _check_loss(self.loss, "regression" if is_number else self.problem_type)
        for name in ("attention_dropout", "projection_dropout", "noise_probability", "layer_dropout"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise LayerFusionError(f"{name}={getattr(self, name)!r} is not a probability: use 0 to 1")
        if not _is_number(self.mixup_alpha) or not 0 <= self.mixup_alpha <= MAX_MIXUP_ALPHA:
            raise LayerFusionError(
                f"mixup_alpha={reprlib.repr(self.mixup_alpha)}: use 0 for no mixup, or a positive number up to {MAX_MIXUP_ALPHA}"
            )
        for name in ("noise_std", "backbone_lr_factor"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise LayerFusionError(f"{name}={getattr(self, name)!r}: use 0 or a positive number")
        for name in ("num_queries", "head_dim_multiplier", "num_heads", "num_members"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise LayerFusionError(f"{name}={reprlib.repr(value)}: use 1 or more")
        limits = {
            "num_queries": MAX_QUERIES,
            "head_dim_multiplier": MAX_HEAD_DIM_MULTIPLIER,
            "num_members": MAX_MEMBERS,
        }
        for name, limit in limits.items():
            if getattr(self, name) > limit:
                raise LayerFusionError(f"{name}={reprlib.repr(getattr(self, name))}: use at most {limit}")
        if self.num_members > 1 and self.head_type not in ATTENDING_HEADS:
            raise LayerFusionError(
                f"num_members={self.num_members}: the logits of a {self.head_type} head are linear in its tokens, and the mean "
                "over several such heads is again one linear head: leave num_members out, or choose head_type from "
                f"{', '.join(ATTENDING_HEADS)}"
            )
        if self.head_type == "efficient" and self.num_queries > self.hidden_size:
            raise LayerFusionError(
                f"num_queries={self.num_queries} does not fit tokens of width {self.hidden_size}, which the queries of an "
                "efficient head share out"
            )
        self._check_stages()
        if self.num_heads is not None and self.num_heads > self.hidden_size:
            raise LayerFusionError(f"num_heads={self.num_heads} does not fit tokens of width {self.hidden_size}")
        if self.class_weights is not None and not isinstance(self.class_weights, list | tuple):
            raise LayerFusionError(f"class_weights={reprlib.repr(self.class_weights)}: give one number per class")
        if self.class_weights is not None and len(self.class_weights) != self.num_labels:
            raise LayerFusionError(
                f"class_weights has {len(self.class_weights)} entries, but num_labels is {self.num_labels}"
            )
        if self.class_weights is not None and not all(_is_number(w) and w >= 0 for w in self.class_weights):
            raise LayerFusionError(f"class_weights={self.class_weights} must be 0 or positive numbers")

    def _check_stages(self) -> None:
        if self.head_type != "two_stage":
            if self.stage_queries is not None:
                raise LayerFusionError(
                    f"stage_queries={reprlib.repr(self.stage_queries)} is for head_type='two_stage', and this head is "
                    f"{self.head_type}: leave it out"
                )
            return
        _check_choices("stage_queries", [self.stage_queries], STAGE_QUERIES)
        if not any(map(is_local, self.bank.pools)):
            raise LayerFusionError(
                f"a two_stage head pools the patches or cells of a layer, but layers={self.layers}, modules={self.modules} "
                f"and pools={self.pools} select none: add a pool such as 'grid:4' or 'tokens', or use "
                "head_type='attentive' (recipe 'alf'), which needs none"
            )
        if self.token_embeddings:
            raise LayerFusionError(
                "token_embeddings=True: a two_stage head has no embeddings of its tokens' places: leave it out, or use "
                "head_type='attentive'"
            )

    def _check_kinds(self) -> None:
        """Fields that no arithmetic reads, but files and messages do."""
        for name in ("freeze_backbone", "includes_backbone", "token_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise LayerFusionError(f"{name}={reprlib.repr(getattr(self, name))}: use True or False")
        for name in ("backbone_name_or_path", "backbone_revision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or "\0" in value):
                raise LayerFusionError(f"{name}={reprlib.repr(value)}: give a name, or leave it out")
        # huggingface_hub keeps a file of this name in its cache.
        revision = self.backbone_revision
        if revision is not None and (".." in revision or not re.fullmatch(r"[\w][\w./-]*", revision)):
            raise LayerFusionError(f"backbone_revision={reprlib.repr(revision)}: give a commit, a branch or a tag")
        _check_fingerprint(self.backbone_fingerprint)

    @property
    def layout(self) -> TokenLayout:
        """The layout of the backbone's activations."""
        return TokenLayout.from_dict(self.token_layout)

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


def _is_family(pool: str) -> bool:
    return is_grid(pool) or is_top(pool)


def _pool_names(pools: Sequence[Any]) -> list[Any]:
    """Pools without the layers that they are read at; whatever is no text stays as it is."""
    return [pool.partition("@")[0] if isinstance(pool, str) else pool for pool in pools]


def _check_fields(values: Mapping[str, Any]) -> None:
    """Refuse fields of a file that this version does not know: they may change what the head computes."""
    for name, reason in _FOREIGN.items():
        if values.get(name) is not None:
            raise LayerFusionError(f"this config.json has {name}={reprlib.repr(values[name])}: {reason}")
    known = {*LayerFusionConfig.__dataclass_fields__, *_IDLE, *_FOREIGN}
    known |= {"_name_or_path", "name_or_path", "num_labels", "torch_dtype", "checksums", "hf_layerfusion_version"}
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        writer = values.get("hf_layerfusion_version")
        shown = ", ".join(map(reprlib.repr, unknown[:5])) + (" and more" if len(unknown) > 5 else "")
        if isinstance(writer, str) and writer != __version__:
            advice = (
                f"version {reprlib.repr(writer)} of hf_layerfusion wrote the file, and this is {__version__}: upgrade"
            )
        else:
            advice = f"hf_layerfusion {__version__} writes no such field: the file was edited"
        raise LayerFusionError(f"this config.json has the unknown field {shown}; {advice}")
    for name in ("dtype", "torch_dtype"):
        check_dtype(name, values.get(name))


def _check_fingerprint(values: Any) -> None:
    """As `WeightFingerprint.to_dict` gives it, or none."""
    if values is None:
        return
    parts = values.get("parts") if isinstance(values, Mapping) else None
    is_whole = (
        isinstance(parts, Mapping)
        and all(isinstance(text, str) for part in parts.items() for text in part)
        and isinstance(values.get("digest"), str)
        and values.get("dtype") in FLOAT_TYPES
        and isinstance(values.get("quantization"), str | None)
    )
    if not is_whole:
        raise LayerFusionError(f"backbone_fingerprint={reprlib.repr(values)} is none: leave it out, or put it right")


def _as_size(value: Any) -> list[int]:
    """Height and width; one number is both."""
    sides = [value, value] if isinstance(value, int) else list(value) if isinstance(value, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise LayerFusionError(
            f"image_size={reprlib.repr(value)}: give height and width in pixels, or one number for both"
        )
    return sides


def _as_config(value: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return deepcopy(value)  # a live model's config must not change with ours
    if value is not None and not isinstance(value, Mapping):
        raise LayerFusionError(f"backbone_config={reprlib.repr(value)}: give a config, or its dict")
    values = dict(value or {"model_type": "vit"})
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise LayerFusionError(
            f"backbone_config has model_type {reprlib.repr(model_type)}, which this version of transformers does not know: "
            "upgrade transformers, or check the config"
        )
    check_backbone_values(values)
    values.pop("auto_map", None)  # of a model that transformers knows by now, so that its code is not needed
    config_class = CONFIG_MAPPING[model_type]
    if hidden := sorted(key for key in values if callable(getattr(config_class, key, None))):
        raise LayerFusionError(f"backbone_config has a field {reprlib.repr(hidden[0])}, which no config has")
    try:
        return config_class(**values)
    except MemoryError:
        raise
    except Exception as error:  # some hundred classes, each with checks of its own
        raise LayerFusionError(
            f"backbone_config is no config of a {model_type!r} model: {type(error).__name__}: {error}"
        ) from error


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


def _check_loss(loss: str, problem_type: str | None) -> None:
    """Refuse a loss that these labels do not have."""
    if loss == "squared" and problem_type not in (None, "single_label_classification"):
        raise LayerFusionError(
            f"loss='squared' is for single-label classification, and this is {problem_type}: leave loss out"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_choices(
    name: str,
    values: Sequence[Any],
    legal: Sequence[str],
    is_also_legal: Callable[[str], bool] | None = None,
    others: str = "",
) -> None:
    if not values:
        raise LayerFusionError(f"{name} is empty: choose from {list(legal)}{others}")
    for value in values:
        is_known = isinstance(value, str) and (value in legal or (is_also_legal is not None and is_also_legal(value)))
        if not is_known:
            raise LayerFusionError(f"{name} {reprlib.repr(value)} is unknown: choose from {list(legal)}{others}")
    if len(set(values)) != len(values):
        raise LayerFusionError(f"{name}={list(values)} names a value twice")


def _check_label_maps(id2label: Any, label2id: Any, num_labels: Any) -> None:
    if num_labels is not None and (not isinstance(num_labels, int) or not 1 <= num_labels <= MAX_LABELS):
        raise LayerFusionError(f"num_labels={reprlib.repr(num_labels)}: use 1 or more, up to {MAX_LABELS}")
    for name, labels in {"id2label": id2label, "label2id": label2id}.items():
        if labels is not None and not isinstance(labels, Mapping):
            raise LayerFusionError(f"{name}={reprlib.repr(labels)}: give a mapping")
    if id2label is None:
        return
    if not all(str(key).isascii() and str(key).isdigit() for key in id2label):
        raise LayerFusionError(f"id2label numbers its labels {reprlib.repr(list(id2label))}: use 0, 1, 2, ...")
    if bad := [label for label in id2label.values() if not isinstance(label, str | int | float | None)]:
        raise LayerFusionError(f"id2label has a label {reprlib.repr(bad[0])}: use text")
    ids = sorted(int(key) for key in id2label)
    if not ids or ids != list(range(len(ids))):
        raise LayerFusionError(f"id2label must number its labels 0 to {len(ids) - 1}, but has {reprlib.repr(ids)}")
    if num_labels is not None and num_labels != len(ids):
        raise LayerFusionError(f"num_labels={num_labels}, but id2label names {len(ids)} labels: give one of them")
    names = len(set(id2label.values()))  # classes may share a name, as ImageNet's two cranes do
    if label2id is not None and len(label2id) != names:
        raise LayerFusionError(f"label2id has {len(label2id)} labels, but id2label has {names}")


__all__ = ["LayerFusionConfig"]
