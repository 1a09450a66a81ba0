"""The report on how it was done: settings, text, versions and machine, so that a reader can do it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from composer_search.report.data import Contents
from composer_search.report.markup import Markup, definitions, element

_MOST_ITEMS = 8


def settings(contents: Contents) -> Markup:
    """Settings, text, versions and machine, so that a reader can do it again."""
    blocks = []
    if contents.study:
        blocks.append(("Search settings", definitions(_flat(contents.study.settings))))
    if contents.text:
        blocks.append(("Text", definitions(_flat(contents.text))))
    blocks.append(("Versions and machine of this report", definitions(_flat(contents.environment))))
    inputs = [("study", contents.study.folder)] if contents.study else []
    inputs += [(run.name, run.folder) for run in contents.runs]
    if inputs:
        blocks.append(("Made from", definitions((name, str(folder)) for name, folder in inputs)))
    cards = [element("div", element("h3", title), body, class_="card") for title, body in blocks]
    return element("div", *cards, class_="cards")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and text; what was not recorded or not installed (None) is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            shown = ", ".join(_plain(item) for item in value[:_MOST_ITEMS])
            more = f" and {len(value) - _MOST_ITEMS} more" if len(value) > _MOST_ITEMS else ""
            yield f"{prefix}{key}", (shown + more) or "none"
        elif value is not None:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{item}" for item in value.values())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else f"{value}"
