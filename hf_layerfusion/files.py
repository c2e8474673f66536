"""Files that appear under their name when they are complete, and that are read only if they are small enough."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import LayerFusionError


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which is renamed to it at the end, and removed if writing fails.

    It has the process's number in it, so that processes that write the same file do not meet.
    """
    staged = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield staged
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, even if the machine stops."""
    with staged_file(path) as staged, open(staged, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, whole or not at all."""
    write_file(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def read_bounded(path: str | Path, max_bytes: int, what: str) -> bytes:
    """A file's content.

    Raises:
        LayerFusionError: if it cannot be read, or is larger than any such file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise LayerFusionError(f"{path} cannot be read: {error}") from error
    if len(content) > max_bytes:
        raise LayerFusionError(f"{path} is larger than {max_bytes >> 20} MB: it is no {what}")
    return content
