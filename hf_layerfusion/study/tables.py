"""Tables of texts, how they are written as Markdown and LaTeX, and how numbers stand in their cells."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import Estimate

NONE = "–"

_LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "},
    # As a command, `"` needs the T1 encoding, so a plain closing quote stands for it.
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"},
    **{"±": r"$\pm$", "–": "--", "—": "---", "·": r"$\cdot$", "×": r"$\times$", "…": r"\dots{}", "\u00a0": "~"},
}
# Combining marks that LaTeX has an accent for.
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": '"',
    "\u030a": "r",
    "\u0327": "c",
    "\u030c": "v",
}


class Bold(str):
    """A cell that stands out."""

    __slots__ = ()


@dataclass
class Table:
    """A table of texts, to be written as Markdown or LaTeX."""

    headers: list[str]
    rows: list[list[str]]

    def markdown(self) -> list[str]:
        """Lines, padded so that the source can be read too; the first column is left-aligned, the others right."""
        shown = [[escape_markdown(cell) for cell in row] for row in [self.headers, *self.rows]]
        widths = [max(3, *(len(row[place]) for row in shown)) for place in range(len(self.headers))]
        lines = []
        for number, row in enumerate(shown):
            cells = [
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(f"| {' | '.join(cells)} |")
            if not number:
                marks = ["-" * width if not place else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
                lines.append(f"| {' | '.join(marks)} |")
        return [*lines, ""]

    def latex(self, caption: str, name: str) -> str:
        """A `table` environment for a document with `\\usepackage{booktabs}`; ASCII, so that any engine takes it."""
        lines = [
            r"\begin{table}[htbp]",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{escape_latex(caption)}}}",
            rf"\label{{tab:{name}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.headers) - 1)}}}",
            *[r"\toprule", _latex_row(self.headers), r"\midrule"],
            *[_latex_row(row) for row in self.rows],
            *[r"\bottomrule", r"\end{tabular}", r"\end{table}", ""],
        ]
        return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """One line without markup; in bold if it is `Bold`."""
    escaped = re.sub(r"([\\`*_|<>])", r"\\\1", str(text)).replace("\n", " ")
    return f"**{escaped}**" if isinstance(text, Bold) else escaped


def escape_latex(text: str) -> str:
    """The same for LaTeX, in ASCII: accented letters by their commands, other characters by their code (`U+6570`)."""
    escaped = "".join(_latex_character(character) for character in str(text))
    escaped = re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped)
    return rf"\textbf{{{escaped}}}" if isinstance(text, Bold) else escaped


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii():
        return character
    letter, *marks = list(unicodedata.normalize("NFD", character))
    if len(marks) == 1 and marks[0] in _ACCENTS and letter.isascii():
        return rf"\{_ACCENTS[marks[0]]}{{{letter}}}"
    return f"U+{ord(character):04X}"


def _latex_row(cells: Sequence[str]) -> str:
    # Braces, or a cell that begins with a bracket would be taken for an option of the line break before it.
    return " & ".join(f"{{{escape_latex(cell)}}}" for cell in cells) + r" \\"


def format_points(value: float, sign: bool = False) -> str:
    """A share in percent or percentage points."""
    if not math.isfinite(value):
        return NONE
    text = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return text if float(text) else "0.0"  # no -0.0


def format_interval(estimate: Estimate, sign: bool = False) -> str:
    """Such as `[61.2, 64.0]`."""
    return f"[{format_points(estimate.low, sign)}, {format_points(estimate.high, sign)}]"


def format_gain(gain: Estimate) -> str:
    """Such as `+1.2 [-0.3, +2.8]`."""
    return f"{format_points(gain.value, sign=True)} {format_interval(gain, sign=True)}"


def format_range(values: Sequence[int]) -> str:
    """Such as `7` or `7 to 12`."""
    if not values:
        return NONE
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def format_p_value(value: float) -> str:
    """Three digits, or powers of ten if they would all be zero."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
