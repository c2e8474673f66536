"""Forward and backward of the attentive head: ours against the textbook order, by products and by PyTorch's attention.

    python benchmarks/head.py [--threads 1] [--repeats 5] [--rows 24,24,768,1000 257,8,768,100]

The variants take turns within one run, behind a round that warms up. "x textbook", "x SDPA" and "x expanded" say how many
times faster ours is than `TextbookHead` with two products, with `F.scaled_dot_product_attention`, and with its query
projected once per row, as attention pooling is often written: the median over rounds, and the worst round in brackets. Ours takes the token statistics in the step ("ours"), or has those of a cache ("given").

"Of peak" is a share of the machine's matrix rate, the median over rounds: the multiply-adds that an order needs, over
its time, over the rate of a large square float32 product that takes its turn in every round. With I = H * d the width of
all heads together (about 2 D) and C classes, a forward pass needs

    textbook, per row   keys and values 2 N I D, attention 2 N I, output projection I D, classifier D C
              once      the query's projection I D
    ours, per row       scores and pooling 2 N H D, values and output projection 2 I D, classifier D C
          once          the query's projection, its product with W_k, the value bias through W_v: 3 I D

and the backward pass twice as much, but for our scores and pooling, where the tokens need no gradient: as much again.
Where it is cheaper (few heads, many rows), W_v and W_o are one matrix per head: H D^2 per row and I D^2 once, for 2 I D
per row. What a kernel computes a second time to save memory is not counted, and neither are statistics, softmax, norms.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; threads that spin distort timings

import torch
from measure import (
    CLOCKS,
    Clock,
    milliseconds,
    rate_share,
    seconds_of,
    speedup,
    square_product,
    table_head,
    table_row,
    take_turns,
)
from textbook import TextbookHead
from torch import Tensor, nn
from torch.nn import functional as F

from hf_layerfusion import AttentiveFusionHead
from hf_layerfusion.features import token_statistics

CLASSES = 100
# (tokens, heads, width, batch) and what it is.
ROWS = {
    (24, 24, 768, 1000): "ALF, ViT-B",
    (48, 48, 1024, 1000): "ALF, ViT-L",
    (257, 8, 768, 100): "all tokens of one layer, ViT-B",
    (3084, 8, 768, 8): "all tokens of all layers, ViT-B",
    (2, 2, 768, 1000): "CLS and mean of the last layer",
    (2, 2, 768, 2048): "the same, a larger batch",
    (2, 2, 768, 4096): "the same, a larger batch",
    (24, 24, 384, 204): "ALF, ViT-S, a small batch",
}
OPPONENTS = {"textbook": "x textbook", "sdpa": "x SDPA", "expanded": "x expanded"}
OWN_TITLES = (*OPPONENTS.values(), "of peak")
TITLES = (
    *("tokens", "heads", "width", "batch"),
    *("textbook ms", "of peak", "SDPA ms"),
    *("ours ms", *OWN_TITLES),
    *("given ms", *OWN_TITLES, ""),
)

Row = tuple[int, int, int, int]


def textbook_multiply_adds(row: Row) -> int:
    """Of a forward and a backward pass; see the module's docstring."""
    num_tokens, num_heads, width, batch = row
    inner = num_heads * 2 * (width // num_heads)
    attention = 2 * num_tokens * inner * width + 2 * num_tokens * inner
    return 3 * (batch * (attention + inner * width + width * CLASSES) + inner * width)


def own_multiply_adds(row: Row) -> int:
    num_tokens, num_heads, width, batch = row
    inner = num_heads * 2 * (width // num_heads)
    attention = 2 * batch * num_tokens * num_heads * width
    apart, folded = 2 * batch * inner * width, (batch * num_heads + inner) * width**2
    return 2 * attention + 3 * (min(apart, folded) + batch * width * CLASSES + 3 * inner * width)


def build_heads(num_tokens: int, num_heads: int, width: int) -> dict[str, nn.Module]:
    """The heads, with the same parameters."""
    shape = (width, num_tokens, CLASSES, num_heads)
    heads = {
        "textbook": TextbookHead(*shape),
        "sdpa": TextbookHead(*shape, use_sdpa=True),
        "expanded": TextbookHead(*shape, expands_query=True),
        "ours": AttentiveFusionHead(*shape, implementation="fast"),
    }
    for head in heads.values():
        head.load_state_dict(heads["textbook"].state_dict())
    return heads


def check_same_logits(heads: dict[str, nn.Module], tokens: Tensor) -> None:
    with torch.no_grad():
        expected = heads["textbook"].eval()(tokens)
        for head in heads.values():
            torch.testing.assert_close(head.eval()(tokens), expected, rtol=1e-3, atol=1e-4)
            head.train()


def build_step(head: nn.Module, tokens: Tensor, labels: Tensor, clock: Clock, **given: Tensor) -> Callable[[], float]:
    """One forward and backward pass."""

    def step() -> float:
        head.zero_grad()
        return seconds_of(lambda: F.cross_entropy(head(tokens, **given), labels).backward(), tokens.device, clock)

    return step


def compare(row: Row, arguments: argparse.Namespace) -> list[str]:
    """The cells of one row of the table."""
    num_tokens, num_heads, width, batch = row
    torch.manual_seed(0)
    tokens = F.normalize(torch.randn(batch, num_tokens, width), dim=-1).to(arguments.device)
    labels = torch.randint(0, CLASSES, (batch,)).to(arguments.device)
    heads = {name: head.to(arguments.device) for name, head in build_heads(num_tokens, num_heads, width).items()}
    check_same_logits(heads, tokens[:2])
    clock = CLOCKS[arguments.clock]
    product, product_count = square_product(arguments.device, clock)
    contenders = {name: build_step(head, tokens, labels, clock) for name, head in heads.items()}
    statistics = token_statistics(tokens)
    contenders["given"] = build_step(heads["ours"], tokens, labels, clock, token_statistics=statistics)
    seconds = take_turns({**contenders, "product": product}, arguments.repeats)

    def of_peak(name: str, count: int) -> str:
        return f"{rate_share(seconds[name], count, seconds['product'], product_count):.0%}"

    cells = [*map(str, row), milliseconds(seconds["textbook"]), of_peak("textbook", textbook_multiply_adds(row))]
    cells.append(milliseconds(seconds["sdpa"]))
    for name in ("ours", "given"):
        cells.append(milliseconds(seconds[name]))
        cells += [speedup(seconds[reference], seconds[name]) for reference in OPPONENTS]
        cells.append(of_peak(name, own_multiply_adds(row)))
    return [*cells, ROWS.get(row, "as asked")]


def parse_row(text: str) -> Row:
    num_tokens, num_heads, width, batch = map(int, text.split(","))
    return num_tokens, num_heads, width, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=parse_row, nargs="+", default=list(ROWS), help="TOKENS,HEADS,WIDTH,BATCH")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, on a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.device}, {arguments.threads} thread(s), {arguments.repeats} rounds, "
        f"{arguments.clock} time"
    )
    print()
    print(table_head(TITLES), flush=True)
    for row in arguments.rows:
        print(table_row(compare(row, arguments)), flush=True)


if __name__ == "__main__":
    main()
