"""What a sweep varies: settings, grids of them, and which of them are the same run in all but name."""

from __future__ import annotations

import itertools
import json
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..configuration_layer_fusion import MAX_MIXUP_ALPHA, MULTI_HEAD_TYPES
from ..errors import LayerFusionError
from ..recipes import Recipe, find_recipe

# Settings whose weights shrink by the same factor to 1 % are one run: AdamW's decay is decoupled from the gradient.
SAME_SHRINKAGE = 0.01


@dataclass(frozen=True)
class Setting:
    """Everything of one head that a sweep may vary.

    Attributes:
        recipe: which tokens, which head.
        learning_rate: at the start; a cosine takes it to 1e-6, as in the reference.
        weight_decay: on every parameter.
        attention_dropout: `None` for the recipe's.
        noise_std: of Gaussian noise on the normalised tokens.
        noise_probability: share of the rows that get it.
        num_queries: learned queries.
        num_heads: attention heads; `None` for one per token.
        balance_classes: weight the classes by n / (C * count).
        mixup_alpha: of mixed rows, see [`LayerFusionConfig`]; `None` for the recipe's.
        layer_dropout: likewise.
        ridge_penalty: of a head in closed form, as `solve_ridge` takes it; such a head has no learning rate or decay.
    """

    recipe: str = "alf"
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    attention_dropout: float | None = None
    noise_std: float = 0.0
    noise_probability: float = 0.5
    num_queries: int = 1
    num_heads: int | None = None
    balance_classes: bool = True
    ridge_penalty: float | None = None
    mixup_alpha: float | None = None
    layer_dropout: float | None = None

    def __post_init__(self) -> None:
        _recipe(self.recipe)
        for name in ("learning_rate", "weight_decay", "noise_std"):
            if not _is_number(getattr(self, name), sys.float_info.max):
                raise LayerFusionError(
                    f"{name}={_short(getattr(self, name))} of a sweep's setting: use 0 or a positive number"
                )
        if not self.learning_rate:
            raise LayerFusionError("learning_rate=0 of a sweep's setting trains nothing: use a positive number")
        for name in ("attention_dropout", "noise_probability", "layer_dropout"):
            value = getattr(self, name)
            if not _is_number(value, 1) and not (name != "noise_probability" and value is None):
                raise LayerFusionError(f"{name}={_short(value)} of a sweep's setting is no probability: use 0 to 1")
        if self.mixup_alpha is not None and not _is_number(self.mixup_alpha, MAX_MIXUP_ALPHA):
            raise LayerFusionError(
                f"mixup_alpha={_short(self.mixup_alpha)} of a sweep's setting: use 0, or a positive number up to "
                f"{MAX_MIXUP_ALPHA}"
            )
        if self.ridge_penalty is not None and not (
            _is_number(self.ridge_penalty, sys.float_info.max) and self.ridge_penalty
        ):
            raise LayerFusionError(
                f"ridge_penalty={_short(self.ridge_penalty)} of a sweep's setting: use a positive number"
            )
        for name in ("num_queries", "num_heads"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "num_heads" and value is None):
                raise LayerFusionError(f"{name}={_short(value)} of a sweep's setting: use a whole number from 1 up")
        if not isinstance(self.balance_classes, bool):
            raise LayerFusionError(
                f"balance_classes={_short(self.balance_classes)} of a sweep's setting: use true or false"
            )

    @property
    def config_options(self) -> dict[str, Any]:
        """The fields that belong to `LayerFusionConfig`, as its keyword arguments."""
        chosen = {name: getattr(self, name) for name in _CONFIG_FIELDS}
        return {name: value for name, value in chosen.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Fields that came later stand here only where they say something, so that older sweeps are found again."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in LATER_FIELDS or value != getattr(type(self), name)
        }


_CONFIG_FIELDS = (
    *("recipe", "attention_dropout", "noise_std", "noise_probability", "num_queries", "num_heads"),
    *("mixup_alpha", "layer_dropout"),
)
FIELDS = tuple(field.name for field in fields(Setting))
# Fields that results of earlier versions lack.
LATER_FIELDS = ("ridge_penalty", "mixup_alpha", "layer_dropout")
_NOISE = ("noise_std", "noise_probability")
_FLOAT_FIELDS = (
    *("learning_rate", "weight_decay", "attention_dropout", "noise_std", "noise_probability", "ridge_penalty"),
    *("mixup_alpha", "layer_dropout"),
)
# What a head in closed form is chosen from, unless the grid names penalties. Features are scaled to norm one, so the best
# penalty hardly depends on the data: 0.03 to 0.3 on ten sets of training rows. A wider choice on a few hundred validation
# rows is a worse one (docs/beyond.md).
RIDGE_PENALTIES = (0.0316, 0.1, 0.316)
# What a head is trained in steps with.
_IN_STEPS = ("learning_rate", "weight_decay", "noise_std")

# The reference's selection: 3 learning rates x 7 decays x 3 dropouts, with its noise.
_PAPER = {
    "learning_rate": [1e-1, 1e-2, 1e-3],
    "weight_decay": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0],
    "attention_dropout": [0.0, 0.1, 0.3],
    "noise_std": [0.05],
}
_FAST = {
    "learning_rate": [1e-1, 1e-2, 1e-3],
    "weight_decay": [1e-4, 1e-1],
    "attention_dropout": [0.0, 0.3],
}
GRIDS: dict[str, dict[str, list]] = {"paper": _PAPER, "fast": _FAST}

Grid = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def expand_grid(grid: Grid, recipes: Sequence[str] = ("alf",)) -> list[Setting]:
    """All settings of a grid, each once, in the order of the reference: learning rates outermost.

    Learning rate, weight decay and attention dropout that a part of the grid does not name are the recipe's.

    Args:
        grid: `"paper"`, `"fast"`, a YAML or JSON file, a mapping from fields of [`Setting`] to a value or a list of values
            (all combinations are meant), or a list of such mappings.
        recipes: for settings that do not name theirs; `"auto"` stands for those that it chooses from.

    Raises:
        LayerFusionError: for an unknown name or field, a value of a wrong kind, or a grid without settings.
    """
    if isinstance(grid, str | Path):
        grid = GRIDS[str(grid)] if str(grid) in GRIDS else read_grid(Path(grid))
    parts = [grid] if isinstance(grid, Mapping) else grid
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) for part in parts):
        raise LayerFusionError(
            f"a grid is a mapping from fields to values, or a list of them, but this is {_short(grid)}"
        )
    if not parts:
        raise LayerFusionError("the grid holds no setting: give at least one")
    settings: list[Setting] = []
    for part in parts:
        if unknown := sorted(map(str, part.keys() - set(FIELDS))):
            raise LayerFusionError(
                f"{_short(unknown[0])} is no field of a sweep's grid: choose from {', '.join(FIELDS)}"
            )
        values = {name: _choices(name, value) for name, value in {"recipe": list(recipes), **part}.items()}
        values["recipe"] = [one for name in values["recipe"] for one in find_recipe(name).candidates or (name,)]
        if empty := [name for name, choices in values.items() if not choices]:
            raise LayerFusionError(f"the grid names no value for {empty[0]!r}: give one or leave it out")
        for combination in itertools.product(*values.values()):
            settings += _completed(dict(zip(values, combination, strict=True)))
    return list(dict.fromkeys(settings))


def _choices(name: str, value: Any) -> list:
    """The values that a grid gives a field."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    choices = [
        one.item() if isinstance(one, np.generic) else one
        for one in (value if isinstance(value, list | tuple | range) else [value])
    ]
    return [_as_float(one) for one in choices] if name in _FLOAT_FIELDS else choices


def _as_float(value: Any) -> Any:
    """YAML 1.1 takes `1e-3` for text: only `1.0e-3` is a number to it. What is no number stays what it is."""
    try:
        return float(value) if isinstance(value, str) or type(value) is int else value
    except (ValueError, OverflowError):
        return value


def _completed(values: dict[str, Any]) -> list[Setting]:
    """Settings in which everything has the value that it is trained with, so that equal runs are equal settings.

    One, or for a head in closed form as many as there are penalties to choose from, where none is named.
    """
    recipe = _recipe(values["recipe"])
    if recipe.solver == "ridge":
        kept = {name: values[name] for name in ("recipe", "balance_classes") if name in values}
        named = values.get("ridge_penalty")
        penalties = RIDGE_PENALTIES if named is None else (named,)
        idle: dict[str, Any] = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        return [Setting(**kept, **idle, ridge_penalty=penalty) for penalty in penalties]
    values = {**values, "ridge_penalty": None}
    for name in ("mixup_alpha", "layer_dropout"):
        if values.get(name) == recipe.head_options.get(name, 0.0):
            values[name] = None  # the recipe's own
    noise = {name: recipe.head_options[name] for name in _NOISE if name in recipe.head_options}
    queries = {"num_queries": recipe.head_options.get("num_queries", 1)}
    defaults = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay, **noise, **queries}
    setting = Setting(**{**defaults, **values})
    if not setting.noise_std or not setting.noise_probability:
        setting = replace(setting, noise_std=0.0, noise_probability=Setting.noise_probability)
    if recipe.head_type == "efficient":
        setting = replace(setting, num_heads=None)
    elif recipe.head_type not in MULTI_HEAD_TYPES:
        # No attention to drop.
        return [replace(setting, attention_dropout=None, num_queries=1, num_heads=None)]
    if setting.attention_dropout is None:
        setting = replace(setting, attention_dropout=recipe.head_options.get("attention_dropout", 0.0))
    return [setting]


def read_grid(path: Path) -> Any:
    """What a YAML or JSON file holds.

    Raises:
        LayerFusionError: if it cannot be read.
    """
    import yaml

    try:
        if not path.is_file():
            raise LayerFusionError(f"grid {_short(str(path))} is neither {' nor '.join(GRIDS)} nor a file")
        text = path.read_text(encoding="utf-8")
        # All JSON but that with tabs is YAML too.
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except LayerFusionError:
        raise
    except OSError as error:
        raise LayerFusionError(f"grid {_short(str(path))} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise LayerFusionError(f"grid {path} is no {kind} file: {error}") from error


def _recipe(name: Any) -> Recipe:
    recipe = find_recipe(name)
    if recipe.kind == "choice":
        raise LayerFusionError(f"recipe {name!r} stands for several: {', '.join(recipe.candidates)}; name one of them")
    if recipe.kind != "head":
        tool = "fit_estimator" if recipe.kind == "estimator" else "fine_tune"
        raise LayerFusionError(f"recipe {name!r} is no head, so it cannot be swept: use {tool}, or layerfusion study")
    return recipe


def idle_fields(setting: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields that a setting has values of and no use for: those of training in steps, of a head in closed form."""
    return _IN_STEPS if setting.get("ridge_penalty") is not None else ()


def _is_number(value: Any, largest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= largest


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def _short(value: Any) -> str:
    """What a file held may be of any size and depth."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"


def merge_settings(settings: Sequence[Setting], learning_rates: Mapping[float, float]) -> list[int]:
    """Which settings are the same run: for each, the position of the one that is trained in its place.

    AdamW multiplies the weights by 1 - lr_t * decay in each step, whatever the gradient. Over a run that is a factor of
    exp(-decay * sum of lr_t), and where it is the same to 1 %, nothing but chance tells two runs apart.
    Of a group, the one with the strongest decay is trained: ties are broken towards it.

    Args:
        settings: in any order.
        learning_rates: for each starting value, the sum of the learning rates of all steps.
    """
    others: dict[Setting, list[int]] = {}
    for position, setting in enumerate(settings):
        others.setdefault(replace(setting, weight_decay=0.0), []).append(position)
    trained_as = list(range(len(settings)))
    for rest, positions in others.items():
        total = learning_rates[rest.learning_rate]
        group: list[int] = []
        for position in sorted(positions, key=lambda position: -settings[position].weight_decay):
            shrinkage = settings[position].weight_decay * total
            if not group or settings[group[0]].weight_decay * total - shrinkage >= SAME_SHRINKAGE:
                group = [position]
            trained_as[position] = group[0]
    return trained_as
