"""Files that appear under their name when they are complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
