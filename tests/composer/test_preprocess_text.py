"""The script: output for people and programs, exit statuses, and Ctrl-C."""

import functools
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "preprocess_text.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "search"))}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def script() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("preprocess_text", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["preprocess_text"] = module
    specification.loader.exec_module(module)
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)
    del sys.modules["preprocess_text"]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"body": f"a text about {number}"}) + "\n" for number in range(50)))
    return path


def test_as_a_program_from_anywhere(lines: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--text", "in/a.jsonl", "--output", "out/text", "--field", "body"]
    command += ["--vocab-size", "270", "--workers", "2", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown.pop("folder") == str(tmp_path / "out" / "text")
    written = json.loads((tmp_path / "out" / "text" / "text.json").read_text())
    del written["inputs"]
    assert shown == written
    assert shown["train"]["documents"] + shown["valid"]["documents"] == 50
    stages = [line.split(" ")[0] for line in done.stderr.splitlines()]
    assert stages == ["reading", "training", "encoding"]  # and no remark of a library's


def test_text_for_people(script: ModuleType, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--text", str(lines), "--output", str(tmp_path / "text"), "--field", "body", "--workers", "1"]
    arguments += ["--vocab-size", "270"]
    script.main(arguments)
    first = capsys.readouterr()
    assert "text: 270 tokens in the vocabulary\n  train: 4" in first.out and "bits a byte on valid" in first.out
    script.main(arguments)
    second = capsys.readouterr()
    assert second.out == first.out.replace("text: ", "text is there already: ", 1)
    assert second.err == ""


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--text", "absent.txt"], 1, "preprocess_text.py: no such file or folder: absent.txt\n"),
        (["--text", "LINES"], 1, "preprocess_text.py: LINES, line 1: no field 'text'; its fields: 'body'\n"),
        (["--text"], 2, "preprocess_text.py: no text is named; give files or folders\n"),
        (["--vocab-size", "5"], 2, "preprocess_text.py: vocab_size=5; expected at least 257\n"),
        (["--vocab-size", "many"], 2, "many"),
        (["--wrokers", "2"], 2, "--workers"),
    ],
)
def test_mistakes(
    script: ModuleType,
    lines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    given = [str(lines) if argument == "LINES" else argument for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        script.main([*given, "--output", str(tmp_path / "text")])
    shown = capsys.readouterr()
    assert stopped.value.code == status
    assert message.replace("LINES", str(lines)) in shown.err and "Traceback" not in shown.err
    assert shown.out == "" and names(tmp_path) == ["in"]


def test_debug_shows_the_traceback(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--text", "absent.txt", "--output", str(tmp_path / "text"), "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_the_display_is_a_bar_on_a_terminal_and_lines_elsewhere(script: ModuleType) -> None:
    shown = {}
    for terminal in (True, False):
        file = io.StringIO()
        display = script.Display(Console(file=file, force_terminal=terminal, width=90))
        with display.bars:
            for done in (1_000_000, 2_000_000):
                display("read", done, None)
            display("tokenizer", 0, None)
            for done in range(0, 2_000_001, 500_000):
                display("encode", done, 2_000_000)
        shown[terminal] = file.getvalue()
    assert "━" in shown[True] and "2.0 MB of 2.0" in shown[True]
    assert shown[False].splitlines() == ["reading 1.0 MB", "training a tokenizer", "encoding 0.0 MB of 2.0"]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """Sent to all processes at once while two of them start or encode, as a terminal does."""
    (tmp_path / "big.txt").write_text("".join(f"{index} words {index * index} more\n" for index in range(600_000)))
    command = [sys.executable, str(SCRIPT), "--text", "big.txt", "--output", "out/text", "--workers", "2"]
    command += ["--vocab-size", "257"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has what it runs in the background ignore Ctrl-C, and so would this child. No other thread runs here.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        assert process.stderr is not None
        seen = ""
        while "encoding" not in seen:
            line = process.stderr.readline()
            assert line, f"ended before it encoded: {seen}"
            seen += line
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        seen += process.stderr.read()
        assert process.wait() == 130
    assert seen.splitlines()[3:] == ["preprocess_text.py: interrupted; the same command goes on with what is finished"]
    assert names(tmp_path / "out") == []


def test_a_polite_kill_leaves_nothing(
    script: ModuleType, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(display: object, stage: str, done: int, total: int | None) -> None:
        if stage == "encode":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script.Display, "__call__", kill)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--text", str(lines), "--field", "body", "--output", str(tmp_path / "out" / "text")])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert names(tmp_path / "out") == []
