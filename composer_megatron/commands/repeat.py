"""``repeat``: a run once more, from the file that its folder keeps."""

from __future__ import annotations

import shlex
from pathlib import Path

from tyro.conf import Positional

from composer_megatron.display import console


def repeat(
    run: Positional[Path],
    *,
    run_dir: Path,
    processes: int | None = None,
    dry_run: bool = False,
    megatron_flags: str = "",
) -> None:
    """Start a training run again with the same arguments, text and seed; says how this machine differs from its own.

    On several nodes run torchrun ... -m composer_megatron.train --repeat RUN/run.json --run-dir NEW yourself.

    Args:
        run: A run folder, or the run.json in it.
        run_dir: Where the new run goes.
        processes: Processes on this machine; by default as many as the run had.
        dry_run: Check, print the differences and the command, and start nothing.
        megatron_flags: Further flags, which win over the run's, as one quoted text or after a lone --.
    """
    from composer_megatron import runfile
    from composer_megatron.arguments import given_flags, parse_options
    from composer_megatron.launch import run_to_the_end, torchrun
    from composer_megatron.train import megatron_command_line

    path = run / runfile.NAME if run.is_dir() else run
    count = processes or runfile.load_starts(path)[0].processes
    arguments = ["--repeat", str(path), "--run-dir", str(run_dir), *shlex.split(megatron_flags)]
    command_line = megatron_command_line(parse_options(arguments), count)
    for line in runfile.differences(path, count):
        console.print(f"unlike {path}: {line}", markup=False)
    if dry_run:
        print(shlex.join(torchrun(count, arguments)))
    else:
        run_to_the_end(torchrun(count, arguments), count, run_dir, given_flags(command_line)["train_iters"])
