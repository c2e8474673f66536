"""Where images come from: a table that is read by row, or a stream that is read in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, IterableDataset, List, Value
from PIL.Image import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader

from ..configuration_layer_fusion import LayerFusionConfig
from ..data import find_image_column, find_label_column
from ..errors import LayerFusionError
from ..images import check_images, decode_image, describe_row, process_image, stack_images

# Of a stream, how many batches are decoded while one is in the backbone.
_BATCHES_AHEAD = 2

Augmentation = Callable[[PILImage, np.random.Generator], PILImage]


@dataclass
class Unreadable:
    """An image that could not be read, in the place of its pixels."""

    row: int
    path: str | None
    reason: str


@dataclass
class Batch:
    """Images of one forward pass.

    Attributes:
        rows: of the extraction; with several views, view v of image i is row `v * images + i`.
        inputs: of the backbone, stacked; empty if no row could be read.
        unreadable: rows that could not be read, which are not in `rows`.
        labels: of `rows`, `(B,)` or `(B, C)`; `None` if there are none.
    """

    rows: list[int]
    inputs: dict[str, Tensor]
    unreadable: list[Unreadable]
    labels: np.ndarray | None

    def pin_memory(self) -> Batch:
        """What a `DataLoader` calls for copies that overlap with the device's work."""
        self.inputs = {name: value.pin_memory() for name, value in self.inputs.items()}
        return self


class Reader:
    """Decode, augment and process one image at a time, in whatever process this runs."""

    def __init__(self, processor: Any, augment: Augmentation | None, seed: int, skips: bool):
        self.processor, self.augment, self.seed, self.skips = processor, augment, seed, skips

    def read(self, row: int, number: int, value: Any) -> dict[str, Tensor] | Unreadable:
        try:
            image = decode_image(value, describe_row(number, value))
        except LayerFusionError as error:
            if not self.skips:
                raise
            return Unreadable(row, value.get("path") if isinstance(value, dict) else None, str(error))
        if self.augment is not None:
            image = self.augment(image, np.random.default_rng([self.seed, row]))
        return process_image(self.processor, image)


class TableSource:
    """The images of a `datasets.Dataset`.

    Raises:
        LayerFusionError: for missing columns, no rows, or labels that do not fit the head.
    """

    def __init__(self, dataset: Dataset, image_column: str, label_column: str | None, config: LayerFusionConfig):
        find_image_column(dataset, image_column)
        if label_column is not None:
            find_label_column(dataset, label_column)
        if len(dataset) == 0:
            raise LayerFusionError("the dataset is empty")
        self.images = dataset.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        self.image_column, self.num_images = image_column, len(dataset)
        self.labels, self.label_feature = None, None
        if label_column is not None:
            values = np.asarray(dataset.select_columns([label_column]).with_format(None)[label_column][:])
            feature = dataset.features[label_column]
            self.labels, self.label_feature = check_label_values(values, feature, label_column, config)
        self.identity = {
            "fingerprint": dataset._fingerprint,
            "rows": len(dataset),
            "image_column": image_column,
            "label_column": label_column,
        }

    def check(self, rows: Sequence[int], progress: bool) -> None:
        """Read the header of every image once.

        Raises:
            LayerFusionError: naming the first that cannot be read.
        """
        needed = sorted({row % self.num_images for row in rows})
        check_images(self.images.select(needed)[self.image_column], rows=needed, progress=progress)

    def batches(self, batches: list[list[int]], reader: Reader, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        yield from DataLoader(
            _Rows(self.images, self.image_column, reader),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=self._collate,
            pin_memory=pin_memory,
        )

    def _collate(self, items: list[tuple[int, dict[str, Tensor] | Unreadable]]) -> Batch:
        batch = _collate(items)
        if self.labels is not None:
            batch.labels = self.labels[np.asarray(batch.rows, dtype=np.int64) % self.num_images]
        return batch


class _Rows(torch.utils.data.Dataset):
    """One image at a time, so that worker processes do the decoding."""

    def __init__(self, images: Dataset, image_column: str, reader: Reader):
        self.images, self.image_column, self.reader = images, image_column, reader

    def __getitem__(self, row: int) -> tuple[int, dict[str, Tensor] | Unreadable]:
        number = row % len(self.images)
        return row, self.reader.read(row, number, self.images[number][self.image_column])


class StreamSource:
    """The images of a `datasets.IterableDataset`, such as WebDataset archives, read in order.

    Every process goes through the whole stream and decodes its own rows only, so the order is that of the stream
    whatever the number of processes.

    Raises:
        LayerFusionError: for missing columns, or if the number of rows or the fingerprint is not given.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        image_column: str,
        label_column: str | None,
        config: LayerFusionConfig,
        num_rows: int | None,
        fingerprint: str | None,
    ):
        if num_rows is None or fingerprint is None:
            raise LayerFusionError(
                "a stream knows neither its length nor its version: pass num_rows=, and fingerprint= (a name for the "
                "data and its version, by which a cache is recognised)"
            )
        features = dataset.features or dataset._resolve_features().features
        for column in (image_column, label_column):
            if column is not None and column not in features:
                raise LayerFusionError(f"column {column!r} is not in the stream: it has {list(features)}")
        self.stream = dataset.cast_column(image_column, Image(decode=False))
        self.image_column, self.label_column, self.num_images = image_column, label_column, num_rows
        self.config, self.feature = config, features.get(label_column)
        self.label_feature = None
        if label_column is not None:
            first = next(iter(dataset.select_columns([label_column])), None)
            if first is None:
                raise LayerFusionError("the stream is empty")
            labels, self.label_feature = check_label_values(
                np.asarray([first[label_column]]), self.feature, label_column, config
            )
            self.no_labels = labels[:0]
        self.identity = {
            "fingerprint": fingerprint,
            "rows": num_rows,
            "image_column": image_column,
            "label_column": label_column,
        }

    def check(self, rows: Sequence[int], progress: bool) -> None:
        """Nothing: reading a stream twice would cost as much as extracting it."""

    def batches(self, batches: list[list[int]], reader: Reader, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        """Images are decoded by threads: `datasets` would deal the stream out to worker processes in another order."""
        for batch in self._decoded(batches, reader, num_workers):
            yield batch.pin_memory() if pin_memory else batch

    def _decoded(self, batches: list[list[int]], reader: Reader, num_workers: int) -> Iterator[Batch]:
        if not num_workers:
            for rows, examples in self._examples(batches):
                values = [self._read(reader, *pair) for pair in zip(rows, examples, strict=True)]
                yield self._batch(rows, examples, values)
            return
        with ThreadPoolExecutor(num_workers) as threads:
            ahead: deque[tuple[list[int], list[dict], list[Future]]] = deque()
            for rows, examples in self._examples(batches):
                read = [threads.submit(self._read, reader, *pair) for pair in zip(rows, examples, strict=True)]
                ahead.append((rows, examples, read))
                if len(ahead) > _BATCHES_AHEAD:
                    yield self._batch_of(*ahead.popleft())
            while ahead:
                yield self._batch_of(*ahead.popleft())

    def _examples(self, batches: list[list[int]]) -> Iterator[tuple[list[int], list[dict]]]:
        """The rows of each batch, from one pass through the stream."""
        pending = iter(batches)
        rows = next(pending, None)
        held: list[dict] = []
        for row, example in enumerate(self.stream):
            if rows is None:
                return
            if row < rows[0]:
                continue
            held.append(example)
            if row == rows[-1]:
                yield rows, held
                held, rows = [], next(pending, None)
        if rows is not None:
            raise LayerFusionError(
                f"the stream ended before row {rows[-1]}, but num_rows={self.num_images}: give the number that it has. "
                "The shards finished so far are kept"
            )

    def _read(self, reader: Reader, row: int, example: dict) -> dict[str, Tensor] | Unreadable:
        return reader.read(row, row, example[self.image_column])

    def _batch_of(self, rows: list[int], examples: list[dict], read: list[Future]) -> Batch:
        return self._batch(rows, examples, [future.result() for future in read])

    def _batch(self, rows: list[int], examples: list[dict], values: list[dict[str, Tensor] | Unreadable]) -> Batch:
        batch = _collate(list(zip(rows, values, strict=True)))
        if self.label_column is not None and not batch.rows:
            batch.labels = self.no_labels
        elif self.label_column is not None:
            labels = {row: example[self.label_column] for row, example in zip(rows, examples, strict=True)}
            kept = np.asarray([labels[row] for row in batch.rows])
            numbers = np.asarray(batch.rows)
            batch.labels, _ = check_label_values(kept, self.feature, self.label_column, self.config, numbers)
        return batch


def _collate(items: list[tuple[int, dict[str, Tensor] | Unreadable]]) -> Batch:
    readable = [(row, value) for row, value in items if not isinstance(value, Unreadable)]
    unreadable = [value for _, value in items if isinstance(value, Unreadable)]
    inputs = stack_images([value for _, value in readable]) if readable else {}
    return Batch([row for row, _ in readable], inputs, unreadable, None)


def check_label_values(
    labels: np.ndarray, feature: Any, label_column: str, config: LayerFusionConfig, rows: np.ndarray | None = None
) -> tuple[np.ndarray, Any]:
    """The labels in the dtype they are stored in, and the `datasets` feature that describes them.

    Args:
        labels: `(rows,)` or `(rows, C)`.
        feature: of the column, `None` if it is not known.
        rows: their numbers, for errors.

    Raises:
        LayerFusionError: if they do not fit the head.
    """
    num_labels = config.num_labels
    if labels.dtype.kind in "OUS":
        raise LayerFusionError(
            f"label column {label_column!r} holds {feature or 'text'}: turn it into class indices with "
            f"dataset.class_encode_column({label_column!r})"
        )
    if isinstance(feature, ClassLabel) and feature.num_classes != num_labels:
        raise LayerFusionError(
            f"the dataset has {feature.num_classes} classes, but the head has num_labels={num_labels}: "
            "pass id2label or num_labels of the dataset to from_backbone"
        )
    if labels.dtype.kind in "iub" and labels.ndim == 1 and config.problem_type != "regression":
        bad = np.flatnonzero((labels < 0) | (labels >= num_labels))
        if len(bad):
            raise LayerFusionError(
                f"row {bad[0] if rows is None else rows[bad[0]]} has label {labels[bad[0]]}, but the head has "
                f"num_labels={num_labels}: labels must be 0 to {num_labels - 1}"
            )
        return labels.astype(np.int64), feature if isinstance(feature, ClassLabel) else Value("int64")
    if labels.ndim == 2 and labels.shape[1] != num_labels:
        raise LayerFusionError(f"rows have {labels.shape[1]} labels, but the head has num_labels={num_labels}")
    is_row = labels.ndim == 2
    return labels.astype(np.float32), List(Value("float32"), length=labels.shape[1]) if is_row else Value("float32")
