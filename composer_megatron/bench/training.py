"""Training throughput: models beside each other on several backends, by ``benchmarks/bench_training.py`` of a checkout.

The script runs in a process of its own, and each contender in one below that: see there for what a step is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_megatron.errors import ComposerError, UsageError

ROOT = Path(__file__).parents[2]
"""The checkout that this package lies in, if it lies in one."""


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """What is compared; what is left empty the script decides.

    Attributes:
        shapes: Presets or JSON files.
        models: Of llama, stacked, stretched, matched.
        backends: Of composer, te, local, compile, compile-bf16; with parts as in ``composer+loss=linear``.
        lengths: Tokens in a sequence.
        step_tokens: Tokens of a step.
        quick: Two models on two backends at one length.
        budget: Seconds, for which rounds are left out, but no rows.
    """

    shapes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    step_tokens: int | None = None
    quick: bool = False
    budget: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that measure nothing."""
        for name, values in (
            ("lengths", self.lengths),
            ("step_tokens", (self.step_tokens,)),
            ("budget", (self.budget,)),
        ):
            for value in values:
                if value is not None and value <= 0:
                    raise UsageError(f"{name}={value}; expected a positive number")

    def arguments(self) -> list[str]:
        """As the script takes them."""
        given: list[str] = ["--quick"] if self.quick else []
        for name in ("shapes", "models", "backends", "lengths"):
            values = getattr(self, name)
            given += [f"--{name}", *map(str, values)] if values else []
        for name in ("step_tokens", "budget"):
            value = getattr(self, name)
            given += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
        return given


def run_training(
    benchmark: TrainingBenchmark, output: Path, folder: Path = ROOT / "benchmarks", *, aside: bool = False
) -> None:
    """Run the training benchmark; logs go beside its results.

    Args:
        benchmark: What to compare.
        output: The JSON file.
        folder: Where the script is.
        aside: As for `run_script`.

    Raises:
        ComposerError: As `run_script`.
    """
    arguments = ["--logs", str(output.parent / "logs"), *benchmark.arguments()]
    run_script(folder / "bench_training.py", arguments, output, aside=aside)


def run_script(script: Path, arguments: Sequence[str], output: Path, *, aside: bool = False) -> None:
    """Run a script of the checkout, which prints rows as they come and writes them to `output`.

    Args:
        script: The script.
        arguments: Its options, but for ``--output``.
        output: The JSON file.
        aside: Whether the rows go to standard error, where programs read standard output.

    Raises:
        ComposerError: If there is no such script, as in an installation without the checkout, or it fails.
        SystemExit: With the status of a wrong option, which the script has named.
    """
    if not script.is_file():
        raise ComposerError(f"no {script}: benchmarks come with a checkout of the source, run them there")
    command = [sys.executable, str(script), "--output", str(output), *arguments]
    rows = sys.stderr if aside else None
    status = subprocess.run(command, env=script_environment(script.parents[1]), stdout=rows, check=False).returncode
    if status == UsageError.exit_code:
        raise SystemExit(status)
    if status:
        kept = f"; what it measured is in {output}" if output.is_file() else ""
        raise ComposerError(f"{script.name} ended with status {status}{kept}")


def script_environment(root: Path = ROOT) -> dict[str, str]:
    """The environment in which a script of the checkout finds our packages."""
    paths: Sequence[str] = [str(root / part) for part in ("", "kernels", "search")]
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])])}
