"""The report of a study while it is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from .tables import Table, escape_markdown


@dataclass
class Pages:
    """Lines of Markdown, with LaTeX tables and figures as files beside them.

    Attributes:
        folder: of these files.
        with_figures: whether to draw.
        lines: of the report so far.
        left_out: what figures there are not, and why.
    """

    folder: Path
    with_figures: bool
    lines: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def write(self, *lines: str) -> None:
        """A paragraph or list, in Markdown."""
        self.lines += [*lines, ""]

    def heading(self, text: str) -> None:
        """Of a part of a section."""
        self.write(f"### {escape_markdown(text)}")

    def table(self, table: Table) -> None:
        self.lines += table.markdown()

    def latex(self, name: str, tables: Sequence[tuple[str, Table]]) -> None:
        """One file with a caption and label for each table, if there is any."""
        if not tables:
            return
        parts = [table.latex(caption, f"{name}-{number}") for number, (caption, table) in enumerate(tables, start=1)]
        (self.folder / f"{name}.tex").write_text("\n".join(parts), encoding="utf-8")

    def figure(self, name: str, title: str, draw: Callable[[Path], None]) -> None:
        if not self.with_figures:
            return
        path = self.folder / f"{name}.png"
        draw(path)
        self.write(f"![{escape_markdown(title)}]({quote(path.name)})")


def file_slugs(names: Iterable[str]) -> dict[str, str]:
    """Short file names, no two alike."""
    found: dict[str, str] = {}
    for name in names:
        slug = base = re.sub(r"[^\w.-]+", "_", name)[:40]
        number = 1
        while slug in found.values():
            number += 1
            slug = f"{base}-{number}"
        found[name] = slug
    return found
