"""Where to cut a sequence into pipeline stages, and what a training run laid out so takes in time and memory.

Blocks differ in cost (at 1B an MLP has five times the weights of an attention block) and the last stage bears the loss
head, so equal counts make unequal stages. The cut minimises the simulated time of Megatron-core's 1F1B or interleaved
schedule under a limit on each rank's memory: exactly under 1F1B (`composer_megatron.planner.cut_exact`), with a proven
bound under the interleaved one (`composer_megatron.planner.cut_interleaved`).

A stage may be left without blocks, where that pays: `CompositeStack` is right there (Megatron's own stack is not).
Every rank has at least one block, the embedding or the loss head.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout
from composer_megatron.pattern import hybrid_pattern
from composer_megatron.planner import memory
from composer_megatron.planner.cut import Cut, CutProblem, Unit, borders_of, equal_counts
from composer_megatron.planner.cut_exact import ExactCut
from composer_megatron.planner.cut_interleaved import interleaved_cut
from composer_megatron.planner.memory import Holding
from composer_megatron.planner.schedule import in_flight
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.roofline import DEVICES, Device, Passes, UnitTimes, multi_token_prediction, predict
from composer_megatron.roofline import transfer_seconds as predict_transfer
from composer_megatron.sequence import CompositeSequence

_TICKS = 1e12
"""Whole numbers of picoseconds, so that every rank of a run computes the same cut."""

__all__ = ["Layout", "Plan", "Stage", "cut_sequence", "equal_counts", "plan"]


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of a plan, as one of its tensor-parallel ranks sees it.

    Attributes:
        rank: The pipeline rank that holds it.
        blocks: Its blocks as runs, such as ``2A1M``; empty for a stage without blocks.
        flops_per_token: Training FLOPs of its blocks and, on the last stage, of the output layer.
        params_per_rank: Parameters a rank holds, embedding and output layer included.
        state_bytes: Weights, gradients and optimizer state of a rank.
        activation_bytes: What it keeps for the backward passes of its micro-batches when its rank keeps most.
        forward_seconds: A forward pass over a micro-batch.
        backward_seconds: A backward pass over a micro-batch.
    """

    rank: int
    blocks: str
    flops_per_token: int
    params_per_rank: int
    state_bytes: int
    activation_bytes: int
    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True)
class Plan:
    """A cut, and what follows from it.

    Attributes:
        architecture: What is trained.
        layout: On which ranks.
        times: Seconds of each kind of block.
        device: Whose links and memory bandwidth count; None where there is none to predict from.
        problem: What was cut.
        cut: The cut.
        multi_token: The blocks of a depth of multi-token prediction on the last stage, if any.
    """

    architecture: Architecture
    layout: Layout
    times: UnitTimes
    device: Device | None
    problem: CutProblem
    cut: Cut
    multi_token: CompositeSequence | None = None

    @property
    def seconds(self) -> float:
        """Simulated time of the schedule: all passes of a step, without the optimizer."""
        return self.cut.time / _TICKS

    @cached_property
    def seconds_equal_split(self) -> float:
        """The same with equal block counts, Megatron's own split."""
        schedule = self.problem.schedule
        return self.problem.time(borders_of(equal_counts(len(self.problem.blocks), schedule.stages))) / _TICKS

    def bubble(self, seconds: float) -> float:
        """Share of the ranks' time in which they compute nothing, if the schedule takes that long."""
        schedule = self.problem.schedule
        work = sum(stage.forward_seconds + stage.backward_seconds for stage in self.stages)
        return max(0.0, 1 - schedule.micro_batches * work / schedule.ranks / seconds)

    @cached_property
    def stages(self) -> list[Stage]:
        """Every stage, in order."""
        problem, layout = self.problem, self.layout
        borders = borders_of(self.cut.counts)
        spans = {name: problem.spans(name, borders) for name in Unit._fields}
        flying = np.concatenate([self._in_flight(rank, spans["kept"]) for rank in range(problem.schedule.ranks)])
        flying = flying.reshape(problem.schedule.ranks, -1).T.ravel()
        letters = self.architecture.sequence.letters
        texts = [letters[start:end] for start, end in itertools.pairwise(borders)]
        params = self._parameters(texts)
        return [
            Stage(
                rank=index % problem.schedule.ranks,
                blocks="".join(f"{len(list(run))}{letter}" for letter, run in itertools.groupby(text)),
                flops_per_token=self._flops(text, last=index == len(texts) - 1),
                params_per_rank=params[index],
                state_bytes=memory.state_bytes(params[index], layout),
                activation_bytes=int(spans["kept"][index] * flying[index]),
                forward_seconds=float(spans["forward"][index]) / _TICKS,
                backward_seconds=float(spans["backward"][index]) / _TICKS,
            )
            for index, text in enumerate(texts)
        ]

    @cached_property
    def memory_bytes(self) -> list[int]:
        """Peak of each pipeline rank."""
        return [int(peak) for peak in self.problem.memory(borders_of(self.cut.counts))]

    @property
    def params_per_rank(self) -> list[int]:
        """Parameters of each pipeline rank."""
        ranks = self.problem.schedule.ranks
        return [sum(stage.params_per_rank for stage in self.stages[rank::ranks]) for rank in range(ranks)]

    @property
    def balance(self) -> float:
        """Mean over maximum of the ranks' computing time; 1 where all compute as long."""
        ranks = self.problem.schedule.ranks
        return self._balance(borders_of(self.cut.counts), ranks)

    @property
    def balance_equal_split(self) -> float:
        """The same with equal block counts."""
        schedule = self.problem.schedule
        return self._balance(borders_of(equal_counts(len(self.problem.blocks), schedule.stages)), schedule.ranks)

    @property
    def pattern(self) -> str:
        """Megatron's hybrid layer pattern: its alphabet, a bar between stages, prediction depths after a slash."""
        stages = hybrid_pattern(self.architecture.sequence, self.cut.counts)
        depth = hybrid_pattern(self.multi_token) if self.multi_token else ""
        return f"{stages}/{depth}" if depth else stages

    def _balance(self, borders: Any, ranks: int) -> float:
        durations = self.problem.durations(borders).reshape(-1, ranks, 2).sum(axis=(0, 2))
        return float(durations.mean() / durations.max())

    def _in_flight(self, rank: int, kept: Any) -> Any:
        """Micro-batches that each chunk of a rank holds when the rank's activations are largest."""
        moments = np.array(in_flight(self.problem.schedule, rank))
        return moments[(moments @ kept[rank :: self.problem.schedule.ranks]).argmax()]

    def _flops(self, letters: str, *, last: bool) -> int:
        shape, seq_len = self.architecture.shape, self.layout.seq_len
        rows = [PRIMITIVES[letter] for letter in letters]
        flops = sum(6 * row.active_parameters(shape) + 3 * row.mixing_flops(shape, seq_len) // 2 for row in rows)
        return flops + (6 * shape.vocab_size * shape.hidden_size if last else 0)

    def _parameters(self, texts: list[str]) -> list[int]:
        shape, layout = self.architecture.shape, self.layout
        counts = [sum(memory.block(PRIMITIVES[letter], shape, layout).parameters for letter in text) for text in texts]
        counts[0] += memory.embedding(shape, layout).parameters
        counts[-1] += memory.head(shape, layout).parameters
        if self.multi_token is not None:
            counts[-1] += memory.multi_token_prediction(self.multi_token, shape, layout).parameters
        return counts


def plan(
    architecture: Architecture,
    layout: Layout,
    *,
    device: Device | None = DEVICES["h100"],
    times: UnitTimes | None = None,
    memory_limit: float | None = None,
    multi_token: CompositeSequence | None = None,
    quick: bool = False,
) -> Plan:
    """The best cut of an architecture for a layout.

    Args:
        architecture: What is trained.
        layout: On which ranks.
        device: Predicts times and transfers; None where `times` are measured and transfers are to cost nothing.
        times: Measured times of blocks; by default the device's roofline.
        memory_limit: Bytes that no rank may exceed.
        multi_token: Blocks of a depth of multi-token prediction on the last stage.
        quick: A shorter search under the interleaved schedule, without a bound.

    Raises:
        UsageError: If the layout does not fit, no cut keeps the memory limit, or there is nothing to take times from.
    """
    layout.check(architecture)
    if times is None:
        if device is None:
            raise UsageError("no device and no profile: there is nothing to take the blocks' times from")
        times = predict(architecture, layout, device)
    problem = _problem(architecture, layout, times, device, memory_limit, multi_token)
    cut = ExactCut(problem).solve() if layout.virtual_stages == 1 else interleaved_cut(problem, quick=quick)
    return Plan(architecture, layout, times, device, problem, cut, multi_token)


def cut_sequence(architecture: Architecture, ranks: int, *, virtual_stages: int = 1, seq_len: int = 4096) -> list[int]:
    """Block counts of each pipeline stage, in order: the cut that `plan` makes for an H100 and 4 micro-batches a rank.

    It depends on nothing else, so that every rank of a run, and a run that goes on elsewhere, makes the same.

    Args:
        architecture: What is trained.
        ranks: Pipeline ranks.
        virtual_stages: Stages on each rank; stage ``i`` belongs to rank ``i % ranks``.
        seq_len: Tokens in a sequence.

    Raises:
        UsageError: If there are more stages than blocks.
    """
    layout = Layout(pipeline_parallel=ranks, virtual_stages=virtual_stages, seq_len=seq_len)
    return plan(architecture, layout).cut.counts


def _problem(
    architecture: Architecture,
    layout: Layout,
    times: UnitTimes,
    device: Device | None,
    memory_limit: float | None,
    multi_token: CompositeSequence | None,
) -> CutProblem:
    shape = architecture.shape

    def unit(passes: Passes, holding: Holding) -> Unit:
        forward, backward = (round(seconds * _TICKS) for seconds in passes)
        return Unit(forward, backward, memory.state_bytes(holding.parameters, layout), holding.kept)

    kinds = {
        letter: unit(times.blocks[letter], memory.block(PRIMITIVES[letter], shape, layout))
        for letter in architecture.sequence.counts
    }
    last = unit(times.head, memory.head(shape, layout))
    if multi_token is not None:
        if device is None or not times.predicted:
            raise UsageError("a profile has no times for multi-token prediction: leave one of them out")
        passes = multi_token_prediction(multi_token, architecture, layout, device)
        depth = unit(passes, memory.multi_token_prediction(multi_token, shape, layout))
        last = Unit(*(a + b for a, b in zip(last, depth, strict=True)))
    transfer = predict_transfer(architecture, layout, device) if device else 0.0
    return CutProblem(
        schedule=layout.schedule,
        blocks=tuple(kinds[letter] for letter in architecture.sequence),
        first=unit(times.embedding, memory.embedding(shape, layout)),
        last=last,
        transfer=round(transfer * _TICKS),
        input_bytes=memory.input_bytes(shape, layout),
        reserve=memory.working_bytes(architecture, layout),
        memory_limit=None if memory_limit is None else int(memory_limit),
    )
