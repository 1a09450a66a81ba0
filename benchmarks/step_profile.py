"""The kernels of a decoding step, by the GPU's own clock."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """What of a step's time something takes.

    Attributes:
        name: A kernel; or the whole step, or the time in which no kernel runs.
        launches: In a step; of all kernels for the whole.
        us: Microseconds a step; of kernels that overlap the sum can be more than the whole.
    """

    name: str
    launches: float
    us: float


def shares(step: Callable[[], None], steps: int = 20) -> list[Share]:
    """Profile steps that were warmed up: the whole, what no kernel runs, and the kernels that take longest first."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return summary([(event.time_range.start, event.time_range.end, event.name) for event in events], steps)


def summary(spans: list[tuple[float, float, str]], steps: int) -> list[Share]:
    """`shares` of kernels given by their begins and ends in microseconds and their names."""
    if not spans:
        return []
    spans = sorted(spans)
    busy, reached = 0.0, spans[0][0]
    for start, end, _ in spans:  # overlapping kernels count once
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = reached - spans[0][0]
    taken = collections.defaultdict[str, list[float]](list)
    for start, end, name in spans:
        taken[name].append(end - start)
    kernels = [Share(name, len(times) / steps, sum(times) / steps) for name, times in taken.items()]
    kernels.sort(key=lambda share: -share.us)
    return [Share("step", len(spans) / steps, whole / steps), Share("no kernel", 0, (whole - busy) / steps), *kernels]
