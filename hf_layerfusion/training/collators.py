"""From rows of a dataset to the batches that the model's forward takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LayerFusionError
from ..features.store import STATISTICS_COLUMN, GatheredRows
from ..images import decode_image, process_image, stack_images
from ..losses import check_labels

# Names that a column of labels may have, in the order of preference.
LABEL_COLUMNS = ("labels", "label", "label_ids")

Row = Mapping[str, Any]


class LayerFeatureCollator:
    """Rows of cached features to `{"layer_features": (B, N, D), "labels": (B,) or (B, C)}`.

    Takes rows of [`LayerFeatures`] and of its `datasets.Dataset`, whose tokens are flat lists of `N * D` numbers. The
    rows' dtype is kept; lists become float32. Rows without labels give a batch without. Rows that have
    `"token_statistics"` (see [`LayerFeatures.with_statistics`]) give a batch with them, `(B, N, 2)`.

    Args:
        num_tokens: N.
        num_labels: C, to refuse labels out of range; `None` to let them pass.
    """

    def __init__(self, num_tokens: int, num_labels: int | None = None):
        self.num_tokens, self.num_labels = num_tokens, num_labels

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate a batch.

        Raises:
            LayerFusionError: for tokens or statistics of another shape, statistics that some rows lack, and labels that
                are missing in some rows or out of range.
        """
        if isinstance(rows, GatheredRows):
            self._tokens(rows[0])
            if STATISTICS_COLUMN in rows.batch:
                self._statistics(rows[0])
            labels = rows.batch.get("labels")
            checked = {} if labels is None else {"labels": _checked_labels(labels, self.num_labels)}
            return {**rows.batch, **checked}
        tokens = [self._tokens(row) for row in rows]  # B of (N, D)
        if len({row.shape for row in tokens}) > 1:
            raise LayerFusionError(
                f"rows of one batch have features of shapes {sorted({tuple(row.shape) for row in tokens})}: "
                "extract them with one backbone and one bank"
            )
        batch = {"layer_features": torch.stack(tokens)}
        if any(STATISTICS_COLUMN in row for row in rows):
            batch[STATISTICS_COLUMN] = torch.stack([self._statistics(row) for row in rows])
        return {**batch, **_collate_labels(rows, LABEL_COLUMNS, self.num_labels)}

    def _tokens(self, row: Row) -> Tensor:
        if "layer_features" not in row:
            raise LayerFusionError(f"rows have no column 'layer_features', only {sorted(row)}")
        tokens = _as_tensor(row["layer_features"])
        if tokens.ndim == 1 and tokens.numel() % self.num_tokens == 0:
            tokens = tokens.view(self.num_tokens, -1)
        if tokens.ndim != 2 or tokens.shape[0] != self.num_tokens:
            raise LayerFusionError(
                f"a row has features of shape {tuple(tokens.shape)}, which are not {self.num_tokens} tokens: "
                "select the head's tokens with features.select_bank(model.config.bank)"
            )
        return tokens

    def _statistics(self, row: Row) -> Tensor:
        if STATISTICS_COLUMN not in row:
            raise LayerFusionError(
                f"some rows of one batch have {STATISTICS_COLUMN!r} and some have not: call with_statistics() on all of "
                "the features they come from"
            )
        statistics = _as_tensor(row[STATISTICS_COLUMN])
        if statistics.shape != (self.num_tokens, 2):
            raise LayerFusionError(
                f"a row has {STATISTICS_COLUMN} of shape {tuple(statistics.shape)}, which are not norm and standard "
                f"deviation of {self.num_tokens} tokens: take them with features.with_statistics()"
            )
        return statistics


class ImageCollator:
    """Rows with pictures to `{"pixel_values": (B, 3, H, W), "labels": (B,) or (B, C)}`.

    What else the processor gives for the backbone (SigLIP 2's masks and grids) comes along.
    `Trainer` drops columns that the model's forward does not name before a collator sees them: give it
    `TrainingArguments(remove_unused_columns=False)`. Cast the column to `datasets.Image(decode=False)` to have corrupt
    files named. Rows without labels give a batch without.

    Args:
        image_processor: a transformers image processor, such as `model.image_processor`.
        image_column: column of pictures: anything that `hf_layerfusion.images.decode_image` takes.
        label_column: column of labels.
        num_labels: C, to refuse labels out of range; `None` to let them pass.
    """

    def __init__(
        self,
        image_processor: Any,
        image_column: str = "image",
        label_column: str = "label",
        num_labels: int | None = None,
    ):
        if image_processor is None:
            raise LayerFusionError("ImageCollator needs an image processor: none came with the model, so pass one")
        self.image_processor = image_processor
        self.image_column, self.label_column, self.num_labels = image_column, label_column, num_labels

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Decode and collate a batch.

        Raises:
            LayerFusionError: for a missing image column, a corrupt picture, a processor that leaves pictures at
                different sizes, and for labels that are missing in some rows or out of range.
        """
        return {
            **stack_images([self._pixels(row, position) for position, row in enumerate(rows)]),
            **_collate_labels(rows, (self.label_column,), self.num_labels),
        }

    def _pixels(self, row: Row, position: int) -> dict[str, Tensor]:
        if self.image_column not in row:
            raise LayerFusionError(
                f"rows have no image column {self.image_column!r}, only {sorted(row)}: name it with image_column, and "
                "give Trainer remove_unused_columns=False, or it drops the column before the collator sees it"
            )
        value = row[self.image_column]
        image = decode_image(value, _describe(value, position))
        return process_image(self.image_processor, image)


def _as_tensor(value: Any) -> Tensor:
    # Arrays of memory-mapped files are read-only, and `as_tensor` warns of those.
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _describe(value: Any, position: int) -> str:
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    return f"image {position} of the batch" + (f" ({path})" if path else "")


def _collate_labels(rows: Sequence[Row], columns: Sequence[str], num_labels: int | None) -> dict[str, Tensor]:
    column = next((column for column in columns if column in rows[0]), None)
    if column is None:
        return {}
    lacking = [position for position, row in enumerate(rows) if row.get(column) is None]
    if lacking:
        raise LayerFusionError(
            f"row {lacking[0]} of the batch has no {column!r}: remove rows without labels, or the column"
        )
    return {"labels": _checked_labels(torch.stack([_as_tensor(row[column]) for row in rows]), num_labels)}


def _checked_labels(labels: Tensor, num_labels: int | None) -> Tensor:
    """Labels `(B,)` or `(B, C)` in the dtype that their loss takes."""
    if labels.is_floating_point() or labels.ndim > 1:
        labels = labels.float()  # several labels, or a number: both are compared with logits
        if num_labels is not None and labels.ndim > 1 and labels.shape[1] != num_labels:
            raise LayerFusionError(f"rows have {labels.shape[1]} labels, but the head has num_labels={num_labels}")
    elif num_labels is not None and num_labels > 1:  # a head with one output regresses: any number goes
        check_labels(labels, num_labels)
    return labels


__all__ = ["ImageCollator", "LayerFeatureCollator"]
