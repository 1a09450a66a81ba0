"""``--tune`` of the benchmark scripts runs to its end, with the kernels in the interpreter and few launches a case."""

import itertools
from types import ModuleType

import pytest

from composer_megatron import cpu

pytestmark = pytest.mark.skipif(cpu.has_gpu(), reason="on a GPU the scripts themselves run")


@pytest.mark.parametrize(
    "op",
    ["rms_norm", "add_rms_norm", "swiglu", "rope", "attention", "decode_attention", "adamw", "cross_entropy"],
)
def test_tuning_runs(op, kernel_benchmark, monkeypatch):
    def few(module: ModuleType) -> None:
        for name in {"launches", "forward_launches", "backward_launches"} & set(vars(module)):
            every = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, every=every: itertools.islice(every(*args), 1))
        # these differ by the overlap of kernels, which the interpreter does not know
        monkeypatch.setattr(module, "backward_variants", lambda best: (), raising=False)

    rows = kernel_benchmark(op, "--tune", change=few)["rows"]
    assert "default" in {row["name"] for row in rows}
    for row in rows:
        assert row["graph"] == 1e-3, row
        assert "Error" not in row["note"], row
