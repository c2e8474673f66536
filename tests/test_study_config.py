"""The YAML of a study, its protocol and its splits: what they mean, and what is refused before anything is computed."""

import re
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from hf_layerfusion import LayerFusionError
from hf_layerfusion.study import PROTOCOLS, BackboneEntry, DatasetEntry, Protocol, StudyConfig
from hf_layerfusion.study.data import make_split, open_study_backbone, open_study_data
from hf_layerfusion.sweeps import expand_grid

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
STUDY = {"name": "try", "backbones": ["facebook/dinov2-small"], "datasets": ["sklearn:digits"], "recipes": ["alf"]}


def test_defaults():
    study = StudyConfig.from_dict(STUDY)
    assert study.backbones == (BackboneEntry("facebook/dinov2-small", "dinov2-small"),)
    assert study.datasets == (DatasetEntry("sklearn:digits", "digits"),)
    assert (study.protocol, study.seeds, study.splits) == (PROTOCOLS["paper"], (0,), "own")
    assert StudyConfig.from_dict({**study.to_dict(), "protocol": "paper"}) == study


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_made_configs_load(path):
    study = StudyConfig.load(path)
    assert study.name == path.stem
    assert len(study.recipes) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": ["alf"]}, "the study: 'recipe' is no field: choose from name, backbones"),
        ({"datasets": None}, "the study: 'datasets' is missing"),
        ({"name": "a/b"}, "name: 'a/b' is no name"),
        ({"name": "a--b"}, "name: 'a--b' is no name"),
        ({"recipes": "alf"}, "recipes: 'alf' is no list of names"),
        ({"recipes": ["alff"]}, "did you mean 'alf'?"),
        ({"recipes": [{"linear-layer": 3}]}, "names with a colon before a number need quotes in YAML"),
        ({"recipes": ["alf-heads:*"]}, "recipes: 'alf-heads:*': name the numbers of heads"),
        ({"references": ["aat"]}, "references: 'aat' is none of the study's recipes"),
        ({"references": "alf"}, "references: 'alf' is none of the study's recipes"),
        ({"recipes": ["module-probe:*:mlp"]}, "'mlp' is no module"),
        ({"seeds": [0, 0]}, "seeds: [0, 0] must be a list of different whole numbers"),
        ({"seeds": 3}, "seeds: 3 must be a list"),
        ({"seeds": []}, "seeds: [] must be a list"),
        ({"splits": 0}, "splits: 0 is neither 'own' nor a number of splits"),
        ({"splits": "new"}, "splits: 'new' is neither"),
        ({"backbones": [{"name": "x"}]}, "backbones[0]: 'id' is missing"),
        ({"backbones": [{"id": "x", "size": 3}]}, "backbones[0]: 'size' is no field: choose from id, name"),
        ({"backbones": [{"id": "x", "image_size": "224"}]}, "backbones[0].image_size: '224' must be a whole number"),
        ({"backbones": [{"id": "x", "image_size": 0}]}, "backbones[0].image_size: 0 must be a whole number from 1 up"),
        ({"backbones": [{"id": "x", "random_weights": 1}]}, "backbones[0].random_weights: 1 must be true or false"),
        ({"backbones": [{"id": "x", "name": "a--b"}]}, "backbones[0]: 'a--b' is no name"),
        ({"backbones": ["a/x", "b/x"]}, "backbones: two entries are called 'x'"),
        ({"datasets": [{"id": 7}]}, "datasets[0].id: 7 must be text"),
        ({"datasets": [3]}, "datasets[0]: 3 is no mapping"),
        ({"protocol": "slow"}, "protocol: 'slow' is unknown: choose from paper, fast"),
        ({"protocol": ["paper"]}, "is neither a name nor a mapping with 'base'"),
        ({"protocol": {"base": "paper", "epochs": 3}}, "protocol: 'epochs' is no field: choose from base, grid"),
        ({"protocol": {"min_steps": 0}}, "protocol: min_steps=0 must be a whole number from 1 up"),
        ({"protocol": {"shots": 1}}, "shots=1 must be 2 or more"),
        ({"protocol": {"grid": {"recipe": "alf"}}}, "the grid of a study cannot hold 'recipe': recipes name that"),
        ({"protocol": {"grid": [{"num_heads": [2]}]}}, "the grid of a study cannot hold 'num_heads'"),
        ({"protocol": {"metric": "f1"}}, "metric='f1' is unknown: choose from balanced_accuracy"),
        ({"protocol": {"noise_std": float("nan")}}, "noise_std=nan must be 0 or a positive number"),
        ({"name": "a" * 61}, "is no name"),
        ({"protocol": {"grid": "huge"}}, "grid 'huge' is neither paper nor fast nor a file"),
        ({"protocol": {"strategy": "best"}}, "strategy='best' is unknown"),
        ({"protocol": {"validation_size": 1}}, "validation_size=1 is no share"),
        ({"protocol": {"noise_std": -1}}, "noise_std=-1 must be 0 or a positive number"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        StudyConfig.from_dict({**STUDY, **change})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "is no YAML file"),
        ("- alf", "is no mapping with name"),
        ("", "None is no mapping"),
        (b"\xff\xfe\xff", "YAML"),
    ],
)
def test_files_that_hold_no_study(tmp_path, content, message):
    path = tmp_path / "study.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LayerFusionError, match=f"study .*study.yaml.*{message}"):
        StudyConfig.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(LayerFusionError, match=r"nothing\.yaml cannot be read: No such file"):
        StudyConfig.load(tmp_path / "nothing.yaml")


# ---- the protocol ------------------------------------------------------------------------------------------------


def test_the_paper_s_protocol():
    paper = PROTOCOLS["paper"]
    settings = expand_grid(paper.grid)
    assert len(settings) == 63
    assert {(setting.noise_std, setting.noise_probability) for setting in settings} == {(0.05, 0.5)}
    # 800 rows are trained on, in batches of 160: five an epoch, so 200 epochs are 1000 steps.
    options = paper.sweep_options(1000)
    assert options == {
        "grid": "paper",
        "strategy": "full",
        "metric": "balanced_accuracy",
        "num_epochs": 200,
        "validation_size": 0.2,
    }
    assert paper.sweep_options(2_000_000)["num_epochs"] == 40


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"max_batch_size": 50}, {"batch_size": 50, "num_epochs": 63}),
        ({"noise_std": 0.1}, {"noise_std": 0.1}),
        ({"shots": 4}, {"num_folds": 2}),
        ({"shots": 5}, {"validation_size": 0.2}),
        ({"min_steps": 1, "min_epochs": 7}, {"num_epochs": 7}),
    ],
)
def test_changes_of_a_protocol_reach_the_sweep(change, expected):
    options = Protocol.from_value({"base": "paper", **change}).sweep_options(1000)
    assert {name: options[name] for name in expected} == expected


def test_heads_without_attention_may_have_a_protocol_of_their_own():
    protocol = Protocol.from_value({"base": "fast", "linear": {"grid": {"learning_rate": [1.0]}, "min_epochs": 77}})
    for attends in ("alf", "aat", "ep-all", "alf-two-stage"):
        assert protocol.of(attends) == PROTOCOLS["fast"]
    assert protocol.of("alf").to_dict() == PROTOCOLS["fast"].to_dict()
    options = protocol.of("scalar-mix").sweep_options(100)
    assert (options["grid"], options["num_epochs"]) == ({"learning_rate": [1.0]}, 80)
    assert PROTOCOLS["paper"].of("linear-all") == PROTOCOLS["paper"]


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        ({"grid": {"rate": 1}}, "'rate' is no field of a sweep's grid"),
        ({"steps": 1}, "protocol: linear: 'steps' is no field: choose from grid, strategy"),
        ({"linear": {}}, "protocol: linear: 'linear' is no field"),
        ([1], "protocol: linear: [1] is no field"),
        ({"min_steps": 0}, "min_steps=0 must be a whole number"),
    ],
)
def test_what_heads_without_attention_cannot_have(linear, message):
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        Protocol.from_value({"base": "fast", "linear": linear})


# ---- datasets and splits -----------------------------------------------------------------------------------------


def save(folder, train, test=None, groups=None):
    """A dataset whose labels are given; each picture says which row it is."""
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee", "cat"]), "herd": Value("string")})
    splits, start = DatasetDict(), 0
    for name, labels in (("train", train), ("test", test)):
        if labels is None:
            continue
        rows = range(start, start + len(labels))
        splits[name] = Dataset.from_dict(
            {
                "image": [PILImage.new("RGB", (4, 4), (row, 0, 0)) for row in rows],
                "label": labels,
                "herd": [str(row if groups is None else groups[row]) for row in rows],
            },
            features=features,
        )
        start += len(labels)
    splits.save_to_disk(str(folder))
    return str(folder)


TRAIN, TEST = [0, 1, 2] * 12, [0, 1, 2] * 4


def test_own_split(tmp_path):
    data = open_study_data(DatasetEntry(save(tmp_path / "a", TRAIN, TEST), "a"))
    split = make_split(data, 0, own=True, shots=None)
    assert split.train.tolist() == list(range(36))
    assert split.test.tolist() == list(range(36, 48))
    assert data.labels.tolist() == TRAIN + TEST
    assert [picture.getpixel((0, 0))[0] for picture in data.images["image"]] == list(range(48))


def test_new_splits_are_stratified_differ_and_are_always_the_same(tmp_path):
    data = open_study_data(DatasetEntry(save(tmp_path / "a", TRAIN, TEST), "a"))
    splits = [make_split(data, number, own=False, shots=None) for number in (0, 1, 0)]
    for split in splits:
        assert sorted([*split.train, *split.test]) == list(range(48))
        assert np.bincount(data.labels[split.test]).tolist() == [4, 4, 4]
    assert splits[0].test.tolist() == splits[2].test.tolist() != splits[1].test.tolist()


def test_new_splits_never_part_a_group(tmp_path):
    groups = [row // 3 for row in range(48)]
    folder = save(tmp_path / "a", TRAIN, TEST, groups)
    data = open_study_data(DatasetEntry(folder, "a", group_column="herd"))
    for number in range(5):
        split = make_split(data, number, own=False, shots=None)
        assert not {groups[row] for row in split.train} & {groups[row] for row in split.test}
        assert len(split.test) > 0


def test_shots(tmp_path):
    data = open_study_data(DatasetEntry(save(tmp_path / "a", TRAIN, TEST), "a"))
    first, second = (make_split(data, number, own=False, shots=3) for number in (0, 1))
    assert np.bincount(data.labels[first.train]).tolist() == [3, 3, 3]
    assert len(first.test) == 12
    assert first.train.tolist() != second.train.tolist()
    with pytest.raises(LayerFusionError, match="class 0 has 12 training rows, fewer than shots=13"):
        make_split(data, 0, own=True, shots=13)


def test_fewer_rows_are_drawn_by_class(tmp_path):
    folder = save(tmp_path / "a", TRAIN, TEST)
    data = open_study_data(DatasetEntry(folder, "a", max_train_rows=9, max_test_rows=6))
    assert data.num_train == 9
    assert np.bincount(data.labels[:9]).tolist() == [3, 3, 3]
    assert np.bincount(data.labels[9:]).tolist() == [2, 2, 2]
    again = open_study_data(DatasetEntry(folder, "a", max_train_rows=9, max_test_rows=6))
    assert again.images._fingerprint == data.images._fingerprint


def test_a_missing_test_split_is_drawn(tmp_path):
    data = open_study_data(DatasetEntry(save(tmp_path / "a", TRAIN), "a"))
    assert 0 < data.num_train < 36 == len(data.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "fit"}, "dataset 'a' has no split 'fit', only ['train', 'test']"),
        ({"test_split": "held out"}, "dataset 'a' has no split 'held out', only"),
        (
            {"group_column": "flock"},
            "split 'train' of dataset 'a' has no group_column 'flock': its columns are ['image', 'label', 'herd']",
        ),
        ({"group_column": "image"}, "dataset 'a': 'image' cannot be the group_column, which holds texts or numbers"),
        ({"label_column": "kind"}, "label_column='kind' is not in the dataset"),
        ({"max_train_rows": 2}, "2 of 36 rows cannot be drawn by class"),
    ],
)
def test_datasets_that_do_not_fit(tmp_path, options, message):
    folder = save(tmp_path / "a", TRAIN, TEST)
    with pytest.raises(LayerFusionError, match=re.escape(message)):
        open_study_data(DatasetEntry(folder, "a", **options))


def test_own_splits_that_share_groups_are_refused(tmp_path):
    folder = save(tmp_path / "a", TRAIN, TEST, [row % 10 for row in range(48)])
    data = open_study_data(DatasetEntry(folder, "a", group_column="herd"))
    with pytest.raises(LayerFusionError, match="10 groups have rows in the training and in the test split"):
        make_split(data, 0, own=True, shots=None)


def test_groups_with_gaps_are_refused(tmp_path):
    rows = DatasetDict.load_from_disk(save(tmp_path / "a", TRAIN, TEST))
    gaps = rows.map(lambda row, number: {"herd": None if number == 5 else row["herd"]}, with_indices=True)
    gaps.save_to_disk(str(tmp_path / "b"))
    with pytest.raises(LayerFusionError, match="dataset 'b' has rows without a 'herd': fill them in"):
        open_study_data(DatasetEntry(str(tmp_path / "b"), "b", group_column="herd"))


def test_splits_of_different_kinds_and_one_class(tmp_path):
    rows = DatasetDict.load_from_disk(save(tmp_path / "a", TRAIN, TEST))
    DatasetDict({"train": rows["train"], "test": rows["test"].cast_column("label", Value("int64"))}).save_to_disk(
        str(tmp_path / "b")
    )
    with pytest.raises(LayerFusionError, match="training and the test split have columns of different kinds"):
        open_study_data(DatasetEntry(str(tmp_path / "b"), "b"))
    with pytest.raises(LayerFusionError, match="all rows have one class"):
        open_study_data(DatasetEntry(save(tmp_path / "c", [1] * 20, [1] * 10), "c"))


def test_numbers_that_are_no_class_indices(tmp_path):
    rows = DatasetDict.load_from_disk(save(tmp_path / "a", TRAIN, TEST)).cast_column("label", Value("int64"))
    rows.map(lambda row: {"label": 10**9 + row["label"]}).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(LayerFusionError, match="labels in 'label' reach 1000000002, which are no class indices"):
        open_study_data(DatasetEntry(str(tmp_path / "b"), "b"))


def test_groups_need_a_test_split(tmp_path):
    with pytest.raises(LayerFusionError, match="one drawn by row would part its groups: add a test split"):
        open_study_data(DatasetEntry(save(tmp_path / "a", TRAIN), "a", group_column="herd"))


# ---- backbones ---------------------------------------------------------------------------------------------------


def test_random_weights_are_others_and_always_the_same(save_backbone, tmp_path):
    folder = str(save_backbone(tmp_path / "backbone", seed=1))
    trained, control, again = (
        open_study_backbone(BackboneEntry(folder, "b", random_weights=random)).model for random in (False, True, True)
    )
    name, weight = next((name, weight) for name, weight in trained.named_parameters() if weight.ndim == 2)
    assert not weight.equal(control.get_parameter(name))
    assert control.get_parameter(name).equal(again.get_parameter(name))
    assert not control.training


def test_a_backbone_without_an_image_processor(make_vit, tmp_path):
    make_vit().save_pretrained(tmp_path / "bare")
    with pytest.raises(LayerFusionError, match="backbone 'b' comes without an image processor"):
        open_study_backbone(BackboneEntry(str(tmp_path / "bare"), "b"))
