"""Kernel benchmarks: each operation beside its peers, by the scripts ``benchmarks/bench_<op>.py`` of a checkout.

Every script runs in a process of its own, so that neither an absent peer nor a crash of one operation's peers touches
the figures of the next.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import read_json

ROOT = Path(__file__).parents[2]
"""The checkout that this package lies in, if it lies in one."""

OURS = "composer"
"""What the names of our rows begin with."""


@dataclass(frozen=True)
class Verdict:
    """One case of one operation: our best row beside the best peer's.

    Attributes:
        op: The operation.
        case: What is done, on which shape.
        name: Our row.
        seconds: Our median time in a CUDA graph; None where it failed, and then `note` says why.
        fraction: Of the ceiling measured in the same run.
        peer: The fastest peer; None where none was timed.
        advantage: The peer's time over ours: below 1 where ours is slower.
        note: What the row says.
    """

    op: str
    case: str
    name: str
    seconds: float | None
    fraction: float | None
    peer: str | None
    advantage: float | None
    note: str


def scripts(folder: Path = ROOT / "benchmarks") -> dict[str, Path]:
    """The benchmark script of each operation, by the operation's name.

    Raises:
        ComposerError: If there are none, as in an installation without the checkout.
    """
    kernels = folder.parent / "kernels" / "composer_kernels"
    found = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    found = {op: path for op, path in found.items() if (kernels / f"{op}.py").is_file()}
    if not found:
        raise ComposerError(
            f"no kernel benchmarks in {folder}: they come with a checkout of the source, run them there"
        )
    return found


def choose(ops: Sequence[str], known: Mapping[str, Path]) -> dict[str, Path]:
    """The scripts of those operations, or of all where none is named.

    Raises:
        UsageError: For an operation that has none.
    """
    for op in ops:
        if op not in known:
            raise UsageError(f"--ops {op!r}: no such kernel benchmark; there are {', '.join(known)}")
    return {op: known[op] for op in ops or known}


def run(chosen: Mapping[str, Path], output: Path, options: Sequence[str] = ()) -> list[str]:
    """Run the scripts one after another; each prints its table and writes ``output/kernel-<op>.json``.

    Args:
        chosen: Script of each operation.
        output: Folder of the results.
        options: For every script: ``--quick``, ``--tune``.

    Returns:
        The operations whose script failed.

    Raises:
        ComposerError: If there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise ComposerError("kernel benchmarks need a CUDA GPU, and there is none")
    paths = [str(ROOT / part) for part in ("", "kernels", "search")]
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])])}
    failed = []
    for op, script in chosen.items():
        print(f"\n{op}", flush=True)
        command = [sys.executable, str(script), "--output", str(result_path(output, op)), *options]
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(op)
    return failed


def result_path(folder: Path, op: str) -> Path:
    """Where the result of an operation is written."""
    return folder / f"kernel-{op}.json"


def verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Our best row of each case of a result file beside the best peer's."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], []).append(row)
    return [_verdict(result["op"], case, rows) for case, rows in cases.items()]


def _verdict(op: str, case: str, rows: Iterable[dict[str, Any]]) -> Verdict:
    def seconds(row: dict[str, Any]) -> float:
        return float("inf") if row["graph"] is None else row["graph"]

    ranked = sorted(rows, key=seconds)
    ours = next((row for row in ranked if row["name"].startswith(OURS)), None)
    peer = next((row for row in ranked if not row["name"].startswith(OURS) and row["graph"] is not None), None)
    if ours is None:
        return Verdict(op, case, OURS, None, None, None, None, "not in this case")
    timed = ours["graph"] is not None
    advantage = peer["graph"] / ours["graph"] if peer and timed else None
    name = None if peer is None else peer["name"]
    return Verdict(op, case, ours["name"], ours["graph"], ours["fraction"], name, advantage, ours["note"])


def load(folder: Path, ops: Iterable[str]) -> list[Verdict]:
    """The verdicts of those operations that have a result in a folder."""
    paths = [result_path(folder, op) for op in ops]
    return [verdict for path in paths if path.is_file() for verdict in verdicts(read_json(path, "a kernel result"))]
