"""The folder of a study as tables, and what is refused."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from study_helpers import dump, write_study

from hf_layerfusion import LayerFusionError
from hf_layerfusion.study.results import RunKey, StudyResults
from hf_layerfusion.study.statistics import balanced_accuracy

KEY = RunKey("tiny", "digits", 1, "alf", 0)


@pytest.fixture
def folder(tmp_path):
    return write_study(
        tmp_path / "study", datasets=["digits", "emoji"], recipes=["linear-last", "alf", "linear-layer:3"]
    )


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    dump(path, content)


def test_a_row_for_each_run(folder):
    results = StudyResults.load(folder)
    table = results.table()
    assert len(table) == len(results.runs) == 2 * 2 * 3 * 2
    assert set(map(tuple, table[list(RunKey._fields)].itertuples(index=False))) == set(results.runs)
    row = table[(table.dataset == "digits") & (table.split == 1) & (table.recipe == "alf") & (table.seed == 0)].iloc[0]
    content = json.loads((folder / "runs" / f"{KEY.stem}.json").read_text())
    assert row.balanced_accuracy == content["metrics"]["balanced_accuracy"]
    assert row.expected_depth == content["depth"]["expected_depth"]
    assert (row.setting_learning_rate, row.num_tokens, row.num_layers, row.test_rows) == (0.01, 24, 12, 120)
    dataset = results.dataset
    assert dataset.column_names == list(table.columns)
    assert dataset["balanced_accuracy"][:] == table.balanced_accuracy.tolist()


def test_order_is_that_of_the_config(tmp_path):
    recipes = ["linear-layer:10", "linear-layer:2", "alf", "linear-last"]
    folder = write_study(tmp_path, recipes=recipes, datasets=["b", "a"], backbones=["z", "y"])
    results = StudyResults.load(folder)
    assert results.recipes == ["linear-layer:2", "linear-layer:10", "alf", "linear-last"]
    assert (results.datasets, results.backbones) == (["b", "a"], ["z", "y"])
    assert [key.recipe for key in results.runs][:: 2 * 2][:4] == results.recipes
    edit(folder / "study.json", lambda study: study["config"].update(recipes=["alf"]))
    assert StudyResults.load(folder).recipes[0] == "alf"  # runs that the config no longer has come last


def test_predictions(folder):
    results = StudyResults.load(folder)
    found = results.predictions(*KEY)
    assert balanced_accuracy(found) == pytest.approx(results[KEY].balanced_accuracy)
    assert found.rows.dtype == found.labels.dtype == found.predictions.dtype == np.int64
    by_split = results.all_predictions("tiny", "digits", "alf")
    assert [len(runs) for runs in by_split.values()] == [2, 2]
    assert np.array_equal(by_split[1][0].predictions, found.predictions)
    with pytest.raises(LayerFusionError, match="has no run tiny--digits--split5--alf--seed0"):
        results.predictions("tiny", "digits", 5, "alf", 0)


def test_mixed_settings(folder):
    """One name, a number in one recipe and a text or a list in another."""
    stems = [KEY.stem, KEY._replace(recipe="linear-last").stem]
    for stem, setting in zip(stems, [{"k": "all", "weights": [1, 2]}, {"k": 5}], strict=True):
        edit(folder / "runs" / f"{stem}.json", lambda content, setting=setting: content.update(setting=setting))
    table = StudyResults.load(folder).table()
    assert set(table.setting_k.dropna()) == {"all", "5"}
    assert set(table.setting_weights.dropna()) == {"[1, 2]"}
    assert set(StudyResults.load(folder).dataset["setting_k"]) == {"all", "5", None}


def test_diverged_runs_have_no_score(folder):
    nothing = {"balanced_accuracy": None, "accuracy": math.nan}
    edit(folder / "runs" / f"{KEY.stem}.json", lambda content: content.update(metrics=nothing))
    results = StudyResults.load(folder)
    assert results.diverged() == [KEY]
    assert len(results.scores("tiny", "digits", "alf")[1]) == 1
    assert len(results.all_predictions("tiny", "digits", "alf")[1]) == 1
    assert not results.missing()
    assert math.isnan(results.table().set_index(["dataset", "split", "recipe", "seed"]).loc[KEY[1:]].accuracy)


def test_missing_runs(folder):
    assert not StudyResults.load(folder).missing()
    for suffix in (".json", ".safetensors"):
        (folder / "runs" / f"{KEY.stem}{suffix}").unlink()
    assert StudyResults.load(folder).missing() == [KEY]
    # What is not listed is expected all the same if the study has not come to it, with families as they stand there.
    edit(folder / "study.json", lambda study: study["config"]["datasets"].append({"name": "later"}))
    first, *others = StudyResults.load(folder).missing()
    assert first == KEY
    assert {key.dataset for key in others} == {"later"}
    assert len(others) == 2 * 3 * 2
    assert {key.recipe for key in others} == {"linear-last", "alf", "linear-layer:*"}


@pytest.mark.parametrize(
    "change",
    [
        lambda study: study.update(config=[]),
        lambda study: study["config"]["datasets"].append("emoji"),
        lambda study: study["config"]["backbones"].append({"id": "x"}),
        lambda study: study["config"].update(recipes=None),
        lambda study: study["config"].update(splits="two"),
        lambda study: study["expected"].append({"backbone": "tiny"}),
        lambda study: study.update(expected=3),
    ],
)
def test_a_study_file_that_is_none(folder, change):
    edit(folder / "study.json", change)
    with pytest.raises(LayerFusionError, match=r"study\.json is damaged \(.*run the study again"):
        StudyResults.load(folder)


def test_a_study_without_runs(tmp_path):
    results = StudyResults.load(write_study(tmp_path, datasets=[]))
    assert (results.runs, results.datasets, results.missing(), len(results.table())) == ({}, [], [], 0)
    with pytest.raises(LayerFusionError, match="no finished run yet"):
        _ = results.dataset


def test_similarities(tmp_path):
    folder = write_study(tmp_path, similarity=True, datasets=["b", "a"])
    found = StudyResults.load(folder).similarities()
    assert [entry["dataset"] for entry in found] == ["b", "a"]
    assert found[0]["linear_cka"].shape == (24, 24) == (len(found[0]["token_names"]),) * 2
    path = folder / "similarity" / "tiny--a.json"
    edit(path, lambda content: content["linear_cka"].pop())
    with pytest.raises(
        LayerFusionError, match=r"tiny--a\.json is damaged \(a matrix of shape \(23, 24\) for 24 tokens\)"
    ):
        StudyResults.load(folder).similarities()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("metrics"), r"is damaged \(it has no 'metrics'\)"),
        (lambda c: c["metrics"].pop("accuracy"), "it has no 'accuracy'"),
        (lambda c: c["metrics"].update(balanced_accuracy=71.5), "balanced_accuracy is 71.5, no number from 0 to 1"),
        (lambda c: c["metrics"].update(balanced_accuracy="high"), "balanced_accuracy is 'high'"),
        (lambda c: c.update(metrics=3), "is damaged"),
        (lambda c: c.update(seed=1.0), "seed is 1.0, no whole number"),
        (lambda c: c.update(test_rows=True), "test_rows is True, no whole number"),
        (lambda c: c.update(backbone=None), "backbone is None, no text"),
        (lambda c: c.update(bank=[[1, "block"]]), "is damaged"),
        (lambda c: c.update(attention=[[1, 2], [3]]), "is damaged"),
        (lambda c: c.update(attention=[1, 2]), "attention has 1 dimensions, not 2"),
        (lambda c: c.update(depth={"entropy": 1}), "it has no 'expected_depth'"),
        (lambda c: c.update(setting=["lr"]), "setting is"),
        (lambda c: c.update(seed=7), r"holds the run tiny--digits--split1--alf--seed7: give it back its name"),
        (lambda c: c.update(dataset="emoji"), "holds the run tiny--emoji--split1--alf--seed0"),
    ],
)
def test_damaged_runs_are_refused_by_name(folder, change, message):
    path = folder / "runs" / f"{KEY.stem}.json"
    edit(path, change)
    with pytest.raises(LayerFusionError, match=message) as caught:
        StudyResults.load(folder)
    assert str(path) in str(caught.value)
    assert "remove it, and run the study again" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b'{"backbone": "ti', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "no mapping"),
    ],
)
@pytest.mark.parametrize("name", [f"runs/{KEY.stem}.json", "study.json"])
def test_files_that_are_no_json(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(LayerFusionError, match=message) as caught:
        StudyResults.load(folder)
    assert str(folder / name) in str(caught.value)


def test_what_is_not_there(folder, tmp_path):
    with pytest.raises(LayerFusionError, match=r"study\.json is missing: run the study first"):
        StudyResults.load(tmp_path / "nothing")
    # Of a run that was killed, the tensors may be there without the JSON file, and files that are not yet whole.
    (folder / "runs" / f"{KEY.stem}.json").rename(folder / "runs" / f"{KEY.stem}.json.123.tmp")
    assert KEY not in StudyResults.load(folder).runs
    (folder / "runs" / f"{KEY.stem}.json.123.tmp").rename(folder / "runs" / f"{KEY.stem}.json")
    (folder / "runs" / f"{KEY.stem}.safetensors").unlink()
    with pytest.raises(LayerFusionError, match=f"{KEY.stem}.json has no {KEY.stem}.safetensors beside it"):
        StudyResults.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("rows"), "it has no 'rows'"),
        (lambda t: t.update(rows=t["rows"][:-1]), r"rows is int64 \(119,\), not int64 \(120,\)"),
        (lambda t: t.update(labels=t["labels"].astype(np.int32)), "labels is int32"),
        (lambda t: t.update(predictions=np.zeros_like(t["labels"])), "their balanced accuracy is 0.250000, but"),
        (lambda t: t.update(predictions=t["predictions"] - 9), "predictions has -9, which is no class"),
        (lambda t: t.update(rows=np.zeros_like(t["rows"])), "a row stands in it twice"),
    ],
)
def test_damaged_predictions_are_refused_by_name(folder, change, message):
    path = folder / "runs" / f"{KEY.stem}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    results = StudyResults.load(folder)  # does not read them
    with pytest.raises(LayerFusionError, match=message) as caught:
        results.predictions(*KEY)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, -8])
def test_truncated_predictions(folder, keep):
    path = folder / "runs" / f"{KEY.stem}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LayerFusionError, match=r"alf--seed0\.safetensors is damaged"):
        StudyResults.load(folder).predictions(*KEY)
