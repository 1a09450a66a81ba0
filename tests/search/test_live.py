"""The live view: what it shows of a study, and that watching touches nothing and ends by itself."""

import dataclasses
import io
import json
import random
import re
from pathlib import Path

import pytest
from rich.console import Console

from composer_megatron.errors import FileError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape
from composer_search.constraints import Criteria
from composer_search.effort import effort
from composer_search.live import live_view, render, watch
from composer_search.objectives import Target
from composer_search.proposers import Proposal
from composer_search.study import Space, Study, StudySettings, Trial


def trial(number: int, letters: str, score: float | None) -> Trial:
    kind = (
        {"error": "the worker died"} if score is None else {"score": score, "spread": 0.02, "seed_scores": (score,) * 2}
    )
    finished = "2026-01-01T00:00:00+00:00"
    sequence = CompositeSequence(letters)
    return Trial(trial=number, sequence=sequence, proposer="random", seconds=30.0, finished=finished, **kind)


def settings(budget: int = 8) -> StudySettings:
    return StudySettings(
        space=Space("AM", 6), proposer="random", initial=5, seed=0, budget=budget, evaluator={"name": "mad"}
    )


def shown(study: Study, running: list[Proposal] | None, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(study, running, width=width))
    return console.file.getvalue()


def fill(folder: Path, scores: list[float | None], budget: int = 8) -> Study:
    rng = random.Random(0)
    with Study.open(folder, settings(budget)) as study:
        for number, score in enumerate(scores):
            study.record(trial(number, "".join(rng.choice("AM") for _ in range(6)), score))
    return study


def test_shows_progress_cost_best_failed_and_running(tmp_path):
    study = fill(tmp_path, [0.5, 0.9, None, 0.6])
    text = shown(study, [Proposal(4, CompositeSequence("AAMMMM"), "random")])
    assert "4 of 8 trials" in text and "30.0 s each" in text
    assert "2 min 00 s spent, 2 min 00 s to go" in text
    assert re.findall(r"^ +(\d) +0\.\d{4}", text, re.M) == ["1", "3", "0"]  # best first
    assert "1 failed; the last one, trial 2" in text and "the worker died" in text
    assert "running  2A4M" in text and "▁█▃" in text.replace(" ", "")
    assert "running" not in shown(study, None) and "running  nothing" in shown(study, [])


@pytest.mark.parametrize("scores", [[], [0.5], [0.5] * 5, [None], [0.1] * 8])
@pytest.mark.parametrize("width", [30, 200])
def test_any_study_can_be_shown(tmp_path, scores, width):
    text = shown(fill(tmp_path, scores), [], width)
    assert "nan" not in text and all(len(line) <= width for line in text.splitlines())


def test_live_view_redraws_on_a_terminal_and_prints_lines_elsewhere(tmp_path):
    study = fill(tmp_path, [0.5])
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with live_view(terminal) as progress:
        progress(study, [Proposal(1, CompositeSequence("AAMMMM"), "random")])
        assert "0.5000" in terminal.file.getvalue()
        study.trials.append(trial(1, "AMAMAM", 0.75))
        progress(study, [])
    assert "0.7500" in terminal.file.getvalue()
    plain = Console(file=io.StringIO(), force_terminal=False, width=100)
    with live_view(plain) as progress:
        progress(study, [])
        study.trials.append(trial(2, "AMAMMM", 0.25))
        progress(study, [])
    assert "0.250" in plain.file.getvalue() and "\x1b" not in plain.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_watch_follows_a_writer_to_the_end_and_touches_nothing(tmp_path, terminal):
    """The writer appends a torn line, then the whole one, between looks, as another process would."""
    fill(tmp_path, [0.5], budget=3)
    log = tmp_path / "trials.jsonl"
    second, third = (
        json.dumps(trial(n, "AMAMA" + letter, 0.6 + n / 10).as_dict()) for n, letter in ((1, "A"), (2, "M"))
    )
    writes = iter([second[:20], second[20:] + "\n", third + "\n"])
    looks = []

    def write(seconds: float) -> None:
        looks.append(seconds)
        with log.open("a") as file:
            file.write(next(writes))

    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    study = watch(tmp_path, console, seconds=0.25, sleep=write)
    assert len(study.trials) == 3 and looks == [0.25] * 3
    text = console.file.getvalue()
    assert "0.800" in text and (("budget is spent" in text) if terminal else text.count("trial ") == 3)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    watch(tmp_path, console, sleep=write)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with Study.open(tmp_path, settings(3)):  # a watcher needs no lock
        watch(tmp_path, console, sleep=write)


def test_watch_without_a_study_says_so(tmp_path):
    with pytest.raises(FileError, match="no study at"):
        watch(tmp_path / "none", Console(file=io.StringIO()))


def test_ctrl_c_comes_through(tmp_path):
    fill(tmp_path, [0.5])

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(tmp_path, Console(file=io.StringIO(), force_terminal=True), sleep=interrupt)


def incremental(folder: Path, counts: list[int], seconds: float = 30.0) -> Study:
    """An `end` search of nine blocks in steps of 3, budget 6, with so many trials in each of its steps."""
    whole = dataclasses.replace(settings(6), space=Space("AM", 9), strategy="end", step=3)
    rng = random.Random(1)
    with Study.open(folder, whole) as root:
        found = ""
        for number, count in enumerate(counts, start=1):
            own = dataclasses.replace(settings(6), space=Space("AM", 3 * number, prefix=found))
            with Study.open(folder / f"step-{number:02}", own) as step:
                for place in range(count):
                    one = trial(place, found + "".join(rng.choice("AM") for _ in range(3)), 0.5)
                    step.record(dataclasses.replace(one, seconds=number * seconds))
            found += "AMM"
    return root


def test_an_incremental_search_tells_what_all_its_steps_will_take(tmp_path):
    """Six trials of 3 blocks at 30 s, two of 6 blocks at 60 s: 10 s a block; 4 of 6 blocks and 6 of 9 are to come."""
    root = incremental(tmp_path, [6, 2])
    found = effort(root)
    assert [(stage.length, len(stage.trials), stage.left) for stage in found.stages] == [
        (3, 6, 0),
        (6, 2, 4),
        (9, 0, 6),
    ]
    assert (found.current, found.spent) == (1, 6 * 30 + 2 * 60)
    assert found.to_go == pytest.approx(10 * (4 * 6 + 6 * 9))
    for study in (root, Study.load(tmp_path / "step-02")):  # as watched, and as the search itself reports a step
        text = shown(study, None)
        assert "8 of 18 trials, step 2 of 3" in text and "5 min 00 s spent, 13 min 00 s to go" in text


def test_watching_an_incremental_search_ends_with_its_last_step(tmp_path):
    incremental(tmp_path, [6, 6])
    waits = []

    def more(seconds: float) -> None:
        waits.append(seconds)
        incremental(tmp_path, [0, 0, 6])

    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    watch(tmp_path, console, sleep=more)
    assert len(waits) == 1 and console.file.getvalue().count("trial ") == 18


def test_small_spaces_end_before_the_budget(tmp_path):
    whole = dataclasses.replace(settings(6), space=Space("AM", 4), strategy="middle", step=2)
    with Study.open(tmp_path, whole) as root:
        assert [stage.total for stage in effort(root).stages] == [4, 4] and effort(root).to_go is None


def test_the_best_are_those_of_the_highest_objective(tmp_path):
    criteria = Criteria.parse("accuracy - 0.5 kv_bytes", (), Target(shape=load_shape("1b")))
    with Study.open(tmp_path, dataclasses.replace(settings(), criteria=criteria)) as study:
        for number, (letters, score) in enumerate((("AAAAAM", 0.9), ("AMMMMM", 0.8))):
            one = trial(number, letters, score)
            study.record(dataclasses.replace(one, objective=criteria.record(one.sequence, score)))
    lines = [line for line in shown(study, None).splitlines() if re.match(r" +\d ", line)]
    assert [line.split()[0] for line in lines] == ["1", "0"]
    assert lines[0].split()[1:3] == [f"{study.best.value:.4f}", "0.8000"]
