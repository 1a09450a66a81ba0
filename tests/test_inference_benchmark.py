"""``benchmarks/bench_inference.py`` without a GPU: a tiny shape on the CPU, a clock that says a constant."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from composer_megatron import cpu
from composer_megatron.files import write_json
from composer_megatron.inference.cache import cache_bytes, make_cache
from composer_megatron.shape import PRESETS

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(cpu.has_gpu(), reason="on a GPU the script itself runs")

COPY, READ = 1e9, 2e9
SECONDS = 1e-2


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the script with those flags; gives what it wrote."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for name, value in (
        ("is_available", True),
        ("get_device_name", "no GPU"),
        ("synchronize", None),
        ("empty_cache", None),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    module = importlib.import_module("bench_inference")
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(module, "IN_GRAPH", (1, 1))
    monkeypatch.setattr(module, "LAUNCHED", (1, 1))
    monkeypatch.setattr(module, "ceilings", lambda: (module.Ceilings(COPY, READ, None), {}))
    monkeypatch.setattr(module, "own_stream", contextlib.nullcontext)
    monkeypatch.setattr(module, "bytes_of_cache", lambda *arguments: cache_bytes(make_cache(*arguments)))

    def elapsed(run):
        run()
        return SECONDS

    monkeypatch.setattr(module, "elapsed", elapsed)
    shape = PRESETS["tiny"].as_dict() | {"name": "small", "baseline_pairs": 12, "vocab_size": 90}
    write_json(tmp_path / "shape.json", shape)

    def run(*flags: str) -> dict:
        output = tmp_path / "inference.json"
        monkeypatch.setattr(
            sys, "argv", ["", "--shapes", str(tmp_path / "shape.json"), "--output", str(output), *flags]
        )
        module.main()
        return json.loads(output.read_text())

    run.module = module
    yield run
    for name in ("bench_inference", "tune_decoding", "inference_rows", "step_profile", "timing"):
        sys.modules.pop(name, None)


def test_every_cell_has_a_row(bench, monkeypatch):
    monkeypatch.setattr(bench.module, "MOST_ROWS", 8)
    found = bench("--batches", "1", "9", "--contexts", "5", "17", "--models", "llama", "stacked")
    rows = found["rows"]
    assert [(row["batch"], row["context"], row["model"]) for row in rows] == [
        (batch, context, model) for batch in (1, 9) for context in (5, 17) for model in ("llama", "stacked")
    ]
    assert set(found["checks"].values()) == {"equal"}
    for row in rows:
        assert row["note"] == ""
        assert row["graph"] == pytest.approx(SECONDS)
        assert row["fraction"] == pytest.approx(row["bytes"] / row["graph"] / COPY)
        assert row["read_fraction"] == pytest.approx(row["fraction"] * COPY / READ)
        assert row["cache"] == row["cache_formula"]
        assert row["prefill"] > 0
        assert row["advantage"] == 1
        assert list(row["fused"]) == ([] if row["batch"] == 9 else ["none", "tail", "full"])
        assert (row["drawn"] is None) == (row["context"] == 17)
    assert rows[1]["cache"] < rows[0]["cache"]
    assert found["gpu"] == "no GPU"


def test_a_cell_without_memory_says_so_and_the_run_goes_on(bench, monkeypatch):
    engine = bench.module.Engine

    def scarce(weights, rows, capacity, **options):
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return engine(weights, rows, capacity, **options)

    monkeypatch.setattr(bench.module, "Engine", scarce)
    rows = bench("--models", "llama", "--batches", "4", "1", "--contexts", "5")["rows"]
    assert [(row["note"], row["graph"] is None) for row in rows] == [("OOM", True), ("", False)]


def test_memory_that_runs_out_in_a_capture_is_called_so_too(bench, monkeypatch):
    """Ending the capture fails then, and with another error."""

    def scarce(*arguments, **options):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(bench.module, "time_steps", scarce)
    rows = bench("--models", "llama", "--batches", "1", "--contexts", "5")["rows"]
    assert [row["note"] for row in rows] == ["OOM"]


def test_past_the_budget_no_cell_begins_and_those_left_out_are_named(bench):
    found = bench("--models", "llama", "--batches", "1", "2", "--contexts", "5", "--budget", "0")
    assert found["rows"] == []
    assert [cell.split(", ", 1)[1] for cell in found["left_out"]] == ["batch 1, context 5", "batch 2, context 5"]


def test_prompts_too_many_for_their_cell_are_timed_at_the_end_or_left_out(bench, monkeypatch):
    """Nine prompts of five tokens are more than 16: known from one prompt; those of 17 are not known."""
    monkeypatch.setattr(bench.module, "MOST_PREFILLED", 16)
    flags = ("--models", "llama", "stacked", "--batches", "1", "9", "--contexts", "5", "17")
    found = bench(*flags, "--budget", "1e6")
    for row in found["rows"]:
        assert (row["prefill"] is None) == (row["prefill_advantage"] is None) == (row["context"] == 17)
    assert found["left_out"][0].endswith("llama, batch 1, context 17: prefill")
    assert len(found["left_out"]) == 4


def test_a_profile_counts_overlapping_kernels_once(bench):
    """Two steps: a from 0 to 4, b from 3 to 5, a pause, and the same again from 10 on."""
    summary = bench.module.shares.__globals__["summary"]
    found = summary([(10, 14, "a"), (0, 4, "a"), (3, 5, "b"), (13, 15, "b")], 2)
    assert [(share.name, share.launches, share.us) for share in found] == [
        ("step", 2, 7.5),
        ("no kernel", 0, 2.5),
        ("a", 1, 4),
        ("b", 1, 2),
    ]


def test_tuning_keeps_of_each_product_the_launch_with_which_a_step_is_quickest(bench, monkeypatch, tmp_path):
    """A clock by which eight warps in each product are best."""
    tuner = importlib.import_module("tune_decoding")
    monkeypatch.setattr(tuner, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(tuner, "own_stream", contextlib.nullcontext)
    monkeypatch.setattr(tuner, "launch_row", lambda *arguments: None)
    monkeypatch.setattr(tuner.op, "default_launch", tuner.op.default_launch)  # put back at the end

    def time_steps(engine, context, plan):
        engine.step()
        return 1e-6 * (100 - sum(launch.warps for launch in tuner.op.default_launch.chosen.values()))

    monkeypatch.setattr(tuner, "time_steps", time_steps)
    shape = PRESETS["tiny"].as_dict() | {"hidden_size": 512, "ffn_hidden_size": 1024, "vocab_size": 90}
    write_json(tmp_path / "wide.json", shape | {"name": "wide"})
    output = tmp_path / "tuned.json"
    monkeypatch.setattr(sys, "argv", ["", "--shape", str(tmp_path / "wide.json"), "--output", str(output)])
    tuner.main()
    rows = json.loads(output.read_text())["rows"]
    best = {tuple(row["product"]): row["best"] for row in rows if "best" in row}
    assert len(best) == 5
    # 64 inputs are fewer than any block that is tried.
    assert {product: found if product[1] == 64 else found["warps"] for product, found in best.items()} == {
        product: "the default" if product[1] == 64 else 8 for product in best
    }
    assert {(row["requests"], row["fused"]) for row in rows if "requests" in row} == {
        (requests, fused) for requests in (1, 2, 8, 32, 64) for fused in (True, False)
    }
