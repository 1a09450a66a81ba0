"""One run of a benchmark script: command line, ceilings, a table that grows row by row, JSON, a plot."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import Ceilings, Row, ceilings, own_stream

from composer_megatron.env import environment
from composer_megatron.files import write_json


@dataclass
class Session:
    """A run of a benchmark script: rows are printed and written as they are measured, so that a run cut short has them.

    Attributes:
        op: The operation, for the file and the plot.
        options: What the command line said.
        limits: The ceilings, measured first.
        reached_by: What reached each of them.
        rows: What was measured so far.
        host_us: The host's microseconds a call, by contender and what it calls.
    """

    op: str
    options: argparse.Namespace
    limits: Ceilings
    reached_by: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    host_us: dict[str, dict[str, float]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=environment)
    known: dict[str, None] = field(default_factory=dict)
    """Names of all contenders so far, those that were not chosen among them."""

    def chosen[T](self, contenders: Mapping[str, T]) -> dict[str, T]:
        """Those of the contenders that ``--only`` names by how they begin; all without it."""
        self.known |= dict.fromkeys(contenders)
        only = tuple(self.options.only)
        return {name: contender for name, contender in contenders.items() if not only or name.startswith(only)}

    def add(self, rows: Iterable[Row]) -> None:
        """Print and keep rows, each as soon as it is there."""
        for row in rows:
            print(_line(row), flush=True)
            self.rows.append(row)
            self._write()

    def add_host_times(self, times: dict[str, dict[str, float]]) -> None:
        """Print and keep the host's microseconds a call."""
        for name, by_call in times.items():
            values = ", ".join(f"{what} {us:.1f}" for what, us in by_call.items())
            print(f"host us a call, {name:20} {values}", flush=True)
        self.host_us |= times
        self._write()

    def _write(self) -> None:
        if self.options.output is None or not (self.rows or self.host_us):
            return
        measured = {
            "op": self.op,
            "date": time.strftime("%Y-%m-%d"),
            "gpu": torch.cuda.get_device_name(),
            "ceilings": asdict(self.limits),
            "ceilings_reached_by": self.reached_by,
            "rows": [asdict(row) for row in self.rows],
            "host_us": self.host_us,
            "environment": self.environment,
        }
        write_json(self.options.output, measured)


@contextmanager
def session(op: str, description: str, *, gemm: bool = False) -> Iterator[Session]:
    """Read the command line, measure the ceilings, and keep what the body measures.

    Args:
        op: The operation.
        description: The script's own first line.
        gemm: Whether the rate of matrix products is among the ceilings.

    Raises:
        SystemExit: If there is no GPU, or ``--only`` names nothing.
    """
    options = parser(description).parse_args()
    _find_torchs_cudnn()
    # Recorded and dropped: some peers set filters of their own, and none of their remarks belongs between the rows.
    with warnings.catch_warnings(record=True), own_stream():
        limits, reached_by = ceilings(gemm=gemm)
        print(_heading(limits, reached_by), flush=True)
        run = Session(op, options, limits, reached_by)
        yield run
    if options.only and not (run.rows or run.host_us):
        known = f"; known: {', '.join(run.known)}" if run.known else ""
        raise SystemExit(f"bench_{op}: --only {' '.join(options.only)} names nothing here{known}")
    plot(options.plot, op, run.rows)


def _find_torchs_cudnn() -> None:
    """Let TransformerEngine load the cuDNN that PyTorch has loaded, and not beside it the system's, of another version.

    It looks into CUDNN_PATH first.
    """
    try:
        package = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return
    if package is not None and package.submodule_search_locations:
        os.environ.setdefault("CUDNN_PATH", next(iter(package.submodule_search_locations)))


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmark scripts have."""
    options = argparse.ArgumentParser(description=description.partition("\n")[0])
    options.add_argument("--quick", action="store_true", help="few shapes")
    options.add_argument("--tune", action="store_true", help="time launch configurations instead of contenders")
    options.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="contenders whose names begin so; with --tune kernels"
    )
    options.add_argument("--output", type=Path, help="write all figures there as JSON")
    options.add_argument("--plot", type=Path, help="write a chart of the fractions there (needs matplotlib)")
    return options


def _heading(limits: Ceilings, reached_by: Mapping[str, str]) -> str:
    gemm = f", GEMM {limits.gemm / 1e12:.0f} TFLOP/s" if limits.gemm else ""
    columns = f"{'graph us':>9} {'eager us':>9} {'of limit':>8} {'of copy':>8} {'peak MB':>8} {'error':>8}"
    copy, read = (f"{value / 1e12:.3f} TB/s" for value in (limits.copy, limits.read))
    return (
        f"ceilings: copy {copy} ({reached_by['copy']}), read {read} ({reached_by['read']}){gemm}\n"
        f"{'case':42} {'contender':18} {columns}"
    )


def _line(row: Row) -> str:
    cells = (
        _cell(row.graph, 1e6, "9.1f"),
        _cell(row.eager, 1e6, "9.1f"),
        _cell(row.fraction, 1, "8.3f"),
        _cell(row.of_copy, 1, "8.3f"),
        _cell(row.peak, 1e-6, "8.1f"),
        _cell(row.error, 1, "8.1e"),
    )
    return f"{row.case:42} {row.name:18} {' '.join(cells)} {row.note}"


def _cell(value: float | None, scale: float, form: str) -> str:
    width = int(form.partition(".")[0])
    return "-".rjust(width) if value is None else format(value * scale, form)


def plot(path: Path | None, op: str, rows: Sequence[Row]) -> None:
    """Draw the fractions of the ceiling as bars, grouped by case; says so where matplotlib is missing."""
    if path is None:
        return
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn = [row for row in rows if row.fraction is not None]
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.22 * len(drawn)))
    colors = {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(row.name for row in drawn))}
    labels = [f"{row.case}  {row.name}" for row in drawn]
    axes.barh(range(len(drawn)), [row.fraction or 0 for row in drawn], color=[colors[row.name] for row in drawn])
    axes.set_yticks(range(len(drawn)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("fraction of the measured ceiling")
    axes.set_title(f"{op} on {torch.cuda.get_device_name()}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
