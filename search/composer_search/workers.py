"""Where trials run: in worker processes, or in this one.

A worker takes a batch of trials at a time. When one dies, the trials of its batch that had not ended start again, each
by itself, so that the one which kills its worker is found out: a trial that loses its second worker has failed. Workers
end when their parent does, in whatever way it ends, since each watches for that; and only the parent heeds Ctrl-C. This
module imports neither torch nor an evaluator, so that a worker is up at once.

Where candidates are trained on a GPU and there are several, the workers share them out, one after the other.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal, Protocol

from composer_megatron.errors import ComposerError, FileError
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluation import BatchEvaluator, Evaluation, Evaluator, runs_on_gpu
from composer_search.proposers import Proposal

Executor = Literal["local", "ray"]

log = logging.getLogger(__name__)

_READY = "ready"

_TRIES = 2
"""Workers that a trial may lose before it counts as failed: one may die by chance, but some trials kill theirs."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: with an evaluation or with an error, and after how many seconds.

    An error of a file, such as a log on a full disk, is not the trial's (`file_error`): it ends the search, and the
    trial runs again when that goes on.
    """

    seconds: float
    evaluation: Evaluation | None = None
    error: str | None = None
    file_error: bool = False


class Pool(Protocol):
    """A place where trials run."""

    @property
    def running(self) -> list[Proposal]:
        """The trials that have been started and have not come out of `wait`."""
        ...

    @property
    def free(self) -> int:
        """How many more batches can be started now."""
        ...

    def start(self, batch: Sequence[Proposal]) -> None:
        """Start trials, all of them on one worker."""
        ...

    def wait(self) -> list[tuple[Proposal, Outcome]]:
        """Wait until a trial ends; those that have."""
        ...


@contextlib.contextmanager
def open_pool(evaluator: Evaluator, number: int, executor: Executor = "local") -> Iterator[Pool]:
    """A pool of `number` workers, on this machine or a Ray cluster; nothing of it runs when the context ends.

    Raises:
        ComposerError: If Ray is asked for and not installed, or its cluster cannot be reached.
    """
    if executor == "ray" and number > 0:
        from composer_search.ray_pool import ray_pool

        with ray_pool(evaluator, number) as pool:
            yield pool
    else:
        with worker_pool(evaluator, number) as pool:
            yield pool


@contextlib.contextmanager
def worker_pool(evaluator: Evaluator, number: int) -> Iterator[Pool]:
    """A pool of `number` worker processes, or for 0 this process. No process is left when the context ends.

    The evaluator is pickled. Python starts workers anew (`spawn`), which imports the main module: a script that
    searches needs its ``if __name__ == "__main__":``.
    """
    if number == 0:
        yield _ThisProcess(evaluator)
        return
    pool = _Processes(evaluator, number)
    try:
        yield pool
    finally:
        pool.kill()


class _ThisProcess:
    """Runs a batch when it is waited for."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.running: list[Proposal] = []

    @property
    def free(self) -> int:
        return 0 if self.running else 1

    def start(self, batch: Sequence[Proposal]) -> None:
        self.running.extend(batch)

    def wait(self) -> list[tuple[Proposal, Outcome]]:
        together = len(self.running) if isinstance(self._evaluator, BatchEvaluator) else 1
        batch = self.running[:together]
        outcomes = list(evaluate_batch(self._evaluator, [proposal.sequence for proposal in batch]))
        del self.running[:together]
        return list(zip(batch, outcomes, strict=True))


class _Processes:
    """Worker processes, each started when it is first needed, and another in its place when it has died."""

    def __init__(self, evaluator: Evaluator, number: int) -> None:
        self._evaluator, self._number = evaluator, number
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, list[Proposal]] = {}
        self._again: deque[Proposal] = deque()
        self._lost: Counter[int] = Counter()

    @property
    def running(self) -> list[Proposal]:
        return [proposal for batch in self._busy.values() for proposal in batch] + list(self._again)

    @property
    def free(self) -> int:
        return max(0, self._number - len(self._busy) - len(self._again))

    def start(self, batch: Sequence[Proposal]) -> None:
        worker = self._idle.pop() if self._idle else _Worker(self._evaluator, self._free_place())
        self._busy[worker] = list(batch)
        worker.begin([proposal.sequence for proposal in batch])

    def _free_place(self) -> int:
        """The lowest number that no living worker has."""
        taken = {worker.place for worker in [*self._idle, *self._busy]}
        return next(place for place in range(self._number + 1) if place not in taken)

    def wait(self) -> list[tuple[Proposal, Outcome]]:
        while self._again and len(self._busy) < self._number:
            self.start([self._again.popleft()])
        ready = multiprocessing.connection.wait([worker.connection for worker in self._busy])
        ended = []
        for worker in [worker for worker in self._busy if worker.connection in ready]:
            outcome = worker.receive()
            if outcome is None:
                continue
            batch = self._busy[worker]
            if worker.alive:
                ended.append((batch.pop(0), outcome))
            else:
                ended += self._repeat(batch, outcome)
            if worker.alive and not batch:
                self._idle.append(worker)
            if not worker.alive or not batch:
                del self._busy[worker]
        return ended

    def _repeat(self, batch: Sequence[Proposal], outcome: Outcome) -> list[tuple[Proposal, Outcome]]:
        """Line up the trials whose worker has died; with its outcome the one that has lost too many."""
        self._lost.update(proposal.trial for proposal in batch)
        again = [proposal for proposal in batch if self._lost[proposal.trial] < _TRIES]
        if again:
            names = ", ".join(str(proposal.sequence) for proposal in again)
            log.warning("%s; these trials run again, each by itself: %s", outcome.error, names)
        self._again.extend(again)
        return [(proposal, outcome) for proposal in batch if proposal not in again]

    def kill(self) -> None:
        for worker in [*self._idle, *self._busy]:
            worker.kill()


class _Worker:
    """The parent's end of one worker process; `place` numbers it among the living ones."""

    def __init__(self, evaluator: Evaluator, place: int) -> None:
        self.place = place
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, place), name="composer-search worker", daemon=True)
        self.process.start()
        theirs.close()  # so that the worker's death closes the pipe
        self.alive, self.ready = True, False
        self.started = time.perf_counter()
        self._send(evaluator)

    def begin(self, sequences: list[CompositeSequence]) -> None:
        """Hand the worker sequences; it may still be starting."""
        self.started = time.perf_counter()
        self._send(sequences)

    def _send(self, message: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died; `receive` finds that out
            self.connection.send(message)

    def receive(self) -> Outcome | None:
        """The outcome of the next of its sequences, its worker's death included; None when the worker is now ready.

        Raises:
            ComposerError: If the worker died before it was ready, as the next one would.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self._has_died()
            if self.ready:
                return Outcome(time.perf_counter() - self.started, error=f"the worker process {self._end()}")
            hint = 'see its message above; a script that searches needs its `if __name__ == "__main__":`'
            raise ComposerError(f"a worker process could not start, it {self._end()}: {hint}") from None
        if isinstance(message, Outcome):
            return message
        self.ready = True
        return None

    def _has_died(self) -> None:
        self.alive = False
        self.connection.close()
        self.process.join(timeout=10)

    def _end(self) -> str:
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"ended with exit status {code}"
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")

    def kill(self) -> None:
        """End the process at once: it holds nothing that could be lost."""
        self.connection.close()
        self.process.kill()
        self.process.join(timeout=10)


def _work(connection: Connection, place: int) -> None:
    """The worker: evaluate the sequences that come, until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the evaluator's modules, torch among them, are imported below
    evaluator: Evaluator = connection.recv()
    if runs_on_gpu(evaluator):
        take_gpu(place)
    connection.send(_READY)
    with contextlib.suppress(EOFError, OSError):
        while True:
            for outcome in evaluate_batch(evaluator, connection.recv()):
                connection.send(outcome)


def take_gpu(place: int) -> None:
    """Make one of several GPUs this thread's own, by the number of the worker."""
    import torch

    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(place % torch.cuda.device_count())


def default_workers(on_gpu: bool) -> int:
    """One worker for each GPU where candidates are trained on them and there are any; else one a core, at most 8."""
    cores = min(8, len(os.sched_getaffinity(0)))
    if not on_gpu:
        return cores
    import torch

    return torch.cuda.device_count() or cores


def _end_with_parent() -> None:
    """Leave when the parent is gone, even in the middle of a trial."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def evaluate_batch(evaluator: Evaluator, sequences: Sequence[CompositeSequence]) -> Iterator[Outcome]:
    """Evaluate sequences, together where the evaluator can; whatever goes wrong becomes the outcome of its sequence."""
    if len(sequences) > 1 and isinstance(evaluator, BatchEvaluator):
        start = time.perf_counter()
        evaluations: list[Evaluation] = []
        try:
            evaluations = evaluator.evaluate_many(sequences)
        except FileError as error:
            yield from (Outcome(0.0, error=str(error), file_error=True) for _ in sequences)
            return
        except Exception as error:  # one by one below it shows which of them cannot be evaluated, and why
            reason = f"{type(error).__name__}: {error}"
            log.warning("%d sequences could not be evaluated together, now each alone: %s", len(sequences), reason)
        if len(evaluations) == len(sequences):
            seconds = (time.perf_counter() - start) / len(sequences)
            yield from (Outcome(seconds, evaluation) for evaluation in evaluations)
            return
    for sequence in sequences:
        yield _evaluate(evaluator, sequence)


def _evaluate(evaluator: Evaluator, sequence: CompositeSequence) -> Outcome:
    """Evaluate; whatever goes wrong becomes the trial's error."""
    start = time.perf_counter()
    try:
        evaluation = evaluator.evaluate(sequence)
    except Exception as error:  # a candidate that cannot be evaluated must not end the search
        kind = "" if isinstance(error, ComposerError) else f"{type(error).__name__}: "
        broken = isinstance(error, FileError)
        return Outcome(time.perf_counter() - start, error=f"{kind}{error}", file_error=broken)
    return Outcome(time.perf_counter() - start, evaluation)
