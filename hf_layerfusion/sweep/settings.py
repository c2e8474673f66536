"""What a sweep varies: settings, grids of them, and which of them are the same run in all but name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import LayerFusionError
from ..recipes import RECIPES

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

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise LayerFusionError(f"recipe {self.recipe!r} is unknown: choose from {', '.join(RECIPES)}")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise LayerFusionError(f"{name}={value!r} of a sweep's setting: use 0 or a positive number")
        if not self.learning_rate:
            raise LayerFusionError("learning_rate=0 of a sweep's setting trains nothing: use a positive number")
        if not isinstance(self.balance_classes, bool):
            raise LayerFusionError(f"balance_classes={self.balance_classes!r}: use true or false")

    @property
    def config_options(self) -> dict[str, Any]:
        """The fields that belong to `LayerFusionConfig`, as its keyword arguments."""
        chosen = {name: getattr(self, name) for name in _CONFIG_FIELDS}
        return {name: value for name, value in chosen.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_CONFIG_FIELDS = ("recipe", "attention_dropout", "noise_std", "noise_probability", "num_queries", "num_heads")
FIELDS = tuple(field.name for field in fields(Setting))

# The reference's selection: 3 learning rates x 7 decays x 3 dropouts, with its noise.
_PAPER = {
    "learning_rate": [1e-1, 1e-2, 1e-3],
    "weight_decay": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0],
    "attention_dropout": [0.0, 0.1, 0.3],
    "noise_std": [0.05],
}
_FAST = {
    "learning_rate": [3e-2, 1e-2, 3e-3],
    "weight_decay": [1e-4, 1e-1],
    "attention_dropout": [0.0, 0.3],
}
GRIDS: dict[str, dict[str, list]] = {"paper": _PAPER, "fast": _FAST}

Grid = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def expand_grid(grid: Grid, recipes: Sequence[str] = ("alf",)) -> list[Setting]:
    """All settings of a grid, each once, in the order of the reference: learning rates outermost.

    Args:
        grid: `"paper"`, `"fast"`, a YAML or JSON file, a mapping from fields of [`Setting`] to a value or a list of values
            (all combinations are meant), or a list of such mappings.
        recipes: for settings that do not name theirs.

    Raises:
        LayerFusionError: for an unknown name or field, a value of a wrong kind, or a grid without settings.
    """
    if isinstance(grid, str | Path):
        grid = GRIDS[str(grid)] if str(grid) in GRIDS else _read_grid(Path(grid))
    parts = [grid] if isinstance(grid, Mapping) else grid
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise LayerFusionError(f"a grid is a mapping from fields to values, or a list of them, but this is {grid!r}")
    settings = []
    for part in parts:
        if unknown := sorted(map(str, part.keys() - set(FIELDS))):
            raise LayerFusionError(f"{unknown[0]!r} is no field of a sweep's grid: choose from {', '.join(FIELDS)}")
        values = {name: _as_list(value) for name, value in {"recipe": list(recipes), **part}.items()}
        if empty := [name for name, choices in values.items() if not choices]:
            raise LayerFusionError(f"the grid names no value for {empty[0]!r}: give one or leave it out")
        for combination in itertools.product(*values.values()):
            settings.append(_without_idle_fields(Setting(**dict(zip(values, combination, strict=True)))))
    return list(dict.fromkeys(settings))


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _without_idle_fields(setting: Setting) -> Setting:
    """A linear head has no attention to drop: settings that differ in that alone are one."""
    if RECIPES[setting.recipe].head_type == "attentive":
        return setting
    return replace(setting, attention_dropout=None, num_queries=1, num_heads=None)


def _read_grid(path: Path) -> Any:
    # YAML comes with huggingface_hub; JSON is YAML too.
    import yaml

    if not path.is_file():
        raise LayerFusionError(f"grid {str(path)!r} is neither {' nor '.join(GRIDS)} nor a file")
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayerFusionError(f"grid {path} is no YAML file: {error}") from error
    # YAML 1.1 takes 1e-3 for text: only 1.0e-3 is a number to it.
    return _with_numbers(grid)


def _with_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def merge_settings(settings: Sequence[Setting], learning_rates: Mapping[float, float]) -> list[int]:
    """Which settings are the same run: for each, the position of the one that is trained in its place.

    AdamW multiplies the weights by 1 - lr_t * decay in each step, whatever the gradient. Over a run that is a factor of
    exp(-decay * sum of lr_t), and where it is the same to 1 %, so is the run, up to what rounding and chance do anyway.
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
