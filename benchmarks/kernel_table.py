"""The tables of ``docs/kernels.md``, made from results: ``python benchmarks/kernel_table.py``.

Reads ``kernel-<op>.json`` of every folder in ``benchmarks/results`` and writes between the marks in the page what was
measured beside each target, and every case in which a peer is faster. Nobody types a figure there; a test holds page
and results equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_megatron.bench.kernels import EQUAL, Tally, Verdict, verdicts
from composer_megatron.errors import FileError
from composer_megatron.files import naming, read_json, write_text

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
Row = dict[str, Any]
Case = dict[str, Row]
"""Rows of one case by the contender's name."""
Figure = Callable[[Case], float | None]


@dataclass(frozen=True)
class Target:
    """What an operation is to reach.

    Attributes:
        op: The operation.
        cases: What the names of its cases begin with.
        what: The figure, for people.
        bound: What it is to reach.
        figure: Takes it from a case; None where the case has none.
        most: Whether the bound is one from above.
        aside: Another figure, to be shown beside.
    """

    op: str
    cases: str
    what: str
    bound: float
    figure: Figure
    most: bool = False
    aside: Figure | None = None

    def is_met(self, value: float) -> bool:
        """Whether a value, as the table shows it, reaches the bound."""
        return value <= self.bound if self.most else round(value, 2) >= self.bound


def fraction(ours: str = "composer", smallest: float = 0.0) -> Figure:
    """Of the ceiling, in cases that move at least so many bytes."""

    def figure(case: Case) -> float | None:
        row = case.get(ours)
        return row["fraction"] if row and row["bytes"] >= smallest else None

    return figure


def of_copy(case: Case) -> float | None:
    """The time of a copy of as many bytes over ours."""
    return case["composer"].get("of_copy") if "composer" in case else None


@dataclass(frozen=True)
class Against:
    """The peer's time over ours."""

    peer: str
    ours: str = "composer"

    def __call__(self, case: Case) -> float | None:
        """Where both were timed."""
        times = [case[name]["graph"] if name in case else None for name in (self.peer, self.ours)]
        return times[0] / times[1] if times[0] and times[1] else None

    def refusal(self, cases: Iterable[Case]) -> str:
        """What the peer said where it was asked and could not."""
        notes = {case[self.peer]["note"] for case in cases if self.peer in case and case[self.peer].get("note")}
        return "; ".join(sorted(notes)).replace("|", "/")


def gigabytes(ours: str) -> Figure:
    """Allocated at the peak."""

    def figure(case: Case) -> float | None:
        return case[ours]["peak"] / 1e9 if ours in case and case[ours]["peak"] is not None else None

    return figure


TARGETS = (
    Target("rms_norm", "forward", "forward, of copy", 0.95, fraction(), aside=of_copy),
    Target("rms_norm", "backward", "backward with dW, of copy", 0.90, fraction(), aside=of_copy),
    Target("rms_norm", "forward", "forward, quack's time / ours", 0.98, Against("quack")),
    Target("rms_norm", "backward", "backward, Liger's time / ours", 2.5, Against("liger")),
    Target("add_rms_norm", "forward", "forward, of copy", 0.95, fraction(), aside=of_copy),
    Target("add_rms_norm", "backward", "backward, of copy", 0.90, fraction(), aside=of_copy),
    Target("swiglu", "forward", "forward, of copy", 0.97, fraction(), aside=of_copy),
    Target("swiglu", "backward", "backward, of copy", 0.93, fraction(), aside=of_copy),
    Target("swiglu", "backward", "backward, Megatron's time / ours", 3.0, Against("megatron")),
    Target("rope", "", "both ways, of copy", 0.93, fraction(), aside=of_copy),
    Target("cross_entropy", "2 passes", "split form, 6 bytes a logit, of copy", 0.93, fraction("composer inplace")),
    Target("cross_entropy", "1 pass", "whole form, 4 bytes a logit, of copy", 0.92, fraction("composer inplace")),
    Target("linear_cross_entropy", "", "into `main_grad`, of the GEMM rate", 0.92, fraction("composer main_grad")),
    Target(
        "linear_cross_entropy", "", "quack's chunked time / ours into `main_grad`", 1.0,
        Against("quack chunked", "composer main_grad"),
    ),
    Target("linear_cross_entropy", "16384", "GB at 16k tokens", 1.0, gigabytes("composer main_grad"), most=True),
    Target("attention", "", "the implementation's own time / ours", 0.98, Against("itself")),
    Target(
        "attention", "forward", "cuDNN's time / our Triton's, forward", 0.70, Against("cudnn itself", "composer triton")
    ),
    Target("decode_attention", "attend", "of read, from 256 MB on", 0.85, fraction(smallest=256e6)),
    Target("decode_attention", "attend 1 x", "FlashAttention 4's time / ours, batch 1", 1.3, Against("fa4 split-KV")),
    Target("linear_decode", "", "cuBLAS' time / ours", 1.0, Against("cublas + ours")),
    Target("wgrad_accumulate", "", "the plain product's time / ours", 0.97, Against("torch.mm, bf16")),
    Target("adamw", "", "of copy (the norm: of read)", 0.93, fraction()),
    Target("adamw", "", "PyTorch's fused time / ours", 1.1, Against("torch fused")),
)  # fmt: skip


def read(folder: Path) -> dict[str, list[tuple[str, Case]]]:
    """The cases of each operation in a folder of results, by name; of figures against a ceiling the sound ones.

    Results without ``ceilings_reached_by`` took a copy for the ceiling that was a fifth slower than the best.
    """
    found: dict[str, list[tuple[str, Case]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_json(path, "a benchmark's result")
        cases: dict[str, Case] = {}
        for row in result["rows"] if "op" in result else ():
            known = row if "ceilings_reached_by" in result else row | {"fraction": None}
            cases.setdefault(row["case"], {})[row["name"]] = known
        found.setdefault(str(result.get("op")), []).extend(cases.items())
    return found


def table(folder: Path) -> list[str]:
    """Markdown of what a folder's results say to each target."""
    measured = read(folder)
    lines = ["| operation | figure | target | measured | of a copy as large | met |", "|---|---|---|---|---|---|"]
    for target in TARGETS:
        cases = [case for name, case in measured.get(target.op, ()) if name.startswith(target.cases)]
        values = _values(target.figure, cases)
        aside = _values(target.aside, cases) if target.aside else []
        met = sum(map(target.is_met, values))
        sign = "≤" if target.most else "≥"
        verdict = "–" if not values else "yes" if met == len(values) else f"in {met} of {len(values)} cases"
        figure = _span(values) or _why_not(target, cases)
        cells = [f"`{target.op}`", target.what, f"{sign} {target.bound:g}", figure]
        lines.append(f"| {' | '.join([*cells, _span(aside), verdict])} |")
    return lines


def beside_peers(folder: Path) -> list[str]:
    """Markdown of how often ours is the fastest, and of the cases where it is not."""
    results = [read_json(path, "a kernel result") for path in sorted(folder.glob("kernel-*.json"))]
    compared = [verdict for result in results for verdict in verdicts(result) if verdict.advantage is not None]
    ratios = [verdict.advantage or 0.0 for verdict in compared]
    slower = [verdict for verdict, ratio in zip(compared, ratios, strict=True) if ratio < 1 - EQUAL]
    line = f"Of {len(compared)} comparisons with the fastest peer that does the same work, ours is "
    line += Tally.of(ratios).says()
    if not slower:
        return [f"{line}."]
    heads = ["operation", "case", "ours", "µs", "fastest peer", "µs", "its time / ours"]
    return [f"{line}:", "", f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|---|", *map(_slower, slower)]


def _slower(verdict: Verdict) -> str:
    times = (verdict.seconds or 0.0, verdict.peer_seconds or 0.0)
    ours, peer = (f"{1e6 * seconds:,.1f}" for seconds in times)
    cells = [f"`{verdict.op}`", verdict.case, verdict.name, ours, str(verdict.peer), peer, f"{verdict.advantage:.2f}"]
    return f"| {' | '.join(cells)} |"


def _why_not(target: Target, cases: Sequence[Case]) -> str:
    refusal = target.figure.refusal(cases) if isinstance(target.figure, Against) else ""
    return f"the peer cannot: {refusal}" if refusal else "not measured"


def _values(figure: Figure, cases: Iterable[Case]) -> list[float]:
    return [value for value in map(figure, cases) if value is not None]


def _span(values: list[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def tables(results: Path) -> str:
    """The tables of all GPUs with results of kernels."""
    parts = []
    for folder in sorted({path.parent for path in results.glob("*/kernel-*.json")}):
        any_result = read_json(next(iter(sorted(folder.glob("kernel-*.json")))), "a kernel result")
        packages = any_result["environment"]["packages"]
        versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton") if packages.get(name))
        parts.append(
            "\n".join(
                [
                    f"{any_result['gpu']}, {versions}, {any_result['date']}:",
                    "",
                    *table(folder),
                    "",
                    *beside_peers(folder),
                ]
            )
        )
    return "\n\n".join(parts)


def update(page: Path, text: str) -> bool:
    """Put the text between the marks; returns whether that changed the page.

    Raises:
        FileError: If the page cannot be read or has no marks.
    """
    with naming(page, "read"):
        old = page.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FileError(f"{page} has no lines {BEGIN} and {END}: the table goes between them")
    new = f"{before}{BEGIN}\n{text}\n{END}{after}"
    if new != old:
        write_text(page, new)
    return new != old


def main() -> None:
    """Run from the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the GPUs' folders"
    )
    options.add_argument("--page", type=Path, default=ROOT / "docs/kernels.md", help="page with the marks")
    given = options.parse_args()
    print("written" if update(given.page, tables(given.results)) else "nothing to change")


if __name__ == "__main__":
    main()
