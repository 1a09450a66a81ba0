"""``tools/search_studies.py``: a study that grows in slices, and what is made of it, at a tiny size."""

import gzip
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from composer_search.study import Study

TOOL = Path(__file__).parents[2] / "tools" / "search_studies.py"
TINY = ("--preset", "smoke", "--steps", "1", "--batch-size", "4")


@pytest.fixture
def tool(monkeypatch):
    """The script, with fewer sequences, seeds, replays and draws; its files are below the folder given first."""
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("search_studies", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "search_studies", module)  # dataclasses look there
    spec.loader.exec_module(module)
    sizes = {"PROPOSED": 3, "BATCH": 2, "SEEDS": 2, "PROPOSERS": ("random",), "REPLAYS": 1, "DRAWS": 1, "VOTES": 20}
    for name, value in {**sizes, "KNOWN": module.KNOWN[:1]}.items():
        monkeypatch.setattr(module, name, value)

    def run(folder, *arguments):
        places = ("--folder", str(folder), "--work", str(folder / "work"))
        monkeypatch.setattr(sys, "argv", ["search_studies.py", *arguments, *places])
        module.main()

    return run


def trainings(folder):
    return (folder / "work/trainings.jsonl").read_text().splitlines()


def studies(folder):
    return [Study.load(folder / "work" / name) for name in ("six", "sixteen", "sixteen-known")]


def test_slices_make_studies_and_nothing_is_trained_twice(tool, tmp_path, capsys):
    tool(tmp_path, "plan")
    listed = (tmp_path / "sixteen.txt").read_text().split()
    assert len(listed) == 3
    with pytest.raises(SystemExit) as stop:
        tool(tmp_path, "plan")
    assert stop.value.code == 2 and "3 sequences, 0 of them scored" in capsys.readouterr().err
    try:  # ends in the middle of a study, or between two where it was quick
        tool(tmp_path, "run", *TINY, "--seconds", "0.5", "--at-once", "8")
    except SystemExit as stop:
        assert not stop.code
    tool(tmp_path, "run", *TINY, "--at-once", "8")
    lines = trainings(tmp_path)
    assert len(lines) == 2 * (64 * 2 + 4)  # two tasks: six blocks with two seeds, sixteen with one
    tool(tmp_path, "collect", *TINY)
    assert trainings(tmp_path) == lines
    six, sixteen, known = studies(tmp_path)
    assert len(six.completed) == 64 and all(len(trial.seed_scores) == 2 for trial in six.completed)
    assert [str(trial.sequence) for trial in sixteen.completed] == listed
    assert [str(trial.sequence) for trial in known.completed] == ["2A5M2A3M1A3M"]
    assert "2A5M2A3M1A3M" in capsys.readouterr().out
    assert json.loads((six.path / "stacked-1b.json").read_text())["sequence"]
    assert all((six.path / f"evidence/{name}.html").exists() for name in ("oracle", "regret", "ablation", "standing"))
    tool(tmp_path, "plan")
    proposed = (tmp_path / "sixteen.txt").read_text().split()
    assert len(proposed) == 5 and proposed[:3] == listed

    kept = {name: (tmp_path / name).read_bytes() for name in ("results.json", "trainings.jsonl.gz")}
    assert gzip.decompress(kept["trainings.jsonl.gz"]).decode().splitlines() == lines
    shutil.rmtree(tmp_path / "work")  # all of it comes again from what is kept, and the new proposals wait
    tool(tmp_path, "collect", *TINY)
    assert [str(trial.sequence) for trial in studies(tmp_path)[1].completed] == listed
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}


def test_the_summary_holds_what_the_studies_say(tool, tmp_path):
    tool(tmp_path, "run", *TINY)
    tool(tmp_path, "collect", *TINY)
    six = Study.load(tmp_path / "work/six")
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"fidelity", "six"}  # nothing of sixteen blocks was proposed
    assert len(found["six"]["scores"]) == 64
    for trial in six.completed:
        row = found["six"]["scores"][str(trial.sequence)]
        assert row.pop("seeds") == pytest.approx(trial.seed_scores, rel=1e-4)
        assert row == pytest.approx(trial.tasks, rel=1e-4)
    task = next(iter(six.completed[0].tasks))
    seeds = [trial.details["tasks"][task]["validation"] for trial in six.completed]
    pooled = np.sqrt(np.var(seeds, axis=1, ddof=1).mean())
    assert found["six"]["standard_deviation"][task]["seeds"] == pytest.approx(pooled, rel=1e-4)
    assert [row["Sequence"] for row in found["six"]["standing"]["rows"]].count("2A4M") == 1
    assert [row["Proposer"] for row in found["six"]["regret"]["rows"]] == ["random"]


def test_what_is_not_whole_is_not_collected(tool, tmp_path, capsys):
    """Without the last training of a task the study has that task no more, and with one task there is none."""
    tool(tmp_path, "run", *TINY)
    lines = trainings(tmp_path)
    last = max(place for place, line in enumerate(lines) if '"memorization' in line and '"MMMMMM"' in line)
    file = tmp_path / "work/trainings.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines if line != lines[last]) + '{"torn')
    tool(tmp_path, "collect", *TINY)
    assert Study.load(tmp_path / "work/six").settings.evaluator["seeds"] == 1
    packed = gzip.decompress((tmp_path / "trainings.jsonl.gz").read_bytes()).decode()
    assert packed.splitlines() == [line for line in lines if line != lines[last]]
    (tmp_path / "trainings.jsonl.gz").unlink()
    file.write_text("".join(f"{line}\n" for line in lines if '"memorization' not in line))
    tool(tmp_path, "collect", *TINY)
    assert "six: fewer than two tasks are whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("run", "--seconds", "-3"), 2, "--seconds: '-3'; expected a number above 0"),
        (("run", "--seconds", "nan"), 2, "expected a number above 0"),
        (("run", "--seconds", "soon"), 2, "'soon'; expected a number above 0"),
        (("run", "--at-once", "0"), 2, "--at-once: '0'; expected an integer above 0"),
        (("run", "--steps", "1.5"), 2, "--steps: '1.5'; expected an integer above 0"),
        (("collect",), 1, "has a training; `run` on a GPU makes them"),
        (("plan",), 1, 'pip install "composer-megatron[search]"'),
    ],
)
def test_mistakes_are_named_before_anything_starts(arguments, status, message, tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("composer_search.proposers.importlib.util.find_spec", lambda name: None)  # as without Ax
    with pytest.raises(SystemExit) as stop:
        tool(tmp_path, *arguments)
    assert stop.value.code == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_trainings_are_named_and_nothing_is_written(tool, tmp_path, capsys):
    missing = tmp_path / "none.jsonl"
    with pytest.raises(SystemExit) as stop:
        tool(tmp_path, "collect", "--trainings", str(missing))
    assert stop.value.code == 1 and f"{missing} is no file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_damaged_trainings_are_named(tool, tmp_path, capsys):
    (tmp_path / "trainings.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:-9])
    with pytest.raises(SystemExit) as stop:
        tool(tmp_path, "collect")
    assert stop.value.code == 1 and "trainings.jsonl.gz is damaged" in capsys.readouterr().err
