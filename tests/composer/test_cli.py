"""The program: what it prints for people and for programs, and that no mistake ends in a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from composer_megatron import cli
from composer_megatron.architecture import Architecture
from composer_megatron.errors import ComposerError


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    try:
        cli.main(list(arguments))
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    return Outcome(status, *capsys.readouterr())


def test_extrapolate_prints_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "extrapolate", "2A4M", "--method", "stack", "--shape", "1b", "--json")
    found = json.loads(done.out)
    assert set(found) == {
        *("sequence", "runs", "blocks", "attention", "mlp", "params_non_embedding", "params_total"),
        *("kv_bytes_per_token", "kv_ratio", "flops_per_token", "flops_ratio"),
        *("counts", "active_parameters", "state_bytes"),
    }
    assert (found["blocks"], found["attention"], found["mlp"]) == (27, 9, 18)
    assert found["kv_ratio"] == 16 / 9
    assert found["params_non_embedding"] == 1_000_398_848
    assert sum(length for _, length in found["runs"]) == 27


def test_from_aggregate_to_architecture_to_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    aggregate, output, plan = (tmp_path / name for name in ("aggregate.json", "deep/architecture.json", "plan.json"))
    aggregate.write_text('{"sequence": "2A4M"}')
    shape = ("--shape", "tiny", "--match", "parameters")
    assert run(capsys, "extrapolate", str(aggregate), *shape, "--output", str(output)).status == 0
    assert Architecture.load(output).origin["from"] == "2A4M"
    done = run(capsys, "plan", str(output), "--pp", "2", "--json", "--output", str(plan))
    assert json.loads(done.out) == json.loads(plan.read_text())
    assert len(json.loads(done.out)["stages"]) == 2
    shown = run(capsys, "plan", str(output), "--pp", "2").out
    assert "pipeline pattern" in shown
    assert "Llama baseline" in shown


def test_plan_prints_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("--shape", "1b", "--seq-len", "4096", "--tp", "1", "--pp", "8", "--vpp", "4")
    done = run(capsys, "plan", "(2A4M)x10+4M", *layout, "--json")
    found = json.loads(done.out)
    assert {"pattern", "stages", "step_time", "bubble", "bubble_equal_split", "memory_bytes", "params_per_rank"} <= set(
        found
    )
    assert len(found["stages"]) == 32
    assert len(found["memory_bytes"]) == len(found["params_per_rank"]) == 8
    assert found["pattern"].replace("|", "") == "**----" * 10 + "----"
    assert found["pattern"].count("|") == 31
    assert found["bubble"] < found["bubble_equal_split"]
    assert 0 < found["schedule_time_at_least"] <= found["step_time"]
    shown = run(capsys, "plan", "(2A4M)x10+4M", *layout).out
    assert "bubble" in shown
    assert "no cut can take less than" in shown
    assert "assumes" in shown


def test_plan_compares_layouts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = run(
        capsys, "plan", "(AM)x14", "--shape", "350m", "--gpus", "4", "--json", "--output", str(tmp_path / "plans")
    )
    found = json.loads(done.out)
    assert found == json.loads((tmp_path / "plans").read_text())
    assert {layout["ranks"] for layout in found["layouts"]} == {4}
    shown = run(capsys, "plan", "(AM)x14", "--shape", "350m", "--gpus", "4").out
    assert "dp 4" in shown
    assert "tokens/s" in shown
    assert "predicted, not measured" in shown


def test_plan_from_a_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="needs the extra [train]")
    path = str(tmp_path / "profile.json")
    measured = run(capsys, "profile", path, "--shape", "tiny", "--seq-len", "16", "--repeats", "1", "--json")
    assert set(json.loads(measured.out)["seconds"]["blocks"]) == {"A", "M"}
    plan = ("plan", "2A4M", "--shape", "tiny", "--seq-len", "16", "--pp", "2", "--profile", path)
    found = json.loads(run(capsys, *plan, "--device", "cpu", "--json").out)
    assert found["times"] == "measured on cpu"
    assert found["mfu"] is None
    assert not any("predicted" in line for line in found["assumes"])
    other = run(capsys, "plan", "2A4M", "--shape", "demo", "--seq-len", "16", "--profile", path)
    assert other.status == 2
    assert "profile is of shape 'tiny'" in other.err


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch" in json.loads(run(capsys, "env", "--json").out)["packages"]
    assert "megatron-core" in run(capsys, "env").out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["extrapolte"], 2, "did you mean 'extrapolate'"),
        (["dance"], 2, "the commands are search"),
        (["extrapolate", "2A4X"], 2, "unknown primitive 'X'"),
        (["extrapolate", "0A"], 2, "at least 1"),
        (["extrapolate", ""], 2, "empty"),
        (["extrapolate", "(2A"], 2, "never closed"),
        (["extrapolate", "2A4M", "--shape", "1B"], 2, "did you mean '1b'"),
        (["extrapolate", "2A4M", "--shape", "absent.json"], 1, "absent.json"),
        (["extrapolate", "absent.json"], 1, "absent.json"),
        (["extrapolate", "2A4M", "--seq-len", "0", "--json"], 2, "seq_len=0"),
        (["extrapolate", "60M", "--shape", "tiny"], 2, "more than the"),
        (["plan", "2A4M"], 2, "add --shape"),
        (["plan", "2A4M", "--shape", "tiny", "--pp", "7"], 2, "7 pipeline stages for the 6 blocks"),
        (["plan", "2A4M", "--shape", "tiny", "--tp", "3"], 2, "does not divide"),
        (["plan", "6A6M", "--shape", "tiny", "--pp", "2", "--vpp", "2", "--micro-batches", "3"], 2, "a multiple of 2"),
        (["plan", "6A6M", "--shape", "tiny", "--vpp", "2"], 2, "one pipeline rank"),
        (["plan", "2A4M", "--shape", "tiny", "--cp", "4", "--seq-len", "100"], 2, "no multiple of 8"),
        (["plan", "2A4M", "--shape", "1b", "--pp", "2", "--memory-limit", "1"], 2, "the least possible is"),
        (
            ["plan", "2A4M", "--shape", "tiny", "--micro-batches", "3", "--global-batch-size", "3"],
            2,
            "give one of them",
        ),
        (["plan", "2A4M", "--shape", "tiny", "--dp", "2", "--global-batch-size", "3"], 2, "no multiple of 2"),
        (["plan", "2A4M", "--shape", "tiny", "--device", "h10"], 2, "did you mean 'h100'"),
        (["plan", "2A4M", "--shape", "tiny", "--device", "cpu"], 2, "--profile"),
        (["plan", "2A4M", "--shape", "tiny", "--profile", "absent.json"], 1, "absent.json"),
        (["plan", "2A4M", "--shape", "tiny", "--mtp", "1X"], 2, "unknown primitive 'X'"),
        (["plan", "2A4M", "--shape", "tiny", "--gpus", "2", "--tp", "2"], 2, "leave one of them out"),
        (["plan", "2A4M", "--shape", "tiny", "--gpus", "2", "--sequence-parallel"], 2, "--sequence-parallel beside"),
        (["plan", "2A4M", "--shape", "tiny", "--gpus", "2", "--distributed-optimizer"], 2, "leave one of them out"),
        (["plan", "2A4M", "--shape", "70b", "--gpus", "1"], 2, "the least needs"),
        (["plan", "2A4M", "--shape", "tiny", "--memory-limit", "-3"], 2, "expected GB, more than 0"),
        (["plan", "2A4M", "--shape", "tiny", "--memory-limit", "nan"], 2, "expected GB, more than 0"),
        (["flags", "absent.json"], 1, "absent.json"),
        (["import", "absent", "run"], 1, "absent is no folder"),
        (["watch", "absent-study"], 1, "absent-study"),
        (["watch", "absent-study", "--seconds", "0"], 2, "more than 0"),
        (["evidence", "oracle", "absent-study"], 1, "absent-study"),
        (["evidence", "regret", "absent-study"], 1, "absent-study"),
        (["evidence", "agreement", "absent.json"], 1, "absent.json"),
        (["evidence", "ablation", "absent-study"], 1, "absent-study"),
        (["evidence", "growth", "2X"], 2, "unknown primitive 'X'"),
        (["evidence", "dance"], 2, "oracle"),
        (["profile", "profile.json", "--seq-len", "0"], 2, "seq_len=0"),
        (["plan", "a.json", "--shape", "tiny"], 2, "has its own shape"),
        (["aggregate", "absent-study"], 1, "absent-study"),
        (["generate", "absent-run", "--prompt", "x"], 1, "absent-run"),
        (["eval", "absent-run", "--text", "absent-text"], 1, "absent-"),
        (["export", "absent-run", "out"], 1, "absent-run"),
        (["report", "absent-study"], 1, "absent-study"),
        (["report", "--run", "nameless"], 2, "NAME="),
        (["report"], 2, "nothing to report"),
        (["search", "study", "--length", "0"], 2, "length=0"),
        (["search", "study", "--budget", "0"], 2, "budget=0"),
        (["search", "study", "--strategy", "end", "--step", "9"], 2, "expected 1 to 6 blocks"),
        (["search", "study", "--objective", "acuracy"], 2, "unknown metric 'acuracy'"),
        (["search", "study", "--constraint", "attention < 1/3"], 2, "expected one such as"),
        (["search", "study", "--preset", "small-text"], 2, "needs text"),
        (["search", "study", "--text", "a.txt"], 2, "belongs to the evaluator"),
        (["search", "study", "--workers", "-1"], 2, "workers=-1"),
        (["bench", "kernels", "--ops", "dance"], 2, "no such kernel benchmark"),
        (["bench", "training", "--budget", "soon"], 2, "--budget"),
        (["train", "--architecture", "absent.json", "--text", "t", "--run-dir", "r"], 1, "absent.json"),
        (["extrapolate", "2A4M", "--", "--lr", "1"], 2, "megatron-flags"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_end_with_one_message(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(capsys, *arguments)
    assert done.status == status, done.err + done.out
    assert words in done.err + done.out
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_flags_that_no_shell_could_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    architecture = str(tmp_path / "architecture.json")
    run(capsys, "extrapolate", "2A4M", "--shape", "tiny", "--output", architecture)
    folders = ["--architecture", architecture, "--text", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    done = run(capsys, "train", *folders, "--megatron-flags=--lr '1")
    assert done.status == 2
    assert "No closing quotation" in done.err


@pytest.mark.parametrize(("given", "wanted"), [(["--workers", "0"], 0), (["--workers", "3"], 3), ([], 1)])
def test_search_without_workers_runs_in_this_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: list[str], wanted: int
) -> None:
    asked: list[int] = []

    def search(*_: object, workers: int, **__: object) -> None:
        asked.append(workers)
        raise ComposerError("enough")

    monkeypatch.setattr("composer_search.strategies.search", search)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert run(capsys, "search", "study", *given).status == 1
    assert asked == [wanted]


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "extrapolate", "2A4X", "--debug")
    assert done.status == 2
    assert "Traceback" in done.err
    assert done.err.rstrip().splitlines()[-1].lstrip().startswith("^")


def test_train_dry_run_starts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int | None] = []  # test_train.py has what is checked there
    monkeypatch.setattr(
        "composer_megatron.train.megatron_command_line", lambda options, processes: asked.append(processes)
    )
    monkeypatch.setattr("composer_megatron.data_flags.load_text", lambda options: None)
    architecture = tmp_path / "architecture.json"
    run(capsys, "extrapolate", "2A4M", "--shape", "tiny", "--output", str(architecture))
    folders = ["--architecture", str(architecture), "--text", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    done = run(
        capsys,
        "train",
        *folders,
        "--processes",
        "2",
        "--pp",
        "2",
        "--dry-run",
        "--",
        "--log-throughput",
        "--wandb-exp-name",
        "b c",
    )
    assert done.status == 0, done.err
    assert asked == [2]
    command = done.out.splitlines()[-1]
    assert "-m torch.distributed.run --standalone --nproc-per-node 2 -m composer_megatron.train" in command
    assert command.endswith("--log-throughput --wandb-exp-name 'b c'")
    assert "balance" in done.out
    assert not (tmp_path / "run").exists()


def test_module_and_help_without_optional_packages() -> None:
    """``python -m composer_megatron --help`` lists every command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "composer_megatron", "--help"], capture_output=True, text=True, check=True
    )
    for command in cli.COMMANDS:
        assert command.__name__.strip("_").partition("_")[0] in done.stdout


def test_a_closed_pipe_is_no_error() -> None:
    line = f"{sys.executable} -m composer_megatron plan 2A4M --shape 8b --json | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert done.stderr == ""
