"""Sweeps that are killed, repeated, shared out, cut short, or asked for what cannot be."""

import copy
import gc
import inspect
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sweep_helpers import (
    BANK,
    CLASSES,
    LAYERS,
    ROWS,
    WIDTH,
    class_labels,
    draw_nothing,
    learnable_tokens,
    write_features,
)

from hf_layerfusion import LayerFeatures, LayerFusionConfig, LayerFusionError, sweep
from hf_layerfusion.bank import TokenBank
from hf_layerfusion.heads import build_head
from hf_layerfusion.sweeps import Setting, SweepResult
from hf_layerfusion.sweeps import engine as engine_module
from hf_layerfusion.sweeps import run as run_module
from hf_layerfusion.sweeps import state as state_module
from hf_layerfusion.sweeps.stack import HeadStack, Trial, state_bytes
from hf_layerfusion.sweeps.state import SweepState, TrialRun, load_state, save_state

HELPERS = Path(__file__).with_name("sweep_helpers.py")

ALF = {"recipe": "alf", "num_heads": 4}
# Settings of several shapes, with everything that is random switched on.
GRID = [
    {**ALF, "learning_rate": 1e-2, "attention_dropout": [0.0, 0.3], "noise_std": 0.05},
    {"recipe": "linear-last", "learning_rate": [1e-1, 1e-2], "balance_classes": [True, False]},
]
FILES = {"sweep.json", "sweep.png", "trials.csv", "head-seed0.safetensors"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the processes that the tests start, so that numbers can be compared to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "train")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr(SweepResult, "plot", draw_nothing)


@pytest.fixture
def warnings(monkeypatch):
    """What the engine and its state warn of."""
    said = []
    for module in (engine_module, state_module):
        monkeypatch.setattr(module.logger, "warning", said.append)
    return said


# One at a time: then a head's numbers do not depend on the others to the bit.
PLAIN = {"grid": GRID, "num_epochs": 4, "batch_size": 20, "heads_at_once": 1, "progress": False}


def run(features, **options):
    return sweep(features, **{**PLAIN, **options})


def curves_of(result):
    """Every curve by what it is of, NaN told as text, so that equal curves compare equal."""
    fields = {trial["setting"]: {name: trial[name] for name in result.best.to_dict()} for trial in result.trials}
    return {
        json.dumps([fields[curve["setting"]], curve["seed"], curve["fold"]]): json.dumps(
            [curve["epochs"], curve["scores"], curve["losses"]]
        )
        for curve in result.curves
    }


def curve_of(result, trial):
    return next(c for c in result.curves if all(c[name] == trial[name] for name in ("setting", "seed", "fold")))


def assert_same(found, expected):
    """To the last bit."""
    assert found.trials == expected.trials
    assert curves_of(found) == curves_of(expected)
    assert found.best == expected.best
    assert found.config.to_dict() == expected.config.to_dict()
    assert_same_heads(found, expected)


def assert_same_heads(found, expected):
    assert list(found.heads) == list(expected.heads)
    for seed, state in expected.heads.items():
        assert found.heads[seed].keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(found.heads[seed][name], tensor), name


def names_in(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


# ---- resuming ----------------------------------------------------------------------------------------------------

# Four moments per file that is written: four states in the selection and four while the chosen setting is trained again,
# then the files of the result. Negative ones count from the end.
PER_FILE, STATES = 4, 8
MOMENTS = {
    "before the first state": [1],
    "first state half written": [2],
    "third state half written": [10],
    "selection done": [16],
    "second state of the refit half written": [22],
    "first file half written": [34],
    "twice in the selection": [6, 6],
    "three times": [3, 9, 14],
    **{f"{-moment} from the end": [moment] for moment in (-1, -2, -3, -4, -5, -6)},
    **{f"at random {moment}": [int(moment)] for moment in np.random.default_rng(0).integers(1, 40, 2)},
}
KILLED = {**PLAIN, "save_seconds": 0}


def memory_for(heads):
    """Bytes that so many of the largest heads need while they are trained."""
    from transformers import ViTConfig

    backbone = ViTConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS)
    config = LayerFusionConfig(backbone_config=backbone, num_labels=CLASSES, num_heads=4)
    return heads * state_bytes(config, torch.float32)


def run_helpers(plan, folder):
    """Run sweeps one after the other, in processes of their own; returns the codes they ended with, and what was said."""
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(HELPERS), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def expected(features):
    """The sweep that nobody killed."""
    return run(features)


@pytest.fixture(scope="module")
def helped(features, finished, tmp_path_factory):
    """The folders of `killed` and `shared`, made by one program, whose start takes longer than all its sweeps."""
    folder = tmp_path_factory.mktemp("killed")
    jobs = [(name, moment, {}) for name, moments in MOMENTS.items() for moment in moments]
    jobs += [("a stack", 6, STACKED), ("overwriting", PER_FILE * (STATES + 1), {"overwrite": True})]
    jobs += [
        ("first of rounds", 6, {"max_memory": memory_for(2)}),
        ("second of rounds", 18, {"max_memory": memory_for(2)}),
    ]
    folders = {name: folder / str(number) for number, (name, *_) in enumerate(jobs)}
    shutil.copytree(finished, folders["overwriting"])
    plan = [
        {
            "features": str(features.folder),
            "moment": moment,
            "options": {**KILLED, **more, "output_dir": str(folders[name])},
        }
        for name, moment, more in jobs
    ]
    plan.append({"features": str(features.folder), "shared": SHARED, "folder": str(folder / "shared")})
    codes, said = run_helpers(plan, folder)
    assert codes == [-9] * len(jobs) + [0, 0], said[-3000:]
    assert "heads x steps" not in said
    return folders, folder / "shared"


@pytest.fixture(scope="module")
def killed(helped):
    """For each name in `MOMENTS`, and a few more, the output folder of a sweep that was killed."""
    return helped[0]


@pytest.fixture(scope="module")
def shared(helped):
    """What two processes made of `SHARED`."""
    return helped[1]


# One head of a stack diverges at once and is dropped, so that the stack that goes on is a smaller one.
STACKED = {
    "grid": {**ALF, "learning_rate": [1e6, 1e-2, 1e-3, 3e-3], "attention_dropout": 0.1},
    "heads_at_once": 3,
}
SHARED = {
    "several": {**KILLED, "seeds": [0, 1, 2]},
    "uneven": {**KILLED, "grid": GRID[0], "max_memory": memory_for(1)},
    "one": {**KILLED, "grid": {"recipe": "linear-last", "learning_rate": 1e-2}},
}


@pytest.fixture
def killed_copy(killed, tmp_path):
    """A folder to spoil, of a sweep killed when it had saved two epochs."""
    return copy_of(killed["third state half written"], tmp_path)


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "out"))


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_sweep_goes_on(features, expected, killed, tmp_path, name):
    folder = copy_of(killed[name], tmp_path) if killed[name].exists() else tmp_path / "out"
    assert_same(run(features, output_dir=folder, save_seconds=0), expected)
    assert names_in(folder) == FILES
    assert_same(SweepResult.load(folder), expected)


def test_goes_on_with_what_was_left_of_a_stack(features, killed, tmp_path):
    found = run(features, **STACKED, output_dir=copy_of(killed["a stack"], tmp_path), save_seconds=0)
    assert [trial["stopped"] for trial in found.trials] == ["diverged", None, None, None]
    assert_same(found, run(features, **STACKED))


@pytest.mark.parametrize("name", ["first of rounds", "second of rounds", "third state half written"])
@pytest.mark.parametrize("heads", [1, 2, 100])
def test_goes_on_with_other_memory(features, expected, killed, tmp_path, name, heads):
    """Memory that is free changes between runs, so the rounds of the killed one must not be taken for those of now."""
    folder = copy_of(killed[name], tmp_path)
    assert_same(run(features, output_dir=folder, max_memory=memory_for(heads)), expected)


def test_trains_only_the_rest(features, killed_copy, monkeypatch):
    """Two of four epochs of the selection were saved."""
    steps = []
    train_step = HeadStack.train_step
    monkeypatch.setattr(HeadStack, "train_step", lambda *args: steps.append(1) or train_step(*args))
    result = run(features, output_dir=killed_copy)
    trained = result.protocol["trained_settings"]
    assert len(steps) == 2 * math.ceil(0.8 * ROWS / 20) * trained + 4 * math.ceil(ROWS / 20)


def _foreign(path):
    save_file({"x": torch.zeros(3)}, path)


def _without_record(path):
    save_file({"x": torch.zeros(3)}, path, metadata={"sweep": "[1, 2]"})


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: flip(path, 8 * path.stat().st_size - 2),  # of the exponent of the last number
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"no safetensors" * 100),
        _foreign,
        _without_record,
    ],
    ids=["a flipped bit", "truncated", "empty", "garbage", "foreign", "another record"],
)
def test_damaged_state_begins_anew(features, expected, killed_copy, warnings, spoil):
    spoil(killed_copy / "sweep-state" / "selection-0.safetensors")
    assert_same(run(features, output_dir=killed_copy), expected)
    [warning] = warnings
    assert re.search("cannot be read.*begins anew", warning)
    assert names_in(killed_copy) == FILES


def test_state_is_read_as_it_was_written_or_not_at_all(tmp_path, warnings):
    """Whichever bit of the file is flipped."""
    first, second = trials = [Trial(Setting()), Trial(Setting(), seed=1)]
    heads = [{"weight": torch.randn(2, 3), "count": torch.tensor(7)} for _ in trials]
    runs = {trial: TrialRun(epochs=[1], scores=[0.3], losses=[1.7], epochs_trained=2) for trial in trials}
    state = SweepState([[first], [second]], runs, {first: heads[0]}, wave=1, epoch=2, training={second: heads[1]})
    path = tmp_path / "sweep-state" / "selection-0.safetensors"
    save_state(path, state, trials, identity="of this sweep", share="0 of 1")

    def load():
        return load_state(path, trials, identity="of this sweep", share="0 of 1", overwrite=False)

    found = load()
    for field in ("waves", "runs", "wave", "epoch"):
        assert getattr(found, field) == getattr(state, field)
    for field in ("trained", "training"):
        torch.testing.assert_close(getattr(found, field), getattr(state, field), rtol=0, atol=0)
    assert not warnings
    bits = np.random.default_rng(0).choice(8 * path.stat().st_size, 300, replace=False).tolist()
    for bit in bits:
        flip(path, bit)
        assert load() is None, f"bit {bit}"
        flip(path, bit)
    assert len(warnings) == len(bits)
    assert load() is not None


def test_unfinished_sweep_of_something_else(features, expected, killed_copy):
    """Hours of work are thrown away only if that is asked for."""
    with pytest.raises(LayerFusionError, match=r"unfinished sweep of something else.*overwrite=True"):
        run(features, output_dir=killed_copy, grid=GRID[1])
    found = run(features, output_dir=killed_copy, grid=GRID[1], overwrite=True)
    assert_same(found, run(features, grid=GRID[1]))
    assert names_in(killed_copy) == FILES


@pytest.fixture(scope="module")
def finished(features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(features, output_dir=folder, seeds=[0, 1])
    return folder


def test_finished_sweep_is_returned_at_once(features, finished, monkeypatch):
    expected = SweepResult.load(finished)
    before = {file: file.stat().st_mtime_ns for file in finished.iterdir()}
    monkeypatch.setattr(engine_module.Engine, "run", None)
    assert_same(run(features, output_dir=finished, seeds=[0, 1], save_seconds=1, progress=True), expected)
    assert {file: file.stat().st_mtime_ns for file in finished.iterdir()} == before


@pytest.mark.parametrize(
    "changed",
    [
        {"grid": GRID[0]},
        {"dtype": torch.float64},
        {"seeds": [1, 0]},
        {"split_seed": 1},
        {"metric": "accuracy"},
        {"num_epochs": 3},
        {"batch_size": 19},
        {"strategy": "full"},
        {"refit": False},
        {"patience": 2},
        {"num_folds": 2},
        {"groups": np.arange(ROWS) // 2},
        {"autocast": "bfloat16"},
        {"token_normalization": "none"},
        {"id2label": ["ape", "boa", "cod"]},
        {"id2label": ["ant", "bee", "cat", "dog"]},
    ],
    ids=str,
)
def test_another_sweep_is_refused(features, finished, changed):
    before = {file: file.stat().st_mtime_ns for file in finished.iterdir()}
    with pytest.raises(LayerFusionError, match=r"sweep of something else.*overwrite=True"):
        run(features, output_dir=finished, **{"seeds": [0, 1], **changed})
    assert {file: file.stat().st_mtime_ns for file in finished.iterdir()} == before


def test_other_rows_are_refused(features, finished):
    for rows in (np.arange(ROWS - 1), np.arange(ROWS)[::-1].copy()):
        with pytest.raises(LayerFusionError, match="sweep of something else"):
            run(features.select_rows(rows), output_dir=finished, seeds=[0, 1])


def test_another_view_is_refused(tmp_path):
    labels = class_labels(30)
    tokens = torch.cat([learnable_tokens(labels, seed=seed) for seed in (0, 1)])
    both = write_features(tmp_path / "train", np.concatenate([labels, labels]), tokens, num_views=2)
    run(both.view(0), output_dir=tmp_path / "out")
    with pytest.raises(LayerFusionError, match="sweep of something else"):
        run(both.view(1), output_dir=tmp_path / "out")


def test_features_of_a_dataset_are_told_apart(features, tmp_path):
    """Where no checksum stands beside the tokens, and rows are counted anew."""
    other = write_features(tmp_path / "other", tokens=learnable_tokens(class_labels(), seed=1))
    first, second = range(ROWS - CLASSES), range(CLASSES, ROWS)  # with the same labels
    run(LayerFeatures.from_dataset(features.dataset.select(first)), output_dir=tmp_path / "out")
    for dataset in (other.dataset.select(first), features.dataset.select(second)):
        with pytest.raises(LayerFusionError, match="sweep of something else"):
            run(LayerFeatures.from_dataset(dataset), output_dir=tmp_path / "out")


def test_overwriting_leaves_nothing_of_the_old(features, expected, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "out"))
    (folder / "head-seed0.safetensors.123.tmp").write_bytes(b"of a killed sweep")
    (folder / "mine.txt").write_text("not the sweep's")
    assert_same(run(features, output_dir=folder, overwrite=True), expected)
    assert names_in(folder) == FILES | {"mine.txt"}


def test_killed_while_overwriting(features, expected, killed, tmp_path):
    """Heads of the new sweep never lie beside the result of the old."""
    folder = copy_of(killed["overwriting"], tmp_path)
    with pytest.raises(LayerFusionError, match="no finished sweep"):
        SweepResult.load(folder)
    assert_same(run(features, output_dir=folder), expected)
    assert names_in(folder) == FILES


@pytest.mark.parametrize("name", ["sweep.json", "head-seed1.safetensors"])
def test_damaged_result_is_refused_and_replaced(features, finished, tmp_path, name):
    folder = Path(shutil.copytree(finished, tmp_path / "out"))
    os.truncate(folder / name, 100)
    with pytest.raises(LayerFusionError, match="overwrite=True"):
        run(features, output_dir=folder, seeds=[0, 1])
    found = run(features, output_dir=folder, seeds=[0, 1], overwrite=True)
    assert_same(found, SweepResult.load(finished))


@pytest.mark.parametrize("output", ["sweeps/first", None])
def test_writes_nowhere_else(features, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    places = [Path(os.environ["HF_HOME"]), features.folder.parent]
    before = [names_in(place) for place in places]
    run(features, output_dir=output, save_seconds=0)
    expected = set() if output is None else {"sweeps", "sweeps/first", *(f"sweeps/first/{name}" for name in FILES)}
    assert names_in(tmp_path) == expected
    assert [names_in(place) for place in places] == before


def test_output_dir_that_is_no_folder(features, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(engine_module.Engine, "run", None)  # hours later would be too late
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LayerFusionError, match="output_dir"):
            run(features, output_dir=folder)


# ---- the same, whatever else -------------------------------------------------------------------------------------


def test_depends_on_no_global_state_and_leaves_it(features, expected):
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.inference_mode():
        found = run(features)
        assert torch.is_inference_mode_enabled()
    assert_same(found, expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_changes_no_argument(features):
    grid, seeds, groups = copy.deepcopy(GRID), [0, 1], list(range(ROWS))
    labels, tokens = features.labels.copy(), features.tensors()["layer_features"].clone()
    run(features, grid=grid, seeds=seeds, groups=groups, num_epochs=1)
    assert (grid, seeds, groups) == (GRID, [0, 1], list(range(ROWS)))
    assert (features.labels == labels).all()
    assert torch.equal(features.tensors()["layer_features"], tokens)


MANY = {
    "grid": [*GRID, {"recipe": ["linear-all", "scalar-mix"]}, {**ALF, "recipe": "alf-quarterly", "num_queries": 2}],
    "seeds": [0, 3],
    "num_folds": 2,
}


@pytest.fixture(scope="module")
def many(features):
    """Recipes, seeds and folds in one sweep."""
    return run(features, **MANY)


def test_does_not_depend_on_what_else_is_swept(features, many):
    together = curves_of(many)
    alone = {}
    for part in MANY["grid"][::-1]:
        for seed in MANY["seeds"][::-1]:
            alone |= curves_of(run(features, **{**MANY, "grid": part, "seeds": [seed], "refit": False}))
    assert alone == together


def test_refit_from_other_seeds(features, tmp_path):
    options = {"grid": {"learning_rate": [0.01, 0.001]}, "num_epochs": 3, "heads_at_once": 1, "progress": False}
    chosen_by_one = sweep(features, refit_seeds=(1, 2), output_dir=tmp_path, plot=False, **options)
    assert [trial["seed"] for trial in chosen_by_one.trials] == [0, 0]
    assert list(chosen_by_one.heads) == [1, 2]
    assert not (tmp_path / "sweep.png").exists()
    best = {"grid": {"learning_rate": chosen_by_one.best.learning_rate}}
    expected = sweep(features, seeds=(1, 2), **{**options, **best})
    for seed in (1, 2):
        for name, value in expected.head_state(seed).items():
            assert torch.equal(chosen_by_one.head_state(seed)[name], value)
    again = sweep(features, refit_seeds=(1, 2), output_dir=tmp_path, plot=False, **options)
    assert again.protocol["identity"] == chosen_by_one.protocol["identity"]
    with pytest.raises(LayerFusionError, match=r"seeds=\[1, 1\]: give a list of one or several different"):
        sweep(features, refit_seeds=[1, 1], **options)


def test_a_head_alone_reads_features(features):
    result = sweep(features, grid={"learning_rate": 0.01}, num_epochs=2, progress=False)
    model = result.build_model()
    batch = features.select_bank(model.config.bank).tensors()
    with torch.no_grad():
        logits = model(layer_features=batch["layer_features"]).logits
    head = build_head(result.config).eval()
    head.load_state_dict(result.head_state())
    with torch.no_grad():
        expected = head(torch.nn.functional.normalize(batch["layer_features"], dim=-1))
    torch.testing.assert_close(logits, expected)
    with pytest.raises(LayerFusionError, match="this model holds a head only"):
        model(torch.zeros(1, 3, 16, 16))


def test_stacks_change_nothing_but_rounding(features):
    options = {**MANY, "dtype": torch.float64, "refit": False}
    one, three = (run(features, **options, heads_at_once=count) for count in (1, 3))
    assert len(one.curves) == len(three.curves)
    for found, expected in zip(three.curves, one.curves, strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        assert found["scores"] == expected["scores"]


def test_rounds_change_nothing(features, expected, warnings):
    assert_same(run(features, max_memory=memory_for(2)), expected)
    assert re.search("6 heads .* in 2 rounds of up to", warnings[0])


def test_merged_trains_what_full_trains(features):
    """Decays that differ by a hair are one run, those that differ by much are two."""
    grid = {"recipe": ["linear-last", "alf"], "num_heads": 4, "weight_decay": [1e-7, 1e-6, 1.0], "learning_rate": 1e-2}
    full, merged = (run(features, grid=grid, strategy=strategy) for strategy in ("full", "merged"))
    assert [trial["trained_as"] for trial in full.trials] == [0, 1, 2, 3, 4, 5]
    assert [trial["trained_as"] for trial in merged.trials] == [1, 1, 2, 4, 4, 5]
    by_setting = {trial["setting"]: trial["score"] for trial in full.trials}
    assert [trial["score"] for trial in merged.trials] == [by_setting[t["trained_as"]] for t in merged.trials]
    assert curves_of(merged).items() < curves_of(full).items()
    assert merged.protocol["trained_settings"] == 4


RECIPE_TOKENS = {
    "alf": [(layer, "block") for layer in range(1, 7)],
    "alf-quarterly": [(layer, "block") for layer in (1, 3, 4, 6)],
    "alf-mid-last": [(layer, "block") for layer in (3, 6)],
    "linear-all": [(layer, "block") for layer in range(1, 7)],
    "linear-last-cls-mean": [(6, "final_norm")],
    "scalar-mix": [(layer, "block") for layer in range(1, 7)],
}


@pytest.mark.parametrize("recipe", RECIPE_TOKENS)
def test_reads_the_tokens_of_its_recipe(features, tmp_path, recipe):
    """From a cache that holds others too, in an order of its own, as from one that holds nothing else."""
    bank = [[layer, module, pool] for layer, module in RECIPE_TOKENS[recipe] for pool in ("cls", "mean")]
    positions = [BANK.index(coordinate) for coordinate in bank]
    only = write_features(tmp_path / "only", tokens=features.tensors()["layer_features"][:, positions], bank=bank)
    options = {"recipe": recipe, "grid": {"num_heads": 4, "noise_std": 0.05}}
    assert_same(run(features, **options), run(only, **options))


def test_what_else_the_features_do_does_not_matter(features, expected):
    """Tokens in view in another order, moved to a device, or handed out with their statistics."""
    reversed_bank = TokenBank(features.bank.coordinates[::-1])
    for same in (features.select_bank(reversed_bank), features.to("cpu"), features.with_statistics()):
        assert_same(run(same), expected)


def test_padding_is_not_read(features, expected, tmp_path):
    """A cache is as wide as its widest token; the tokens of a recipe may all be narrower."""
    tokens = torch.nn.functional.pad(features.tensors()["layer_features"], (0, 8), value=math.e)
    assert_same(run(write_features(tmp_path / "wide", tokens=tokens)), expected)


def test_float16_cache(features, tmp_path):
    tokens = features.tensors()["layer_features"].half()
    narrow, wide = (write_features(tmp_path / dtype, tokens=tokens, dtype=dtype) for dtype in ("float16", "float32"))
    assert_same(run(narrow), run(wide))


@pytest.mark.parametrize(
    ("options", "tolerance"), [({"autocast": "bfloat16"}, 0.05), ({"dtype": torch.float64}, 1e-4)], ids=str
)
def test_other_precisions(features, options, tolerance):
    grid = {
        **ALF,
        "recipe": ["alf", "linear-last"],
        "learning_rate": 1e-2,
    }  # noise is drawn in the heads' own precision
    found, expected = run(features, grid=grid, **options), run(features, grid=grid)
    for curve, reference in zip(found.curves, expected.curves, strict=True):
        assert curve["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert {tensor.dtype for tensor in found.heads[0].values()} <= {options.get("dtype", torch.float32), torch.int64}


# ---- processes ---------------------------------------------------------------------------------------------------


def test_two_processes(features, shared, monkeypatch):
    for name, options in SHARED.items():
        expected = run(features, **options)
        for folder in (name, f"{name}-of-0", f"{name}-of-1"):
            found = SweepResult.load(shared / folder)
            assert_same(found, expected)
            assert found.curves == expected.curves  # in the same order
        assert names_in(shared / name) == FILES | {f"head-seed{seed}.safetensors" for seed in options.get("seeds", [])}
    monkeypatch.setattr(engine_module.Engine, "run", None)
    assert_same(run(features, **SHARED["one"], output_dir=shared / "one"), expected)  # whoever trained it


# ---- memory ------------------------------------------------------------------------------------------------------


def test_too_little_memory(features):
    with pytest.raises(LayerFusionError, match=r"one head needs .* raise max_memory"):
        run(features, max_memory=memory_for(1) - 1)


def test_halving_in_rounds_is_refused(features):
    with pytest.raises(LayerFusionError, match=r"halving.*6 heads.*raise max_memory, or use strategy='merged'"):
        run(features, max_memory=memory_for(2), strategy="halving")


def test_nothing_stays_alive(features, tmp_path, monkeypatch):
    alive = []
    initialise = engine_module.Engine.__init__

    def note(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(engine_module.Engine, "__init__", note)
    run(features, num_epochs=1)  # what is kept once, such as imports
    gc.collect()
    before = live_numbers()
    result = run(features, output_dir=tmp_path / "out", save_seconds=0, refit=False)
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    assert live_numbers() == before
    assert result.curves


def live_numbers():
    """How many numbers all tensors that Python knows of hold."""
    # By type, since asking some objects what they are makes them import what they stand for.
    return sum(found.numel() for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter))


def test_memory_does_not_grow(features, killed, tmp_path, monkeypatch):
    """Nor is what a state held kept when a sweep has gone on from it."""
    held = []
    evaluate = engine_module.Engine._evaluate

    def note(self, epoch, *args):
        if epoch in (3, 12):
            gc.collect()
            held.append(live_numbers())
        return evaluate(self, epoch, *args)

    monkeypatch.setattr(engine_module.Engine, "_evaluate", note)
    run(features, num_epochs=12, refit=False)
    run(features, output_dir=copy_of(killed["third state half written"], tmp_path))
    early, late, resumed, _ = held  # the last while the chosen head is trained alone
    # Noise falls on more rows of one epoch than of another.
    assert max(early, late, resumed) < 1.05 * min(early, late, resumed)


# ---- heads that stop -------------------------------------------------------------------------------------------------


STOPPING = {
    "grid": {**ALF, "learning_rate": [1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4], "attention_dropout": 0.1},
    "num_epochs": 20,
    "seeds": [0, 1],
    "strategy": "full",
    "refit": False,
}


@pytest.fixture(scope="module")
def to_the_end(features):
    """The same heads, none of them stopped, evaluated after every epoch."""
    result = run(features, **STOPPING)
    assert all(curve["epochs"] == list(range(1, 21)) for curve in result.curves)
    return result


def test_patience(features, to_the_end):
    found = run(features, **{**STOPPING, "refit": True}, patience=3)
    stops, best_epochs = set(), {}
    for trial in found.trials:
        curve, whole = curve_of(found, trial), curve_of(to_the_end, trial)
        scores = whole["scores"]
        waits = [epoch - scores[:epoch].index(max(scores[:epoch])) - 1 for epoch in range(1, 21)]
        last = next((epoch for epoch, wait in enumerate(waits, 1) if wait >= 3), 20)
        stops.add(last)
        assert curve["scores"] == scores[:last]
        assert curve["losses"] == whole["losses"][:last]
        assert trial["epochs_trained"] == last
        assert trial["stopped"] == ("patience" if last < 20 else None)
        if last < 20:
            assert trial["score"] == max(scores[:last])
            assert trial["best_epoch"] == scores[:last].index(max(scores[:last])) + 1
        else:
            assert (trial["score"], trial["best_epoch"]) == (scores[-1], 20)
        best_epochs.setdefault(trial["setting"], []).append(trial["best_epoch"])
    assert len(stops) > 2  # not all at once
    chosen = next(row["setting"] for row in found.summary() if row["learning_rate"] == found.best.learning_rate)
    assert found.protocol["refit_epochs"] == round(np.mean(best_epochs[chosen]))


@pytest.mark.parametrize("heads_at_once", [1, 3])
def test_diverging_heads_are_marked_and_left(features, tmp_path, heads_at_once):
    grid = {**ALF, "learning_rate": [1e-2, 1e300, 1e-3], "attention_dropout": 0.1}
    options = {"dtype": torch.float64, "heads_at_once": heads_at_once, "seeds": [0, 1]}
    found = run(features, grid=grid, output_dir=tmp_path / "out", **options)
    assert [trial["stopped"] for trial in found.trials] == [None, None, "diverged", "diverged", None, None]
    assert [trial["score"] is None for trial in found.trials] == [False, False, True, True, False, False]
    assert found.best.learning_rate != 1e300
    assert found.summary()[-1]["learning_rate"] == 1e300
    assert math.isnan(found.summary()[-1]["mean"])
    alone = run(features, grid={**grid, "learning_rate": [1e-2, 1e-3]}, **options)
    kept = [curve for curve in found.curves if curve["setting"] != 1]
    assert len(kept) == len(alone.curves)
    for curve, reference in zip(kept, alone.curves, strict=True):
        assert curve["losses"] == pytest.approx(reference["losses"], rel=1e-9)
    assert_same(SweepResult.load(tmp_path / "out"), found)


@pytest.mark.parametrize("strategy", ["merged", "halving"])
def test_all_diverging(features, tmp_path, strategy):
    with pytest.raises(LayerFusionError, match=r"diverged.*smaller learning rates"):
        run(features, grid={**ALF, "learning_rate": [1e6, 1e7]}, strategy=strategy, output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_halving_drops_the_worse(tmp_path):
    features = write_features(tmp_path / "train", targets(1), learnable_tokens(class_labels()), label_names=None)
    found, full = (run(features, **{**STOPPING, "strategy": strategy}) for strategy in ("halving", "full"))
    scores = {(curve["setting"], curve["seed"]): curve["scores"] for curve in full.curves}
    alive = list(range(6))
    last = dict.fromkeys(alive, 20)
    for epoch, count in ((3, 3), (6, 2), (12, 1)):
        mean = {number: sum(scores[number, seed][epoch - 1] for seed in (0, 1)) for number in alive}
        ranked = sorted(alive, key=lambda number: -mean[number])
        last |= dict.fromkeys(ranked[count:], epoch)
        alive = ranked[:count]
    for trial in found.trials:
        curve, number, seed = curve_of(found, trial), trial["setting"], trial["seed"]
        assert trial["epochs_trained"] == last[number]
        assert trial["stopped"] == ("halving" if last[number] < 20 else None)
        assert curve["scores"] == scores[number, seed][: last[number]]
        assert trial["score"] == (None if last[number] < 20 else scores[number, seed][-1])
    assert found.best.learning_rate == STOPPING["grid"]["learning_rate"][alive[0]]


def test_halving_with_patience_can_choose_a_setting_that_stopped(features):
    """A seed that stops early takes neither its setting nor its other seeds out of the race."""
    found = run(features, **{**STOPPING, "strategy": "halving", "patience": 2, "seeds": [0, 1, 2, 3]})
    by_setting = {}
    for trial in found.trials:
        by_setting.setdefault(trial["setting"], []).append(trial)
    assert any({t["stopped"] for t in members} >= {"patience"} for members in by_setting.values())
    chosen = next(m for m in by_setting.values() if m[0]["learning_rate"] == found.best.learning_rate)
    assert all(trial["score"] is not None for trial in chosen)
    # The best at the first rung goes on or stopped by itself: it was not dropped.
    at_rung = {}
    for curve in found.curves:
        seen = [score for epoch, score in zip(curve["epochs"], curve["scores"], strict=True) if epoch <= 3]
        at_rung.setdefault(curve["setting"], []).append(seen)
    assert all(len(seen) == 3 for runs in at_rung.values() for seen in runs)
    best = max(at_rung, key=lambda number: sum(seen[-1] for seen in at_rung[number]))
    dropped_at_once = [t for t in by_setting[best] if t["stopped"] == "halving" and t["epochs_trained"] == 3]
    assert not dropped_at_once


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_seen(monkeypatch):
    """The rows that each engine is given: a list of folds, `(training rows, validation rows)`."""
    seen = []
    initialise = engine_module.Engine.__init__

    def note(self, trials, configs, rows, *args, **kwargs):
        folds = [(fold.train, fold.validation) for fold in rows]
        seen.append([tuple(None if part is None else part.source_rows.tolist() for part in fold) for fold in folds])
        initialise(self, trials, configs, rows, *args, **kwargs)

    monkeypatch.setattr(engine_module.Engine, "__init__", note)
    return seen


def test_has_no_test_rows():
    assert not [name for name in inspect.signature(sweep).parameters if "test" in name or "eval" in name]


def test_rows_of_selection_and_refit(features, rows_seen):
    given = np.arange(0, ROWS, 2)
    run(features.select_rows(given), num_folds=3, num_epochs=1)
    selection, refit = rows_seen
    assert refit == [(given.tolist(), None)]
    assert sorted(row for _, held_out in selection for row in held_out) == given.tolist()
    for train, held_out in selection:
        assert sorted(train + held_out) == given.tolist()


def test_rows_that_were_not_given_are_not_read(tmp_path, features):
    """Poison in them reaches nothing."""
    given = np.arange(0, ROWS, 2)
    tokens = features.tensors()["layer_features"].clone()
    tokens[1::2] = math.nan
    poisoned = write_features(tmp_path / "poisoned", tokens=tokens)
    assert_same(run(poisoned.select_rows(given)), run(features.select_rows(given)))


def test_groups_stay_together(features, rows_seen):
    groups = (np.arange(ROWS) * 7 % 20).tolist()
    for options in ({"num_folds": 3}, {"validation_size": 0.25}):
        run(features, groups=groups, num_epochs=1, refit=False, **options)
        for train, held_out in rows_seen.pop():
            assert not {groups[row] for row in train} & {groups[row] for row in held_out}
            assert len(train) + len(held_out) == ROWS


def test_rows_without_a_label_are_left_out(tmp_path, rows_seen):
    labels = class_labels()
    tokens = learnable_tokens(labels)
    labelled = np.arange(ROWS) % 9 != 4
    partly = write_features(tmp_path / "partly", np.where(labelled, labels, -100), tokens, label_names=None)
    wholly = write_features(
        tmp_path / "wholly", labels[labelled], tokens[torch.from_numpy(labelled)], label_names=None
    )
    assert_same(run(partly), run(wholly))
    groups = np.arange(ROWS) // 2
    assert_same(run(partly, groups=groups), run(wholly, groups=groups[labelled]))
    assert all(not {4, 13} & {*train, *(held_out or [])} for folds in rows_seen[:2] for train, held_out in folds)


def test_no_labelled_row(tmp_path):
    nobody = write_features(
        tmp_path / "nobody", np.full(ROWS, -100), learnable_tokens(class_labels()), label_names=None
    )
    with pytest.raises(LayerFusionError, match="no labelled row"):
        run(nobody)


def test_one_row_left_over(features):
    """A training batch of one row has no variance."""
    found = run(features, grid=[*GRID, {**ALF, "num_queries": 2}], batch_size=59)
    assert all(math.isfinite(loss) for curve in found.curves for loss in curve["losses"])
    assert found.heads[0]


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_class_of_one_row(tmp_path):
    labels = class_labels()
    labels[labels == 2] = 1
    labels[7] = 2
    lonely = write_features(tmp_path / "lonely", labels, learnable_tokens(labels))
    with pytest.raises(LayerFusionError, match="cannot be split for validation"):
        run(lonely)
    # In folds it is validated once, and trained on in the other.
    found = run(lonely, num_folds=2)
    assert all(math.isfinite(trial["score"]) for trial in found.trials)


def test_class_without_rows(tmp_path, features, expected):
    """Its weight is zero; heads have an output for it."""
    names = ["ant", "bee", "cat", "dog"]
    more = write_features(tmp_path / "more", tokens=features.tensors()["layer_features"], label_names=names)
    found = run(more)
    assert found.config.id2label == dict(enumerate(names))
    assert found.heads[0]["classifier.bias"].shape == (4,)
    assert len(found.trials) == len(expected.trials)


# ---- kinds of problems -------------------------------------------------------------------------------------------


def several_labels(rows=ROWS):
    """Floats, `(rows, 3)`."""
    classes = class_labels(rows)
    return np.stack([classes == 0, classes != 1, classes == 2], axis=1).astype(np.float32)


def targets(width):
    values = np.stack([class_labels() - 1.0, class_labels() * 2.0], axis=1).astype(np.float32)
    return values[:, 0] if width == 1 else values


@pytest.mark.parametrize(
    ("labels", "options", "metric", "num_labels"),
    [
        (several_labels(), {}, "mean_average_precision", 3),
        (several_labels(), {"metric": "macro_f1"}, "macro_f1", 3),
        (several_labels(), {"id2label": ["a", "b", "c"]}, "mean_average_precision", 3),
        (targets(1), {}, "mse", 1),
        (targets(1), {"metric": "r2"}, "r2", 1),
        (targets(2), {"problem_type": "regression"}, "mse", 2),
        (targets(2), {"problem_type": "regression", "metric": "mae"}, "mae", 2),
        (class_labels(), {"problem_type": "regression"}, "mse", 1),
    ],
    ids=lambda value: None if isinstance(value, np.ndarray) else str(value),
)
def test_other_problems(tmp_path, labels, options, metric, num_labels):
    tokens = learnable_tokens(class_labels(), noise=1.0)
    other = write_features(tmp_path / "other", labels, tokens, label_names=None)
    grid = [{"recipe": "linear-all", "learning_rate": 3e-2}, {**ALF, "learning_rate": 1e-2, "attention_dropout": 0.0}]
    found = run(other, grid=grid, num_epochs=20, **options)
    assert found.metric == metric
    assert found.heads[0]["classifier.bias"].shape == (num_labels,)
    assert found.config.num_labels == num_labels
    for curve in found.curves:
        assert curve["losses"][-1] < 0.7 * curve["losses"][0]
        assert (curve["scores"][-1] < 0) == (metric in ("mse", "mae"))
    assert found.curves[1]["scores"][-1] > found.curves[1]["scores"][0]  # larger is better, of errors too
    assert found.scores() == [max(trial["score"] for trial in found.trials)]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"num_labels": 4}, ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]),
        ({"id2label": ["x", "y", "z"]}, ["x", "y", "z"]),
        ({"id2label": {2: "z", 0: "x", 1: "y"}}, ["x", "y", "z"]),
        ({"id2label": ("x", "y", "z"), "num_labels": 3}, ["x", "y", "z"]),
    ],
    ids=str,
)
def test_labels_without_names(tmp_path, features, given, names):
    tokens = features.tensors()["layer_features"]
    found = run(write_features(tmp_path / "plain", tokens=tokens, label_names=None), num_epochs=1, **given)
    assert [found.config.id2label[number] for number in range(found.config.num_labels)] == names


def test_many_at_once(many):
    """Every combination has its row, in the order of the settings, then seeds, then folds."""
    settings = list(dict.fromkeys(trial["setting"] for trial in many.trials))
    assert [(t["setting"], t["seed"], t["fold"]) for t in many.trials] == [
        (setting, seed, fold) for setting in settings for seed in (0, 3) for fold in (0, 1)
    ]
    assert {trial["recipe"] for trial in many.trials} == {
        *("alf", "linear-last", "linear-all", "scalar-mix", "alf-quarterly")
    }
    assert len({json.dumps(curve["losses"]) for curve in many.curves}) == len(many.curves)
    means = {row["setting"]: row["mean"] for row in many.summary()}
    assert np.mean(many.scores()) == pytest.approx(max(means.values()))
    assert list(many.heads) == [0, 3]


def test_scores_are_balanced_accuracy(features, rows_seen, tmp_path):
    """Of the head that was refitted, when it is evaluated by hand on the rows it was trained on; and by the table."""
    found = run(features, grid={"recipe": "linear-last", "learning_rate": 1e-1}, num_epochs=30)
    tokens = features.select(layers=[LAYERS], modules=["final_norm"], pools=["cls"]).tensors()["layer_features"]
    tokens = torch.nn.functional.normalize(tokens, dim=-1).flatten(1)
    state = found.heads[0]
    guessed = (tokens @ state["classifier.weight"].T + state["classifier.bias"]).argmax(dim=1).numpy()
    recall = [(guessed[features.labels == label] == label).mean() for label in range(CLASSES)]
    assert np.mean(recall) > 0.6  # of chance's 0.33
    _, held_out = rows_seen[0][0]
    assert len(found.curves[0]["scores"]) == 20  # thirty epochs, twenty points
    per_class = len(held_out) // CLASSES
    assert found.trials[0]["score"] * CLASSES * per_class == pytest.approx(
        round(found.trials[0]["score"] * CLASSES * per_class)
    )


# ---- what cannot be ----------------------------------------------------------------------------------------------

WRONG = [
    ({"strategy": "half"}, "'half'.*full, merged, halving"),
    ({"recipe": "alfalfa", "grid": {}}, "'alfalfa'.*linear-last"),
    ({"recipe": 5, "grid": {}}, "recipe.*5"),
    ({"grid": [{"recipe": "alf-paper"}]}, "lacks layer 2 · ln2 · cls"),
    ({"grid": []}, "no setting"),
    ({"grid": {"learning_rates": [1]}}, "'learning_rates'.*learning_rate"),
    ({"grid": {"learning_rate": []}}, "no value for 'learning_rate'"),
    ({"grid": {"learning_rate": 0}}, "learning_rate=0"),
    ({"grid": {"attention_dropout": 2.0}}, "attention_dropout=2.0"),
    ({"grid": {"num_heads": 99}}, "num_heads=99"),
    ({"grid": {"attention_dropout": [[0.1]]}}, "attention_dropout"),
    ({"grid": 5}, "5"),
    ({"metric": "accuracies"}, "'accuracies'.*choose from accuracy, balanced_accuracy"),
    ({"metric": "mse"}, "'mse'.*choose from accuracy"),
    ({"metric": "top5_accuracy"}, "top5_accuracy"),
    ({"seeds": []}, r"seeds=\[\]"),
    ({"seeds": [0, 0]}, r"seeds=\[0, 0\].*different"),
    ({"seeds": [0.5]}, r"seeds=\[0.5\]"),
    ({"seeds": [-1]}, r"seeds=\[-1\]"),
    ({"seeds": [2**70]}, r"seeds="),
    ({"seeds": 3}, "seeds=3"),
    ({"seeds": None}, "seeds=None"),
    ({"num_folds": 1}, "num_folds=1.*2 or more"),
    ({"num_folds": 2.0}, "num_folds=2.0"),
    ({"num_folds": 76}, "cannot be split.*num_folds"),
    ({"validation_size": 0}, "validation_size=0"),
    ({"validation_size": 1.0}, "validation_size=1.0"),
    ({"validation_size": "0.2"}, "validation_size='0.2'"),
    ({"validation_size": None}, "validation_size=None"),
    ({"validation_size": 0.01}, "cannot be split.*validation_size"),
    ({"groups": [1, 2]}, "groups.*2 entries.*75 rows"),
    ({"groups": 5}, "groups"),
    ({"groups": [0] * ROWS}, "cannot be split"),
    ({"num_epochs": 0}, "num_epochs=0"),
    ({"num_epochs": 2.5}, "num_epochs=2.5"),
    ({"num_epochs": True}, "num_epochs=True"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": "8"}, "batch_size='8'"),
    ({"patience": 0}, "patience=0"),
    ({"patience": "2"}, "patience='2'"),
    ({"patience": 1.5}, "patience=1.5"),
    ({"heads_at_once": 0}, "heads_at_once=0"),
    ({"heads_at_once": -1}, "heads_at_once=-1"),
    ({"heads_at_once": "2"}, "heads_at_once='2'"),
    ({"max_memory": 0}, "max_memory"),
    ({"max_memory": "1GB"}, "max_memory='1GB'"),
    ({"max_memory": 10}, "one head needs.*raise max_memory"),
    ({"save_seconds": "x"}, "save_seconds='x'"),
    ({"autocast": "bfloat61"}, "autocast.*'bfloat61'.*bfloat16"),
    ({"autocast": "int8"}, "autocast.*'int8'.*bfloat16"),
    ({"dtype": "float32"}, "dtype.*'float32'.*torch.float32"),
    ({"dtype": torch.int32}, "dtype.*torch.int32.*torch.float32"),
    ({"device": "gpu"}, "device.*gpu"),
    ({"id2label": ["ant", "bee"]}, "label 2.*2 labels"),
    ({"id2label": {"a": "ant"}}, "id2label"),
    ({"id2label": {0: "a", 2: "b", 3: "c"}}, r"id2label.*\[0, 2, 3\]"),
    ({"id2label": 5}, "id2label=5"),
    ({"num_labels": 5}, "num_labels=5.*3 class names"),
    ({"problem_type": "classification"}, "'classification'"),
    ({"problem_type": "multi_label_classification"}, "labels have 1 number per row.*problem_type"),
    ({"problem_type": "regression"}, "labels have 1 number per row.*problem_type"),
    ({"dropout": 0.1}, "'dropout'.*attention_dropout"),
    ({"width_alignment": "project"}, "width_alignment='project'.*build_trainer"),
    ({"width_alignment": "stretch"}, "'stretch'.*pad"),
    ({"layers": [7]}, "layer 7.*6 layers"),
    ({"modules": ["ln2"]}, "lacks layer 1 · ln2 · cls"),
    ({"class_weights": [1.0, 2.0, 3.0]}, "class_weights.*balance_classes"),
    ({"freeze_backbone": False}, "freeze_backbone.*Trainer"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_clear_errors(features, tmp_path, options, message):
    """One line that names the value and what would be right; nothing is left behind."""
    with pytest.raises(LayerFusionError, match=message) as raised:
        run(features, output_dir=tmp_path / "out", **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "sweep.json").exists()


def _with(row, value):
    tokens = learnable_tokens(class_labels())
    tokens[row, BANK.index([3, "block", "mean"])] = value
    return tokens


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda folder: write_features(folder, tokens=_with(17, math.nan)), "row 17.*NaN.*layer 3 · block · mean"),
        (
            lambda folder: write_features(folder, tokens=_with(50, math.inf)),
            "row 50.*infinite.*layer 3 · block · mean",
        ),
        (lambda folder: write_features(folder, with_labels=False), "no labels.*label_column"),
        (lambda folder: write_features(folder).select_rows([]), "no labelled row"),
        (lambda folder: write_features(folder).select(layers=[1, 2]), "lacks layer 3"),
        (lambda folder: write_features(folder).select_rows([0, 1, 2]), "3 rows cannot be split"),
        (
            lambda folder: write_features(
                folder, class_labels() - 2 * (class_labels() == 1), _with(0, 1), label_names=None
            ),
            "row 1 has label -1",
        ),
        (
            lambda folder: write_features(folder, targets(1) * math.nan, _with(0, 1), label_names=None),
            "row 0.*label",
        ),
    ],
    ids=["NaN", "infinite", "no labels", "no rows", "fewer tokens", "three rows", "label -1", "NaN target"],
)
def test_features_that_cannot_be_trained_on(tmp_path, made, message, monkeypatch):
    features = made(tmp_path / "features")
    monkeypatch.setattr(engine_module.Engine, "run", None)
    with pytest.raises(LayerFusionError, match=message):
        run(features, grid=[GRID[0]])


def test_tokens_that_no_setting_reads_may_be_anything(tmp_path, features):
    tokens = features.tensors()["layer_features"].clone()
    tokens[3, BANK.index([3, "block", "mean"])] = math.nan
    partly = write_features(tmp_path / "partly", tokens=tokens)
    assert_same(run(partly, grid=GRID[1]), run(features, grid=GRID[1]))


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (several_labels(), {"num_labels": 4}),
        (several_labels(), {"id2label": ["a", "b"]}),
        (targets(1), {"num_labels": 2}),
        (targets(1), {"problem_type": "regression", "num_labels": 3}),
    ],
    ids=lambda value: None if isinstance(value, np.ndarray) else str(value),
)
def test_labels_of_another_width(tmp_path, labels, options):
    other = write_features(tmp_path / "other", labels, learnable_tokens(class_labels()), label_names=None)
    with pytest.raises(LayerFusionError, match="label"):
        run(other, **options)


def test_wrong_metric_of_another_problem(tmp_path):
    other = write_features(tmp_path / "other", several_labels(), learnable_tokens(class_labels()), label_names=None)
    with pytest.raises(LayerFusionError, match=r"'accuracy'.*macro_f1, micro_f1, mean_average_precision"):
        run(other, metric="accuracy")


def test_features_opened_again_are_the_same(features, finished, monkeypatch):
    """The identity is of what the rows are, not of the object that holds them."""
    monkeypatch.setattr(run_module.Engine, "run", None)
    assert run(LayerFeatures.open(features.folder), output_dir=finished, seeds=[0, 1]).heads.keys() == {0, 1}
