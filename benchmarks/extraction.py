"""Tokens of all layers: pooled inside hooks, against the bare forward pass and other ways to get them.

    python benchmarks/extraction.py [--threads 1] [--repeats 7] [--device cuda --dtype bfloat16] [--backbone FOLDER]

The variants take turns within one run, and the bare forward takes two turns a round: the second row says how far apart
equal things measure. Ratios are medians over rounds, of time on the clock with the worst round beside it, and of CPU
time, which other jobs disturb less. Peak memory is measured in a fresh process for every variant and depth.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from hf_layerfusion import ViTForAttentiveLayerFusionClassification
from hf_layerfusion.anatomy import find_blocks
from hf_layerfusion.pooling import pool_activation

M_MMAP_THRESHOLD = -3  # of malloc.h

Model = ViTForAttentiveLayerFusionClassification


def bare(model: Model, pixels: Tensor) -> None:
    """The backbone's forward pass, and nothing else."""
    model.backbone(pixels)


def ours(model: Model, pixels: Tensor) -> Tensor:
    """CLS and mean of every layer, each pooled as soon as it appears."""
    return model.extract_layer_features(pixels)


def hidden_states(model: Model, pixels: Tensor) -> Tensor:
    """All hidden states kept to the end, then pooled."""
    states = model.backbone(pixels, output_hidden_states=True).hidden_states
    return pool_all(model, list(states[1:]))


def clones(model: Model, pixels: Tensor) -> Tensor:
    """The usual research loop: hooks on every block and LN2 clone what they see; pooled at the end."""
    kept: dict[str, list[Tensor]] = {"block": [], "ln2": []}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            kept[name].append(output.detach().clone())

        return hook

    handles = []
    for block in find_blocks(model.backbone):
        module = model.backbone.get_submodule(block.path)
        handles.append(module.register_forward_hook(keep("block")))
        handles.append(module.get_submodule(block.parts["ln2"]).register_forward_hook(keep("ln2")))
    model.backbone(pixels)
    for handle in handles:
        handle.remove()
    return pool_all(model, kept["block"])


def pool_all(model: Model, activations: list[Tensor]) -> Tensor:
    layout = model.config.layout
    pooled = [
        pool_activation(activation, layout, (layer, "block"), ("cls", "mean"), len(activation))
        for layer, activation in enumerate(activations, start=1)
    ]
    return torch.cat(pooled, dim=1)  # (B, N, D)


VARIANTS = {
    "bare": (bare, "bare forward"),
    "again": (bare, "bare forward, again"),
    "ours": (ours, "ours: pooled inside hooks"),
    "hidden_states": (hidden_states, "output_hidden_states, pooled after"),
    "clones": (clones, "clones of blocks and LN2, pooled after"),
}


def build(arguments: argparse.Namespace, num_layers: int) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    backbone = arguments.backbone or Dinov2Model(
        Dinov2Config(
            hidden_size=384,
            num_hidden_layers=num_layers,
            num_attention_heads=6,
            image_size=arguments.image_size,
            patch_size=14,
        )
    )
    model = Model.from_backbone(backbone, num_labels=10).to(arguments.device, getattr(torch, arguments.dtype))
    size = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    return model, torch.randn(size).to(model.device, model.dtype)


def check_same_tokens(model: Model, pixels: Tensor) -> None:
    expected = ours(model, pixels)
    for variant in (hidden_states, clones):
        torch.testing.assert_close(variant(model, pixels), expected)


def seconds(variant: Callable, model: Model, pixels: Tensor) -> tuple[float, float]:
    """On the clock, and of this process on the CPU."""
    start, cpu_start = time.perf_counter(), time.process_time()
    variant(model, pixels)
    if pixels.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def compare_times(model: Model, pixels: Tensor, repeats: int) -> None:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    names = list(VARIANTS)
    for repeat in range(repeats + 1):
        # Every round begins with another one, so that none always runs behind the one that fills the memory.
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            elapsed = seconds(VARIANTS[name][0], model, pixels)
            if repeat:  # the first round warms up
                times[name].append(elapsed)
    print(f"{'ms':>9}{'images/s':>10}{'ratio':>8}{'worst':>8}{'CPU ratio':>11}")
    for name, (_, title) in VARIANTS.items():
        pairs = list(zip(times[name], times["bare"], strict=True))
        clock, cpu = ([own[which] / reference[which] for own, reference in pairs] for which in (0, 1))
        median = statistics.median(elapsed for elapsed, _ in times[name])
        print(
            f"{1e3 * median:>9.1f}{len(pixels) / median:>10.1f}{statistics.median(clock):>8.3f}{max(clock):>8.3f}"
            f"{statistics.median(cpu):>11.3f}  {title}"
        )


def peak_memory(arguments: argparse.Namespace, name: str, num_layers: int) -> float:
    """The most memory in MB that this process, or on a GPU its tensors, ever took."""
    if sys.platform == "linux":
        # glibc raises this threshold as it goes; then holes between freed tensors vary the peak by tens of MB.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 131072)
    model, pixels = build(arguments, num_layers)
    with torch.inference_mode():
        for _ in range(2):
            VARIANTS[name][0](model, pixels)
    if pixels.is_cuda:
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def measure_alone(arguments: argparse.Namespace, name: str, num_layers: int) -> float:
    """`peak_memory` in a process of its own, forked, since importing everything anew takes longer than measuring."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(peak_memory, arguments, name, num_layers).result()


def compare_memory(arguments: argparse.Namespace) -> None:
    print("extra peak memory in MB over the bare forward of the same depth")
    print("".join(f"{f'{depth} layers':>11}" for depth in arguments.depths))
    references = [measure_alone(arguments, "bare", depth) for depth in arguments.depths]
    for name, (_, title) in VARIANTS.items():
        if name not in ("bare", "again"):
            peaks = [measure_alone(arguments, name, depth) for depth in arguments.depths]
            extra = [peak - reference for peak, reference in zip(peaks, references, strict=True)]
            print("".join(f"{value:>11.1f}" for value in extra) + f"  {title}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--backbone", help="folder or Hub id; by default DINOv2-S's shape with random weights")
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24], help="layers; the first one is timed")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.backbone:
        arguments.depths = arguments.depths[:1]  # the backbone's own depth
    torch.set_num_threads(arguments.threads)
    # Before anything is computed here: a child's peak begins with its parent's size, and CUDA cannot be forked.
    compare_memory(arguments)
    model, pixels = build(arguments, arguments.depths[0])
    print(
        f"torch {torch.__version__}, {arguments.device}, {arguments.dtype}, {arguments.threads} thread(s), batch "
        f"{arguments.batch_size}, {arguments.image_size} px, {model.config.layout.num_layers} layers, medians of "
        f"{arguments.repeats}"
    )
    with torch.inference_mode():
        check_same_tokens(model, pixels)
        compare_times(model, pixels, arguments.repeats)


if __name__ == "__main__":
    main()
