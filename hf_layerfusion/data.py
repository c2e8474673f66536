"""Open labelled images: a Hub dataset, a saved dataset, or a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage
from sklearn.model_selection import train_test_split
from transformers.utils import logging

from .errors import LayerFusionError

logger = logging.get_logger(__name__)

# Split names that mean the same, first the one this library uses.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
# Of WebDatasets such as those of the CLIP benchmark.
_WEBDATASET_SHARDS = {"train": "train/*.tar", "test": "test/*.tar"}
# What tells a saved dataset from a folder of images.
_SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")
# Larger ones are numbers of something else, and their head would fill the memory.
_MOST_LABELS = 1_000_000
# Paths and encoded images, which `datasets` casts to images.
_IMAGE_DTYPES = ("string", "large_string", "binary", "large_binary")


# A dataset that is there wherever scikit-learn is.
DIGITS = "sklearn:digits"


def open_digits() -> DatasetDict:
    """scikit-learn's handwritten digits: 1797 grey pictures of 8 x 8 in 10 classes, in one split `train`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in data.target_names])})
    pictures = [PILImage.fromarray((picture * 255 / 16).astype(np.uint8)) for picture in data.images]
    rows = Dataset.from_dict({"image": pictures, "label": data.target.tolist()}, features=features)
    return DatasetDict({"train": rows})


def open_dataset(source: str | Path, *, name: str | None = None, revision: str | None = None) -> DatasetDict:
    """Open a dataset with all its splits.

    Args:
        source: a folder written by `save_to_disk`, a folder of images (`folder/class/picture.png`, or with `train/`
            and `test/` above), a Hub id, or `"sklearn:digits"`, scikit-learn's handwritten digits.
        name: configuration of a Hub dataset.
        revision: branch, tag or commit of a Hub dataset.

    Raises:
        LayerFusionError: if it cannot be found or holds no images.
    """
    if source == DIGITS:
        return open_digits()
    folder = Path(source)
    try:
        if any((folder / file).is_file() for file in _SAVED_DATASET_FILES):
            opened = load_from_disk(str(folder))
        elif folder.is_dir():
            opened = load_dataset("imagefolder", data_dir=str(folder))
        else:
            opened = _load_from_hub(str(source), name, revision)
    except (OSError, ValueError, DatasetsError) as error:
        kind = "holds no images and no saved dataset" if folder.is_dir() else "is neither a folder nor a Hub dataset"
        raise LayerFusionError(f"dataset {str(source)!r} {kind} that can be opened: {error}") from error
    except IndexError:  # how newer versions of `load_from_disk` say that there are no rows
        opened = Dataset.from_dict({})
    splits = DatasetDict({"train": opened}) if isinstance(opened, Dataset) else opened
    if not all(len(rows) for rows in splits.values()):
        raise LayerFusionError(f"dataset {str(source)!r} is empty, or one of its splits is: add images")
    renamed = DatasetDict()
    for split, rows in splits.items():
        ours = next((ours for ours, names in SPLIT_NAMES.items() if split in names), split)
        is_taken = ours != split and (ours in splits or ours in renamed)
        renamed[split if is_taken else ours] = rows
    return renamed


def _load_from_hub(repo_id: str, name: str | None, revision: str | None) -> DatasetDict | Dataset:
    """A Hub dataset; a WebDataset also where a split has one shard beside its text file, which `datasets` takes for text."""
    try:
        opened = load_dataset(repo_id, name, revision=revision)
        if any(rows.column_names != ["text"] for rows in opened.values()):
            return opened
    except ValueError as error:
        if "same data file format" not in str(error):
            raise
    return load_dataset(repo_id, name, revision=revision, data_files=_WEBDATASET_SHARDS)


def find_image_column(dataset: Dataset, image_column: str | None = None) -> str:
    """The image column: the one named, or the only one that holds images.

    Raises:
        LayerFusionError: naming the columns there are, or what the named one holds.
    """
    if image_column is not None:
        feature = dataset.features[_existing(dataset, image_column, "image_column")]
        if not isinstance(feature, Image) and getattr(feature, "dtype", None) not in _IMAGE_DTYPES:
            raise LayerFusionError(f"image_column={image_column!r} holds {feature}, which is neither images nor paths")
        return image_column
    columns = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        raise LayerFusionError(
            f"the dataset has {len(columns)} image columns among {dataset.column_names}: name one with image_column"
        )
    return columns[0]


def find_label_column(dataset: Dataset, label_column: str | None = None) -> str:
    """The label column: the one named, `label` or `labels`, or the only one that holds classes.

    Raises:
        LayerFusionError: naming the columns there are.
    """
    if label_column is not None:
        return _existing(dataset, label_column, "label_column")
    for column in ("label", "labels"):
        if column in dataset.column_names:
            return column
    columns = [column for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if len(columns) != 1:
        raise LayerFusionError(
            f"the dataset has no column 'label' among {dataset.column_names}: name the labels with label_column"
        )
    return columns[0]


def _existing(dataset: Dataset, column: str, option: str) -> str:
    if column not in dataset.column_names:
        raise LayerFusionError(f"{option}={column!r} is not in the dataset: its columns are {dataset.column_names}")
    return column


def encode_labels(splits: DatasetDict, label_column: str) -> DatasetDict:
    """Turn text labels into class indices, the same in all splits; other labels are left alone.

    Raises:
        LayerFusionError: if a row has no label.
    """
    feature = next(iter(splits.values())).features[label_column]
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        return splits
    names: set[str] = set()
    for split, rows in splits.items():
        found = rows.unique(label_column)
        if None in found:
            raise LayerFusionError(
                f"split {split!r} has rows without a label in {label_column!r}: remove them, or give the labels"
            )
        names.update(found)
    if feature.dtype == "large_string":  # which older versions of datasets do not turn into classes
        splits = DatasetDict(
            {split: rows.cast_column(label_column, Value("string")) for split, rows in splits.items()}
        )
    classes = ClassLabel(names=sorted(names))
    return DatasetDict({split: rows.cast_column(label_column, classes) for split, rows in splits.items()})


def label_options(dataset: Dataset, label_column: str) -> dict[str, Any]:
    """`num_labels` or `id2label`, and `problem_type`, for `from_backbone`, read off the labels.

    Raises:
        LayerFusionError: if they are neither class indices, floats, nor lists of them.
    """
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        return {"id2label": list(feature.names), "problem_type": "single_label_classification"}
    labels = dataset.select_columns([label_column])[label_column][:]
    if not labels or None in labels:
        raise LayerFusionError(f"the training rows have no label or lack some in {label_column!r}")
    if _holds_indices(feature):
        if max(labels) >= _MOST_LABELS:
            raise LayerFusionError(
                f"labels in {label_column!r} reach {max(labels)}, which are no class indices: number the classes from 0 "
                "(dataset.class_encode_column)"
            )
        return {"num_labels": int(max(labels)) + 1, "problem_type": "single_label_classification"}
    if isinstance(feature, Value) and feature.dtype.startswith("float"):
        return {"num_labels": 1, "problem_type": "regression"}
    if isinstance(labels[0], list):
        return {"num_labels": len(labels[0]), "problem_type": "multi_label_classification"}
    raise LayerFusionError(f"label column {label_column!r} holds {feature}, which is neither classes nor numbers")


def _holds_indices(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool"))
    )


def with_test_split(splits: DatasetDict, label_column: str, *, seed: int = 0, test_size: float = 0.2) -> DatasetDict:
    """The same splits; where there is no test split, a fifth of the training rows, stratified by class, becomes one.

    Raises:
        LayerFusionError: if there is no training split, or it cannot be split.
    """
    if "train" not in splits:
        raise LayerFusionError(f"the dataset has no split 'train', only {list(splits)}")
    rows = splits["train"]
    if not len(rows):
        raise LayerFusionError("the dataset is empty: its split 'train' has no rows")
    if "test" in splits:
        return splits
    labels = rows[label_column][:] if _holds_indices(rows.features[label_column]) else None
    try:
        train, test = train_test_split(np.arange(len(rows)), test_size=test_size, random_state=seed, stratify=labels)
    except ValueError as error:
        raise LayerFusionError(
            f"the dataset has no test split, and its {len(rows)} training rows cannot be divided by class "
            f"({error}): add images, or a test split"
        ) from error
    logger.warning(f"the dataset has no test split: {test_size:.0%} of the training rows are held out (seed {seed})")
    return DatasetDict({**splits, "train": rows.select(np.sort(train)), "test": rows.select(np.sort(test))})


def prepare_splits(
    splits: DatasetDict, image_column: str | None = None, label_column: str | None = None
) -> tuple[DatasetDict, str, str]:
    """What every command does to a dataset: find its columns, number text labels, hold out a test split.

    The rows held out depend on nothing but the dataset, so that no command measures a head on rows it was trained on.

    Returns:
        The splits, the image column and the label column.

    Raises:
        LayerFusionError: as the functions it calls.
    """
    first = next(iter(splits.values()))
    image_column = find_image_column(first, image_column)
    label_column = find_label_column(first, label_column)
    return with_test_split(encode_labels(splits, label_column), label_column), image_column, label_column


def check_group_column(rows: Dataset, column: str, what: str) -> None:
    """Refuse, in the name of `what`, a column that is missing, or holds images or lists.

    Raises:
        LayerFusionError: then.
    """
    if column not in rows.column_names:
        raise LayerFusionError(f"{what} has no group_column {column!r}: its columns are {rows.column_names}")
    if not isinstance(rows.features[column], Value | ClassLabel):
        raise LayerFusionError(f"{what}: {column!r} cannot be the group_column, which holds texts or numbers")


def group_numbers(rows: Dataset, column: str, what: str) -> np.ndarray:
    """`(rows,)`: the number of what each row belongs to; rows with the same value in the column belong together.

    Args:
        what: the dataset, as an error calls it.

    Raises:
        LayerFusionError: as `check_group_column` does, or if the column has gaps.
    """
    check_group_column(rows, column, what)
    values = rows.select_columns([column]).with_format(None)[column][:]
    if any(value is None or value != value for value in values):
        raise LayerFusionError(f"{what} has rows without a {column!r}: fill them in")
    return np.unique(np.asarray(values), return_inverse=True)[1]


def training_groups(splits: DatasetDict, column: str) -> np.ndarray:
    """`group_numbers` of the training rows of a dataset whose test rows belong to other groups.

    Raises:
        LayerFusionError: also if there is no test split, or a group has rows in both.
    """
    if "train" not in splits or "test" not in splits:
        raise LayerFusionError(
            "the dataset has no test split, and one drawn by row would part the groups of "
            f"group_column={column!r}: add a test split"
        )
    train = group_numbers(splits["train"], column, "the training split")
    if column in splits["test"].column_names:
        shared = set(splits["train"][column][:]) & set(splits["test"][column][:])
        if shared:
            raise LayerFusionError(
                f"{len(shared)} groups of {column!r} have rows in the training and in the test split, such as "
                f"{min(shared, key=str)!r}: what is measured on those test rows would be too good; move them to one side"
            )
    return train
