"""``benchmarks/bench_inference.py`` without a GPU: a tiny shape on the CPU, a clock that says a constant."""

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

pytestmark = pytest.mark.skipif(cpu.has_gpu(), reason="on a GPU the script itself runs")

COPY = 1e9
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
    monkeypatch.setattr(module, "copy_bandwidth", lambda: COPY)
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
    for name in ("bench_inference", "timing"):
        sys.modules.pop(name, None)


def test_every_cell_has_a_row(bench):
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
        assert row["cache"] == row["cache_formula"]
        assert row["prefill"] > 0
        assert row["advantage"] == 1
        assert (row["fused"] is None) == (row["batch"] == 9)
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
