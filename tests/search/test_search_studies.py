"""``tools/search_studies.py``: a study that grows in slices, and what is made of it, at a tiny size."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from composer_search.study import Study

TOOL = Path(__file__).parents[2] / "tools" / "search_studies.py"
TINY = ("--preset", "smoke", "--steps", "1", "--batch-size", "4")


@pytest.fixture
def tool(monkeypatch):
    """The script as a module, with fewer sequences and seeds."""
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("search_studies", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "search_studies", module)  # dataclasses look there
    spec.loader.exec_module(module)
    for name, value in (("PROPOSED", 3), ("BATCH", 2), ("SEEDS", 2), ("KNOWN", module.KNOWN[:1])):
        monkeypatch.setattr(module, name, value)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["search_studies.py", *arguments])
        module.main()

    return run


def trainings(folder):
    return (folder / "trainings.jsonl").read_text().splitlines()


def test_slices_make_studies_and_nothing_is_trained_twice(tool, tmp_path, capsys):
    folder = ("--folder", str(tmp_path))
    tool("plan", *folder)
    listed = (tmp_path / "sixteen.txt").read_text().split()
    assert len(listed) == 3
    with pytest.raises(SystemExit, match="3 sequences, 0 scored"):
        tool("plan", *folder)
    try:  # ends in the middle of a study, or between two where it was quick
        tool("run", *folder, *TINY, "--seconds", "0.5", "--at-once", "8")
    except SystemExit as stop:
        assert not stop.code
    tool("run", *folder, *TINY, "--at-once", "8")
    lines = trainings(tmp_path)
    assert len(lines) == 2 * (64 * 2 + 4)  # two tasks: six blocks with two seeds, sixteen with one
    tool("collect", *folder, *TINY)
    assert trainings(tmp_path) == lines
    six, sixteen, known = (Study.load(tmp_path / name) for name in ("six", "sixteen", "sixteen-known"))
    assert len(six.completed) == 64 and all(len(trial.seed_scores) == 2 for trial in six.completed)
    assert [str(trial.sequence) for trial in sixteen.completed] == listed
    assert [str(trial.sequence) for trial in known.completed] == ["2A5M2A3M1A3M"]
    assert "2A5M2A3M1A3M" in capsys.readouterr().out
    assert json.loads((tmp_path / "six/stacked-1b.json").read_text())["sequence"]
    tool("plan", *folder)
    assert len((tmp_path / "sixteen.txt").read_text().split()) == 5


def test_what_is_not_whole_is_not_collected(tool, tmp_path, capsys):
    """Without the last training of a task the study has that task no more, and with one task there is none."""
    folder = ("--folder", str(tmp_path))
    tool("run", *folder, *TINY)
    lines = trainings(tmp_path)
    last = max(place for place, line in enumerate(lines) if '"memorization' in line and '"MMMMMM"' in line)
    (tmp_path / "trainings.jsonl").write_text("".join(f"{line}\n" for line in lines if line != lines[last]))
    tool("collect", *folder, *TINY)
    assert Study.load(tmp_path / "six").settings.evaluator["seeds"] == 1
    kept = [line for line in lines if '"memorization' not in line]
    (tmp_path / "trainings.jsonl").write_text("".join(f"{line}\n" for line in kept))
    tool("collect", *folder, *TINY)
    assert "six: fewer than two tasks are whole" in capsys.readouterr().out
