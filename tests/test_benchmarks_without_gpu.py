"""The benchmark scripts where there is no GPU, or where a flag names nothing: one line, and no traceback."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from composer_megatron import cpu

pytestmark = pytest.mark.skipif(cpu.has_gpu(), reason="on a GPU the scripts themselves run")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
RUN_ON_A_CPU = {"bench_search", "bench_training"}
"""The first at any size, the other at a tiny one."""
SCRIPTS = sorted(path.stem for path in FOLDER.glob("bench_*.py") if path.stem not in RUN_ON_A_CPU)


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The folder of the scripts on the path, and their modules forgotten afterwards."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in [name for name, module in sys.modules.items() if str(FOLDER) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def ending(script: str, *flags: str) -> str | int | None:
    """What a script's `main` ends with."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [script, *flags])
        module.main()
    return end.value.code


@pytest.mark.parametrize("script", [*SCRIPTS, "tune_decoding"])
def test_what_lacks_is_said_in_one_line(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = ending(script)
    assert isinstance(said, str)  # which Python prints on standard error, for the exit status 1
    assert "a CUDA GPU, and there is none" in said
    assert "\n" not in said
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("script", ["bench_swiglu", "bench_training"])
def test_so_it_is_in_a_process(script: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "search"))
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--quick", "--output", str(output)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "GPU" in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--models", "nobody"), "invalid choice: 'nobody' (choose from 'llama', 'stacked', 'stretched')"),
        (("--batches", "0"), "argument --batches: '0' is no number from 1 on"),
        (("--contexts", "512", "1e3"), "argument --contexts: '1e3' is no number from 1 on"),
    ],
)
def test_cells_that_do_not_exist(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending("bench_inference", *flags) == 2
    assert message in capsys.readouterr().err


def test_an_operation_that_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from contextlib import nullcontext

    module = importlib.import_module("bench_host")
    monkeypatch.setattr(module, "own_stream", nullcontext)
    monkeypatch.setattr(module, "measurements", lambda: iter([("rms_norm", dict), ("adamw", dict)]))
    assert ending("bench_host", "--only", "nobody") == (
        "bench_host: --only nobody names nothing here; known: rms_norm, adamw"
    )
    assert capsys.readouterr().out == ""
