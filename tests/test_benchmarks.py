"""The benchmarks run to their end and print whole tables; what they measure is not tested."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sweep_helpers import class_labels, learnable_tokens, write_features
from transformers.utils import logging

from hf_layerfusion.sweeps import expand_grid, sweep

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "head.py": "--rows 3,3,32,8 5,2,32,4 --repeats 1",
    "epoch.py": "--rows 50 --layers 2 --width 48 --classes 5 --batch_size 16 --repeats 1 --folder {folder}",
    "sweep.py": "--rows 60 --layers 2 --width 48 --classes 3 --batch_size 24 --epochs 1 --sample 2 --folder {folder}",
    "extraction.py": "--batch_size 2 --image_size 28 --depths 1 --repeats 1",
    "cache_reading.py": "--rows 150 --layers 2 --width 48 --rows_per_shard 40 --batch_size 64 --repeats 1 "
    "--folder {folder}",
    "ridge.py": "--rows 60 --layers 2 --width 48 --classes 3 --rounds 1",
}
ROWS = {
    "head.py": {"as asked": 2},
    "epoch.py": {"textbook loop": 1, "ours: Trainer": 1, "ours: sweep of one setting": 1},
    "sweep.py": {"63 textbook runs": 1, "full": 1, "merged": 1},
    "extraction.py": {
        "bare forward": 1,
        "bare forward, again": 1,
        "ours: pooled inside hooks": 2,  # in the table of memory and in that of time
        "output_hidden_states, pooled after": 2,
        "clones of blocks and LN2, pooled after": 2,
    },
    "cache_reading.py": {
        "numpy memmap, fancy indexing": 1,
        "ours: LayerFeatures.batches": 1,
        "ours: DataLoader with our collator": 1,
        "datasets, with_format('torch')": 1,
    },
    "ridge.py": {"`solve_ridge`": 1, "scikit-learn's `Ridge`": 1, "`linear-all`, 3 settings of 1000 steps": 1},
}


@pytest.fixture
def _as_it_was(monkeypatch):
    """What benchmarks change in the process that they run in."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    logging.enable_progress_bar()


@pytest.mark.slow
@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.parametrize("script", TINY)
def test_benchmark_prints_a_row_for_every_variant(script, tmp_path, monkeypatch, capsys):
    if script == "cache_reading.py" and sys.platform != "linux":
        pytest.skip("it reads a process's memory from /proc")
    command = [str(BENCHMARKS / script), *TINY[script].format(folder=tmp_path).split()]
    if script == "extraction.py":  # starts processes that read the script anew
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed = done.stdout
    else:
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(command[0], run_name="__main__")
        printed = capsys.readouterr().out
    rows = [re.split(r"  | \| ", line.strip(" |"))[-1] for line in printed.splitlines()]
    assert {name: rows.count(name) for name in ROWS[script]} == ROWS[script]
    assert not list(tmp_path.iterdir()), "temporary files are left behind"


@pytest.mark.slow
def test_what_is_read_off_the_curves_is_what_halving_does(tmp_path, monkeypatch):
    """`strategies.py` runs halving on the curves of a full sweep; the engine's own must end with the same settings."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import strategies

    labels = class_labels(120)
    features = write_features(tmp_path / "features", labels, learnable_tokens(labels, noise=4.0))
    grid = {"learning_rate": [3e-2, 1e-2, 1e-3], "weight_decay": [1e-1, 1.0], "attention_dropout": [0.0, 0.5]}
    options = {"grid": grid, "num_epochs": 20, "batch_size": 30, "heads_at_once": 1, "refit": False}
    options["progress"] = False
    full = sweep(features, strategy="full", **options)
    settings = expand_grid(grid)
    curves = strategies.curves_of(full, settings)
    survivors, cost = strategies.halve(curves, strategies.PLANS["halving"])
    halved = sweep(features, strategy="halving", **options)
    assert 0 < cost < len(settings) * strategies.CURVE_POINTS / 2
    left = {row["setting"]: row["score"] for row in halved.trials if row["score"] is not None}
    assert left == {settings.index(setting): score for setting, score in survivors.items()}
    assert sum(row["epochs_trained"] for row in halved.trials) == cost


@pytest.mark.slow
def test_strategies_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import strategies

    labels = class_labels(100)
    for split, seed in (("train", 0), ("test", 1)):
        write_features(tmp_path / "features" / "noise" / split, labels, learnable_tokens(labels, seed=seed))
    arguments = f"strategies.py --features_dir {tmp_path / 'features'} --output_dir {tmp_path / 'out'} --num_epochs 20"
    grid = tmp_path / "grid.yaml"
    grid.write_text("learning_rate: [1e-2, 1e-3]\nweight_decay: [1e-6, 1e-5, 1e-1]\nattention_dropout: 0.0\n")
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--grid", str(grid)])
    strategies.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| noise")]
    assert [row[1] for row in rows] == ["full", "merged", *strategies.PLANS]
    costs = [float(row[2]) for row in rows]
    assert costs[0] == 1.0
    assert costs[1] < 1.0
    assert max(costs[2:]) < costs[1]
    assert rows[0][4] == rows[0][6] == "0.0", "nothing is better than itself"
