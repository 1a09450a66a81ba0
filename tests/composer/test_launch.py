"""The torchrun command: what it holds, and layouts that cannot work."""

import sys
from pathlib import Path
from typing import Any

import pytest

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.launch import Launch


def launch(**changes: Any) -> Launch:
    values = {
        "architecture": Path("a.json"),
        "text": Path("text"),
        "run_dir": Path("run"),
        "processes": 4,
        "tensor_parallel": 2,
        "pipeline_parallel": 2,
        "steps": 100,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "seq_len": 64,
        "learning_rate": 1e-3,
    }
    return Launch(**(values | changes))


def test_command() -> None:
    command = launch(extra=("--log-throughput",)).command()
    assert command[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert command[command.index("--pipeline-model-parallel-size") + 1] == "2"
    assert "--sequence-parallel" in command
    assert command[-1] == "--log-throughput"
    assert "--sequence-parallel" not in launch(tensor_parallel=1).command()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"processes": 3}, "does not divide processes=3"),
        ({"steps": 0}, "steps=0"),
        ({"global_batch_size": 3}, "no multiple of 2"),
        ({"global_batch_size": 0}, "no multiple"),
        ({"processes": 8, "global_batch_size": 6}, "no multiple of 4"),
    ],
)
def test_impossible_layouts(changes: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        launch(**changes)


def test_a_failed_run_says_how_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "command", lambda self: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ComposerError, match="exit status 3.*same command goes on"):
        launch().run()
