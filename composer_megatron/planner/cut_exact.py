"""The best cut under 1F1B, where each rank holds one stage: exact, by dynamic programming.

For each stage, four paths that dwell on it depend on the cut through its own two borders alone, so a dynamic programme
finds the least possible worst of them, for every way to go on. Best-first search over cuts with that as its bound ends
when no open cut can beat the best simulated one: then that one is proven best. The search has a limit on its work; only
where it is reached (the bound being loose) a better cut may exist, and `Cut.bound` says by how much at most.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from composer_megatron.planner.cut import Array, Cut, CutProblem, Unit, no_room
from composer_megatron.planner.schedule import held_up, in_flight, rank_order

_SIMULATED_PASSES = 600_000
"""Work limit of a search, in passes simulated: about half a second."""


class ExactCut:
    """Exact search under 1F1B: a rank is a stage."""

    def __init__(self, problem: CutProblem) -> None:
        self.problem, self.schedule = problem, problem.schedule
        self.size = len(problem.blocks)
        self.starts, self.ends = np.indices((self.size + 1, self.size + 1))
        self.costs = [self._costs(stage) for stage in range(self.schedule.ranks)]
        # worst[stage][start]: the least possible worst cost of that stage and those after it.
        self.worst = _least_worst(self.costs)

    def solve(self) -> Cut:
        """Best-first search; the open cut of least bound comes next, of equal ones the longer."""
        bound = float(self.worst[0][0])
        if bound == np.inf:
            raise no_room(self.problem, self._least_memory(), proven=True)
        order = itertools.count()
        heap: list[tuple[float, int, int, tuple[int, ...]]] = [(bound, 0, next(order), (0,))]
        best: tuple[int, ...] = (0,)
        best_time = np.inf
        passes = 2 * self.schedule.ranks * self.schedule.micro_batches
        budget = max(20, _SIMULATED_PASSES // passes)
        while heap and heap[0][0] < best_time and budget > 0:
            bound, _, _, borders = heapq.heappop(heap)
            if len(borders) > self.schedule.ranks:
                time = self.problem.time(np.array(borders, dtype=np.intp))
                budget -= 1
                if time < best_time:
                    best, best_time = borders, time
                continue
            for after, end in self._children(borders, bound, best_time):
                heapq.heappush(heap, (after, -len(borders), next(order), (*borders, end)))
        bound = min(best_time, heap[0][0]) if heap else best_time
        return Cut.at(np.array(best, dtype=np.intp), best_time, bound)

    def _children(self, borders: tuple[int, ...], bound: float, best_time: float) -> Iterator[tuple[float, int]]:
        """Where the next stage may end, those first that leave it nearest to an even share of the work."""
        stage, start = len(borders) - 1, borders[-1]
        later = self.worst[stage + 1]
        bounds = np.maximum(np.maximum(self.costs[stage][start], later), bound)
        work = self.problem.sums[:2].sum(axis=0)
        share = work[start] + (work[-1] - work[start]) / (self.schedule.ranks - stage)
        for end in np.argsort(np.abs(work - share), kind="stable"):
            if bounds[end] < best_time:
                yield float(bounds[end]), int(end)

    def _spans(self, name: str, stage: int) -> Array:
        """A field's sums over all spans of blocks, (start, end), as that stage would hold them."""
        index = Unit._fields.index(name)
        sums = self.problem.sums[index]
        spans: Array = sums[None, :] - sums[:, None]
        if name == "kept":
            spans = np.where(self.starts == self.ends, self.problem.input_bytes, spans)
        spans += self.problem.first[index] * (stage == 0)
        return spans + self.problem.last[index] * (stage == self.schedule.ranks - 1)

    def _costs(self, stage: int) -> Array:
        """The longest of four paths that dwell on a stage, for each span (start, end) it may hold.

        All enter through the stages before it and leave the same way. One stays from the first pass to the last; the
        others go on to the last stage and back with the first micro-batch, with the last one, or with both.
        """
        schedule, problem = self.schedule, self.problem
        order = rank_order(schedule, stage)
        holds = [held_up(schedule, stage, *pair) for pair in itertools.pairwise(order)]
        leaves = max(place for place, each in enumerate(order) if not each.backward)
        returns = min(place for place, each in enumerate(order) if each.backward)
        forward, backward = self._spans("forward", stage), self._spans("backward", stage)
        work = problem.sums[:2].sum(axis=0)
        total = work[-1] + sum(problem.first[:2]) + sum(problem.last[:2])
        before = work[self.starts] + sum(problem.first[:2]) * (stage > 0)
        beyond = total - before - forward - backward
        entry = 2 * stage * problem.transfer
        detour = 2 * (schedule.ranks - 1 - stage) * problem.transfer

        def dwell(first: int, last: int) -> Array:
            """Passes ``first`` to ``last`` of the stage one after the other."""
            passes = order[first : last + 1]
            backwards = sum(each.backward for each in passes)
            waits = sum(holds[first:last]) * problem.transfer
            time: Array = (len(passes) - backwards) * forward + backwards * backward + waits
            return time

        end = len(order) - 1
        inner = [dwell(0, end)]
        if stage < schedule.ranks - 1:
            inner.append(forward + beyond + detour + dwell(returns, end))
            inner.append(dwell(0, leaves) + beyond + detour + backward)
            if returns <= leaves:
                inner.append(forward + 2 * (beyond + detour) + dwell(returns, leaves) + backward)
        cost = before + entry + np.maximum.reduce(inner)
        return np.where(self._may_hold(stage), cost, np.inf)

    def _may_hold(self, stage: int) -> NDArray[np.bool_]:
        limit = self.problem.memory_limit
        spans = self._nonempty(stage)
        return spans if limit is None else spans & (self._memory(stage) <= limit)

    def _nonempty(self, stage: int) -> NDArray[np.bool_]:
        """Spans that begin where blocks begin and leave no rank without anything."""
        spans: NDArray[np.bool_] = self.ends >= self.starts + (0 < stage < self.schedule.ranks - 1)
        if stage == 0:
            spans &= self.starts == 0
        if stage == self.schedule.ranks - 1:
            spans &= self.ends == self.size
        return spans

    def _memory(self, stage: int) -> Array:
        ((held,),) = in_flight(self.schedule, stage)
        return self.problem.reserve + self._spans("state", stage) + held * self._spans("kept", stage)

    def _least_memory(self) -> Array:
        """Peak bytes of each rank in the cut whose fullest rank holds least."""
        ranks = self.schedule.ranks
        needs = [np.where(self._nonempty(stage), self._memory(stage), np.inf) for stage in range(ranks)]
        worst = _least_worst(needs)
        borders = [0]
        for stage, need in enumerate(needs):
            borders.append(int(np.maximum(need[borders[-1]], worst[stage + 1]).argmin()))
        return self.problem.memory(np.array(borders, dtype=np.intp))


def _least_worst(costs: list[Array]) -> list[Array]:
    """For each stage and start, the least possible worst cost from that stage on; costs are (start, end) a stage."""
    size = len(costs[0])
    worst: list[Array] = [np.where(np.arange(size) == size - 1, 0.0, np.inf)]
    for cost in reversed(costs):
        worst.append(np.maximum(cost, worst[-1][None, :]).min(axis=1))
    return worst[::-1]
