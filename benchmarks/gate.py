"""Has something become slower, or bigger? Compares benchmark results, and fails where they say so.

    python benchmarks/gate.py BEFORE AFTER                       # two results, or folders of results
    python benchmarks/gate.py --revisions v1 HEAD -- benchmarks/bench_swiglu.py --quick

A figure is the median of all that a side measured of it: steps of a training benchmark, or one figure from each of
several files. It is worse where it grew by more than the threshold (5 %) and by more than the spread of both sides, the
distance between their quartiles; without repetitions there is no spread, and single runs of one machine differ by a
per cent or two. With two revisions the script runs in turns in worktrees of both, so that clocks meet both alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import read_json

Key = tuple[str, ...]
"""What a figure is of: the benchmark, the case, the contender, the figure's name."""

_NAMES = {"shape", "model", "backend", "seq_len", "case", "name", "batch", "context"}
"""Fields of a row that say what it is of."""

_FIGURES = ("seconds", "graph", "eager", "prefill", "unfused", "drawn", "peak_bytes", "peak", "cache")
"""Fields of a row that hold figures: times in seconds and bytes, of all of which less is better."""


@dataclass(frozen=True)
class Change:
    """A figure of both sides.

    Attributes:
        key: What it is of.
        before: Median; None where that side has none.
        after: Likewise.
        spread: The larger distance between quartiles of the two sides, over the median.
    """

    key: Key
    before: float | None
    after: float | None
    spread: float

    @property
    def growth(self) -> float | None:
        """After over before, less one."""
        return self.after / self.before - 1 if self.before and self.after is not None else None

    def is_worse(self, threshold: float) -> bool:
        """Whether it grew past the threshold and the spread, or is no longer there."""
        if self.growth is None:
            return self.before is not None and self.after is None
        return self.growth > max(threshold, self.spread)


def figures(path: Path) -> tuple[dict[Key, list[float]], set[str]]:
    """All figures of a result, or of the results in a folder, and the GPUs they were measured on.

    Raises:
        FileError: If there is no result, or a file is none.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    found: dict[Key, list[float]] = {}
    gpus: set[str] = set()
    for file in files:
        result = read_json(file, "a benchmark's result")
        if not isinstance(result.get("rows"), list):
            continue
        gpus.add(str(result.get("gpu")))
        for row in result["rows"]:
            for key, values in _of_row(str(result.get("op") or _kind(row)), row):
                found.setdefault(key, []).extend(values)
    if not found:
        raise FileError(f"{path} holds no benchmark's result with rows")
    return found, gpus


def _kind(row: dict[str, Any]) -> str:
    return "training" if "backend" in row else "inference"


def _of_row(benchmark: str, row: dict[str, Any]) -> Iterator[tuple[Key, list[float]]]:
    of = tuple(str(value) for name, value in row.items() if name in _NAMES)
    for name in _FIGURES:
        value = row.get(name)
        values = value if isinstance(value, list) else [value]
        known = [float(each) for each in values if isinstance(each, int | float)]
        if known:
            yield (benchmark, *of, name), known


def compare(before: dict[Key, list[float]], after: dict[Key, list[float]]) -> list[Change]:
    """Every figure that either side has, in the order of `before`."""
    changes = []
    for key in dict.fromkeys((*before, *after)):
        sides = [side.get(key) for side in (before, after)]
        medians = [None if values is None else statistics.median(values) for values in sides]
        changes.append(Change(key, medians[0], medians[1], max(_spread(values) for values in sides)))
    return changes


def _spread(values: list[float] | None) -> float:
    if values is None or len(values) < 2 or not statistics.median(values):
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def show(changes: Sequence[Change], threshold: float, *, everything: bool) -> int:
    """Print what changed; returns how many figures are worse."""
    worse = [change for change in changes if change.is_worse(threshold)]
    for change in changes:
        if change in worse:
            mark = "WORSE "
        elif change.growth is not None and change.growth < -max(threshold, change.spread):
            mark = "better"
        elif everything:
            mark = "      "
        else:
            continue
        print(f"{mark} {_line(change)}")
    print(f"{len(changes)} figures, {len(worse)} worse by more than {threshold:.0%} and their spread")
    return len(worse)


def _line(change: Change) -> str:
    before, after = ("-" if value is None else f"{value:.6g}" for value in (change.before, change.after))
    growth = "gone" if change.growth is None else f"{change.growth:+.1%} (spread {change.spread:.1%})"
    return f"{' | '.join(change.key)}: {before} -> {after}, {growth}"


def run_revisions(revisions: Sequence[str], command: Sequence[str], rounds: int, folder: Path) -> list[Path]:
    """Run a script in worktrees of both revisions, in turns; returns the folders of their results.

    Raises:
        UsageError: If there is no script, or git knows no such revision.
        ComposerError: If the script fails.
    """
    if not command:
        raise UsageError("--revisions: name a script after --, such as: -- benchmarks/bench_swiglu.py --quick")
    trees = [folder / f"tree{number}" for number in range(2)]
    try:
        for tree, revision in zip(trees, revisions, strict=True):
            done = subprocess.run(
                ["git", "worktree", "add", "--detach", str(tree), revision],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise UsageError(f"--revisions {revision}: {done.stderr.strip().splitlines()[-1]}")
        for number in range(rounds):
            for tree in trees:
                _run(tree, command, folder / f"{tree.name}-results" / f"{number}.json")
    finally:
        for tree in trees:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], capture_output=True, check=False)
    return [folder / f"{tree.name}-results" for tree in trees]


def _run(tree: Path, command: Sequence[str], output: Path) -> None:
    paths = os.pathsep.join(str(tree / part) for part in ("", "kernels", "search"))
    script = [sys.executable, str(tree / command[0]), *command[1:], "--output", str(output)]
    if status := subprocess.run(script, env=os.environ | {"PYTHONPATH": paths}, cwd=tree, check=False).returncode:
        raise ComposerError(f"{' '.join(command)} ended with status {status} in {tree.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; the exit status is 1 where something is worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revisions", nargs=2, metavar=("BEFORE", "AFTER"), help="git revisions to run a script in")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each revision (default: 3)")
    parser.add_argument("--threshold", type=float, default=0.05, help="growth that counts (default: 0.05)")
    parser.add_argument("--all", action="store_true", help="print unchanged figures, too")
    parser.add_argument("--any-gpu", action="store_true", help="compare results of different GPUs all the same")
    parser.add_argument("given", nargs="*", help="two results or folders; with --revisions the script and its options")
    options, further = parser.parse_known_args(arguments)
    given = [*options.given, *further]
    with tempfile.TemporaryDirectory(prefix="gate-") as name:
        if options.revisions:
            sides = run_revisions(options.revisions, given, options.rounds, Path(name))
        else:
            sides = [Path(each) for each in given]
        if len(sides) != 2:
            raise UsageError("give two results or folders of results, or --revisions BEFORE AFTER -- SCRIPT")
        (before, old), (after, new) = (figures(side) for side in sides)
    if old != new and not options.any_gpu:
        raise UsageError(
            f"measured on {', '.join(sorted(old))} and on {', '.join(sorted(new))}: --any-gpu compares them"
        )
    return 1 if show(compare(before, after), options.threshold, everything=options.all) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ComposerError as error:
        print(f"gate: {error}", file=sys.stderr)
        sys.exit(max(2, error.exit_code))
