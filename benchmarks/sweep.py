"""The paper's 63 settings in one sweep, against 63 textbook runs.

    python benchmarks/sweep.py [--rows 4000] [--epochs 40] [--batch_size 2048] [--sample 8] [--threads 1]

The textbook runs are timed on a sample of their steps, spread over the sweep's own running time so that both meet the
same machine, and extrapolated to 63 runs: median seconds of a step, times steps. Ours are whole sweeps, everything
counted but reading the features' labels: set-up, training, evaluation on a validation fifth, and the choice. The
textbook's time holds its training steps only. `full` trains all settings, `merged` one of those that weight decay makes
the same to 1 %.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; threads that spin distort timings

import torch
from measure import CLOCKS, table_head, table_row
from task import Task, build_task, textbook_steps
from transformers.utils import logging

from hf_layerfusion.sweeps import SweepResult, expand_grid, sweep


def time_textbook(task: Task, steps: int) -> list[float]:
    """Seconds of each of the first steps of one textbook run, behind one that warms up."""
    return textbook_steps(task, epochs=1000, max_steps=steps + 1)[1:]


def time_sweep(task: Task, strategy: str, epochs: int, device: str) -> tuple[float, SweepResult]:
    start = task.clock()
    result = sweep(
        task.features,
        grid="paper",
        strategy=strategy,
        num_epochs=epochs,
        batch_size=task.batch_size,
        refit=False,
        device=device,
        progress=False,
    )
    return task.clock() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--sample", type=int, default=8, help="textbook steps timed before, between and after")
    parser.add_argument("--strategies", default="full,merged")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, on a busy machine")
    parser.add_argument("--folder", help="where the temporary files go; by default the system's place for them")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        compare(build_task(Path(folder), arguments), arguments)


def compare(task: Task, arguments: argparse.Namespace) -> None:
    settings = len(expand_grid("paper"))
    steps: list[float] = time_textbook(task, arguments.sample)
    rows = []
    for strategy in arguments.strategies.split(","):
        seconds, result = time_sweep(task, strategy, arguments.epochs, arguments.device)
        steps += time_textbook(task, arguments.sample)
        rows.append((strategy, seconds, result))
    # The same rows as the sweep's training part: a fifth is held out for validation.
    trained = len(task.rows) - math.ceil(0.2 * len(task.rows))
    sizes = [min(task.batch_size, trained - start) for start in range(0, trained, task.batch_size)]
    per_row = statistics.median(steps) / min(task.batch_size, len(task.rows))
    textbook = settings * arguments.epochs * sum(sizes) * per_row
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {settings} settings x {arguments.epochs} epochs over "
        f"{len(task.rows)} rows ({trained} to train on) of {len(task.features.bank)} x {task.features.hidden_size}, "
        f"batch {task.batch_size}, {arguments.clock} time; the textbook is extrapolated from {len(steps)} steps\n"
    )
    print(table_head(("settings trained", "s", "ms per setting and step", "x textbook", "worst", "")))
    count = settings * arguments.epochs * len(sizes)
    print(table_row((settings, f"{textbook:.0f}", f"{1e3 * textbook / count:.0f}", "1.0", "", "63 textbook runs")))
    fastest = min(steps) / statistics.median(steps)
    for strategy, seconds, result in rows:
        trials = result.protocol["trained_settings"]
        each = 1e3 * seconds / (trials * arguments.epochs * len(sizes))
        ratio = textbook / seconds
        print(table_row((trials, f"{seconds:.0f}", f"{each:.0f}", f"{ratio:.1f}", f"{ratio * fastest:.1f}", strategy)))
    choices = {strategy: result.best for strategy, _, result in rows}
    print(f"\nchosen: {choices}")


if __name__ == "__main__":
    main()
