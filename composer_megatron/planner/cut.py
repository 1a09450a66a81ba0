"""What there is to cut: a row of blocks, the stages of a pipeline, and what a cut then takes in time and memory.

The objective is the step time of `composer_megatron.planner.schedule.simulate`, nothing simpler. Every path through the
schedule's graph bounds it from below, for every cut, by a sum over stages; both searches rest on that: `cut_exact`
under 1F1B, `cut_interleaved` where ranks hold several stages.

All times are whole numbers below 2^53, so that sums of them in doubles are exact and every machine finds the same cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from composer_megatron.errors import UsageError
from composer_megatron.planner.schedule import Schedule, in_flight, simulate

type Array = NDArray[np.float64]
type Borders = NDArray[np.intp]
"""For each cut the sums of the block counts before each stage, and the number of blocks: (…, stages + 1)."""


class Unit(NamedTuple):
    """What a block, the embedding or the loss head costs a rank.

    Attributes:
        forward: Time over a micro-batch.
        backward: Time over a micro-batch.
        state: Bytes of weights, gradients and optimizer state.
        kept: Bytes kept for the backward pass of a micro-batch.
    """

    forward: int = 0
    backward: int = 0
    state: int = 0
    kept: int = 0


_NOTHING = Unit()


@dataclass(frozen=True)
class CutProblem:
    """What is to be cut, for which schedule.

    Attributes:
        schedule: Ranks, chunks, micro-batches.
        blocks: The blocks, in order.
        first: What the first stage bears besides blocks: the embedding.
        last: What the last stage bears besides blocks: the loss head.
        transfer: Time of one tensor between neighbouring ranks.
        input_bytes: What a stage without blocks keeps of a micro-batch: its input.
        reserve: Bytes of a rank that depend on no cut.
        memory_limit: Bytes that no rank may exceed; None for no limit.
        sums: `Unit`'s fields summed over the blocks before each border, (4, blocks + 1).
    """

    schedule: Schedule
    blocks: tuple[Unit, ...]
    first: Unit = _NOTHING
    last: Unit = _NOTHING
    transfer: int = 0
    input_bytes: int = 0
    reserve: int = 0
    memory_limit: int | None = None
    sums: Array = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse more stages than blocks."""
        stages, blocks = self.schedule.stages, len(self.blocks)
        if stages > blocks:
            raise UsageError(f"{stages} pipeline stages for {blocks} blocks: use at most {blocks} stages")
        rows = np.array([(0, 0, 0, 0), *self.blocks], dtype=np.float64)
        object.__setattr__(self, "sums", rows.cumsum(axis=0).T.copy())

    def spans(self, name: str, borders: Borders) -> Array:
        """Sums of one of `Unit`'s fields over stages, (…, stages), between borders (…, stages + 1)."""
        index = Unit._fields.index(name)
        sums = self.sums[index][borders]
        spans: Array = sums[..., 1:] - sums[..., :-1]
        if name == "kept":
            spans = np.where(borders[..., 1:] == borders[..., :-1], self.input_bytes, spans)
        spans[..., 0] += self.first[index]
        spans[..., -1] += self.last[index]
        return spans

    def durations(self, borders: Borders) -> Array:
        """Times of the stages' passes as `simulate` takes them, (…, 2 · stages)."""
        pair = np.stack([self.spans("forward", borders), self.spans("backward", borders)], axis=-1)
        return pair.reshape(*pair.shape[:-2], -1)

    def time(self, borders: Borders) -> int:
        """Step time of one cut."""
        return simulate(self.schedule, self.durations(borders).astype(int).tolist(), self.transfer).time

    def memory(self, borders: Borders) -> Array:
        """Peak bytes of each rank, (…, ranks)."""
        schedule = self.schedule
        shape = (*borders.shape[:-1], schedule.chunks, schedule.ranks)
        state = self.spans("state", borders).reshape(shape).sum(axis=-2)
        kept = self.spans("kept", borders).reshape(shape)
        peaks = [
            (kept[..., rank] @ np.array(in_flight(schedule, rank), dtype=np.float64).T).max(axis=-1)
            for rank in range(schedule.ranks)
        ]
        return self.reserve + state + np.stack(peaks, axis=-1)

    def busy(self, borders: Borders) -> NDArray[np.bool_]:
        """Which cuts give every rank something: a block, the embedding or the loss head."""
        chunks, ranks = self.schedule.chunks, self.schedule.ranks
        counts = np.diff(borders, axis=-1).reshape(*borders.shape[:-1], chunks, ranks).sum(axis=-2)
        busy: NDArray[np.bool_] = (counts[..., 1 : ranks - 1] > 0).all(axis=-1)
        return busy

    def allowed(self, borders: Borders) -> NDArray[np.bool_]:
        """Which cuts leave no rank idle and keep the memory limit."""
        if self.memory_limit is None:
            return self.busy(borders)
        return self.busy(borders) & (self.memory(borders).max(axis=-1) <= self.memory_limit)


class Cut(NamedTuple):
    """A cut that was found.

    Attributes:
        counts: Blocks in each stage.
        time: Its step time.
        bound: No cut has a shorter step time than this; equal to `time` where the cut is proven best.
    """

    counts: list[int]
    time: int
    bound: int

    @classmethod
    def at(cls, borders: Borders, time: float, bound: float) -> Cut:
        """The cut with these borders."""
        return cls([int(count) for count in np.diff(borders)], int(time), int(min(time, bound)))


def equal_counts(blocks: int, stages: int) -> list[int]:
    """Block counts as equal as can be, earlier stages first: the cut that ignores what blocks cost."""
    size, extra = divmod(blocks, stages)
    return [size + (stage < extra) for stage in range(stages)]


def borders_of(counts: Sequence[int]) -> Borders:
    """The borders of a cut: the sums of the counts before each stage, and the number of blocks."""
    return np.array([0, *itertools.accumulate(counts)], dtype=np.intp)


def no_room(problem: CutProblem, memory: Array, *, proven: bool) -> UsageError:
    """The error where no cut keeps the limit; `memory` is what the ranks hold in the cut that needs least."""
    rank = int(memory.argmax())
    least = f"the least {'possible' if proven else 'found'} is {memory[rank] / 1e9:.2f} GB, on pipeline rank {rank}"
    return UsageError(
        f"no cut keeps every rank within {(problem.memory_limit or 0) / 1e9:.2f} GB: {least}; "
        "use more ranks, a smaller micro-batch or recomputation"
    )
