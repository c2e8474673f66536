"""Layer attentions over a dataset."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank import TokenBank
from ..errors import LayerFusionError
from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification

_LABELS = ("label", "labels", "label_ids")


@dataclass
class AttentionSummary:
    """How much weight each attention head gives each token, over many images.

    Several queries stand below each other: H is the number of queries times that of heads.

    Attributes:
        token_names: N names.
        mean: `(H, N)`, mean over images.
        std: `(H, N)`, spread over images.
        num_images: images seen.
        bank: the tokens' coordinates; `None` if they are not known, and then nothing can be said about depth.
        num_layers: L of the backbone, likewise.
        entropy: `(H,)`, entropy of an image's attention in nats, averaged over images. It is at most the entropy of
            `mean`, and lower where different images attend to different tokens.
        class_means: `(H, N)` for each class that was seen, by its number: the mean over its images. Empty without
            class labels.
        class_counts: the images of each class.
        label_names: names of classes, by number.
        group_std: `(H, G)`, spread over images of the weight of each of the bank's groups (`TokenBank.groups`) as a whole;
            `None` if no group has several tokens.
    """

    token_names: list[str]
    mean: Tensor
    std: Tensor
    num_images: int
    bank: TokenBank | None = None
    num_layers: int | None = None
    entropy: Tensor | None = None
    class_means: dict[int, Tensor] = field(default_factory=dict)
    class_counts: dict[int, int] = field(default_factory=dict)
    label_names: dict[int, str] = field(default_factory=dict)
    group_std: Tensor | None = None

    @property
    def token_weights(self) -> Tensor:
        """`(N,)`: the weight of each token, averaged over heads; sums to one."""
        return self.mean.mean(dim=0)

    @property
    def mean_entropy(self) -> float | None:
        """Entropy of an image's attention, averaged over images and heads, in nats: 0 (one token) to log N (uniform)."""
        return None if self.entropy is None else float(self.entropy.mean())

    @property
    def relative_entropy(self) -> float | None:
        """`mean_entropy` as a share of log N; `None` if there is one token."""
        if self.mean_entropy is None or len(self.token_names) < 2:
            return None
        return self.mean_entropy / math.log(len(self.token_names))

    @property
    def layer_weights(self) -> dict[int, float]:
        """The weight of all tokens of a layer together, averaged over heads, in the layers' order; sums to one.

        Raises:
            LayerFusionError: if the tokens' coordinates are not known.
        """
        weights: dict[int, float] = {}
        for layer, weight in zip(self._layers(), self.token_weights.tolist(), strict=True):
            weights[layer] = weights.get(layer, 0.0) + weight
        return dict(sorted(weights.items()))

    @property
    def grouped(self) -> tuple[list[str], Tensor, Tensor, list[int]]:
        """What a figure has room for: the patches of an activation, and the cells of a grid, as one.

        Names of the G groups, mean and spread of the weight of each as a whole, `(H, G)`, and how many tokens each has.
        The tokens themselves where no group has several, or where the spread of groups is not known.
        """
        if self.bank is None or self.group_std is None:
            return self.token_names, self.mean, self.std, [1] * len(self.token_names)
        groups = self.bank.groups
        sizes = [len(positions) for positions in groups.values()]
        return [group.name for group in groups], _group_sums(self.mean, groups.values()), self.group_std, sizes

    @property
    def depth_by_head(self) -> Tensor:
        """`(H,)`, float64: for each head, the mean layer number of its attention as a share of L.

        A layer counts by all its tokens, so uniform attention over the CLS and mean tokens of layers 1 to L has depth
        (L + 1) / 2L, not a half.

        Raises:
            LayerFusionError: if the tokens' coordinates are not known.
        """
        layers = torch.tensor(self._layers(), dtype=torch.float64)
        return self.mean.double() @ layers / (self.num_layers or max(self._layers()))

    @property
    def expected_depth(self) -> float:
        """`depth_by_head` averaged over heads: 0 for the embeddings, 1 for the last layer.

        Raises:
            LayerFusionError: if the tokens' coordinates are not known.
        """
        return float(self.depth_by_head.mean())

    def _layers(self) -> list[int]:
        if self.bank is None:
            raise LayerFusionError(
                "this summary does not know its tokens' layers: make it with summarise_attentions, or pass bank="
            )
        return [coordinate.layer for coordinate in self.bank.coordinates]

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "num_images": self.num_images,
            "tokens": [
                {"name": name, "weight": round(weight, 6)}
                for name, weight in zip(self.token_names, self.token_weights.tolist(), strict=True)
            ],
            "heads": [
                {"mean": _rounded(mean), "std": _rounded(std)} for mean, std in zip(self.mean, self.std, strict=True)
            ],
        }
        if self.entropy is not None:
            values["entropy"] = {
                "nats": self.mean_entropy,
                "share_of_uniform": self.relative_entropy,
                "by_head": _rounded(self.entropy),
            }
        if self.bank is not None:
            values["depth"] = {"expected": self.expected_depth, "by_head": _rounded(self.depth_by_head)}
            values["layers"] = [
                {"layer": layer, "weight": round(weight, 6)} for layer, weight in self.layer_weights.items()
            ]
        if self.class_means:
            values["classes"] = [
                {
                    "label": self.label_names.get(number, str(number)),
                    "num_images": self.class_counts[number],
                    "weights": _rounded(mean.mean(dim=0)),
                }
                for number, mean in self.class_means.items()
            ]
        return values

    def save_json(self, path: str | Path) -> None:
        """Write names and weights; mean and spread by head; entropy, depth, and weights by layer and by class."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")


def _group_sums(weights: Tensor, groups: Iterable[list[int]]) -> Tensor:
    """`(..., N)` to `(..., G)`."""
    return torch.stack([weights[..., positions].sum(dim=-1) for positions in groups], dim=-1)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def summarise_attentions(
    model: ViTForAttentiveLayerFusionClassification, batches: Iterable[dict[str, Tensor]]
) -> AttentionSummary:
    """Run batches through the model and collect the layer attentions.

    Args:
        model: with an attentive or scalar-mix head; it is left in eval mode.
        batches: each holds `layer_features`, or `pixel_values` and what else the backbone reads. Class labels, `(B,)` and
            integer, are not shown to the model, and give the means by class; other labels are ignored.

    Raises:
        LayerFusionError: if the head has no attention, or there are no batches.
    """
    count = 0
    total = squares = entropy = group_squares = torch.zeros(0)
    class_totals: dict[int, Tensor] = {}
    class_counts: dict[int, int] = {}
    bank = model.config.bank
    groups = list(bank.groups.values())
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
            entropy = by_head.new_zeros(by_head.shape[1])
            group_squares = by_head.new_zeros(by_head.shape[1], len(groups))
        total = total + by_head.sum(dim=0)
        squares = squares + by_head.square().sum(dim=0)
        if len(groups) < len(bank):
            group_squares = group_squares + _group_sums(by_head, groups).square().sum(dim=0)
        entropy = entropy + torch.special.entr(by_head).sum(dim=(0, 2))
        count += len(by_head)
        labels = _class_labels(batch)
        for number in [] if labels is None else labels.unique().tolist():
            members = by_head[labels == number]
            class_totals[number] = class_totals.get(number, torch.zeros_like(total)) + members.sum(dim=0)
            class_counts[number] = class_counts.get(number, 0) + len(members)
    if not count:
        raise LayerFusionError("there are no images to explain")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    group_std = None
    if len(groups) < len(bank):
        group_std = (group_squares / count - _group_sums(mean, groups).square()).clamp_min(0).sqrt()
    return AttentionSummary(
        model.config.token_names,
        mean,
        std,
        count,
        bank=bank,
        num_layers=model.config.layout.num_layers,
        entropy=entropy / count,
        class_means={number: class_totals[number] / class_counts[number] for number in sorted(class_totals)},
        class_counts=dict(sorted(class_counts.items())),
        label_names={int(number): name for number, name in model.config.id2label.items()},
        group_std=group_std,
    )


def _class_labels(batch: dict[str, Tensor]) -> Tensor | None:
    """Class labels `(B,)`; `None` for regression, several labels per image, or no labels."""
    labels = next((batch[name] for name in _LABELS if name in batch), None)
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        return None
    return labels.cpu()
