"""What stands beside the shards of a feature cache: what they hold, and everything that shaped them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bank import TokenBank
from ..errors import LayerFusionError

MANIFEST_NAME = "features.json"
FORMAT_VERSION = 1
STORAGE_DTYPES = ("float16", "float32")


@dataclass
class Shard:
    """One Arrow file: `rows` rows in dataset order."""

    file: str
    rows: int
    num_bytes: int
    sha256: str


@dataclass
class Manifest:
    """The cache's table of contents, written anew after every shard.

    Attributes:
        bank: coordinates of the tokens, `TokenBank.to_list()`.
        hidden_size: D.
        dtype: of the stored tokens, `"float16"` or `"float32"`.
        num_rows: rows of the finished cache.
        label_names: class names in order, `None` if the labels have none.
        ingredients: everything that shaped the tokens, as nested JSON; a cache is used only if all of it matches.
        shards: the whole shards so far.
        format_version: of this layout of files.
    """

    bank: list[list]
    hidden_size: int
    dtype: str
    num_rows: int
    label_names: list[str] | None
    ingredients: dict[str, Any]
    shards: list[Shard] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @property
    def token_bank(self) -> TokenBank:
        return TokenBank.from_list(self.bank)

    @property
    def rows_done(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def is_complete(self) -> bool:
        return self.rows_done == self.num_rows

    def save(self, folder: Path) -> None:
        """Write under a temporary name, then rename: the manifest is whole or absent."""
        staged = folder / f"{MANIFEST_NAME}.tmp"
        with open(staged, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(folder / MANIFEST_NAME)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check a manifest.

        Raises:
            LayerFusionError: if there is none, it is damaged, or of another format.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise LayerFusionError(f"{folder} holds no {MANIFEST_NAME}: it is not a feature cache")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values["format_version"]
            manifest = cls(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})
        except (KeyError, TypeError, ValueError) as error:
            raise LayerFusionError(f"{path} is damaged ({error!r}): extract the features again") from error
        if version != FORMAT_VERSION:
            raise LayerFusionError(
                f"{path} has format {version}, but this version reads format {FORMAT_VERSION}: extract again"
            )
        return manifest

    def check_files(self, folder: Path, checksums: bool = False) -> None:
        """Check that every shard is there, has its size, and, if asked, its checksum.

        Raises:
            LayerFusionError: naming the first shard that is not as it was written.
        """
        for shard in self.shards:
            path = folder / shard.file
            if Path(shard.file).name != shard.file or not path.is_file():
                raise LayerFusionError(f"shard {shard.file} of the feature cache {folder} is missing: extract again")
            size = path.stat().st_size
            if size != shard.num_bytes:
                raise LayerFusionError(
                    f"shard {path} has {size} bytes instead of {shard.num_bytes}: it is truncated or was changed; "
                    "delete the cache and extract again"
                )
            if checksums and sha256_of(path) != shard.sha256:
                raise LayerFusionError(
                    f"shard {path} does not have the checksum it was written with: delete the cache and extract again"
                )


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


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
