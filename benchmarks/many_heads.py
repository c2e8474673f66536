"""Many heads on one backbone: `load_heads` against one head alone, and against every head by itself.

    python benchmarks/many_heads.py [--backbone FOLDER] [--heads 10] [--batch_size 32] [--image_size 112] [--threads 1]

The contenders take turns within one run; ratios are medians over rounds of time on the clock, with the worst round beside
them. Logits of all heads are compared with those of each head alone before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import seconds_of, take_turns
from transformers import Dinov2Config, Dinov2Model

from hf_layerfusion import ViTForAttentiveLayerFusionClassification, load_heads
from hf_layerfusion.backbones import open_backbone

RECIPES = ("alf", "linear-all", "alf-quarterly", "linear-last", "scalar-mix")


def save_heads(backbone: str | None, count: int, image_size: int, folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """A backbone, and folders of heads on it: of five recipes in turn, with 2 to 100 classes."""
    if backbone is None:
        model, processor = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14)), None
    else:
        opened = open_backbone(backbone)
        model, processor = opened.model, opened.image_processor
    names = []
    for number in range(count):
        head = ViTForAttentiveLayerFusionClassification.from_backbone(
            model,
            recipe=RECIPES[number % len(RECIPES)],
            num_labels=(2, 10, 37, 100)[number % 4],
            image_processor=processor,
            **({} if processor is None else {"image_size": image_size}),
        )
        names.append(str(folder / f"head-{number}"))
        head.save_pretrained(names[-1])
    return model, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", help="folder or Hub id; by default a DINOv2-S of random weights")
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        backbone, names = save_heads(arguments.backbone, arguments.heads, arguments.image_size, Path(folder))
        heads = load_heads(backbone, names)
        pixels = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
        together = heads(pixels)
        worst = max((together[name].logits - heads[name](pixels).logits).abs().max().item() for name in names)
        print(
            f"{len(names)} heads, batch {len(pixels)}, {arguments.image_size} px; logits differ by at most {worst:.1e}"
        )

        def timed(work: Callable[[], object]) -> Callable[[], float]:
            return lambda: seconds_of(work)

        seconds = take_turns(
            {
                "one head": timed(lambda: heads[names[0]](pixels)),
                "all heads, load_heads": timed(lambda: heads(pixels)),
                "all heads, one by one": timed(lambda: [heads[name](pixels) for name in names]),
            },
            arguments.rounds,
        )
    print("\n| | ms per image | times one head (worst) |\n|---|---:|---:|")
    for name, own in seconds.items():
        ratios = [ours / one for ours, one in zip(own, seconds["one head"], strict=True)]
        print(
            f"| {name} | {1e3 * statistics.median(own) / arguments.batch_size:.2f} "
            f"| {statistics.median(ratios):.2f} ({max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
