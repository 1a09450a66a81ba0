"""The program's commands, one function each: names, defaults, help and printing around one call of the library.

The docstrings are the help that ``composer-megatron COMMAND --help`` shows. Heavy packages are imported by the command
that needs them, so that the program starts at once.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, UseAppendAction

from composer_megatron.architecture import Architecture
from composer_megatron.display import console, print_costs, print_json, print_layouts, print_stages, print_verdicts
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import read_json, write_json
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape

if TYPE_CHECKING:
    from composer_megatron.roofline import Device
    from composer_search.evidence.exhibit import Exhibit
    from composer_search.report.markup import Markup

type Several = UseAppendAction[tuple[str, ...]]
"""An option that may be given several times."""


def search(
    study: Positional[Path],
    *,
    length: int = 6,
    budget: int = 64,
    initial: int | None = None,
    batch: int = 1,
    strategy: Literal["one-shot", "end", "middle"] = "one-shot",
    step: int = 4,
    width_scaling: bool = False,
    proposer: Literal["bayesian", "random", "exhaustive", "evolution"] = "bayesian",
    objective: str = "accuracy",
    constraint: Several = (),
    target_shape: str | None = None,
    method: Literal["stack", "stretch"] = "stack",
    match: Literal["paper", "parameters"] = "paper",
    seq_len: int = 4096,
    device: str = "h100",
    preset: Literal["smoke", "demo", "baseline", "full", "proxies", "small-text", "large-text"] = "baseline",
    text: tuple[str, ...] = (),
    text_shape: str | None = None,
    halving: int = 0,
    seeds: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    executor: Literal["local", "ray"] = "local",
    live: bool = False,
    json: bool = False,
) -> None:
    """Search short sequences on the MAD tasks or a text; the same command again goes on where it stopped.

    Args:
        study: Folder of the study; made if absent, continued if present.
        length: Blocks in a candidate; 2^length candidates in all.
        budget: Trials, in end and middle those of each step. A space that is no larger is searched exhaustively.
        initial: Trials before the Gaussian process takes over, population of an evolution; one a block, at least 5.
        batch: Trials that are proposed at once and handed to one worker.
        strategy: one-shot, or in steps: end adds blocks after the best sequence so far, middle between its halves.
        step: Blocks that a step of end or middle adds.
        width_scaling: Make candidates as wide, for their depth, as the target.
        proposer: Who chooses the next candidate.
        objective: What to maximise, such as "accuracy - 0.2 kv_bytes"; with a comma, goals of a Pareto front.
        constraint: Such as "attention <= 1/3" or "kv_bytes <= 0.6x" (of the Llama baseline); may be given often.
        target_shape: Shape that candidates are grown to for exact costs; 1b where something needs one.
        method: How candidates are grown, as in extrapolate.
        match: To which size, as in extrapolate; parameters gives every candidate the baseline's.
        seq_len: Tokens in a sequence, for FLOPs and throughput.
        device: GPU that throughput is predicted for.
        preset: What scores a candidate: smoke (seconds), demo (minutes), baseline (MAD's own six tasks), full (MAD's 66
            settings), proxies (recall and state tracking beside MAD), or a text, small or with large models.
        text: Files or folders for small-text and large-text, or a folder made by tools/preprocess_text.py.
        text_shape: Widths for large-text, a preset or a JSON file.
        halving: Rungs of successive halving within a batch; 0 for none.
        seeds: Training runs a candidate, whose mean is the score; by default the preset's number.
        seed: Seed of data, weights and proposals.
        workers: Batches at once, one process and one thread each; by default one a core, at most 8.
        executor: local, or ray for workers of a Ray cluster, whose address is in RAY_ADDRESS.
        live: Show a table that follows the search, instead of a line a trial.
        json: Print one JSON object for programs instead of text.
    """
    from rich.console import Console

    from composer_search.live import live_view
    from composer_search.strategies import SearchSettings, progress_bar
    from composer_search.strategies import search as run_search

    settings = SearchSettings(
        length=length,
        strategy=strategy,
        step=step,
        width_scaling=width_scaling,
        proposer=proposer,
        budget=budget,
        initial=initial,
        batch=batch,
        objective=objective,
        constraints=constraint,
        target_shape=target_shape,
        method=method,
        match=match,
        seq_len=seq_len,
        device=device,
        seed=seed,
        evaluator=preset,
        text=text,
        shape=text_shape,
        halving=halving,
        seeds=seeds,
    )
    show = live_view if live else progress_bar
    with show(Console(stderr=True, highlight=False) if json else console) as progress:
        found = run_search(
            settings,
            study,
            workers=workers or min(8, len(os.sched_getaffinity(0))),
            executor=executor,
            progress=progress,
            cache_dir=study / "cache",
        )
    best = found.best
    if best is None or best.score is None:
        raise ComposerError(f"no trial of {study} was completed; see the errors in {study / 'trials.jsonl'}")
    if json:
        print_json(best.as_dict())
    else:
        value = f", value {best.objective['value']:.4f}" if "value" in best.objective else ""
        console.print(f"best of {len(found.completed)}: {best.sequence} with {best.score:.4f}{value}; all in {study}")


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
        shape: A preset (350m, 1b, 3b, 8b, 70b, 60m, demo, tiny) or a JSON file with the widths.
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
    vpp: int = 1,
    cp: int = 1,
    dp: int = 1,
    micro_batch_size: int = 1,
    micro_batches: int | None = None,
    global_batch_size: int | None = None,
    recompute: Literal["none", "selective", "full"] = "none",
    sequence_parallel: bool = False,
    distributed_optimizer: bool = False,
    mtp: str | None = None,
    device: str = "h100",
    profile: Path | None = None,
    memory_limit: float | None = None,
    gpus: int | None = None,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Show what a model costs, where its pipeline is cut, and what a training step of a layout is expected to take.

    Times are predictions from a device's ceilings, unless --profile gives measured ones. --gpus compares layouts.

    Args:
        source: An architecture file, or a sequence together with --shape.
        shape: A preset or a JSON file, where the source is a sequence.
        seq_len: Tokens in a sequence.
        tp: Tensor-parallel ranks.
        pp: Pipeline-parallel ranks.
        vpp: Pipeline stages on each of them; above 1 the interleaved schedule.
        cp: Context-parallel ranks.
        dp: Data-parallel ranks.
        micro_batch_size: Sequences in a micro-batch.
        micro_batches: Micro-batches of a rank in a step; by default 4 for each pipeline rank.
        global_batch_size: Sequences in a step, instead of --micro-batches.
        recompute: What is computed again in the backward pass.
        sequence_parallel: Tensor-parallel ranks also share what lies between the matrices.
        distributed_optimizer: Data- and context-parallel ranks share the optimizer's state.
        mtp: Blocks of a depth of multi-token prediction on the last stage, such as 1A1M.
        device: h100, h200 or a100; cpu with --profile.
        profile: A file of composer-megatron profile.
        memory_limit: GB that no rank may exceed.
        gpus: Compare the layouts of so many GPUs, instead of planning one.
        output: Also write the JSON there.
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron import estimate, pipeline
    from composer_megatron.layout import Layout, micro_batches_in
    from composer_megatron.profile import Profile
    from composer_megatron.roofline import get_device

    architecture = _architecture(source, shape)
    limit = None if memory_limit is None else memory_limit * 1e9
    if gpus is not None:
        for name, value, default in (
            *(("tp", tp, 1), ("pp", pp, 1), ("vpp", vpp, 1), ("cp", cp, 1), ("dp", dp, 1)),
            *(("micro-batch-size", micro_batch_size, 1), ("micro-batches", micro_batches, None)),
            *(("recompute", recompute, "none"), ("profile", profile, None), ("mtp", mtp, None)),
        ):
            if value != default:
                raise UsageError(
                    f"--{name} {value} beside --gpus {gpus}, which compares layouts: leave one of them out"
                )
        _compare_layouts(architecture, gpus, get_device(device), seq_len, global_batch_size, limit, output, json)
        return
    if global_batch_size is not None:
        if micro_batches is not None:
            raise UsageError("--micro-batches and --global-batch-size: give one of them")
        micro_batches = micro_batches_in(global_batch_size, micro_batch_size, dp)
    layout = Layout(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        virtual_stages=vpp,
        context_parallel=cp,
        data_parallel=dp,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        seq_len=seq_len,
        sequence_parallel=sequence_parallel,
        distributed_optimizer=distributed_optimizer,
        recompute=recompute,
    )
    layout.check(architecture)
    found = pipeline.plan(
        architecture,
        layout,
        device=None if profile and device == "cpu" else get_device(device),
        times=Profile.load(profile).times(architecture, layout) if profile else None,
        memory_limit=limit,
        multi_token=CompositeSequence.parse(mtp) if mtp else None,
    )
    summary = estimate.summary(found)
    if output:
        write_json(output, summary)
    if json:
        print_json(summary)
        return
    print_costs(architecture, seq_len)
    print_stages(summary)


def profile(
    output: Positional[Path],
    *,
    shape: str = "demo",
    seq_len: int = 512,
    micro_batch_size: int = 1,
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Measure forward and backward passes of each kind of block on this machine, for plan --profile.

    Args:
        output: The profile to write.
        shape: A preset or a JSON file.
        seq_len: Tokens in a sequence.
        micro_batch_size: Sequences in the micro-batch.
        repeats: Timed passes of each; the median counts.
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.profile import measure
    from composer_megatron.quiet import hush_imports

    hush_imports()
    found = measure(load_shape(shape), seq_len=seq_len, micro_batch_size=micro_batch_size, repeats=repeats)
    found.save(output)
    if json:
        print_json(found.as_dict())
        return
    table = Table(
        title=f"{found.shape.name}, {micro_batch_size} x {seq_len} tokens on {found.device}", title_justify="left"
    )
    for heading in ("part", "forward, ms", "backward, ms"):
        table.add_column(heading, justify="right")
    for part, passes in (*found.blocks.items(), ("embedding", found.embedding), ("loss head", found.head)):
        table.add_row(part, *(f"{seconds * 1e3:.3f}" for seconds in passes))
    console.print(table)
    console.print(f"written to {output}")


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
    from composer_megatron import estimate, pipeline
    from composer_megatron.launch import Launch
    from composer_megatron.text.folder import load_text_folder

    model = Architecture.load(architecture)
    layout = pipeline.Layout(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        sequence_parallel=tp > 1,
    )
    summary = estimate.summary(pipeline.plan(model, layout))
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
        launch.check()
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


def import_(source: Positional[Path], run_dir: Positional[Path], *, json: bool = False) -> None:
    """Make a run folder of a trained Llama: its layers become the sequence (AM)xN, exactly.

    Args:
        source: A Hugging Face folder (config.json, safetensors), or a torch_dist checkpoint of Megatron's GPTModel.
        run_dir: Folder to make; an existing one is refused.
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.import_run import import_run
    from composer_megatron.quiet import hush_imports

    hush_imports()
    found = import_run(source, run_dir)
    architecture = found.architecture
    if json:
        print_json(architecture.summary(found.sequence_length))
        return
    size = f"{architecture.params_total:,} parameters, {str(found.dtype).removeprefix('torch.')}"
    console.print(f"{architecture.sequence.notation}, {size}: written to {run_dir}")
    if found.tokenizer is None:
        console.print(f"no tokenizer.json came with it: copy one to {run_dir} to generate and to evaluate")


def flags(
    architecture: Positional[Path],
    *,
    script: Literal["hybrid", "gpt"] = "hybrid",
    pp: int = 1,
    vpp: int = 1,
    seq_len: int = 4096,
    json: bool = False,
) -> None:
    """Print the flags by which Megatron's own pretrain_hybrid.py or pretrain_gpt.py builds an architecture.

    Args:
        architecture: An architecture file.
        script: hybrid for pretrain_hybrid.py, gpt for pretrain_gpt.py, which reads the file named by the environment
            variable COMPOSER_ARCHITECTURE, too.
        pp: Pipeline-parallel ranks, among which the sequence is cut by cost.
        vpp: Pipeline stages on each rank.
        seq_len: Tokens in a sequence.
        json: Print a JSON list of arguments instead of a line for a shell.
    """
    from composer_megatron import script_flags

    found = script_flags.script_flags(
        Architecture.load(architecture), script, pipeline=pp, virtual_stages=vpp, seq_len=seq_len
    )
    if json:
        print_json(script_flags.as_arguments(found))
    else:
        print(script_flags.as_shell_text(found))


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


def watch(study: Positional[Path], *, seconds: float = 1.0) -> None:
    """Follow a study that another process is searching, until its budget is spent; Ctrl-C leaves the search alone.

    Args:
        study: Folder of the study.
        seconds: Between looks.
    """
    from composer_search.live import watch as follow

    if not seconds > 0:
        raise UsageError(f"--seconds {seconds}; expected more than 0")
    follow(study, console, seconds=seconds)


def evidence_oracle(study: Positional[Path], *, seed: int = 0, output: Path | None = None, json: bool = False) -> None:
    """Rank an exhaustive study with its seeds: error of each rank, who wins how often, and the noise ceiling.

    Args:
        study: Folder of a study with at least two seeds.
        seed: Of the resampling.
        output: The page with the figure; by default STUDY/evidence/oracle.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.oracle import oracle
    from composer_search.evidence.scores import read_scores
    from composer_search.report.evidence import oracle_figure

    found = oracle(read_scores(study), seed=seed)
    output = output or study / "evidence" / "oracle.html"
    _show_exhibit(found.exhibit(), found.as_dict(), oracle_figure(found), output, json)


def evidence_regret(
    study: Positional[Path],
    *,
    proposers: tuple[str, ...] = ("random", "evolution", "bayesian"),
    replays: int = 10,
    budget: int | None = None,
    noisy: bool = False,
    seed: int = 0,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Replay proposers against an exhaustive study and show how soon each finds its best sequence.

    Args:
        study: Folder of a study that has tried every sequence of its space.
        proposers: Who is replayed.
        replays: Seeds of each.
        budget: Trials of a replay; by default half the space.
        noisy: Show one seed's scores and judge by the mean of the others.
        seed: Of the first replay.
        output: The page with the figure; by default STUDY/evidence/regret.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.regret import regret
    from composer_search.report.evidence import regret_figure
    from composer_search.study import Study

    loaded = Study.load(study)
    found = regret(loaded, proposers=proposers, replays=replays, budget=budget, noisy=noisy, seed=seed)
    output = output or study / "evidence" / "regret.html"
    _show_exhibit(found.exhibit(), found.as_dict(), regret_figure(found), output, json)


def evidence_agreement(
    study: Positional[Path],
    *,
    target: Path | None = None,
    seed: int = 0,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Do scores rank as others do, and better than the parameter count alone?

    Without --target, each task is compared with the mean of the others, and the parameter count with the score.

    Args:
        study: Folder of the study that is judged, or a JSON file {"2A4M": 0.81, ...}.
        target: What it should predict: another study, or such a file.
        seed: Of the resampling.
        output: The page with the figure; by default STUDY/evidence/agreement.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence import agreement as ranks
    from composer_search.evidence.scores import read_scores
    from composer_search.report.evidence import agreement_figure

    scores = read_scores(study)
    if target:
        found = ranks.compare(scores, read_scores(target), seed=seed)
    else:
        found = [ranks.size_agreement(scores, seed=seed), *ranks.task_agreements(scores, seed=seed)]
    values = {"agreements": [each.as_dict() for each in found]}
    folder = study.parent if study.suffix == ".json" else study
    output = output or folder / "evidence" / "agreement.html"
    _show_exhibit(ranks.exhibit(found), values, agreement_figure(found), output, json)


def evidence_ablation(
    study: Positional[Path],
    *,
    trials: int | None = None,
    draws: int = 50,
    clusters: tuple[int, ...] = (2, 3, 5, 8),
    noisy: bool = False,
    seed: int = 0,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Compare aggregators (clusters, N_0, N_1, all, best trial, Gaussian process) on studies drawn from a big one.

    Args:
        study: Folder of a study, exhaustive where every choice is to be judged.
        trials: Trials of a drawn study; by default a quarter, at least 8.
        draws: How many studies are drawn.
        clusters: Numbers of K-means clusters.
        noisy: Show one seed's scores and judge by the mean of the others.
        seed: Of the draws.
        output: The page with the figure; by default STUDY/evidence/ablation.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.ablation import ablate
    from composer_search.evidence.scores import read_scores
    from composer_search.report.evidence import ablation_figure

    found = ablate(read_scores(study), size=trials, draws=draws, clusters=clusters, noisy=noisy, seed=seed)
    output = output or study / "evidence" / "ablation.html"
    _show_exhibit(found.exhibit(), found.as_dict(), ablation_figure(found), output, json)


def evidence_growth(
    source: Positional[str],
    *,
    shape: str = "1b",
    seq_len: int = 4096,
    run: Several = (),
    output: Path = Path("growth.html"),
    json: bool = False,
) -> None:
    """Stacking against stretching: both grown architectures with exact counts, and their losses where runs are given.

    Args:
        source: A sequence such as 2A4M, an aggregate.json, or an aggregated study.
        shape: A preset or a JSON file with the widths.
        seq_len: Tokens in a sequence, for the FLOPs.
        run: Folder of an evaluated training run; may be given several times.
        output: The page with the figure.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.growth import grow_both
    from composer_search.report.data import read_run
    from composer_search.report.evidence import growth_figure

    folder = Path(source)
    sequence = _sequence(str(folder / "aggregate.json") if folder.is_dir() else source)
    trained = []
    for each in run:
        found_run = read_run(each, Path(each))
        if found_run.evaluation is None:
            raise ComposerError(f"{each} has no eval.json: run `composer-megatron eval {each}` first")
        trained.append((found_run.architecture, found_run.evaluation["bits_per_byte"]))
    found = grow_both(sequence, load_shape(shape), seq_len=seq_len, runs=trained)
    _show_exhibit(found.exhibit(), found.as_dict(), growth_figure(found), output, json)


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


def _compare_layouts(
    architecture: Architecture,
    gpus: int,
    device: Device,
    seq_len: int,
    global_batch_size: int | None,
    memory_limit: float | None,
    output: Path | None,
    json: bool,
) -> None:
    """The part of `plan` that compares layouts."""
    from composer_megatron import estimate
    from composer_megatron.survey import survey

    plans = survey(
        architecture,
        gpus,
        device,
        seq_len=seq_len,
        global_batch_size=global_batch_size,
        memory_limit=memory_limit,
    )
    summaries = [estimate.summary(each) for each in plans]
    result = {"gpus": gpus, "device": device.name, "layouts": summaries}
    if output:
        write_json(output, result)
    if json:
        print_json(result)
    else:
        print_layouts(summaries)


def _show_exhibit(exhibit: Exhibit, values: dict[str, Any], figure: Markup | None, page: Path, json: bool) -> None:
    """A result of `composer_search.evidence`: its page, and its table or its JSON."""
    from composer_search.evidence.exhibit import shown
    from composer_search.report.evidence import write_exhibit

    write_exhibit(page, exhibit, figure)
    if json:
        print_json(values)
        return
    table = Table(title=exhibit.title, title_justify="left")
    for index, heading in enumerate(exhibit.columns):
        numeric = any(isinstance(row[index], int | float) for row in exhibit.rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in exhibit.rows:
        table.add_row(*map(shown, row))
    console.print(table)
    for finding in exhibit.findings:
        console.print(finding, markup=False)
    console.print(f"figure written to {page}", markup=False)


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


GROUPS = {
    "bench": "Measure on this machine.",
    "evidence": "What scores, proposers and aggregators are worth.",
}
"""Groups of commands and their help: ``bench_training`` is ``bench training``."""

COMMANDS = (
    search,
    aggregate,
    extrapolate,
    plan,
    profile,
    train,
    generate,
    eval_,
    export,
    import_,
    flags,
    bench_training,
    bench_kernels,
    evidence_oracle,
    evidence_regret,
    evidence_agreement,
    evidence_ablation,
    evidence_growth,
    watch,
    report,
    env,
)
"""Every command, in the order in which help lists them; those of a group stand below its name."""
