"""Compare parallel layouts with one process: every loss, every gradient and the saved checkpoint, as a table.

::

    python tools/compare_layouts.py
    python tools/compare_layouts.py --sequence 2A4M --layout TP2+SPxPP2 --layout PP4@3,0,2,1 --json result.json

A layout is written as it is spoken: ``TP2+SPxPP2xDP2`` is two tensor-parallel ranks with sequence parallelism times
two pipeline stages times two data-parallel ranks; ``VPP`` counts virtual stages on each rank, ``+DO`` shards the
gradients as the distributed optimizer does. After ``@`` stands the cut into stages: block counts, or ``uneven`` for one
with empty stages; without it the cut is as equal as can be.

One process computes the reference without any of Megatron's schedules or gradient buffers: PyTorch's own backward
through the whole model. A layout starts from other weights, loads the reference's checkpoint, runs Megatron's schedule
over the same sequences, gathers the gradients whole by name, and saves a checkpoint that is read back whole.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not start CUDA: see `_start`

import torch
from layout_cases import Case, Layout, Result
from rich.console import Console
from rich.table import Table

from composer_megatron import cpu
from composer_megatron.errors import ComposerError
from composer_megatron.files import write_json
from composer_megatron.quiet import hush_imports

SEQUENCES = ("1A", "7M", "2A4M", "2A5M2A3M1A3M")
LAYOUTS = (
    *("TP2", "TP2+SP", "PP2", "PP2@uneven", "PP2xVPP2", "PP2xVPP2@uneven", "CP2", "DP2", "DP2+DO"),
    *("PP4", "PP4@uneven", "TP2+SPxPP2", "TP2xCP2", "TP2+SPxCP2", "PP2xDP2", "PP2xDP2+DO"),
    *("TP2+SPxPP2xDP2+DO", "TP2xPP2xCP2", "TP2+SPxPP4", "TP2+SPxPP2xVPP2xDP2@uneven"),
)


def compare(cases: Iterable[Case]) -> list[Result]:
    """Run the cases, in order; all those of one world size in the same processes.

    Raises:
        UsageError: If a layout is none.
        torch.multiprocessing.ProcessRaisedException: If a process failed; the others are ended.
    """
    cases = list(cases)
    sizes = {case: Layout.parse(case.layout).world_size for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        _start(1, list(dict.fromkeys(case.reference for case in cases)), folder)
        for size in sorted(set(sizes.values())):
            _start(size, [case for case in cases if sizes[case] == size and case != case.reference], folder)
        lines = (Path(folder) / "results.jsonl").read_text(encoding="utf-8").splitlines()
    results = {result.case: result for result in (Result.from_json(line) for line in lines)}
    return [results[case] for case in cases]


def _start(world_size: int, cases: Sequence[Case], folder: str) -> None:
    cpu.skip_compilation()
    hush_imports()
    from layout_process import run_cases  # imports Megatron: once, before forking

    method = "spawn" if cpu.has_gpu() else "fork"
    torch.multiprocessing.start_processes(run_cases, (world_size, cases, folder), world_size, start_method=method)


def table(results: Sequence[Result]) -> Table:
    """Sequence x layout, with the largest relative gradient difference of each."""
    sequences = list(dict.fromkeys(result.case.sequence for result in results))
    shown = Table(title="largest relative gradient difference to one process", title_justify="left")
    shown.add_column("layout")
    for sequence in sequences:
        shown.add_column(sequence, justify="right")
    cells = {(result.case.layout, result.case.sequence): _cell(result) for result in results}
    for layout in dict.fromkeys(result.case.layout for result in results):
        shown.add_row(layout, *(cells.get((layout, sequence), "") for sequence in sequences))
    return shown


def _cell(result: Result) -> str:
    return f"{result.gradient:.1e}" + ("" if result.checkpoint else " CHECKPOINT")


def markdown(results: Sequence[Result]) -> str:
    """The same table for a page of Markdown."""
    shown = table(results)
    columns = [list(column.cells) for column in shown.columns]
    lines = ["| " + " | ".join(str(column.header) for column in shown.columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in zip(*columns, strict=True))])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit status 1 if anything differs by more than the tolerance, 2 for a wrong request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", action="append", help=f"default: {' '.join(SEQUENCES)}")
    parser.add_argument("--layout", action="append", help=f"default: {' '.join(LAYOUTS)}")
    parser.add_argument("--cases", type=Path, help="a JSON list of cases instead")
    parser.add_argument("--backend", default="local")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--untied", action="store_true", help="an output layer of its own")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(argv)
    if options.cases:
        cases = [Case(**case) for case in json.loads(options.cases.read_text())]
    else:
        sequences, layouts = options.sequence or SEQUENCES, options.layout or LAYOUTS
        how = {"tied": not options.untied, "backend": options.backend, "dtype": options.dtype}
        cases = [Case(sequence, layout, **how) for layout in layouts for sequence in sequences]
    try:
        results = compare(cases)
    except ComposerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        write_json(options.json, [asdict(result) for result in results])
    if options.markdown:
        print(markdown(results))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table(results))
    return int(any(not result.within(options.tolerance) for result in results))


if __name__ == "__main__":
    sys.exit(main())
