"""``plan`` and ``profile``: what an architecture costs, and how its pipeline is cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from tyro.conf import Positional

from composer_megatron.architecture import Architecture
from composer_megatron.commands.options import multiply_on_one_thread, read_architecture
from composer_megatron.display import console, print_costs, print_json, print_layouts, print_stages, print_table
from composer_megatron.errors import UsageError
from composer_megatron.files import write_json
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape

if TYPE_CHECKING:
    from composer_megatron.roofline import Device


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
    multiply_on_one_thread()
    from composer_megatron import pipeline
    from composer_megatron.layout import Layout, micro_batches_in
    from composer_megatron.planner import estimate
    from composer_megatron.planner.profile import Profile
    from composer_megatron.roofline import get_device

    architecture = read_architecture(source, shape)
    if memory_limit is not None and not memory_limit > 0:
        raise UsageError(f"--memory-limit {memory_limit}; expected GB, more than 0")
    limit = None if memory_limit is None else memory_limit * 1e9
    if gpus is not None:
        _refuse_beside_gpus(
            gpus,
            *(("tp", tp, 1), ("pp", pp, 1), ("vpp", vpp, 1), ("cp", cp, 1), ("dp", dp, 1)),
            *(("micro-batch-size", micro_batch_size, 1), ("micro-batches", micro_batches, None)),
            *(("recompute", recompute, "none"), ("sequence-parallel", sequence_parallel, False)),
            *(("distributed-optimizer", distributed_optimizer, False), ("profile", profile, None), ("mtp", mtp, None)),
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


def _refuse_beside_gpus(gpus: int, *options: tuple[str, Any, Any]) -> None:
    """Refuse options that decide what --gpus compares; each is its name, its value and its default."""
    for name, value, default in options:
        if value != default:
            given = f"--{name}" if value is True else f"--{name} {value}"
            raise UsageError(f"{given} beside --gpus {gpus}, which compares layouts: leave one of them out")


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
    from composer_megatron.planner import estimate
    from composer_megatron.planner.survey import survey

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


def profile(
    output: Positional[Path],
    *,
    shape: str = "demo",
    primitives: str = "AM",
    seq_len: int = 512,
    micro_batch_size: int = 1,
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Measure forward and backward passes of each kind of block on this machine, for plan --profile.

    Args:
        output: The profile to write.
        shape: A preset or a JSON file.
        primitives: Letters of the blocks to measure.
        seq_len: Tokens in a sequence.
        micro_batch_size: Sequences in the micro-batch.
        repeats: Timed passes of each; the median counts.
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.planner.profile import measure
    from composer_megatron.quiet import hush_imports

    hush_imports()
    letters = CompositeSequence.parse(primitives).letters
    sizes = {"seq_len": seq_len, "micro_batch_size": micro_batch_size, "repeats": repeats}
    found = measure(load_shape(shape), letters, **sizes)
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
    print_table(table)
    console.print(f"written to {output}")
