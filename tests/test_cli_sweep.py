"""`layerfusion sweep` and `layerfusion train --sweep`: what they print, write and refuse, killed, and on two processes."""

import csv
import json
import os
import socket
import subprocess
import sys
import time

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from picture_helpers import CLASSES, picture, save_tiny_backbone, write_pictures
from safetensors.torch import load_file
from transformers import pipeline

from hf_layerfusion import LayerFeatures, LayerFusionConfig, SweepResult, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.cli import sweep as sweep_command
from hf_layerfusion.cli import train as train_command
from hf_layerfusion.cli.main import main
from hf_layerfusion.data import open_dataset
from hf_layerfusion.sweeps import sweep

# Two recipes, whose tokens are not the same; all six settings differ in more than their decay.
GRID = """\
- recipe: [alf, linear-last]
  learning_rate: [3e-2, 1e-2]
- recipe: alf
  learning_rate: 3e-2
  attention_dropout: [0, 0.5]
"""
NUM_SETTINGS = 6
QUICK = ["--train_batch_size", "24", "--device", "cpu"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A backbone, pictures with a test split, a grid."""
    root = tmp_path_factory.mktemp("inputs")
    write_pictures(root / "pictures" / "train", 16)
    write_pictures(root / "pictures" / "test", 6, first_seed=500)
    save_tiny_backbone(root / "tiny")
    (root / "grid.yaml").write_text(GRID)
    return root


def source(inputs):
    return ["--backbone", inputs / "tiny", "--dataset", inputs / "pictures"]


def run(capsys, *arguments, status=0):
    """Run a command; returns what it printed, and the last line on standard error."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    return out, (err.splitlines() or [""])[-1]


@pytest.fixture(scope="module")
def swept(inputs, tmp_path_factory):
    """The folder of a sweep from backbone and images, with two seeds."""
    folder = tmp_path_factory.mktemp("sweeps") / "swept"
    grid = ["--grid", inputs / "grid.yaml", "--num_epochs", 6, "--seeds", "0,1"]
    command = ["sweep", *source(inputs), *grid, "--output_dir", folder, *QUICK]
    assert main([str(argument) for argument in command]) == 0
    return folder


@pytest.fixture(scope="module")
def features(swept):
    return swept / "features" / "train"


def trials(folder):
    return json.loads((folder / "sweep.json").read_text())["trials"]


# ---- layerfusion sweep -------------------------------------------------------------------------------------------


def test_sweep_writes_its_result_and_a_head(swept, tmp_path):
    assert {file.name for file in swept.iterdir()} == {
        *("features", "head", "head-seed0.safetensors", "head-seed1.safetensors"),
        *("sweep.json", "sweep.png", "trials.csv"),
    }
    # Both recipes' tokens, and nothing of the test split.
    assert [file.name for file in (swept / "features").iterdir()] == ["train"]
    opened = LayerFeatures.open(swept / "features" / "train")
    assert (len(opened), len(opened.bank)) == (48, 7)
    with open(swept / "trials.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == NUM_SETTINGS * 2
    result = SweepResult.load(swept)
    assert result.protocol["strategy"] == "merged"
    config = LayerFusionConfig.from_pretrained(swept / "head")
    assert config.recipe == result.best.recipe
    assert config.id2label == dict(enumerate(CLASSES))
    head = load_file(swept / "head" / "model.safetensors")
    assert all(head[f"head.{name}"].equal(value) for name, value in result.head_state(0).items())
    card = (swept / "head" / "README.md").read_text(encoding="utf-8")
    assert f"| learning rate | {result.best.learning_rate} |" in card
    assert f"| chosen from | {NUM_SETTINGS} settings, on 20% of 48 rows |" in card
    assert "## Results" not in card  # nothing was measured on a test split
    picture(1, 7).save(tmp_path / "green.png")
    best = pipeline("image-classification", model=str(swept / "head"))(str(tmp_path / "green.png"))[0]
    assert best["label"] == "green"


def test_sweep_from_features_again_and_otherwise(capsys, inputs, swept, features, tmp_path):
    folder = tmp_path / "sweep"
    command = ["sweep", "--features", features, "--grid", inputs / "grid.yaml", "--num_epochs", 6, "--seeds", "0,1"]
    command += [*QUICK, "--output_dir", folder]
    out, _ = run(capsys, *command)
    assert trials(folder) == trials(swept)
    first, _, header, best, *_ = out.splitlines()
    assert first.startswith(f"alf, linear-last: {NUM_SETTINGS} of {NUM_SETTINGS} settings trained, 2 seeds, ")
    assert " chosen on 20% of 48 rows; took " in first
    assert header.split("  ")[0] == "balanced accuracy"
    result = SweepResult.load(folder)
    assert best.split()[:3] == [f"{result.best_score:.4f}", "±", f"{result.best_score_std:.4f}"]
    assert best.endswith("  <- chosen")
    assert f"SweepResult.load({str(folder)!r}).build_model(BACKBONE)" in out
    assert not (folder / "head").exists()
    # The same again does nothing; another sweep is refused, until it is asked for.
    out, _ = run(capsys, *command)
    assert "it was finished already" in out
    other = [*command, "--num_epochs", 2]
    _, line = run(capsys, *other, status=1)
    assert line.startswith(f"layerfusion sweep: {folder} holds a sweep of something else")
    assert trials(folder) == trials(swept)
    run(capsys, *other, "--overwrite_sweep", "--no_refit")
    assert {file.name for file in folder.iterdir()} == {"sweep.json", "sweep.png", "trials.csv"}
    assert {trial["epochs_trained"] for trial in trials(folder)} == {2}


def test_every_option_reaches_the_sweep(capsys, features, tmp_path):
    out, _ = run(
        *(capsys, "sweep", "--features", features, "--output_dir", tmp_path, "--recipe", "linear-all, alf-quarterly"),
        *("--grid", "fast", "--strategy", "full", "--metric", "accuracy", "--num_folds", 3, "--seeds", "4"),
        *("--num_epochs", 2, "--patience", 1, "--heads_at_once", 3, "--max_memory_gb", 0.1, "--save_seconds", 0),
        *("--layers", "2,3", "--pools", "mean", *QUICK),
    )
    assert out.startswith(
        "linear-all, alf-quarterly: 18 of 18 settings trained, 1 seed, chosen on 3 folds of 48 rows; "
    )
    assert "accuracy" in out.splitlines()[2]
    assert "and 8 more" in out
    protocol = SweepResult.load(tmp_path).protocol
    expected = {"strategy": "full", "metric": "accuracy", "validation": {"num_folds": 3}, "seeds": [4]}
    expected |= {"batch_size": 24, "num_epochs": 2, "patience": 1, "heads_at_once": 3}
    assert {name: protocol[name] for name in expected} == expected
    assert protocol["overrides"] == {"layers": "2,3", "pools": ["mean"]}
    assert len(SweepResult.load(tmp_path).config.bank) == 2


# ---- groups ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def herds(inputs):
    """The pictures with a column of groups, four rows in each; saved, and the groups of the training rows."""
    splits = open_dataset(inputs / "pictures")
    names = [f"herd {row // 4}" for row in range(len(splits["train"]))]
    splits["train"] = splits["train"].add_column("herd", names)
    splits["test"] = splits["test"].add_column("herd", ["another"] * len(splits["test"]))
    splits.save_to_disk(str(inputs / "herds"))
    return inputs / "herds", names


@pytest.mark.parametrize("command", ["sweep", "train"])
def test_images_of_a_group_stay_together(capsys, inputs, herds, tmp_path, monkeypatch, command):
    seen = []

    def watched(*arguments, groups, **options):
        seen.append(list(groups))
        return sweep(*arguments, groups=groups, **options)

    monkeypatch.setattr(sweep_command, "sweep", watched)
    folder, names = herds
    grid = ["--sweep" if command == "train" else "--grid", inputs / "grid.yaml", "--num_folds", 2]
    epochs = ["--num_train_epochs" if command == "train" else "--num_epochs", 1]
    options = [*grid, *epochs, "--group_column", "herd", *QUICK, "--output_dir", tmp_path / "out"]
    out, _ = run(capsys, command, "--backbone", inputs / "tiny", "--dataset", folder, *options)
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    assert seen == [[numbers[name] for name in names]]
    assert "chosen on 2 folds of 48 rows, groups kept together; " in out
    card = (tmp_path / "out" / ("head" if command == "sweep" else "") / "README.md").read_text(encoding="utf-8")
    assert f"| chosen from | {NUM_SETTINGS} settings, on 2 folds of 48 rows, groups kept together |" in card


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, ["--group_column", "flock"], "the training split has no group_column 'flock'"),
        (None, ["--group_column", "image"], "'image' cannot be the group_column, which holds texts or numbers"),
        ("no test split", ["--group_column", "herd"], "no test split, and one drawn by row would part the groups"),
        ("shared", ["--group_column", "herd"], "1 groups of 'herd' have rows in the training and in the test split"),
    ],
)
def test_groups_that_cannot_be_kept_together(capsys, inputs, herds, tmp_path, change, options, message):
    splits = DatasetDict.load_from_disk(str(herds[0]))
    if change == "no test split":
        del splits["test"]
    elif change == "shared":
        splits["test"] = splits["test"].remove_columns("herd").add_column("herd", ["herd 3"] * len(splits["test"]))
    splits.save_to_disk(str(tmp_path / "data"))
    command = [
        "sweep",
        "--backbone",
        inputs / "tiny",
        "--dataset",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "out",
    ]
    _, line = run(capsys, *command, *options, *QUICK, status=1)
    assert message in line


def test_groups_are_of_a_dataset_and_for_a_sweep(capsys, features, inputs, tmp_path):
    options = ["--group_column", "herd", "--output_dir", tmp_path, *QUICK]
    _, line = run(capsys, "sweep", "--features", features, *options, status=2)
    assert "an extracted cache, to which --group_column does not apply" in line
    _, line = run(capsys, "train", *source(inputs), *options, status=2)
    assert "--group_column is an option of a sweep" in line


# ---- layerfusion train --sweep -----------------------------------------------------------------------------------


def test_train_with_a_sweep(capsys, inputs, swept, tmp_path, monkeypatch):
    seen = []
    search = train_command.search

    def watched(arguments, features, *rest, **options):
        seen.append(features)
        return search(arguments, features, *rest, **options)

    monkeypatch.setattr(train_command, "search", watched)
    head = tmp_path / "head"
    options = ["--sweep", inputs / "grid.yaml", "--seeds", "0,1", "--num_train_epochs", 6, *QUICK]
    out, _ = run(capsys, "train", *source(inputs), *options, "--output_dir", head)
    assert [features.folder for features in seen] == [head / "features" / "train"]
    assert trials(head / "sweep") == trials(swept)
    trained, separate = (load_file(folder / "model.safetensors") for folder in (head, swept / "head"))
    assert all(trained[name].equal(separate[name]) for name in trained)
    result = SweepResult.load(head / "sweep")
    metrics = json.loads((head / "metrics.json").read_text())
    assert metrics["test_images"] == 18
    chosen = metrics["sweep"]
    assert chosen["setting"]["learning_rate"] == result.best.learning_rate
    assert chosen["validation"]["mean"] == result.best_score
    assert (chosen["validation"]["metric"], chosen["settings"], chosen["seed"]) == (
        "balanced_accuracy",
        NUM_SETTINGS,
        0,
    )
    card = (head / "README.md").read_text(encoding="utf-8")
    assert f"| balanced_accuracy | {metrics['balanced_accuracy']:.4f} |" in card
    assert f"| validation balanced accuracy | {result.best_score:.4f} ± {result.best_score_std:.4f} |" in card
    assert f"head saved to {head} (trained in " in out
    assert "  <- chosen" in out
    measured, _ = run(capsys, "evaluate", "--model", head, "--dataset", inputs / "pictures", "--device", "cpu")
    measured = json.loads(measured)
    # The cache keeps float16, as in tests/test_cli.py.
    names = ("loss", "accuracy", "balanced_accuracy", "macro_f1")
    assert {name: measured[name] for name in names} == pytest.approx({name: metrics[name] for name in names}, rel=1e-3)
    assert LayerFusionConfig.from_pretrained(head).class_weights == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("values", "feature", "metric", "sign"),
    [
        ([row % 3 + 0.5 for row in range(30)], Value("float32"), "negative mse", -1),
        ([[row % 2, 1, int(row % 3 == 0)] for row in range(30)], List(Value("float32")), "mean average precision", 1),
    ],
)
def test_other_kinds_of_labels(capsys, inputs, tmp_path, values, feature, metric, sign):
    data = {"image": [picture(row % 3, row) for row in range(30)], "label": values}
    Dataset.from_dict(data, features=Features({"image": Image(), "label": feature})).save_to_disk(tmp_path / "data")
    (tmp_path / "grid.yaml").write_text("{recipe: linear-last, learning_rate: [1e-1, 1e-3]}")
    options = ["--sweep", tmp_path / "grid.yaml", "--num_train_epochs", 3, *QUICK, "--output_dir", tmp_path / "head"]
    out, _ = run(capsys, "train", "--backbone", inputs / "tiny", "--dataset", tmp_path / "data", *options)
    assert out.splitlines()[2].startswith(f"{metric}  ")
    metrics = json.loads((tmp_path / "head" / "metrics.json").read_text())
    chosen = metrics["sweep"]["validation"]
    assert chosen["metric"] in metrics
    assert sign * chosen["mean"] > 0


# ---- as processes ------------------------------------------------------------------------------------------------


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "hf_layerfusion.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        encoding="utf-8",
    )


@pytest.mark.slow
def test_a_killed_sweep_goes_on(capsys, features, tmp_path):
    (tmp_path / "grid.yaml").write_text("learning_rate: [3e-2, 1e-2]")
    command = ["sweep", "--features", features, "--grid", tmp_path / "grid.yaml", "--save_seconds", 0]
    command += ["--num_epochs", 40, *QUICK, "--output_dir"]
    killed = start(*command, tmp_path / "killed")
    state = tmp_path / "killed" / "sweep-state" / "selection-0.safetensors"
    for _ in range(12_000):
        if state.exists() or killed.poll() is not None:
            break
        time.sleep(0.01)
    killed.kill()
    _, err = killed.communicate()
    assert state.exists(), err
    assert not (tmp_path / "killed" / "sweep.json").exists()
    out, _ = run(capsys, *command, tmp_path / "killed")
    assert " took " in out
    run(capsys, *command, tmp_path / "whole")
    assert trials(tmp_path / "killed") == trials(tmp_path / "whole")
    heads = [load_file(tmp_path / name / "head-seed0.safetensors") for name in ("killed", "whole")]
    assert all(heads[0][name].equal(heads[1][name]) for name in heads[0])


@pytest.mark.slow
def test_two_processes_choose_what_one_chooses(inputs, swept, tmp_path):
    command = ["train", *source(inputs), "--sweep", inputs / "grid.yaml", "--seeds", "0,1", "--num_train_epochs", 6]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `accelerate launch` tells its processes, without the seconds that it takes to start.
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    both = [
        start(*command, *QUICK, "--output_dir", tmp_path, RANK=rank, LOCAL_RANK=rank, **group) for rank in ("0", "1")
    ]
    (out, err), (other_out, other_err) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], err[-3000:] + other_err[-3000:]
    assert other_out == ""
    assert out.count("<- chosen") == out.count("test: loss") == out.count("head saved to") == 1
    assert trials(tmp_path / "sweep") == trials(swept)
    assert json.loads((tmp_path / "metrics.json").read_text())["test_images"] == 18
    model = ViTForAttentiveLayerFusionClassification.from_pretrained(tmp_path)
    assert model.config.recipe == SweepResult.load(swept).best.recipe


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --features, or both --backbone and --dataset"),
        (["--backbone", "a"], "give either --features, or both --backbone and --dataset"),
        (["--features", "a", "--dataset", "b"], "--features is an extracted cache, to which --dataset does not apply"),
        (["--features", "a", "--image_size", "48"], "to which --image_size does not apply"),
        (
            ["--backbone", "a", "--dataset", "b", "--width_alignment", "project"],
            "--width_alignment project gives every head tokens of its own, which a sweep cannot share",
        ),
    ],
)
def test_options_of_sweep_that_do_not_go_together(capsys, tmp_path, arguments, message):
    out, line = run(capsys, "sweep", "--output_dir", tmp_path / "out", *arguments, status=2)
    assert out == ""
    assert line.startswith("layerfusion sweep: ")
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "fast", "--learning_rate", "1e-3"], "--learning_rate contradicts --sweep, which chooses it"),
        (["--sweep", "fast", "--weight_decay", "0"], "--weight_decay contradicts --sweep"),
        (["--sweep", "fast", "--attention_dropout", "0"], "use a grid file with attention_dropout"),
        (["--sweep", "fast", "--noise_std", "0"], "--noise_std contradicts --sweep"),
        (["--sweep", "fast", "--no_class_weights"], "use a grid file with balance_classes: false"),
        (
            ["--sweep", "fast", "--seed", "0"],
            "--seed contradicts --sweep, which chooses it: leave it out, or use --seeds",
        ),
        (["--sweep", "fast", "--num_train_epochs", "1.5"], "--num_train_epochs 1.5: a sweep trains whole epochs"),
        (["--sweep", "fast", "--width_alignment", "project"], "which a sweep cannot share"),
        (["--strategy", "full"], "--strategy is an option of a sweep: add --sweep paper, fast or FILE.yaml"),
        (["--seeds", "0"], "--seeds is an option of a sweep"),
        (["--max_memory_gb", "2"], "--max_memory_gb is an option of a sweep"),
        (["--save_seconds", "0"], "--save_seconds is an option of a sweep"),
        (["--overwrite_sweep"], "--overwrite_sweep is an option of a sweep"),
    ],
)
def test_options_of_train_that_do_not_go_together(capsys, tmp_path, arguments, message):
    shared = ["--backbone", "nobody/nothing", "--dataset", "nobody/nothing", "--output_dir", tmp_path / "out"]
    out, line = run(capsys, "train", *shared, *arguments, status=2)
    assert out == ""
    assert line.startswith("layerfusion train: ")
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "FEATURES/../../nothing"], "nothing holds no features.json: it is not a feature cache"),
        (["--features", "FEATURES/.."], "holds caches of several splits: give "),
        (["--features", "OUT/test"], "a setting is never chosen on the test split, give the training rows"),
        (["--features", "FEATURES", "--grid", "coarse"], "'coarse'"),
        (["--features", "FEATURES", "--recipe", "alff"], "recipe 'alff' is unknown: choose from"),
        (["--features", "FEATURES", "--recipe", "alf-paper"], "layer 2 · ln2 · cls"),
        (["--features", "FEATURES", "--metric", "luck"], "metric 'luck' is unknown: choose from accuracy"),
        (["--features", "FEATURES", "--num_folds", "40"], "cannot be split"),
        (["--features", "FEATURES", "--validation_size", "1.5"], "validation_size=1.5"),
        (["--features", "FEATURES", "--max_memory_gb", "1e-6"], "one head needs"),
        (["--features", "FEATURES", "--device", "abacus"], "--device 'abacus' cannot be used on this machine"),
        (["--features", "FEATURES", "--output_dir", "FEATURES/features.json"], "is a file, give a folder"),
    ],
)
def test_bad_input_to_sweep(capsys, features, tmp_path, arguments, message):
    (tmp_path / "test").mkdir()
    arguments = [part.replace("FEATURES", str(features)).replace("OUT", str(tmp_path)) for part in arguments]
    command = ["sweep", "--output_dir", tmp_path / "out", "--grid", "fast", "--num_epochs", "1", "--device", "cpu"]
    out, line = run(capsys, *command, *arguments, status=1)
    assert out == ""
    assert line.startswith("layerfusion sweep: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,one"], "argument --seeds: '0,one' is not a list of whole numbers such as 0,1,2"),
        (["--seeds", "-1"], "'-1' is not a list of whole numbers"),
        (["--num_folds", "1"], "argument --num_folds: '1' is not a whole number from 2 up"),
        (["--num_folds", "3", "--validation_size", "0.3"], "not allowed with argument"),
        (["--strategy", "luck"], "argument --strategy: invalid choice: 'luck'"),
    ],
)
def test_wrong_options(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "--output_dir", "a", "--features", "b", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_a_grid_that_works(capsys, features, tmp_path):
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    printed = capsys.readouterr().out
    start = printed.index("  learning_rate: [")
    lines = printed[start : printed.index("\n\n", start)].splitlines()
    (tmp_path / "grid.yaml").write_text("\n".join(line.strip() for line in lines))
    out, _ = run(
        *(capsys, "sweep", "--features", features, "--output_dir", tmp_path / "out", "--grid", tmp_path / "grid.yaml"),
        *("--num_epochs", 1, "--strategy", "full", *QUICK),
    )
    assert "alf: 18 of 18 settings trained" in out
