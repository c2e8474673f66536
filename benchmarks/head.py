"""Forward and backward of the attentive head: the fast order of its arithmetic against the textbook order.

    python benchmarks/head.py [--threads 1] [--repeats 7]

The variants take turns within one run; medians and their ratio are printed. Machines are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from hf_layerfusion import AttentiveFusionHead

# (tokens, heads, width, batch, what it is)
SHAPES = (
    (2, 2, 768, 1000, "CLS + mean of the last layer"),
    (24, 24, 384, 204, "ALF, ViT-S, a small batch"),
    (24, 24, 768, 1000, "ALF, ViT-B"),
    (48, 48, 1024, 250, "ALF, ViT-L"),
    (257, 8, 768, 100, "all tokens of one layer, ViT-B"),
)


def step(head: AttentiveFusionHead, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    head.zero_grad()
    start = time.perf_counter()
    torch.nn.functional.cross_entropy(head(tokens), labels).backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), medians of {arguments.repeats}")
    print(f"{'tokens':>7}{'heads':>7}{'width':>7}{'batch':>7}{'explicit ms':>13}{'fast ms':>9}{'ratio':>7}")
    for num_tokens, num_heads, width, batch, what in SHAPES:
        torch.manual_seed(0)
        tokens = torch.nn.functional.normalize(torch.randn(batch, num_tokens, width), dim=-1)
        labels = torch.randint(0, 100, (batch,))
        heads = {
            name: AttentiveFusionHead(width, num_tokens, 100, num_heads=num_heads, implementation=name)
            for name in ("explicit", "fast")
        }
        times: dict[str, list[float]] = {name: [] for name in heads}
        for repeat in range(arguments.repeats + 1):
            for name, head in heads.items():
                seconds = step(head, tokens, labels)
                if repeat:  # the first round warms up
                    times[name].append(seconds)
        explicit, fast = (1e3 * statistics.median(times[name]) for name in ("explicit", "fast"))
        print(
            f"{num_tokens:>7}{num_heads:>7}{width:>7}{batch:>7}{explicit:>13.1f}{fast:>9.1f}{explicit / fast:>7.1f}"
            f"  {what}"
        )


if __name__ == "__main__":
    main()
