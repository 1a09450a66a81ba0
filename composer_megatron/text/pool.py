"""Work in several processes, whose results come in the order of the tasks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from composer_megatron.errors import ComposerError


def in_order[Task, Result](
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[tuple[Task, Result]]:
    """Each task with its result, in order; the results do not depend on `workers`.

    Args:
        function: Of a module, so that another process finds it.
        tasks: Read only a little ahead of what is asked for.
        workers: Processes; 1 works in this one.

    Raises:
        ComposerError: If a process dies, as for want of memory.
    """
    if workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    # Spawned, not forked: the tokenizer's threads would not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    waiting: deque[tuple[Task, Future[Result]]] = deque()
    try:
        for task in tasks:
            with _interrupts_held_back():
                waiting.append((task, pool.submit(function, task)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        problem = "a process that worked on text died, perhaps for want of memory"
        raise ComposerError(f"{problem}; try fewer workers than {workers}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes that start inside never see Ctrl-C: it is this one that answers it. Here it is only put off."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End when the parent does, even when it is killed."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
