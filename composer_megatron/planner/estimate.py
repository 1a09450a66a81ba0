"""What a planned training step is expected to take in all: schedule, data-parallel communication, optimizer.

Estimates, not measurements; `assumptions` says what they rest on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from composer_megatron.errors import UsageError
from composer_megatron.pipeline import Plan
from composer_megatron.planner import memory
from composer_megatron.planner.cut import borders_of, equal_counts
from composer_megatron.planner.cut_exact import ExactCut
from composer_megatron.planner.schedule import Schedule
from composer_megatron.roofline import EFFICIENCY, LINK_EFFICIENCY, ring_seconds

_OPTIMIZER_TRAFFIC = 38
"""Bytes a parameter: gradient, fp32 copy and moments read; copy, moments and bf16 weight written; norm and zeroing."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step by part, each of the rank that takes longest.

    Attributes:
        schedule: All passes over all micro-batches: the simulated pipeline.
        gradients: What of the gradients' reduction over replicas the last backward passes do not hide.
        parameters: What of the distributed optimizer's gathering of weights the next forward passes do not hide.
        tied_embedding: Summing the tied embedding's gradients of first and last stage.
        optimizer: The optimizer's own traffic with memory.
    """

    schedule: float
    gradients: float
    parameters: float
    tied_embedding: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(vars(self).values())


def estimate(plan: Plan) -> Estimate:
    """The parts of a step."""
    if plan.device is None:
        return Estimate(plan.seconds, 0.0, 0.0, 0.0, 0.0)
    layout, device, shape = plan.layout, plan.device, plan.architecture.shape
    ranks = plan.problem.schedule.ranks
    params = plan.params_per_rank
    bandwidth = device.link(layout.tensor_parallel * layout.replicas)
    reductions = 1 if layout.distributed_optimizer else 2  # a reduce-scatter, or an all-reduce
    gradients = [reductions * ring_seconds(4 * count, layout.replicas, bandwidth) for count in params]
    gathers = [ring_seconds(2 * count, layout.replicas, bandwidth) * layout.distributed_optimizer for count in params]
    backward = [sum(stage.backward_seconds for stage in plan.stages[rank::ranks]) for rank in range(ranks)]
    forward = [sum(stage.forward_seconds for stage in plan.stages[rank::ranks]) for rank in range(ranks)]
    tied = shape.tied_embeddings and ranks > 1
    embedding = 4 * memory.embedding(shape, layout).parameters * tied
    shared = layout.replicas if layout.distributed_optimizer else 1
    return Estimate(
        schedule=plan.seconds,
        gradients=max(max(0.0, a - b) for a, b in zip(gradients, backward, strict=True)),
        parameters=max(max(0.0, a - b) for a, b in zip(gathers, forward, strict=True)),
        tied_embedding=2 * ring_seconds(embedding, 2, device.link(layout.ranks)),
        optimizer=_OPTIMIZER_TRAFFIC * max(params) / shared / device.copy,
    )


def summary(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values: counts, cut, stages, and what its step is expected to take.

    ``step_time`` is in seconds. A bubble is the share of the pipeline ranks' time, during the schedule, in which they
    compute nothing (communication that a block waits for counts as its computation).
    """
    architecture, layout, schedule = plan.architecture, plan.layout, plan.problem.schedule
    parts = estimate(plan)
    tokens = layout.global_batch_size * layout.seq_len / parts.seconds
    flops = architecture.flops_per_token(layout.seq_len) * tokens / layout.ranks
    return {
        **architecture.summary(layout.seq_len),
        "shape": architecture.shape.name,
        "vocab_size": architecture.shape.vocab_size,
        "seq_len": layout.seq_len,
        "layout": str(layout),
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_parallel": layout.pipeline_parallel,
        "virtual_stages": layout.virtual_stages,
        "context_parallel": layout.context_parallel,
        "data_parallel": layout.data_parallel,
        "ranks": layout.ranks,
        "micro_batch_size": layout.micro_batch_size,
        "micro_batches": schedule.micro_batches,
        "global_batch_size": layout.global_batch_size,
        "recompute": layout.recompute,
        "sequence_parallel": layout.sequence_parallel,
        "distributed_optimizer": layout.distributed_optimizer,
        "pattern": plan.pattern,
        "stages": [vars(stage) for stage in plan.stages],
        "step_time": parts.seconds,
        "step_time_parts": vars(parts),
        "schedule_time_at_least": plan.cut.bound / plan.cut.time * parts.schedule if plan.cut.bound else None,
        "schedule_time_equal_split": plan.seconds_equal_split,
        "bubble": plan.bubble(plan.seconds),
        "bubble_equal_split": plan.bubble(plan.seconds_equal_split),
        "balance": plan.balance,
        "balance_equal_split": plan.balance_equal_split,
        "params_per_rank": plan.params_per_rank,
        "memory_bytes": plan.memory_bytes,
        "tokens_per_second": tokens,
        "tokens_per_second_per_gpu": tokens / layout.ranks,
        "mfu": flops / plan.device.peak if plan.device else None,
        "times": plan.times.source,
        "notes": notes(plan),
        "assumes": assumptions(plan),
    }


def notes(plan: Plan) -> list[str]:
    """What to know about a plan: whether equal counts would fit, whether the interleaved schedule is the faster one."""
    problem, said = plan.problem, []
    fullest = problem.memory(borders_of(equal_counts(len(problem.blocks), problem.schedule.stages))).max()
    if problem.memory_limit is not None and fullest > problem.memory_limit:
        said.append(f"equal block counts would need {fullest / 1e9:.2f} GB, more than the limit")
    return said + _interleaving(plan)


def _interleaving(plan: Plan) -> list[str]:
    layout = plan.layout
    if layout.virtual_stages == 1:
        return []
    plain = dataclasses.replace(
        plan.problem, schedule=Schedule(layout.pipeline_parallel, 1, layout.schedule.micro_batches)
    )
    try:
        other = ExactCut(plain).solve().time / plan.cut.time * plan.seconds
    except UsageError:  # one stage a rank keeps no memory limit
        return []
    if other >= plan.seconds:
        return []
    return [
        f"one stage a rank is faster: {other * 1e3:,.1f} ms, not {plan.seconds * 1e3:,.1f} ms; interleaved, all ranks "
        "wait for the stage with the loss head in each of its turns (--vpp 1)"
    ]


def assumptions(plan: Plan) -> list[str]:
    """What the estimates rest on, of what matters to this plan."""
    layout, device, schedule = plan.layout, plan.device, plan.problem.schedule
    said = ["bf16 weights, fp32 gradients and Adam state; no fragmentation, no buffers of CUDA and NCCL"]
    if plan.times.predicted and device is not None:
        said.append(
            f"blocks at {EFFICIENCY:.0%} of {device.gemm / 1e12:.0f} TFLOP/s in products, "
            f"{device.attention_forward / 1e12:.0f} and {device.attention_backward / 1e12:.0f} in attention forward "
            f"and backward, {device.copy / 1e12:.2f} TB/s elsewhere (predicted, not measured)"
        )
    if device is None:
        said.append("transfers, data-parallel communication and the optimizer cost nothing: no device to predict from")
    elif layout.ranks > 1:
        said.append(
            f"nodes of {device.node_size}, ranks in Megatron's order tp-cp-dp-pp, links at {LINK_EFFICIENCY:.0%} of "
            f"{device.node / 1e9:.0f} GB/s inside a node and {device.network / 1e9:.0f} GB/s a GPU between nodes"
        )
    if layout.tensor_parallel > 1:
        said.append("tensor-parallel collectives exposed, but for those beside the weight gradients' products")
    if layout.context_parallel > 1:
        said.append("keys and values go round the context-parallel ranks beside the core attention")
    if layout.replicas > 1:
        said.append(
            "gradients are reduced beside a rank's last backward passes, weights gathered beside the first forward"
        )
    if schedule.ranks > 1:
        how = "beside computation" if schedule.chunks > 1 else "holding up both ranks"
        said.append(f"stages send each other hidden states {how}")
    if not all(stage.blocks for stage in plan.stages):
        said.append("CompositeStack runs the stages without blocks: Megatron's own stack gives wrong gradients there")
    if layout.recompute == "selective":
        said.append("selective recomputation is of the core attention, whose inputs stay in memory")
    return said
