"""Run a dataset through the backbone once and keep its tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
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
from .manifest import MANIFEST_NAME, STORAGE_DTYPES, Manifest, Shard, describe_difference, sha256_of
from .store import FEATURES_COLUMN, LABEL_COLUMN, LayerFeatures

if TYPE_CHECKING:
    from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification

logger = logging.get_logger(__name__)


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
    overwrite: bool = False,
    progress: bool = True,
    **backbone_kwargs: Any,
) -> LayerFeatures:
    """Extract the token bank of every image, or reuse what an earlier call extracted.

    Whole shards survive a kill, and the next call goes on after the last one. An existing cache is used only if
    everything that shaped it is the same: backbone weights, processor settings, bank, dtype and dataset.

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
        rows_per_shard: rows per Arrow file, which is what a kill may cost.
        overwrite: replace a cache that does not match.
        progress: show progress bars.
        backbone_kwargs: passed to the backbone's forward.

    Returns:
        The opened cache.

    Raises:
        LayerFusionError: before the long work starts for missing columns, an empty dataset, labels that do not fit the
            head, unreadable images, or a cache of something else; during it for tokens that are not finite.
    """
    if not isinstance(dataset, Dataset):
        raise LayerFusionError(
            f"extract_features takes one datasets.Dataset, not a {type(dataset).__name__}: "
            "choose a split, such as dataset['train']"
        )
    output_dir = Path(output_dir)
    processor: Any = image_processor or model.image_processor
    bank = bank or model.config.bank
    _check_request(dataset, image_column, label_column, processor, dtype)
    labels, label_feature = _checked_labels(dataset, label_column, model.config)
    manifest = Manifest(
        bank=bank.to_list(),
        hidden_size=bank.width(model.config.layout),
        dtype=dtype,
        num_rows=len(dataset),
        label_names=label_feature.names if isinstance(label_feature, ClassLabel) else None,
        ingredients={
            "backbone": dict(model.config.backbone_fingerprint or {"digest": "unknown"}, parts=None),
            "token_layout": model.config.token_layout,
            "bank": bank.to_list(),
            "processor": _plain(processor.to_dict()),
            "dtype": dtype,
            "backbone_kwargs": _plain(backbone_kwargs),
            "dataset": {
                "fingerprint": dataset._fingerprint,
                "rows": len(dataset),
                "image_column": image_column,
                "label_column": label_column,
            },
        },
    )
    manifest = _resume(output_dir, manifest, overwrite)
    if manifest.is_complete:
        logger.info(f"reusing the features in {output_dir}")
        return LayerFeatures.open(output_dir)
    images = dataset.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    remaining = images.select(range(manifest.rows_done, len(images)))
    check_images(remaining[image_column], first_row=manifest.rows_done, progress=progress)
    loader = DataLoader(
        _DecodedImages(remaining, image_column, manifest.rows_done, processor),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=stack_images,
        pin_memory=model.device.type == "cuda",
    )
    bar = tqdm(
        total=len(dataset), initial=manifest.rows_done, desc="extracting", unit="image", delay=2, disable=not progress
    )
    with bar:
        tokens = _extract(model, loader, bank, manifest, backbone_kwargs, bar)
        for block in _regroup(tokens, rows_per_shard):
            start = manifest.rows_done
            block_labels = None if labels is None else labels[start : start + len(block)]
            _write_shard(output_dir, manifest, block, block_labels, label_feature)
    return LayerFeatures.open(output_dir)


class _DecodedImages(torch.utils.data.Dataset):
    """Inputs of the backbone for one image at a time, so that worker processes do the decoding."""

    def __init__(self, images: Dataset, image_column: str, first_row: int, processor: Any):
        self.images, self.image_column, self.first_row, self.processor = images, image_column, first_row, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        value = self.images[index][self.image_column]
        image = decode_image(value, describe_row(self.first_row + index, value))
        return process_image(self.processor, image)


def _extract(
    model: ViTForAttentiveLayerFusionClassification,
    loader: DataLoader,
    bank: TokenBank,
    manifest: Manifest,
    backbone_kwargs: dict[str, Any],
    bar: tqdm,
) -> Iterator[Tensor]:
    row = manifest.rows_done
    storage = getattr(torch, manifest.dtype)
    was_training = model.training
    model.eval()
    device = execution_device(model.backbone)
    try:
        for inputs in loader:
            inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
            with torch.inference_mode():
                computed = model.extract_layer_features(**inputs, bank=bank, **backbone_kwargs)
            stored = computed.to(storage).cpu()
            _check_finite(stored, computed, row, bank, manifest.dtype)
            row += len(stored)
            bar.update(len(stored))
            yield stored
    finally:
        model.train(was_training)


def _check_finite(stored: Tensor, computed: Tensor, first_row: int, bank: TokenBank, dtype: str) -> None:
    finite = torch.isfinite(stored).all(dim=-1)
    if finite.all():
        return
    row, token = torch.nonzero(~finite)[0].tolist()
    if torch.isfinite(computed).all():
        cure = f"they do not fit {dtype}: extract with dtype='float32'"
    else:
        cure = "the backbone itself computes them: load it with dtype=torch.float32, or check its weights"
    raise LayerFusionError(
        f"row {first_row + row} has NaN or infinite features at {bank.names[token]}; {cure}. "
        "The shards finished so far are kept"
    )


def _regroup(blocks: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Join batches into blocks of exactly `size` rows; the last one may be smaller."""
    held: list[Tensor] = []
    for block in blocks:
        held.append(block)
        while (count := sum(len(part) for part in held)) >= size:
            joined = torch.cat(held)
            yield joined[:size]
            held = [joined[size:]] if count > size else []
    if held:
        yield torch.cat(held)


def _write_shard(
    folder: Path, manifest: Manifest, tokens: Tensor, labels: np.ndarray | None, label_feature: Any
) -> None:
    """Write one Arrow file under a temporary name, rename it, then name it in the manifest."""
    flat = tokens.flatten(1)  # (rows, N * D)
    columns = {FEATURES_COLUMN: List(Value(manifest.dtype), length=flat.shape[1])}
    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(flat.flatten().numpy()), flat.shape[1])]
    if labels is not None:
        columns[LABEL_COLUMN] = label_feature
        values = labels.tolist()
        arrays.append(pa.array(values, type=Features({LABEL_COLUMN: label_feature}).arrow_schema.field(0).type))
    schema = Features(columns).arrow_schema
    folder.mkdir(parents=True, exist_ok=True)  # not before: bad input leaves nothing behind
    name = f"features-{len(manifest.shards):05d}.arrow"
    staged = folder / f"{name}.tmp"
    with open(staged, "wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        file.flush()
        os.fsync(file.fileno())
    shard = Shard(name, len(tokens), staged.stat().st_size, sha256_of(staged))
    staged.replace(folder / name)
    manifest.shards.append(shard)
    manifest.save(folder)


def _resume(folder: Path, wanted: Manifest, overwrite: bool) -> Manifest:
    """The manifest to go on with: the one on disk if everything that shaped it matches."""
    if folder.exists() and not folder.is_dir():
        raise LayerFusionError(f"{folder} is a file: give a folder for the features")
    if not (folder / MANIFEST_NAME).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise LayerFusionError(f"{folder} is not empty and holds no feature cache: give another folder")
        return wanted
    found = Manifest.load(folder)
    difference = describe_difference(found.ingredients, wanted.ingredients)
    if difference is None:
        found.check_files(folder)
        return found
    if not overwrite:
        raise LayerFusionError(
            f"the feature cache in {folder} was made from something else ({difference}): "
            "give another folder, or replace it with overwrite=True (--overwrite)"
        )
    (folder / MANIFEST_NAME).unlink()
    for shard in found.shards:
        (folder / Path(shard.file).name).unlink(missing_ok=True)
    return wanted


def _check_request(dataset: Dataset, image_column: str, label_column: str | None, processor: Any, dtype: str) -> None:
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
