"""Heads for the tests on the local Hub: build, load, change and compare them."""

from __future__ import annotations

from typing import Any

import torch
from hub_server import LocalHub, Repo
from torch import Tensor

from hf_layerfusion import ViTForAttentiveLayerFusionClassification

PIXELS = torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()
# What every repository of a head holds; a trained head's has pictures in its card, too.
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}


def build(backbone: Any, **options: Any) -> ViTForAttentiveLayerFusionClassification:
    return ViTForAttentiveLayerFusionClassification.from_backbone(backbone, num_labels=3, **options)


def load(name: str, **options: Any) -> ViTForAttentiveLayerFusionClassification:
    return ViTForAttentiveLayerFusionClassification.from_pretrained(name, **options)


def train_a_little(model: ViTForAttentiveLayerFusionClassification) -> None:
    """Give a head other weights, as training does."""
    with torch.no_grad():
        model.head.classifier.bias.normal_()


def logits_of(model: ViTForAttentiveLayerFusionClassification) -> Tensor:
    with torch.no_grad():
        return model(PIXELS).logits


def assert_same_logits(found: ViTForAttentiveLayerFusionClassification, expected: Any) -> None:
    """Equal weights give logits that differ by how the weights happen to be aligned in memory, and by no more."""
    expected = expected if isinstance(expected, Tensor) else logits_of(expected)
    torch.testing.assert_close(logits_of(found), expected, atol=1e-6, rtol=0)


def repo_of(hub: LocalHub, repo_id: str) -> Repo:
    return hub.repos["models", repo_id]
