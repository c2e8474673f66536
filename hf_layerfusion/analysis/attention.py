"""Layer attentions over a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LayerFusionError
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification

_LABELS = ("label", "labels", "label_ids")


@dataclass
class AttentionSummary:
    """How much weight each attention head gives each token, over many images.

    Attributes:
        token_names: N names.
        mean: `(H, N)`, mean over images; several queries stand below each other, `(Q * H, N)`.
        std: `(H, N)`, spread over images.
        num_images: images seen.
    """

    token_names: list[str]
    mean: Tensor
    std: Tensor
    num_images: int

    @property
    def token_weights(self) -> Tensor:
        """`(N,)`: the weight of each token, averaged over heads; sums to one."""
        return self.mean.mean(dim=0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_images": self.num_images,
            "tokens": [
                {"name": name, "weight": round(weight, 6)}
                for name, weight in zip(self.token_names, self.token_weights.tolist(), strict=True)
            ],
            "heads": [
                {"mean": [round(value, 6) for value in mean], "std": [round(value, 6) for value in std]}
                for mean, std in zip(self.mean.tolist(), self.std.tolist(), strict=True)
            ],
        }

    def save_json(self, path: str | Path) -> None:
        """Write names, weights, and mean and spread by head."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")


def summarise_attentions(
    model: ViTForAttentiveLayerFusionClassification, batches: Iterable[dict[str, Tensor]]
) -> AttentionSummary:
    """Run batches through the model and collect the layer attentions.

    Args:
        model: with an attentive or scalar-mix head; it is left in eval mode.
        batches: each holds `layer_features`, or `pixel_values` and what else the backbone reads; labels are ignored.

    Raises:
        LayerFusionError: if the head has no attention, or there are no batches.
    """
    count = 0
    total = squares = torch.zeros(0)
    model.eval()
    for batch in batches:
        inputs = {key: value.to(model.device) for key, value in batch.items() if key not in _LABELS}
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).layer_attentions
        if attentions is None:
            raise LayerFusionError(f"a {model.config.head_type!r} head has no layer attentions to explain")
        by_head = attentions.flatten(1, 2).double().cpu()  # (B, Q * H, N)
        if not count:
            total = squares = by_head.new_zeros(by_head.shape[1:])
        total = total + by_head.sum(dim=0)
        squares = squares + by_head.square().sum(dim=0)
        count += len(by_head)
    if not count:
        raise LayerFusionError("there are no images to explain")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return AttentionSummary(model.config.token_names, mean, std, count)
