"""Run a dataset through the backbone once and keep its tokens."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import pyarrow as pa
import torch
import transformers
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..backbones import execution_device
from ..bank import TokenBank
from ..configuration_layer_fusion import LayerFusionConfig
from ..data import find_image_column, find_label_column
from ..errors import LayerFusionError
from ..images import check_images, decode_image, describe_row, process_image, stack_images
from .manifest import MANIFEST_NAME, STORAGE_DTYPES, Manifest, Shard, describe_difference, sha256_of, shard_file
from .store import FEATURES_COLUMN, LABEL_COLUMN, LayerFeatures

if TYPE_CHECKING:
    from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification

logger = logging.get_logger(__name__)

_POLL_SECONDS = 0.25


def extract_features(
    model: ViTForAttentiveLayerFusionClassification,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    image_column: str = "image",
    label_column: str | None = "label",
    image_processor: Any | None = None,
    bank: TokenBank | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    dtype: str = "float16",
    rows_per_shard: int = 1024,
    on_error: str = "raise",
    max_skipped: float = 0.01,
    overwrite: bool = False,
    progress: bool = True,
    process_index: int | None = None,
    num_processes: int | None = None,
    **backbone_kwargs: Any,
) -> LayerFeatures:
    """Extract the token bank of every image, or reuse what an earlier call extracted.

    Whole shards survive a kill, and the next call does the others. An existing cache is used only if everything that
    shaped it is the same: backbone weights, processor settings, bank, dtype, dataset and library versions.

    Under `accelerate launch` every process calls this with a folder that all of them see. Each extracts its share of
    the shards; all of them return the whole cache. Batches never cross shards, so that neither a kill nor the number of
    processes changes a bit, as long as `batch_size`, `rows_per_shard` and the threads per process are the same.

    Args:
        model: holds the backbone; its head plays no part.
        dataset: a `datasets.Dataset` with an image column. Rows keep their order.
        output_dir: folder of the cache.
        image_column: column of images (files, bytes or `PIL` images).
        label_column: column of class indices, floats, or lists of floats; `None` for no labels.
        image_processor: by default the model's own.
        bank: by default the model's; a union `a.config.bank | b.config.bank` serves several heads.
        batch_size: images per forward pass.
        num_workers: processes that decode and preprocess images.
        dtype: of the stored tokens, `"float16"` or `"float32"`.
        rows_per_shard: rows of the dataset per Arrow file, which is what a kill may cost. A cache that was begun keeps
            its own.
        on_error: `"raise"` stops at an image that cannot be read, before the backbone runs; `"skip"` leaves it out, and
            notes its row, path and reason (`features.manifest.skipped`).
        max_skipped: with `"skip"`, the share of the rows beyond which extraction stops after all.
        overwrite: replace a cache that does not match.
        progress: show progress bars, on the first process only.
        process_index: which share of the shards this process does; by default accelerate's.
        num_processes: how many shares there are; `1` where one process extracts while others wait for it, as under
            `main_process_first`.
        backbone_kwargs: passed to the backbone's forward.

    Returns:
        The opened cache.

    Raises:
        LayerFusionError: before the long work starts for missing columns, an empty dataset, labels that do not fit the
            head, unreadable images, or a cache of something else; during it for tokens that are not finite, and for too
            many skipped images.
    """
    if not isinstance(dataset, Dataset):
        raise LayerFusionError(
            f"extract_features takes one datasets.Dataset, not a {type(dataset).__name__}: "
            "choose a split, such as dataset['train']"
        )
    output_dir = Path(output_dir)
    processor: Any = image_processor or model.image_processor
    bank = bank or model.config.bank
    _check_request(dataset, image_column, label_column, processor, dtype, on_error)
    labels, label_feature = _checked_labels(dataset, label_column, model.config)
    share = _share(process_index, num_processes)
    manifest = Manifest(
        bank=bank.to_list(),
        hidden_size=bank.width(model.config.layout),
        dtype=dtype,
        num_rows=len(dataset),
        rows_per_shard=rows_per_shard,
        label_names=label_feature.names if isinstance(label_feature, ClassLabel) else None,
        ingredients={
            "backbone": dict(model.config.backbone_fingerprint or {"digest": "unknown"}, parts=None),
            "token_layout": model.config.token_layout,
            "bank": bank.to_list(),
            "processor": _plain(processor.to_dict()),
            "dtype": dtype,
            "backbone_kwargs": _plain(backbone_kwargs),
            "on_error": on_error,
            "versions": _versions(),
            "dataset": {
                "fingerprint": dataset._fingerprint,
                "rows": len(dataset),
                "image_column": image_column,
                "label_column": label_column,
            },
        },
    )
    manifest = _resume(output_dir, manifest, overwrite, share)
    if manifest.is_complete:
        logger.info(f"reusing the features in {output_dir}")
        return LayerFeatures.open(output_dir)
    shards = manifest.missing_shards[share.index :: share.count]
    images = dataset.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    is_shown = progress and share.index == 0
    if on_error == "raise":
        for index in shards:
            rows = manifest.rows_of(index)
            check_images(images.select(rows)[image_column], first_row=rows.start, progress=is_shown)
    batches = [
        (index, rows[start : start + batch_size])
        for index in shards
        for rows in [manifest.rows_of(index)]
        for start in range(0, len(rows), batch_size)
    ]
    loader = DataLoader(
        _DecodedImages(images, image_column, processor, skips=on_error == "skip"),
        batch_sampler=[list(rows) for _, rows in batches],
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=model.device.type == "cuda",
    )
    num_rows = sum(len(rows) for _, rows in batches)
    with tqdm(total=num_rows, desc="extracting", unit="image", delay=2, disable=not is_shown) as bar:
        parts = zip(batches, _extract(model, loader, bank, manifest, backbone_kwargs, bar), strict=True)
        for index, group in groupby(parts, key=lambda part: part[0][0]):
            extracted = [part for _, part in group]
            skipped = [entry for part in extracted for entry in part.skipped]
            _check_skipped(manifest, skipped, max_skipped)
            tokens = torch.cat([part.tokens for part in extracted])
            kept = [row for part in extracted for row in part.rows]
            shard_labels = None if labels is None else labels[kept]
            manifest.add(output_dir, _write_shard(output_dir, index, tokens, shard_labels, label_feature, skipped))
    return _finish(output_dir, share)


@dataclass(frozen=True)
class _Share:
    """Which part of the shards this process does."""

    index: int
    count: int


def _share(process_index: int | None, num_processes: int | None) -> _Share:
    if num_processes is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        state = PartialState()
        return _Share(state.process_index, state.num_processes)
    share = _Share(process_index or 0, num_processes or 1)
    if not 0 <= share.index < share.count:
        raise LayerFusionError(f"process_index={share.index} is not one of num_processes={share.count}")
    return share


def _finish(folder: Path, share: _Share) -> LayerFeatures:
    """Wait for the other processes' shards, and gather all records."""
    waited = 0.0
    while not ((folder / MANIFEST_NAME).is_file() and (manifest := Manifest.load(folder)).is_complete):
        # No collective call: a process that died would leave the others in it.
        time.sleep(_POLL_SECONDS)
        waited += _POLL_SECONDS
        if waited % 60 < _POLL_SECONDS:
            logger.warning(f"waiting for the shards of other processes in {folder}")
    if share.index == 0:
        manifest.gather(folder)
    return LayerFeatures.open(folder)


@dataclass
class _Unreadable:
    """An image that could not be read, in the place of its pixels."""

    row: int
    path: str | None
    reason: str


class _DecodedImages(torch.utils.data.Dataset):
    """Inputs of the backbone for one image at a time, so that worker processes do the decoding."""

    def __init__(self, images: Dataset, image_column: str, processor: Any, skips: bool):
        self.images, self.image_column, self.processor, self.skips = images, image_column, processor, skips

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[int, dict[str, Tensor] | _Unreadable]:
        value = self.images[row][self.image_column]
        try:
            image = decode_image(value, describe_row(row, value))
        except LayerFusionError as error:
            if not self.skips:
                raise
            path = value.get("path") if isinstance(value, dict) else None
            return row, _Unreadable(row, path, str(error))
        return row, process_image(self.processor, image)


def _collate(items: list[tuple[int, dict[str, Tensor] | _Unreadable]]) -> tuple[list[int], dict, list[_Unreadable]]:
    """The rows that could be read, their stacked inputs, and those that could not."""
    readable = [(row, value) for row, value in items if not isinstance(value, _Unreadable)]
    unreadable = [value for _, value in items if isinstance(value, _Unreadable)]
    inputs = stack_images([value for _, value in readable]) if readable else {}
    return [row for row, _ in readable], inputs, unreadable


@dataclass
class _Extracted:
    """One batch's tokens `(B, N, D)`, the dataset's rows they belong to, and the rows left out."""

    tokens: Tensor
    rows: list[int]
    skipped: list[dict[str, Any]]


def _extract(
    model: ViTForAttentiveLayerFusionClassification,
    loader: DataLoader,
    bank: TokenBank,
    manifest: Manifest,
    backbone_kwargs: dict[str, Any],
    bar: tqdm,
) -> Iterator[_Extracted]:
    storage = getattr(torch, manifest.dtype)
    was_training = model.training
    model.eval()
    device = execution_device(model.backbone)
    try:
        for rows, inputs, unreadable in loader:
            stored = torch.empty(0, len(bank), manifest.hidden_size, dtype=storage)
            if rows:
                inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
                with torch.inference_mode():
                    computed = model.extract_layer_features(**inputs, bank=bank, **backbone_kwargs)
                stored = computed.to(storage).cpu()
                _check_finite(stored, computed, rows, bank, manifest.dtype)
            bar.update(len(rows) + len(unreadable))
            yield _Extracted(stored, rows, [asdict(image) for image in unreadable])
    finally:
        model.train(was_training)


def _check_skipped(manifest: Manifest, skipped: list[dict[str, Any]], max_skipped: float) -> None:
    count = len(manifest.skipped) + len(skipped)
    if count > max_skipped * manifest.num_rows:
        first = (manifest.skipped + skipped)[0]
        raise LayerFusionError(
            f"{count} of {manifest.num_rows} images cannot be read, more than max_skipped={max_skipped:.1%}; the first: "
            f"{first['reason']}. The shards finished so far are kept"
        )


def _check_finite(stored: Tensor, computed: Tensor, rows: list[int], bank: TokenBank, dtype: str) -> None:
    finite = torch.isfinite(stored).all(dim=-1)
    if finite.all():
        return
    row, token = torch.nonzero(~finite)[0].tolist()
    if torch.isfinite(computed).all():
        cure = f"they do not fit {dtype}: extract with dtype='float32'"
    else:
        cure = "the backbone itself computes them: load it with dtype=torch.float32, or check its weights"
    raise LayerFusionError(
        f"row {rows[row]} has NaN or infinite features at {bank.names[token]}; {cure}. "
        "The shards finished so far are kept"
    )


def _write_shard(
    folder: Path,
    index: int,
    tokens: Tensor,
    labels: np.ndarray | None,
    label_feature: Any,
    skipped: list[dict[str, Any]],
) -> Shard:
    """Write one Arrow file under a temporary name, then rename it."""
    flat = tokens.flatten(1)  # (rows, N * D)
    columns = {FEATURES_COLUMN: List(Value(str(tokens.dtype).removeprefix("torch.")), length=flat.shape[1])}
    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(flat.flatten().numpy()), flat.shape[1])]
    if labels is not None:
        columns[LABEL_COLUMN] = label_feature
        values = labels.tolist()
        arrays.append(pa.array(values, type=Features({LABEL_COLUMN: label_feature}).arrow_schema.field(0).type))
    schema = Features(columns).arrow_schema
    folder.mkdir(parents=True, exist_ok=True)  # not before: bad input leaves nothing behind
    path = folder / shard_file(index)
    staged = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(staged, "wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        file.flush()
        os.fsync(file.fileno())
    shard = Shard(index, len(tokens), staged.stat().st_size, sha256_of(staged), skipped)
    staged.replace(path)
    return shard


def _resume(folder: Path, wanted: Manifest, overwrite: bool, share: _Share) -> Manifest:
    """The manifest to go on with: the one on disk if everything that shaped it matches."""
    if folder.exists() and not folder.is_dir():
        raise LayerFusionError(f"{folder} is a file: give a folder for the features")
    if not (folder / MANIFEST_NAME).is_file():
        if share.index == 0 and folder.is_dir() and any(not _is_ours(file) for file in folder.iterdir()):
            raise LayerFusionError(f"{folder} is not empty and holds no feature cache: give another folder")
        return wanted
    found = Manifest.load(folder)
    difference = describe_difference(found.ingredients, wanted.ingredients)
    if difference is None:
        for problem in found.drop_damaged(folder):
            logger.warning(f"{problem}: it is extracted again")
        return found
    if not overwrite:
        raise LayerFusionError(
            f"the feature cache in {folder} was made from something else ({difference}): "
            "give another folder, or replace it with overwrite=True (--overwrite)"
        )
    if share.count > 1:
        raise LayerFusionError(f"several processes cannot replace a cache at once: delete {folder} before")
    for file in folder.iterdir():
        if _is_ours(file):
            file.unlink()
    return wanted


def _is_ours(file: Path) -> bool:
    return re.fullmatch(r"features(-\d{5,})?\.(arrow|json)(\.\d+\.tmp)?", file.name) is not None


def _versions() -> dict[str, str]:
    """Of the libraries that shape tokens, without what only fixes mistakes."""
    packages = {"transformers": transformers, "torch": torch, "Pillow": PIL}
    return {name: ".".join(package.__version__.split(".")[:2]) for name, package in packages.items()}


def _check_request(
    dataset: Dataset, image_column: str, label_column: str | None, processor: Any, dtype: str, on_error: str
) -> None:
    if on_error not in ("raise", "skip"):
        raise LayerFusionError(f"on_error={on_error!r}: use 'raise' or 'skip'")
    if dtype not in STORAGE_DTYPES:
        raise LayerFusionError(f"dtype {dtype!r} cannot be stored: choose from {STORAGE_DTYPES}")
    find_image_column(dataset, image_column)
    if label_column is not None:
        find_label_column(dataset, label_column)
    if len(dataset) == 0:
        raise LayerFusionError("the dataset is empty")
    if processor is None:
        raise LayerFusionError("no image processor came with the backbone: pass image_processor=")


def _checked_labels(
    dataset: Dataset, label_column: str | None, config: LayerFusionConfig
) -> tuple[np.ndarray | None, Any]:
    """The labels as an array, and the `datasets` feature that describes them."""
    if label_column is None:
        return None, None
    num_labels, feature = config.num_labels, dataset.features[label_column]
    labels = np.asarray(dataset.select_columns([label_column]).with_format(None)[label_column][:])
    if labels.dtype.kind in "OUS":
        raise LayerFusionError(
            f"label column {label_column!r} holds {feature}: turn it into class indices with "
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
                f"row {bad[0]} has label {labels[bad[0]]}, but the head has num_labels={num_labels}: "
                f"labels must be 0 to {num_labels - 1}"
            )
        return labels.astype(np.int64), feature if isinstance(feature, ClassLabel) else Value("int64")
    if labels.ndim == 2 and labels.shape[1] != num_labels:
        raise LayerFusionError(f"rows have {labels.shape[1]} labels, but the head has num_labels={num_labels}")
    is_row = labels.ndim == 2
    return labels.astype(np.float32), List(Value("float32"), length=labels.shape[1]) if is_row else Value("float32")


def _plain(values: Any) -> Any:
    """The same values as JSON will give them back, so that they can be compared with a manifest's."""

    def describe(value: Any) -> str:
        if isinstance(value, Tensor):
            return hashlib.sha256(value.detach().cpu().numpy().tobytes()).hexdigest()
        return str(value)

    return json.loads(json.dumps(values, default=describe, sort_keys=True))
