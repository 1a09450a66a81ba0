"""What `bench_inference.py` measures of a model in a cell, and how it prints it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from composer_kernels.overlap import Overlap


@dataclass
class Row:
    """One model in one cell; times in seconds, None where there is none, and then `note` says why.

    Attributes:
        shape: Preset.
        model: Llama, or how the Composite was grown.
        sequence: Its blocks.
        batch: Requests.
        context: Tokens of each in the cache, or of each prompt.
        prefill: Time of the prompts.
        graph: Time of a decoding step in a CUDA graph, as `Decoder` does it of its own accord.
        fused: Times of one whose products are `linear_decode`, by how far its kernels overlap; none for many rows.
        cublas: Time of one whose products are cuBLAS's, and the rest apart.
        eager: Time of one launched kernel by kernel.
        drawn: Time of one in a graph that draws (temperature, top-k and top-p) instead of taking the likeliest token.
        bytes: Weights and cache that a step reads.
        fraction: Of the copy bandwidth, by `bytes` and `graph`.
        read_fraction: Of the bandwidth of reading, likewise.
        cache: Bytes that allocating the cache requested.
        cache_formula: What they should be.
        advantage: Llama's `graph` over this one.
        prefill_advantage: Llama's `prefill` over this one.
        note: What there is to say.
    """

    shape: str
    model: str
    sequence: str
    batch: int
    context: int
    prefill: float | None = None
    graph: float | None = None
    fused: dict[str, float] = field(default_factory=dict)
    cublas: float | None = None
    eager: float | None = None
    drawn: float | None = None
    bytes: int | None = None
    fraction: float | None = None
    read_fraction: float | None = None
    cache: int | None = None
    cache_formula: int | None = None
    advantage: float | None = None
    prefill_advantage: float | None = None
    note: str = ""


def compare(row: Row, llama: Row | None) -> None:
    """Set a row beside Llama's."""
    if llama is None:
        return
    if row.graph and llama.graph:
        row.advantage = llama.graph / row.graph
    if row.prefill and llama.prefill:
        row.prefill_advantage = llama.prefill / row.prefill


def show(row: Row) -> None:
    """Print one line."""

    def cell(value: float | None, scale: float, form: str) -> str:
        return "-".rjust(int(form.partition(".")[0])) if value is None else format(value * scale, form)

    parts = (
        cell(row.prefill, 1e3, "10.2f"),
        cell(row.graph, 1e3, "8.3f"),
        *(cell(row.fused.get(overlap), 1e3, "8.3f") for overlap in get_args(Overlap)),
        cell(row.cublas, 1e3, "8.3f"),
        cell(row.eager, 1e3, "8.3f"),
        cell(row.drawn, 1e3, "8.3f"),
        cell(row.fraction, 1, "7.3f"),
        cell(row.read_fraction, 1, "7.3f"),
        cell(row.advantage, 1, "7.3f"),
        cell(row.prefill_advantage, 1, "9.3f"),
        cell(row.cache, 1e-6, "9.1f"),
        "=" if row.cache == row.cache_formula else "≠",
    )
    print(f"{row.shape:5} {row.model:9} {row.batch:5} {row.context:7} {' '.join(parts)} {row.note}", flush=True)


HEADING = (
    f"{'shape':5} {'model':9} {'batch':>5} {'context':>7} {'prefill ms':>10} {'graph ms':>8} {'fused':>8} {'tail':>8} "
    f"{'full':>8} {'cublas':>8} {'eager ms':>8} {'drawn ms':>8} {'of copy':>7} {'of read':>7} "
    f"{'x llama':>7} {'x prefill':>9} {'cache MB':>9} as computed"
)
