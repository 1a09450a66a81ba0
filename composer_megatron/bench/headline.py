"""The README's headline figures, made from the results (`composer_megatron.bench.report`).

Nobody types a figure: the lines between two marks in the README are `headline` of the files, and a test holds them
equal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from composer_megatron.bench.kernels import Tally
from composer_megatron.bench.report import Results, Row, comparable, rate
from composer_megatron.errors import FileError
from composer_megatron.files import naming, write_text

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
"""The marks in the README."""

OURS, PEER = "composer", "compile"
"""The backend of the headline, and what it is measured against."""

VARIANTS = {
    "composer+activation=quack": "with SwiGLU within the products (`activation=quack`)",
    "composer+linear=fp8": "with products in 8 bits (`linear=fp8`)",
    "composer+linear=fp8-wgrad": "with weight gradients in 8 bits, too (`linear=fp8-wgrad`)",
}
"""The headline's backend with parts of others, and what that is."""

MEGATRON = {"te": "Megatron with TransformerEngine", "local": "Megatron with PyTorch alone"}
"""Megatron's own backends, and what they are."""


def headline(results: Results) -> str:
    """The README's figures in Markdown: one list for each GPU, and what they were measured with."""
    parts = [text for gpu in results.gpus if (text := _of_gpu(results, gpu))]
    return "\n\n".join(parts) if parts else "Nothing has been measured yet."


def _of_gpu(results: Results, gpu: str) -> str:
    makers = (_training_lines, _inference_lines, _kernel_lines, _search_lines)
    lines = [line for make in makers for line in make(results, gpu)]
    if not lines:
        return ""
    sources = [source for source in results.sources if source.gpu == gpu]
    versions = dict.fromkeys(pair for source in sources for pair in source.versions.items())
    dates = sorted({source.date for source in sources if source.date})
    said = ", ".join(f"{name} {version}" for name, version in versions)
    when = f"; {dates[0]}" if len(dates) == 1 else f"; {dates[0]} to {dates[-1]}" if dates else ""
    return "\n".join([f"**{gpu}** ({said}{when}):", "", *(f"- {line}" for line in lines)])


def _training_lines(results: Results, gpu: str) -> list[str]:
    rows = [row for row in results.training if row["source"].gpu == gpu]
    lines = []
    for shape in sorted({row["shape"] for row in rows if row["model"] == "llama"}):
        of_shape = [row for row in rows if row["shape"] == shape]
        cells = {length: [row for row in of_shape if row["seq_len"] == length] for length in _lengths(of_shape)}
        pairs = {length: pair for length, cell in cells.items() if (pair := _pair(cell, OURS)) is not None}
        if not pairs:
            continue
        first = next((length for length, pair in pairs.items() if _beside_peer(cells[length], pair[0])), min(pairs))
        stacked, llama = pairs.pop(first)
        rates = " and ".join(f"{row['tflops']:.0f}{_mfu(row)}" for row in (stacked, llama))
        lines.append(
            f"training {shape} at {first:,} tokens: {_thousands(stacked)} with the Composite, {_thousands(llama)} with "
            f"Llama ({_gain(stacked, llama)}), {rates} TFLOP/s{_beside_peer(cells[first], stacked)}"
        )
        lines += [said for name in VARIANTS if (said := _variant(cells[first], name, _step_tokens(stacked)))]
        lines += [said for name in MEGATRON if (said := _beside_megatron(cells[first], name))]
        if pairs:
            others = (f"{_thousands(a)} at {length:,} ({_gain(a, b)})" for length, (a, b) in pairs.items())
            lines.append(f"training {shape} by length, the Composite and its gain over Llama: {', '.join(others)}")
    return lines


def _lengths(rows: Sequence[Row]) -> list[int]:
    return sorted({row["seq_len"] for row in rows})


def _gain(row: Row, other: Row) -> str:
    return f"x{row['tokens_per_second'] / other['tokens_per_second']:.3f}"


def _pair(rows: Sequence[Row], backend: str) -> tuple[Row, Row] | None:
    """The fastest Composite on a backend and the Llama of the same file; None where no file has both."""
    found = []
    for source in {id(row["source"]): row["source"] for row in rows}.values():
        stacked, llama = (rate(rows, backend=backend, model=name, source=source) for name in ("stacked", "llama"))
        if stacked is not None and llama is not None:
            found.append((stacked, llama))
    return max(found, key=lambda pair: float(pair[0]["tokens_per_second"]), default=None)


def _variant(rows: Sequence[Row], backend: str, usual: int) -> str | None:
    """What a pair on another backend reaches, and how much that is over ours in the same file, if that has ours."""
    pair = _pair(rows, backend)
    if pair is None:
        return None
    said = []
    for row in pair:
        plain = rate(rows, backend=OURS, model=row["model"], source=row["source"])
        gain = "" if plain is None else f" ({_gain(row, plain)})"
        said.append(f"{_thousands(row)}{gain}")
    tokens = _step_tokens(pair[0])
    steps = "" if tokens == usual else f" in steps of {tokens:,} tokens"
    return f"the same {VARIANTS[backend]}{steps}: {' and '.join(said)}{_beside_peer(rows, pair[0])}"


def _step_tokens(row: Row) -> int:
    return int(row["micro_batches"] * row["micro_batch"] * row["seq_len"])


def _beside_megatron(rows: Sequence[Row], backend: str) -> str | None:
    """Llama on a backend of Megatron's, and ours beside it in the same file; None where no file has both."""
    llamas = [row for row in rows if row["backend"] == backend and row["model"] == "llama" and comparable(row)]
    for llama in llamas:
        ours = {row["model"]: row for row in rows if row["backend"] == OURS and row["source"] is llama["source"]}
        if all(name in ours and comparable(ours[name]) for name in ("llama", "stacked")):
            gains = [_gain(ours[name], llama) for name in ("llama", "stacked")]
            return (
                f"{MEGATRON[backend]} (backend {backend}): {_thousands(llama)} with Llama; "
                f"in the same run ours {gains[0]} with Llama, {gains[1]} with the Composite"
            )
    return None


def _beside_peer(rows: Sequence[Row], stacked: Row) -> str:
    """The peer's Llama in the same file, and how much faster the Composite is; nothing where there is none."""
    peer = rate(rows, backend=PEER, model="llama", source=stacked["source"])
    if peer is None or stacked["backend"] == PEER:
        return ""
    return f"; torch.compile's Llama {_thousands(peer)} (the Composite {_gain(stacked, peer)})"


def _thousands(row: Row) -> str:
    return f"{row['tokens_per_second'] / 1e3:.1f}k tokens/s"


def _mfu(row: Row) -> str:
    return f" (MFU {row['mfu']:.1%})" if row.get("mfu") else ""


def _inference_lines(results: Results, gpu: str) -> list[str]:
    rows = [row for row in results.inference if row["source"].gpu == gpu and row.get("graph")]
    lines = []
    for shape in sorted({row["shape"] for row in rows}):
        alone = [row for row in rows if row["shape"] == shape and row["batch"] == 1]
        if alone:
            shortest = min(row["context"] for row in alone)
            cells = {row["model"]: row for row in alone if row["context"] == shortest}
            times = ", ".join(f"{name} {1e3 * row['graph']:.2f} ms" for name, row in cells.items())
            lines.append(f"decoding {shape}, batch 1, {shortest:,} tokens of context: {times} a token")
        grown = [row for row in rows if row["shape"] == shape and row.get("advantage") and row["model"] != "llama"]
        if grown:
            gains = [row["advantage"] for row in grown]
            places = len({(row["batch"], row["context"]) for row in grown})
            lines.append(
                f"decoding {shape} over {places} cells of batch and context: the Composites x{min(gains):.2f} to "
                f"x{max(gains):.2f} as fast as Llama"
            )
    return lines


def _kernel_lines(results: Results, gpu: str) -> list[str]:
    measured = [verdict for verdict, source in results.kernels if source.gpu == gpu and verdict.seconds is not None]
    beside = [verdict.advantage for verdict in measured if verdict.advantage]
    fractions = [verdict.fraction for verdict in measured if verdict.fraction]
    if not measured:
        return []
    cases = {(verdict.op, verdict.case) for verdict in measured}
    line = f"kernels: {len({verdict.op for verdict in measured})} operations, {len(cases)} cases"
    if len(fractions) == len(measured):
        line += f", at {statistics.median(fractions):.0%} of the ceiling in the median"
    if beside:
        mean = math.exp(statistics.fmean(map(math.log, beside)))
        line += (
            f"; of {len(beside)} comparisons with the best peer {Tally.of(beside).says()} (geometric mean x{mean:.2f})"
        )
    return [line]


def _search_lines(results: Results, gpu: str) -> list[str]:
    rows = [row for row in results.search if row["source"].gpu == gpu and row["advantage"] and row["rows"] > 1]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        best = min((row for row in rows if row["case"] == case), key=lambda row: float(row["seconds"]))
        lines.append(
            f"search, {case}: {1 / best['seconds']:,.0f} candidate-steps/s with {best['rows']} candidates at once, "
            f"x{best['advantage']:.1f} those of one at a time"
        )
    studies = [row for row in results.studies if row["source"].gpu == gpu]
    return lines + [f"{row['study']}: {_duration(row['hours'])}, predicted from measured steps" for row in studies]


def _duration(hours: float) -> str:
    return f"{60 * hours:.0f} min" if hours < 1.5 else f"{hours:.1f} h"


def update_readme(path: Path, text: str) -> bool:
    """Put `text` between the marks; returns whether that changed the file.

    Raises:
        FileError: If the file cannot be read, or has no marks.
    """
    before, _, after = split_readme(path)
    with naming(path, "read"):
        old = path.read_text(encoding="utf-8")
    new = f"{before}{BEGIN}\n{text}\n{END}{after}"
    if new != old:
        write_text(path, new)
    return new != old


def split_readme(path: Path) -> tuple[str, str, str]:
    """What stands before, between and after the marks.

    Raises:
        FileError: If the file cannot be read, or has no marks, or several.
    """
    with naming(path, "read"):
        text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise FileError(f"{path}: expected one line {BEGIN} and below it one line {END}, to put the figures between")
    before, _, rest = text.partition(BEGIN)
    between, _, after = rest.partition(END)
    return before, between.strip("\n"), after
