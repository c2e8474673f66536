"""What a study has measured: its folder as tables."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import LayerFusionError
from .statistics import Predictions, Runs, balanced_accuracy

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset

STUDY_NAME = "study.json"
RUNS_FOLDER = "runs"
SIMILARITY_FOLDER = "similarity"

_TEXTS = ("backbone", "dataset", "recipe", "protocol", "identity")
_COUNTS = (
    "split",
    "seed",
    "num_labels",
    "num_parameters",
    "bytes_per_image",
    "train_rows",
    "test_rows",
    "num_settings",
)
_METRICS = ("balanced_accuracy", "accuracy")
# Stored metrics are those of the stored predictions, up to rounding.
_METRIC_TOLERANCE = 1e-6


class RunKey(NamedTuple):
    """Which run of a study."""

    backbone: str
    dataset: str
    split: int
    recipe: str
    seed: int

    @property
    def stem(self) -> str:
        """The name of the run's files, without their suffix."""
        recipe = self.recipe.replace(":", "_")
        return f"{self.backbone}--{self.dataset}--split{self.split}--{recipe}--seed{self.seed}"


@dataclass(frozen=True)
class Run:
    """One run, as its JSON file says it.

    Attributes:
        key: which one.
        balanced_accuracy, accuracy: 0 to 1; NaN if the run diverged.
        validation_score: of the chosen setting; NaN if nothing was chosen.
        setting: what was chosen, by name.
        bank: `(layer, module, pool)` of each token that was read.
        attention: `(H, N)` float64, the mean over the test images, or `None`.
        expected_depth, attention_entropy: of the attention; NaN without one.
        values: the file's other numbers and texts.
    """

    key: RunKey
    balanced_accuracy: float
    accuracy: float
    validation_score: float
    setting: dict[str, Any]
    bank: list[tuple[int, str, str]]
    attention: np.ndarray | None
    expected_depth: float
    attention_entropy: float
    values: dict[str, Any]

    @property
    def layers(self) -> list[int]:
        """The layers that it reads, ascending."""
        return sorted({layer for layer, _, _ in self.bank})


@dataclass
class StudyResults:
    """All finished runs of a study.

    Attributes:
        folder: of the study.
        study: the content of `study.json`.
        runs: by key, in the order of the config, then of split and seed.
    """

    folder: Path
    study: dict[str, Any]
    runs: dict[RunKey, Run] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> StudyResults:
        """Read a study's folder, finished or not. Predictions are read when they are asked for.

        Raises:
            LayerFusionError: if the folder holds no study, or a file of a run is damaged, incomplete or under a wrong name.
        """
        folder = Path(folder)
        results = cls(folder, _read_json(folder / STUDY_NAME, "run the study first, or give the folder that it wrote"))
        try:
            results.planned()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            cure = "run the study again, and it is written anew"
            raise LayerFusionError(f"{folder / STUDY_NAME} is damaged ({_what(error)}): {cure}") from error
        found = [_read_run(path) for path in sorted((folder / RUNS_FOLDER).glob("*.json"))]
        results.runs = {run.key: run for run in sorted(found, key=lambda run: results._order(run.key))}
        return results

    @property
    def config(self) -> dict[str, Any]:
        """The study as its YAML file had it."""
        return self.study.get("config", self.study)

    @property
    def backbones(self) -> list[str]:
        """Names of the backbones that have runs."""
        return list(dict.fromkeys(key.backbone for key in self.runs))

    @cached_property
    def datasets(self) -> list[str]:
        """Names of the datasets that have runs, in the order of the config."""
        names = {key.dataset for key in self.runs}
        return sorted(names, key=lambda name: _place(name, _names(self.config, "datasets")))

    @cached_property
    def recipes(self) -> list[str]:
        """Names of the recipes that have runs, in the order of the config; members of a family by number."""
        names = {key.recipe for key in self.runs}
        return sorted(names, key=lambda name: _place(name, self.config["recipes"]))

    def __getitem__(self, key: tuple[str, str, int, str, int]) -> Run:
        """One run.

        Raises:
            LayerFusionError: if it is not there.
        """
        try:
            return self.runs[RunKey(*key)]
        except KeyError:
            raise LayerFusionError(f"the study in {self.folder} has no run {RunKey(*key).stem}") from None

    def select(self, backbone: str, dataset: str, recipe: str) -> list[Run]:
        """The runs of all splits and seeds, in this order."""
        return self._groups.get((backbone, dataset, recipe), [])

    @cached_property
    def _groups(self) -> dict[tuple[str, str, str], list[Run]]:
        groups: dict[tuple[str, str, str], list[Run]] = {}
        for key, run in self.runs.items():
            groups.setdefault((key.backbone, key.dataset, key.recipe), []).append(run)
        return groups

    def predictions(self, backbone: str, dataset: str, split: int, recipe: str, seed: int) -> Predictions:
        """What one run predicted for its test images.

        Raises:
            LayerFusionError: if there is no such run, or its predictions are damaged or not those that its metrics are of.
        """
        run = self[backbone, dataset, split, recipe, seed]
        return _read_predictions(self.folder / RUNS_FOLDER / f"{run.key.stem}.safetensors", run)

    def all_predictions(self, backbone: str, dataset: str, recipe: str) -> Runs:
        """By split, the predictions of all seeds; runs that diverged are left out.

        Raises:
            LayerFusionError: as `predictions`.
        """
        found: dict[int, list[Predictions]] = {}
        for run in self.select(backbone, dataset, recipe):
            if math.isfinite(run.balanced_accuracy):
                found.setdefault(run.key.split, []).append(self.predictions(*run.key))
        return found

    def scores(self, backbone: str, dataset: str, recipe: str) -> dict[int, list[float]]:
        """By split, the balanced accuracies of all seeds; runs that diverged are left out."""
        found: dict[int, list[float]] = {}
        for run in self.select(backbone, dataset, recipe):
            if math.isfinite(run.balanced_accuracy):
                found.setdefault(run.key.split, []).append(run.balanced_accuracy)
        return found

    def table(self) -> pandas.DataFrame:
        """A row for each run: what it is, its scores, its cost; the fields of its chosen setting as `setting_NAME`."""
        import pandas

        table = pandas.DataFrame([_row(run) for run in self.runs.values()])
        for name in table.columns:
            if name.startswith("setting_"):
                # Estimators and heads may use one name for a text and for a number.
                kinds = {isinstance(value, str) for value in table[name] if value is not None and value == value}
                if len(kinds) > 1:
                    table[name] = [None if value is None or value != value else str(value) for value in table[name]]
        return table

    @property
    def dataset(self) -> Dataset:
        """The same table as a `datasets.Dataset`.

        Raises:
            LayerFusionError: if there is no run.
        """
        from datasets import Dataset

        if not self.runs:
            raise LayerFusionError(f"the study in {self.folder} has no finished run yet")
        return Dataset.from_pandas(self.table(), preserve_index=False)

    def similarities(self) -> list[dict[str, Any]]:
        """The contents of `similarity/`, with `linear_cka` as `(N, N)` float64 arrays, in the order of the config.

        Raises:
            LayerFusionError: if a file is damaged.
        """
        found = []
        for path in sorted((self.folder / SIMILARITY_FOLDER).glob("*.json")):
            content = _read_json(path, _REMOVE)
            try:
                matrix = np.array(content["linear_cka"], dtype=np.float64)
                names = [str(name) for name in content["token_names"]]
                if matrix.shape != (len(names), len(names)):
                    raise ValueError(f"a matrix of shape {matrix.shape} for {len(names)} tokens")
                entry: dict[str, Any] = {name: str(content[name]) for name in ("backbone", "dataset")}
                entry |= {"num_images": int(content["num_images"]), "token_names": names, "linear_cka": matrix}
            except (KeyError, TypeError, ValueError) as error:
                raise LayerFusionError(f"{path} is damaged ({_what(error)}): {_REMOVE}") from error
            found.append(entry)
        places = {name: _names(self.config, name) for name in ("backbones", "datasets")}
        return sorted(
            found, key=lambda e: (_place(e["backbone"], places["backbones"]), _place(e["dataset"], places["datasets"]))
        )

    def planned(self) -> list[RunKey]:
        """The runs that the study is to have.

        For a backbone and dataset that the study has come to, those that `study.json` lists as `expected`: it knows how
        many layers the backbone has, and which recipes have no seeds. For others all combinations of the config, where a
        family such as `linear-layer:*` stands for itself.
        """
        found = dict.fromkeys(
            RunKey(*(row[name] for name in RunKey._fields)) for row in self.study.get("expected", ())
        )
        recipes, seeds = list(self.config["recipes"]), list(self.config["seeds"])
        begun = {(key.backbone, key.dataset) for key in found}
        splits = self.config.get("splits", "own")
        if splits != "own" and type(splits) is not int:
            raise ValueError(f"splits is {splits!r}")
        for backbone, dataset in itertools.product(_names(self.config, "backbones"), _names(self.config, "datasets")):
            if (backbone, dataset) in begun:
                continue
            numbers = range(1 if splits == "own" else splits)
            for split, recipe, seed in itertools.product(numbers, recipes, seeds):
                found[RunKey(backbone, dataset, split, recipe, seed)] = None
        return list(found)

    def missing(self) -> list[RunKey]:
        """The planned runs that are not there."""
        return [key for key in self.planned() if key not in self.runs]

    def diverged(self) -> list[RunKey]:
        """The runs that are there but have no score."""
        return [key for key, run in self.runs.items() if not math.isfinite(run.balanced_accuracy)]

    def _order(self, key: RunKey) -> tuple:
        places = [_place(key.backbone, _names(self.config, "backbones"))]
        places.append(_place(key.dataset, _names(self.config, "datasets")))
        places.append(_place(key.recipe, self.config["recipes"]))
        return (*places, key.split, key.seed)


_REMOVE = "remove it, and run the study again to make it anew"


def _names(config: Mapping[str, Any], part: str) -> list[str]:
    return [str(entry["name"]) for entry in config[part]]


def _belongs(name: str, pattern: str) -> bool:
    """Whether a recipe is meant by an entry of the config: `linear-layer:*`, `module-probe:*:*`, or a plain name."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^:]+"), name) is not None


def _place(name: str, patterns: Iterable[str]) -> tuple:
    """Sorts names by their place in the config, members of a family by number; unknown names come last."""
    patterns = list(patterns)
    place = next((number for number, pattern in enumerate(patterns) if _belongs(name, pattern)), len(patterns))
    return (place, [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)])


def _read_json(path: Path, cure: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LayerFusionError(f"{path} is missing: {cure}") from None
    except (OSError, ValueError) as error:  # of a JSON decoder, or of bytes that are no UTF-8
        raise LayerFusionError(f"{path} cannot be read ({error}): {cure}") from error
    if not isinstance(content, dict):
        raise LayerFusionError(f"{path} holds no mapping: {cure}")
    return content


def _read_run(path: Path) -> Run:
    content = _read_json(path, _REMOVE)
    try:
        run = _parse_run(content)
    except (KeyError, TypeError, ValueError) as error:
        raise LayerFusionError(f"{path} is damaged ({_what(error)}): {_REMOVE}") from error
    if run.key.stem != path.stem:
        raise LayerFusionError(f"{path} holds the run {run.key.stem}: give it back its name, or {_REMOVE}")
    if not path.with_suffix(".safetensors").is_file():
        raise LayerFusionError(f"{path} has no {path.stem}.safetensors beside it: {_REMOVE}")
    return run


def _what(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _parse_run(content: dict[str, Any]) -> Run:
    for name in _TEXTS:
        if not isinstance(content[name], str):
            raise ValueError(f"{name} is {content[name]!r}, no text")
    for name in _COUNTS:
        if type(content[name]) is not int or content[name] < 0:
            raise ValueError(f"{name} is {content[name]!r}, no whole number")
    metrics = {name: _number(content["metrics"][name], name, 0.0, 1.0) for name in _METRICS}
    bank = [(int(layer), str(module), str(pool)) for layer, module, pool in content["bank"]]
    attention = None if content["attention"] is None else np.array(content["attention"], dtype=np.float64)
    if attention is not None and attention.ndim != 2:
        raise ValueError(f"attention has {attention.ndim} dimensions, not 2")
    depth = content["depth"] or {"expected_depth": None, "entropy": None}
    setting = content["setting"] or {}
    if not isinstance(setting, dict):
        raise ValueError(f"setting is {setting!r}, no mapping")
    return Run(
        RunKey(*(content[name] for name in RunKey._fields)),
        **metrics,
        validation_score=_number(content["validation_score"], "validation_score"),
        setting=setting,
        bank=bank,
        attention=attention,
        expected_depth=_number(depth["expected_depth"], "expected_depth"),
        attention_entropy=_number(depth["entropy"], "entropy"),
        values={
            "seconds": _number(content["seconds"], "seconds"),
            **{name: content[name] for name in (*_COUNTS, *_TEXTS) if name not in RunKey._fields},
        },
    )


def _number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A JSON number, NaN for null: a run may have diverged."""
    number = math.nan if value is None else value
    if type(number) not in (int, float) or number < low or number > high:
        raise ValueError(f"{name} is {value!r}, no number" + (f" from {low:g} to {high:g}" if high < math.inf else ""))
    return float(number)


def _row(run: Run) -> dict[str, Any]:
    row = {**run.key._asdict(), **{name: getattr(run, name) for name in (*_METRICS, "validation_score")}}
    row |= {"num_tokens": len(run.bank), "num_layers": len(run.layers)}
    row |= {"expected_depth": run.expected_depth, "attention_entropy": run.attention_entropy, **run.values}
    for name, value in run.setting.items():
        plain = value is None or isinstance(value, str | int | float)
        row[f"setting_{name}"] = value if plain else json.dumps(value, ensure_ascii=False)
    return row


def _read_predictions(path: Path, run: Run) -> Predictions:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        found = Predictions(*(tensors[name] for name in Predictions._fields))
        for name, values in zip(Predictions._fields, found, strict=True):
            if values.shape != (run.values["test_rows"],) or values.dtype != np.int64:
                raise ValueError(f"{name} is {values.dtype} {values.shape}, not int64 ({run.values['test_rows']},)")
        for name, values in (("labels", found.labels), ("predictions", found.predictions)):
            if len(values) and values.min() < 0:
                raise ValueError(f"{name} has {values.min()}, which is no class")
        if len(np.unique(found.rows)) != len(found.rows):
            raise ValueError("a row stands in it twice")
        if math.isfinite(run.balanced_accuracy):
            measured = balanced_accuracy(found)
            if abs(measured - run.balanced_accuracy) > _METRIC_TOLERANCE:
                raise ValueError(
                    f"their balanced accuracy is {measured:.6f}, but {run.key.stem}.json says {run.balanced_accuracy:.6f}"
                )
    except KeyError as error:
        raise LayerFusionError(f"{path} is damaged (it has no {error}): {_REMOVE}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise LayerFusionError(f"{path} is damaged ({error}): {_REMOVE}") from error
    return found
