"""Incremental strategies against a greedy reference written out, and through interruptions."""

import contextlib
import io
import itertools
import json
from fractions import Fraction

import pytest
from rich.console import Console

from composer_megatron.errors import ComposerError, UsageError
from composer_search.evaluation import Evaluation
from composer_search.strategies import SearchSettings, progress_bar, search
from composer_search.study import Study


def value(letters):
    """Depends on places, neighbours and length, so that the strategies find different sequences."""
    pairs = sum(one != other for one, other in itertools.pairwise(letters))
    heavy = sum((letter == "A") * ((position * 7 + len(letters)) % 5 - 1.7) for position, letter in enumerate(letters))
    return 0.5 + (0.3 * heavy + 0.1 * pairs) / len(letters)


class Here:
    def __init__(self, stop_at=None, share=None):
        self.count, self.stop_at, self.share = 0, stop_at, share
        self.seen = []

    def describe(self):
        return {"name": "here", "share": str(self.share)}

    def evaluate(self, sequence):
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(sequence.letters)
        return Evaluation(value(sequence.letters))


class Scalable(Here):
    def __init__(self):
        super().__init__()
        self.shares = []

    def scaled(self, share):
        self.shares.append(share)
        return Here(share=share)


def greedy(strategy, length, step):
    """Every choice of each step's blocks, the best one fixed before the next."""
    found = ""
    while len(found) < length:
        size = min(step, length - len(found))
        middles = ["".join(letters) for letters in itertools.product("AM", repeat=size)]
        half = len(found) if strategy == "end" else (len(found) + 1) // 2
        found = max((found[:half] + middle + found[half:] for middle in middles), key=value)
    return found


@pytest.mark.parametrize("strategy", ["end", "middle"])
@pytest.mark.parametrize(("length", "step"), [(9, 3), (8, 3), (4, 4), (5, 1)])
def test_exhaustive_steps_are_the_greedy_search(strategy, length, step, tmp_path):
    settings = SearchSettings(length=length, strategy=strategy, step=step, budget=64)
    study = search(settings, tmp_path, workers=0, evaluator=Here())
    assert study.best.sequence.letters == greedy(strategy, length, step)
    assert Study.load(tmp_path).best == study.best
    steps = json.loads((tmp_path / "study.json").read_text())["steps"]
    assert [each["length"] for each in steps] == [*range(step, length, step), length]
    assert steps[-1]["best"] == str(study.best.sequence)
    for before, after in itertools.pairwise(steps):
        assert study.settings.space.length == length
        fixed = Study.load(tmp_path / before["folder"]).best.sequence.letters
        assert after.get("prefix", "") + after.get("suffix", "") == fixed


@pytest.mark.parametrize("proposer", ["random", "evolution", "bayesian"])
def test_an_interrupted_search_ends_as_the_uninterrupted_one(proposer, tmp_path):
    settings = SearchSettings(length=8, strategy="middle", step=4, proposer=proposer, budget=6, initial=3, batch=2)
    whole = search(settings, tmp_path / "whole", workers=0, evaluator=Here())
    for stop_at in (4, 5):  # in the first step's fourth trial, and in the second step
        with pytest.raises(KeyboardInterrupt):
            search(settings, tmp_path / "parts", workers=0, evaluator=Here(stop_at))
    last = Here()
    parts = search(settings, tmp_path / "parts", workers=0, evaluator=last)
    for folder in ("", "step-01", "step-02"):
        one, other = (
            [
                (each.trial, each.sequence, each.proposer, each.score)
                for each in Study.load(tmp_path / name / folder).trials
            ]
            for name in ("whole", "parts")
        )
        assert one == other
    assert parts.steps == whole.steps
    assert last.count < 12
    again = Here(stop_at=1)
    assert search(settings, tmp_path / "parts", workers=0, evaluator=again).best == parts.best
    assert again.count == 0


@pytest.mark.parametrize(
    ("strategy", "places"),
    [("end", (" after 1M1A", " after 1M2A1M")), ("middle", (" between 1M and 1A", " between 2M and 2A"))],
)
def test_a_line_says_where_a_step_begins(strategy, places, tmp_path):
    """Trial numbers and "best so far" are the step's; without a line above them they would seem to begin anew."""

    def shown(stop_at=None):
        console = Console(file=io.StringIO(), width=200)
        settings = SearchSettings(length=5, strategy=strategy, step=2, budget=4)
        with contextlib.suppress(KeyboardInterrupt), progress_bar(console) as progress:
            search(settings, tmp_path, workers=0, evaluator=Here(stop_at), progress=progress)
        return [line if line.startswith("step") else line.split()[1] for line in console.file.getvalue().splitlines()]

    first, second, third = (
        "step 1 of 3: 2 blocks",
        f"step 2 of 3: 2 blocks{places[0]}",
        f"step 3 of 3: 1 block{places[1]}",
    )
    assert shown(stop_at=6) == [first, "0", "1", "2", "3", second, "0"]
    assert shown() == [second, "1", "2", "3", third, "0", "1"]
    assert shown() == []


def test_a_kill_between_the_last_step_and_the_whole_loses_nothing(tmp_path):
    settings = SearchSettings(length=4, strategy="end", step=2, budget=4)
    whole = search(settings, tmp_path, workers=0, evaluator=Here())
    log = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "trials.jsonl").write_text("".join(log[:2]) + log[2][:20])
    again = search(settings, tmp_path, workers=0, evaluator=Here(stop_at=1))
    assert again.best == whole.best
    assert (tmp_path / "trials.jsonl").read_text() == "".join(log)


def test_width_scaling_keeps_width_to_depth(tmp_path):
    evaluator = Scalable()
    settings = SearchSettings(length=6, strategy="end", step=3, budget=8, width_scaling=True, target_shape="60m")
    search(settings, tmp_path, workers=0, evaluator=evaluator)
    assert set(evaluator.shares) == {Fraction(3, 16), Fraction(6, 16)}  # of the 16 blocks of 60m's baseline
    shares = [Study.load(tmp_path / f"step-0{step}").settings.evaluator["share"] for step in (1, 2)]
    assert shares == ["3/16", "3/8"]
    with pytest.raises(UsageError, match=r"strategy.width_scaling is True there and False now"):
        search(SearchSettings(length=6, strategy="end", step=3, budget=8), tmp_path, workers=0, evaluator=Here())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 0}, "step=0; expected 1 to 6"),
        ({"step": 7}, "step=7; expected 1 to 6"),
        ({"strategy": "outside"}, "unknown strategy 'outside'"),
        ({"proposer": "exhaustive", "step": 4}, "budget=4 is too small for an exhaustive search of all 16"),
        ({"constraints": ("params <= 0.5x",)}, "nearest is"),
        ({"width_scaling": True}, "the evaluator 'here' cannot change its widths"),
    ],
)
def test_wrong_settings_make_no_study(changes, message, tmp_path):
    settings = SearchSettings(
        **{"length": 6, "strategy": "end", "step": 2, "budget": 4, "proposer": "random"} | changes
    )
    with pytest.raises(UsageError, match=message):
        search(settings, tmp_path / "study", workers=0, evaluator=Here())
    assert not (tmp_path / "study").exists()


def test_other_strategies_and_larger_budgets_are_refused(tmp_path):
    settings = {"length": 4, "strategy": "end", "step": 2, "budget": 3, "proposer": "random"}
    search(SearchSettings(**settings), tmp_path, workers=0, evaluator=Here())
    for changes, message in (
        ({"strategy": "middle"}, "strategy.name is 'end' there and 'middle' now"),
        ({"budget": 4}, "budget is 3 there and 4 now"),
    ):
        with pytest.raises(UsageError, match=message):
            search(SearchSettings(**settings | changes), tmp_path, workers=0, evaluator=Here())


def test_constraints_hold_in_every_step(tmp_path):
    settings = SearchSettings(length=6, strategy="middle", step=3, budget=8, constraints=("attention <= 1/3",))
    study = search(settings, tmp_path, workers=0, evaluator=Here())
    for folder in ("step-01", "step-02"):
        trials = Study.load(tmp_path / folder).trials
        assert trials
        assert all(each.objective["attention"] <= 1 / 3 for each in trials)
    assert study.best.objective["attention"] <= 1 / 3


def test_a_step_without_a_score_ends_the_search(tmp_path):
    class Broken(Here):
        def evaluate(self, sequence):
            return Evaluation(float("nan"))

    settings = SearchSettings(length=4, strategy="end", step=1, budget=2)
    with pytest.raises(ComposerError, match=r"no trial of .*step-01 was completed"):
        search(settings, tmp_path, workers=0, evaluator=Broken())
