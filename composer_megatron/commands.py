"""The program's commands, one function each: names, defaults, help and printing around one call of the library.

The docstrings are the help that ``composer-megatron COMMAND --help`` shows. Heavy packages are imported by the command
that needs them, so that the program starts at once.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, UseAppendAction

from composer_megatron.architecture import Architecture
from composer_megatron.display import console, print_costs, print_json, print_stages, print_verdicts
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import read_json, write_json
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape

type Several = UseAppendAction[tuple[str, ...]]
"""An option that may be given several times."""


def search(
    study: Positional[Path],
    *,
    length: int = 6,
    budget: int = 64,
    initial: int | None = None,
    proposer: Literal["bayesian", "random", "exhaustive"] = "bayesian",
    preset: Literal["smoke", "demo", "baseline"] = "baseline",
    seeds: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Search short sequences on the MAD tasks; the same command again goes on where it stopped.

    Args:
        study: Folder of the study; made if absent, continued if present.
        length: Blocks in a candidate; 2^length candidates in all.
        budget: Trials. A space that is no larger is searched exhaustively.
        initial: Sobol trials before the Gaussian process takes over; by default one a block, at least 5.
        proposer: Who chooses the next candidate.
        preset: Size of the proxy tasks: smoke (seconds), demo (minutes), baseline (MAD's own six).
        seeds: Training runs a candidate, whose mean is the score; by default the preset's number.
        seed: Seed of data, weights and proposals.
        workers: Trials at once, one process and one thread each; by default one a core, at most 8.
        json: Print one JSON object for programs instead of text.
    """
    from rich.console import Console

    from composer_search.strategies import SearchSettings, progress_bar
    from composer_search.strategies import search as run_search

    settings = SearchSettings(
        length=length,
        proposer=proposer,
        budget=budget,
        initial=initial,
        seed=seed,
        evaluator=preset,
        seeds=seeds,
    )
    with progress_bar(Console(stderr=True, highlight=False) if json else console) as progress:
        found = run_search(
            settings,
            study,
            workers=workers or min(8, len(os.sched_getaffinity(0))),
            progress=progress,
            cache_dir=study / "cache",
        )
    best = found.best
    if best is None or best.score is None:
        raise ComposerError(f"no trial of {study} was completed; see the errors in {study / 'trials.jsonl'}")
    if json:
        print_json(best.as_dict())
    else:
        console.print(f"best of {len(found.completed)}: {best.sequence} with {best.score:.4f}; all in {study}")


def aggregate(study: Positional[Path], *, context: int = 0, clusters: int = 5, json: bool = False) -> None:
    """Vote the best cluster of a study into one robust sequence; writes STUDY/aggregate.json.

    Args:
        study: Folder of a study.
        context: Blocks before a position that a voter must share; 0 is a plain vote, the paper's best.
        clusters: K-means clusters over the scores.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.aggregate import aggregate as vote
    from composer_search.study import Study

    scored = [(trial.sequence, trial.score) for trial in Study.load(study).trials if trial.score is not None]
    sequences, scores = [sequence for sequence, _ in scored], [score for _, score in scored]
    result = vote(sequences, scores, context=context, clusters=clusters)
    write_json(study / "aggregate.json", result.as_dict())
    if json:
        print_json(result.as_dict())
        return
    table = Table(title=f"{result.sequence}: vote of the best {len(result.members)}", title_justify="left")
    for heading in ("block", "chosen", "votes", "by"):
        table.add_column(heading, justify="right")
    for block, choice in enumerate(result.votes, start=1):
        counts = "  ".join(f"{count} {letter}" for letter, count in choice.counts.items())
        table.add_row(str(block), choice.letter, counts, choice.decision)
    console.print(table)


def extrapolate(
    source: Positional[str],
    *,
    method: Literal["stack", "stretch"] = "stack",
    shape: str = "1b",
    match: Literal["paper", "parameters"] = "paper",
    seq_len: int = 4096,
    output: Path | None = None,
    baseline_output: Path | None = None,
    json: bool = False,
) -> None:
    """Grow a small sequence to the size of a target, by stacking or stretching.

    Args:
        source: A sequence such as 2A4M, or an aggregate.json.
        method: stack repeats the sequence, stretch lengthens its runs; stack suits up to about 8 blocks.
        shape: A preset (350m, 1b, 3b, 8b, 60m, demo, tiny) or a JSON file with the widths.
        match: paper rounds up as the paper does; parameters comes closest to the baseline's size.
        seq_len: Tokens in a sequence, for the FLOPs.
        output: Where to write the architecture file.
        baseline_output: Where to write a Llama-style architecture of as many parameters, by its MLP width.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search import extrapolate as rules

    grown = rules.extrapolate(_sequence(source), load_shape(shape), method=method, match=match)
    written = {output: grown, baseline_output: grown.matched_baseline()}
    for path, architecture in written.items():
        if path:
            architecture.save(path)
    if json:
        print_json(grown.summary(seq_len))
        return
    print_costs(grown, seq_len)
    for path, architecture in written.items():
        if path:
            console.print(
                f"{architecture.sequence.notation}, {architecture.params_total:,} parameters: written to {path}"
            )


def plan(
    source: Positional[str],
    *,
    shape: str | None = None,
    seq_len: int = 4096,
    tp: int = 1,
    pp: int = 1,
    micro_batch_size: int = 1,
    output: Path | None = None,
    json: bool = False,
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
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron import pipeline

    architecture = _architecture(source, shape)
    layout = pipeline.Layout(pp, tp, micro_batch_size, seq_len)
    summary = pipeline.summary(architecture, layout)
    if output:
        write_json(output, summary)
    if json:
        print_json(summary)
        return
    print_costs(architecture, seq_len)
    print_stages(summary)


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
    megatron_flags: str = "",
) -> None:
    """Pretrain an architecture on Megatron-core with torchrun; the same command again resumes.

    On several nodes run torchrun ... -m composer_megatron.train yourself; --dry-run prints the command to start from.

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
        megatron_flags: Further flags for Megatron, which win over ours, as one quoted text or after a lone --.
    """
    from composer_megatron import pipeline
    from composer_megatron.launch import Launch
    from composer_megatron.text.folder import load_text_folder

    model = Architecture.load(architecture)
    layout = pipeline.Layout(pp, tp, micro_batch_size, seq_len)
    summary = pipeline.summary(model, layout)
    launch = Launch(
        architecture=architecture,
        text=text,
        run_dir=run_dir,
        processes=processes,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        steps=steps,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size or 4 * pp * micro_batch_size * max(1, processes // (tp * pp)),
        seq_len=seq_len,
        learning_rate=learning_rate,
        seed=seed,
        extra=tuple(shlex.split(megatron_flags)),
    )
    load_text_folder(text)
    if dry_run:
        print_costs(model, seq_len)
        print_stages(summary)
        print(launch.shell())
    else:
        launch.run()


def eval_(run: Positional[Path], *, text: tuple[Path, ...], iteration: int | None = None, json: bool = False) -> None:
    """Held-out loss of a run in nats and bits per byte; writes RUN/eval.json.

    Args:
        run: Folder of a training run.
        text: A text folder (its held-out part is used), or files and folders of plain text.
        iteration: Which checkpoint; the last by default.
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.checkpoint import load_run
    from composer_megatron.evaluate import evaluate_text

    with load_run(run, iteration) as loaded:
        evaluation = evaluate_text(loaded, text)
    evaluation.save(loaded.path)
    if json:
        print_json(vars(evaluation))
        return
    console.print(f"{evaluation.nats_per_token:.4f} nats a token, {evaluation.bits_per_byte:.4f} bits a byte")
    size = f"{evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes"
    console.print(f"held-out text of {size}; iteration {evaluation.iteration}")


def generate(
    run: Positional[Path],
    *,
    prompt: Several,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    iteration: int | None = None,
    json: bool = False,
) -> None:
    """Continue prompts; writes RUN/samples.json.

    Args:
        run: Folder of a training run.
        prompt: A text to continue; may be given several times.
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the likeliest token; above, samples.
        top_k: Sample among the k likeliest tokens; all by default.
        top_p: Sample among the likeliest tokens that hold this much probability.
        seed: Seed of the sampling.
        iteration: Which checkpoint; the last by default.
        json: Print one JSON object for programs instead of text.
    """
    if not prompt:
        raise UsageError('no prompt: add --prompt TEXT (--prompt "" starts a new document)')
    from composer_megatron.checkpoint import load_run
    from composer_megatron.generate import generate as continue_prompts
    from composer_megatron.generate import write_samples

    with load_run(run, iteration) as loaded:
        texts = continue_prompts(
            loaded,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
    write_samples(loaded.path / "samples.json", prompt, texts)
    if json:
        print_json([{"prompt": start, "text": text} for start, text in zip(prompt, texts, strict=True)])
        return
    for start, text in zip(prompt, texts, strict=True):
        console.print(Text(start, style="bold") + Text(text), soft_wrap=True)
        console.rule(style="dim")


def export(run: Positional[Path], output: Positional[Path], *, iteration: int | None = None) -> None:
    """Write a run as a Hugging Face model that loads with trust_remote_code.

    Args:
        run: Folder of a training run.
        output: Folder to make; an existing one is refused.
        iteration: Which checkpoint; the last by default.
    """
    from composer_megatron.export_hf import export as export_run

    export_run(run, output, iteration)
    console.print(f"written to {output}; load it with transformers and trust_remote_code=True")


def bench_training(
    sequence: Positional[str] = "2A4M",
    *,
    shape: str = "demo",
    method: Literal["stack", "stretch"] = "stack",
    match: Literal["paper", "parameters"] = "paper",
    seq_len: int = 512,
    batch: int = 4,
    warmup: int = 2,
    steps: int = 10,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Training throughput of a grown sequence beside its Llama baseline, in one process on this machine.

    Args:
        sequence: A short sequence, grown to the shape first.
        shape: A preset or a JSON file.
        method: How the sequence is grown.
        match: As for extrapolate.
        seq_len: Tokens in a sequence; what a Composite saves grows with it.
        batch: Sequences in a step.
        warmup: Steps before the clock starts.
        steps: Timed steps; the median counts.
        output: The JSON file; by default runs/bench/DEVICE/training-SHAPE-SEQ_LEN.json.
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.quiet import hush_imports

    hush_imports()
    from composer_megatron.bench import Workload
    from composer_megatron.bench import bench_training as measure
    from composer_megatron.env import device_name
    from composer_search import extrapolate as rules

    composite = rules.extrapolate(CompositeSequence.parse(sequence), load_shape(shape), method=method, match=match)
    result = measure(composite, Workload(seq_len=seq_len, batch=batch, warmup=warmup, steps=steps))
    output = output or Path("runs/bench") / device_name() / f"training-{composite.shape.name}-{seq_len}.json"
    write_json(output, result)
    if json:
        print_json(result)
        return
    table = Table(title=f"training steps of {batch} x {seq_len} tokens on {device_name()}", title_justify="left")
    for heading in ("model", "sequence", "parameters", "ms a step", "tokens/s", "TFLOP/s"):
        table.add_column(heading, justify="right")
    for name, row in result["models"].items():
        rates = (f"{row['median_seconds'] * 1e3:,.1f}", f"{row['tokens_per_second']:,.0f}", f"{row['tflops']:.3f}")
        table.add_row(name, CompositeSequence.parse(row["sequence"]).notation, f"{row['params_total']:,}", *rates)
    console.print(table)
    console.print(f"composite over baseline: x{result['speedup']:.3f}; written to {output}")


def bench_kernels(
    *,
    ops: tuple[str, ...] = (),
    quick: bool = False,
    tune: bool = False,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Time our kernels beside their peers on this GPU; needs a checkout of the source.

    Args:
        ops: Operations such as rms_norm and swiglu; all by default.
        quick: Few shapes.
        tune: Time launch configurations instead of peers.
        output: Folder of the JSON results; by default runs/bench/DEVICE.
        json: Print one JSON object for programs at the end.
    """
    from composer_megatron import bench_kernels as bench
    from composer_megatron.env import device_name

    chosen = bench.choose(ops, bench.scripts())
    output = output or Path("runs/bench") / device_name()
    failed = bench.run(chosen, output, [flag for flag, wanted in (("--quick", quick), ("--tune", tune)) if wanted])
    verdicts = [] if tune else bench.load(output, (op for op in chosen if op not in failed))
    if json:
        print_json([vars(verdict) for verdict in verdicts])
    elif verdicts:
        print_verdicts(verdicts)
    if failed:
        raise ComposerError(f"no result for {', '.join(failed)}: see the messages above; the others are in {output}")


def report(
    study: Positional[Path | None] = None,
    *,
    architecture: Several = (),
    run: Several = (),
    text: Path | None = None,
    plan: Path | None = None,
    seq_len: int = 4096,
    output: Path = Path("report.html"),
) -> None:
    """One self-contained page of a study, its models and their training.

    Args:
        study: Folder of a study.
        architecture: NAME=FILE of an architecture to draw and to count; may be given several times.
        run: NAME=FOLDER of a training run; may be given several times.
        text: The text folder that the runs were trained on, for the unigram line.
        plan: A plan's JSON file.
        seq_len: Tokens in a sequence, for the FLOPs.
        output: The page.
    """
    from composer_search.report import ReportInputs, write_report

    inputs = ReportInputs(
        study=study,
        architectures=_named(architecture, "--architecture"),
        runs=_named(run, "--run"),
        text=text,
        plan=plan,
        seq_len=seq_len,
    )
    write_report(inputs, output)
    console.print(f"written to {output}")


def env(*, json: bool = False) -> None:
    """Show versions and devices, for bug reports.

    Args:
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.env import environment

    found = environment()
    if json:
        print_json(found)
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


def _named(pairs: tuple[str, ...], option: str) -> dict[str, Path]:
    """NAME=PATH options as a table."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise UsageError(f"{option} {pair!r}; expected NAME=PATH, such as composite=runs/composite")
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}


def _architecture(source: str, shape: str | None) -> Architecture:
    """An architecture file, or a sequence with a shape."""
    if Path(source).suffix == ".json":
        if shape is not None:
            raise UsageError(f"--shape {shape} beside {source}: an architecture file has its own shape")
        return Architecture.load(Path(source))
    if shape is None:
        raise UsageError(f"{source!r} is a sequence: add --shape, or give an architecture file (*.json)")
    return Architecture(CompositeSequence.parse(source), load_shape(shape))


COMMANDS = (
    search,
    aggregate,
    extrapolate,
    plan,
    train,
    generate,
    eval_,
    export,
    bench_training,
    bench_kernels,
    report,
    env,
)
"""Every command, in the order in which help lists them; ``bench_…`` stand below ``bench``."""
