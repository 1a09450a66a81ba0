"""Drawings that several sections share: scatter plots, curves with bands, and estimates with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from composer_search.report.charts import Axis, glyph, legend_item, percent, plot, stretched
from composer_search.report.markup import Markup, element, join


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot.

    Attributes:
        x: Its place.
        y: Its height.
        words: What shows on hover.
        style: ``disc``, ``ring``, … (`composer_search.report.charts.glyph`), and ``member`` for one that stands out.
        low: Lower end of a whisker through it.
        high: Upper end.
    """

    x: float
    y: float
    words: str
    style: str = "disc"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Band:
    """A curve over whole numbers with a band round it: the middle, and the band's edges."""

    name: str
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Estimate:
    """A named value with an interval; what is None was not to be had."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    words: str


def scatter(
    marks: Sequence[Mark],
    *,
    titles: tuple[str, str],
    label: str,
    steps: Sequence[tuple[float, float]] = (),
    whole: bool = False,
    size: str = "low",
) -> Markup:
    """Points on two linear axes.

    Args:
        marks: At least one.
        titles: Of the vertical and of the horizontal axis.
        label: For those who cannot see it.
        steps: Corners of a step line, from left to right: it rises where a point is reached.
        whole: Whether the horizontal axis counts.
        size: ``low``, or nothing for the full height.
    """
    x = Axis.around([mark.x for mark in marks], whole=whole)
    y = Axis.around([edge for mark in marks for edge in (mark.y, mark.low, mark.high) if edge is not None])
    drawn = [_steps(steps, x, y)] if steps else []
    for mark in marks:
        left = x.place(mark.x)
        if mark.low is not None and mark.high is not None:
            low, high = (percent(100 - y.place(edge)) for edge in (mark.low, mark.high))
            drawn.append(element("line", x1=percent(left), x2=percent(left), y1=low, y2=high, class_="whisker"))
        drawn.append(glyph(mark.style, left, 100 - y.place(mark.y), mark.words))
    return plot(x, y, drawn, label=label, titles=titles, size=size)


def _steps(corners: Sequence[tuple[float, float]], x: Axis, y: Axis) -> Markup:
    (first, height), *rest = corners
    path = f"M{x.place(first):.3f} {100 - y.place(height):.3f}"
    path += "".join(f"H{x.place(left):.3f}V{100 - y.place(top):.3f}" for left, top in rest)
    return stretched(f"{path}H100", "best")


def bands(curves: Sequence[Band], *, titles: tuple[str, str], label: str, start: int = 1) -> Markup:
    """Curves over `start`, `start` + 1, … with their bands and a legend."""
    longest = max(len(curve.middle) for curve in curves)
    x = Axis.around([start, start + longest - 1], whole=True, margin=0.01)
    y = Axis.around([0.0, *(value for curve in curves for value in curve.high)])
    drawn = []
    for index, curve in enumerate(curves):
        there = [(x.place(step), 100 - y.place(value)) for step, value in enumerate(curve.high, start)]
        back = [(x.place(step), 100 - y.place(value)) for step, value in enumerate(curve.low, start)]
        outline = "L".join(f"{left:.3f} {top:.3f}" for left, top in [*there, *reversed(back)])
        drawn.append(stretched(f"M{outline}Z", f"band s{index % 6}"))
    for index, curve in enumerate(curves):
        line = "L".join(f"{x.place(n):.3f} {100 - y.place(value):.3f}" for n, value in enumerate(curve.middle, start))
        drawn.append(stretched(f"M{line}", f"validation s{index % 6}"))
    keys = (legend_item(element("span", class_=f"key s{n % 6}"), curve.name) for n, curve in enumerate(curves))
    return join([element("ul", *keys, class_="legend"), plot(x, y, drawn, label=label, titles=titles)])


def forest(estimates: Sequence[Estimate], *, title: str, label: str, through: float | None = None) -> Markup:
    """Estimates below each other on one axis, each with its interval; `through` is a value to mark by a line."""
    edges = [edge for each in estimates for edge in (each.value, each.low, each.high) if edge is not None]
    axis = Axis.around([*edges, *([] if through is None else [through])], count=4)
    rows = [
        element("div", element("span", each.name, class_="forest-name"), _estimate(each, axis, through), class_="row")
        for each in estimates
    ]
    ticks = (element("text", axis.label(tick), x=percent(axis.place(tick)), y=12, class_="x") for tick in axis.ticks)
    scale = element("svg", element("g", *ticks, class_="grid"), class_="forest-line chart-text", aria_hidden="true")
    rows.append(element("div", element("span", title, class_="forest-name axis"), scale, class_="row"))
    return element("div", *rows, class_="forest", role="img", aria_label=label)


def _estimate(each: Estimate, axis: Axis, through: float | None) -> Markup:
    drawn = [
        element("line", x1=percent(axis.place(tick)), x2=percent(axis.place(tick)), y1=0, y2="100%")
        for tick in axis.ticks
    ]
    grid = element("g", *drawn, class_="grid")
    marks = []
    if through is not None:
        place = percent(axis.place(through))
        marks.append(element("line", x1=place, x2=place, y1=0, y2="100%", class_="unigram"))
    if each.low is not None and each.high is not None:
        ends = percent(axis.place(each.low)), percent(axis.place(each.high))
        marks.append(element("line", x1=ends[0], x2=ends[1], y1="50%", y2="50%", class_="whisker"))
    if each.value is not None:
        marks.append(glyph("disc", axis.place(each.value), 50, each.words))
    return element("svg", grid, *marks, class_="forest-line")
