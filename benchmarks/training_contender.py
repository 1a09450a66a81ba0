"""The processes in which the contenders of `bench_training.py` run."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from composer_megatron.architecture import Architecture

_PATIENCE = 420.0
"""Seconds after which a silent worker is given up."""

_WORKER = Path(__file__).with_name("training_worker.py")


class Contender:
    """A model on a backend, in a process that waits for commands."""

    def __init__(self, model: str, architecture: Architecture, backend: str, folder: Path, logs: Path) -> None:
        """Start the process; it imports what it needs meanwhile."""
        self.model, self.architecture, self.backend = model, architecture, backend
        self._folder, self._logs = folder, logs
        file = folder / f"{model}-{architecture.shape.name}.json"
        architecture.save(file)
        self.log = logs / f"{architecture.shape.name}-{model}-{backend}.log"
        command = [sys.executable, str(_WORKER), "--backend", backend]
        command += ["--architecture", str(file), "--lock", str(folder / "gpu.lock")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_worker_environment()
            )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.model} {self.backend}"

    def alive(self) -> Contender:
        """This one where it can take commands, else one like it in a new process."""
        if self._process.poll() is None:
            return self
        return Contender(self.model, self.architecture, self.backend, self._folder, self._logs)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def send(self, **command: Any) -> None:
        """Give a command; `receive` waits for its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which `receive` reports
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def receive(self, patience: float = _PATIENCE) -> dict[str, Any]:
        """The answer to the last command; ``note`` says why there is none."""
        try:
            line = self._answers.get(timeout=patience)
        except queue.Empty:
            self.end()
            return {"note": f"no answer in {patience:.0f} s: ended"}
        if line is None:
            return {"note": f"the process ended with status {self._process.wait()}; {_last_line(self.log)}"}
        return dict(json.loads(line))

    def end(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _worker_environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    paths = [str(root / part) for part in ("", "kernels", "search")]
    inherited = os.environ.get("PYTHONPATH")
    kept = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])])}
    # Several workers compile side by side: each gets a share of the cores.
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(2, (os.cpu_count() or 2) // 4))}
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUDA_MODULE_LOADING": "LAZY"} | threads | kept


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def measure_ceilings(logs: Path) -> dict[str, Any]:
    """Copy bandwidth and GEMM rate of this GPU, measured in a process of its own; None where there is none."""
    command = [sys.executable, str(_WORKER)]
    command += ["--backend", "ceilings", "--lock", os.devnull]
    with (logs / "ceilings.log").open("ab") as log:
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=log, text=True, env=_worker_environment()
        )
    return json.loads(done.stdout) if done.returncode == 0 and done.stdout else {"copy": None, "gemm": None}
