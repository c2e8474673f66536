"""The benchmarks run to their end and print whole tables; what they measure is not tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "head.py": "--rows 3,3,32,8 5,2,32,4 --repeats 1",
    "epoch.py": "--rows 50 --layers 2 --width 48 --classes 5 --batch_size 16 --repeats 1 --folder {folder}",
    "extraction.py": "--batch_size 2 --image_size 28 --depths 1 --repeats 1",
    "cache_reading.py": "--rows 150 --layers 2 --width 48 --rows_per_shard 40 --batch_size 64 --repeats 1 "
    "--folder {folder}",
}
ROWS = {
    "head.py": {"as asked": 2},
    "epoch.py": {"textbook loop": 1, "ours: Trainer": 1},
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
}


@pytest.mark.slow
@pytest.mark.parametrize("script", TINY)
def test_benchmark_prints_a_row_for_every_variant(script, tmp_path):
    if script == "cache_reading.py" and sys.platform != "linux":
        pytest.skip("it reads a process's memory from /proc")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *TINY[script].format(folder=tmp_path).split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [re.split(r"  | \| ", line.strip(" |"))[-1] for line in done.stdout.splitlines()]
    assert {name: rows.count(name) for name in ROWS[script]} == ROWS[script]
    assert not list(tmp_path.iterdir()), "temporary files are left behind"
