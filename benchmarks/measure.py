"""What the benchmarks share: contenders that take turns, ratios by round, the machine's matrix rate, Markdown rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

# Large enough to be as fast as a product gets, on one thread or many.
PRODUCT_SIZE = 2048

Clock = Callable[[], float]
# What `--clock` chooses from: time on the wall, or that of this process on the CPU, which other jobs disturb less.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_of(work: Callable[[], object], device: torch.device | str = "cpu", clock: Clock = CLOCKS["wall"]) -> float:
    """Seconds until the work is done, on a GPU too."""
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    start = clock()
    work()
    if is_cuda:
        torch.cuda.synchronize(device)
    return clock() - start


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each contender in each round. A round before the first warms up and is not counted.

    Args:
        contenders: by name, what runs once and returns the seconds that count.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        # Every round begins with another one, so that none always runs behind the same.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = contenders[name]()
            if turn:
                seconds[name].append(elapsed)
    return seconds


def speedup(reference: Sequence[float], own: Sequence[float]) -> str:
    """How many times faster than the reference: the median over rounds, and the worst round."""
    ratios = [theirs / ours for theirs, ours in zip(reference, own, strict=True)]
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f})"


def square_product(
    device: torch.device | str = "cpu", clock: Clock = CLOCKS["wall"]
) -> tuple[Callable[[], float], int]:
    """The machine's matrix rate: a contender that multiplies large square float32 matrices, and its multiply-adds."""
    left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device=device)
    result = torch.empty_like(left)
    return lambda: seconds_of(lambda: torch.mm(left, right, out=result), device, clock), PRODUCT_SIZE**3


def rate_share(own: Sequence[float], own_count: int, product: Sequence[float], product_count: int) -> float:
    """Multiply-adds per second as a share of those of `square_product`, the median over rounds."""
    return statistics.median(
        own_count / ours / (product_count / theirs) for ours, theirs in zip(own, product, strict=True)
    )


def milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}"


def table_row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table_head(titles: Sequence[str]) -> str:
    """Titles and the line below them; the last column is text, all others are numbers."""
    return f"{table_row(titles)}\n|{'---:|' * (len(titles) - 1)}---|"
