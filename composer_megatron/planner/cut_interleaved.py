"""A good cut for the interleaved schedule, where the chunks of a rank share its time, and how good it is at least.

A cut's step time is the longest of the paths through the schedule's graph, and the length of one path is a sum over
stages. Two things follow. A path that was once the longest bounds the time of every other cut, so a search needs to
simulate only those that no known path rules out. And any mixture of paths, that is some weight for each stage, bounds
the best cut: the cut of least weight is found by dynamic programming, and no cut's step time is below that weight.

The search is a descent over cuts that differ in a row of neighbouring borders moved by one block. It starts from an
even share of the time, from equal counts, from the mean of the cuts that the bound's mixture was improved against
(regret matching), and from the best cut with some borders displaced. Its guarantee is the bound, which tends to that of
the linear relaxation; the cut found may be best without being proven so.
"""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from composer_megatron.planner.cut import Array, Borders, Cut, CutProblem, borders_of, equal_counts, no_room
from composer_megatron.planner.schedule import Schedule, simulate

_PASSES = 1_000_000
"""Work limit of the search, in passes simulated: about half a second."""

_DISPLACED = 6

_ROW = 24
"""Borders that a step of the search moves together at most."""

_RECENT = 96
"""Paths that a step of the search looks at, the last ones."""

_QUICK_PASSES = 250_000
_STEP = 8192
_QUICK_STEP = 4096
"""Passes of the step that is searched first, where there are more."""

_ROUNDS = 40
_ANSWERS = 8
"""Cuts that answer the mixture in one round, after which the paths of their mean are added."""


def interleaved_cut(problem: CutProblem, *, quick: bool = False) -> Cut:
    """A good cut and its bound. Many micro-batches are searched with fewer of them first, and then as they are.

    Args:
        problem: What is to be cut.
        quick: For comparing many problems: a short search, and no bound.

    Raises:
        UsageError: If no cut was found that keeps the memory limit.
    """
    ranks, chunks, count = vars(problem.schedule).values()
    enough = ranks * max(3, (_QUICK_STEP if quick else _STEP) // (2 * chunks * ranks**2))
    if count <= enough:
        return _Search(problem, quick=quick).solve()
    shorter = dataclasses.replace(problem, schedule=Schedule(ranks, chunks, enough))
    borders = borders_of(_Search(shorter, quick=quick).solve().counts)
    return Cut.at(borders, problem.time(borders), 0) if quick else _Search(problem).improve(borders)


class _Search:
    """The search for one problem."""

    def __init__(self, problem: CutProblem, *, quick: bool = False) -> None:
        self.problem, self.schedule, self.quick = problem, problem.schedule, quick
        self.size, self.stages = len(problem.blocks), problem.schedule.stages
        self.steps = self._steps()
        self.passes_left = _QUICK_PASSES if quick else _PASSES
        self.paths = _Paths(2 * self.stages)
        for rank in range(0 if quick else self.schedule.ranks):  # the paths that dwell on a rank
            costs = np.ones((self.schedule.chunks, self.schedule.ranks, 2))
            costs[:, rank] = 1000.0 * (1 + problem.transfer)
            self._simulate(costs.ravel())

    def solve(self) -> Cut:
        """The best cut from all starts."""
        time, best = self._descend(self._fit(self._even_share()))
        equal = borders_of(equal_counts(self.size, self.stages))
        if self.quick:
            if self.problem.time(equal) < time:
                time, best = self._better_from(equal, time, best)
            return Cut.at(best, time, 0)
        bound, mean = self._bound(self.problem.durations(best))
        for start in (mean, equal):
            time, best = self._better_from(start, time, best)
        chance = random.Random(0)
        for _ in range(_DISPLACED):
            time, best = self._better_from(self._displaced(best, chance), time, best)
        return Cut.at(best, time, np.ceil(bound))

    def improve(self, borders: Borders) -> Cut:
        """The best cut from that start."""
        time, best = self._descend(self._fit(borders))
        bound, _ = self._bound(self.problem.durations(best))
        return Cut.at(best, time, np.ceil(bound))

    def _better_from(self, start: Borders, time: int, best: Borders) -> tuple[int, Borders]:
        """What is better: that cut, or the one reached from that start."""
        if self.passes_left <= 0 or not self.problem.allowed(start):
            return time, best
        found, borders = self._descend(start)
        return (found, borders) if found < time else (time, best)

    def _displaced(self, borders: Borders, chance: random.Random) -> Borders:
        """That cut with three rows of neighbouring borders moved by one block."""
        moved = borders.copy()
        for _ in range(3):
            first = chance.randrange(1, self.stages)
            moved[first : min(self.stages, first + 1 + chance.randrange(self.stages // 2))] += chance.choice((-1, 1))
        return np.clip(np.maximum.accumulate(moved), 0, self.size)

    def _steps(self) -> Borders:
        """What a move adds to the borders, for every move."""
        border = np.arange(self.stages + 1)
        first, last = np.triu_indices(self.stages - 1)
        near = last - first < _ROW
        first, last = first[near, None] + 1, last[near, None] + 1
        row = ((border >= first) & (border <= last)).astype(np.intp)
        return np.concatenate([row, -row])

    def _even_share(self) -> Borders:
        """Borders where the blocks' time comes closest to an even share for each stage."""
        problem = self.problem
        work = problem.sums[:2].sum(axis=0)
        first, last = sum(problem.first[:2]), sum(problem.last[:2])
        shares = np.arange(1, self.stages) / self.stages * (first + work[-1] + last) - first
        inner = np.abs(work[:, None] - shares[None, :]).argmin(axis=0)
        return np.array([0, *np.maximum.accumulate(inner), self.size], dtype=np.intp)

    def _fit(self, borders: Borders) -> Borders:
        """Where that cut is not allowed: the first one met that is, going from an equal one to less memory."""
        if self.problem.allowed(borders):
            return borders
        borders = borders_of(equal_counts(self.size, self.stages))
        while not self.problem.allowed(borders):
            moves = self._moves(borders)
            moves = moves[self.problem.busy(moves)]
            peaks = self.problem.memory(moves).max(axis=-1)
            if not len(moves) or peaks.min() >= self.problem.memory(borders).max():
                raise no_room(self.problem, self.problem.memory(borders), proven=False)
            borders = moves[peaks.argmin()]
        return borders

    def _moves(self, borders: Borders) -> Borders:
        """All cuts in which a row of at most `_ROW` neighbouring borders is moved by one block."""
        moved = borders + self.steps
        legal: Borders = moved[(np.diff(moved, axis=-1) >= 0).all(axis=-1)]
        return legal

    def _descend(self, borders: Borders) -> tuple[int, Borders]:
        """Better neighbours until there is none: none of `_moves` is better than the result."""
        time = self._simulate(self.problem.durations(borders))
        while True:
            better = self._better(self._moves(borders), time)
            if better is None:
                return time, borders
            time, borders = better

    def _better(self, moves: Borders, time: int) -> tuple[int, Borders] | None:
        """A cut among those that takes less time, or None. The most promising is simulated first."""
        durations = self.problem.durations(moves)
        bounds, known = self.paths.longest(durations), len(self.paths)
        while len(bounds) and bounds.min() < time and self.passes_left > 0:
            chosen = int(bounds.argmin())
            if not self.problem.allowed(moves[chosen]):
                bounds[chosen] = np.inf
                continue
            found = self._simulate(durations[chosen])
            if found < time:
                return found, moves[chosen]
            bounds = np.maximum(bounds, self.paths.longest(durations, since=known))
            bounds[chosen], known = found, len(self.paths)
        return None

    def _simulate(self, durations: Array) -> int:
        result = simulate(self.schedule, durations.tolist(), self.problem.transfer)
        self.passes_left -= 2 * self.stages * self.schedule.micro_batches
        self.paths.add(result.visits, result.transfers)
        return int(result.time)

    def _bound(self, best: Array) -> tuple[float, Borders]:
        """A lower bound for all cuts, and the mean of the cuts that answered it, rounded."""
        passes = 2 * self.stages * self.schedule.micro_batches
        rounds = max(6, min(_ROUNDS, 200_000 // (3 * passes)))
        game = _Game(self.schedule.ranks)
        game.grow(len(self.paths), 0.0)
        bound, mean, borders = 0.0, best.copy(), np.zeros(self.stages + 1)
        for turn in range(1, rounds * _ANSWERS + 1):
            weight, answer = self._lightest(*self.paths.mixture(game.mixture()))
            bound = max(bound, weight)
            durations = self.problem.durations(answer)
            game.learn(self.paths.lengths(durations))
            step = 2 / (turn + 1)
            mean += step * (durations - mean)
            borders += step * (answer - borders)
            if turn % _ANSWERS == 0:
                for share in (1.0, 0.5, 0.2):
                    self._simulate(share * mean + (1 - share) * best)
                game.grow(len(self.paths), game.regrets.max())
        return bound, np.rint(borders).astype(np.intp)

    def _lightest(self, weights: Array, constant: float) -> tuple[float, Borders]:
        """The cut of least weighted time, by dynamic programming over stages and borders, and that time."""
        problem = self.problem
        pairs = weights.reshape(-1, 2)
        least = np.where(np.arange(self.size + 1) == 0, 0.0, np.inf)
        choices = []
        for pair in pairs:
            sums = pair @ problem.sums[:2]
            before = least - sums
            running = np.minimum.accumulate(before)
            choices.append(np.maximum.accumulate(np.where(before == running, np.arange(self.size + 1), 0)))
            least = running + sums
        borders = [self.size]
        for choice in reversed(choices):
            borders.append(int(choice[borders[-1]]))
        ends = pairs[0] @ problem.first[:2] + pairs[-1] @ problem.last[:2]
        return float(least[-1] + ends + constant), np.array(borders[::-1], dtype=np.intp)


class _Paths:
    """Paths that were the longest for some stage times: how often each runs through each stage, and its transfers."""

    def __init__(self, width: int) -> None:
        self._rows = np.empty((64, width + 1))
        self._seen: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, visits: list[int], transfers: float) -> None:
        """Remember a path, if it is new."""
        row = np.array([*visits, transfers], dtype=np.float64)
        if row.tobytes() not in self._seen:
            if len(self) == len(self._rows):
                self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
            self._rows[len(self)] = row
            self._seen[row.tobytes()] = len(self)

    def lengths(self, durations: Array) -> Array:
        """The length of each path for one cut's stage times."""
        rows = self._rows[: len(self)]
        return np.asarray(rows[:, :-1] @ durations + rows[:, -1])

    def longest(self, durations: Array, since: int = 0) -> Array:
        """For each of many cuts (cuts, 2 · stages) the longest path among those added last, after the first `since`."""
        rows = self._rows[max(since, len(self) - _RECENT) : len(self)]
        lengths = durations @ rows[:, :-1].T + rows[:, -1]
        return np.asarray(lengths.max(axis=-1, initial=0.0))

    def mixture(self, shares: Array) -> tuple[Array, float]:
        """The stage weights and the constant of a mixture of the paths."""
        mixed = shares @ self._rows[: len(self)]
        return mixed[:-1], float(mixed[-1])


class _Game:
    """Regret matching: how much to play each path against cuts that answer the mixture played so far."""

    def __init__(self, size: int) -> None:
        self.regrets = np.ones(size)

    def mixture(self) -> Array:
        """Shares of the paths, which sum to one."""
        return np.asarray(self.regrets / self.regrets.sum())

    def learn(self, lengths: Array) -> None:
        """Take in how long each path was for the cut that answered."""
        regrets = self.regrets + lengths - self.mixture() @ lengths
        self.regrets = np.maximum(regrets, 0.0) if regrets.max() > 0 else np.ones_like(regrets)

    def grow(self, size: int, regret: float) -> None:
        """Make room for new paths, with that regret."""
        self.regrets = np.concatenate([self.regrets, np.full(size - len(self.regrets), regret)])
