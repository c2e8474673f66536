"""A study as its YAML file says it, checked before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import LayerFusionError
from ..recipes import find_recipe, number_advice
from .protocol import Protocol

# Names become parts of file names, in which `--` parts them.
_NAME = re.compile(r"(?!.*--)[\w][\w. -]{0,59}")


@dataclass(frozen=True)
class BackboneEntry:
    """A backbone of a study.

    Attributes:
        id: Hub id, or folder, also with `~` for the home folder.
        name: in tables and file names; by default the last part of `id`.
        revision: branch, tag or commit.
        image_size: pixels; by default what its image processor says.
        random_weights: the same architecture untrained, as a control.
    """

    id: str
    name: str = ""
    revision: str | None = None
    image_size: int | None = None
    random_weights: bool = False


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset of a study.

    Attributes:
        id: Hub id, folder, also with `~`, or `"sklearn:digits"`.
        name: in tables and file names; by default the last part of `id`.
        config: configuration of a Hub dataset.
        revision: branch, tag or commit.
        train_split: rows to train on.
        test_split: rows to test on; without such a split, a fifth of the training rows.
        image_column: by default the only one.
        label_column: by default `label`, or the only column of classes.
        group_column: rows with the same value are never on both sides of a split.
        max_train_rows: train on so many at most, drawn by class.
        max_test_rows: likewise.
        domain: what kind of pictures these are, for the report.
    """

    id: str
    name: str = ""
    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    max_train_rows: int | None = None
    max_test_rows: int | None = None
    domain: str = ""


@dataclass(frozen=True)
class StudyConfig:
    """Backbones x datasets x splits x recipes x seeds.

    Attributes:
        name: of the study.
        backbones: at least one.
        datasets: at least one.
        recipes: names of recipes; `linear-layer:*` and the like stand for all layers and modules of a backbone.
        protocol: how heads are trained and chosen.
        seeds: every chosen setting is trained from each of these.
        splits: `"own"` for the datasets' own training and test rows, or a number of new splits of all rows.
        references: recipes that all others are held against in the report, one by one and the best of them.
    """

    name: str
    backbones: tuple[BackboneEntry, ...]
    datasets: tuple[DatasetEntry, ...]
    recipes: tuple[str, ...]
    protocol: Protocol
    seeds: tuple[int, ...] = (0,)
    splits: str | int = "own"
    references: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> StudyConfig:
        """Read a YAML file.

        Raises:
            LayerFusionError: if there is no such file, or something in it cannot be.
        """
        import yaml

        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise LayerFusionError(f"study {path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise LayerFusionError(f"study {path} is no YAML file: {' '.join(str(error).split())}") from error
        try:
            return cls.from_dict(content)
        except LayerFusionError as error:
            raise LayerFusionError(f"study {path}: {error}") from error

    @classmethod
    def from_dict(cls, content: Any) -> StudyConfig:
        """The same from what YAML or JSON gave.

        Raises:
            LayerFusionError: naming the entry.
        """
        known = ("name", "backbones", "datasets", "recipes", "protocol", "seeds", "splits", "references")
        _check_keys("the study", content, known, ("name", "backbones", "datasets", "recipes"))
        if not isinstance(content["name"], str) or not _NAME.fullmatch(content["name"]):
            raise LayerFusionError(f"name: {content['name']!r} is no name: use letters, digits, '.', '_' and '-'")
        recipes = content["recipes"]
        if not isinstance(recipes, list) or not recipes:
            raise LayerFusionError(f"recipes: {recipes!r} is no list of names")
        for recipe in recipes:
            _check_recipe(recipe)
        splits = content.get("splits", "own")
        if splits != "own" and (type(splits) is not int or splits < 1):
            raise LayerFusionError(f"splits: {splits!r} is neither 'own' nor a number of splits")
        seeds = content.get("seeds", [0])
        whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds):
            raise LayerFusionError(f"seeds: {seeds!r} must be a list of different whole numbers from 0 up")
        references = content.get("references", [])
        if not isinstance(references, list) or (unknown := [one for one in references if one not in recipes]):
            shown = repr(references) if not isinstance(references, list) else repr(unknown[0])
            raise LayerFusionError(f"references: {shown} is none of the study's recipes: {', '.join(recipes)}")
        return cls(
            name=content["name"],
            backbones=_entries("backbones", content["backbones"], BackboneEntry),
            datasets=_entries("datasets", content["datasets"], DatasetEntry),
            recipes=tuple(dict.fromkeys(recipes)),
            protocol=Protocol.from_value(content.get("protocol", "paper")),
            seeds=tuple(seeds),
            splits=splits,
            references=tuple(references),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _check_recipe(recipe: Any) -> None:
    """Whether there is such a recipe; what `*` stands for depends on the backbone."""
    if not isinstance(recipe, str):
        raise LayerFusionError(
            f"recipes: {recipe!r} is no name; names with a colon before a number need quotes in YAML"
        )
    family, *places = recipe.split(":")
    examples = ("1", "block")
    try:
        find_recipe(
            ":".join([family, *(examples[i] if place == "*" and i < 2 else place for i, place in enumerate(places))])
        )
    except LayerFusionError as error:
        raise LayerFusionError(f"recipes: {error}") from error
    if "*" in places and (advice := number_advice(family)):
        raise LayerFusionError(f"recipes: {recipe!r}: {advice}")


def _entries(name: str, values: Any, kind: Callable[..., Any]) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise LayerFusionError(f"{name}: {values!r} is no list of entries with an 'id'")
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    entries = []
    for number, value in enumerate(values):
        value = {"id": value} if isinstance(value, str) else value
        where = f"{name}[{number}]"
        _check_keys(where, value, tuple(known), ("id",))
        for key, given in value.items():
            _check_type(f"{where}.{key}", given, known[key].type, known[key].default)
        default = re.sub(r"[^\w.-]+", "-", re.split(r"[/:]", value["id"].rstrip("/"))[-1]).strip("-.")
        title = value.get("name") or default
        if not _NAME.fullmatch(title):
            raise LayerFusionError(f"{where}: {title!r} is no name: use letters, digits, '.', '_', '-' and blanks")
        entries.append(kind(**{**value, "name": title}))
    names = [entry.name for entry in entries]
    if twice := [title for title in names if names.count(title) > 1]:
        raise LayerFusionError(f"{name}: two entries are called {twice[0]!r}: give each a name of its own")
    return tuple(entries)


def _check_keys(where: str, value: Any, known: Sequence[str], needed: Sequence[str]) -> None:
    if not isinstance(value, Mapping):
        raise LayerFusionError(f"{where}: {value!r} is no mapping with {', '.join(needed)}")
    if unknown := sorted(map(str, value.keys() - set(known))):
        raise LayerFusionError(f"{where}: {unknown[0]!r} is no field: choose from {', '.join(known)}")
    if missing := [key for key in needed if value.get(key) in (None, "")]:
        raise LayerFusionError(f"{where}: {missing[0]!r} is missing")


def _check_type(where: str, value: Any, declared: Any, default: Any) -> None:
    """Against the annotation, which is a text such as `int | None`."""
    kinds = {"str": str, "int": int, "bool": bool, "None": type(None)}
    wanted = [kinds[part.strip()] for part in str(declared).split("|")]
    if type(value) not in wanted or (type(value) is int and value < 1):
        shown = " or ".join(
            {"str": "text", "int": "a whole number from 1 up", "bool": "true or false"}.get(part.strip(), "nothing")
            for part in str(declared).split("|")
        )
        raise LayerFusionError(
            f"{where}: {value!r} must be {shown}" + ("" if default is MISSING else "; or leave it out")
        )
