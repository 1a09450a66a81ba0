"""The whole way on this machine: search, aggregate, extrapolate, plan, pretrain a Composite and a Llama, report.

    python tools/demo.py [--text PATH…] [--output runs/demo]

Each step is a command that a user could type; it is printed before it runs. A step whose result exists goes on or is
skipped by the command itself, so an interrupted demo continues where it stopped.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from composer_megatron.env import environment
from composer_megatron.files import read_json, write_json
from composer_megatron.sequence import CompositeSequence

TOOLS = Path(__file__).parent
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Size:
    """How much of everything one demo does."""

    shape: str
    preset: str
    budget: int
    initial: int
    workers: int
    steps: int
    batch: int
    micro_batch: int
    seq_len: int
    learning_rate: float
    text_bytes: int


SIZES = {
    "smoke": Size("tiny", "smoke", 6, 3, 2, 200, 8, 4, 64, 1e-2, 1_500_000),
    "cpu": Size("demo", "demo", 16, 6, 2, 500, 8, 2, 128, 3e-3, 8_000_000),
    "gpu": Size("60m", "demo", 32, 8, 8, 300, 64, 16, 1024, 1e-3, 60_000_000),
}
MODELS = ("composite", "baseline")
PROMPTS = ("def ", "import os\n", "class Stack:\n    ")


@dataclass(frozen=True)
class Demo:
    """Run the whole chain.

    Attributes:
        text: Files or folders to train on (txt, jsonl, .xz, .gz); by default the Python standard library's sources.
        output: Where everything goes.
        size: smoke takes a minute; cpu suits two cores; gpu is larger. By default what the machine has.
        processes: Training processes, joined in a pipeline.
    """

    text: tuple[Path, ...] = ()
    output: Path = Path("runs/demo")
    size: Literal["smoke", "cpu", "gpu"] | None = None
    processes: int | None = None


def main() -> None:
    """Run every step and print what came out; the exit status is 0 only if both models learnt."""
    demo = tyro.cli(Demo, description=__doc__)
    gpus = len(environment()["gpus"])
    size = SIZES[demo.size or ("gpu" if gpus else "cpu")]
    processes = demo.processes or (min(2, gpus) if gpus else 2)
    started = time.monotonic()
    _prepare_text(demo, size)
    _search(demo.output, size)
    _train(demo.output, size, processes)
    _look(demo.output, size)
    learnt = _print_result(demo.output)
    console.print(f"took {(time.monotonic() - started) / 60:.1f} minutes; open {demo.output / 'report.html'}")
    sys.exit(not learnt)


def _prepare_text(demo: Demo, size: Size) -> None:
    vocabulary = json.loads(_capture("plan", "2A4M", "--shape", size.shape, "--json"))["vocab_size"]
    sources = ["--text", *map(str, demo.text)] if demo.text else []
    sources += ["--max-bytes", str(size.text_bytes)]
    script = [sys.executable, str(TOOLS / "preprocess_text.py")]
    _run("text", [*script, *sources, "--output", str(demo.output / "text"), "--vocab-size", str(vocabulary)])


def _search(output: Path, size: Size) -> None:
    study = str(output / "study")
    numbers = ["--length", "6", "--budget", str(size.budget), "--initial", str(size.initial)]
    _composer("search", study, "--preset", size.preset, "--workers", str(size.workers), *numbers)
    _composer("aggregate", study)


def _train(output: Path, size: Size, processes: int) -> None:
    grow = ["--shape", size.shape, "--match", "parameters", "--seq-len", str(size.seq_len)]
    both = ["--output", str(output / "composite.json"), "--baseline-output", str(output / "baseline.json")]
    _composer("extrapolate", str(output / "study" / "aggregate.json"), *grow, *both)
    layout = ["--pp", str(processes), "--micro-batch-size", str(size.micro_batch), "--seq-len", str(size.seq_len)]
    _composer("plan", str(output / "composite.json"), *layout, "--output", str(output / "plan.json"))
    for name in MODELS:
        folders = ["--text", str(output / "text"), "--run-dir", str(output / name)]
        schedule = ["--steps", str(size.steps), "--learning-rate", str(size.learning_rate)]
        batch = ["--processes", str(processes), "--global-batch-size", str(size.batch)]
        _composer("train", "--architecture", str(output / f"{name}.json"), *folders, *layout, *batch, *schedule)


def _look(output: Path, size: Size) -> None:
    for name in MODELS:
        _composer("eval", str(output / name), "--text", str(output / "text"))
        prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        tokens = str(min(48, size.seq_len // 2))
        _composer("generate", str(output / name), *prompts, "--max-new-tokens", tokens, "--temperature", "0.7")
    study = [str(output / "study"), "--text", str(output / "text"), "--plan", str(output / "plan.json")]
    models = [part for name in MODELS for part in ("--run", f"{name}={output / name}")]
    _composer("report", *study, *models, "--seq-len", str(size.seq_len), "--output", str(output / "report.html"))


def _print_result(output: Path) -> bool:
    """The table of held-out losses; True if both models are well below the unigram model."""
    unigram = read_json(output / "text" / "text.json", "a text folder")["valid"]
    table = Table(title="Held-out text", title_justify="left")
    for heading in ("model", "sequence", "parameters", "nats a token", "bits a byte"):
        table.add_column(heading, justify="left" if heading in ("model", "sequence") else "right")
    nats, bits = unigram["unigram_nats_per_token"], unigram["unigram_bits_per_byte"]
    table.add_row("unigram", "-", "-", f"{nats:.3f}", f"{bits:.3f}")
    result = {"unigram": {"nats_per_token": nats, "bits_per_byte": bits}}
    for name in MODELS:
        found = read_json(output / name / "eval.json", "an evaluation")
        costs = json.loads(_capture("plan", str(output / f"{name}.json"), "--json"))
        losses = (f"{found['nats_per_token']:.3f}", f"{found['bits_per_byte']:.3f}")
        sequence = CompositeSequence.parse(costs["sequence"]).notation
        table.add_row(name, sequence, f"{costs['params_total']:,}", *losses)
        result[name] = {key: found[key] for key in ("nats_per_token", "bits_per_byte")}
    console.print(table)
    write_json(output / "result.json", result)
    margin = 0.5
    learnt = all(result[name]["nats_per_token"] < nats - margin for name in MODELS)
    if not learnt:
        console.print(f"a model is not {margin} nats below the unigram model: something is wrong", style="red")
    return learnt


def _composer(command: str, *arguments: str) -> None:
    _run(command, [sys.executable, "-m", "composer_megatron", command, *arguments])


def _run(title: str, command: list[str]) -> None:
    console.rule(title, align="left")
    shown = command[1:] if command[1] != "-m" else ["composer-megatron", *command[3:]]
    console.print(f"$ {shlex.join(shown)}", style="dim")
    sys.stdout.flush()
    status = subprocess.run(command, check=False).returncode
    if status:
        console.print(f"demo: the step {title!r} failed; mend what it says and run the demo again", style="red")
        sys.exit(status)


def _capture(command: str, *arguments: str) -> str:
    line = [sys.executable, "-m", "composer_megatron", command, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
