"""Megatron-core's pipeline schedules, 1F1B and interleaved 1F1B, simulated operation by operation.

A step is a graph. Its nodes are the forward and backward passes of each stage over each micro-batch; its edges are the
order in which a rank runs its passes (`rank_order`, as `megatron.core.pipeline_parallel.schedules` has it) and the
tensors that stages send each other. The step ends when the longest path through the graph ends. Times are whole
numbers, so that every rank of a training run computes the same and comparisons are exact.

How transfers count is Megatron's default for each schedule: under 1F1B sending and receiving hold up the rank, under
the interleaved one (`overlap_p2p_comm`) they run beside its computation and delay only who waits for the tensor.
Left out: that a sender waits where its receiver is late, which can only happen while the pipeline fills or drains.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from composer_megatron.errors import UsageError


class Operation(NamedTuple):
    """One pass of a rank: through which of its chunks, of which micro-batch."""

    backward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Schedule:
    """What runs in a step, on pipeline ranks 0 to ``ranks - 1``.

    Attributes:
        ranks: Pipeline ranks.
        chunks: Stages on each rank; stage ``i`` belongs to rank ``i % ranks``. Above one: the interleaved schedule.
        micro_batches: Micro-batches in a step.
    """

    ranks: int
    chunks: int
    micro_batches: int

    def __post_init__(self) -> None:
        """Refuse what Megatron's schedules refuse."""
        for name, value in vars(self).items():
            if value < 1:
                raise UsageError(f"{name}={value}; expected at least 1")
        if self.chunks > 1 and self.ranks == 1:
            raise UsageError(f"{self.chunks} virtual stages on one pipeline rank; they need at least two ranks")
        if self.chunks > 1 and self.micro_batches % self.ranks:
            raise UsageError(
                f"{self.micro_batches} micro-batches on {self.ranks} pipeline ranks; the interleaved schedule needs a "
                f"multiple of {self.ranks}: change the batch, or use one stage a rank"
            )

    @property
    def stages(self) -> int:
        """Stages in all."""
        return self.ranks * self.chunks


class Simulation(NamedTuple):
    """A simulated step.

    Attributes:
        time: When the last pass ends.
        visits: How often a longest path runs forward through each stage, and backward: stage ``i`` at ``2i, 2i + 1``.
        transfers: What transfers add to that path.
    """

    time: int
    visits: list[int]
    transfers: int


def rank_order(schedule: Schedule, rank: int) -> list[Operation]:
    """The passes of a rank in the order in which it runs them: warm-up, one forward one backward, cool-down."""
    ranks, chunks, count = schedule.ranks, schedule.chunks, schedule.micro_batches
    groups = range(0, count, ranks if chunks > 1 else count)
    width = groups.step
    table = [(chunk, index) for first in groups for chunk in range(chunks) for index in range(first, first + width)]
    forward = [Operation(False, chunk, index) for chunk, index in table]
    backward = [Operation(True, chunks - 1 - chunk, index) for chunk, index in table]
    warmup = ranks - 1 - rank if chunks == 1 else 2 * (ranks - 1 - rank) + (chunks - 1) * ranks
    warmup = min(warmup, len(table))
    steady = [each for pair in zip(forward[warmup:], backward, strict=False) for each in pair]
    return forward[:warmup] + steady + backward[len(table) - warmup :]


@functools.lru_cache(maxsize=256)
def in_flight(schedule: Schedule, rank: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches whose activations a rank holds, by chunk, at its fullest moments.

    A moment is left out if at another one every chunk holds as many; so whatever the chunks' sizes, the peak is here.
    """
    held, moments = [0] * schedule.chunks, set()
    for backward, chunk, _ in rank_order(schedule, rank):
        held[chunk] += -1 if backward else 1
        moments.add(tuple(held))
    return tuple(
        sorted(
            one
            for one in moments
            if not any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in moments)
        )
    )


def held_up(schedule: Schedule, rank: int, previous: Operation, following: Operation) -> int:
    """Transfers that hold up a rank between two of its passes.

    Under 1F1B a rank sends its output and receives its next input before it goes on. Towards the same neighbour both
    are one exchange; forward after forward (or backward after backward) it has to do with both neighbours.
    """
    if schedule.chunks > 1:
        return 0
    after, ahead = int(rank < schedule.ranks - 1), int(rank > 0)
    if previous.backward == following.backward:
        return after + ahead
    return after if following.backward else ahead


class _Node(NamedTuple):
    """A pass in the graph: whose time it takes, and the passes that it waits for, or -1.

    Attributes:
        duration: Index among the stages' times.
        before: The pass before it on its rank.
        holds: Transfers that hold up the rank after that one.
        sender: The pass that its tensor comes from.
        travels: Transfers of that tensor: one, or none.
    """

    duration: int
    before: int
    holds: int
    sender: int
    travels: int


def simulate(schedule: Schedule, durations: Sequence[int], transfer: int = 0) -> Simulation:
    """Run a step.

    Args:
        schedule: What runs.
        durations: Times of stages' passes over a micro-batch: stage ``i`` forward at ``2i``, backward at ``2i + 1``.
        transfer: Time of one tensor from a rank to the next.
    """
    nodes = _graph(schedule)
    ends = [0] * (len(nodes) + 1)  # the last one is what -1 stands for: nothing, which ends at once
    for index, (duration, before, holds, sender, travels) in enumerate(nodes):
        free, arrived = ends[before] + holds * transfer, ends[sender] + travels * transfer
        ends[index] = (free if free >= arrived else arrived) + durations[duration]
    time, visits = max(ends), [0] * (2 * schedule.stages)
    index = ends.index(time)
    while index >= 0:
        duration, before, holds, sender, travels = nodes[index]
        visits[duration] += 1
        free, arrived = ends[before] + holds * transfer, ends[sender] + travels * transfer
        index = before if free >= arrived else sender
    computing = sum(count * duration for count, duration in zip(visits, durations, strict=True))
    return Simulation(time, visits, time - computing)


@functools.lru_cache(maxsize=32)
def _graph(schedule: Schedule) -> tuple[_Node, ...]:
    """All passes of a step, each after those that it waits for."""
    orders = [rank_order(schedule, rank) for rank in range(schedule.ranks)]
    done: dict[tuple[bool, int, int], int] = {}
    nodes: list[_Node] = []
    position, last = [0] * schedule.ranks, [-1] * schedule.ranks
    while len(nodes) < sum(map(len, orders)):
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                operation = order[position[rank]]
                stage = operation.chunk * schedule.ranks + rank
                source = stage + (1 if operation.backward else -1)
                key = (operation.backward, source, operation.micro_batch)
                received = 0 <= source < schedule.stages
                if received and key not in done:
                    break
                previous = order[position[rank] - 1] if position[rank] else None
                holds = 0 if previous is None else held_up(schedule, rank, previous, operation)
                sender = done[key] if received else -1
                nodes.append(_Node(2 * stage + operation.backward, last[rank], holds, sender, int(received)))
                done[operation.backward, stage, operation.micro_batch] = last[rank] = len(nodes) - 1
                position[rank] += 1
    return tuple(nodes)
