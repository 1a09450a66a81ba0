"""The torchrun command of a training run: one place that both ``--dry-run`` shows and ``train`` executes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import naming
from composer_megatron.progress import end_with_parent, show_progress


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A training run on one machine.

    Attributes:
        architecture: The architecture file.
        text: Folder with the tokenised text.
        run_dir: Where checkpoints, metrics and logs go; a run found there is continued.
        processes: Processes (GPUs) on this machine.
        tensor_parallel: Ranks that share each matrix.
        pipeline_parallel: Pipeline stages.
        steps: Optimizer steps.
        micro_batch_size: Sequences in one forward pass.
        global_batch_size: Sequences in one optimizer step.
        seq_len: Tokens in a sequence.
        learning_rate: Peak learning rate.
        seed: Seed of weights and data order.
        extra: Further flags for Megatron, which win over ours.
    """

    architecture: Path
    text: Path
    run_dir: Path
    processes: int
    tensor_parallel: int
    pipeline_parallel: int
    steps: int
    micro_batch_size: int
    global_batch_size: int
    seq_len: int
    learning_rate: float
    seed: int = 1234
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the processes and the batch divide as the layout asks."""
        for name in ("processes", "tensor_parallel", "pipeline_parallel", "steps", "micro_batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}; expected at least 1")
        model_ranks = self.tensor_parallel * self.pipeline_parallel
        if self.processes % model_ranks:
            problem = f"tensor_parallel x pipeline_parallel = {model_ranks} does not divide processes={self.processes}"
            raise UsageError(f"{problem}; use a multiple of {model_ranks} processes")
        step = self.processes // model_ranks * self.micro_batch_size
        if self.global_batch_size < 1 or self.global_batch_size % step:
            problem = f"global_batch_size={self.global_batch_size} is no multiple of {step}"
            raise UsageError(f"{problem} (micro_batch_size x data-parallel ranks)")

    def command(self) -> list[str]:
        """The argument list, starting with this Python."""
        return torchrun(self.processes, self.arguments())

    def arguments(self) -> list[str]:
        """What `composer_megatron.train` is given."""
        flags = {
            "--architecture": self.architecture,
            "--text": self.text,
            "--run-dir": self.run_dir,
            "--tensor-model-parallel-size": self.tensor_parallel,
            "--pipeline-model-parallel-size": self.pipeline_parallel,
            "--train-iters": self.steps,
            "--micro-batch-size": self.micro_batch_size,
            "--global-batch-size": self.global_batch_size,
            "--seq-length": self.seq_len,
            "--lr": self.learning_rate,
            "--seed": self.seed,
        }
        ours = [part for flag, value in flags.items() for part in (flag, str(value))]
        sequence_parallel = ["--sequence-parallel"] if self.tensor_parallel > 1 else []
        return [*ours, *sequence_parallel, *self.extra]

    def check(self) -> None:
        """Check all that the run itself will check before it starts: files, folders and every flag of Megatron's.

        Raises:
            ComposerError: If the run is impossible.
        """
        from composer_megatron.arguments import parse_options
        from composer_megatron.train import megatron_command_line

        megatron_command_line(parse_options(self.arguments()), self.processes)

    def shell(self) -> str:
        """The command as one line for a shell."""
        return shlex.join(self.command())

    def run(self) -> None:
        """Run it to the end: Megatron's log goes to ``train.log`` in the run folder, progress to the terminal.

        Raises:
            ComposerError: If a process failed, with its message or the end of the log.
        """
        run_to_the_end(self.command(), self.processes, self.run_dir, self.steps)


def torchrun(processes: int, arguments: Sequence[str]) -> list[str]:
    """The command that trains in so many processes of this machine, starting with this Python."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes), "-m", "composer_megatron.train", *arguments]


def run_to_the_end(command: Sequence[str], processes: int, run_dir: Path, steps: int) -> None:
    """Train: Megatron's log goes to ``train.log`` in the run folder, progress to the terminal.

    Args:
        command: As `torchrun` makes it.
        processes: How many it starts.
        run_dir: The run folder.
        steps: Optimizer steps, for the progress.

    Raises:
        ComposerError: If a process failed, with its message or the end of the log.
    """
    cores = len(os.sched_getaffinity(0))
    # Without a limit each process takes all cores and they get in each other's way.
    environment = {"OMP_NUM_THREADS": str(max(1, cores // processes))} | os.environ
    log = run_dir / "train.log"
    with naming(log, "write"):
        run_dir.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
    with output:
        start = output.tell()
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - no threads here
        )
        try:
            show_progress(process, run_dir / "metrics.jsonl", steps)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        raise _failure(log, start, process.returncode)


def _failure(log: Path, start: int, status: int) -> ComposerError:
    """What went wrong: the program's own message where there is one, else the log's last lines."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        # torchrun ends with 1 whatever its processes end with, and tells their status in its report.
        wrong_usage = any(re.match(r"\s*exitcode\s*:\s*2\b", line) for line in lines)
        return UsageError(errors[0]) if wrong_usage else ComposerError(errors[0])
    shown = "\n".join(lines[-15:])
    return ComposerError(f"{shown}\ntraining ended with exit status {status}; the whole log is {log}")
