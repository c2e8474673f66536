"""Random batches from a feature cache, against a numpy memmap of the same data and other ways to read it.

    python benchmarks/cache_reading.py [--rows 20480] [--batch_size 2048] [--repeats 7]

The cache is written by the library itself, from tiny pictures and a backbone that is only as wide and deep as one needs
for such rows. The readers take turns within one run and see the same rows in the same order; ratios to memmap are medians
over rounds, with the worst round beside them. Memory is measured in rounds of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from task import extract_noise
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from transformers.utils import logging

from hf_layerfusion import LayerFeatures
from hf_layerfusion.training.collators import LayerFeatureCollator

Batch = dict[str, Tensor]
Reader = Callable[[int], Iterator[Batch]]


def write_memmap(path: Path, features: LayerFeatures) -> np.memmap:
    shape = (len(features), len(features.bank), features.hidden_size)
    data = np.memmap(path, dtype=np.float16, mode="w+", shape=shape)
    start = 0
    for batch in features.batches(1024):
        tokens = batch["layer_features"]
        data[start : start + len(tokens)] = tokens.numpy()
        start += len(tokens)
    data.flush()
    return np.memmap(path, dtype=np.float16, mode="r", shape=shape)


def readers(features: LayerFeatures, data: np.memmap, batch_size: int) -> dict[str, Reader]:
    """Ways to go through all rows once in the random order of a seed."""

    def order(seed: int) -> BatchSampler:
        rows = np.random.default_rng(seed).permutation(len(features)).tolist()
        return BatchSampler(rows, batch_size, drop_last=False)

    def memmap(seed: int) -> Iterator[Batch]:
        for rows in order(seed):
            yield {"layer_features": torch.from_numpy(data[rows])}

    def ours(seed: int) -> Iterator[Batch]:
        return features.batches(batch_size, shuffle=True, seed=seed)

    def loader(seed: int) -> Iterator[Batch]:
        collator = LayerFeatureCollator(len(features.bank))
        return iter(DataLoader(features, batch_sampler=order(seed), collate_fn=collator))

    table = features.dataset.with_format("torch", columns=["layer_features"])

    def datasets(seed: int) -> Iterator[Batch]:
        for rows in order(seed):
            yield table[rows]

    return {
        "numpy memmap, fancy indexing": memmap,
        "ours: LayerFeatures.batches": ours,
        "ours: DataLoader with our collator": loader,
        "datasets, with_format('torch')": datasets,
    }


def check_same_rows(ways: dict[str, Reader], data: np.memmap, batch_size: int) -> None:
    rows = np.random.default_rng(0).permutation(len(data))[:batch_size]
    expected = torch.from_numpy(data[rows]).double().sum(dim=0)  # batches may order their rows as they like
    for name, reader in ways.items():
        tokens = next(reader(0))["layer_features"].reshape(len(rows), *data.shape[1:])
        torch.testing.assert_close(tokens.double().sum(dim=0), expected, msg=f"{name} reads other rows")


def seconds(reader: Reader, seed: int) -> float:
    start = time.perf_counter()
    for batch in reader(seed):
        del batch
    return time.perf_counter() - start


def anonymous_memory() -> float:
    """MB of this process that are not pages of a file: what is mapped but not copied does not count. Linux only."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6


def memory_growth(reader: Reader, seed: int) -> float:
    """Highest anonymous memory while going through all rows, over what it was before, in MB."""
    ctypes.CDLL(None).malloc_trim(0)  # free memory that glibc kept from before would hide the growth
    before = anonymous_memory()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    for batch in reader(seed):
        del batch
    done.set()
    thread.join()
    return peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=20480)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rows_per_shard", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", help="where the temporary files go; by default the system's place for them")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        _, features = extract_noise(
            Path(folder, "cache"),
            rows=arguments.rows,
            layers=arguments.layers,
            width=arguments.width,
            rows_per_shard=arguments.rows_per_shard,
        )
        data = write_memmap(Path(folder, "memmap"), features)
        ways = readers(features, data, arguments.batch_size)
        check_same_rows(ways, data, arguments.batch_size)
        compare(ways, data, arguments)


def compare(ways: dict[str, Reader], data: np.memmap, arguments: argparse.Namespace) -> None:
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(arguments.repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            elapsed = seconds(ways[name], seed=repeat)
            if repeat:  # the first round brings the files into memory
                times[name].append(elapsed)
    megabytes = data.nbytes / 1e6
    batch = arguments.batch_size * data[0].nbytes / 1e6
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {len(data)} rows of {data.shape[1]} x "
        f"{data.shape[2]} float16 ({megabytes:.0f} MB), random batches of {arguments.batch_size} ({batch:.1f} MB), medians "
        f"of {arguments.repeats}"
    )
    print(f"{'MB/s':>8}{'ratio':>8}{'worst':>8}{'growth in batches':>19}")
    for name, reader in ways.items():
        ratios = [reference / own for own, reference in zip(times[name], times[names[0]], strict=True)]
        growth = memory_growth(reader, seed=0) / batch
        print(
            f"{megabytes / statistics.median(times[name]):>8.0f}{statistics.median(ratios):>8.2f}{min(ratios):>8.2f}"
            f"{growth:>19.2f}  {name}"
        )


if __name__ == "__main__":
    main()
