"""Opening labelled images: every form of a dataset, its columns, labels and splits."""

import io
import tarfile
from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from picture_helpers import CLASSES, picture, write_pictures

from hf_layerfusion import LayerFusionError
from hf_layerfusion.data import (
    encode_labels,
    find_image_column,
    find_label_column,
    label_options,
    open_dataset,
    with_test_split,
)


def rows(labels, feature=None, **columns):
    """A dataset without pictures."""
    features = Features({"label": feature or Value("int64"), **{name: Value("int64") for name in columns}})
    return Dataset.from_dict({"label": labels, **columns}, features=features)


# ---- opening -----------------------------------------------------------------------------------------------------


def test_folder_of_classes(tmp_path):
    splits = open_dataset(write_pictures(tmp_path / "pictures", 3))
    assert list(splits) == ["train"]
    assert len(splits["train"]) == 9
    assert splits["train"].features["label"].names == CLASSES
    assert isinstance(splits["train"].features["image"], Image)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "test"), ["train", "test"]),
        (("training", "val"), ["train", "validation"]),
        (("train", "valid", "testing"), ["train", "validation", "test"]),
    ],
)
def test_folder_with_splits(tmp_path, names, expected):
    for name in names:
        write_pictures(tmp_path / name, 2)
    splits = open_dataset(str(tmp_path))
    assert sorted(splits) == sorted(expected)
    assert all(len(split) == 6 for split in splits.values())


def test_saved_datasets_are_renamed_without_losing_a_split(tmp_path):
    sizes = {"training": 4, "dev": 3, "validation": 2, "testing": 1, "unlabelled": 5}
    DatasetDict({name: rows([0] * size) for name, size in sizes.items()}).save_to_disk(tmp_path / "many")
    opened = open_dataset(tmp_path / "many")
    assert {name: len(split) for name, split in opened.items()} == {
        "train": 4,
        "dev": 3,
        "validation": 2,
        "test": 1,
        "unlabelled": 5,
    }
    rows([0, 1]).save_to_disk(tmp_path / "one")
    assert {name: len(split) for name, split in open_dataset(tmp_path / "one").items()} == {"train": 2}


def test_hub_dataset(hub, tmp_path):
    hub.upload_folder(write_pictures(tmp_path / "pictures", 2), "me/pictures", repo_type="dataset")
    splits = open_dataset("me/pictures")
    assert len(splits["train"]) == 6
    assert splits["train"].features["label"].names == CLASSES


def add_shard(folder, seeds):
    """One shard of a WebDataset, and the text file that the CLIP benchmark's repositories have beside their shards."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as archive:
        for seed in seeds:
            content = io.BytesIO()
            picture(seed % 2, seed, (12, 12)).save(content, "PNG")
            for name, data in ((f"{seed}.png", content.getvalue()), (f"{seed}.cls", str(seed % 2).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    (folder / "nshards.txt").write_text("1")


def test_webdataset_of_one_shard(hub, tmp_path):
    add_shard(tmp_path / "train", range(4))
    add_shard(tmp_path / "test", range(2))
    hub.upload_folder(tmp_path, "me/one-shard", repo_type="dataset")
    splits = open_dataset("me/one-shard")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 4, "test": 2}
    assert find_image_column(splits["train"]) == "png"
    assert splits["train"]["cls"][:] == [0, 1, 0, 1]


def test_texts_are_no_images(hub, tmp_path):
    (tmp_path / "train.txt").write_text("no picture")
    hub.upload_folder(tmp_path, "me/texts", repo_type="dataset")
    with pytest.raises(LayerFusionError, match="'me/texts' is neither a folder nor a Hub dataset that can be opened"):
        open_dataset("me/texts")


def test_digits():
    rows = open_dataset("sklearn:digits")["train"]
    assert len(rows) == 1797
    assert rows.features["label"].names == [str(number) for number in range(10)]
    assert rows[0]["image"].size == (8, 8)


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "note.txt").write_text("no picture")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "dataset_dict.json").write_text("{")
    for name in ("empty", "texts", "damaged"):
        with pytest.raises(LayerFusionError, match=rf"{name}' holds no images and no saved dataset"):
            open_dataset(tmp_path / name)
    rows([]).save_to_disk(tmp_path / "no rows", num_shards=1)
    with pytest.raises(LayerFusionError, match="no rows' is empty, or one of its splits is"):
        open_dataset(tmp_path / "no rows")
    with pytest.raises(LayerFusionError, match="'nobody/nothing' is neither a folder nor a Hub dataset"):
        open_dataset("nobody/nothing")


# ---- columns -----------------------------------------------------------------------------------------------------


def table(**features):
    return Dataset.from_dict({name: [] for name in features}, features=Features(features))


@pytest.mark.parametrize(
    ("features", "named", "expected"),
    [
        ({"image": Image(), "label": Value("int64")}, None, "image"),
        ({"photo": Image(), "image": Value("string")}, None, "photo"),
        ({"left": Image(), "right": Image()}, "right", "right"),
        ({"image": Image(), "path": Value("string")}, "path", "path"),
    ],
)
def test_image_column(features, named, expected):
    assert find_image_column(table(**features), named) == expected


@pytest.mark.parametrize(
    ("features", "named", "expected"),
    [
        ({"image": Image(), "label": Value("int64")}, None, "label"),
        ({"labels": ClassLabel(names=["a"]), "kind": ClassLabel(names=["b"])}, None, "labels"),
        ({"image": Image(), "kind": ClassLabel(names=["b"])}, None, "kind"),
        ({"label": Value("int64"), "kind": Value("string")}, "kind", "kind"),
    ],
)
def test_label_column(features, named, expected):
    assert find_label_column(table(**features), named) == expected


@pytest.mark.parametrize(
    ("find", "named", "message"),
    [
        (
            find_image_column,
            None,
            r"2 image columns among \['left', 'right', 'kind', 'sort'\]: name one with image_column",
        ),
        (find_image_column, "image", r"image_column='image' is not in the dataset: its columns are \['left', "),
        (find_image_column, "kind", r"image_column='kind' holds ClassLabel\(.*which is neither images nor paths"),
        (find_label_column, None, r"no column 'label' among \['left', .*name the labels with label_column"),
        (find_label_column, "label", r"label_column='label' is not in the dataset: its columns are \['left', "),
    ],
)
def test_columns_that_are_not_there(find, named, message):
    ambiguous = table(left=Image(), right=Image(), kind=ClassLabel(names=["a"]), sort=ClassLabel(names=["b"]))
    with pytest.raises(LayerFusionError, match=message):
        find(ambiguous, named)


# ---- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["string", "large_string"])
def test_text_labels_mean_the_same_in_all_splits(dtype):
    train, test = ["cat", "ant", "cat"], ["bee", "cat"]
    splits = DatasetDict({"train": rows(train, Value(dtype)), "test": rows(test, Value(dtype))})
    encoded = encode_labels(splits, "label")
    for split, words in (("train", train), ("test", test)):
        feature = encoded[split].features["label"]
        assert feature.names == ["ant", "bee", "cat"]
        assert feature.int2str(encoded[split]["label"][:]) == words


def test_text_labels_keep_the_pictures():
    features = Features({"image": Image(), "label": Value("string")})
    data = {"image": [picture(label, label) for label in range(3)], "label": ["c", "a", "b"]}
    encoded = encode_labels(DatasetDict({"train": Dataset.from_dict(data, features=features)}), "label")["train"]
    assert encoded["label"][:] == [2, 0, 1]
    assert isinstance(encoded.features["image"], Image)
    np.testing.assert_array_equal(np.asarray(encoded[1]["image"]), np.asarray(picture(1, 1)))


@pytest.mark.parametrize("feature", [ClassLabel(names=["b", "a"]), Value("int64")])
def test_other_labels_are_left_alone(feature):
    splits = DatasetDict({"train": rows([0, 1], feature)})
    assert encode_labels(splits, "label") is splits


def test_text_labels_that_are_missing():
    splits = DatasetDict({"train": rows(["a"], Value("string")), "test": rows(["a", None], Value("string"))})
    with pytest.raises(LayerFusionError, match="split 'test' has rows without a label in 'label'"):
        encode_labels(splits, "label")


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        ([1, 0], ClassLabel(names=["a", "b", "c"]), {"id2label": ["a", "b", "c"], "problem_type": "single"}),
        ([1, 3, 0], Value("int64"), {"num_labels": 4, "problem_type": "single"}),
        ([1, 3, 0], Value("uint8"), {"num_labels": 4, "problem_type": "single"}),
        ([True, False], Value("bool"), {"num_labels": 2, "problem_type": "single"}),
        ([0.5, 2.0], Value("float32"), {"num_labels": 1, "problem_type": "regression"}),
        ([[1.0, 0.0, 1.0]], List(Value("float32")), {"num_labels": 3, "problem_type": "multi"}),
        ([[1, 0]], List(Value("int64")), {"num_labels": 2, "problem_type": "multi"}),
    ],
)
def test_label_options(labels, feature, expected):
    options = label_options(rows(labels, feature), "label")
    if expected["problem_type"] != "regression":
        expected = {**expected, "problem_type": expected["problem_type"] + "_label_classification"}
    assert options == expected


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        (
            ["a"],
            Value("string"),
            r"label column 'label' holds Value\('string'\), which is neither classes nor numbers",
        ),
        ([1, None], Value("int64"), "rows .*lack.* in 'label'"),
        ([], Value("int64"), "rows .*no label.* in 'label'"),
    ],
)
def test_labels_that_cannot_be_used(labels, feature, message):
    with pytest.raises(LayerFusionError, match=message):
        label_options(rows(labels, feature), "label")


# ---- the held-out rows -------------------------------------------------------------------------------------------

UNBALANCED = [0] * 50 + [1] * 30 + [2] * 20


@pytest.mark.parametrize("feature", [ClassLabel(names=CLASSES), Value("int64")])
def test_held_out_rows_are_stratified_and_always_the_same(feature):
    dataset = rows(UNBALANCED, feature, row=list(range(100)))
    first, again, other = (with_test_split(DatasetDict({"train": dataset}), "label", seed=s) for s in (0, 0, 1))
    assert Counter(first["test"]["label"]) == {0: 10, 1: 6, 2: 4}
    assert sorted(first["train"]["row"][:] + first["test"]["row"][:]) == list(range(100))
    assert first["test"]["row"][:] == again["test"]["row"][:] != other["test"]["row"][:]
    # The feature cache knows a dataset by this.
    assert first["test"]._fingerprint == again["test"]._fingerprint != other["test"]._fingerprint


def test_numbers_are_held_out_without_classes():
    splits = with_test_split(DatasetDict({"train": rows(np.linspace(0, 1, 30).tolist(), Value("float32"))}), "label")
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "test": 6}


def test_a_test_split_and_others_are_left_alone():
    splits = DatasetDict({"train": rows([0, 1]), "validation": rows([1]), "test": rows([1])})
    assert with_test_split(splits, "label") is splits
    held_out = with_test_split(DatasetDict({"train": rows([0, 1] * 5), "validation": rows([1])}), "label")
    assert {name: len(split) for name, split in held_out.items()} == {"train": 8, "validation": 1, "test": 2}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": [0]}, r"no split 'train', only \['test'\]"),
        ({"train": []}, "the dataset is empty"),
        ({"train": [0] * 9 + [1]}, r"10 training rows cannot be divided by class .*add images, or a test split"),
        ({"train": [0]}, "1 training rows cannot be divided"),
    ],
)
def test_splits_that_cannot_be_used(splits, message):
    with pytest.raises(LayerFusionError, match=message):
        with_test_split(DatasetDict({name: rows(labels) for name, labels in splits.items()}), "label")
