"""How the heads of a study are trained and chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..configuration_layer_fusion import ATTENDING_HEADS
from ..errors import LayerFusionError
from ..recipes import find_recipe
from ..sweeps import GRIDS, expand_grid
from ..sweeps.run import STRATEGIES
from ..sweeps.settings import read_grid
from ..training.run import MAX_BATCH_SIZE, MIN_EPOCHS, MIN_STEPS, default_batch_size

# What `sweep` can choose classifiers by.
METRICS = ("balanced_accuracy", "accuracy", "macro_f1")
# Fewer images of a class than this are cross-validated in two parts: a fifth of them would be none.
_SMALLEST_FIFTH = 5


@dataclass(frozen=True)
class Protocol:
    """Everything besides the data that a result depends on; `sweep` says what most fields mean.

    Attributes:
        name: of the protocol that this is, or is based on.
        grid: of settings to choose from.
        strategy: how the grid is searched.
        validation_size: share of the training rows that the choice is made on.
        min_epochs: epochs, unless `min_steps` asks for more.
        min_steps: least number of training steps.
        max_batch_size: rows per batch, of which there are at least five an epoch.
        noise_std: of Gaussian noise on the tokens, for every setting; `None` for what grid and recipe say.
        shots: training images per class, drawn anew for each split; `None` for all.
        selection_seeds: how many of the study's seeds the grid is searched with; all of them train the chosen setting.
        metric: to choose by.
        linear: fields with other values for heads without attention, which are cheap, and learn best at larger rates.
    """

    name: str
    grid: Any
    strategy: str = "merged"
    validation_size: float = 0.2
    min_epochs: int = MIN_EPOCHS
    min_steps: int = MIN_STEPS
    max_batch_size: int = MAX_BATCH_SIZE
    noise_std: float | None = None
    shots: int | None = None
    selection_seeds: int = 1
    metric: str = "balanced_accuracy"
    linear: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("min_epochs", "min_steps", "max_batch_size", "selection_seeds"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise LayerFusionError(f"protocol: {name}={getattr(self, name)!r} must be a whole number from 1 up")
        if self.shots is not None and (type(self.shots) is not int or self.shots < 2):
            raise LayerFusionError(
                f"protocol: shots={self.shots!r} must be 2 or more: one image per class leaves none to choose by"
            )
        if self.strategy not in STRATEGIES:
            raise LayerFusionError(f"protocol: strategy={self.strategy!r} is unknown: choose from {STRATEGIES}")
        if not isinstance(self.validation_size, int | float) or not 0 < self.validation_size < 1:
            raise LayerFusionError(
                f"protocol: validation_size={self.validation_size!r} is no share of the rows: use more than 0, less than 1"
            )
        if self.metric not in METRICS:
            raise LayerFusionError(f"protocol: metric={self.metric!r} is unknown: choose from {', '.join(METRICS)}")
        is_number = isinstance(self.noise_std, int | float) and not isinstance(self.noise_std, bool)
        if self.noise_std is not None and not (is_number and 0 <= self.noise_std < math.inf):
            raise LayerFusionError(f"protocol: noise_std={self.noise_std!r} must be 0 or a positive number")
        object.__setattr__(self, "grid", _checked_grid(self.grid))
        if self.linear is not None:
            known = [field.name for field in fields(self) if field.name not in ("name", "linear")]
            if not isinstance(self.linear, Mapping) or (unknown := sorted(map(str, self.linear.keys() - set(known)))):
                found = repr(unknown[0]) if isinstance(self.linear, Mapping) else f"{self.linear!r}"
                raise LayerFusionError(f"protocol: linear: {found} is no field: choose from {', '.join(known)}")
            replace(self, **self.linear, linear=None)

    @classmethod
    def from_value(cls, value: Any) -> Protocol:
        """A protocol by name, or `{"base": NAME, FIELD: value, ...}`.

        Raises:
            LayerFusionError: for an unknown name or field, or a value that cannot be.
        """
        given = {"base": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise LayerFusionError(f"protocol: {value!r} is neither a name nor a mapping with 'base'")
        base = given.get("base", "paper")
        if not isinstance(base, str) or base not in PROTOCOLS:
            raise LayerFusionError(f"protocol: {base!r} is unknown: choose from {', '.join(PROTOCOLS)}")
        known = [field.name for field in fields(cls) if field.name != "name"]
        if unknown := sorted(map(str, given.keys() - {"base", *known})):
            raise LayerFusionError(f"protocol: {unknown[0]!r} is no field: choose from base, {', '.join(known)}")
        changes: dict[str, Any] = {name: given[name] for name in known if name in given}
        return replace(PROTOCOLS[base], **changes)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "linear" or value is not None}

    def of(self, recipe: str) -> Protocol:
        """What of the protocol concerns a recipe."""
        changes = {} if find_recipe(recipe).head_type in ATTENDING_HEADS else dict(self.linear or {})
        return replace(self, **changes, linear=None)

    def sweep_options(self, num_rows: int) -> dict[str, Any]:
        """What `sweep` is called with for a number of training rows, besides the recipe."""
        trained_on = round(num_rows * (1 - self.validation_size))
        batch_size = min(default_batch_size(trained_on), self.max_batch_size)
        options = {
            "grid": self.grid,
            "strategy": self.strategy,
            "metric": self.metric,
            "num_epochs": self.num_epochs(trained_on, batch_size),
            **self.validation,
        }
        if batch_size == self.max_batch_size:
            options["batch_size"] = batch_size
        if self.noise_std is not None:
            options["noise_std"] = self.noise_std
        return options

    def num_epochs(self, num_rows: int, batch_size: int) -> int:
        """Epochs over so many rows."""
        return max(self.min_epochs, math.ceil(self.min_steps / math.ceil(num_rows / batch_size)))

    @property
    def validation(self) -> dict[str, Any]:
        """The part of the training rows that the choice is made on, as `sweep` and `fit_estimator` take it."""
        if self.shots is not None and self.shots < _SMALLEST_FIFTH:
            return {"num_folds": 2}
        return {"validation_size": self.validation_size}


def _checked_grid(grid: Any) -> Any:
    """The grid, by content: what a file holds is what runs depend on.

    Raises:
        LayerFusionError: if it cannot be expanded, or names what a study names by itself.
    """
    if isinstance(grid, str) and grid not in GRIDS:
        grid = read_grid(Path(grid))
    expand_grid(grid)  # says what is wrong with it
    for part in [grid] if isinstance(grid, Mapping) else grid if isinstance(grid, list | tuple) else []:
        if named := sorted({"recipe", "num_heads"} & part.keys()):
            raise LayerFusionError(f"protocol: the grid of a study cannot hold {named[0]!r}: recipes name that")
    return grid


PROTOCOLS = {
    # arXiv 2601.09322, appendix and `scripts/`: 63 settings, noise, at least 40 epochs and 1000 steps.
    "paper": Protocol("paper", "paper", strategy="full"),
    "fast": Protocol("fast", "fast", min_steps=400),
}
