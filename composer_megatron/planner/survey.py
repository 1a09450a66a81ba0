"""Compare the layouts of a number of GPUs on paper: which fit into memory, and which of them train fastest.

Every product of parallel sizes that gives the number of GPUs and fits the architecture is a candidate, with and without
full recomputation. They are ranked by a bound that needs no cut (an even share of the work, and the schedule's bubble
where all stages are equal); the best are then cut and simulated as `composer_megatron.pipeline.plan` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout
from composer_megatron.pipeline import Plan, plan
from composer_megatron.planner import memory
from composer_megatron.planner.estimate import estimate
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.roofline import Device, predict

_SIMULATED = 24
"""Layouts that are cut and simulated."""

_STEP_TOKENS = 4 * 2**20


def survey(
    architecture: Architecture,
    gpus: int,
    device: Device,
    *,
    seq_len: int = 4096,
    global_batch_size: int | None = None,
    memory_limit: float | None = None,
    most: int = 10,
) -> list[Plan]:
    """The layouts that are expected to train fastest, best first.

    Sequence parallelism goes with tensor parallelism, the distributed optimizer with replicas.

    Args:
        architecture: What is trained.
        gpus: How many there are.
        device: Which.
        seq_len: Tokens in a sequence.
        global_batch_size: Sequences in a step; by default `default_batch`.
        memory_limit: Bytes that no rank may exceed; by default nine tenths of the device's.
        most: How many to return.

    Raises:
        UsageError: If no layout fits.
    """
    if gpus < 1:
        raise UsageError(f"gpus={gpus}; expected at least 1")
    batch = global_batch_size or default_batch(gpus, seq_len)
    limit = 0.9 * device.memory if memory_limit is None else memory_limit
    candidates = list(_layouts(architecture, gpus, device, seq_len, batch))
    if not candidates:
        raise UsageError(
            f"no layout of {gpus} GPUs fits {architecture.sequence.notation} at a global batch of {batch}: "
            "its widths, its blocks and the batch must divide; try another number of GPUs, or --global-batch-size"
        )
    least = {layout: _least_memory(architecture, layout) for layout in candidates}
    roomy = [layout for layout in candidates if least[layout] <= limit]
    if not roomy:
        smallest = min(candidates, key=least.__getitem__)
        raise UsageError(
            f"no layout of {gpus} GPUs keeps {limit / 1e9:.1f} GB: the least needs {least[smallest] / 1e9:.1f} GB "
            f"on some GPU ({smallest}); use more GPUs, or a larger limit"
        )
    roomy.sort(key=lambda layout: _hoped_seconds(architecture, layout, device))
    plans: list[Plan] = []
    for layout in roomy:
        try:
            plans.append(plan(architecture, layout, device=device, memory_limit=limit, quick=True))
        except UsageError:  # its fullest rank has no room, however it is cut
            continue
        if len(plans) == _SIMULATED:
            break
    if not plans:
        raise UsageError(f"no layout of {gpus} GPUs keeps every rank within {limit / 1e9:.1f} GB; use more GPUs")
    return sorted(plans, key=lambda found: estimate(found).seconds)[:most]


def default_batch(gpus: int, seq_len: int) -> int:
    """Sequences in a step where nothing is said: about 4 million tokens, a whole number for each GPU."""
    return gpus * max(1, round(_STEP_TOKENS / seq_len / gpus))


def _layouts(architecture: Architecture, gpus: int, device: Device, seq_len: int, batch: int) -> Iterator[Layout]:
    doubling = [2**power for power in range(5)]
    sizes = itertools.product(doubling[:4], doubling, doubling)
    for tensor, context, stages in sizes:
        if gpus % (tensor * context * stages):
            continue
        data = gpus // (tensor * context * stages)
        for virtual, micro in itertools.product((1, 2, 4) if stages > 1 else (1,), (1, 2, 4, 8)):
            if batch % (micro * data) or (context > 1 and micro > 1):
                continue  # to split several sequences among ranks is what data parallelism does, for less
            for recompute in ("none", "full"):
                try:
                    layout = Layout(
                        tensor_parallel=tensor,
                        pipeline_parallel=stages,
                        virtual_stages=virtual,
                        context_parallel=context,
                        data_parallel=data,
                        micro_batch_size=micro,
                        micro_batches=batch // (micro * data),
                        seq_len=seq_len,
                        sequence_parallel=tensor > 1,
                        distributed_optimizer=context * data > 1,
                        recompute=recompute,
                    )
                    layout.check(architecture)
                except UsageError:  # it does not divide
                    continue
                yield layout


def _least_memory(architecture: Architecture, layout: Layout) -> float:
    """Bytes that some rank holds at least: an even share of the weights, one micro-batch of one rank's blocks."""
    shape = architecture.shape
    blocks = [memory.block(PRIMITIVES[letter], shape, layout) for letter in architecture.sequence]
    ends = [memory.embedding(shape, layout), memory.head(shape, layout)]
    states = memory.state_bytes(sum(part.parameters for part in (*blocks, *ends)), layout)
    kept = sum(part.kept for part in blocks)
    return (states + kept) / layout.pipeline_parallel + memory.working_bytes(architecture, layout)


def _hoped_seconds(architecture: Architecture, layout: Layout, device: Device) -> float:
    """Seconds of a step if its stages were equal."""
    times = predict(architecture, layout, device)
    work = sum(sum(times.blocks[letter]) for letter in architecture.sequence) + sum(times.embedding) + sum(times.head)
    schedule = layout.schedule
    return work / schedule.ranks * (schedule.micro_batches + (schedule.ranks - 1) / schedule.chunks)
