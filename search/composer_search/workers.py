"""Where trials run: in worker processes, or in this one.

A worker that dies costs its trial and nothing else. Workers end when their parent does, in whatever way it ends, since
each watches for that; and only the parent heeds Ctrl-C. This module imports neither torch nor an evaluator, so that a
worker is up at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from composer_megatron.errors import ComposerError
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluation import Evaluation, Evaluator
from composer_search.proposers import Proposal

_READY = "ready"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: with an evaluation or with an error, and after how many seconds."""

    seconds: float
    evaluation: Evaluation | None = None
    error: str | None = None


class Pool(Protocol):
    """A place where trials run."""

    @property
    def running(self) -> list[Proposal]:
        """The trials that have been started and have not come out of `wait`."""
        ...

    @property
    def free(self) -> int:
        """How many more can be started now."""
        ...

    def start(self, proposal: Proposal) -> None:
        """Start a trial."""
        ...

    def wait(self) -> list[tuple[Proposal, Outcome]]:
        """Wait until a trial ends; those that have."""
        ...


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
    """Runs a trial when it is waited for."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.running: list[Proposal] = []

    @property
    def free(self) -> int:
        return 1 - len(self.running)

    def start(self, proposal: Proposal) -> None:
        self.running.append(proposal)

    def wait(self) -> list[tuple[Proposal, Outcome]]:
        outcome = _evaluate(self._evaluator, self.running[0].sequence)
        return [(self.running.pop(), outcome)]


class _Processes:
    """Worker processes, each started when it is first needed, and another in its place when it has died."""

    def __init__(self, evaluator: Evaluator, number: int) -> None:
        self._evaluator, self._number = evaluator, number
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, Proposal] = {}

    @property
    def running(self) -> list[Proposal]:
        return list(self._busy.values())

    @property
    def free(self) -> int:
        return self._number - len(self._busy)

    def start(self, proposal: Proposal) -> None:
        worker = self._idle.pop() if self._idle else _Worker(self._evaluator)
        self._busy[worker] = proposal
        worker.begin(proposal.sequence)

    def wait(self) -> list[tuple[Proposal, Outcome]]:
        ready = multiprocessing.connection.wait([worker.connection for worker in self._busy])
        ended = []
        for worker in [worker for worker in self._busy if worker.connection in ready]:
            outcome = worker.receive()
            if outcome is not None:
                ended.append((self._busy.pop(worker), outcome))
                if worker.alive:
                    self._idle.append(worker)
        return ended

    def kill(self) -> None:
        for worker in [*self._idle, *self._busy]:
            worker.kill()


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, evaluator: Evaluator) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), name="composer-search worker", daemon=True)
        self.process.start()
        theirs.close()  # so that the worker's death closes the pipe
        self.alive, self.ready = True, False
        self.started = time.perf_counter()
        self._send(evaluator)

    def begin(self, sequence: CompositeSequence) -> None:
        """Hand the worker a sequence; it may still be starting."""
        self.started = time.perf_counter()
        self._send(sequence)

    def _send(self, message: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died; `receive` finds that out
            self.connection.send(message)

    def receive(self) -> Outcome | None:
        """The outcome of the sequence begun last, its worker's death included; None when the worker is now ready.

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


def _work(connection: Connection) -> None:
    """The worker: evaluate each sequence that comes, until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the evaluator's modules, torch among them, are imported below
    evaluator: Evaluator = connection.recv()
    connection.send(_READY)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_evaluate(evaluator, connection.recv()))


def _end_with_parent() -> None:
    """Leave when the parent is gone, even in the middle of a trial."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _evaluate(evaluator: Evaluator, sequence: CompositeSequence) -> Outcome:
    """Evaluate; whatever goes wrong becomes the trial's error."""
    start = time.perf_counter()
    try:
        evaluation = evaluator.evaluate(sequence)
    except Exception as error:  # a candidate that cannot be evaluated must not end the search
        kind = "" if isinstance(error, ComposerError) else f"{type(error).__name__}: "
        return Outcome(time.perf_counter() - start, error=f"{kind}{error}")
    return Outcome(time.perf_counter() - start, evaluation)
