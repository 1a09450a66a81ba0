"""HTML as values: elements escape all text given to them, so that no name or sample can break the page.

Exact values go into ``<data value="…">`` elements beside the rounded text that people read: tables sort by them, and a
program can read every figure back from the page.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Markup(str):
    """Text that is HTML already; `element` inserts it as it is and escapes every other text."""

    __slots__ = ()


# Controls (but tab and newline), lone surrogates, which UTF-8 cannot hold, and marks that would turn the text round
# them from right to left.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def escape(text: str) -> Markup:
    """`text` for a page: markup escaped, characters that no page may hold shown as U+FFFD. `Markup` stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(_UNPRINTABLE.sub("\ufffd", text)))


def join(parts: Iterable[str], separator: str = "") -> Markup:
    """The parts one after another, each escaped unless it is `Markup`."""
    return Markup(escape(separator).join(escape(part) for part in parts))


def phrase(*parts: str) -> Markup:
    """The parts as one text."""
    return join(parts)


def element(name: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """One HTML or SVG element.

    Args:
        name: Its tag.
        children: Its content; text that is no `Markup` is escaped.
        attributes: ``class_`` gives ``class`` and ``aria_label`` gives ``aria-label``. None and False leave an
            attribute out, True writes it without a value.
    """
    written = [_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()]
    return Markup(f"<{name}{''.join(written)}>{join(children)}</{name}>")


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def figure_of(value: float, shown: str) -> Markup:
    """A number as people read it, with its exact value beside it."""
    return element("data", shown, value=repr(value))


def decimal(value: float, digits: int) -> Markup:
    """A number rounded to `digits` decimals."""
    return figure_of(value, f"{value:.{digits}f}".replace("-", "−"))


def integer(value: int) -> Markup:
    """An exact integer with thousands separators."""
    return figure_of(value, f"{value:,}")


@dataclass(frozen=True)
class Column:
    """A table's column: its heading, whether it holds numbers, and what the heading means, where that needs words."""

    title: str
    numeric: bool = False
    meaning: str | None = None


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[str]], *, sortable: bool = False) -> Markup:
    """A table in a region that scrolls sideways, with a caption for screen readers.

    Args:
        caption: What the table holds.
        columns: One for each cell of a row; the first cell heads its row.
        rows: Each row's cells.
        sortable: Whether the page's script may sort it by column.
    """
    kinds = ["number" if column.numeric else None for column in columns]
    heads = [
        element("th", column.title, scope="col", class_=kind, title=column.meaning)
        for column, kind in zip(columns, kinds, strict=True)
    ]
    body = []
    for first, *rest in rows:
        cells = [element("td", cell, class_=kind) for cell, kind in zip(rest, kinds[1:], strict=True)]
        body.append(element("tr", element("th", first, scope="row", class_=kinds[0]), *cells))
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *heads)),
        element("tbody", *body),
        data_sortable=sortable,
    )
    return element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex=0)


def tall(long_table: Markup) -> Markup:
    """A table that scrolls in place."""
    return element("div", long_table, class_="tall")


def definitions(pairs: Iterable[tuple[str, str]]) -> Markup:
    """A list of names and values."""
    rows = (element("div", element("dt", name), element("dd", value)) for name, value in pairs)
    return element("dl", *rows)


def sequence_text(text: str) -> Markup:
    """A sequence such as ``2A4M`` within other words."""
    return element("span", text, class_="sequence")


def details(summary: str, body: str) -> Markup:
    """A part that opens on a click."""
    return element("details", element("summary", summary), body)


def bullets(texts: Iterable[str]) -> Markup:
    """A list."""
    return element("ul", *(element("li", text) for text in texts))


@dataclass(frozen=True)
class Missing:
    """A section that is left out, and why."""

    reason: str
