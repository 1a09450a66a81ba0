"""Clocks and checks of the benchmark scripts (``benchmarks/timing.py``), with a GPU of cardboard.

Its clock is a number: kernels in a graph add their time to it, the host's launches theirs.
"""

import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from composer_megatron import cpu

pytestmark = pytest.mark.skipif(cpu.has_gpu(), reason="on a GPU the scripts themselves run")

KERNEL = 50e-6
"""Seconds that a kernel takes."""
START = 10e-6
"""Seconds from the launch of a graph on an idle GPU to its first kernel."""


class Cardboard:
    """A GPU that works off what it is given, and a host that gives it that, each with a clock."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0
        self.capturing: list[int] | None = None

    def kernel(self, launch: float) -> None:
        """One kernel, which takes the host so long to launch."""
        if self.capturing is not None:
            self.capturing.append(1)
            return
        self.host += launch
        self.gpu = max(self.gpu, self.host) + KERNEL

    def capture(self, run):
        self.capturing = kernels = []
        run()
        self.capturing = None

        def replay():
            self.host += START
            self.gpu = max(self.gpu, self.host) + KERNEL * len(kernels)

        return SimpleNamespace(replay=replay)

    def event(self, **_):
        event = SimpleNamespace(time=0.0)

        def record():
            event.time = max(self.gpu, self.host)

        def synchronize():
            self.host = max(self.host, self.gpu)

        event.record, event.synchronize = record, synchronize
        event.elapsed_time = lambda end: 1e3 * (end.time - event.time)
        return event


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("timing")


@pytest.fixture
def gpu(timing, monkeypatch):
    found = Cardboard()
    monkeypatch.setattr(timing, "_capture", found.capture)
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "own")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    return found


@pytest.mark.parametrize("launch", [5e-6, 500e-6])
def test_a_graph_costs_a_slow_host_nothing(timing, gpu, launch):
    calls = [lambda: gpu.kernel(launch)] * 2
    assert timing.measure(calls, graph=True) == pytest.approx(KERNEL, rel=1e-3)
    assert timing.measure(calls, graph=False) == pytest.approx(max(KERNEL, launch), rel=0.03)


def test_in_turns_the_start_of_a_graph_counts_for_nobody(timing, gpu):
    one, two = (lambda: gpu.kernel(5e-6)), (lambda: [gpu.kernel(5e-6) for _ in range(2)])
    seconds = timing.in_turns({"one": [one, one], "two": [two, two]})
    assert seconds == pytest.approx({"one": KERNEL, "two": 2 * KERNEL}, rel=1e-3)
    assert timing.in_turns({}) == {}


@pytest.mark.parametrize("fresh", [True, False])
def test_tuning_notices_a_launch_that_does_nothing(timing, monkeypatch, fresh):
    monkeypatch.setattr(timing, "measure", lambda calls, **_: 1e-3)
    monkeypatch.setattr(timing, "set_count", lambda moved: 1)
    kept = torch.zeros(4)

    def call(index: int, launch: str) -> list[torch.Tensor]:
        result = torch.zeros(4) if fresh else kept
        return [result if launch == "does nothing" else result.fill_(3)]

    rows = timing.tune("case", 16, 1.0, call, "works", ["does nothing", "works as well"])
    errors = {place: row.error for place, row in enumerate(rows)}
    assert sorted(errors.values()) == [0, 0, 1], rows


def test_sets_suffice_for_who_moves_the_fewest_bytes(timing, monkeypatch):
    contest = importlib.import_module("contest")
    monkeypatch.setattr(contest, "set_count", lambda moved: 2 if moved >= 10 else 3)
    monkeypatch.setattr(contest, "seconds_to_copy", lambda moved: 1.0)
    asked = []

    def contend(case, name, moved, limit, make, **_):
        asked.append([make(index) for index in range(contest.set_count(moved))])
        return timing.Row(case, name, moved)

    monkeypatch.setattr(contest, "contend", contend)
    drawn = itertools.count()

    def draw():
        next(drawn)
        return contest.Inputs((torch.ones(2),), (torch.ones(2),))

    case = contest.Contest("", 10, 20, draw, lambda inputs: ([torch.ones(2)], [torch.ones(2)]), {"views": 4})
    list(contest.compare(case, {"views": lambda: lambda x: x * 1, "all": lambda: lambda x: x * 1}, 1.0))
    assert [len(calls) for calls in asked] == [3, 2, 2, 2]
    assert next(drawn) == 3
