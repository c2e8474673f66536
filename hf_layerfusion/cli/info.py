"""Describe a backbone or a saved head: layers, widths, taps, tokens per recipe, sizes."""

from __future__ import annotations

import argparse

from transformers import AutoConfig

from ..backbones import describe_backbone, open_backbone
from ..configuration_layer_fusion import LayerFusionConfig
from ..errors import LayerFusionError
from ..heads import build_head
from ..recipes import RECIPES
from ..taps import available_modules
from .options import number


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="BACKBONE_OR_HEAD", help="Hub id or folder")
    parser.add_argument(
        "--num_labels", type=number(int, at_least=1), default=100, help="for the size of a new head (default: 100)"
    )


def run(arguments: argparse.Namespace) -> None:
    try:
        config = AutoConfig.from_pretrained(arguments.name)
    except (OSError, ValueError) as error:
        raise LayerFusionError(
            f"{arguments.name!r} is neither a folder nor a Hub model to be read: {error}"
        ) from error
    if isinstance(config, LayerFusionConfig):
        _describe_head(config)
    else:
        _describe_backbone(arguments)


def _describe_head(config) -> None:
    parameters = sum(parameter.numel() for parameter in build_head(config).parameters())
    fingerprint = (config.backbone_fingerprint or {}).get("digest", "none")
    print(f"head: recipe {config.recipe}, {config.head_type}, {parameters:,} parameters")
    print(f"backbone: {config.backbone_name_or_path}, revision {config.backbone_revision or '-'}")
    print(f"backbone weights: sha256 {fingerprint[:16]}...")
    print(
        f"labels: {config.num_labels} ({', '.join(str(config.id2label[i]) for i in range(min(10, config.num_labels)))}"
        f"{', ...' if config.num_labels > 10 else ''})"
    )
    print(f"tokens: {len(config.token_names)} of width {config.hidden_size}")
    for name in config.token_names:
        print(f"  {name}")


def _describe_backbone(arguments: argparse.Namespace) -> None:
    backbone = open_backbone(arguments.name)
    layout = describe_backbone(backbone.model)
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    print(f"{type(backbone.model).__name__} ({backbone.model.config.model_type}), {parameters / 1e6:.1f} M parameters")
    print(f"layers: {layout.num_layers}, widths {', '.join(map(str, sorted(set(layout.widths))))}")
    special = ", ".join(map(str, layout.special_tokens)) or "none"
    print(f"activations: {layout.kind}; special tokens at {special}" + ("" if layout.has_cls else " (no CLS)"))
    print(f"modules: {', '.join(available_modules(backbone.model))}")
    print(f"\n{'recipe':<22}{'tokens':>7}{'width':>7}{'head parameters':>17}{'cache bytes/image':>19}")
    for name in RECIPES:
        try:
            config = LayerFusionConfig(
                recipe=name,
                id2label={label: str(label) for label in range(arguments.num_labels)},
                backbone_config=backbone.model.config,
                token_layout=layout.to_dict(),
            )
        except LayerFusionError as error:
            print(f"{name:<22}{error}")
            continue
        if missing := set(config.modules) - set(available_modules(backbone.model)):
            print(f"{name:<22}not here: this backbone has no {', '.join(sorted(missing))}")
            continue
        size = sum(parameter.numel() for parameter in build_head(config).parameters())
        tokens = len(config.bank)
        print(f"{name:<22}{tokens:>7}{config.hidden_size:>7}{size:>17,}{2 * tokens * config.hidden_size:>19,}")
    print(f"\nhead sizes for {arguments.num_labels} labels; cache in float16")
