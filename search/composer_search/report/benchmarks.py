"""One page of everything that benchmarks measured: training, where a step's time goes, decoding, cache, kernels.

The figures come as plain rows, as the result files hold them; what was not measured has no place on the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from composer_search.report.charts import Axis, glyph, legend_item, percent, plot, stretched
from composer_search.report.decoding import cache, latency
from composer_search.report.markup import (
    Column,
    Markup,
    Missing,
    bullets,
    decimal,
    element,
    integer,
    join,
    sequence_text,
    table,
    tall,
)
from composer_search.report.shell import fill_page

Row = Mapping[str, Any]

_PARTS = ("gemm", "attention", "elementwise", "loss", "optimizer", "copies", "communication", "idle")
"""Of a step, in the order in which bars show them; each has the colour of its place."""


@dataclass(frozen=True)
class Measured:
    """What the page shows.

    Attributes:
        training: Rows of the training benchmark, each with its GPU's name under ``gpu``, its file's under ``file``.
        inference: Rows of the inference benchmark, each with its ``gpu``.
        keeping: What decoding keeps of each model, and the requests that fit, as `cache` takes them.
        trials: Batches that were allocated to confirm that, each with its ``gpu``.
        kernels: Rows of ours in each case beside the best peer of the same work: op, case, name, seconds, fraction,
            peer, advantage, note, gpu.
        search: Rows of the search benchmark, likewise.
        studies: What whole studies would take, a sentence each.
        ratios: A Composite's tokens/s over Llama's by sequence length, under a name for the legend.
        carried: The same at other lengths, by the parts of the measured steps, under the same names.
        explained: What that says, a sentence a curve.
        gains: Name, length, measured ratio, the carried one and the one at the ceilings; None where there is none.
        ceilings: Of each GPU: copy bandwidth in bytes/s, GEMM rate in FLOP/s.
        sources: One line for each file.
    """

    training: Sequence[Row]
    inference: Sequence[Row]
    keeping: Sequence[Row]
    trials: Sequence[Row]
    kernels: Sequence[Row]
    search: Sequence[Row]
    studies: Sequence[str]
    ratios: Mapping[str, Sequence[tuple[int, float]]]
    carried: Mapping[str, Sequence[tuple[int, float]]]
    explained: Sequence[str]
    gains: Sequence[tuple[str, int, float, float | None, float | None]]
    ceilings: Mapping[str, Mapping[str, float]]
    sources: Sequence[str]


def build_page(measured: Measured) -> str:
    """The page as HTML; sections without figures are left out, and the page says so."""
    sections = (
        ("ratio", "What a Composite gains in training, by sequence length", _ratio),
        ("training", "Training throughput", _training),
        ("roofline", "Where a step's time goes", _roofline),
        ("latency", "Prefill and decoding", lambda measured: latency(measured.inference)),
        ("cache", "Cache", lambda measured: cache(measured.keeping, measured.trials, measured.inference)),
        ("kernels", "Kernels beside their peers", _kernels),
        ("search", "Candidates trained at once", _search),
        ("sources", "Where the figures come from", _sources),
    )
    shown, missing = [], []
    for anchor, title, build in sections:
        body = build(measured)
        if isinstance(body, Missing):
            missing.append(f"{title}: {body.reason}")
        else:
            shown.append((anchor, title, body))
    links = element("ul", *(element("li", element("a", title, href=f"#{anchor}")) for anchor, title, _ in shown))
    parts = (
        element(
            "section", element("h2", title, id=f"{anchor}-title"), body, id=anchor, aria_labelledby=f"{anchor}-title"
        )
        for anchor, title, body in shown
    )
    left_out = element("div", element("p", "Not measured"), bullets(missing), class_="left-out") if missing else ""
    return fill_page("Benchmarks", sections=join(parts), contents=links, left_out=left_out)


def _ratio(measured: Measured) -> Markup | Missing:
    curves = {name: points for name, points in measured.ratios.items() if points}
    if not curves:
        return Missing("no Composite was trained beside its Llama")
    carried = {name: points for name, points in measured.carried.items() if name in curves}
    everything = [point for points in (*curves.values(), *carried.values()) for point in points]
    x = _octaves(length for length, _ in everything)
    y = Axis.around([ratio for _, ratio in everything] + [1.0])
    marks = [_level(y, 1.0)]
    for number, (name, points) in enumerate(curves.items()):
        placed, line = (
            [(x.place(math.log2(length)), 100 - y.place(ratio)) for length, ratio in some]
            for some in (points, carried.get(name, points))
        )
        path = "M" + "L".join(f"{left:.3f} {top:.3f}" for left, top in line)
        marks.append(stretched(path, f"s{number % 6}"))
        for (length, ratio), (left, top) in zip(points, placed, strict=True):
            marks.append(glyph(f"disc s{number % 6}", left, top, f"{name}: x{ratio:.3f} at {length:,} tokens"))
    ticks = sorted({length for length, _ in everything})
    labels = [
        element("text", f"{length:,}", x=percent(x.place(math.log2(length))), y="100%", dy=20, class_="x")
        for length in ticks
    ]
    label = "; ".join(f"{name}: " + ", ".join(f"{r:.3f} at {n}" for n, r in points) for name, points in curves.items())
    drawing = plot(
        None,
        y,
        [element("g", *labels, class_="grid"), *marks],
        label=f"Tokens per second over Llama's by sequence length. {label}",
        titles=("Tokens/s of the Composite over Llama's, same backend", "Tokens in a sequence"),
    )
    keys = [legend_item(element("span", class_=f"key s{number % 6}"), name) for number, name in enumerate(curves)]
    words = (
        "Discs were measured. A line follows from the parts of those steps: attention's part of a token's time grows "
        "with the sequence's length, along the straight line through what was measured, and the rest stays. A "
        "Composite has fewer attention blocks and somewhat more to multiply. The faster attention is beside the rest, "
        "the smaller the gain at a length; it tends to the ratio of attention's slopes. A line through one length "
        "alone lies too high at greater ones, since attention kernels gain speed with length: where others were "
        "measured at several, the table has it."
    )
    figure = element("figure", element("ul", *keys, class_="legend"), drawing, element("figcaption", words))
    return join([figure, bullets(measured.explained), _gains(measured)])


def _gains(measured: Measured) -> Markup:
    def cell(value: float | None) -> str:
        return Markup("–") if value is None else decimal(value, 3)

    columns = [
        Column("Composite, backend, GPU"),
        Column("Tokens", numeric=True, meaning="in a sequence"),
        Column("measured", numeric=True, meaning="tokens/s over Llama's on the same backend"),
        Column("by the parts", numeric=True, meaning="from the parts of the steps at all lengths with a breakdown"),
        Column("at the ceilings", numeric=True, meaning="of what both models would take at the GPU's ceilings"),
    ]
    rows = [[name, integer(length), *map(cell, figures)] for name, length, *figures in measured.gains]
    return tall(table("Measured gains beside those that the parts give", columns, rows, sortable=True))


def _octaves(lengths: Iterable[int]) -> Axis:
    known = [math.log2(length) for length in lengths]
    return Axis(min(known) - 0.15, max(known) + 0.15, (), 0)


def _level(axis: Axis, value: float) -> Markup:
    height = percent(100 - axis.place(value))
    return element("line", x1=0, x2="100%", y1=height, y2=height, class_="unigram")


def _training(measured: Measured) -> Markup | Missing:
    if not measured.training:
        return Missing("no result of composer-megatron bench training")
    columns = [
        Column("Model"),
        Column("Sequence"),
        Column("Backend"),
        Column("GPU"),
        Column("Tokens", numeric=True, meaning="in a sequence"),
        Column("Tokens/s", numeric=True),
        Column("±", numeric=True, meaning="largest less smallest step, over the median"),
        Column("TFLOP/s", numeric=True, meaning="causal attention counted"),
        Column("MFU", numeric=True, meaning="of 989 TFLOP/s"),
        Column("of GEMM", numeric=True, meaning="of the rate of matrix products measured in the same run"),
        Column("Peak GB", numeric=True),
        Column("Note"),
        Column("File", meaning="rows of one file were measured in one run"),
    ]
    order = sorted(measured.training, key=lambda row: (row["gpu"], row["shape"], row["seq_len"], row["backend"]))
    return tall(table("Training throughput", columns, map(_training_row, order), sortable=True))


def _training_row(row: Row) -> list[str]:
    def cell(name: str, digits: int, scale: float = 1.0) -> str:
        return decimal(scale * row[name], digits) if row.get(name) is not None else Markup("–")

    figures = (
        integer(round(row["tokens_per_second"])) if row.get("tokens_per_second") else Markup("–"),
        cell("spread", 3),
        cell("tflops", 0),
        cell("mfu", 3),
        cell("of_gemm_rate", 3),
        cell("peak_bytes", 1, 1e-9),
    )
    first = (f"{row['shape']} {row['model']}", sequence_text(row["sequence"]), row["backend"], row["gpu"])
    return [*first, integer(row["seq_len"]), *figures, row.get("note") or "", row["file"]]


def _roofline(measured: Measured) -> Markup | Missing:
    rows = [row for row in measured.training if row.get("breakdown")]
    if not rows:
        return Missing("no step was profiled")
    longest = max(_seconds_a_token(row, "breakdown") for row in rows)
    order = sorted(rows, key=lambda row: (row["gpu"], row["shape"], row["seq_len"], row["model"], row["backend"]))
    names = [f"{row['shape']} {row['model']}, {row['backend']}, {row['seq_len']:,} tokens" for row in order]
    bars = []
    for row, start in zip(order, names, strict=True):
        apart = "; left out of comparisons" if row.get("unfair") else ""
        name = start + (f", {row['file']}" if names.count(start) > 1 else "") + apart
        bars.append(_bar(name, row, "breakdown", longest))
        if row.get("ideal"):
            bars.append(_bar("at the measured ceilings", row, "ideal", longest))
    keys = [
        legend_item(element("span", Markup("&nbsp;"), class_=f"chip p{number}"), name)
        for number, name in enumerate(_PARTS)
    ]
    words = (
        "Nanoseconds a token, by the kernels' names. Below each measured bar stands what its matrix products, "
        "attention, passes over memory and optimizer would take at the GPU's ceilings, measured in the same run; "
        "attention's ceilings are assumed shares of the rate of matrix products, and that rate is bf16's, also below "
        "steps whose products are in 8 bits."
    )
    return element("figure", element("ul", *keys, class_="legend"), *bars, element("figcaption", words))


def _seconds_a_token(row: Row, name: str) -> float:
    tokens = row["seq_len"] * row["micro_batch"] * row["micro_batches"]
    return float(sum(row[name].values()) / tokens)


def _bar(name: str, row: Row, which: str, longest: float) -> Markup:
    tokens = row["seq_len"] * row["micro_batch"] * row["micro_batches"]
    left, pieces, words = 0.0, [], []
    for number, part in enumerate(_PARTS):
        seconds = row[which].get(part, 0.0) / tokens
        if seconds <= 0:
            continue
        width = 100 * seconds / longest
        words.append(f"{part} {1e9 * seconds:.0f}")
        title = element("title", f"{part}: {1e9 * seconds:.1f} ns a token")
        rect = element("rect", title, x=percent(left), y=0, width=percent(width), height="100%")
        label = element("text", f"{1e9 * seconds:.0f}", x=percent(left + width / 2), y="50%") if width > 6 else ""
        pieces.append(element("g", rect, label, class_=f"p{number}"))
        left += width
    total = 1e9 * _seconds_a_token(row, which)
    head = element("p", element("span", name), element("span", f"{total:,.0f} ns a token"), class_="bar-head")
    says = f"{name}: {', '.join(words)}"
    drawing = element("svg", *pieces, class_="strip", role="img", aria_label=says, style="width:100%")
    return element("div", head, element("div", drawing, class_="strips"), class_="bar")


def _kernels(measured: Measured) -> Markup | Missing:
    if not measured.kernels:
        return Missing("no result of composer-megatron bench kernels")
    columns = [
        Column("Operation"),
        Column("Case"),
        Column("GPU"),
        Column("µs", numeric=True, meaning="ours, in a CUDA graph, caches cold"),
        Column("of limit", numeric=True, meaning="of the bandwidth or the GEMM rate measured in the same run"),
        Column("Best peer"),
        Column("peer over us", numeric=True, meaning="the peer's time over ours: below 1 where ours is slower"),
        Column("Note"),
    ]
    rows = []
    for row in measured.kernels:
        cells = [
            decimal(scale * row[name], digits) if row.get(name) is not None else Markup("–")
            for name, digits, scale in (("seconds", 1, 1e6), ("fraction", 3, 1.0), ("advantage", 3, 1.0))
        ]
        rows.append(
            [row["op"], row["case"], row["gpu"], *cells[:2], row.get("peer") or "–", cells[2], row.get("note") or ""]
        )
    return tall(table("Kernels", columns, rows, sortable=True))


def _search(measured: Measured) -> Markup | Missing:
    if not measured.search:
        return Missing("no result of benchmarks/bench_search.py")
    columns = [
        Column("Case"),
        Column("GPU"),
        Column("Contender"),
        Column("At once", numeric=True),
        Column("ms", numeric=True, meaning="a step of one candidate"),
        Column("over one at a time", numeric=True),
    ]
    rows = []
    for row in measured.search:
        first = (row["case"], row["gpu"], row["contender"], integer(row["rows"]), decimal(1e3 * row["seconds"], 3))
        rows.append([*first, decimal(row["advantage"], 1) if row["advantage"] else "–"])
    return join([table("Search", columns, rows, sortable=True), bullets(measured.studies)])


def _sources(measured: Measured) -> Markup | Missing:
    if not measured.sources:
        return Missing("there is no result")
    limits = [
        f"{gpu}: "
        + ", ".join(
            f"{name} {value / 1e12:.2f} {'TFLOP/s' if name == 'gemm' else 'TB/s'}" for name, value in known.items()
        )
        for gpu, known in measured.ceilings.items()
    ]
    heading = element("h3", "Ceilings") if limits else ""
    return join([bullets(measured.sources), heading, bullets(limits) if limits else ""])
