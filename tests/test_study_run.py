"""A study from YAML to runs: every recipe, nothing twice, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

import numpy as np
import psutil
import pytest
import torch
import yaml
from datasets import DatasetDict, Image, load_from_disk

from hf_layerfusion import RECIPES, LayerFusionError, TokenBank
from hf_layerfusion.cli.main import main
from hf_layerfusion.layout import TokenLayout
from hf_layerfusion.recipes import FAMILIES
from hf_layerfusion.study import ComputeOptions, StudyConfig, StudyResults, run_study
from hf_layerfusion.study import run as run_module
from hf_layerfusion.training import fine_tuning

GRID = {"learning_rate": [0.1, 0.01]}
QUICK = {"base": "fast", "grid": GRID, "min_epochs": 4, "min_steps": 1}
DIGITS = {"id": "sklearn:digits", "max_train_rows": 60, "max_test_rows": 40}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny ViT in a folder."""
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    folder = tmp_path_factory.mktemp("backbone")
    ViTModel(ViTConfig(**shape, image_size=16, patch_size=8, initializer_range=0.3), False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def study_of(backbone, recipes=("linear-last", "linear-all"), **changes):
    content = {
        "name": "try",
        "backbones": [{"id": backbone, "name": "tiny"}],
        "datasets": [DIGITS],
        "recipes": list(recipes),
        "protocol": QUICK,
    }
    return {**content, **changes}


def run(content, folder, **options):
    report = run_study(StudyConfig.from_dict(content), folder, progress=False, **options)
    assert report.is_file()
    return StudyResults.load(folder)


def scores(results):
    """What a run says, without how long it took."""
    return {
        key: (one.balanced_accuracy, one.accuracy, one.validation_score, json.dumps(one.setting))
        for key, one in results.runs.items()
    }


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}


FINE_TUNED = [name for name, recipe in RECIPES.items() if recipe.kind == "fine_tune"]


@pytest.mark.slow
@pytest.mark.parametrize(("image_size", "epochs"), [(28, 5), (56, 10)], ids=["28", "56"])
def test_every_recipe_on_real_features(small_backbone_folder, tmp_path, monkeypatch, image_size, epochs):
    """Those that train the backbone on small images; at 56 pixels there are the four cells a side of `ridge-grid`."""
    monkeypatch.setattr(fine_tuning, "_SAVE_STEPS", 0.5)  # ten states would take longer than the training
    values = {"K": "9", "H": "4", "MODULE": "activation"}
    families = [":".join(values.get(part, part) for part in pattern.split(":")) for pattern in FAMILIES]
    # Of a family of grids, K is cells a side.
    families = [name.replace("-grid:9", "-grid:2") for name in families]
    heads = [name for name in (*RECIPES, *families) if name not in FINE_TUNED]
    recipes = FINE_TUNED if image_size == 28 else heads
    content = {
        **study_of(small_backbone_folder, recipes),
        "backbones": [{"id": small_backbone_folder, "name": "real", "image_size": image_size}],
        "datasets": [{"id": "sklearn:digits", "max_train_rows": 120, "max_test_rows": 60}],
        "protocol": {**QUICK, "grid": {"learning_rate": [0.01]}, "min_epochs": epochs, "min_steps": 1},
    }
    results = run(content, tmp_path)
    assert {key.recipe for key in results.runs} == {*recipes}
    assert not results.missing()
    accuracies = {key.recipe: one.accuracy for key, one in results.runs.items()}
    # One in ten would be right by chance; a test of 60 images with 0.3 has less than 1 in 10,000 odds to come from it.
    assert min(accuracies.values()) > 0.3, accuracies


def test_runs_say_what_they_are(backbone, tmp_path):
    content = study_of(backbone, ["linear-last", "alf", "knn-last", "module-logistic:2:fc1"], seeds=[3, 4], splits=2)
    results = run(content, tmp_path)
    # What scikit-learn fits does not depend on a seed.
    assert len(results.runs) == 2 * (2 + 2 + 1 + 1)
    one = results["tiny", "digits", 1, "alf", 4]
    assert one.setting["recipe"] == "alf"
    assert one.setting["learning_rate"] in GRID["learning_rate"]
    assert one.attention.shape == (6, 6)
    np.testing.assert_allclose(one.attention.sum(axis=1), 1, atol=1e-5)
    assert 0 < one.expected_depth <= 1
    assert one.values["bytes_per_image"] == 6 * 16 * 2
    assert results["tiny", "digits", 0, "module-logistic:2:fc1", 3].values["bytes_per_image"] == 32 * 2
    study = json.loads((tmp_path / "study.json").read_text())
    assert len(study["expected"]) == len(results.runs)
    assert study["resolved"] == {"backbones": {"tiny": None}, "datasets": {"digits": None}}
    assert (tmp_path / "similarity" / "tiny--digits.json").is_file()
    assert (tmp_path / "sweeps" / "tiny--digits--split0--alf.csv").is_file()
    assert not list((tmp_path / "running").iterdir())


def test_selection_and_training_never_see_test_rows(backbone, tmp_path):
    """Labels of test rows are changed: choices and predictions stay."""
    from hf_layerfusion.data import open_digits

    rows = open_digits()["train"].select(range(100))
    kinds = {}
    for name, labels in (("right", rows["label"][60:]), ("wrong", [(label + 1) % 10 for label in rows["label"][60:]])):
        test = rows.select(range(60, 100)).remove_columns("label").add_column("label", labels)
        splits = DatasetDict({"train": rows.select(range(60)), "test": test.cast(rows.features)})
        splits.save_to_disk(str(tmp_path / name))
        assert load_from_disk(str(tmp_path / name))["test"]["label"][:] == labels
        content = study_of(backbone, ["linear-all", "alf"], datasets=[{"id": str(tmp_path / name), "name": "digits"}])
        kinds[name] = run(content, tmp_path / f"study of {name}")
    for key, one in kinds["right"].runs.items():
        other = kinds["wrong"].runs[key]
        assert (one.setting, one.validation_score) == (other.setting, other.validation_score)
        predictions = [kinds[name].predictions(*key).predictions for name in kinds]
        np.testing.assert_array_equal(*predictions)


def test_finished_runs_are_not_repeated_and_more_may_be_added(backbone, tmp_path):
    first = run(study_of(backbone), tmp_path)
    before = times(tmp_path)
    assert scores(run(study_of(backbone), tmp_path)) == scores(first)
    assert times(tmp_path) == before
    more = run(study_of(backbone, ["linear-last", "linear-all", "alf-last"], seeds=[0, 1]), tmp_path)
    assert {name: when for name, when in times(tmp_path).items() if name in before} == before
    assert len(more.runs) == 6
    assert {key: more_scores for key, more_scores in scores(more).items() if key in first.runs} == scores(first)


@pytest.mark.parametrize(
    "change",
    [{"protocol": {**QUICK, "min_epochs": 5}}, {"datasets": [{**DIGITS, "max_train_rows": 50}]}, {"splits": 1}],
    ids=["protocol", "rows", "split"],
)
def test_runs_of_something_else_are_refused_or_replaced(backbone, tmp_path, change):
    run(study_of(backbone, ["linear-last"]), tmp_path)
    before = times(tmp_path)
    with pytest.raises(LayerFusionError, match="was made with another protocol, backbone, dataset or split"):
        run(study_of(backbone, ["linear-last"], **change), tmp_path)
    assert times(tmp_path) == before
    run(study_of(backbone, ["linear-last"], **change), tmp_path, overwrite=True)
    assert times(tmp_path) != before


def test_a_killed_study_goes_on_and_gives_the_same_table(backbone, tmp_path):
    content = study_of(backbone, ["linear-last", "linear-all", "alf", "alf-mean", "scalar-mix", "knn-last"], splits=2)
    content["protocol"] = {**QUICK, "min_steps": 75}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "hf_layerfusion.cli.main", "study", str(tmp_path / "study.yaml")]
    command += ["--output_dir", str(folder), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("runs/*.json"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {name: when for name, when in times(folder).items() if name.endswith(".json")}
    assert 3 <= len(before) < 12
    found = run(content, folder)
    assert {name: when for name, when in times(folder).items() if name in before} == before
    assert scores(found) == scores(run(content, tmp_path / "whole"))


def test_processes_side_by_side_give_the_same_table(backbone, tmp_path):
    content = study_of(backbone, ["linear-last", "linear-all", "alf", "knn-last"])
    alone = run(content, tmp_path / "one")
    beside = run(content, tmp_path / "two", compute=ComputeOptions(num_processes=2))
    assert scores(alone) == scores(beside)


def test_a_run_that_fails_does_not_stop_the_others(backbone, tmp_path, monkeypatch):
    run_job = run_module.run_job

    def fail(job):
        if job.recipe == "linear-all":
            raise LayerFusionError("every setting of the sweep diverged")
        run_job(job)

    monkeypatch.setattr(run_module, "run_job", fail)
    content = study_of(backbone, ["linear-all", "linear-last"])
    with pytest.raises(LayerFusionError, match=r"1 of 2 runs failed, all others are done .*linear-all: every setting"):
        run(content, tmp_path)
    results = StudyResults.load(tmp_path)
    assert [key.recipe for key in results.runs] == ["linear-last"]
    assert [key.recipe for key in results.missing()] == ["linear-all"]
    assert (tmp_path / "report" / "report.md").is_file()
    monkeypatch.undo()
    assert len(run(content, tmp_path).runs) == 2


def test_overwriting_leaves_no_runs_of_before(backbone, tmp_path):
    run(study_of(backbone, ["linear-last", "linear-all"], splits=2, seeds=[0, 1]), tmp_path)
    results = run(study_of(backbone, ["linear-last"]), tmp_path, overwrite=True)
    assert list(results.runs) == results.planned()


def test_a_failed_replacement_does_not_count_as_done(backbone, tmp_path, monkeypatch):
    def fail(job):
        raise LayerFusionError("diverged")

    run(study_of(backbone, ["linear-last"]), tmp_path)
    monkeypatch.setattr(run_module, "run_job", fail)
    with pytest.raises(LayerFusionError, match="1 of 1 runs failed"):
        run(study_of(backbone, ["linear-last"], protocol={**QUICK, "min_epochs": 5}), tmp_path, overwrite=True)
    assert len(StudyResults.load(tmp_path).missing()) == 1


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError(28, "No space left on device")])
def test_an_unexpected_error_does_not_stop_the_others(backbone, tmp_path, monkeypatch, error):
    run_job = run_module.run_job

    def fail(job):
        if job.recipe == "linear-all":
            raise error
        run_job(job)

    monkeypatch.setattr(run_module, "run_job", fail)
    with pytest.raises(LayerFusionError, match=f"1 of 2 runs failed.*{type(error).__name__}"):
        run(study_of(backbone, ["linear-all", "linear-last"]), tmp_path)
    assert [key.recipe for key in StudyResults.load(tmp_path).runs] == ["linear-last"]


def test_a_changed_grid_file_is_another_protocol(backbone, tmp_path):
    grid = tmp_path / "grid.json"

    def content(rate):
        grid.write_text(json.dumps({"learning_rate": [rate]}))
        return study_of(backbone, ["linear-last"], protocol={**QUICK, "grid": str(grid)})

    run(content(0.1), tmp_path / "out")
    with pytest.raises(LayerFusionError, match="was made with another protocol"):
        run(content(0.001), tmp_path / "out")


def test_everything_is_opened_before_anything_is_computed(backbone, tmp_path):
    backbones = [{"id": backbone, "name": "tiny"}, {"id": str(tmp_path / "none"), "name": "none"}]
    with pytest.raises(LayerFusionError, match="none"):
        run(study_of(backbone, ["linear-last"], backbones=backbones), tmp_path / "out")
    assert not (tmp_path / "out" / "features").exists()


def test_an_unreadable_image_fails_its_dataset_only(backbone, tmp_path):
    from hf_layerfusion.data import open_digits

    rows = open_digits()["train"].select(range(60)).cast_column("image", Image(decode=False))
    broken = rows.map(
        lambda row, number: {"image": {"bytes": b"none"} if number == 7 else row["image"]}, with_indices=True
    )
    broken = broken.cast_column("image", Image())
    DatasetDict({"train": broken.select(range(40)), "test": broken.select(range(40, 60))}).save_to_disk(
        str(tmp_path / "d")
    )
    datasets = [{"id": str(tmp_path / "d"), "name": "broken"}, DIGITS]
    with pytest.raises(LayerFusionError, match=r"1 of 2 runs failed.*broken.*row 7"):
        run(study_of(backbone, ["linear-last"], datasets=datasets), tmp_path / "out")
    assert [key.dataset for key in StudyResults.load(tmp_path / "out").runs] == ["digits"]


def test_another_study_s_folder(backbone, tmp_path):
    run(study_of(backbone, ["linear-last"]), tmp_path)
    with pytest.raises(LayerFusionError, match="holds the study 'try', and this one is 'other': give another folder"):
        run(study_of(backbone, ["linear-last"], name="other"), tmp_path)


def children_of(process):
    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_no_worker_outlives_its_study(backbone, tmp_path, how):
    content = study_of(backbone, ["alf", "alf-mean"], splits=2, protocol={**QUICK, "min_steps": 100_000})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "hf_layerfusion.cli.main", "study", str(tmp_path / "study.yaml")]
    command += ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--num_processes", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Whoever runs the tests in the background of a shell has it ignored, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("out/running/*"))) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = children_of(process)
        assert len(workers) >= 2
        os.kill(process.pid, how)
        _, errors = process.communicate(timeout=60)
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert b"finished runs of a study" in errors
        while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in workers):
            assert time.monotonic() < deadline + 60, "a worker lives on"
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_damaged_run_is_named(backbone, tmp_path):
    run(study_of(backbone, ["linear-last"]), tmp_path)
    (path,) = (tmp_path / "runs").glob("*.json")
    path.write_text("{")
    with pytest.raises(LayerFusionError, match=r"seed0\.json cannot be read .* delete it, and the run is made again"):
        run(study_of(backbone, ["linear-last"]), tmp_path)
    path.unlink()
    run(study_of(backbone, ["linear-last"]), tmp_path)


def test_a_recipe_that_the_backbone_cannot_serve_is_refused_first(backbone, tmp_path):
    with pytest.raises(LayerFusionError, match="layer 7 is out of range for a backbone of 3 layers"):
        run(study_of(backbone, ["linear-last", "linear-layer:7"]), tmp_path)
    assert not (tmp_path / "features").exists()


def test_few_shots(backbone, tmp_path):
    content = study_of(backbone, ["linear-last", "knn-last"], splits=2, protocol={**QUICK, "shots": 2})
    results = run(content, tmp_path)
    assert {one.values["train_rows"] for one in results.runs.values()} == {20}


LAYOUT = TokenLayout.of_plain_vit(384, 12, image_size=112, patch_size=14)


@pytest.mark.parametrize(("num_rows", "expected"), [(1000, 1), (1_000_000, 2)])
def test_wide_and_narrow_tokens_are_parted_where_padding_would_be_large(num_rows, expected):
    narrow = TokenBank.build(range(1, 13), ["block"], ["tokens"], LAYOUT)
    wide = TokenBank.build([6], ["activation"], ["mean"], LAYOUT)
    groups = run_module.group_banks([narrow, wide], LAYOUT, num_rows)
    assert len(groups) == expected
    assert {c for group in groups for c in group.coordinates} == {*narrow.coordinates, *wide.coordinates}


def test_tokens_of_one_width_are_one_cache():
    banks = [TokenBank.build([layer], ["block"], ["mean"], LAYOUT) for layer in (1, 2)]
    assert run_module.group_banks(banks, LAYOUT, 10**9) == [banks[0] | banks[1]]
    assert run_module.group_banks([], LAYOUT, 10) == []


# ---- the command -------------------------------------------------------------------------------------------------


def test_command(backbone, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study_of(backbone, ["linear-last"])))
    arguments = ["study", str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 0
    report = tmp_path / "out" / "report" / "report.md"
    assert f"report: {report}" in capsys.readouterr().out
    report.unlink()
    assert main([*arguments, "--report_only"]) == 0
    assert report.is_file()


def test_command_errors(tmp_path, capsys):
    assert main(["study", str(tmp_path / "nothing.yaml")]) == 1
    assert "nothing.yaml cannot be read" in capsys.readouterr().err
    (tmp_path / "study.yaml").write_text("name: try")
    assert main(["study", str(tmp_path / "study.yaml")]) == 1
    assert "'backbones' is missing" in capsys.readouterr().err
