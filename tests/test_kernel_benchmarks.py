"""The kernels' benchmark scripts run to their end; on a CPU our operations compute by PyTorch.

What they time is not judged here; that each of our rows is there, has the right result and no note of a failure is.
"""

import importlib
import sys
import warnings

import pytest
import torch

from composer_megatron import cpu
from composer_megatron.bench.kernels import scripts

pytestmark = pytest.mark.skipif(cpu.has_gpu(), reason="on a GPU the scripts themselves run")


@pytest.mark.parametrize("op", sorted(scripts()))
def test_the_comparison_runs_and_our_results_are_right(op, kernel_benchmark):
    result = kernel_benchmark(op)
    ours = {(row["case"], row["name"]): row for row in result["rows"] if row["name"].startswith("composer")}
    timed = [row for row in ours.values() if "cannot do this call" not in row["note"]]
    assert timed
    for row in timed:
        assert row["graph"] == 1e-3, row
        assert "Error" not in row["note"], row
        # bf16: some roundings of 2^-9, relative to the norm
        assert row["error"] is None or row["error"] < 0.02, row
    assert result["op"] == op
    assert result["host_us"] or op == "linear_cross_entropy"  # whose calls are no small ones


def test_only_some_contenders(kernel_benchmark):
    rows = kernel_benchmark("rms_norm", "--only", "composer,", "torch")["rows"]
    assert {row["name"] for row in rows} == {"composer, main_grad", "torch.compile", "torch"}


def test_only_nobody_is_said_and_writes_nothing(kernel_benchmark, tmp_path):
    with pytest.raises(SystemExit) as end:
        kernel_benchmark("swiglu", "--only", "nobody")
    assert str(end.value.code).startswith("bench_swiglu: --only nobody names nothing here; known: composer, ")
    assert not (tmp_path / "swiglu.json").exists()


def test_a_row_says_how_fast_a_copy_of_as_many_bytes_is(kernel_benchmark):
    for row in kernel_benchmark("swiglu", "--only", "composer")["rows"]:
        assert row["of_copy"] == 1  # these clocks return a constant


def test_who_gives_views_is_not_counted_as_moving_their_bytes(kernel_benchmark):
    rows = {(row["case"], row["name"]): row["bytes"] for row in kernel_benchmark("rope")["rows"]}
    packed = next(case for case, _ in rows if case.startswith("forward packed"))
    shape = importlib.import_module("bench_rope").QUICK[0]
    assert rows[packed, "composer"] == 4 * shape.tokens * (shape.heads + 2 * shape.groups) * shape.dim
    assert rows[packed, "composer"] - rows[packed, "composer, v a view"] == 4 * shape.tokens * shape.groups * shape.dim


@pytest.mark.usefixtures("kernel_benchmark")
def test_a_ceiling_is_the_best_try_of_the_best_way(monkeypatch):
    timing = importlib.import_module("timing")
    tries = iter([0.4, 0.3, 0.5, 0.2, 0.9, 0.9, 0.1, 0.25, 0.3])  # three tries of each of three ways
    monkeypatch.setattr(timing, "measure", lambda calls, **_: next(tries))
    monkeypatch.setattr(torch, "randn", lambda size, device: torch.empty(size))
    assert timing.best_copy(2**-20) == (2 * 1024 / 0.1, "add in a graph")


@pytest.mark.usefixtures("kernel_benchmark")
def test_peers_remarks_stay_away_from_the_table(monkeypatch, recwarn):
    session = importlib.import_module("session")
    monkeypatch.setattr(sys, "argv", ["bench"])
    with session.session("op", "A script."):
        warnings.simplefilter("always")  # as a peer does
        warnings.warn("jax is missing", stacklevel=1)
    assert not recwarn.list
