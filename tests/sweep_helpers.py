"""Tiny feature caches that sweeps run on, and, run as a program, sweeps that are killed or shared by two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import PartialState
from datasets import ClassLabel, List, Value

from hf_layerfusion import LayerFeatures, LayerFusionError
from hf_layerfusion.features.extract import _write_shard
from hf_layerfusion.features.manifest import Manifest
from hf_layerfusion.layout import TokenLayout
from hf_layerfusion.sweeps import result, run, state

WIDTH, LAYERS, CLASSES, ROWS = 16, 6, 3, 75
SHARD_ROWS = 40
# What all recipes of the tests read, in an order that is no recipe's.
BANK = [[LAYERS, "final_norm", pool] for pool in ("cls", "mean")]
BANK += [[layer, "block", pool] for pool in ("mean", "cls") for layer in range(1, LAYERS + 1)]


def class_labels(rows: int = ROWS) -> np.ndarray:
    return np.arange(rows) % CLASSES


def learnable_tokens(labels: np.ndarray, noise: float = 2.0, seed: int = 0, bank: Sequence = BANK) -> torch.Tensor:
    """`(rows, N, D)`: for every label a point of its own per token, in noise that leaves errors to be made."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(int(labels.max()) + 1, len(bank), WIDTH))
    tokens = points[labels] + noise * rng.normal(size=(len(labels), len(bank), WIDTH))
    return torch.from_numpy(tokens).float()


def write_features(
    folder: Path,
    labels: np.ndarray | None = None,
    tokens: torch.Tensor | None = None,
    *,
    dtype: str = "float32",
    bank: Sequence = BANK,
    label_names: Sequence[str] | None = ("ant", "bee", "cat"),
    with_labels: bool = True,
    num_views: int = 1,
) -> LayerFeatures:
    """A finished cache in several shards; labels are classes, floats, or lists of floats."""
    labels = class_labels() if labels is None else np.asarray(labels)
    tokens = learnable_tokens(labels, bank=bank) if tokens is None else tokens
    if labels.ndim > 1:
        kind: Any = List(Value("float32" if labels.dtype.kind == "f" else "int64"))
    elif labels.dtype.kind == "f":
        kind = Value("float32")
    else:
        kind = ClassLabel(names=list(label_names)) if label_names is not None else Value("int64")
    manifest = Manifest(
        bank=[list(coordinate) for coordinate in bank],
        hidden_size=tokens.shape[2],
        dtype=dtype,
        num_rows=len(tokens),
        rows_per_shard=SHARD_ROWS,
        label_names=None if label_names is None else list(label_names),
        ingredients={"token_layout": TokenLayout.of_plain_vit(WIDTH, LAYERS).to_dict(), "backbone": {"digest": "0"}},
        num_views=num_views,
    )
    tokens = tokens.to(getattr(torch, dtype))
    for index, start in enumerate(range(0, len(tokens), SHARD_ROWS)):
        part = slice(start, start + SHARD_ROWS)
        written = labels[part] if with_labels else None
        manifest.add(folder, _write_shard(folder, index, tokens[part], written, kind, []))
    manifest.gather(folder)
    return LayerFeatures.open(folder)


class Killer:
    """Ends this process as `kill -9` does, at the n-th moment at which a sweep touches its files."""

    def __init__(self, moment: int):
        self.left = moment
        self.save_file, self.write_bytes = safetensors.torch.save_file, Path.write_bytes
        self.replace, self.rmtree = Path.replace, shutil.rmtree

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def half_written(self, path: Path) -> None:
        if self.left == 1:
            os.truncate(path, os.path.getsize(path) // 2)
        self.step()

    def install(self) -> None:
        """Four moments per file: before and in the middle of writing, before and after it gets its name."""

        def save_file(tensors: Any, path: Path, **options: Any) -> None:
            self.step()
            self.save_file(tensors, path, **options)
            self.half_written(path)

        def write_bytes(path: Path, content: bytes) -> int:
            self.step()
            written = self.write_bytes(path, content)
            self.half_written(path)
            return written

        def replace(path: Path, target: Path) -> Path:
            self.step()
            moved = self.replace(path, target)
            self.step()
            return moved

        def rmtree(path: Path, **options: Any) -> None:
            self.step()
            self.rmtree(path, **options)

        state.save_file = save_file  # type: ignore[assignment]
        shutil.rmtree = rmtree  # type: ignore[assignment]
        Path.write_bytes, Path.replace = write_bytes, replace  # type: ignore[method-assign,assignment]
        result.SweepResult.plot = draw_nothing  # type: ignore[method-assign]


def draw_nothing(result: Any, file: Any) -> None:
    """In place of `SweepResult.plot`, which takes longer than all else in a tiny sweep."""
    file.write(b"a figure")


def run_in_child(features: LayerFeatures, options: dict[str, Any], moment: int) -> int:
    """Sweep in a process of its own; returns -9 if it was killed, else how many moments it went through."""
    child = os.fork()
    if child == 0:
        killer = Killer(moment)
        try:
            killer.install()
            run.sweep(features, **options)
        except BaseException:
            traceback.print_exc()
        os._exit(moment - killer.left)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_in_two(features: LayerFeatures, sweeps: dict[str, Any], folder: Path) -> list[int]:
    """Share sweeps between two processes, as `accelerate launch` does; returns their exit codes.

    What the processes wrote together is in `folder / name`, what each of them returned beside it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `accelerate launch` tells its processes, without the seconds that it takes to start.
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
            failed = 1
            try:
                share_sweeps(features, sweeps, folder, rank)
                failed = 0
            except BaseException:
                traceback.print_exc()
            os._exit(failed)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def share_sweeps(features: LayerFeatures, sweeps: dict[str, Any], folder: Path, rank: int) -> None:
    result.SweepResult.plot = draw_nothing  # type: ignore[method-assign]
    processes = PartialState(cpu=True, backend="gloo")
    assert (processes.num_processes, processes.process_index) == (2, rank)
    for name, options in sweeps.items():
        run.sweep(features, output_dir=folder / name, **options).save(folder / f"{name}-of-{rank}")
    with pytest.raises(LayerFusionError, match="one process"):
        run.sweep(features, strategy="halving")
    processes.destroy_process_group()


def main() -> None:
    """Run a plan of sweeps; how they ended goes to standard output, as a JSON list.

    An entry of the plan is a sweep and the moment at which it is killed, or names the sweeps that two processes share.

    Negative moments count from the end, which a first sweep finds, and which is where it leaves its result. Children
    are forked from a process that has trained nothing, which saves each of them the imports.
    """
    import sklearn.model_selection  # noqa: F401 (once, before the forks)

    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    opened = {folder: LayerFeatures.open(folder) for folder in {entry["features"] for entry in plan}}
    codes = []
    counts: dict[str, int] = {}  # of moments, by the options of a sweep
    for entry in plan:
        if "shared" in entry:
            codes += run_in_two(opened[entry["features"]], entry["shared"], Path(entry["folder"]))
            continue
        opened_features, options, moment = opened[entry["features"]], entry["options"], entry["moment"]
        if moment < 0:
            key = json.dumps({**options, "output_dir": None})
            if key not in counts:
                whole = tempfile.mkdtemp(dir=Path(sys.argv[1]).parent)
                counts[key] = run_in_child(opened_features, {**options, "output_dir": whole}, 0)
            moment += 1 + counts[key]
        codes.append(run_in_child(opened_features, options, moment))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
