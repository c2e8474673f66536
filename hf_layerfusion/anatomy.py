"""Where things stand inside a backbone, found by the names that vision models give their submodules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

# Children of a block by the part they play, in the order tried. The probe (`probe.py`) checks by value that a child
# found under such a name does what the name says, so a wrong match makes a tap absent, never wrong.
_NAMES = {
    "ln1": (
        *("layernorm_before", "norm1", "layer_norm1", "layer_norm_1", "rms_norm1", "attention_norm"),
        *("input_layernorm", "pre_attention_layer_norm", "ln_1"),
    ),
    "attention": ("attention", "self_attn", "attn"),
    "ln2": (
        *("layernorm_after", "norm2", "layer_norm2", "layer_norm_2", "rms_norm2", "ffn_norm"),
        *("post_attention_layernorm", "pre_mlp_layer_norm", "ln_2", "layernorm", "layer_norm", "norm"),
    ),
    "fc1": (
        *("mlp.fc1", "mlp.lin1", "mlp.linear_fc1", "mlp.gate_proj", "mlp.weights_in", "mlp.dense1", "mlp.proj_in"),
        *("mlp.wi_0", "mlp.c_fc", "mlp.up_proj", "mlp.fc1_g", "mlp.w12", "ffn.gate_proj", "ffn.fc1"),
        *("feed_forward.gate_proj", "intermediate.dense", "pwconv1", "pointwise_conv1", "fc1", "mlp.conv1"),
        "output.conv1",
    ),
    "fc2": (
        *("mlp.fc2", "mlp.lin2", "mlp.linear_fc2", "mlp.down_proj", "mlp.weights_out", "mlp.dense2", "mlp.proj_out"),
        *("mlp.wo", "mlp.c_proj", "mlp.w3", "ffn.down_proj", "ffn.fc2", "feed_forward.down_proj", "output.dense"),
        *("pwconv2", "pointwise_conv2", "fc2", "mlp.conv2", "output.conv2"),
    ),
}


@dataclass(frozen=True)
class Block:
    """A block of a backbone.

    Attributes:
        path: of the block in the backbone.
        parts: path in the block of each part that has a known name: `ln1`, `attention`, `ln2`, `fc1`, `fc2`.
    """

    path: str
    parts: dict[str, str]


def find_blocks(backbone: nn.Module, within: str = "") -> list[Block]:
    """The blocks with a norm or an attention, and an MLP, in the order in which the backbone lists them.

    Args:
        within: what the paths of the blocks begin with.
    """
    blocks: list[Block] = []
    for path, module in backbone.named_modules():
        if not path.startswith(within) or (blocks and path.startswith(blocks[-1].path + ".")):
            continue
        if not any(name.isdigit() for name in path.split(".")):
            continue  # blocks stand in lists; a pooling head may look like one otherwise
        parts = {}
        for part, names in _NAMES.items():
            found = next((name for name in names if _descendant(module, name) is not None), None)
            if found is not None:
                parts[part] = found
        if {"fc1", "fc2"} <= parts.keys() and {"ln1", "ln2", "attention"} & parts.keys():
            blocks.append(Block(path, parts))
    return blocks


def blocks_by_layer(blocks: Sequence[Block], num_layers: int) -> list[list[Block]] | None:
    """The block of each layer, or the blocks of each stage where layers are stages; `None` if unclear."""
    if len(blocks) == num_layers:
        return [[block] for block in blocks]
    split = [block.path.split(".") for block in blocks]
    for position in range(min((len(pieces) for pieces in split), default=0)):
        stages: dict[str, list[Block]] = {}
        for pieces, block in zip(split, blocks, strict=True):
            if pieces[position].isdigit():
                stages.setdefault(".".join(pieces[: position + 1]), []).append(block)
        if len(stages) == num_layers and sum(pieces[position].isdigit() for pieces in split) == len(split):
            return list(stages.values())
    return None


def find_norms(backbone: nn.Module, blocks: Sequence[Block]) -> list[str]:
    """Paths of the norms outside the blocks."""
    inside = tuple(block.path + "." for block in blocks)
    return [
        path
        for path, module in backbone.named_modules()
        if "norm" in path.rpartition(".")[2].lower()
        and not path.startswith(inside)
        and not isinstance(module, nn.Identity)
    ]


def _descendant(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module
