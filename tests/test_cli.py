"""The `layerfusion` command: what it prints and writes, what it refuses, and that the commands agree with each other."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from modeling_helpers import NUM_LAYERS
from picture_helpers import CLASSES, picture, save_tiny_backbone, write_pictures
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from hf_layerfusion import LayerFeatures, LayerFusionConfig, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.cli.main import COMMANDS, main

HEAD_FILES = {"README.md", "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json"}
HEAD_FILES |= {"training_record.json", "confusion_matrix.png", "layer_attention.png"}
QUICK = ["--num_train_epochs", "1", "--device", "cpu"]


@pytest.fixture
def cli(capsys):
    """Run a command that must succeed; returns what it printed."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused with one line; returns that line."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert status == 1
        assert out == ""
        assert "Traceback" not in err
        lines = err.splitlines()
        assert sum(line.startswith("layerfusion ") for line in lines) == 1
        assert lines[-1].startswith(f"layerfusion {arguments[0]}: ")  # progress bars may stand above
        return lines[-1]

    return run


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """90 pictures without a test split."""
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 30)


@pytest.fixture(scope="module")
def head(tmp_path_factory, backbone, pictures):
    """A head that `layerfusion train` made."""
    folder = tmp_path_factory.mktemp("heads") / "head"
    options = ["--num_train_epochs", 12, "--device", "cpu", "--attention_dropout", 0, "--output_dir", folder]
    assert main([str(o) for o in ["train", "--backbone", backbone, "--dataset", pictures, *options]]) == 0
    return folder


def load(folder):
    return ViTForAttentiveLayerFusionClassification.from_pretrained(folder)


# ---- what the commands do ----------------------------------------------------------------------------------------


def test_info_of_a_backbone(cli, backbone):
    printed = cli("info", backbone, "--num_labels", 7)
    assert "Dinov2Model (dinov2)" in printed
    for line in (
        f"layers: {NUM_LAYERS} blocks",
        "widths: 32",
        "patches: 4 x 4 at 32 x 32 px (tokens)",
        "special tokens: 1 before the patches; CLS",
        "modules: ln1, attention, residual, ln2, fc1, activation, fc2, block, final_norm, pooler",
    ):
        assert f"{line}\n" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("alf "))
    model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, num_labels=7)
    size = sum(parameter.numel() for parameter in model.head.parameters())
    tokens = 2 * NUM_LAYERS
    assert row[:-1] == ["alf", str(tokens), "32", f"{size:,}", str(2 * tokens * 32)]
    linear = next(line.split() for line in printed.splitlines() if line.startswith("linear-all "))
    assert float(linear[-1]) == pytest.approx(2 * tokens * 32 * 7 / 1e6, abs=0.005)  # MFLOPs of one product


def test_info_of_a_head(cli, head, backbone):
    printed = cli("info", head)
    assert "head: recipe alf, attentive" in printed
    assert f"backbone: {backbone}, revision -" in printed
    assert "labels: 3 (blue, green, red)" in printed
    assert printed.endswith(f"  layer {NUM_LAYERS} · block · cls\n  layer {NUM_LAYERS} · block · mean\n")


def test_extract_and_extract_again(cli, backbone, pictures, tmp_path, monkeypatch):
    command = ["extract", "--backbone", backbone, "--dataset", pictures, "--output_dir", tmp_path / "out" / "features"]
    printed = cli(*command)
    sizes = {split: (tmp_path / "out/features" / split / "features-00000.arrow").stat().st_size for split in SPLITS}
    expected = [
        f"{split}: {rows} images, 6 tokens each, {sizes[split] / 1e6:.1f} MB" for split, rows in SPLITS.items()
    ]
    assert sorted(printed.splitlines()) == sorted(expected)
    forbid_extraction(monkeypatch)
    assert cli(*command) == printed


SPLITS = {"test": 18, "train": 72}


def forbid_extraction(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the backbone was run")

    monkeypatch.setattr(ViTForAttentiveLayerFusionClassification, "extract_layer_features", refuse)


def test_train_takes_extracted_features_whatever_its_seed(cli, backbone, pictures, tmp_path, monkeypatch):
    shared = ["--backbone", backbone, "--dataset", pictures, "--feature_dtype", "float32"]
    cli("extract", *shared, "--output_dir", tmp_path / "features")
    forbid_extraction(monkeypatch)
    command = ["train", *shared, "--features_dir", tmp_path / "features", *QUICK]
    cli(*command, "--output_dir", tmp_path / "head", "--seed", 5)
    # The held-out rows are those of every other command, which `evaluate` relies on.
    assert {file.name for file in (tmp_path / "head").iterdir()} == HEAD_FILES


def test_train_writes_a_head_its_card_and_its_metrics(head, pictures):
    assert {file.name for file in head.iterdir()} == {*HEAD_FILES, "features"}
    metrics = json.loads((head / "metrics.json").read_text())
    assert metrics.keys() == {"loss", "accuracy", "balanced_accuracy", "macro_f1", "train_seconds", "test_images"}
    assert metrics["accuracy"] > 0.9
    assert metrics["test_images"] == 18
    card = (head / "README.md").read_text()
    assert "# alf head for pictures\n" in card
    assert str(pictures) not in card
    assert f"| accuracy | {metrics['accuracy']:.4f} |" in card
    assert "| training images | 72 |" in card
    config = LayerFusionConfig.from_pretrained(head)
    assert config.id2label == dict(enumerate(CLASSES))
    assert LayerFeatures.open(head / "features" / "train").labels.tolist().count(0) == 24  # stratified


def test_train_is_deterministic(cli, head, backbone, pictures, tmp_path):
    options = [
        "--num_train_epochs",
        12,
        "--device",
        "cpu",
        "--attention_dropout",
        0,
        "--output_dir",
        tmp_path / "again",
    ]
    cli("train", "--backbone", backbone, "--dataset", pictures, *options, "--features_dir", head / "features")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (head / "model.safetensors").read_bytes()


def test_evaluate_measures_what_train_measured(cli, head, pictures):
    measured = json.loads(cli("evaluate", "--model", head, "--dataset", pictures, "--device", "cpu"))
    trained = json.loads((head / "metrics.json").read_text())
    assert (measured.pop("split"), measured.pop("images")) == ("test", 18)
    intervals = measured.pop("confidence_intervals")
    assert intervals.keys() == {"accuracy", "balanced_accuracy", "macro_f1"}
    assert all(low <= measured[name] <= high for name, (low, high) in intervals.items())
    # `train` reads tokens from a float16 cache, whose relative rounding error is 2^-11; `evaluate` starts from pixels.
    assert measured == pytest.approx({name: trained[name] for name in measured}, rel=1e-3)
    assert measured.keys() == {"loss", "accuracy", "balanced_accuracy", "macro_f1"}


def test_evaluate_another_split_into_a_file(cli, head, pictures, tmp_path):
    printed = cli(
        *("evaluate", "--model", head, "--dataset", pictures, "--split", "train"),
        *("--batch_size", 7, "--output", tmp_path / "metrics.json"),
    )
    assert printed == ""
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert (measured["split"], measured["images"]) == ("train", 72)


def odd_pictures(folder):
    """One picture in every mode and some sizes, with the class that each shows."""
    folder.mkdir()
    rgb = picture(2, 5, (40, 33))
    grey16 = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    made = {
        "grey.png": rgb.convert("L"),
        "grey16.png": PILImage.fromarray(grey16),
        "palette.gif": rgb.quantize(16),
        "photo.jpg": picture(2, 9, (7, 90)),
        "rgba.png": rgb.convert("RGBA"),
        "tiny.bmp": picture(2, 6, (3, 2)),
    }
    for name, image in made.items():
        image.save(folder / name)
    return [folder / name for name in made]


def test_predict_files_and_folders(cli, head, tmp_path):
    files = odd_pictures(tmp_path / "odd")
    extra = tmp_path / "größe.png"
    picture(0, 77).save(extra)
    (tmp_path / "odd" / "notes.txt").write_text("not a picture")
    printed = cli("predict", "--model", head, extra, tmp_path / "odd", "--batch_size", 4, "--top_k", 9)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["file"] for line in lines] == [str(extra), *map(str, files)]
    assert "größe" in printed
    for line in lines:
        labels = [entry["label"] for entry in line["predictions"]]
        scores = [entry["score"] for entry in line["predictions"]]
        assert sorted(labels) == CLASSES
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1)
    best = {Path(line["file"]).name: line["predictions"][0]["label"] for line in lines}
    assert best["größe.png"] == "blue"
    assert {best["photo.jpg"], best["rgba.png"], best["palette.gif"]} == {"red"}
    by_name = {Path(line["file"]).name: line["predictions"] for line in lines}
    same = by_name["grey16.png"], by_name["grey.png"]
    assert {e["label"]: e["score"] for e in same[0]} == pytest.approx({e["label"]: e["score"] for e in same[1]})


def test_predict_gives_the_scores_of_the_model(cli, head, tmp_path):
    picture(1, 50).save(tmp_path / "green.png")
    cli("predict", tmp_path / "green.png", "--model", head, "--top_k", 1, "--output", tmp_path / "out.jsonl")
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    model = load(head)
    with torch.no_grad():
        pixel_values = model.image_processor(images=picture(1, 50), return_tensors="pt")["pixel_values"]
        score = model(pixel_values).logits.softmax(-1).max().item()
    assert json.loads(line)["predictions"] == [{"label": "green", "score": pytest.approx(score, abs=1e-5)}]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["green.png", "out.jsonl"]


def test_explain(cli, head, pictures, tmp_path):
    folder = tmp_path / "new" / "attention"
    printed = cli("explain", "--model", head, "--dataset", pictures, "--output_dir", folder, "--max_images", 10)
    values = json.loads((folder / "layer_attention.json").read_text(encoding="utf-8"))
    assert values["num_images"] == 10
    names = [token["name"] for token in values["tokens"]]
    assert names == [f"layer {layer} · block · {pool}" for layer in (1, 2, 3) for pool in ("cls", "mean")]
    assert sum(token["weight"] for token in values["tokens"]) == pytest.approx(1, abs=1e-5)
    assert len(values["heads"]) == 6
    with PILImage.open(folder / "layer_attention.png") as image:
        assert image.format == "PNG"
    heaviest = max(values["tokens"], key=lambda token: token["weight"])
    assert f"heaviest of 6 tokens (uniform: 0.167): {heaviest['name']} ({heaviest['weight']:.3f})" in printed
    assert str(folder / "layer_attention.png") in printed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--layers=-1,-2"], {"layers": [2, 3]}),
        (["--layers", "2:", "--modules", "ln2, block", "--pools", "mean"], {"layers": [2, 3], "pools": ["mean"]}),
        (["--recipe", "linear-last"], {"head_type": "linear"}),
        (["--recipe", "scalar-mix", "--no_class_weights"], {"head_type": "scalar_mix", "class_weights": None}),
        (["--attention_dropout", "0.25", "--noise_std", "0.05"], {"attention_dropout": 0.25, "noise_std": 0.05}),
        (["--dtype", "bfloat16", "--learning_rate", "1e-3", "--train_batch_size", "8"], {}),
        (["--image_size", "48"], {}),
    ],
)
def test_training_options(cli, backbone, pictures, tmp_path, options, expected):
    cli("train", "--backbone", backbone, "--dataset", pictures, "--output_dir", tmp_path / "head", *options, *QUICK)
    config = LayerFusionConfig.from_pretrained(tmp_path / "head")
    assert {name: getattr(config, name) for name in expected} == expected
    measured = json.loads(cli("evaluate", "--model", tmp_path / "head", "--dataset", pictures))
    trained = json.loads((tmp_path / "head" / "metrics.json").read_text())
    # bfloat16 tokens have eight bits, which `evaluate` with the backbone in float32 does not share.
    assert measured["loss"] == pytest.approx(trained["loss"], rel=2e-2 if "bfloat16" in options else 1e-3)


def test_image_size_is_kept_with_the_head(cli, backbone, pictures, tmp_path):
    options = ["--image_size", 48, "--output_dir", tmp_path]
    cli("train", "--backbone", backbone, "--dataset", pictures, *options, *QUICK)
    processor = load(tmp_path).image_processor
    assert processor(images=picture(0, 0), return_tensors="pt")["pixel_values"].shape[-2:] == (48, 48)


# ---- forms of a dataset ------------------------------------------------------------------------------------------


def labelled(labels, feature):
    """Pictures whose tint is `label % 3`, with labels of any kind."""
    data = {"image": [picture(row % 3, row) for row in range(len(labels))], "label": labels}
    return Dataset.from_dict(data, features=Features({"image": Image(), "label": feature}))


def folder_with_splits(folder):
    write_pictures(folder / "train", 6)
    write_pictures(folder / "test", 3, first_seed=100)


def saved_with_text_labels(folder):
    words = [CLASSES[row % 3] for row in range(30)]
    labelled(words, Value("string")).save_to_disk(folder)


def saved_with_test_split(folder):
    feature = ClassLabel(names=CLASSES)
    parts = {name: labelled([r % 3 for r in range(rows)], feature) for name, rows in (("train", 18), ("test", 9))}
    DatasetDict(parts).save_to_disk(folder)


def saved_with_whole_numbers(folder):
    labelled([row % 3 for row in range(30)], Value("int64")).save_to_disk(folder)


def saved_with_numbers(folder):
    labelled([row % 3 + 0.5 for row in range(30)], Value("float32")).save_to_disk(folder)


def saved_with_several_labels(folder):
    labelled([[row % 2, 1, int(row % 3 == 0)] for row in range(30)], List(Value("float32"))).save_to_disk(folder)


CLASS_METRICS = {"loss", "accuracy", "balanced_accuracy", "macro_f1"}


@pytest.mark.parametrize(
    ("make", "images", "names", "metrics"),
    [
        (lambda folder: write_pictures(folder, 10), 6, CLASSES, CLASS_METRICS),
        (folder_with_splits, 9, CLASSES, CLASS_METRICS),
        (saved_with_test_split, 9, CLASSES, CLASS_METRICS),
        (saved_with_text_labels, 6, CLASSES, CLASS_METRICS),
        (saved_with_whole_numbers, 6, ["LABEL_0", "LABEL_1", "LABEL_2"], CLASS_METRICS),
        (saved_with_numbers, 6, ["LABEL_0"], {"loss", "mse", "mae", "r2"}),
        (
            saved_with_several_labels,
            6,
            ["LABEL_0", "LABEL_1", "LABEL_2"],
            {"loss", "macro_f1", "micro_f1", "mean_average_precision"},
        ),
    ],
)
def test_forms_of_a_dataset(cli, backbone, tmp_path, make, images, names, metrics):
    make(tmp_path / "data")
    cli("train", "--backbone", backbone, "--dataset", tmp_path / "data", "--output_dir", tmp_path / "head", *QUICK)
    trained = json.loads((tmp_path / "head" / "metrics.json").read_text())
    measured = json.loads(cli("evaluate", "--model", tmp_path / "head", "--dataset", tmp_path / "data"))
    assert trained["test_images"] == measured["images"] == images
    assert measured.keys() - {"split", "images", "confidence_intervals"} == metrics
    assert measured["loss"] == pytest.approx(trained["loss"], rel=1e-3)
    assert list(LayerFusionConfig.from_pretrained(tmp_path / "head").id2label.values()) == names
    (line,) = cli("predict", "--model", tmp_path / "head", odd_pictures(tmp_path / "odd")[0]).splitlines()
    assert {entry["label"] for entry in json.loads(line)["predictions"]} == set(names)


def test_other_columns(cli, backbone, tmp_path):
    rows = labelled([row % 3 for row in range(30)], ClassLabel(names=CLASSES))
    rows = rows.rename_columns({"image": "photo", "label": "kind"}).add_column("label", ["note"] * 30)
    rows.save_to_disk(tmp_path / "data")
    columns = ["--dataset", tmp_path / "data", "--image_column", "photo", "--label_column", "kind"]
    cli("train", "--backbone", backbone, *columns, "--output_dir", tmp_path / "head", *QUICK)
    assert LayerFusionConfig.from_pretrained(tmp_path / "head").num_labels == 3
    assert json.loads(cli("evaluate", "--model", tmp_path / "head", *columns))["images"] == 6


def test_pictures_by_path(cli, backbone, pictures, head, tmp_path):
    files = sorted(str(file) for file in pictures.rglob("*.png"))
    rows = {"photo": files, "kind": [Path(file).parent.name for file in files]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    columns = ["--image_column", "photo", "--label_column", "kind"]
    listed = json.loads(cli("evaluate", "--model", head, "--dataset", tmp_path / "data", *columns))
    assert listed == json.loads(cli("evaluate", "--model", head, "--dataset", pictures))


def test_odd_pictures_can_be_trained_on(cli, backbone, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "data").mkdir(exist_ok=True)
        odd_pictures(tmp_path / "data" / name)
    cli("train", "--backbone", backbone, "--dataset", tmp_path / "data", "--output_dir", tmp_path / "head", *QUICK)
    features = LayerFeatures.open(tmp_path / "head" / "features" / "train")
    assert len(features) == 9  # of 2 x 6


@pytest.mark.slow
def test_a_process_prints_little_and_another_reuses_its_features(cli, backbone, tmp_path, monkeypatch):
    saved_with_text_labels(tmp_path / "data")
    command = [
        "extract",
        "--backbone",
        backbone,
        "--dataset",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "features",
    ]
    done = run_command(*command)
    forbid_extraction(monkeypatch)
    assert cli(*command) == done.stdout
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.count("the dataset has no test split: 20% of the training rows are held out") == 1
    assert "Warning" not in done.stderr


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory, backbone):
    """Things that are not as they should be."""
    root = tmp_path_factory.mktemp("bad")
    write_pictures(root / "corrupt", 10)
    (root / "corrupt" / "green" / "07.png").write_bytes(b"not a picture")
    folder_with_splits(root / "corrupt-test")
    (root / "corrupt-test" / "test" / "green" / "01.png").write_bytes(b"not a picture")
    (root / "truncated").mkdir()
    picture(0, 0, (400, 300)).save(root / "truncated" / "cut.jpg")
    whole = (root / "truncated" / "cut.jpg").read_bytes()
    (root / "truncated" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty").mkdir()
    (root / "file").write_text("a file")
    labelled([], ClassLabel(names=CLASSES)).save_to_disk(root / "no-rows", num_shards=1)
    DatasetDict(
        {
            "train": labelled([0, 1, 2], ClassLabel(names=CLASSES)),
            "test": labelled([], ClassLabel(names=CLASSES)),
        }
    ).save_to_disk(root / "no-test-rows", num_shards={"train": 1, "test": 1})
    labelled([0, 1], ClassLabel(names=CLASSES)).remove_columns("image").save_to_disk(root / "no-pictures")
    labelled([0, 1], ClassLabel(names=CLASSES)).rename_column("label", "note").cast_column(
        "note", Value("int64")
    ).save_to_disk(root / "no-labels")
    labelled([row % 4 for row in range(40)], ClassLabel(names=[*CLASSES, "white"])).save_to_disk(root / "four")
    save_tiny_backbone(root / "vit", "vit")
    shutil.copytree(backbone, root / "changed")
    model = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, num_labels=2).backbone
    with torch.no_grad():
        next(iter(model.encoder.layer.parameters())).add_(0.01)
    model.save_pretrained(root / "changed")
    no_processor = shutil.copytree(backbone, root / "no-processor")
    (no_processor / "preprocessor_config.json").unlink()
    linear = ViTForAttentiveLayerFusionClassification.from_backbone(backbone, recipe="linear-all", id2label=CLASSES)
    linear.save_pretrained(root / "linear")
    return root


TRAINING = [
    (["--recipe", "alff"], "recipe 'alff' is unknown: choose from .*alf"),
    (["--layers", "0:4"], "layer 4 is out of range for a backbone of 3 layers: choose from 0"),
    (["--layers=-4"], "layer -4 is out of range"),
    (["--layers", "deep"], "layers='deep' is not understood"),
    (["--modules", "mlp"], "modules 'mlp' is unknown: choose from"),
    (["--pools", "min"], "pools 'min' is unknown: choose from"),
    (["--image_column", "photo"], r"image_column='photo' is not in the dataset: its columns are \['image', 'label'\]"),
    (["--label_column", "kind"], r"label_column='kind' is not in the dataset: its columns are \['image', 'label'\]"),
    (["--label_column", "image"], "label column 'image' holds Image"),
    (["--image_column", "label"], "image_column='label' holds ClassLabel.*neither images nor paths"),
    (["--backbone", "nobody/nothing"], "backbone 'nobody/nothing' is neither a folder nor a Hub model"),
    (["--backbone", "BAD/empty"], "BAD/empty holds no config.json: is it a saved transformers model"),
    (["--backbone", "BAD/no-processor"], "no image processor"),
    (["--backbone", "BAD/no-processor", "--image_size", "48"], "no image processor whose image_size could be set"),
    (["--image_size", "3"], "--image_size 3 is no size"),
    (["--dataset", "nobody/nothing"], "'nobody/nothing' is neither a folder nor a Hub dataset"),
    (["--dataset", "BAD/empty"], "empty' holds no images"),
    (["--dataset", "BAD/file"], "file' is neither a folder nor a Hub dataset"),
    (["--dataset", "BAD/no-rows"], "no-rows' is empty"),
    (["--dataset", "BAD/no-test-rows"], "no-test-rows' is empty, or one of its splits is"),
    (["--dataset", "BAD/no-pictures"], r"0 image columns among \['label'\]: name one with image_column"),
    (["--dataset", "BAD/no-labels"], r"no column 'label' among \['image', 'note'\]"),
    (["--dataset", "BAD/corrupt"], r"row \d+ \(.*corrupt/green/07.png\) is not a readable image"),
    (["--output_dir", "BAD/file"], "--output_dir BAD/file: BAD/file is a file, give a folder"),
    (["--output_dir", "BAD/file/head"], "--output_dir BAD/file/head: BAD/file is a file, give a folder"),
    (["--device", "abacus"], "--device 'abacus' cannot be used on this machine"),
]


def in_bad(options, bad):
    return [option.replace("BAD", str(bad)) for option in options]


@pytest.mark.parametrize("command", ["train", "extract"])
@pytest.mark.parametrize(("options", "message"), TRAINING)
def test_bad_input_to_train_and_extract(refused, bad, backbone, pictures, tmp_path, command, options, message):
    defaults = {"--backbone": backbone, "--dataset": pictures, "--output_dir": tmp_path / "out"}
    shared = [item for option, value in defaults.items() if option not in options for item in (option, value)]
    assert_matches(message, refused(command, *shared, *in_bad(options, bad)), bad)
    assert not list(tmp_path.iterdir())


def assert_matches(message, line, bad):
    assert re.search(message.replace("BAD", re.escape(str(bad))), line), line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attention_dropout", "1.5"], "attention_dropout=1.5 is not a probability"),
        (["--noise_std=-1"], "noise_std=-1.0: use 0 or a positive number"),
        (["--features_dir", "BAD/file"], "--features_dir BAD/file: BAD/file is a file, give a folder"),
    ],
)
def test_bad_input_to_train(refused, bad, backbone, pictures, tmp_path, options, message):
    shared = ["--backbone", backbone, "--dataset", pictures, "--output_dir", tmp_path / "out"]
    assert_matches(message, refused("train", *shared, *in_bad(options, bad)), bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "explain"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--model", "BAD/empty"], "BAD/empty"),
        (["--model", "BAD/changed"], "BAD/changed"),
        (["--split", "dev"], r"the dataset has no split 'dev', only \['train', 'test'\]"),
        (["--backbone", "BAD/vit"], "backbone"),
        (["--backbone", "BAD/changed"], "fingerprint|weights"),
        (["--dataset", "BAD/corrupt-test"], r"row 4 \(.*test/green/01.png\) is not a readable image"),
        (["--dataset", "BAD/empty"], "empty' holds no images"),
        (["--dataset", "BAD/no-test-rows"], "no-test-rows' is empty, or one of its splits is"),
        (["--dataset", "BAD/no-labels"], r"no column 'label' among \['image', 'note'\]"),
        (["--device", "abacus"], "--device 'abacus' cannot be used on this machine"),
    ],
)
def test_bad_input_to_evaluate_and_explain(refused, bad, head, pictures, tmp_path, command, options, message):
    defaults = {"--model": head, "--dataset": pictures}
    defaults["--output_dir" if command == "explain" else "--output"] = tmp_path / "out"
    shared = [item for option, value in defaults.items() if option not in options for item in (option, value)]
    assert_matches(message, refused(command, *shared, *in_bad(options, bad)), bad)
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_other_classes(refused, bad, head):
    line = refused("evaluate", "--model", head, "--dataset", bad / "four")
    assert "the dataset has 4 classes (blue, green, red, white), but the head has 3 (blue, green, red)" in line


def test_explain_needs_attention(refused, bad, pictures, tmp_path):
    line = refused("explain", "--model", bad / "linear", "--dataset", pictures, "--output_dir", tmp_path / "out")
    assert "a 'linear' head has no layer attentions" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BAD/nothing.png"], "no such file or folder: BAD/nothing.png"),
        (["BAD/empty"], "folder BAD/empty holds no pictures"),
        (["BAD/corrupt"], "corrupt/green/07.png is not a readable image"),
        (["BAD/file"], "BAD/file is not a readable image"),
        (["BAD/truncated"], "truncated/cut.jpg is not a readable image"),
        (["BAD/corrupt/green/00.png", "--model", "BAD/empty"], "BAD/empty"),
        (["BAD/corrupt/green/00.png", "--output", "BAD/empty"], "--output BAD/empty is a folder: give a file"),
        (["BAD/corrupt/green/00.png", "--output", "BAD/none/out.jsonl"], "No such file or directory.*BAD/none/out"),
    ],
)
def test_bad_input_to_predict(refused, bad, head, tmp_path, arguments, message):
    options = [] if "--model" in arguments else ["--model", head]
    options += [] if "--output" in arguments else ["--output", tmp_path / "out.jsonl"]
    assert_matches(message, refused("predict", *in_bad(arguments, bad), *options), bad)
    assert not list(tmp_path.iterdir())
    assert not list((bad / "empty").iterdir())


@pytest.mark.parametrize("name", ["nobody/nothing", "BAD/empty", "BAD/file"])
def test_bad_input_to_info(refused, bad, name):
    assert_matches(
        f"'{name}' is neither a folder nor a Hub model", refused("info", name.replace("BAD", str(bad))), bad
    )


def test_cache_of_something_else(refused, cli, bad, backbone, pictures, tmp_path):
    shared = ["--dataset", pictures, "--output_dir", tmp_path / "features"]
    cli("extract", "--backbone", backbone, *shared)
    before = {file: file.read_bytes() for file in (tmp_path / "features").rglob("*.*")}
    line = refused("extract", "--backbone", bad / "changed", *shared)
    assert "was made from something else (backbone.digest" in line
    line = refused("extract", "--backbone", backbone, *shared, "--image_size", "48")
    assert "processor.crop_size.height 32 -> 48" in line
    assert {file: file.read_bytes() for file in (tmp_path / "features").rglob("*.*")} == before
    cli("extract", "--backbone", bad / "changed", *shared, "--overwrite")
    assert {file: file.read_bytes() for file in (tmp_path / "features").rglob("*.*")} != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--backbone", "a", "--dataset", "b"], "the following arguments are required: --output_dir"),
        (["extract", "--layers", "-1,-2"], "argument --layers: expected one argument"),
        (["train", "--batch_size", "0"], "argument --batch_size: '0' is not a whole number from 1 up"),
        (["train", "--batch_size", "many"], "'many' is not a whole number from 1 up"),
        (["train", "--learning_rate", "0"], "argument --learning_rate: '0' is not a number above 0"),
        (["train", "--weight_decay", "nan"], "argument --weight_decay: 'nan' is not a number from 0 up"),
        (["train", "--num_train_epochs", "inf"], "'inf' is not a number above 0"),
        (["train", "--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["extract", "--feature_dtype", "int8"], "argument --feature_dtype: invalid choice: 'int8'"),
        (["predict", "--model", "a"], "the following arguments are required: IMAGE"),
        (["predict", "a.png", "--model", "b", "--top_k", "0"], "'0' is not a whole number from 1 up"),
    ],
)
def test_wrong_options(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_interrupt(capsys, monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_layerfusion.cli.info.AutoConfig.from_pretrained", interrupt)
    assert main(["info", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


# ---- help, and the command as a process --------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(capsys, command):
    name = command and command.__name__.rsplit(".", 1)[-1]
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"] if name else ["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    if name:
        assert command.__doc__.strip() in printed
    else:
        assert all(other.__name__.rsplit(".", 1)[-1] in printed for other in COMMANDS)
        assert "exit status" in printed
    if name in ("train", "extract"):
        assert "--layers=-1,-2" in printed


def run_command(*arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "hf_layerfusion.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.slow
def test_process_that_fails(tmp_path):
    done = run_command("info", tmp_path / "nothing", status=1)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("layerfusion info: ")
    assert str(tmp_path / "nothing") in line


# ---- the real thing ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_on_a_real_backbone(cli, small_backbone_folder, tmp_path):
    data = load_digits()
    for split, rows in (("train", range(100)), ("test", range(100, 140))):
        for row in rows:
            folder = tmp_path / "digits" / split / str(data.target[row])
            folder.mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(np.uint8(data.images[row] * 255 / 16)).save(folder / f"{row}.png")
    head = tmp_path / "head"
    shared = ["--dataset", tmp_path / "digits", "--device", "cpu"]
    printed = cli(
        *("train", "--backbone", small_backbone_folder, *shared, "--image_size", 56, "--output_dir", head),
        *("--num_train_epochs", 20),
    )
    assert f"head saved to {head}" in printed
    trained = json.loads((head / "metrics.json").read_text())
    assert trained["balanced_accuracy"] > 0.6  # chance is 0.1
    measured = json.loads(cli("evaluate", "--model", head, *shared))
    # One of 40 images may change sides through the cache's float16.
    assert measured["accuracy"] == pytest.approx(trained["accuracy"], abs=1 / 40)
    assert measured["loss"] == pytest.approx(trained["loss"], rel=1e-3)
    lines = cli("predict", "--model", head, tmp_path / "digits" / "test", "--top_k", 1).splitlines()
    right = [json.loads(line) for line in lines]
    right = [line["predictions"][0]["label"] == Path(line["file"]).parent.name for line in right]
    assert np.mean(right) == pytest.approx(measured["accuracy"])
    cli("explain", "--model", head, *shared, "--output_dir", head / "attention", "--max_images", 10)
    weights = json.loads((head / "attention" / "layer_attention.json").read_text(encoding="utf-8"))["tokens"]
    assert len(weights) == 24
    assert (head / "model.safetensors").stat().st_size < 10e6
