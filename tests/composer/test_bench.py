"""The throughput measurement: what it records adds up, and what it refuses."""

import statistics

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS


def test_figures_follow_from_the_times() -> None:
    bench = pytest.importorskip("composer_megatron.bench", reason="needs the extra [train]")
    composite = Architecture(CompositeSequence.parse("2A4M"), PRESETS["tiny"])
    result = bench.bench_training(composite, bench.Workload(seq_len=16, batch=2, warmup=1, steps=3))
    assert set(result["models"]) == {"composite", "baseline"}
    for name, architecture in (("composite", composite), ("baseline", composite.baseline())):
        row = result["models"][name]
        assert len(row["seconds"]) == 3
        assert row["tokens_per_second"] == pytest.approx(32 / statistics.median(row["seconds"]))
        assert row["tflops"] * 1e12 == pytest.approx(row["tokens_per_second"] * architecture.flops_per_token(16))
        assert row["params_total"] == architecture.params_total
    rates = [result["models"][name]["tokens_per_second"] for name in ("composite", "baseline")]
    assert result["speedup"] == pytest.approx(rates[0] / rates[1])
    assert result["environment"]["packages"]["torch"]


def test_workloads_that_time_nothing() -> None:
    bench = pytest.importorskip("composer_megatron.bench", reason="needs the extra [train]")
    for changes in ({"seq_len": 0}, {"batch": 0}, {"steps": 0}, {"warmup": -1}):
        with pytest.raises(UsageError, match=next(iter(changes))):
            bench.Workload(**({"seq_len": 8, "batch": 1} | changes))
