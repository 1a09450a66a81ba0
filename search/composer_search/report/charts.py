"""The report's drawings, as inline SVG that a browser lays out at any width.

No drawing has a view box: positions are percentages of the drawing, sizes of text and marks are pixels. A chart is so
as legible on a telephone as on a desk. Colours are classes of the page's style sheet, which knows light and dark.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from composer_megatron.primitives import PRIMITIVES
from composer_search.report.data import Aggregate, Contents, Curve, Study, Trial
from composer_search.report.markup import Markup, element, join

MOST_POINTS = 600
"""Points of a curve; longer ones are drawn as means of equal stretches of steps."""

_GLYPHS = {"sobol": "ring", "bayesian": "disc", "random": "square", "exhaustive": "disc", "evolution": "diamond"}


@dataclass(frozen=True)
class Axis:
    """A linear scale.

    Attributes:
        low: Value at the left or lower edge.
        high: Value at the other edge.
        ticks: Values that get a line and a label.
        digits: Decimals of the labels.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    digits: int

    @classmethod
    def around(cls, values: Iterable[float], *, count: int = 5, margin: float = 0.04, whole: bool = False) -> Axis:
        """An axis round finite values, with about `count` ticks at multiples of 1, 2 or 5 times a power of ten.

        Values that differ by less than a millionth of their size count as equal.
        `whole` keeps the ticks on whole numbers.
        """
        known = list(values) or [0.0, 1.0]
        low, high = min(known), max(known)
        largest = max(abs(low), abs(high))
        around = (high - low) * margin if high - low > 1e-6 * largest else 0.1 * largest or 1.0
        low, high = low - around, high + around
        rough = (high - low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        step = max(step, 1.0) if whole else step
        ticks = tuple(n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1))
        if whole:
            ticks = tuple(tick for tick in ticks if min(known) <= tick <= max(known))
        return cls(low, high, ticks, max(0, -math.floor(math.log10(step) + 1e-9)))

    def place(self, value: float) -> float:
        """Per cent of the way from `low` to `high`."""
        return 100 * (value - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        """A tick as text."""
        return f"{tick:,.{self.digits}f}".replace("-", "−")


def percent(value: float) -> str:
    """A length in per cent, as SVG takes it."""
    return f"{round(value, 3):g}%"


def colour(letter: str) -> str:
    """The class that colours a primitive: its row in the table of primitives."""
    return f"p{list(PRIMITIVES).index(letter) % 8}"


def block_strip(letters: str, longest: int, *, cuts: Sequence[int] = ()) -> Markup:
    """A sequence as a bar of coloured blocks, each as wide as a block of any strip drawn with the same `longest`.

    Args:
        letters: One letter a block.
        longest: Blocks of the longest sequence to be compared.
        cuts: Block numbers before which a pipeline stage begins.
    """
    width = 100 / len(letters)
    blocks = []
    for index, letter in enumerate(letters):
        left = percent(index * width)
        rect = element("rect", x=left, y=0, width=percent(width), height="100%", rx=3)
        text = element("text", letter, x=percent((index + 0.5) * width), y="50%")
        blocks.append(element("g", rect, text, class_=colour(letter)))
    lines = [element("line", x1=percent(cut * width), x2=percent(cut * width), y1="-30%", y2="130%") for cut in cuts]
    density = "deep" if longest > 30 else "many" if longest > 14 else None
    counts = ", ".join(f"{letters.count(symbol)} {row.name}" for symbol, row in PRIMITIVES.items() if symbol in letters)
    drawing = element(
        "svg",
        *blocks,
        element("g", *lines, class_="cuts") if lines else "",
        class_="strip",
        role="img",
        aria_label=f"{len(letters)} blocks in the order {letters}: {counts}",
        style=f"width:{percent(100 * len(letters) / longest)}",
    )
    return element("div", drawing, class_=f"strips {density or ''}".strip())


def primitive_legend() -> Markup:
    """The colours of the primitives."""
    return element("ul", *(_legend_block(symbol) for symbol in PRIMITIVES), class_="legend")


def trials_chart(study: Study) -> Markup:
    """Score by trial, with the spread over seeds as whiskers and the best so far as a step line."""
    scored = sorted(study.scored, key=lambda pair: pair[0].number)
    reach = [edge for trial, score in scored for edge in (score - trial.spread, score + trial.spread)]
    numbers = [trial.number for trial in study.trials]
    x, y = Axis.around(numbers, whole=True, count=8), Axis.around(reach)
    votes = dict(study.aggregate.members) if study.aggregate else {}
    lowest = min(votes.values(), default=math.inf)  # a sequence tried again may have a score below the best cluster's
    marks = [_step_line(scored, x, y)]
    marks += [
        _trial_mark(trial, score, x, y, trial.sequence in votes and (trial.value or score) >= lowest)
        for trial, score in scored
    ]
    for trial in study.trials:
        if trial.score is None:
            marks.append(glyph("cross", x.place(trial.number), 100, f"Trial {trial.number}: {trial.status}"))
    best = study.scored[0]
    label = f"Score of {len(scored)} trials; the best is trial {best[0].number}, {best[0].sequence}, at {best[1]:.4f}"
    return plot(x, y, marks, label=label, titles=("Score", "Trial"))


def trials_legend(study: Study) -> Markup:
    """What the marks of `trials_chart` mean, for the marks that occur."""
    names = {"sobol": "Sobol (space-filling)", "bayesian": "Bayesian optimisation"}
    found = dict.fromkeys(trial.proposer for trial, _ in study.scored)
    items = [legend_item(key_mark(_GLYPHS.get(name, "disc")), names.get(name, name.capitalize())) for name in found]
    if study.aggregate:
        items.append(legend_item(key_mark("disc member"), "in the best cluster, which votes"))
    items.append(legend_item(element("span", class_="key best"), "best so far"))
    if any(trial.spread for trial, _ in study.scored):
        items.append(legend_item(element("span", class_="key whisker"), "± standard deviation over seeds"))
    if any(trial.score is None for trial in study.trials):
        items.append(legend_item(key_mark("cross"), "failed"))
    return element("ul", *items, class_="legend")


def votes_chart(aggregate: Aggregate) -> Markup:
    """The votes at each position as stacked bars over the aggregated sequence."""
    count = len(aggregate.votes)
    most = max(1, *(sum(vote.values()) for vote in aggregate.votes))
    y = Axis.around([0, most], whole=True, margin=0, count=4)
    slot = 100 / count
    marks = []
    for position, vote in enumerate(aggregate.votes):
        centre, floor = percent((position + 0.5) * slot), 0
        for symbol in PRIMITIVES:
            if votes := vote.get(symbol, 0):
                column = (position + 0.15) * slot, 0.7 * slot
                marks.append(_vote(f"Position {position + 1}", symbol, votes, floor=floor, y=y, column=column))
                floor += votes
        decided = {"tie": "tie", "unseen context": "unseen"}.get(aggregate.decisions[position], "")
        if decided:
            marks.append(element("text", decided, x=centre, y=percent(100 - y.place(floor)), dy=-6, class_="decision"))
        if (position + 1) % math.ceil(count / 16) == 0:
            marks.append(element("text", str(position + 1), x=centre, y="100%", dy=20, class_="decision"))
    words = "; ".join(
        f"position {number}: " + ", ".join(f"{votes} for {letter}" for letter, votes in vote.items())
        for number, vote in enumerate(aggregate.votes, start=1)
    )
    bars = plot(None, y, marks, label=f"Votes: {words}", titles=("Votes by position", ""), size="low")
    letters = element("div", block_strip(aggregate.sequence.letters, count), class_="under-plot")
    return join([bars, letters])


def loss_chart(contents: Contents) -> Markup:
    """Training and validation loss of every run by step, with the unigram model's loss as a line."""
    drawn = [(f"s{index % 6}", run, thin(run.training)) for index, run in enumerate(contents.runs)]
    points = [point for _, run, training in drawn for point in (*training, *run.validation)]
    losses = [loss for _, loss in points] + ([contents.unigram[0]] if contents.unigram else [])
    x, y = Axis.around([step for step, _ in points], whole=True, margin=0.01), Axis.around(losses)
    marks: list[Markup] = []
    if contents.unigram:
        height = percent(100 - y.place(contents.unigram[0]))
        marks.append(element("line", x1=0, x2="100%", y1=height, y2=height, class_="unigram"))
        marks.append(element("text", "unigram model", x="100%", dx=-6, y=height, dy=-7, class_="unigram-name"))
    series = []
    for style, run, training in drawn:
        marks.append(_path(training, x, y, f"{style} training"))
        marks.append(_path(run.validation, x, y, f"{style} validation"))
        marks += [_dot(step, loss, x, y, style) for step, loss in run.validation]
        series += [(f"{run.name}, training", training), (f"{run.name}, validation", run.validation)]
    curves = [(run.name, run.validation or run.training) for run in contents.runs]
    ends = ", ".join(f"{name} ends at {curve[-1][1]:.3f}" for name, curve in curves if curve)
    data = {"low": x.low, "high": x.high, "series": [{"name": name, "points": line} for name, line in series if line]}
    label = f"Loss in nats per token by training step: {ends}"
    return plot(x, y, marks, label=label, titles=("Loss, nats per token", "Step"), series=json.dumps(data))


def loss_legend(contents: Contents) -> Markup:
    """Which colour is which run, and how training and validation are drawn."""
    items = [
        legend_item(element("span", class_=f"key s{index % 6}"), run.name)
        for index, run in enumerate(contents.runs)
        if run.training or run.validation
    ]
    items.append(legend_item(element("span", class_="key thin"), "training"))
    items.append(legend_item(element("span", class_="key dotted"), "held-out validation"))
    return element("ul", *items, class_="legend")


def thin(curve: Curve) -> Curve:
    """A curve of at most `MOST_POINTS` points: means over equal numbers of neighbours, at their last step."""
    size = math.ceil(len(curve) / MOST_POINTS)
    if size <= 1:
        return curve
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return tuple((group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups)


def plot(
    x: Axis | None,
    y: Axis,
    marks: Iterable[str],
    *,
    label: str,
    titles: tuple[str, str],
    size: str = "",
    series: str | None = None,
) -> Markup:
    """Axes with marks; `titles` name y and x, `series` is JSON from which the page's script shows values on hover."""
    grid = []
    for tick in y.ticks:
        height = percent(100 - y.place(tick))
        grid.append(element("line", x1=0, x2="100%", y1=height, y2=height))
        grid.append(element("text", y.label(tick), x=0, dx=-10, y=height, class_="y"))
    if x is not None:
        grid += [
            element("text", x.label(tick), x=percent(x.place(tick)), y="100%", dy=20, class_="x") for tick in x.ticks
        ]
    drawing = element(
        "svg",
        element("g", *grid, class_="grid"),
        *marks,
        class_=f"chart {size}".strip(),
        role="img",
        aria_label=label,
        data_series=series,
    )
    below = element("p", titles[1], class_="axis x-title") if titles[1] else ""
    return element("div", element("p", titles[0], class_="axis"), drawing, below, class_="plot")


def _path(curve: Curve, x: Axis, y: Axis, style: str) -> Markup:
    corners = (f"{x.place(step):.3f} {100 - y.place(loss):.3f}" for step, loss in curve)
    return stretched("M" + "L".join(corners), style) if curve else Markup()


def _step_line(scored: list[tuple[Trial, float]], x: Axis, y: Axis) -> Markup:
    best, path = -math.inf, ""
    for trial, score in scored:
        left = f"{x.place(trial.number):.3f}"
        path += f"H{left}" if path else f"M{left} {100 - y.place(score):.3f}"
        best = max(best, score)
        path += f"V{100 - y.place(best):.3f}"
    return stretched(f"{path}H100", "best")


def stretched(path: str, style: str) -> Markup:
    """A path whose coordinates are per cent of the chart; the pen keeps its width."""
    pen = element("path", d=path, class_=style, vector_effect="non-scaling-stroke")
    return element("svg", pen, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")


def _trial_mark(trial: Trial, score: float, x: Axis, y: Axis, member: bool) -> Markup:
    left, whisker = percent(x.place(trial.number)), ""
    if trial.spread:
        low, high = (percent(100 - y.place(score + side * trial.spread)) for side in (-1, 1))
        whisker = element("line", x1=left, x2=left, y1=low, y2=high, class_="whisker")
    spread = f" ± {trial.spread:.4f}" if trial.spread else ""
    words = f"Trial {trial.number}: {trial.sequence}\n{score:.4f}{spread}, {trial.proposer}"
    style = _GLYPHS.get(trial.proposer, "disc") + (" member" if member else "")
    return join([whisker, glyph(style, x.place(trial.number), 100 - y.place(score), words)])


def glyph(style: str, left: float, top: float, words: str) -> Markup:
    """A mark at a place in per cent of the chart; `words` show on hover."""
    return element("svg", _shape(style, element("title", words)), x=percent(left), y=percent(top), class_="place")


def _shape(style: str, *children: str) -> Markup:
    """A mark a dozen pixels wide round the origin."""
    classes = f"glyph {style}"
    if style == "cross":
        return element("path", *children, d="M-4-4L4 4M-4 4L4-4", class_=classes)
    if style.startswith("square"):
        return element("rect", *children, x=-4, y=-4, width=8, height=8, class_=classes)
    if style.startswith("diamond"):
        return element("path", *children, d="M0-6L6 0L0 6L-6 0Z", class_=classes)
    return element("circle", *children, r=5, class_=classes)


def _dot(step: int, loss: float, x: Axis, y: Axis, style: str) -> Markup:
    return element("circle", cx=percent(x.place(step)), cy=percent(100 - y.place(loss)), r=3, class_=f"dot {style}")


def _vote(where: str, symbol: str, votes: int, *, floor: int, y: Axis, column: tuple[float, float]) -> Markup:
    """A letter's votes on top of `floor` others, in a `column` given by its left edge and width."""
    left, width = column
    top, bottom = 100 - y.place(floor + votes), 100 - y.place(floor)
    words = element("title", f"{where}: {votes} for {symbol}")
    sizes = {"x": percent(left), "y": percent(top), "width": percent(width), "height": percent(bottom - top)}
    text = element("text", str(votes), x=percent(left + width / 2), y=percent((top + bottom) / 2))
    return element(
        "g", element("rect", words, **sizes, rx=3), text if bottom - top > 8 else "", class_=f"vote {colour(symbol)}"
    )


def key_mark(style: str) -> Markup:
    """A mark for a legend."""
    return element("svg", element("svg", _shape(style), x="50%", y="50%", class_="place"), class_="key-glyph")


def legend_item(key: str, words: str) -> Markup:
    """One entry of a legend."""
    return element("li", element("span", key, class_="key-box", aria_hidden="true"), element("span", words))


def _legend_block(symbol: str) -> Markup:
    square = element("span", symbol, class_=f"chip {colour(symbol)}", aria_hidden="true")
    return element("li", square, element("span", f"{symbol}, {PRIMITIVES[symbol].name}"))
