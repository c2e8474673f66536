"""Class weights for unbalanced training data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..errors import LayerFusionError


def class_weights(labels: Sequence[int] | np.ndarray | Tensor, num_labels: int) -> list[float]:
    """One weight per class, `n / (C * count)`, and 0 for a class without rows, as the reference computes it.

    n counts the rows and C all classes, empty ones too.

    Args:
        labels: the class index of each training row.
        num_labels: C.

    Raises:
        LayerFusionError: if there are no labels, or one is no class index from 0 to C - 1.
    """
    values = np.asarray(labels)
    if not values.size:
        raise LayerFusionError("class weights need at least one label, but there are none")
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise LayerFusionError(
            f"class weights need one class index per row, but the labels are {values.dtype} of shape {values.shape}"
        )
    bad = np.flatnonzero((values < 0) | (values >= num_labels))
    if len(bad):
        raise LayerFusionError(
            f"row {bad[0]} has label {values[bad[0]]}, but num_labels={num_labels}: "
            f"labels must be 0 to {num_labels - 1}"
        )
    counts = np.bincount(values.astype(np.int64), minlength=num_labels)
    weights = np.where(counts > 0, len(values) / (num_labels * np.maximum(counts, 1)), 0.0)
    return weights.tolist()


__all__ = ["class_weights"]
