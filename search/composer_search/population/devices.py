"""A population over several devices: one worker process each, which take shares of the rows in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from composer_megatron.errors import ComposerError, UsageError
from composer_search.population.feed import Row
from composer_search.population.plan import chunks
from composer_search.population.train import by_kind, train_population
from composer_search.trainer import TrainResult, TrainSettings, choose_device

SHARES = 4
"""Shares of the rows of one kind for each device: enough that all devices end at about the same time."""


def train_on_devices(rows: Sequence[Row], settings: TrainSettings, devices: Sequence[str]) -> list[TrainResult]:
    """`train_population` on several devices at once, which gives the same results up to rounding.

    Python starts the workers anew (`spawn`), which imports the main module: a script needs its
    ``if __name__ == "__main__":``.

    Args:
        rows: As there.
        settings: As there, but for its `device`.
        devices: Such as ``["cuda:0", "cuda:1"]``, or ``["cpu"] * 8`` for eight processes of one thread each. For
            models so large that a CPU gains nothing from training several at once, that is how to use its cores.

    Returns:
        A result for each row, in their order.

    Raises:
        UsageError: If there is no such device.
        ComposerError: If a worker process dies or a device has no memory for a single row.
    """
    if not devices:
        raise UsageError("devices=[]; expected at least one, such as cuda:0")
    on_each = [dataclasses.replace(settings, device=device) for device in devices]
    for device in dict.fromkeys(devices):
        choose_device(device)
    if len(devices) == 1:
        return train_population(rows, on_each[0])
    shares = _shares(rows, settings, len(devices))
    context = multiprocessing.get_context("spawn")
    results: dict[int, TrainResult] = {}
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context, _begin)) for _ in devices]
        running: dict[Future[list[TrainResult]], tuple[int, list[int]]] = {}
        free = list(range(len(devices)))
        while shares or running:
            while shares and free:
                place, share = free.pop(), shares.pop()
                running[pools[place].submit(train_population, [rows[i] for i in share], on_each[place])] = place, share
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                place, share = running.pop(job)
                results |= zip(share, _result(job, devices[place]), strict=True)
                free.append(place)
    return [results[place] for place in range(len(rows))]


def _shares(rows: Sequence[Row], settings: TrainSettings, devices: int) -> list[list[int]]:
    """Places of rows of one kind that lie next to each other by sequence; the costliest kinds, which go first, last."""
    kinds = by_kind(rows, settings)
    kinds.sort(key=lambda places: len(places) * rows[places[0]].data.train[0].shape[1])
    size = {len(places): -(-len(places) // (SHARES * devices)) for places in kinds}
    return [[places[i] for i in span] for places in kinds for span in chunks(len(places), size[len(places)])]


def _result(job: Future[list[TrainResult]], device: str) -> list[TrainResult]:
    try:
        return job.result()
    except BrokenProcessPool:
        raise ComposerError(
            f"the worker process that trained candidates on {device} died, perhaps for lack of memory; use fewer "
            "devices at once or a smaller batch_size"
        ) from None


def _begin() -> None:
    """Set a worker up: one thread, and an end when its parent ends."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
