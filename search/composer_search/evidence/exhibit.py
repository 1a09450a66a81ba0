"""What every tool of this package hands over: a table and sentences, shown alike in a terminal and on a page."""

from __future__ import annotations

from dataclasses import dataclass

Cell = str | int | float | None
"""One value of a table; None is shown as a dash."""


@dataclass(frozen=True)
class Exhibit:
    """A result for people.

    Attributes:
        title: What it is about.
        columns: Headings of the table.
        rows: Its rows, as wide as `columns`.
        findings: Sentences: what was found, how it was computed, and what could not be.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    findings: tuple[str, ...]


def shown(cell: Cell, digits: int = 4) -> str:
    """A cell as text: integers with separators, other numbers with `digits` decimals."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.{digits}f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
