"""`LayerFeatures`: a feature cache as a dataset, read without copies from memory-mapped Arrow files."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, List, Value, concatenate_datasets
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor

from ..bank import TokenBank
from ..errors import LayerFusionError
from ..layout import TokenLayout
from .manifest import MANIFEST_NAME, STATISTICS_NAME, Manifest, Shard
from .statistics import cache_statistics, without_padding

FEATURES_COLUMN = "layer_features"
LABEL_COLUMN = "label"
STATISTICS_COLUMN = "token_statistics"

# Shards that are shuffled together: more mix better, fewer are read more nearly in sequence.
CHUNKS_AT_ONCE = 8


class GatheredRows(Sequence):
    """Rows of one gather: dicts for any collator, and the batch itself for ours, which has nothing left to copy."""

    def __init__(self, batch: dict[str, Tensor]):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch[FEATURES_COLUMN])

    def __getitem__(self, index: Any) -> Any:
        row: dict[str, Any] = {name: values[index] for name, values in self.batch.items()}
        if "labels" in row:
            row["labels"] = row["labels"].tolist()
        return row


class LayerFeatures(torch.utils.data.Dataset):
    """Tokens `(rows, N, D)` and labels, as a map-style dataset that `Trainer` and `DataLoader` read directly.

    Rows are `{"layer_features": (N, D) tensor, "labels": int}`, and after `with_statistics` they have
    `"token_statistics": (N, 2) tensor` too. Open one with [`LayerFeatures.open`], or get one from [`extract_features`].

    Attributes:
        manifest: what the files hold and what shaped them.
        bank: coordinates of the N axis, after `select`.
        labels: of the rows in view, as a numpy array; `None` if there are none.
    """

    def __init__(
        self,
        dataset: Dataset,
        manifest: Manifest,
        bank: TokenBank | None = None,
        rows: np.ndarray | None = None,
        folder: Path | None = None,
    ):
        self.manifest = manifest
        self.bank = manifest.token_bank if bank is None else bank
        self.folder = folder
        self._dataset = dataset
        self._rows = np.arange(len(dataset)) if rows is None else np.asarray(rows, dtype=np.int64)
        self._tokens = manifest.token_bank.positions_of(self.bank)
        self._takes_all_tokens = self._tokens == list(range(len(manifest.token_bank)))
        # Tokens are padded to the widest of the cache, which the bank in view may not have.
        layout = manifest.ingredients.get("token_layout")
        self._width = manifest.hidden_size
        if layout and not self._takes_all_tokens:
            self._width = self.bank.width(TokenLayout(**layout))
        self._chunks = _map_chunks(dataset, len(manifest.token_bank), manifest.hidden_size)
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])
        self._gives_statistics = False
        # Of all rows and tokens, by device; shared by everything that is selected from these features.
        self._statistics: dict[torch.device, Tensor] = {}
        has_labels = LABEL_COLUMN in dataset.column_names
        self.labels = _read_labels(dataset)[self._rows] if has_labels else None

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False, **hub_options: Any) -> LayerFeatures:
        """Open a finished cache.

        Args:
            folder: what `extract_features` wrote to, or the Hub id of a dataset repository that `push_to_hub` filled.
            verify: also compare every shard's checksum, which reads all of it.
            hub_options: for `snapshot_download` (`revision`, `token`, `cache_dir`, `local_files_only`).

        Raises:
            LayerFusionError: if the cache is unfinished, truncated or foreign, or cannot be reached.
        """
        if not Path(folder).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            folder = _download(str(folder), hub_options)
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if not manifest.is_complete:
            raise LayerFusionError(
                f"the feature cache {folder} is unfinished: {manifest.rows_done} of {manifest.num_rows} rows. "
                "Run the same extraction again, it does the rest"
            )
        manifest.check_files(folder, checksums=verify)
        dataset = concatenate_datasets([_open_shard(folder, shard, manifest) for shard in manifest.shards])
        # Carried along by `select`, `train_test_split` and `save_to_disk`; see `from_dataset`.
        dataset.info.description = json.dumps({"layer_features": asdict(manifest) | {"shards": []}})
        return cls(dataset, manifest, folder=folder)

    @classmethod
    def from_dataset(cls, dataset: Dataset, like: LayerFeatures | None = None) -> LayerFeatures:
        """Features from the `.dataset` of a cache, after `select`, `train_test_split`, `load_from_disk` and the like.

        Args:
            dataset: with the flat column `layer_features` of the whole bank.
            like: says what the tokens are where the dataset lost it, as after `datasets`' own `push_to_hub`.

        Raises:
            LayerFusionError: if it has no such column, or does not say what its tokens are.
        """
        if FEATURES_COLUMN not in dataset.column_names or dataset.format["type"] == "custom":
            raise LayerFusionError(f"the dataset has no flat column {FEATURES_COLUMN!r} of a whole bank")
        if like is not None:
            manifest = like.manifest
        else:
            try:
                manifest = Manifest(**json.loads(dataset.info.description)["layer_features"])
            except (KeyError, TypeError, ValueError) as error:
                raise LayerFusionError(
                    "the dataset does not say which tokens it holds: pass the features it came from as like="
                ) from error
        plain = dataset.with_format(None)
        return cls(plain.flatten_indices() if plain._indices is not None else plain, manifest)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **options: Any
    ) -> str:
        """Upload the cache's files to a dataset repository, in one commit, with the token statistics if they were taken.

        Args:
            options: for `HfApi.upload_folder` (`commit_message`, `revision`, `create_pr`).

        Returns:
            The address of the commit.

        Raises:
            LayerFusionError: for features that are not a whole cache.
        """
        if self.folder is None or not self._takes_all_tokens or len(self) != len(self._dataset):
            raise LayerFusionError("only a whole cache can be pushed: push it before selecting rows or tokens")
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        files = [MANIFEST_NAME, STATISTICS_NAME, *(shard.file for shard in self.manifest.shards)]
        options.setdefault("commit_message", "Upload layer features")
        commit = api.upload_folder(
            repo_id=repo.repo_id, repo_type="dataset", folder_path=self.folder, allow_patterns=files, **options
        )
        return commit.commit_url

    @property
    def dataset(self) -> Dataset:
        """The rows in view as a `datasets.Dataset` with the columns `layer_features` and `label`.

        Of the whole bank, `layer_features` is the flat column of `N * D` numbers; of a selection, it is `(N, D)`.
        """
        whole = len(self._rows) == len(self._dataset) and (self._rows == np.arange(len(self._rows))).all()
        dataset = self._dataset if whole else self._dataset.select(self._rows)
        if self._takes_all_tokens:
            return dataset
        shape = (-1, len(self.manifest.token_bank), self.manifest.hidden_size)

        def select_tokens(batch: dict[str, Any]) -> dict[str, Any]:
            flat = np.asarray(batch[FEATURES_COLUMN], dtype=self.manifest.dtype)
            return {**batch, FEATURES_COLUMN: torch.from_numpy(flat.reshape(shape)[:, self._tokens, : self._width])}

        return dataset.with_transform(select_tokens)

    @property
    def hidden_size(self) -> int:
        """D: the widest token in view; narrower ones are zero-padded."""
        return self._width

    @property
    def token_names(self) -> list[str]:
        return self.bank.names

    @property
    def label_names(self) -> list[str] | None:
        return self.manifest.label_names

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that shaped the tokens."""
        return self.manifest.ingredients

    @property
    def source_rows(self) -> np.ndarray:
        """For each row in view, its row in the dataset that was extracted: images may have been skipped."""
        return self.manifest.source_rows[self._rows] % self.manifest.num_images

    @property
    def cache_rows(self) -> np.ndarray:
        """For each row in view, its row in the cache."""
        return self._rows

    @property
    def num_views(self) -> int:
        """Augmented views per image."""
        return self.manifest.num_views

    def view(self, number: int) -> LayerFeatures:
        """The rows of one view of all images, in the dataset's order.

        Raises:
            LayerFusionError: if there is no such view.
        """
        if not 0 <= number < self.num_views:
            raise LayerFusionError(f"view {number} does not exist: this cache has views 0 to {self.num_views - 1}")
        views = self.manifest.source_rows[self._rows] // self.manifest.num_images
        return self.select_rows(np.flatnonzero(views == number))

    def to(self, device: str | torch.device) -> LayerFeatures:
        """The same features held in a device's memory, from which batches are gathered without a copy from the host."""
        moved = self._like(self.bank, self._rows)
        moved._chunks = [chunk.to(device) for chunk in self._chunks]
        return moved

    def token_statistics(self) -> Tensor:
        """L2 norm and population standard deviation of each token in view.

        They are taken of the whole cache when they are first asked for, and kept in its folder if that can be written
        to: other views, processes and runs find them there. A file that does not fit the cache's shards is replaced,
        with a warning.

        Returns:
            `(rows, N, 2)`, float32, on the device of the features; `[..., 0]` is the norm.
        """
        return self._gather_statistics(self._rows)

    def with_statistics(self) -> LayerFeatures:
        """The same features, whose rows, batches and `tensors()` have `"token_statistics"` `(B, N, 2)`, float32, too.

        What is selected from them has it as well. See `token_statistics`.
        """
        features = self._like(self.bank, self._rows)
        features._gives_statistics = True
        features._all_statistics()  # now, or each worker process of a DataLoader would take them
        return features

    def _gather_statistics(self, rows: np.ndarray) -> Tensor:
        statistics = self._all_statistics()
        gathered = statistics.index_select(0, torch.from_numpy(rows).to(statistics.device))
        if self._takes_all_tokens:
            return gathered
        return without_padding(gathered[:, self._tokens], self.manifest.hidden_size, self._width)

    def _all_statistics(self) -> Tensor:
        """Of all rows and tokens of the cache, on the device of the features."""
        host = torch.device("cpu")
        if host not in self._statistics:
            # Of the files, not of chunks that were moved: one result on all devices.
            chunks = _map_chunks(self._dataset, len(self.manifest.bank), self.manifest.hidden_size)
            self._statistics[host] = cache_statistics(chunks, self.manifest, self.folder)
        device = self._chunks[0].device
        if device not in self._statistics:
            self._statistics[device] = self._statistics[host].to(device)
        return self._statistics[device]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> GatheredRows:
        """Several rows in one gather; `DataLoader` calls this."""
        return GatheredRows(self.batch(np.asarray(indices, dtype=np.int64)))

    def batches(
        self,
        batch_size: int,
        shuffle: bool | str = False,
        seed: int = 0,
        *,
        drop_last: bool = False,
        device: str | torch.device | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Go through all rows once.

        Args:
            batch_size: B; the last batch may be smaller.
            shuffle: `True` for a random order, the same for the same seed; `"chunks"` for shards in random order and
                random rows within eight of them at a time, which reads a file larger than memory nearly in sequence.
            drop_last: leave out a smaller last batch.
            device: where batches go, through pinned memory if it is a CUDA device.

        Yields:
            `{"layer_features": (B, N, D), "labels": (B, ...)}`, after `with_statistics` also
            `"token_statistics": (B, N, 2)`. Unshuffled batches of the whole bank are views of the file: do not write
            to them.
        """
        order = np.arange(len(self))
        if shuffle == "chunks":
            order = self._chunk_order(np.random.default_rng(seed))
        elif shuffle:
            order = np.random.default_rng(seed).permutation(order)
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            if drop_last and len(index) < batch_size:
                return
            if shuffle:
                # Which rows come together is random; in the file's order they are gathered without a second copy.
                index = index[np.argsort(self._rows[index], kind="stable")]
            yield self.batch(index, device)  # held by no name here, so that it is freed before the next is read

    def batch(self, index: np.ndarray, device: str | torch.device | None = None) -> dict[str, Tensor]:
        """Some rows in the order given, as `batches` yields them."""
        batch = {FEATURES_COLUMN: self._gather(self._rows[index])}
        if self._gives_statistics:
            batch[STATISTICS_COLUMN] = self._gather_statistics(self._rows[index])
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[index])
        return batch if device is None else {name: _moved(value, device) for name, value in batch.items()}

    def _chunk_order(self, generator: np.random.Generator) -> np.ndarray:
        chunk_of_row = np.searchsorted(self._starts, self._rows, side="right") - 1
        chunks = generator.permutation(np.unique(chunk_of_row))
        groups = [chunks[start : start + CHUNKS_AT_ONCE] for start in range(0, len(chunks), CHUNKS_AT_ONCE)]
        return np.concatenate(
            [generator.permutation(np.flatnonzero(np.isin(chunk_of_row, group))) for group in groups]
        )

    def tensors(self) -> dict[str, Tensor]:
        """All rows in view as one batch, in memory."""
        return next(self.batches(max(len(self), 1)))

    def _gather(self, rows: np.ndarray) -> Tensor:
        first, last = (rows[0], rows[-1]) if len(rows) else (0, 0)
        chunk = int(np.searchsorted(self._starts, first, side="right")) - 1
        in_one_chunk = last < self._starts[chunk + 1]
        if in_one_chunk and last - first == len(rows) - 1 and (np.diff(rows) == 1).all():
            offset = first - self._starts[chunk]
            view = self._chunks[chunk][offset : offset + len(rows)]
            return view if self._takes_all_tokens else view[:, self._tokens, : self._width]
        if self._chunks[chunk].device.type != "cpu":
            return self._gather_on_device(rows)
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        is_ascending = bool((np.diff(rows) >= 0).all())
        bounds = np.searchsorted(ascending, self._starts)
        # Of numpy and not of torch: its large arrays come in huge pages, torch's in small ones, and to have those
        # cleared takes several times as long as the copy.
        stored = self.manifest.hidden_size
        gathered = np.empty((len(rows), len(self.bank), stored), dtype=self.manifest.dtype)
        for chunk in np.flatnonzero(np.diff(bounds)).tolist():
            part = slice(bounds[chunk], bounds[chunk + 1])
            index = ascending[part] - self._starts[chunk]
            source = self._chunks[chunk].numpy()
            if not self._takes_all_tokens:
                index = index[:, None] * source.shape[1] + self._tokens  # (rows, N) positions of single tokens
                source = source.reshape(-1, stored)
            # `mode="clip"`, because "raise" goes through a buffer.
            if is_ascending:
                np.take(source, index, axis=0, out=gathered[part], mode="clip")
            else:
                gathered[order[part]] = np.take(source, index, axis=0, mode="clip")
        return torch.from_numpy(gathered)[..., : self._width]

    def _gather_on_device(self, rows: np.ndarray) -> Tensor:
        gathered = self._chunks[0].new_empty(len(rows), len(self.bank), self._width)
        chunk_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for chunk in np.unique(chunk_of_row):
            wanted = np.flatnonzero(chunk_of_row == chunk)
            source = self._chunks[chunk]
            local = torch.from_numpy(rows[wanted] - self._starts[chunk]).to(source.device)
            if self._takes_all_tokens:
                picked = source.index_select(0, local)
            else:
                picked = source[local[:, None], torch.tensor(self._tokens, device=source.device), : self._width]
            gathered[torch.from_numpy(wanted).to(source.device)] = picked
        return gathered

    def select(
        self,
        layers: Sequence[int] | None = None,
        modules: Sequence[str] | None = None,
        pools: Sequence[str] | None = None,
    ) -> LayerFeatures:
        """The same rows with fewer tokens, chosen by coordinate; nothing is copied.

        Raises:
            LayerFusionError: if a coordinate is not in the bank.
        """
        return self.select_bank(self.bank.select(layers, modules, pools))

    def select_bank(self, bank: TokenBank) -> LayerFeatures:
        """The same rows with exactly the tokens of another bank, such as `model.config.bank`, in its order.

        Raises:
            LayerFusionError: naming the tokens that are not in this cache.
        """
        self.bank.positions_of(bank)
        return self._like(bank, self._rows)

    def select_rows(self, indices: Sequence[int] | np.ndarray) -> LayerFeatures:
        """The same tokens for fewer rows, in the order given; nothing is copied."""
        return self._like(self.bank, self._rows[np.asarray(indices, dtype=np.int64)])

    def _like(self, bank: TokenBank, rows: np.ndarray) -> LayerFeatures:
        features = LayerFeatures(self._dataset, self.manifest, bank, rows, self.folder)
        features._chunks = self._chunks  # which may have been moved to a device
        features._statistics, features._gives_statistics = self._statistics, self._gives_statistics
        return features

    def train_test_split(self, test_size: float | int, seed: int = 0) -> tuple[LayerFeatures, LayerFeatures]:
        """Split the rows, stratified by label where the labels are classes.

        Raises:
            LayerFusionError: if a class is too small to be split.
        """
        # Here, because scikit-learn takes seconds to import and most uses of a cache never split it.
        from sklearn.model_selection import train_test_split

        is_classes = self.labels is not None and self.labels.ndim == 1 and self.labels.dtype.kind in "iu"
        try:
            train, test = train_test_split(
                np.arange(len(self)),
                test_size=test_size,
                random_state=seed,
                stratify=self.labels if is_classes else None,
            )
        except ValueError as error:
            raise LayerFusionError(f"{len(self)} rows cannot be split with test_size={test_size}: {error}") from error
        return self.select_rows(np.sort(train)), self.select_rows(np.sort(test))

    def check(self, num_labels: int | None = None) -> None:
        """Read everything once and refuse tokens that are not finite, and labels out of range.

        Raises:
            LayerFusionError: naming the first bad row.
        """
        position = 0
        for batch in self.batches(1024):
            finite = torch.isfinite(batch[FEATURES_COLUMN]).all(dim=-1)
            if not finite.all():
                row, token = torch.nonzero(~finite)[0].tolist()
                raise LayerFusionError(
                    f"row {position + row} of the features holds NaN or infinite values ({self.token_names[token]}): "
                    "extract again with dtype='float32'"
                )
            position += len(finite)
        if num_labels is not None and self.labels is not None and self.labels.dtype.kind in "iu" and len(self):
            bad = np.flatnonzero((self.labels < 0) | (self.labels >= num_labels))
            if len(bad):
                raise LayerFusionError(
                    f"row {bad[0]} has label {self.labels.flat[bad[0]]}, but there are {num_labels} labels, "
                    f"0 to {num_labels - 1}"
                )

    def __repr__(self) -> str:
        return f"LayerFeatures(rows={len(self)}, tokens={len(self.bank)}, hidden_size={self.hidden_size})"


def _moved(value: Tensor, device: str | torch.device) -> Tensor:
    if torch.device(device).type != "cuda" or value.is_cuda:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def _download(repo_id: str, options: dict[str, Any]) -> str:
    try:
        return snapshot_download(repo_id, repo_type="dataset", allow_patterns="features*", **options)
    except (OSError, ValueError) as error:
        raise LayerFusionError(f"{repo_id!r} is neither a folder nor a dataset on the Hub: {error}") from error


def map_shard(folder: Path, shard: Shard, manifest: Manifest) -> list[Tensor]:
    """The tokens of one shard, views `(rows, N, D)` of its file.

    Raises:
        LayerFusionError: if the file does not belong to its manifest.
    """
    return _map_chunks(_open_shard(folder, shard, manifest), len(manifest.bank), manifest.hidden_size)


def _open_shard(folder: Path, shard: Shard, manifest: Manifest) -> Dataset:
    path = folder / shard.file
    try:
        dataset = Dataset.from_file(str(path))
    except (OSError, pa.ArrowException) as error:
        raise LayerFusionError(
            f"shard {path} is not an Arrow file ({error}): it does not belong to its manifest"
        ) from error
    tokens = List(Value(manifest.dtype), length=len(manifest.bank) * manifest.hidden_size)
    if dataset.features.get(FEATURES_COLUMN) != tokens or len(dataset) != shard.rows:
        raise LayerFusionError(
            f"shard {path} holds {len(dataset)} rows of {dataset.features} instead of {shard.rows} rows of {tokens}: "
            "it does not belong to its manifest"
        )
    return dataset


def _map_chunks(dataset: Dataset, num_tokens: int, hidden_size: int) -> list[Tensor]:
    """One `(rows, N, D)` tensor per Arrow chunk, each a view of the memory-mapped file."""
    chunks = []
    for chunk in dataset.data.column(FEATURES_COLUMN).chunks:
        # `flatten`, unlike `values`, respects the chunk's offset.
        flat = chunk.flatten().to_numpy(zero_copy_only=True)
        if flat.size != len(chunk) * num_tokens * hidden_size:
            raise LayerFusionError(
                f"the features are {flat.size // max(len(chunk), 1)} numbers a row, but their manifest says "
                f"{num_tokens} tokens of width {hidden_size}: the cache does not belong to its manifest"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            chunks.append(torch.from_numpy(flat.reshape(len(chunk), num_tokens, hidden_size)))
    return chunks


def _read_labels(dataset: Dataset) -> np.ndarray:
    column = dataset.data.column(LABEL_COLUMN)
    labels = np.asarray(column.to_pylist())
    return labels.astype(np.float32) if labels.dtype.kind == "f" else labels.astype(np.int64)
