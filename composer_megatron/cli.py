"""The program ``composer-megatron``: one command a stage, each reading and writing files that a person can open.

Here are only names, defaults and printing; every command calls one function of the library. Heavy packages are
imported by the command that needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from composer_megatron import __version__
from composer_megatron.architecture import Architecture
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import read_json, write_json
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape

DESCRIPTION = (
    f"composer-megatron {__version__}: search hybrid architectures, train them on Megatron-core. "
    "Add --debug to any command for the traceback of an error."
)

Json = Annotated[bool, arg(name="json", help="Print one JSON object for programs instead of text.")]
app = SubcommandApp()
bench = SubcommandApp()
app.command(bench, name="bench", help="Measure on this machine; the results go to a JSON file with its environment.")
console = Console(highlight=False, soft_wrap=True)


@app.command
def search(
    study: Positional[Path],
    *,
    length: int = 6,
    budget: int = 64,
    initial: int = 8,
    proposer: Literal["bayesian", "random", "exhaustive"] = "bayesian",
    preset: str = "baseline",
    seeds: int = 1,
    seed: int = 0,
    workers: int | None = None,
    json_output: Json = False,
) -> None:
    """Search short sequences on the MAD tasks; the same command again goes on where it stopped.

    Args:
        study: Folder of the study; made if absent, continued if present.
        length: Blocks in a candidate; 2^length candidates in all.
        budget: Trials. A space that is no larger is searched exhaustively.
        initial: Sobol trials before the Gaussian process takes over.
        proposer: Who chooses the next candidate.
        preset: Size of the proxy tasks: smoke (seconds), demo (minutes), baseline (MAD's own six).
        seeds: Training runs a candidate, with different initial weights; their mean is the score.
        seed: Seed of data, weights and proposals.
        workers: Trials at once, one process and one thread each; all cores by default.
        json_output: Print one JSON object for programs instead of text.
    """
    from composer_search.strategies import SearchSettings, search as run_search  # noqa: I001

    raise NotImplementedError(run_search, SearchSettings)


@app.command
def aggregate(
    study: Positional[Path], *, context: int = 0, clusters: int = 5, json_output: Json = False
) -> None:
    """Vote the best cluster of a study into one robust sequence; writes STUDY/aggregate.json.

    Args:
        study: Folder of a study.
        context: Blocks before a position that a voter must share; 0 is a plain vote, the paper's best.
        clusters: K-means clusters over the scores.
        json_output: Print one JSON object for programs instead of text.
    """
    raise NotImplementedError


@app.command
def extrapolate(
    source: Positional[str],
    *,
    method: Literal["stack", "stretch"] = "stack",
    shape: str = "1b",
    match: Literal["paper", "parameters"] = "paper",
    seq_len: int = 4096,
    output: Path | None = None,
    json_output: Json = False,
) -> None:
    """Grow a small sequence to the size of a target, by stacking or stretching.

    Args:
        source: A sequence such as 2A4M, or an aggregate.json.
        method: stack repeats the sequence, stretch lengthens its runs; stack suits up to about 8 blocks.
        shape: A preset (350m, 1b, 3b, 8b, 60m, demo, tiny) or a JSON file with the widths.
        match: paper rounds up as the paper does; parameters comes closest to the baseline's size.
        seq_len: Tokens in a sequence, for the FLOPs.
        output: Where to write the architecture file.
        json_output: Print one JSON object for programs instead of text.
    """
    from composer_search import extrapolate as rules

    grown = rules.extrapolate(_sequence(source), load_shape(shape), method=method, match=match)
    if output:
        grown.save(output)
    if json_output:
        _print_json(grown.summary(seq_len))
    else:
        _print_costs(grown, seq_len)
        if output:
            console.print(f"written to {output}")


@app.command
def plan(
    source: Positional[str],
    *,
    shape: str | None = None,
    seq_len: int = 4096,
    tp: int = 1,
    pp: int = 1,
    micro_batch_size: int = 1,
    output: Path | None = None,
    json_output: Json = False,
) -> None:
    """Show what a model costs and where its pipeline is cut: parameters, FLOPs, KV bytes, stages, memory.

    Args:
        source: An architecture file, or a sequence together with --shape.
        shape: A preset or a JSON file, where the source is a sequence.
        seq_len: Tokens in a sequence.
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        micro_batch_size: Sequences in a micro-batch.
        output: Also write the JSON there.
        json_output: Print one JSON object for programs instead of text.
    """
    from composer_megatron import pipeline

    architecture = _architecture(source, shape)
    layout = pipeline.Layout(pp, tp, micro_batch_size, seq_len)
    summary = pipeline.summary(architecture, layout)
    if output:
        write_json(output, summary)
    if json_output:
        _print_json(summary)
        return
    _print_costs(architecture, seq_len)
    _print_stages(summary)


@app.command
def train(
    *,
    architecture: Path,
    text: Path,
    run_dir: Path,
    processes: int = 1,
    tp: int = 1,
    pp: int = 1,
    steps: int = 1000,
    micro_batch_size: int = 8,
    global_batch_size: int | None = None,
    seq_len: int = 1024,
    learning_rate: float = 3e-4,
    seed: int = 1234,
    dry_run: bool = False,
) -> None:
    """Pretrain an architecture on Megatron-core with torchrun; the same command again resumes.

    Flags after a lone -- go to Megatron as they are and win over ours. On several nodes run
    torchrun ... -m composer_megatron.train yourself; --dry-run prints the command to start from.

    Args:
        architecture: An architecture file.
        text: A folder made by tools/preprocess_text.py.
        run_dir: Where checkpoints, metrics and logs go.
        processes: Processes on this machine, one a GPU.
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        steps: Optimizer steps.
        micro_batch_size: Sequences in one forward pass.
        global_batch_size: Sequences in a step; by default 4 micro-batches for each pipeline stage and data rank.
        seq_len: Tokens in a sequence.
        learning_rate: Peak of the cosine schedule.
        seed: Seed of weights and data order.
        dry_run: Check, print the plan and the command, and start nothing.
    """
    raise NotImplementedError


@app.command
def env(*, json_output: Json = False) -> None:
    """Show versions and devices, for bug reports.

    Args:
        json_output: Print one JSON object for programs instead of text.
    """
    from composer_megatron.env import environment

    found = environment()
    if json_output:
        _print_json(found)
        return
    for key in ("python", "platform", "cpu", "cpu_cores"):
        console.print(f"{key:12} {found[key]}")
    for gpu in found["gpus"] or [{"name": "none"}]:
        console.print(f"{'gpu':12} {', '.join(gpu.values())}")
    for name, version in found["packages"].items():
        console.print(f"{name:20} {version or 'not installed'}")


def _sequence(source: str) -> CompositeSequence:
    """A sequence, from text or from the ``sequence`` of a JSON file."""
    path = Path(source)
    if path.suffix != ".json":
        return CompositeSequence.parse(source)
    text = read_json(path, "an aggregate or an architecture").get("sequence")
    if not isinstance(text, str):
        raise ComposerError(f"{path} holds no sequence; expected an aggregate.json or an architecture file")
    return CompositeSequence.parse(text)


def _architecture(source: str, shape: str | None) -> Architecture:
    """An architecture file, or a sequence with a shape."""
    if Path(source).suffix == ".json":
        if shape is not None:
            raise UsageError(f"--shape {shape} beside {source}: an architecture file has its own shape")
        return Architecture.load(Path(source))
    if shape is None:
        raise UsageError(f"{source!r} is a sequence: add --shape, or give an architecture file (*.json)")
    return Architecture(CompositeSequence.parse(source), load_shape(shape))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_costs(architecture: Architecture, seq_len: int) -> None:
    this, baseline = architecture.summary(seq_len), architecture.baseline().summary(seq_len)
    table = Table(title=f"{this['sequence']} at shape {architecture.shape.name}", title_justify="left")
    for heading in ("", "this", "Llama baseline", "baseline / this"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = {
        "blocks": "blocks",
        "attention blocks": "attention",
        "MLP blocks": "mlp",
        "parameters, no embeddings": "params_non_embedding",
        "parameters, all": "params_total",
        f"training FLOPs a token at {seq_len:,}": "flops_per_token",
        "KV bytes a token (bf16)": "kv_bytes_per_token",
    }
    for label, key in rows.items():
        ratio = f"{baseline[key] / this[key]:.3f}" if this[key] else "-"
        table.add_row(label, f"{this[key]:,}", f"{baseline[key]:,}", ratio)
    console.print(table)


def _print_stages(summary: dict[str, Any]) -> None:
    table = Table(title=f"pipeline pattern {summary['pattern']}", title_justify="left")
    for heading in ("stage", "blocks", "FLOPs a token", "parameters a rank", "states GB", "activations GB"):
        table.add_column(heading, justify="right")
    for number, stage in enumerate(summary["stages"]):
        memory = (f"{stage[key] / 1e9:.2f}" for key in ("state_bytes", "activation_bytes"))
        table.add_row(
            str(number), stage["blocks"], f"{stage['flops_per_token']:,}", f"{stage['params_per_rank']:,}", *memory
        )
    console.print(table)
    console.print(
        f"balance (mean over slowest stage) {summary['balance']:.3f}; "
        f"with equal block counts {summary['balance_equal_split']:.3f}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit: 0 done, 1 failed, 2 wrong usage. Errors are one message on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app.cli(prog="composer-megatron", description=DESCRIPTION, args=arguments)
    except ComposerError as error:
        if debug:
            traceback.print_exc()
        print(f"composer-megatron: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("composer-megatron: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
