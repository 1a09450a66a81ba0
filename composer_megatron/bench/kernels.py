"""Kernel benchmarks: each operation beside its peers, by the scripts ``benchmarks/bench_<op>.py`` of a checkout.

Every script runs in a process of its own, so that neither an absent peer nor a crash of one operation's peers touches
the figures of the next.
"""

from __future__ import annotations

import os
import re
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

SAME_WORK: dict[str, dict[str, str]] = {
    "attention": {OURS: "itself", "composer triton": ".+ itself"},
    "cross_entropy": {"composer inplace": ".*"},
    "decode_attention": {OURS: ".*", "composer fused": "none"},
    "fp8": {OURS: "none"},
    "linear_cross_entropy": {"composer main_grad": "(?!products alone).*"},
    "rope": {OURS: "(?!.*, angles).*", "composer, angles": ".*, angles"},
    "wgrad_accumulate": {OURS: "(?!torch.mm).*"},
}
"""Of each operation the rows of ours that are judged, and a pattern of the peers that do the same work.

Where an operation is not named, its row "composer" is judged beside everyone else's. Timed only to compare with are the
products without the loss, a product that adds to nothing, and 8-bit SwiGLU in two of our own passes. What `attention`
adds to the implementation that it calls is a matter of microseconds and judged where both take turns.
"""


EQUAL = 0.01
"""By how much times may differ that count as equal: those of a repeated run differ by as much."""


@dataclass(frozen=True)
class Verdict:
    """One case of one operation: a row of ours beside the best peer that does the same work.

    Attributes:
        op: The operation.
        case: What is done, on which shape.
        name: Our row.
        seconds: Our median time in a CUDA graph; None where it failed, and then `note` says why.
        fraction: Of the ceiling measured in the same run.
        peer: The fastest peer; None where none was timed.
        peer_seconds: Its time.
        advantage: The peer's time over ours, below 1 where ours is slower; for each byte where one of the two gives
            less than the other and so moves fewer.
        note: What the row says.
    """

    op: str
    case: str
    name: str
    seconds: float | None
    fraction: float | None
    peer: str | None
    peer_seconds: float | None
    advantage: float | None
    note: str


@dataclass(frozen=True)
class Tally:
    """In how many comparisons ours is faster than the best peer, as fast within `EQUAL`, and slower."""

    faster: int
    equal: int
    slower: int

    @classmethod
    def of(cls, advantages: Sequence[float]) -> Tally:
        """Of the peers' times over ours."""
        faster = sum(advantage > 1 + EQUAL for advantage in advantages)
        slower = sum(advantage < 1 - EQUAL for advantage in advantages)
        return cls(faster, len(advantages) - faster - slower, slower)

    def says(self) -> str:
        """In words."""
        return f"faster in {self.faster}, within {100 * EQUAL:g} % in {self.equal} and slower in {self.slower}"


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
    """Of each case of a result file our rows beside the best peer of the same work (`SAME_WORK`)."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault(row["case"], []).append(row)
    return [verdict for case, rows in cases.items() for verdict in _judge(result["op"], case, rows)]


def _judge(op: str, case: str, rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Our rows that have a peer; where none has, the first of them; where there is none, that."""
    found = []
    for name, pattern in SAME_WORK.get(op, {OURS: ".*"}).items():
        peers = [row for row in rows if not row["name"].startswith(OURS) and re.fullmatch(pattern, row["name"])]
        found += [_verdict(op, case, ours, peers) for ours in rows if ours["name"] == name]
    nothing = Verdict(op, case, OURS, None, None, None, None, None, "not in this case")
    return [verdict for verdict in found if verdict.peer] or found[:1] or [nothing]


def _verdict(op: str, case: str, ours: dict[str, Any], peers: Iterable[dict[str, Any]]) -> Verdict:
    def pace(row: dict[str, Any]) -> float:
        return float(row["graph"] / row["bytes"])

    best = min((row for row in peers if row["graph"] is not None), key=pace, default=None)
    advantage = None if best is None or ours["graph"] is None else pace(best) / pace(ours)
    name, seconds = (None, None) if best is None else (best["name"], best["graph"])
    return Verdict(op, case, ours["name"], ours["graph"], ours["fraction"], name, seconds, advantage, ours["note"])


def load(folder: Path, ops: Iterable[str]) -> list[Verdict]:
    """The verdicts of those operations that have a result in a folder."""
    paths = [result_path(folder, op) for op in ops]
    return [verdict for path in paths if path.is_file() for verdict in verdicts(read_json(path, "a kernel result"))]
