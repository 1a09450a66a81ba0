"""The torchrun command: what it holds, and layouts that cannot work."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
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


PRELUDE = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
for step in range(1, 11):
    with (folder / "metrics.jsonl").open("a") as log:
        line = {"iteration": step, "name": "lm loss", "value": 8.0 - step / 10, "time": time.time()}
        log.write(json.dumps(line) + "\\n")
print("Megatron's own chatter")
"""


def run(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "command", lambda self: [sys.executable, "-c", PRELUDE + program, str(folder)])
    launch(run_dir=folder, steps=10).run()


def test_progress_on_the_terminal_and_chatter_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("", tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert "step 10 of 10: loss 7.000" in shown
    assert "chatter" not in shown
    assert "chatter" in (tmp_path / "train.log").read_text()


def test_progress_tells_nothing_of_an_earlier_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which may have come further than the checkpoint from which this one goes on."""
    lines = ({"iteration": step, "name": "lm loss", "value": 1.0, "time": 1.7e9} for step in range(1, 10))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("composer_megatron.progress._SECONDS_BETWEEN_LOOKS", 0.2)
    run("", tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert "loss 1.000" not in shown
    assert "step 10 of 10: loss 7.000" in shown


def test_the_programs_own_message_is_shown_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("error: an older run's\n")
    with pytest.raises(ComposerError, match=r"^the text is empty$"):
        run("print('error: the text is empty'); raise SystemExit(1)", tmp_path, monkeypatch)


def test_a_wrong_request_stays_one_through_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = "print('error: unknown argument'); print('  exitcode  : 2 (pid: 7)'); raise SystemExit(1)"
    with pytest.raises(UsageError, match=r"^unknown argument$"):
        run(program, tmp_path, monkeypatch)


def test_otherwise_the_end_of_the_log_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ComposerError, match=r"(?s)ZeroDivisionError.*exit status 1; the whole log is .*train\.log"):
        run("1 / 0", tmp_path, monkeypatch)


def test_a_run_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    """Killed with -9, the launcher takes the run along: it cannot write on beside the next attempt."""
    program = f"""
import pathlib, sys
from composer_megatron.launch import Launch
sleep = "import os, pathlib, time; pathlib.Path(r'{tmp_path}/pid').write_text(str(os.getpid())); time.sleep(60)"
Launch.command = lambda self: [sys.executable, "-c", sleep]
Launch(architecture=1, text=1, run_dir=pathlib.Path(r"{tmp_path}"), processes=1, tensor_parallel=1, pipeline_parallel=1,
       steps=1, micro_batch_size=1, global_batch_size=1, seq_len=1, learning_rate=1.0).run()
"""
    launcher = subprocess.Popen([sys.executable, "-c", program])
    try:
        pid = wait_for(lambda: int((tmp_path / "pid").read_text()))
        assert Path(f"/proc/{pid}").exists()
    finally:
        launcher.kill()
        launcher.wait()

    def state() -> str:
        stat = Path(f"/proc/{pid}/stat")
        return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else "gone"

    assert wait_for(lambda: state() in ("gone", "Z"))


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true value of `condition`; its errors count as not yet."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError):
            if value := condition():
                return value
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
