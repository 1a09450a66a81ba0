"""Watching a training run from outside: a progress bar fed by its metrics log."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from composer_megatron.display import console

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class MetricsFollower:
    """Reads what a growing ``metrics.jsonl`` gained since the last look.

    Attributes:
        path: The log; it may not exist yet.
        since: Lines from before that time (seconds since 1970) are an earlier start's, and passed over.
        iteration: The newest iteration seen.
        latest: The newest value of each scalar, by name.
    """

    path: Path
    since: float = 0.0
    iteration: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    _offset: int = 0

    def look(self) -> None:
        """Take in all lines that are complete by now."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._offset:  # replaced by a shorter one: the run went back to a checkpoint
                self._offset = 0
            file.seek(self._offset)
            lines, _, _ = file.read().rpartition(b"\n")
        self._offset += len(lines) + bool(lines)
        for line in lines.splitlines():
            scalar = json.loads(line)
            if scalar["time"] < self.since:
                continue
            self.iteration = scalar["iteration"]
            self.latest[scalar["name"]] = scalar["value"]

    @property
    def losses(self) -> str:
        """The newest training and held-out loss, for people."""
        shown = {"loss": "lm loss", "held-out": "lm loss validation"}
        return "  ".join(f"{word} {self.latest[name]:.3f}" for word, name in shown.items() if name in self.latest)


def show_progress(process: subprocess.Popen[bytes], metrics: Path, steps: int) -> None:
    """Show a bar until `process` ends; where the output is no terminal, a line each tenth of the way."""
    follower = MetricsFollower(metrics, since=time.time())
    columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[losses]}"), console=console, disable=not console.is_terminal)
    told = 0
    with bar:
        task = bar.add_task("train", total=steps, losses="starting")
        running = True
        while running:
            try:
                process.wait(_SECONDS_BETWEEN_LOOKS)
                running = False
            except subprocess.TimeoutExpired:
                pass
            follower.look()
            if follower.latest:
                bar.update(task, completed=follower.iteration, losses=follower.losses)
            if not console.is_terminal and follower.iteration * 10 // steps > told:
                told = follower.iteration * 10 // steps
                console.print(f"step {follower.iteration} of {steps}: {follower.losses}")


def end_with_parent() -> None:
    """In a new process: ask Linux to end it when its parent dies, even by kill -9, so that no run is orphaned."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
