"""Run a dataset through the backbone once and keep its tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import pyarrow as pa
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..backbones import execution_device
from ..bank import TokenBank, is_patch, is_top_patch
from ..errors import LayerFusionError
from ..files import staged_file
from ..images import augment_image
from .manifest import (
    MANIFEST_NAME,
    STORAGE_DTYPES,
    Manifest,
    Shard,
    describe_difference,
    own_file,
    plain_values,
    sha256_of,
    shard_file,
)
from .source import Augmentation, Batch, Reader, StreamSource, TableSource
from .store import FEATURES_COLUMN, LABEL_COLUMN, LayerFeatures

if TYPE_CHECKING:
    from ..modeling_layer_fusion import ViTForAttentiveLayerFusionClassification

logger = logging.get_logger(__name__)

_POLL_SECONDS = 0.25


def extract_features(
    model: ViTForAttentiveLayerFusionClassification,
    dataset: Dataset | IterableDataset,
    output_dir: str | Path,
    *,
    image_column: str = "image",
    label_column: str | None = "label",
    image_processor: Any | None = None,
    bank: TokenBank | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    dtype: str = "float16",
    autocast: str | None = None,
    torch_compile: bool = False,
    rows_per_shard: int = 1024,
    views: int = 1,
    augment: Augmentation | None = None,
    seed: int = 0,
    on_error: str = "raise",
    max_skipped: float = 0.01,
    overwrite: bool = False,
    progress: bool = True,
    num_rows: int | None = None,
    fingerprint: str | None = None,
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
        dataset: a `datasets.Dataset` with an image column, or a stream of rows (`load_dataset(..., streaming=True)`).
            Rows keep their order.
        output_dir: folder of the cache.
        image_column: column of images (files, bytes or `PIL` images).
        label_column: column of class indices, floats, or lists of floats; `None` for no labels.
        image_processor: by default the model's own.
        bank: by default the model's; a union `a.config.bank | b.config.bank` serves several heads.
        batch_size: images per forward pass.
        num_workers: processes that decode and preprocess images.
        dtype: of the stored tokens, `"float16"` or `"float32"`.
        autocast: dtype that the backbone computes in under `torch.autocast`, such as `"bfloat16"`; by default its own.
        torch_compile: compile the backbone (`torch.nn.Module.compile`), which stays compiled; taps are part of its graph.
            The first batch, and a last one of another size, take seconds to minutes more.
        rows_per_shard: rows of the dataset per Arrow file, which is what a kill may cost. A cache that was begun keeps
            its own.
        views: how many augmented views of each image to extract; [`EpochViews`] trains on one of them per epoch.
        augment: turns an image into an augmented one, with the randomness of a numpy generator; by default
            [`augment_image`] if there are several views, and nothing if there is one.
        seed: of the augmentation; each row has a generator of its own.
        on_error: `"raise"` stops at an image that cannot be read, before the backbone runs; `"skip"` leaves it out, and
            notes its row, path and reason (`features.manifest.skipped`).
        max_skipped: with `"skip"`, the share of the rows beyond which extraction stops after all.
        overwrite: replace a cache that does not match.
        progress: show progress bars, on the first process only.
        num_rows: of a stream, how many rows to take.
        fingerprint: of a stream, a name for the data and its version.
        process_index: which share of the shards this process does; by default the launcher's `RANK`.
        num_processes: how many shares there are, by default the launcher's `WORLD_SIZE`; `1` where one process extracts
            while others wait for it, as under `main_process_first`.
        backbone_kwargs: passed to the backbone's forward.

    Returns:
        The opened cache.

    Raises:
        LayerFusionError: before the long work starts for missing columns, an empty dataset, labels that do not fit the
            head, unreadable images, or a cache of something else; during it for tokens that are not finite, and for too
            many skipped images.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise LayerFusionError(
            f"extract_features takes one datasets.Dataset, not a {type(dataset).__name__}: "
            "choose a split, such as dataset['train']"
        )
    output_dir = Path(output_dir)
    processor: Any = image_processor or model.image_processor
    bank = bank or model.config.bank
    _check_request(processor, dtype, autocast, on_error, views)
    source: TableSource | StreamSource
    if isinstance(dataset, IterableDataset):
        if views > 1:
            raise LayerFusionError("a stream is read once: several views need a datasets.Dataset")
        source = StreamSource(dataset, image_column, label_column, model.config, num_rows, fingerprint)
    else:
        source = TableSource(dataset, image_column, label_column, model.config)
    share = _share(process_index, num_processes)
    if augment is None and views > 1:
        augment = augment_image
    manifest = Manifest(
        bank=bank.to_list(),
        hidden_size=bank.width(model.config.layout),
        dtype=dtype,
        num_rows=source.num_images * views,
        num_views=views,
        rows_per_shard=rows_per_shard,
        label_names=source.label_feature.names if isinstance(source.label_feature, ClassLabel) else None,
        ingredients={
            "backbone": dict(model.config.backbone_fingerprint or {"digest": "unknown"}, parts=None),
            "token_layout": model.config.token_layout,
            "bank": bank.to_list(),
            "processor": plain_values(processor.to_dict()),
            "dtype": dtype,
            "autocast": autocast,
            "torch_compile": torch_compile,
            "backbone_kwargs": plain_values(backbone_kwargs),
            "on_error": on_error,
            "views": views,
            "augmentation": None if augment is None else {"function": Hasher.hash(augment), "seed": seed},
            "versions": _versions(),
            "dataset": source.identity,
            # Only where the tokens depend on it, so that other caches keep their ingredients.
            **(
                {"image_size": model.config.image_size}
                if any(is_patch(c.pool) or is_top_patch(c.pool) for c in bank.coordinates)
                else {}
            ),
        },
    )
    manifest = _resume(output_dir, manifest, overwrite, share)
    if manifest.is_complete:
        logger.info(f"reusing the features in {output_dir}")
        return _finish(output_dir, share, max_skipped)
    # By number, not by turns: a process that starts later finds fewer shards missing.
    shards = [index for index in manifest.missing_shards if index % share.count == share.index]
    is_shown = progress and share.index == 0
    rows_of_shards = {index: manifest.rows_of(index) for index in shards}
    if on_error == "raise":
        source.check([row for rows in rows_of_shards.values() for row in rows], is_shown)
    plan = [
        list(rows[start : start + batch_size])
        for rows in rows_of_shards.values()
        for start in range(0, len(rows), batch_size)
    ]
    if torch_compile:
        model.backbone.compile()
    reader = Reader(processor, augment, seed, skips=on_error == "skip")
    batches = source.batches(plan, reader, num_workers, model.device.type == "cuda")
    total = sum(len(rows) for rows in plan)
    with tqdm(total=total, desc="extracting", unit="image", delay=2, disable=not is_shown) as bar:
        computed = _extract(model, batches, bank, manifest, autocast, backbone_kwargs, bar)
        for index, rows in rows_of_shards.items():
            # Not a batch further: a shard is written before the next one begins.
            parts = list(islice(computed, -(-len(rows) // batch_size)))
            skipped = [asdict(image) for batch, _ in parts for image in batch.unreadable]
            _check_skipped(manifest, skipped, max_skipped)
            tokens = torch.cat([tokens for _, tokens in parts])
            labels = [batch.labels for batch, _ in parts if batch.labels is not None]
            shard_labels = np.concatenate(labels) if labels else None
            shard = _write_shard(output_dir, index, tokens, shard_labels, source.label_feature, skipped)
            manifest.add(output_dir, shard)
    return _finish(output_dir, share, max_skipped)


@dataclass(frozen=True)
class _Share:
    """Which part of the shards this process does."""

    index: int
    count: int


def _share(process_index: int | None, num_processes: int | None) -> _Share:
    if num_processes is None:
        # What launchers say. No process group is needed, and without CUDA accelerate would not make one.
        process_index, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = _Share(process_index or 0, num_processes)
    if not 0 <= share.index < share.count:
        raise LayerFusionError(f"process_index={share.index} is not one of num_processes={share.count}")
    return share


def _finish(folder: Path, share: _Share, max_skipped: float) -> LayerFeatures:
    """Wait for the other processes' shards, and gather all records."""
    waited = 0.0
    while not ((folder / MANIFEST_NAME).is_file() and (manifest := Manifest.load(folder)).is_complete):
        # No collective call: a process that died would leave the others in it.
        time.sleep(_POLL_SECONDS)
        waited += _POLL_SECONDS
        if waited % 60 < _POLL_SECONDS:
            logger.warning(f"waiting for the shards of other processes in {folder}")
    _check_skipped(manifest, [], max_skipped)  # of all processes together
    if share.index == 0:
        manifest.gather(folder)
    return LayerFeatures.open(folder)


def _extract(
    model: ViTForAttentiveLayerFusionClassification,
    batches: Iterable[Batch],
    bank: TokenBank,
    manifest: Manifest,
    autocast: str | None,
    backbone_kwargs: dict[str, Any],
    bar: tqdm,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with its tokens `(B, N, D)`, on the CPU and in the dtype of the cache."""
    storage = getattr(torch, manifest.dtype)
    was_training = model.training
    model.eval()
    device = execution_device(model.backbone)
    try:
        for batch in batches:
            stored = torch.empty(0, len(bank), manifest.hidden_size, dtype=storage)
            if batch.rows:
                inputs = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}
                lower = torch.autocast(
                    device.type, getattr(torch, autocast or "float32"), enabled=autocast is not None
                )
                with torch.inference_mode(), lower:
                    computed = model.extract_layer_features(**inputs, bank=bank, **backbone_kwargs)
                stored = computed.to(storage).cpu()
                _check_finite(stored, computed, batch.rows, bank, manifest.dtype)
            batch.inputs = {}
            bar.update(len(batch.rows) + len(batch.unreadable))
            yield batch, stored
    finally:
        model.train(was_training)


def _check_skipped(manifest: Manifest, skipped: list[dict[str, Any]], max_skipped: float) -> None:
    count = len(manifest.skipped) + len(skipped)
    if count == manifest.num_rows:
        raise LayerFusionError(
            f"none of the {count} images can be read; the first: {(manifest.skipped + skipped)[0]['reason']}"
        )
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
    with staged_file(path) as staged:
        with open(staged, "wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            file.flush()
            os.fsync(file.fileno())
        return Shard(index, len(tokens), staged.stat().st_size, sha256_of(staged), skipped)


def _resume(folder: Path, wanted: Manifest, overwrite: bool, share: _Share) -> Manifest:
    """The manifest to go on with: the one on disk if everything that shaped it matches."""
    if folder.exists() and not folder.is_dir():
        raise LayerFusionError(f"{folder} is a file: give a folder for the features")
    records = sorted(folder.glob("features-*.json"))  # before the manifest, which is written before them
    if not (folder / MANIFEST_NAME).is_file():
        if records:
            raise LayerFusionError(f"{records[0]} belongs to a cache without {MANIFEST_NAME}: delete {folder}")
        if share.index == 0 and folder.is_dir() and any(own_file(file) is None for file in folder.iterdir()):
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
    if own_file(folder / MANIFEST_NAME) is None:
        raise LayerFusionError(f"{folder / MANIFEST_NAME} is a link, which is not replaced: give another folder")
    # The manifest last: until then, another run sees what the rest belongs to.
    for file in sorted(filter(own_file, folder.iterdir()), key=lambda file: file.name == MANIFEST_NAME):
        file.unlink()
    return wanted


def _versions() -> dict[str, str]:
    """Of the libraries that shape tokens, without what only fixes mistakes."""
    packages = {"transformers": transformers, "torch": torch, "Pillow": PIL}
    return {name: ".".join(package.__version__.split(".")[:2]) for name, package in packages.items()}


def _check_request(processor: Any, dtype: str, autocast: str | None, on_error: str, views: int) -> None:
    if on_error not in ("raise", "skip"):
        raise LayerFusionError(f"on_error={on_error!r}: use 'raise' or 'skip'")
    if autocast not in (None, "bfloat16", "float16"):
        raise LayerFusionError(f"autocast={autocast!r}: use 'bfloat16', 'float16' or None")
    if views < 1:
        raise LayerFusionError(f"views={views}: use 1 or more")
    if dtype not in STORAGE_DTYPES:
        raise LayerFusionError(f"dtype {dtype!r} cannot be stored: choose from {STORAGE_DTYPES}")
    if processor is None:
        raise LayerFusionError("no image processor came with the backbone: pass image_processor=")
