"""Trials on a Ray cluster: the same pool as `composer_search.workers`, with Ray's workers in place of local processes.

Ray knows which machines there are; the study folder stays on the machine that searches, and no worker needs to see it.
Where a worker is lost, the trials that it had run again, each by itself and a few times at most, and no others.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from composer_megatron.errors import ComposerError
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluation import Evaluator, runs_on_gpu
from composer_search.proposers import Proposal
from composer_search.workers import Outcome, Pool, evaluate_batch

log = logging.getLogger(__name__)

_TRIES = 3
"""Workers that a trial may lose before it counts as failed: a machine may go away, but some trials kill workers."""


@contextlib.contextmanager
def ray_pool(evaluator: Evaluator, number: int) -> Iterator[Pool]:
    """A pool that has up to `number` batches running on Ray, a CPU each; what runs in the end is cancelled.

    Where candidates are trained on a GPU and the cluster has any, each batch has one to itself and waits for it.

    Uses the Ray that this program is connected to, or the cluster whose address is in ``RAY_ADDRESS``, or else starts
    one on this machine and stops it in the end.

    Raises:
        ComposerError: If Ray is not installed, or there is no cluster at that address.
    """
    if importlib.util.find_spec("ray") is None:
        raise ComposerError('executor=ray needs Ray: pip install "composer-megatron[ray]"')
    ray: Any = importlib.import_module("ray")
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ComposerError(f"cannot reach or start Ray: {error}; see the address in RAY_ADDRESS") from error
    pool = _RayPool(ray, evaluator, number)
    try:
        yield pool
    finally:
        pool.cancel()
        if own:
            ray.shutdown()


@dataclass
class _Task:
    """A batch that runs: its trials, when it was started, and how many workers it has lost."""

    batch: list[Proposal]
    started: float
    lost: int


class _RayPool:
    """Batches as Ray tasks, one at a time on each of `number` CPUs or GPUs."""

    def __init__(self, ray: Any, evaluator: Evaluator, number: int) -> None:
        self._ray, self._number = ray, number
        self._evaluator = ray.put(evaluator)
        # Ray must not repeat a lost task by itself: it would repeat a whole batch, and a trial that kills for ever.
        # Without GPUs of its own a task would see none, and train on the CPU.
        gpus = min(1, int(ray.cluster_resources().get("GPU", 0))) if runs_on_gpu(evaluator) else 0
        self._evaluate = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_evaluate_remotely)
        self._tasks: dict[Any, _Task] = {}

    @property
    def running(self) -> list[Proposal]:
        return [proposal for task in self._tasks.values() for proposal in task.batch]

    @property
    def free(self) -> int:
        return max(0, self._number - len(self._tasks))

    def start(self, batch: Sequence[Proposal]) -> None:
        self._start(list(batch), lost=0)

    def _start(self, batch: list[Proposal], lost: int) -> None:
        handle = self._evaluate.remote(self._evaluator, [proposal.sequence for proposal in batch])
        self._tasks[handle] = _Task(batch, time.perf_counter(), lost)

    def wait(self) -> list[tuple[Proposal, Outcome]]:
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1)
        ended: list[tuple[Proposal, Outcome]] = []
        for handle in ready:
            task = self._tasks.pop(handle)
            try:
                outcomes = self._ray.get(handle)
            except self._ray.exceptions.RayError as error:
                ended += self._repeat(task, error)
            else:
                ended += zip(task.batch, outcomes, strict=True)
        return ended

    def _repeat(self, task: _Task, error: Exception) -> list[tuple[Proposal, Outcome]]:
        """Start the trials of a lost batch again, each by itself; the outcome of one that has lost too many workers."""
        if len(task.batch) == 1 and task.lost + 1 >= _TRIES:
            reason = f"lost {_TRIES} Ray workers, the last by {type(error).__name__}: {str(error).splitlines()[0]}"
            return [(task.batch[0], Outcome(time.perf_counter() - task.started, error=reason))]
        names = ", ".join(str(proposal.sequence) for proposal in task.batch)
        log.warning(
            "a Ray worker was lost (%s); these trials run again, each by itself: %s", type(error).__name__, names
        )
        for proposal in task.batch:
            self._start([proposal], lost=task.lost + 1 if len(task.batch) == 1 else 0)
        return []

    def cancel(self) -> None:
        for handle in self._tasks:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(handle, force=True)


def _evaluate_remotely(evaluator: Evaluator, sequences: list[CompositeSequence]) -> list[Outcome]:
    """What a Ray worker does."""
    return list(evaluate_batch(evaluator, sequences))
