"""The training record beside a head: what was trained on what, and what was measured. It may come from strangers."""

from __future__ import annotations

import json
import math
import platform
import reprlib
import unicodedata
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import LayerFusionError
from ..files import read_bounded, write_file

logger = logging.get_logger(__name__)

RECORD_NAME = "training_record.json"
# The matrix of 1,000 classes takes 3 MB, the rows of 20,000 classes 3 MB.
MAX_RECORD_BYTES = 32 * 2**20
# Numbers that a float can hold, with room to compute.
_LARGEST = 1e300

_PACKAGES = ("hf-layerfusion", "torch", "transformers", "datasets", "huggingface_hub", "scikit-learn", "numpy")


def software_versions() -> dict[str, str]:
    """Versions of what a head was made with, for the record's `environment`."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path
            continue
    return {**versions, "platform": f"{platform.system()} {platform.machine()}"}


def check_record(record: Any) -> dict[str, Any]:
    """A training summary as JSON keeps it, its known fields checked.

    Args:
        record: whatever `training_summary` holds. Fields that are not known are kept and mean nothing.

    Returns:
        A copy, in which numpy's numbers and arrays are numbers and lists.

    Raises:
        LayerFusionError: naming the field that is not as it should be.
    """
    if not isinstance(record, Mapping):
        raise LayerFusionError(f"a training record is a mapping, not {_shown(record)}")
    try:
        copy = json.loads(json.dumps(record, default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise LayerFusionError(f"this training record cannot be written as JSON: {error}") from error
    for field, (is_right, expected) in _FIELDS.items():
        if field in copy and not is_right(copy[field]):
            raise LayerFusionError(f"{field} of a training record is {expected}, not {_shown(copy[field])}")
    return copy


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a training record as JSON.

    Raises:
        LayerFusionError: as `check_record`.
    """
    checked = check_record(record)
    # A line for each field, since a matrix with a line for each number would be unreadable.
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in checked.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    # A lone surrogate, which a folder's name may hold, is no text.
    write_file(Path(path), text.encode("utf-8", "replace"))


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
        LayerFusionError: if it is too large, no JSON, or not as a record should be.
    """
    content = read_bounded(path, MAX_RECORD_BYTES, "training record")
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # among them, text that is not UTF-8 and numbers of 5,000 digits
        raise LayerFusionError(f"{path} is not JSON: {error}") from error
    try:
        return check_record(values)
    except LayerFusionError as error:
        raise LayerFusionError(f"{path}: {error}") from error


def load_record(path: str | Path | None) -> dict[str, Any]:
    """The record in a file, or `{}`: without a file, and with a warning if it is broken. A head works without one."""
    if path is None or not Path(path).is_file():
        return {}
    try:
        return read_record(path)
    except LayerFusionError as error:
        logger.warning(f"the training record is left out: {error}")
        return {}


def plain_text(text: Any, limit: int = 80) -> str:
    """Text of a stranger as one line without control characters, cut to a length.

    Marks that turn the direction of reading are left out too: what follows would not be what it seems. Joiners stay,
    which Persian words and emoji need.
    """
    kinds = ((character, unicodedata.category(character)) for character in str(text))
    kept = (" " if kind == "Cc" else character for character, kind in kinds if kind != "Cs" and not _hidden(character))
    line = " ".join("".join(kept).split())
    return line if len(line) <= limit else f"{line[: limit - 1].rstrip()}…"


def _hidden(character: str) -> bool:
    return unicodedata.category(character) == "Cf" and character not in "\u200c\u200d"


def _plain(value: Any) -> Any:
    """Numbers, arrays and tensors as JSON knows them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{_shown(value)} is neither text nor a number")


def _shown(value: Any) -> str:
    return reprlib.repr(value)  # which a deep or long value cannot blow up


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_scalar(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _mapping_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


def _list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


def _is_share(value: Any) -> bool:
    return value is None or (_is_number(value) and 0 <= value <= 1)


def _is_class_row(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("label"))
        and _is_count(value.get("support"))
        and all(name in value and _is_share(value[name]) for name in ("precision", "recall", "f1"))
    )


def _is_matrix(value: Any, is_right: Callable[[Any], bool], num_columns: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == num_columns and all(map(is_right, row)) for row in value
    )


def _is_confusion_matrix(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and _is_matrix(value, _is_count, len(value))


def _is_attention(value: Any) -> bool:
    if not isinstance(value, dict) or not _list_of(_is_text)(value.get("token_names")):
        return False
    names, mean = value["token_names"], value.get("mean")
    is_whole = bool(names) and bool(mean) and _is_matrix(mean, _is_weight, len(names))
    return is_whole and _is_count(value.get("num_images"))


def _is_weight(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1.001  # rounded


_TEXT: tuple[Callable[[Any], bool], str] = (_is_text, "text")
_COUNT: tuple[Callable[[Any], bool], str] = (_is_count, "a whole number from 0 up")
# Of each field, what it must be, and how to say so.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dataset": _TEXT,
    "dataset_id": _TEXT,
    "split": _TEXT,
    "repo_id": _TEXT,
    "license": _TEXT,
    "train_images": _COUNT,
    "test_images": _COUNT,
    "seconds": (lambda value: _is_number(value) and value >= 0, "a number from 0 up"),
    "metrics": (_mapping_of(_is_number), "a mapping from names to finite numbers"),
    "confidence_intervals": (_mapping_of(_is_interval), "a mapping from names to [low, high]"),
    "per_class": (_list_of(_is_class_row), "a list of classes with label, precision, recall, f1 and support"),
    "confusion_matrix": (_is_confusion_matrix, "a square matrix of counts"),
    "attention": (_is_attention, "token_names, the matrix mean with a column for each of them, and num_images"),
    "hyperparameters": (_mapping_of(_is_scalar), "a mapping from names to text and numbers"),
    "environment": (_mapping_of(_is_text), "a mapping from names to versions"),
    "notes": (_list_of(_is_text), "a list of sentences"),
}


__all__ = [
    "RECORD_NAME",
    "check_record",
    "load_record",
    "plain_text",
    "read_record",
    "software_versions",
    "write_record",
]
