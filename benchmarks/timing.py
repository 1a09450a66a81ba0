"""Timing operations on a GPU: cold caches, CUDA graph and eager, against ceilings measured in the same process.

Used by the scripts ``bench_<op>.py`` beside it. Each describes its cases and contenders; this module times them one
after another, and ``session.py`` prints and writes what it finds.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best, in bytes/s (each byte read or written counts) and FLOP/s."""

    copy: float
    read: float
    gemm: float | None


class Measured(NamedTuple):
    """A ceiling, and by what it was reached."""

    value: float
    by: str


@dataclass
class Row:
    """One contender in one case; times in seconds, None where there is none, and then `note` says why.

    Attributes:
        case: What is done, on which shape.
        name: The contender.
        bytes: The fewest the case can move through memory.
        graph: Median time in a CUDA graph.
        eager: Median time launched one by one, GPU kept busy.
        fraction: Of the ceiling that `bytes` (or FLOPs) and `graph` make.
        of_copy: How often `graph` goes into a copy that moves as many bytes, which is what a ceiling of gigabytes
            leaves of a small case: 1 is as fast as a copy.
        peak: Bytes allocated during a call beyond its inputs.
        error: Of the result against float64, as a norm relative to it.
        note: What there is to say.
    """

    case: str
    name: str
    bytes: float
    graph: float | None = None
    eager: float | None = None
    fraction: float | None = None
    of_copy: float | None = None
    peak: int | None = None
    error: float | None = None
    note: str = ""


@contextmanager
def own_stream() -> Iterator[None]:
    """Run on a stream other than the default one, as capturing a backward pass needs; says what lacks a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks need a CUDA GPU, and there is none")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()


def set_count(bytes_moved: float) -> int:
    """How many sets of inputs must take turns so that none is found in the L2 cache."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, math.ceil(4 * cache / max(1.0, bytes_moved)))


def measure(calls: Sequence[Call], *, graph: bool, seconds: float = 0.06) -> float:
    """Median seconds of one call, on the current stream, or one of its own where that is the default one.

    A backward pass runs on the stream of its forward pass: who times one makes `own_stream` current before that.

    A graph holds as many turns as fill two milliseconds by its own clock, not by that of eager turns: these would make
    a short graph of a contender that is slow to launch, in which what the start of a graph costs weighs more.

    Args:
        calls: The same work on different buffers, which take turns (`set_count`); results live for a turn.
        graph: Whether to replay a CUDA graph of them; else each is launched from Python.
        seconds: How long to measure, about.
    """
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        with own_stream():
            return measure(calls, graph=graph, seconds=seconds)
    _take_turns(calls, 2)
    run = _turns(calls, 1, graph)
    (turn,) = _each_elapsed([run])
    turns = max(1, math.ceil(2e-3 / turn))
    if turns > 1:
        run = _turns(calls, turns, graph)
    samples = min(100, max(7, math.ceil(seconds / (turn * turns))))
    return statistics.median(_each_elapsed([run] * samples)) / turns / len(calls)


def in_turns(contenders: Mapping[str, Sequence[Call]], seconds: float = 4.0) -> dict[str, float]:
    """Median seconds of a call of each contender in a CUDA graph, all of them in turns.

    A GPU at the limit of its power changes its clocks by several per cent within seconds: whoever is timed after the
    others is timed at other clocks. Here every round meets all contenders.

    Args:
        contenders: The calls of each, as `measure` takes them.
        seconds: How long to measure at most, but for the 7 rounds that are the fewest; 20 are the most.
    """
    graphs = []
    for calls in contenders.values():
        _take_turns(calls, 2)
        graphs.append(_turns(calls, 1, True))
    warm = sum(_each_elapsed(graphs))
    rounds = min(20, max(7, math.ceil(seconds / warm))) if graphs else 0
    taken = _each_elapsed(graphs * rounds)
    medians = (statistics.median(taken[place :: len(graphs)]) for place in range(len(graphs)))
    return {name: median / len(calls) for (name, calls), median in zip(contenders.items(), medians, strict=True)}


def _turns(calls: Sequence[Call], turns: int, graph: bool) -> Call:
    run = functools.partial(_take_turns, calls, turns)
    return _capture(run).replay if graph else run


def _capture(run: Call) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call.

    Where the call cannot be captured, the generator of random numbers would go on taking its draws for captured ones,
    and fail those who come later: it gets a new state.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
    except Exception:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        raise
    return graph


def _take_turns(calls: Sequence[Call], turns: int) -> None:
    for _ in range(turns):
        results = [call() for call in calls]
    del results


def _each_elapsed(runs: Sequence[Call]) -> list[float]:
    """Seconds of each of the runs, back to back after one that is not timed.

    Nobody waits in between: to an idle GPU the launch of a graph would count as time of its kernels, some
    microseconds, which is per cents of a short one.
    """
    if not runs:
        return []
    runs[-1]()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    marks[0].record()
    for run, mark in zip(runs, marks[1:], strict=True):
        run()
        mark.record()
    marks[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]


def host_seconds(call: Call, calls: int = 300) -> float:
    """The host's time for a call whose GPU work is so small that it never waits: the least of fifty short rounds.

    What else the machine does can only add to it, and adds more than half on a shared host, where a median of long
    rounds shows that.
    """
    for _ in range(20):
        call()
    rounds, each = [], max(1, calls // 10)
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(each):
            call()
        rounds.append((time.perf_counter() - start) / each)
    torch.cuda.synchronize()
    return min(rounds)


def peak_bytes(call: Call) -> int:
    """Bytes that a call allocates at its peak beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _copy(target: Tensor, source: Tensor) -> Tensor:
    return target.copy_(source)


def _add_nothing(target: Tensor, source: Tensor) -> Tensor:
    return torch.add(source, 0, out=target)


COPIES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "copy_": (_copy, False),
    "copy_ in a graph": (_copy, True),
    "add in a graph": (_add_nothing, True),
}
"""Ways to copy and whether in a graph. None is best everywhere: an H100 copies 3.0 TB/s when `copy_` is launched, and
2.4 when a CUDA graph holds the same call as a node that copies memory."""


def best_copy(gigabytes: float = 2.0) -> Measured:
    """Bytes a second of the fastest way to copy within the GPU's memory, bytes read and bytes written counted."""
    source = torch.randn(int(gigabytes * 2**28), device="cuda")
    target = torch.empty_like(source)
    seconds = {name: _least([functools.partial(way, target, source)], graph) for name, (way, graph) in COPIES.items()}
    name = min(seconds, key=seconds.__getitem__)
    return Measured(2 * source.nbytes / seconds[name], name)


def copy_bandwidth() -> float:
    """Bytes a second of `best_copy`."""
    return best_copy().value


@functools.cache
def seconds_to_copy(bytes_moved: float) -> float:
    """Seconds in which a kernel in a graph copies, cold, so that it reads and writes that many bytes in all."""
    elements = max(1, int(bytes_moved / 8))
    pairs = [[torch.randn(elements, device="cuda") for _ in range(2)] for _ in range(set_count(bytes_moved))]
    return measure([functools.partial(_add_nothing, *pair) for pair in pairs], graph=True)


def best_read(gigabytes: float = 1.0) -> Measured:
    """Bytes a second of a sum or a maximum over the GPU's memory."""
    source = torch.randn(int(gigabytes * 2**28), device="cuda")
    ways: dict[str, Callable[[Tensor], Tensor]] = {"sum in a graph": torch.sum, "amax in a graph": torch.amax}
    seconds = {name: _least([functools.partial(way, source)], True) for name, way in ways.items()}
    name = min(seconds, key=seconds.__getitem__)
    return Measured(source.nbytes / seconds[name], name)


def gemm_rate(size: int = 8192) -> float:
    """FLOP/s of a square bfloat16 matrix product of random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _least([functools.partial(torch.mm, a, b)], True)


def _least(calls: Sequence[Call], graph: bool, tries: int = 3) -> float:
    """The best of several measurements: a ceiling must not come from a moment in which something else ran."""
    return min(measure(calls, graph=graph, seconds=0.1) for _ in range(tries))


def ceilings(*, gemm: bool = False) -> tuple[Ceilings, dict[str, str]]:
    """Measure them; also by what each was reached."""
    copy, read = best_copy(), best_read()
    product = gemm_rate() if gemm else None
    by = {"copy": copy.by, "read": read.by} | ({"gemm": "mm of 8192 x 8192 x 8192 in bf16"} if gemm else {})
    return Ceilings(copy.value, read.value, product), by


def relative_error(result: Tensor, exact: Tensor) -> float:
    """‖result − exact‖ / ‖exact‖ in float64; NaN anywhere makes it NaN."""
    exact = exact.detach().double()
    return float((result.detach().double() - exact).norm() / exact.norm().clamp_min(1e-300))


def contend(
    case: str,
    name: str,
    bytes_moved: float,
    ceiling: float,
    make: Callable[[int], Call],
    *,
    work: float | None = None,
    error: float | None = None,
) -> Row:
    """Time one contender.

    Args:
        case: What is done, on which shape.
        name: The contender.
        bytes_moved: The fewest bytes the case can move.
        ceiling: Bytes/s, or FLOP/s where `work` is given.
        make: Builds the call on the inputs of that index; what it raises becomes the row's note.
        work: FLOPs of the case, where these decide and not its bytes.
        error: Of the contender's result, to put in the row.
    """
    row = Row(case, name, bytes_moved, error=error)
    try:
        calls = [make(index) for index in range(set_count(bytes_moved))]
        calls[0]()
        row.peak = peak_bytes(calls[0])
        row.eager = measure(calls, graph=False)
        row.graph = measure(calls, graph=True)
        row.fraction = (work or bytes_moved) / ceiling / row.graph
    except Exception as failure:  # a contender that is absent or fails must not end the comparison
        reason = (str(failure).strip() or "no message").splitlines()[0]
        row.note = f"{type(failure).__name__}: {reason}"[:160]
        torch.cuda.synchronize()
    return row


def tune[L](
    case: str,
    bytes_moved: float,
    ceiling: float,
    call: Callable[[int, L], Sequence[Tensor | None]],
    default: L,
    launches: Iterable[L],
    refine: Callable[[L], Iterable[L]] = lambda best: (),
    show_best: int = 5,
) -> list[Row]:
    """Time launch configurations of one kernel, best first.

    Args:
        case: What is done, on which shape.
        bytes_moved: The fewest bytes the case can move.
        ceiling: Bytes/s.
        call: Runs the operation on the inputs of that index with that launch.
        default: The launch that is used today; its results are what the others must give, also where an operation
            writes over the same tensors each time: these are emptied in between.
        launches: What to time first.
        refine: Variants of the best two of these, to time then.
        show_best: How many rows to return, besides the default's and those of launches with wrong results.
    """
    written = call(0, default)
    wanted = [None if tensor is None else tensor.clone() for tensor in written]
    rows: dict[L, Row] = {}

    def time_launch(launch: L) -> None:
        row = rows[launch] = Row(case, "default" if launch == default else "", bytes_moved, note=_settings(launch))
        try:
            for tensor in written:
                if tensor is not None:
                    tensor.zero_()
            pairs = zip(call(0, launch), wanted, strict=True)
            row.error = max(relative_error(a, b) for a, b in pairs if a is not None and b is not None)
            turns = [functools.partial(call, index, launch) for index in range(set_count(bytes_moved))]
            row.graph = measure(turns, graph=True, seconds=0.02)
            row.fraction = bytes_moved / ceiling / row.graph
        except Exception as failure:  # too many registers or too much shared memory for this GPU
            row.note += f" {type(failure).__name__}: {failure}"[:120]

    def ranked() -> list[tuple[L, Row]]:
        return sorted(rows.items(), key=lambda item: item[1].graph or math.inf)

    def time_all(found: Iterable[L]) -> None:
        new = [launch for launch in dict.fromkeys(found) if launch not in rows]
        compile_all(functools.partial(call, 0), new)
        for launch in new:
            time_launch(launch)

    time_all((default, *launches))
    time_all([launch for best, _ in ranked()[:2] for launch in refine(best)])
    places = enumerate(row for _, row in ranked())
    return [row for place, row in places if place < show_best or row.name or (row.error or 0) > 0.01]


def compile_all[L](call: Callable[[L], object], launches: Iterable[L]) -> None:
    """Run each launch once, on all cores, since compiling takes most of the time; what fails will fail again, alone."""
    if not torch.cuda.is_available():
        return
    torch.cuda.synchronize()  # the threads have streams of their own
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wait([pool.submit(call, launch) for launch in launches])
    torch.cuda.synchronize()


def _settings(launch: object) -> str:
    """A launch without the name of its class, to keep the table narrow."""
    return str(launch).partition("(")[2].rstrip(")")
