"""Train on one augmented view per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .store import LayerFeatures


class EpochViews(torch.utils.data.Dataset):
    """The images of a cache with several views, of which each epoch sees one; view 0 comes after the last.

    `Trainer` and accelerate's data loaders call `set_epoch` by themselves; a loop of one's own calls it before each
    epoch, and with worker processes before they start.

    Args:
        features: extracted with `views=k`.
    """

    def __init__(self, features: LayerFeatures):
        self.views = [features.view(number) for number in range(features.num_views)]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.current = self.views[epoch % len(self.views)]

    def __len__(self) -> int:
        return len(self.current)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.current[index]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        return self.current.__getitems__(indices)


__all__ = ["EpochViews"]
