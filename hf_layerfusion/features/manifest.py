"""What stands beside the shards of a feature cache: what they hold, and everything that shaped them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..bank import TokenBank
from ..errors import LayerFusionError
from ..files import write_json

MANIFEST_NAME = "features.json"
STATISTICS_NAME = "features-statistics.safetensors"
FORMAT_VERSION = 2
STORAGE_DTYPES = ("float16", "float32")


@dataclass
class Shard:
    """One Arrow file: the rows `index * rows_per_shard` and following of the dataset, in its order.

    Attributes:
        index: which shard it is.
        rows: how many rows it holds; fewer than planned where images were skipped.
        num_bytes: size of the file.
        sha256: of the file.
        skipped: `{"row", "path", "reason"}` of each image that could not be read.
    """

    index: int
    rows: int
    num_bytes: int
    sha256: str
    skipped: list[dict[str, Any]] = field(default_factory=list)

    @property
    def file(self) -> str:
        return shard_file(self.index)


def shard_file(index: int) -> str:
    return f"features-{index:05d}.arrow"


def record_file(index: int) -> str:
    """Beside a shard until the cache is complete: several processes write shards, and none of them waits."""
    return f"features-{index:05d}.json"


@dataclass(frozen=True)
class OwnFile:
    """What a file in a cache's folder is, told from its name.

    Attributes:
        name: the one it has when it is whole.
        index: of its shard; `None` for the manifest and the token statistics.
        is_staged: it still has its temporary name.
    """

    name: str
    index: int | None
    is_staged: bool


_OWN_NAME = re.compile(
    rf"(features-([0-9]{{5,}})\.(?:arrow|json)|{re.escape(MANIFEST_NAME)}|{re.escape(STATISTICS_NAME)})(\.[0-9]+\.tmp)?"
)


def own_file(file: Path) -> OwnFile | None:
    """What a file is to the cache in whose folder it is; `None` for folders, links, and names that no cache gives."""
    match = _OWN_NAME.fullmatch(file.name)
    if match is None or file.is_symlink() or not file.is_file():
        return None
    index = None if match[2] is None else int(match[2])
    if index is not None and match[1] not in (shard_file(index), record_file(index)):
        return None  # more zeros than a cache writes
    return OwnFile(match[1], index, match[3] is not None)


@dataclass
class Manifest:
    """The cache's table of contents.

    `features.json` holds it; while processes extract, each finished shard has a record in a file of its own, and the
    last act is to gather them.

    Attributes:
        bank: coordinates of the tokens, `TokenBank.to_list()`.
        hidden_size: D.
        dtype: of the stored tokens, `"float16"` or `"float32"`.
        num_rows: rows of the dataset, times the views.
        rows_per_shard: of those per shard, except the last.
        num_views: augmented views per image; row `v * images + i` is view v of image i.
        label_names: class names in order, `None` if the labels have none.
        ingredients: everything that shaped the tokens, as nested JSON; a cache is used only if all of it matches.
        shards: the whole shards so far, by index.
        format_version: of this layout of files.
    """

    bank: list[list]
    hidden_size: int
    dtype: str
    num_rows: int
    rows_per_shard: int
    label_names: list[str] | None
    ingredients: dict[str, Any]
    num_views: int = 1
    shards: list[Shard] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @property
    def token_bank(self) -> TokenBank:
        return TokenBank.from_list(self.bank)

    @property
    def num_images(self) -> int:
        return self.num_rows // self.num_views

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    @property
    def missing_shards(self) -> list[int]:
        done = {shard.index for shard in self.shards}
        return [index for index in range(self.num_shards) if index not in done]

    @property
    def is_complete(self) -> bool:
        return not self.missing_shards

    @property
    def rows_done(self) -> int:
        """Rows of the dataset that are extracted or skipped."""
        return sum(shard.rows + len(shard.skipped) for shard in self.shards)

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """`{"row", "path", "reason"}` of every image that could not be read."""
        return [entry for shard in self.shards for entry in shard.skipped]

    @property
    def source_rows(self) -> np.ndarray:
        """For each row of a finished cache, its row in the dataset."""
        return np.setdiff1d(np.arange(self.num_rows), [entry["row"] for entry in self.skipped])

    def rows_of(self, index: int) -> range:
        """The dataset's rows of one shard."""
        start = index * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def save(self, folder: Path) -> None:
        write_json(folder / MANIFEST_NAME, asdict(self))

    def add(self, folder: Path, shard: Shard) -> None:
        """Record a shard whose file is in place."""
        if not (folder / MANIFEST_NAME).exists():
            self.save(folder)
        begun = _read_manifest(folder / MANIFEST_NAME)
        difference = describe_difference(begun.ingredients, self.ingredients)
        if difference is not None or begun.rows_per_shard != self.rows_per_shard:
            raise LayerFusionError(
                f"another process extracts something else into {folder} "
                f"({difference or f'rows_per_shard {begun.rows_per_shard} -> {self.rows_per_shard}'})"
            )
        write_json(folder / record_file(shard.index), asdict(shard))
        self.shards = sorted([*self.shards, shard], key=lambda shard: shard.index)

    def gather(self, folder: Path) -> None:
        """Write the records of all shards into the manifest, then remove them, and what killed processes left."""
        records = [folder / record_file(index) for index in range(self.num_shards)]
        if not any(record.exists() for record in records):
            return  # a finished cache may be read-only
        self.save(folder)
        # A process that was done before this one may be writing the statistics.
        staged = [
            file
            for file in folder.iterdir()
            if (own := own_file(file)) and own.is_staged and own.name != STATISTICS_NAME
        ]
        for file in [*staged, *records]:
            file.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check a manifest, with the records that were not gathered yet.

        Raises:
            LayerFusionError: if there is none, it is damaged, or of another format.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise LayerFusionError(f"{folder} holds no {MANIFEST_NAME}: it is not a feature cache")
        try:
            manifest = _read_manifest(path)
            for index in manifest.missing_shards:
                path = folder / record_file(index)
                with suppress(FileNotFoundError):  # not extracted yet, or gathered since the manifest was read
                    manifest.shards.append(Shard(**json.loads(path.read_text(encoding="utf-8"))))
            path = folder / MANIFEST_NAME
            manifest.shards.sort(key=lambda shard: shard.index)
        except LayerFusionError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise LayerFusionError(f"{path} is damaged ({error!r}): extract the features again") from error
        indices = [shard.index for shard in manifest.shards]
        if len(set(indices)) != len(indices) or not set(indices) <= set(range(manifest.num_shards)):
            raise LayerFusionError(f"{path} is damaged (its shards are {indices[:5]}...): extract the features again")
        return manifest

    def check_files(self, folder: Path, checksums: bool = False) -> None:
        """Check that every shard is there, has its size, and, if asked, its checksum.

        Raises:
            LayerFusionError: naming the first shard that is not as it was written.
        """
        for shard in self.shards:
            if (problem := problem_of(shard, folder, checksums)) is not None:
                raise LayerFusionError(
                    f"{problem}. Delete the file and run the same extraction again: it redoes this shard only"
                )

    def drop_damaged(self, folder: Path) -> list[str]:
        """Forget shards that are missing or have another size, so that they are done again; what was wrong, in words."""
        problems = {shard.index: problem_of(shard, folder) for shard in self.shards}
        self.shards = [shard for shard in self.shards if problems[shard.index] is None]
        damaged = [problem for problem in problems.values() if problem is not None]
        if damaged:
            self.save(folder)
            # Only theirs: other processes may have finished more since this manifest was read.
            for index in (index for index, problem in problems.items() if problem is not None):
                (folder / record_file(index)).unlink(missing_ok=True)
        return damaged


def _read_manifest(path: Path) -> Manifest:
    values = json.loads(path.read_text(encoding="utf-8"))
    version = values["format_version"]
    if version != FORMAT_VERSION:
        raise LayerFusionError(
            f"{path} has format {version}, but this version reads format {FORMAT_VERSION}: extract again"
        )
    return Manifest(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})


def problem_of(shard: Shard, folder: Path, checksums: bool = False) -> str | None:
    """What is wrong with a shard's file, in words; `None` if nothing is."""
    path = folder / shard.file
    if not path.is_file():
        return f"shard {shard.file} of the feature cache {folder} is missing"
    size = path.stat().st_size
    if size != shard.num_bytes:
        return f"shard {path} has {size} bytes instead of {shard.num_bytes}: it is truncated or was changed"
    if checksums and sha256_of(path) != shard.sha256:
        return f"shard {path} does not have the checksum it was written with"
    return None


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def plain_values(values: Any) -> Any:
    """The same values as JSON will give them back, so that they can be compared with a manifest's."""

    def describe(value: Any) -> str:
        if isinstance(value, Tensor):
            return hashlib.sha256(value.detach().cpu().numpy().tobytes()).hexdigest()
        return str(value)

    return json.loads(json.dumps(values, default=describe, sort_keys=True))


def describe_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first few differences of two nested dicts in words, such as `processor.size.height 224 -> 256`."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    changes = [
        f"{key} {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, ...) != after.get(key, ...)
    ]
    if not changes:
        return None
    return "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
