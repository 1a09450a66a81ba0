"""TransformerEngine chooses its attention: which one it was is said, and the unfused one is compared to nothing."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from composer_megatron import backend as backends
from composer_megatron.architecture import Architecture
from composer_megatron.backend import BACKENDS, get_backend
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

ROOT = Path(__file__).parents[2]
SHAPE = PRESETS["tiny"]
MODULE = "transformer_engine.pytorch.attention.dot_product_attention"
"""Where it writes down what it chose."""


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({}, None),  # imported, and not yet run
        ({"use_flash_attention": None, "use_fused_attention": None, "use_unfused_attention": None}, None),
        ({"use_flash_attention": True, "flash_attention_backend": "2.8.3"}, "FlashAttention 2.8.3"),
        ({"use_flash_attention": False, "use_fused_attention": True}, "fused, by cuDNN"),
        ({"use_fused_attention": False, "use_unfused_attention": 1}, backends.UNFUSED),
    ],
)
def test_the_attention_that_it_chose_is_named(monkeypatch, chosen, said):
    pytest.importorskip("megatron.core.extensions.transformer_engine")
    monkeypatch.setattr(backends, "require", lambda *_: None)
    monkeypatch.setenv("NVTE_FLASH_ATTN_V4", "0")
    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(_attention_backends=chosen))
    assert backends.transformer_engine_attention() == said
    row = BACKENDS["te"].__wrapped__()
    wanted = "TransformerEngine" if said is None else f"TransformerEngine: {said}"
    assert f"| attention: {wanted} |" in row.report(SHAPE, torch.float32)
    assert "TransformerEngine" not in get_backend("local").report(SHAPE, torch.float32)


def test_without_it_there_is_no_choice(monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    assert backends.transformer_engine_attention() is None


class _Prepared:
    """Has computed attention as it is told, and is measured at two seconds a step."""

    def __init__(self, model: str, backend: str, answer: dict) -> None:
        self.model, self.backend, self.name = model, backend, f"{model} {backend}"
        self.architecture = Architecture(CompositeSequence("AM"), SHAPE)
        measured = {"seconds": [2.0], "peak_bytes": None, "loss": 1.0}
        self._answers = [{"prepared_in": 1.0, "says": ""} | answer, measured | answer]

    def send(self, **_) -> None: ...

    def receive(self) -> dict:
        return self._answers.pop(0)


def test_an_unfused_attention_is_said_and_compared_to_nothing(load, capsys, tmp_path: Path) -> None:
    bench, worker = load("bench_training"), load("training_worker")
    made = worker.Worker(Architecture(CompositeSequence("AM"), SHAPE), "te", None)
    assert made._chosen_attention() == {}  # no trainer
    made.trainer = SimpleNamespace(attention="fused, by cuDNN")
    fused = made._chosen_attention()
    assert fused == {"attention": "fused, by cuDNN"}
    made.trainer.attention = worker.UNFUSED
    unfused = made._chosen_attention()
    contenders = [
        _Prepared("llama", "te", unfused),
        _Prepared("stacked", "te", fused),
        _Prepared("llama", "compile", {}),
        _Prepared("stacked", "compile", {}),
    ]
    size = bench.Workload(16, 1, 1)
    case = bench.Case(size, contenders, {"copy": None, "gemm": None})
    case.prepare()
    assert f"  llama te: {worker.UNFUSED_NOTE}\n" in capsys.readouterr().out
    assert case.row(contenders[0])["unfair"] == worker.UNFUSED_NOTE  # before anything was measured
    report = bench.Report(tmp_path / "rows.json", case.ceilings, {})
    for contender in case.round(0, 1):
        report.put(case.row(contender))
    rows = {f"{row['model']} {row['backend']}": row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["llama te"]["attention"] == worker.UNFUSED
    assert rows["llama te"]["note"] == rows["llama te"]["unfair"] == worker.UNFUSED_NOTE
    assert rows["llama te"]["tokens_per_second"] == 8.0
    assert rows["stacked te"]["attention"] == "fused, by cuDNN"
    assert rows["stacked te"]["note"] == ""
    assert all("unfair" not in row for name, row in rows.items() if name != "llama te")
    report.show(bench.Heat({each.model: each.architecture for each in contenders}, (), 16))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    ratios = {" ".join(line[:2]): line[8:10] for line in lines}  # after six figures
    assert ratios == {
        "llama te": ["-", "-"],  # not even to itself
        "stacked te": ["-", "1.000"],  # no Llama beside it that may be compared
        "llama compile": ["1.000", "1.000"],
        "stacked compile": ["1.000", "1.000"],
    }


def test_a_trainer_asks_after_its_steps(load, monkeypatch) -> None:
    """The choice is known only then; a backend with attention of its own has none, whatever ran in the process."""
    pytest.importorskip("megatron.core", reason="needs the extra [train]")
    trainer = load("megatron_trainer").MegatronTrainer(
        Architecture(CompositeSequence("AM"), SHAPE), "local", 16, torch.float32
    )
    chosen: dict[str, bool] = {}
    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(_attention_backends=chosen))
    chosen["use_unfused_attention"] = True
    assert trainer.attention is None
    assert "PyTorch SDPA" in trainer.says
    trainer._players = SimpleNamespace(attends_by_itself=lambda: False)
    assert trainer.attention == backends.UNFUSED
