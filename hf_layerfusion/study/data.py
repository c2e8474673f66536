"""What a study reads: its backbones, its datasets, and which of their rows are trained and tested on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from huggingface_hub import HfApi
from transformers import PreTrainedModel

from ..backbones import build_backbone, open_backbone
from ..data import (
    DIGITS,
    check_group_column,
    encode_labels,
    find_image_column,
    find_label_column,
    group_numbers,
    label_options,
    open_dataset,
    with_test_split,
)
from ..errors import LayerFusionError
from ..images import resize_processor
from ..sweeps.selection import split_rows
from .config import BackboneEntry, DatasetEntry


@dataclass(frozen=True)
class StudyBackbone:
    """A backbone of a study, opened, and the image processor that gives it pictures of the study's size."""

    model: PreTrainedModel
    image_processor: Any
    revision: str | None


def open_study_backbone(entry: BackboneEntry) -> StudyBackbone:
    """Open a backbone of a study.

    Raises:
        LayerFusionError: if it cannot be opened, or comes without an image processor.
    """
    opened = open_backbone(os.path.expanduser(entry.id), revision=entry.revision)
    if opened.image_processor is None:
        raise LayerFusionError(
            f"backbone {entry.name!r} comes without an image processor: add preprocessor_config.json"
        )
    processor, model = opened.image_processor, opened.model
    if entry.image_size:
        processor = resize_processor(processor, entry.image_size)
    if entry.random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build_backbone(model.config).eval()
    return StudyBackbone(model, processor, opened.revision)


@dataclass(frozen=True)
class Split:
    """Rows of a dataset, ascending: what is trained on and what is tested on."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class StudyData:
    """A dataset of a study, opened.

    Attributes:
        images: all rows, first those of the training split, then those of the test split.
        image_column: in `images`.
        label_column: in `images`; class indices.
        num_train: how many rows the training split has.
        groups: for each row, what it belongs to; `None` if every row stands for itself.
    """

    images: Dataset
    image_column: str
    label_column: str
    num_train: int
    groups: np.ndarray | None

    @property
    def labels(self) -> np.ndarray:
        """`(rows,)` int64."""
        column = self.images.select_columns([self.label_column]).with_format(None)[self.label_column][:]
        return np.asarray(column).astype(np.int64)

    @property
    def label_options(self) -> dict[str, Any]:
        """`id2label` or `num_labels`, and `problem_type`, for a model."""
        return label_options(self.images, self.label_column)


def open_study_data(entry: DatasetEntry) -> StudyData:
    """Open a dataset of a study.

    Raises:
        LayerFusionError: if it cannot be opened, lacks a split or column, or its labels are no classes.
    """
    found = open_dataset(os.path.expanduser(entry.id), name=entry.config, revision=entry.revision)
    if entry.train_split not in found:
        raise LayerFusionError(f"dataset {entry.name!r} has no split {entry.train_split!r}, only {list(found)}")
    splits = DatasetDict({"train": found[entry.train_split]})
    if entry.test_split in found:
        splits["test"] = found[entry.test_split]
    elif entry.test_split != "test":
        raise LayerFusionError(f"dataset {entry.name!r} has no split {entry.test_split!r}, only {list(found)}")
    image_column = find_image_column(splits["train"], entry.image_column)
    label_column = find_label_column(splits["train"], entry.label_column)
    for split, rows in splits.items():
        if entry.group_column:
            check_group_column(rows, entry.group_column, f"split {split!r} of dataset {entry.name!r}")
    if entry.group_column and "test" not in splits:
        raise LayerFusionError(
            f"dataset {entry.name!r} has no test split, and one drawn by row would part its groups: add a test split"
        )
    splits = with_test_split(encode_labels(splits, label_column), label_column)
    columns = list(dict.fromkeys([image_column, label_column, *([entry.group_column] if entry.group_column else [])]))
    parts = []
    for split, most in (("train", entry.max_train_rows), ("test", entry.max_test_rows)):
        rows = splits[split].select_columns(columns)
        parts.append(rows if most is None or most >= len(rows) else rows.select(_drawn(rows, label_column, most)))
    try:
        images = concatenate_datasets(parts)
    except ValueError as error:
        raise LayerFusionError(
            f"dataset {entry.name!r}: the training and the test split have columns of different kinds: {error}"
        ) from error
    if label_options(images, label_column)["problem_type"] != "single_label_classification":
        raise LayerFusionError(
            f"dataset {entry.name!r}: a study compares classifiers, but {label_column!r} has no classes"
        )
    if len(set(images.select_columns([label_column]).with_format(None)[label_column][:])) < 2:
        raise LayerFusionError(f"dataset {entry.name!r}: all rows have one class, there is nothing to tell apart")
    groups = None
    if entry.group_column:
        groups = group_numbers(images, entry.group_column, f"dataset {entry.name!r}")
    return StudyData(images, image_column, label_column, len(parts[0]), groups)


def dataset_revision(entry: DatasetEntry) -> str | None:
    """The commit that a Hub dataset's name and revision stand for; `None` for others, and where the Hub does not say."""
    if entry.id == DIGITS or Path(entry.id).expanduser().exists():
        return None
    try:
        return HfApi().dataset_info(entry.id, revision=entry.revision).sha
    except (OSError, ValueError):  # offline, with the dataset in the cache
        return None


def _drawn(rows: Dataset, label_column: str, count: int) -> np.ndarray:
    """Some rows, of each class in proportion, always the same."""
    from sklearn.model_selection import train_test_split

    labels = rows.select_columns([label_column]).with_format(None)[label_column][:]
    try:
        drawn, _ = train_test_split(np.arange(len(rows)), train_size=count, random_state=0, stratify=labels)
    except ValueError as error:
        raise LayerFusionError(f"{count} of {len(rows)} rows cannot be drawn by class ({error}): take more") from error
    return np.sort(drawn)


def make_split(data: StudyData, number: int, *, own: bool, shots: int | None) -> Split:
    """Which rows split `number` of a study trains and tests on.

    New splits hold out as large a share as the dataset's own, by class, and never part a group. A group of rows cannot be
    cut, so their share is only about that.

    Args:
        own: the dataset's own split.
        shots: keep so many training rows of each class, drawn with the split's number.

    Raises:
        LayerFusionError: if the rows cannot be split so.
    """
    count, labels = len(data.images), data.labels
    if own:
        train, test = np.arange(data.num_train), np.arange(data.num_train, count)
        if data.groups is not None and len(shared := np.intersect1d(data.groups[train], data.groups[test])):
            raise LayerFusionError(
                f"{len(shared)} groups have rows in the training and in the test split: use a number of splits, which "
                "draws new ones, or leave group_column out"
            )
    else:
        rows: Any = _Labelled(labels)
        share = 1 - data.num_train / count
        train, test = split_rows(rows, validation_size=share, num_folds=None, seed=number, groups=data.groups)[0]
    if shots is None:
        return Split(train, test)
    generator = np.random.default_rng(number)
    kept = []
    for label in np.unique(labels[train]):
        members = train[labels[train] == label]
        if len(members) < shots:
            raise LayerFusionError(f"class {label} has {len(members)} training rows, fewer than shots={shots}")
        kept.append(generator.permutation(members)[:shots])
    return Split(np.sort(np.concatenate(kept)), test)


@dataclass(frozen=True)
class _Labelled:
    """What `split_rows` reads of features."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)
