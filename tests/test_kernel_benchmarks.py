"""The kernels' benchmark scripts run to their end; on a CPU our operations compute by PyTorch.

What they time is not judged here; that each of our rows is there, has the right result and no note of a failure is.
"""

import pytest

from composer_megatron import cpu
from composer_megatron.bench_kernels import scripts

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
