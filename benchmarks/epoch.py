"""One epoch of training a head on cached features: the textbook loop against ours.

    python benchmarks/epoch.py [--threads 1] [--repeats 3] [--folder WHERE]

All train the paper's head with class weights, Gaussian noise, clipped gradients, AdamW and a cosine by step. The textbook
loop reads float16 rows out of memory, one at a time; ours reads the cache. What is counted begins with the first batch
and ends with the last step: building models, optimizers and caches is not. The contenders take turns, behind a round that
warms up; ratios are medians over rounds, with the worst round in brackets.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; threads that spin distort timings

import torch
from measure import CLOCKS, Clock, speedup, table_head, table_row, take_turns
from task import LEARNING_RATE, NOISE_PROBABILITY, NOISE_STD, WEIGHT_DECAY, Task, build_task, textbook_steps
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from hf_layerfusion import LayerFusionConfig
from hf_layerfusion.sweeps.engine import Engine, Protocol, Rows
from hf_layerfusion.sweeps.settings import Setting
from hf_layerfusion.sweeps.stack import Trial
from hf_layerfusion.training import build_trainer


def textbook(task: Task) -> float:
    return sum(textbook_steps(task, epochs=1))


class Stopwatch(TrainerCallback):
    """Seconds from where the first epoch begins to where the last one ends."""

    def __init__(self, clock: Clock):
        self.clock, self.start, self.seconds = clock, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = self.clock()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds = self.clock() - self.start


def trainer(task: Task) -> float:
    """`transformers.Trainer` as `layerfusion train` builds it."""
    torch.manual_seed(0)
    task.model.head.reset_parameters()
    built = build_trainer(
        task.model,
        task.features,
        task.folder / "trainer",
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        num_train_epochs=1,
        batch_size=task.batch_size,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    built.remove_callback(PrinterCallback)
    stopwatch = Stopwatch(task.clock)
    built.add_callback(stopwatch)
    built.train()
    return stopwatch.seconds


class EpochTimer(Engine):
    """A sweep's engine that notes the seconds of its epochs, without what comes before and after."""

    def __init__(self, *arguments: object, clock: Clock, **options: object):
        super().__init__(*arguments, **options)
        self.clock, self.seconds = clock, 0.0

    def _train_epoch(self, *arguments: object) -> dict:
        start = self.clock()
        losses = super()._train_epoch(*arguments)
        self.seconds += self.clock() - start
        return losses


def engine(task: Task) -> float:
    """`sweep`'s engine with one setting."""
    config = task.model.config
    setting = Setting(
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        attention_dropout=0.0,
        noise_std=NOISE_STD,
        noise_probability=NOISE_PROBABILITY,
    )
    config = LayerFusionConfig(
        token_layout=config.token_layout,
        num_labels=task.num_labels,
        problem_type="single_label_classification",
        **setting.config_options,
    )
    rows = Rows(task.features, None, task.class_weights)
    protocol = Protocol(num_epochs=1, batch_size=task.batch_size)
    timer = EpochTimer([Trial(setting)], {setting: config}, [rows], protocol, clock=task.clock, progress=False)
    timer.run()
    return timer.seconds


# What takes turns, by the name it has in the table: an epoch from new, and the seconds of it that count. The first one is
# what the others are measured against.
CONTENDERS: dict[str, Callable[[Task], float]] = {
    "textbook loop": textbook,
    "ours: Trainer": trainer,
    "ours: sweep of one setting": engine,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, on a busy machine")
    parser.add_argument("--folder", help="where the temporary files go; by default the system's place for them")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        task = build_task(Path(folder), arguments)
        compare(task, arguments)


def compare(task: Task, arguments: argparse.Namespace) -> None:
    seconds = take_turns({name: partial(run, task) for name, run in CONTENDERS.items()}, arguments.repeats)
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), one epoch over {len(task.rows)} rows of "
        f"{len(task.features.bank)} x {task.features.hidden_size} float16, {task.num_labels} classes, batch "
        f"{task.batch_size}, {arguments.repeats} rounds, {arguments.clock} time\n"
    )
    reference = seconds[next(iter(CONTENDERS))]
    print(table_head(("s", "rows/s", "x textbook", "")))
    for name, own in seconds.items():
        median = statistics.median(own)
        print(table_row((f"{median:.2f}", f"{len(task.rows) / median:.0f}", speedup(reference, own), name)))


if __name__ == "__main__":
    main()
