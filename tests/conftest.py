"""Failures are named as they come. The benchmark scripts without a GPU: tiny shapes, clocks that return a constant."""

import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):  # not in processes of xdist
        config.pluginmanager.register(FailuresAsTheyCome(terminal))


class FailuresAsTheyCome:
    """Prints a failure at once, so that a run that a time limit cuts off has named what failed."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)  # where, and the message
            self.terminal.ensure_newline()
            self.terminal.write_line(f"failed: {report.nodeid} ({report.when}) {crash or report.longreprtext}")


FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script of `benchmarks/` by its name, which finds its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


CLOCK = 1e-3
"""Seconds that everything takes."""

SHAPES: dict[str, Any] = {
    "rms_norm": [(8, 48)],
    "add_rms_norm": [(8, 48)],
    "swiglu": [(8, 64)],
    "cross_entropy": [(6, 64, "bfloat16"), (6, 50, "bfloat16")],
    "linear_cross_entropy": [(32, 16, 64), (32, 16, 48)],
    "adamw": {"two": [(16, 8), (16,)]},
}
"""Shapes for scripts whose shapes are plain tuples."""

NUMBERS = {
    "rope": (16, 1, 4, 2, 8),
    "attention": (2, 32, 4, 2, 16),
    "decode_attention": (2, 64, 2, 2, 16, 16),
    "linear_decode": (2, 24, 64, True, True),
    "wgrad_accumulate": (32, 16, 8),
    "fp8": (32, 16, 48),
}
"""Arguments of `Shape` for the others."""

RunScript = Callable[..., dict[str, Any]]


@pytest.fixture
def kernel_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[RunScript]:
    """Runs ``benchmarks/bench_<op>.py`` with a GPU of cardboard: ``(op, *flags, change=)`` gives the JSON it writes.

    `change` gets the script's module before it runs.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        """What is asked for on "cuda" is made on the CPU."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return func(*args, **kwargs)

    for name, value in {
        "get_device_properties": SimpleNamespace(
            L2_cache_size=1, multi_processor_count=2, major=9, minor=0, shared_memory_per_block_optin=232448
        ),
        "get_device_capability": (9, 0),
        "get_device_name": "no GPU",
        "current_device": 0,
        "empty_cache": None,
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.syspath_prepend(str(FOLDER))
    timing = importlib.import_module("timing")  # the others take these functions from there
    monkeypatch.setattr(timing, "own_stream", nullcontext)
    limits = {gemm: timing.Ceilings(1e12, 1e12, 1e12 if gemm else None) for gemm in (False, True)}
    monkeypatch.setattr(timing, "ceilings", lambda gemm: (limits[gemm], {"copy": "a copy", "read": "a read"}))
    monkeypatch.setattr(timing, "measure", lambda calls, **_: _run_each(calls))
    monkeypatch.setattr(timing, "in_turns", lambda calls: {name: _run_each(each) for name, each in calls.items()})
    monkeypatch.setattr(timing, "host_seconds", lambda call: _run_each([call]))
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 0)

    def run(op: str, *flags: str, change: Callable[[ModuleType], None] = lambda module: None) -> dict[str, Any]:
        module, output = importlib.import_module(f"bench_{op}"), tmp_path / f"{op}.json"
        shapes = [module.Shape(*NUMBERS[op])] if op in NUMBERS else SHAPES[op]
        if op == "cross_entropy":
            shapes = [(rows, width, getattr(torch, dtype)) for rows, width, dtype in shapes]
        for name in {"QUICK", "SHAPES", "TUNED", "CASES"} & set(vars(module)):
            monkeypatch.setattr(module, name, shapes)
        change(module)
        monkeypatch.setattr(sys, "argv", [str(module.__file__), "--quick", "--output", str(output), *flags])
        with OnCpu():
            module.main()
        return json.loads(output.read_text())

    yield run
    for name in ("timing", "session", "contest", *(f"bench_{op}" for op in (*SHAPES, *NUMBERS))):
        sys.modules.pop(name, None)


def _run_each(calls: Iterable[Callable[[], object]]) -> float:
    for call in calls:
        call()
    return CLOCK
