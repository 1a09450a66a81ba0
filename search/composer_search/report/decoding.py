"""Decoding on the page of benchmarks: latency over batch and context, what the cache holds, and what was allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from composer_search.report.markup import (
    Column,
    Markup,
    Missing,
    decimal,
    details,
    element,
    integer,
    join,
    sequence_text,
    table,
    tall,
)

Row = Mapping[str, Any]

_NOTHING = Markup("–")


def latency(rows: Sequence[Row]) -> Markup | Missing:
    """Grids of decoding and prefill, one pair for each GPU and shape, and all figures of each cell.

    Args:
        rows: Of the inference benchmark, each with the name of its GPU under ``gpu``.
    """
    if not rows:
        return Missing("no result of the inference benchmark")
    parts: list[str] = []
    for gpu, shape in dict.fromkeys((row["gpu"], row["shape"]) for row in rows):
        mine = [row for row in rows if (row["gpu"], row["shape"]) == (gpu, shape)]
        for title, figure, beside in (
            ("Decoding, ms a step", "graph", "advantage"),
            ("Prefill, ms", "prefill", "prefill_advantage"),
        ):
            parts.append(element("h3", f"{title}: {shape}, {gpu}"))
            parts.append(_grid(f"{title}: {shape}, {gpu}", mine, figure, beside))
    words = (
        "By batch and tokens of each request. A decoding step runs in a CUDA graph. Below a time stands Llama's time "
        "over it: above 1 the Composite is faster. Dashes were not measured."
    )
    parts.append(element("p", words, class_="note"))
    return join([*parts, details("All figures of every cell", _cells(rows))])


def _grid(caption: str, rows: Sequence[Row], figure: str, beside: str) -> Markup:
    contexts = sorted({row["context"] for row in rows})
    columns = [Column("Model"), Column("Batch", numeric=True)]
    columns += [Column(f"{context:,}", numeric=True, meaning="tokens of each request") for context in contexts]
    cells = {(row["batch"], row["model"], row["context"]): row for row in rows}
    lines = []
    for batch, model in dict.fromkeys((row["batch"], row["model"]) for row in rows):
        found = [cells.get((batch, model, context)) for context in contexts]
        lines.append([model, integer(batch), *(_cell(row, figure, beside) for row in found)])
    return table(caption, columns, lines)


def _cell(row: Row | None, figure: str, beside: str) -> str:
    if row is None:
        return _NOTHING
    if row.get(figure) is None:
        return row.get("note") or _NOTHING
    time = decimal(1e3 * row[figure], 3 if figure == "graph" else 1)
    if row["model"] == "llama" or row.get(beside) is None:
        return time
    return join([time, element("small", f"x{row[beside]:.2f}")])


def _cells(rows: Sequence[Row]) -> Markup:
    columns = [
        Column("Model"),
        Column("GPU"),
        Column("Batch", numeric=True),
        Column("Context", numeric=True),
        Column("Prefill ms", numeric=True),
        Column("Decode ms", numeric=True, meaning="a step, in a CUDA graph"),
        Column("launched", numeric=True, meaning="a step, kernel by kernel, in ms"),
        Column("of copy", numeric=True, meaning="of the copy bandwidth"),
        Column("over Llama", numeric=True, meaning="Llama's decoding time over this one's"),
        Column("Cache MB", numeric=True),
        Column("Note"),
    ]
    return tall(table("Prefill and decoding", columns, map(_figures, rows), sortable=True))


def _figures(row: Row) -> list[str]:
    def cell(name: str, digits: int, scale: float = 1.0) -> str:
        return decimal(scale * row[name], digits) if row.get(name) is not None else _NOTHING

    figures = (
        cell("prefill", 2, 1e3),
        cell("graph", 3, 1e3),
        cell("eager", 3, 1e3),
        cell("fraction", 3),
        cell("advantage", 3),
        cell("cache", 1, 1e-6),
    )
    name = f"{row['shape']} {row['model']}"
    return [name, row["gpu"], integer(row["batch"]), integer(row["context"]), *figures, row.get("note") or ""]


def cache(keeping: Sequence[Row], trials: Sequence[Row], inference: Sequence[Row]) -> Markup | Missing:
    """Exact bytes of a token and the requests that fit, and what was allocated to confirm them.

    Args:
        keeping: shape, model, sequence, bytes_per_token, ratio, and batches by memory and context.
        trials: Batches that were tried on a GPU, by ``composer-megatron kv --check``, each with its ``gpu``.
        inference: Rows of the inference benchmark, with the bytes of their caches.
    """
    if not keeping:
        return Missing("no model was counted")
    sizes = [(memory, context) for memory, fits in keeping[0]["batches"].items() for context in fits]
    columns = [
        Column("Model"),
        Column("Sequence"),
        Column("KiB a token", numeric=True),
        Column("over Llama", numeric=True, meaning="Llama's bytes of a token over this one's"),
    ]
    columns += [
        Column(
            f"{context // 1024}k, {memory / 1e9:.0f}\N{NO-BREAK SPACE}GB",
            numeric=True,
            meaning="requests of that length that fit",
        )
        for memory, context in sizes
    ]
    compared = [row for row in inference if row.get("cache") and row.get("cache_formula")]
    equal = sum(row["cache"] == row["cache_formula"] for row in compared)
    said = "bf16. Requests fit beside the weights, a pass over prompts, their logits, and what CUDA needs."
    if compared:
        said += f" Measured: {equal} of {len(compared)} allocated caches have exactly the bytes of the formula."
    counted = table("Bytes of the decoding cache", columns, (_kept(row, sizes) for row in keeping))
    parts = [counted, element("p", said, class_="note")]
    if trials:
        parts += [element("h3", "Checked by allocation"), _tried(trials)]
    return join(parts)


def _kept(row: Row, sizes: Iterable[tuple[int, int]]) -> list[str]:
    fits = [integer(row["batches"][memory][context]) for memory, context in sizes]
    ratio = _NOTHING if row["ratio"] is None else decimal(row["ratio"], 3)
    name = f"{row['shape']} {row['model']}"
    return [name, sequence_text(row["sequence"]), decimal(row["bytes_per_token"] / 1024, 0), ratio, *fits]


def _tried(trials: Sequence[Row]) -> Markup:
    columns = [
        Column("Model"),
        Column("GPU"),
        Column("Tokens", numeric=True, meaning="of each request"),
        Column("Requests", numeric=True, meaning="as many as are said to fit"),
        Column("in GB", numeric=True, meaning="the memory that they are said to fit in"),
        Column("GB in use", numeric=True, meaning="at the peak, while they were decoded"),
        Column("Cache, bytes", numeric=True, meaning="as allocated"),
        Column("by the formula", numeric=True),
        Column("Fits"),
    ]
    rows = []
    for trial in trials:
        used = "out of memory" if trial["used"] is None else decimal(trial["used"] / 1e9, 1)
        figures = (trial["context"], trial["batch"], round(trial["memory"] / 1e9))
        held = (integer(trial["cache"]), integer(trial["cache_formula"]), "yes" if trial["holds"] else "no")
        rows.append([f"{trial['shape']} {trial['model']}", trial["gpu"], *map(integer, figures), used, *held])
    return table("Batches that were allocated and decoded", columns, rows)
