"""`examples/run_layer_fusion.py` as a process: from features and from pixels, resumed, and on two processes."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from picture_helpers import CLASSES, picture, save_tiny_backbone, write_pictures
from safetensors.torch import load_file
from transformers import pipeline
from transformers.utils import logging

import hf_layerfusion  # noqa: F401 (registers the model for `pipeline`)

SCRIPT = Path(__file__).parents[1] / "examples" / "run_layer_fusion.py"
# Without MPI, `--cpu` starts one process only; `--multi_gpu` starts as many as it is told, and the script's own
# `--use_cpu` keeps them on the CPU.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def run(*arguments, launch=()):
    """Run the script in a process of its own, which is returned."""
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def run_here(monkeypatch):
    """Run the script in this process, which spares the seconds that imports take."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)  # as in the processes
    yield run
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options that name a backbone and pictures, 48 to train on and 30 to measure on."""
    root = tmp_path_factory.mktemp("inputs")
    write_pictures(root / "pictures" / "train", 16)
    write_pictures(root / "pictures" / "test", 10, first_seed=500)
    return {"backbone": str(save_tiny_backbone(root / "tiny")), "dataset": str(root / "pictures")}


def options(inputs, folder, **more):
    values = {
        **inputs,
        "output_dir": str(folder),
        "do_train": True,
        "do_eval": True,
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "per_device_train_batch_size": 12,
        "per_device_eval_batch_size": 10,
        "num_train_epochs": 4,
        "attention_dropout": 0.0,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


METRICS = ("eval_loss", "eval_accuracy", "eval_balanced_accuracy", "eval_macro_f1")


def measured(folder):
    results = json.loads((folder / "eval_results.json").read_text())
    return {name: results[name] for name in METRICS}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """The folder of a run from cached features."""
    folder = tmp_path_factory.mktemp("outputs") / "head"
    run(*options(inputs, folder, save_strategy="epoch"))
    return folder


@pytest.mark.slow
def test_train_and_evaluate(trained, tmp_path):
    files = {path.name for path in trained.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "checkpoint-16"} <= files
    assert all(name.startswith("head.") for name in load_file(trained / "checkpoint-16" / "model.safetensors"))
    metrics = measured(trained)
    assert metrics["eval_accuracy"] > 0.6  # chance is a third
    assert metrics["eval_loss"] > 0.05  # not so easy that the comparisons below say nothing
    card = ModelCard.load(trained / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-4)
    assert "# alf head for pictures" in card.text
    picture(1, 7).save(tmp_path / "green.png")
    best = pipeline("image-classification", model=str(trained))(str(tmp_path / "green.png"))[0]
    assert best["label"] == CLASSES[1]


@pytest.mark.slow
def test_resumed_run_ends_like_an_uninterrupted_one(inputs, trained, tmp_path, run_here, caplog):
    # What a kill in the third epoch leaves.
    shutil.copytree(trained / "checkpoint-8", tmp_path / "checkpoint-8")
    logging.add_handler(caplog.handler)
    try:
        run_here(*options(inputs, tmp_path, features_dir=trained / "features"))
    finally:
        logging.remove_handler(caplog.handler)
    assert "Resuming training from checkpoint with epoch 2 and global step 8" in caplog.text
    assert measured(tmp_path) == measured(trained)
    assert (tmp_path / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_train_from_pixels_as_from_features(inputs, trained, tmp_path, run_here):
    run_here(*options(inputs, tmp_path, train_from_pixels=True))
    assert not (tmp_path / "features").exists()
    # The cache keeps float16: 2^-11 relative, a little more after 16 steps.
    assert measured(tmp_path) == pytest.approx(measured(trained), rel=2e-3)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(inputs, trained, tmp_path):
    batches = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 5}
    done = run(*options(inputs, tmp_path, **batches, ddp_backend="gloo"), launch=LAUNCH)
    assert done.stderr.count("Total train batch size (w. parallel, distributed & accumulation) = 12") == 1
    # The same batches, whose gradients are summed in another order.
    assert measured(tmp_path) == pytest.approx(measured(trained), rel=1e-3)
    assert (tmp_path / "features" / "train" / "features.json").is_file()


@pytest.mark.slow
def test_json_file_and_push(inputs, hub, tmp_path, run_here):
    folder = tmp_path / "head"
    hub.upload_folder(inputs["backbone"], "me/example-backbone")  # of a folder's backbone, others could make nothing
    values = {**inputs, "output_dir": str(folder), "do_train": True, "do_eval": True, "num_train_epochs": 1}
    values |= {"backbone": "me/example-backbone"}
    values |= {"recipe": "scalar-mix", "balance_classes": True, "max_train_samples": 12, "max_eval_samples": 6}
    values |= {"use_cpu": True, "image_size": 16, "push_to_hub": True, "hub_model_id": "me/example-head"}
    values |= {"save_strategy": "no"}
    (tmp_path / "arguments.json").write_text(json.dumps(values))
    run_here(tmp_path / "arguments.json")
    assert json.loads((folder / "config.json").read_text())["recipe"] == "scalar-mix"
    assert json.loads((folder / "eval_results.json").read_text())["eval_runtime"] > 0
    files = set(hub.repos["models", "me/example-head"].at("main").tree) - {".gitattributes"}
    assert files == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training_record.json",
    }


@pytest.mark.slow
def test_fine_tuning_trains_the_backbone(inputs, tmp_path, run_here):
    run_here(*options(inputs, tmp_path, freeze_backbone=False, backbone_lr_factor=0.1, num_train_epochs=1))
    tuned, before = load_file(tmp_path / "model.safetensors"), load_file(Path(inputs["backbone"], "model.safetensors"))
    name = "encoder.layer.0.norm1.weight"
    assert not tuned[f"backbone.{name}"].equal(before[name])
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flies", "yes"], "Some specified arguments are not used by the HfArgumentParser: .*'--flies'"),
        (["arguments.json"], "No such file or directory: .*arguments.json"),
        (["unknown.json"], "Some keys are not used by the HfArgumentParser: .*'wings'"),
        (["lacking.json"], "missing 1 required positional argument: 'dataset'"),
        ([], "nothing to do without --do_train"),
        (["--do_train", "--dataset", "nobody/nothing"], "'nobody/nothing' is neither a folder nor a Hub dataset"),
        (["--do_train", "--label_column", "kind"], r"its columns are \['image', 'label'\]"),
        (["--do_train", "--layers", "0:4"], "layer 4 is out of range for a backbone of 3 layers"),
        (["--do_train", "--recipe", "alff"], "recipe 'alff' is unknown: choose from"),
        (
            ["--do_train", "--backbone", "nobody/nothing"],
            "backbone 'nobody/nothing' is neither a folder nor a Hub model",
        ),
    ],
)
def test_bad_input(inputs, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "unknown.json").write_text(json.dumps({**inputs, "wings": 2}))
    (tmp_path / "lacking.json").write_text(json.dumps({"backbone": inputs["backbone"]}))
    if arguments and arguments[0].endswith(".json"):
        arguments = [str(tmp_path / arguments[0])]
    else:
        given = [f"--{name}={value}" for name, value in inputs.items()]
        arguments = [*given, "--use_cpu", "--output_dir", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    line = stopped.value.code  # Python prints it and exits with 1
    assert re.fullmatch(rf"run_layer_fusion.py: .*{message}.*", line), line
    assert not (tmp_path / "out").exists()


def test_lacking_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--dataset", "a"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert "the following arguments are required: --backbone" in capsys.readouterr().err
