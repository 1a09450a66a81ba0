"""Requests through a `Loop`: each goes into a free row, and gives the row back when it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from composer_megatron.inference.engine import Admission, Loop, Recent
from composer_megatron.inference.sampling import GREEDY, Sampling


@dataclass(eq=False)
class Job:
    """A request in tokens.

    Attributes:
        prompt: At least one token.
        limit: New tokens at most.
        sampling: How they are drawn.
        ended: Set it to get no more tokens.
    """

    prompt: Sequence[int]
    limit: int
    sampling: Sampling = GREEDY
    ended: bool = False
    _launched: int = 0

    @property
    def remaining(self) -> int:
        """Steps that are still of use."""
        return 0 if self.ended else max(0, self.limit - self._launched)

    def launch(self, steps: int) -> int:
        """Note that `steps` steps were started, and say how many of their tokens count."""
        counted = min(steps, self.remaining)
        self._launched += steps
        return counted


@dataclass(frozen=True)
class _Flight:
    """Steps that were started together: their tokens, and whose they are (row, job, tokens that count)."""

    tokens: Recent
    owners: Sequence[tuple[int, Job, int]]


def decode(loop: Loop, jobs: Sequence[Job]) -> Iterator[tuple[int, int]]:
    """Run jobs to their ends.

    Args:
        loop: What decodes; its capacity holds every prompt with its new tokens.
        jobs: In the order in which they get rows. Set a job's `ended` between two tokens to stop it.

    Yields:
        A job's number and its next token; jobs take turns, in no order between them.
    """
    numbers = {job: number for number, job in enumerate(jobs)}
    waiting, rows = deque(jobs), list[Job | None]([None] * loop.rows)
    flights = deque[_Flight]()
    ahead = 1 if loop.span > 1 else 0  # the host reads tokens while the next ones are made
    while True:
        _admit(loop, rows, waiting)
        if any(rows):
            flights.append(_launch(loop, rows))
        elif not flights:
            return
        while len(flights) > ahead or (flights and not any(rows) and not waiting):
            flight = flights.popleft()
            tokens = flight.tokens.wait().tolist()
            for row, job, count in flight.owners:
                for token in tokens[row][:count]:
                    if not job.ended:
                        yield numbers[job], token
            rows = [job if job is not None and job.remaining else None for job in rows]


def _admit(loop: Loop, rows: list[Job | None], waiting: deque[Job]) -> None:
    """Put waiting jobs into free rows."""
    admissions = []
    for row, job in enumerate(rows):
        if job is None and waiting:
            rows[row] = entering = waiting.popleft()
            admissions.append(Admission(row, entering.prompt, entering.sampling))
    if admissions:
        loop.admit(admissions)


def _launch(loop: Loop, rows: list[Job | None]) -> _Flight:
    """Start as many steps as pay off; rows whose jobs need no more become free."""
    active = [(row, job) for row, job in enumerate(rows) if job is not None]
    steps = min(loop.span, max(job.remaining for _, job in active))
    for _ in range(steps):
        loop.step()
    owners = [(row, job, job.launch(steps)) for row, job in active]
    for row, job in active:
        if not job.remaining:
            rows[row] = None
    return _Flight(loop.recent(steps), owners)
