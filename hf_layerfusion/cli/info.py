"""Describe a backbone or a saved head: layers, widths, taps, tokens per recipe, sizes.

Opening a backbone runs it once on two random images, which is how its tokens are told.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from ..backbones import open_backbone
from ..bank import TokenBank, is_cell
from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..heads import build_head, build_parts
from ..images import processed_size
from ..layout import BLOCK_MODULES, TokenLayout
from ..probe import describe_backbone
from ..recipes import RECIPES
from .options import add_layout_options, number

# All tokens of four layers are a thousand lines.
_SHOWN_TOKENS = 100


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="BACKBONE_OR_HEAD", help="Hub id or folder")
    parser.add_argument(
        "--num_labels", type=number(int, at_least=1), default=100, help="for the size of a new head (default: 100)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the backbone")
    add_layout_options(parser)


def run(arguments: argparse.Namespace) -> None:
    try:
        config = AutoConfig.from_pretrained(arguments.name, revision=arguments.revision)
    except (OSError, ValueError) as error:
        raise LayerFusionError(
            f"{arguments.name!r} is neither a folder nor a Hub model to be read: {error}"
        ) from error
    if isinstance(config, LayerFusionConfig):
        _describe_head(config)
    else:
        _describe_backbone(arguments)


def _describe_head(config: LayerFusionConfig) -> None:
    fingerprint = (config.backbone_fingerprint or {}).get("digest", "none")
    members = f" x {config.num_members} (an ensemble)" if config.num_members > 1 else ""
    print(f"head: recipe {config.recipe}, {config.head_type}{members}, {_count_parameters(config):,} parameters")
    print(f"backbone: {config.backbone_name_or_path}, revision {config.backbone_revision or '-'}")
    print(f"backbone weights: sha256 {fingerprint[:16]}...")
    print(
        f"labels: {config.num_labels} ({', '.join(str(config.id2label[i]) for i in range(min(10, config.num_labels)))}"
        f"{', ...' if config.num_labels > 10 else ''})"
    )
    print(f"tokens: {len(config.token_names)} of width {config.hidden_size}")
    lines = _token_lines(config.bank)
    for line in lines[:_SHOWN_TOKENS]:
        print(f"  {line}")
    if len(lines) > _SHOWN_TOKENS:
        print(f"  and {len(lines) - _SHOWN_TOKENS} more, the last: {lines[-1]}")


def _token_lines(bank: TokenBank) -> list[str]:
    """A line per token; the cells of a grid share one."""
    lines = []
    for group, positions in bank.groups.items():
        if is_cell(group.pool):
            lines.append(f"{group.name} ({len(positions)} cells)")
        elif group.pool == "top patches":
            lines.append(f"{group.name} ({len(positions)})")
        else:
            lines += [bank.coordinates[position].name for position in positions]
    return lines


def _describe_backbone(arguments: argparse.Namespace) -> None:
    backbone = open_backbone(arguments.name, revision=arguments.revision)
    layout = describe_backbone(
        backbone.model, num_prefix_tokens=arguments.num_prefix_tokens, grid_size=arguments.grid_size
    )
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    print(f"{type(backbone.model).__name__} ({backbone.model.config.model_type}), {parameters / 1e6:.1f} M parameters")
    for line in _layout_lines(layout):
        print(line)
    print(
        f"\n{'recipe':<22}{'tokens':>7}{'width':>7}{'head parameters':>17}{'cache bytes/image':>19}"
        f"{'head MFLOPs/image':>20}"
    )
    image_size = None if backbone.image_processor is None else processed_size(backbone.image_processor)
    for name in (name for name, recipe in RECIPES.items() if recipe.kind == "head"):
        try:
            config = LayerFusionConfig(
                recipe=name,
                id2label={label: str(label) for label in range(arguments.num_labels)},
                backbone_config=backbone.model.config,
                token_layout=layout.to_dict(),
                image_size=image_size,
            )
        except LayerFusionError as error:
            print(f"{name:<22}not here: {error}")
            continue
        tokens, size = len(config.bank), _count_parameters(config)
        print(
            f"{name:<22}{tokens:>7}{config.hidden_size:>7}{size:>17,}{2 * tokens * config.hidden_size:>19,}"
            f"{_flops_per_image(config) / 1e6:>20,.2f}"
        )
    print(f"\nhead sizes for {arguments.num_labels} labels; cache in float16; a multiply-add is two FLOPs")


def _layout_lines(layout: TokenLayout) -> list[str]:
    """A backbone's layout, a line per fact."""
    unit = "blocks" if layout.reading == "blocks" else "stages"
    embeddings = "" if layout.widths[0] else "; no embedding output (layer 0)"
    lines = [f"layers: {layout.num_layers} {unit}{embeddings}"]
    lines.append(f"widths: {_runs(layout.widths[1:])}")
    size = "" if layout.image_size is None else f" at {layout.image_size[0]} x {layout.image_size[1]} px"
    grids = _runs([f"{grid[0]} x {grid[1]}" if grid else "no grid" for grid in layout.grids[1:]])
    lines.append(f"patches: {grids}{size} ({layout.kind('block').replace('_', ' ')})")
    prefix, suffix = max(layout.num_prefix_tokens), max(layout.num_suffix_tokens)
    special = f"{prefix} before the patches" + (f", {suffix} after" if suffix else "")
    where = "" if layout.has_cls_at(layout.num_layers) == layout.has_cls_at(1) else ", in the last layers only"
    lines.append(f"special tokens: {special}; {'CLS' + where if layout.has_cls else 'no CLS'}")
    absent = [module for module in (*BLOCK_MODULES, "final_norm") if module not in layout.modules]
    lines.append(f"modules: {', '.join(layout.modules)}" + (f"; absent: {', '.join(absent)}" if absent else ""))
    return lines


def _runs(values) -> str:
    """`96 x2, 192, 384 x6` for a list with repetitions."""
    runs: list[list] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    if len(runs) == 1:
        return str(runs[0][0])
    return ", ".join(f"{value} (x{count})" if count > 1 else str(value) for value, count in runs)


def _flops_per_image(config: LayerFusionConfig) -> int:
    """Of the head alone, without what it folds once per batch."""
    head = build_head(config).eval()
    counts = []
    for batch_size in (1, 2):
        tokens = torch.zeros(batch_size, len(config.bank), config.hidden_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            head(tokens)
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


def _count_parameters(config: LayerFusionConfig) -> int:
    return sum(parameter.numel() for part in build_parts(config).values() for parameter in part.parameters())
