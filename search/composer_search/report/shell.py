"""The page round the sections: the template, filled."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.resources import files
from string import Template

import composer_megatron
from composer_search.report.markup import Markup, element, escape


def fill_page(
    title: str,
    *,
    sections: Markup,
    summary: Markup | str = "",
    left_out: Markup | str = "",
    contents: Markup | str = "",
) -> str:
    """A self-contained HTML page.

    Args:
        title: Heading of the page.
        sections: Its body.
        summary: What stands between the heading and the sections.
        left_out: What the page does not hold, and why.
        contents: Links to the sections.
    """
    template = files("composer_search.report").joinpath("page.html").read_text(encoding="utf-8")
    now = datetime.now(UTC)
    return Template(template).substitute(
        title=escape(title),
        date=element("time", f"{now:%d %B %Y, %H:%M} UTC", datetime=now.isoformat(timespec="seconds")),
        version=escape(composer_megatron.__version__),
        summary=summary,
        left_out=left_out,
        contents=contents,
        sections=sections,
    )
