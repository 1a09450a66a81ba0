"""The search loop and its workers: real processes that are killed, interrupted, starved of disk and started again."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_search.evaluation import Evaluation
from composer_search.strategies import SearchSettings, progress_bar, search
from composer_search.study import Study

TOY = '''
import os, signal, sys, time
from pathlib import Path

from composer_megatron.errors import ComposerError, FileError
from composer_search.evaluation import Evaluation
from composer_search.strategies import SearchSettings, search


class Toy:
    """Scores the share of A; what else it does depends on its attributes, by sequence."""

    def __init__(self, seconds=0.0, pids=None, dies=(), raises=()):
        self.seconds, self.pids, self.dies, self.raises = seconds, pids, dies, raises

    def describe(self):
        return {"name": "toy"}

    def evaluate(self, sequence):
        if self.pids:
            (Path(self.pids) / str(os.getpid())).touch()
        if self.pids and (Path(self.pids) / "slow").exists():
            (Path(self.pids) / f"slow.{os.getpid()}").touch()
            time.sleep(60)
        time.sleep(self.seconds)
        if sequence.letters in self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if sequence.letters in self.raises:
            raise ValueError("bad luck")
        score = sequence.count("A") / len(sequence)
        return Evaluation(score, seed_scores=(score,), tasks={"share": score}, test_score=score)


class Together(Toy):
    """Also scores batches, and leaves a file a batch; `refuses` the batches that hold such a sequence."""

    refuses = ()

    def evaluate_many(self, sequences):
        letters = [sequence.letters for sequence in sequences]
        (Path(self.pids) / ("batch." + ".".join(letters))).touch()
        if set(letters) & set(self.dies):
            os.kill(os.getpid(), signal.SIGKILL)
        if set(letters) & set(self.refuses):
            raise MemoryError("too many at once")
        return [Toy.evaluate(Toy(), sequence) for sequence in sequences]


class Unlucky(Toy):
    """Its worker is killed at the first try of a sequence of `dies`, as if by someone else."""

    def evaluate(self, sequence):
        tried = Path(self.pids) / ("tried." + sequence.letters)
        if sequence.letters in self.dies and not tried.exists():
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Toy.evaluate(Toy(), sequence)


class FullDisk(Toy):
    """Cannot keep what it learned of `dies` while there is a file ``full``; of a batch it can keep nothing."""

    def evaluate(self, sequence):
        if sequence.letters in self.dies and (Path(self.pids) / "full").exists():
            raise FileError("cannot append to trainings.jsonl: is the disk full?")
        return Toy.evaluate(Toy(), sequence)

    def evaluate_many(self, sequences):
        return [self.evaluate(sequence) for sequence in sequences]


class Stillborn(Toy):
    def __setstate__(self, state):
        os._exit(3)


if __name__ == "__main__":
    folder, workers, seconds = sys.argv[1:4]
    settings = SearchSettings(length=5, budget=14, proposer="random", seed=3)
    try:
        search(settings, folder, workers=int(workers), evaluator=Toy(float(seconds), pids=sys.argv[4]))
    except ComposerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
'''

RANDOM = SearchSettings(length=5, budget=14, proposer="random", seed=3)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The module above, importable here and in workers."""
    (tmp_path / "toy_evaluator.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import toy_evaluator

    yield toy_evaluator
    sys.modules.pop("toy_evaluator")


@pytest.fixture
def program(toy, tmp_path):
    """Starts the search of RANDOM in a process of its own group; kills what is left of it in the end."""
    pids = tmp_path / "pids"
    pids.mkdir()
    started = []

    def start(folder, workers=2, seconds=0.15, **options):
        command = [sys.executable, toy.__file__, str(folder), str(workers), str(seconds), str(pids)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True, **options
        )
        started.append(process)
        return process

    start.folder = pids
    start.pids = lambda: [int(path.name) for path in pids.iterdir() if path.name.isdecimal()]
    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class Here:
    """Scores as a fixed function of the letters; `stop_at` raises KeyboardInterrupt at that evaluation."""

    def __init__(self, stop_at=None):
        self.count, self.stop_at = 0, stop_at

    def describe(self):
        return {"name": "here"}

    def evaluate(self, sequence):
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        score = sum((letter == "A") / (position + 1) for position, letter in enumerate(sequence))
        return Evaluation(score=score, seed_scores=(score,))


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def lines(folder):
    log = Path(folder) / "trials.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def alive(pid):
    """Whether the process runs; one that ended and was not waited for by its new parent counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def outcomes(study):
    return [(trial.trial, trial.sequence, trial.proposer, trial.score) for trial in study.trials]


def test_a_killed_search_goes_on_and_loses_the_running_trials_at_most(program, tmp_path):
    folder = tmp_path / "study"
    process = program(folder)
    wait_until(lambda: len(lines(folder)) >= 4)
    (program.folder / "slow").touch()
    wait_until(lambda: len(list(program.folder.glob("slow.*"))) == 2)
    process.kill()  # SIGKILL, the parent alone, while both workers are in trials of a minute
    process.wait()
    wait_until(lambda: not any(map(alive, program.pids())), seconds=5)  # they end by themselves
    (program.folder / "slow").unlink()
    before = lines(folder)
    with (folder / "trials.jsonl").open("a") as log:
        log.write('{"trial": 99, "sequ')  # as a kill in the middle of a write leaves it
    second = program(folder, seconds=0.0)
    assert second.wait(timeout=60) == 0
    after = lines(folder)
    assert after[: len(before)] == before
    study = Study.load(folder)
    assert len(before) < 14
    assert sorted(trial.trial for trial in study.trials) == list(range(14))
    assert len({trial.sequence for trial in study.trials}) == 14


def interruptible():
    """Shells have what they run in the background ignore Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_a_study_to_resume_and_no_process(program, tmp_path):
    folder = tmp_path / "study"
    process = program(folder, seconds=0.5, preexec_fn=interruptible)
    wait_until(lambda: len(lines(folder)) >= 3)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to parent and workers alike
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1  # the parent's KeyboardInterrupt; the workers are silent
    assert not any(map(alive, program.pids()))
    kept = len(lines(folder))
    assert kept < 14
    assert program(folder, seconds=0.0).wait(timeout=60) == 0
    assert len(Study.load(folder).completed) == 14


def test_a_full_disk_stops_the_search_with_a_message_and_loses_nothing(program, tmp_path):
    folder = tmp_path / "study"

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    process = program(folder, seconds=0.0, preexec_fn=small_disk)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert f"cannot append to {folder / 'trials.jsonl'}" in errors
    assert not any(map(alive, program.pids()))
    kept = [json.loads(line) for line in lines(folder)]
    assert 0 < len(kept) < 14
    assert (folder / "trials.jsonl").read_bytes().endswith(b"\n")
    assert program(folder, seconds=0.0).wait(timeout=60) == 0
    assert [json.loads(line) for line in lines(folder)][: len(kept)] == kept
    assert len(Study.load(folder).completed) == 14


def test_what_a_worker_imports_is_light():
    heavy = "print(sorted({'torch', 'ax', 'sklearn', 'megatron', 'numpy'} & set(sys.modules)))"
    command = [sys.executable, "-c", f"import sys, composer_search.strategies, composer_search.workers; {heavy}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_worker_that_dies_or_raises_costs_its_trial_alone(toy, tmp_path):
    evaluator = toy.Toy(dies=("AMA",), raises=("MAM",))
    study = search(SearchSettings(length=3, budget=8), tmp_path / "study", workers=2, evaluator=evaluator)
    errors = {trial.sequence.letters: trial.error for trial in study.trials if not trial.completed}
    assert errors == {
        "AMA": "the worker process was killed by SIGKILL, perhaps for lack of memory",
        "MAM": "ValueError: bad luck",
    }
    assert len(study.completed) == 6
    assert Study.load(tmp_path / "study").trials == study.trials


@pytest.mark.parametrize("batch", [1, 4])
def test_a_lost_worker_is_told_of_and_its_trials_run_again(batch, toy, tmp_path, caplog):
    evaluator = toy.Unlucky(pids=tmp_path, dies=("AMA",))
    settings = SearchSettings(length=3, budget=8, batch=batch)
    study = search(settings, tmp_path / "study", workers=2, evaluator=evaluator)
    alone = search(settings, tmp_path / "alone", workers=0, evaluator=toy.Toy())
    assert sorted(outcomes(study)) == sorted(outcomes(alone)) and len(study.completed) == 8
    (told,) = caplog.messages
    assert "was killed by SIGKILL" in told and "run again" in told and "1A1M1A" in told


@pytest.mark.parametrize(("workers", "batch"), [(0, 1), (0, 4), (1, 1), (1, 4)])
def test_an_evaluator_that_cannot_write_ends_the_search_and_fails_no_trial(workers, batch, toy, tmp_path):
    """A full disk is no property of a sequence: once there is room its trial runs, and the study is whole."""
    settings = SearchSettings(length=3, budget=8, batch=batch)
    evaluator = toy.FullDisk(pids=tmp_path, dies=("AMA", "MMA"))
    (tmp_path / "full").touch()
    with pytest.raises(FileError, match="is the disk full"):
        search(settings, tmp_path / "study", workers=workers, evaluator=evaluator)
    kept = Study.load(tmp_path / "study")
    assert all(trial.completed for trial in kept.trials) and len(kept.trials) < 8
    (tmp_path / "full").unlink()
    study = search(settings, tmp_path / "study", workers=workers, evaluator=evaluator)
    assert len(study.completed) == 8
    assert study.trials[: len(kept.trials)] == kept.trials


def test_workers_that_cannot_start_are_one_error_and_no_trial(toy, tmp_path):
    with pytest.raises(ComposerError, match="could not start, it ended with exit status 3"):
        search(RANDOM, tmp_path / "study", workers=2, evaluator=toy.Stillborn())
    assert Study.load(tmp_path / "study").trials == []


def test_workers_give_the_same_trials_as_this_process(toy, tmp_path):
    settings = SearchSettings(length=4, budget=9, proposer="random")
    one, here = (
        search(settings, tmp_path / f"study{workers}", workers=workers, evaluator=toy.Toy()) for workers in (1, 0)
    )
    assert outcomes(one) == outcomes(here)


def test_an_interrupted_bayesian_search_ends_as_the_uninterrupted_one(tmp_path):
    settings = SearchSettings(length=5, budget=8, initial=4, seed=5)
    whole = search(settings, tmp_path / "whole", workers=0, evaluator=Here())
    for stop_at in (3, 4):  # in trials 2 and 5
        with pytest.raises(KeyboardInterrupt):
            search(settings, tmp_path / "parts", workers=0, evaluator=Here(stop_at))
    parts = search(settings, tmp_path / "parts", workers=0, evaluator=Here())
    assert outcomes(parts) == outcomes(whole)
    assert {trial.proposer for trial in whole.trials} == {"sobol", "bayesian"}
    snapshots = [json.loads((tmp_path / name / "ax.json").read_text()) for name in ("whole", "parts")]
    assert [len(snapshot["experiment"]["trials"]) for snapshot in snapshots] == [8, 8]
    log = (tmp_path / "whole" / "trials.jsonl").read_bytes()
    search(settings, tmp_path / "whole", workers=0, evaluator=Here(stop_at=1))  # nothing is left to do
    assert (tmp_path / "whole" / "trials.jsonl").read_bytes() == log


def test_a_small_space_is_searched_exhaustively_whatever_was_asked_for(tmp_path):
    study = search(SearchSettings(length=3, budget=50), tmp_path, workers=0, evaluator=Here())
    assert study.settings.proposer == "exhaustive"
    assert len(study.trials) == 8
    assert study.best.sequence.letters == "AAA"


def test_a_search_can_be_extended(tmp_path):
    for budget, name in ((6, "random"), (10, "random"), (40, "exhaustive")):
        study = search(
            SearchSettings(length=5, budget=budget, proposer="random"), tmp_path, workers=0, evaluator=Here()
        )
        assert study.settings.proposer == name
        assert len(study.trials) == min(budget, 32)
    assert len({trial.sequence for trial in study.trials}) == 32
    with pytest.raises(UsageError, match="budget is 40 there and 10 now"):
        search(SearchSettings(length=5, budget=10, proposer="random"), tmp_path, workers=0, evaluator=Here())


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_search_in_which_everything_fails_stops_early(score, tmp_path):
    class Broken(Here):
        def evaluate(self, sequence):
            return Evaluation(score=score)

    for tries in (1, 2):
        with pytest.raises(
            ComposerError, match=f"3 trials failed and none was completed; .*diverged: the score is {score}"
        ):
            search(RANDOM, tmp_path, workers=0, evaluator=Broken())
        assert len(Study.load(tmp_path).trials) == 3 * tries


def test_failures_after_a_success_do_not_stop_it(tmp_path):
    class Moody(Here):
        def evaluate(self, sequence):
            self.count += 1
            if self.count > 1:
                raise ComposerError("out of luck")
            return Evaluation(score=0.5)

    study = search(RANDOM, tmp_path, workers=0, evaluator=Moody())
    assert len(study.trials) == 14
    assert {trial.error for trial in study.trials if not trial.completed} == {"out of luck"}


def test_mad_is_the_evaluator_unless_another_is_given(tmp_path):
    settings = SearchSettings(length=2, budget=4, evaluator="smoke", overrides={"steps": 2}, seeds=2, seed=6)
    study = search(settings, tmp_path, workers=1)
    assert len(study.completed) == 4
    evaluator = study.settings.evaluator
    assert (evaluator["name"], evaluator["seeds"], evaluator["seed"]) == ("mad", 2, 6)
    assert {task["steps"] for task in evaluator["tasks"]} == {2}
    for trial in study.trials:
        assert set(trial.tasks) == {"in-context-recall", "memorization"}
        assert len(trial.seed_scores) == 2
        assert 0 <= trial.score <= 1


@pytest.mark.parametrize(("length", "budget", "initial"), [(6, 16, 6), (6, 30, 6), (16, 100, 16), (3, 64, 5)])
def test_the_number_of_quasi_random_trials_has_a_default(length, budget, initial):
    assert SearchSettings(length=length, budget=budget).study_settings(Here()).initial == initial
    assert SearchSettings(length=length, budget=budget, initial=2).study_settings(Here()).initial == 2


@pytest.mark.parametrize(
    ("settings", "workers", "message"),
    [
        (SearchSettings(length=0), 0, "length=0"),
        (SearchSettings(primitives="AQ"), 0, "unknown 'Q'"),
        (SearchSettings(budget=0), 0, "budget=0"),
        (SearchSettings(), -1, "workers=-1"),
        (SearchSettings(evaluator="huge"), 0, "unknown evaluator 'huge'"),
        (SearchSettings(overrides={"stepz": 1}), 0, "'stepz'"),
        (SearchSettings(proposer="exhaustive", length=8), 0, "too small for an exhaustive search"),
        (SearchSettings(batch=0), 0, "batch=0"),
        (SearchSettings(halving=3, batch=2), 0, "halving=3 drops no candidate where batch=2; .* at least 3, better 27"),
        (SearchSettings(objective="accuracy - kv"), 0, "unknown metric 'kv'"),
        (SearchSettings(constraints=("params <= 0.5x",)), 0, "nearest is"),
        (SearchSettings(constraints=("params <= 1x",), target_shape="1z"), 0, "unknown shape '1z'"),
    ],
    ids=str,
)
def test_wrong_settings_make_no_study(settings, workers, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        search(settings, tmp_path / "study", workers=workers)
    assert not (tmp_path / "study").exists()


def test_progress_shows_every_trial_once(tmp_path):
    with (tmp_path / "out").open("w") as file:
        console = Console(file=file, width=200)
        for budget in (3, 5):
            with progress_bar(console) as progress:
                settings = SearchSettings(length=5, budget=budget, proposer="random")
                study = search(settings, tmp_path / "study", workers=0, evaluator=Here(), progress=progress)
    shown = (tmp_path / "out").read_text().splitlines()
    assert len(shown) == 5
    for line, trial in zip(shown, study.trials, strict=True):
        assert str(trial.sequence) in line
        assert f"{trial.score:.3f}" in line
    assert sum("best so far" in line for line in shown) >= 1


def batches(folder):
    return [path.name.split(".")[1:] for path in folder.glob("batch.*")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_goes_to_one_worker_that_takes_it_at_once(workers, toy, tmp_path):
    settings = SearchSettings(length=4, budget=10, batch=4, proposer="random")
    evaluator = toy.Together(pids=tmp_path)
    study = search(settings, tmp_path / "study", workers=workers, evaluator=evaluator)
    sequences = [trial.sequence.letters for trial in study.trials]
    assert sorted(batches(tmp_path)) == sorted([sequences[:4], sequences[4:8], sequences[8:]])
    single = search(settings, tmp_path / "single", workers=workers, evaluator=toy.Toy())
    assert outcomes(study) == outcomes(single)


def test_a_batch_whose_worker_dies_costs_the_trial_that_killed_it_alone(toy, tmp_path):
    settings = SearchSettings(length=3, budget=8, batch=4)
    evaluator = toy.Together(pids=tmp_path, dies=("AMA",))
    study = search(settings, tmp_path / "study", workers=2, evaluator=evaluator)
    assert sorted(trial.trial for trial in study.trials) == list(range(8))
    assert {trial.sequence.letters for trial in study.trials if not trial.completed} == {"AMA"}


def test_a_batch_that_cannot_be_taken_at_once_is_taken_one_by_one(toy, tmp_path):
    evaluator = toy.Together(pids=tmp_path, raises=("MAM",))
    evaluator.refuses = ("AMA", "MAM")
    study = search(SearchSettings(length=3, budget=8, batch=4), tmp_path / "study", workers=1, evaluator=evaluator)
    assert {trial.sequence.letters: trial.error for trial in study.trials if trial.error} == {
        "MAM": "ValueError: bad luck"
    }
    assert len(study.completed) == 7


@pytest.mark.parametrize("kept", [1, 2, 4, 5])
@pytest.mark.parametrize("proposer", ["evolution", "bayesian"])
def test_a_search_cut_within_a_batch_proposes_what_the_whole_one_did(proposer, kept, tmp_path):
    settings = SearchSettings(length=6, budget=6, batch=3, initial=2, proposer=proposer)
    whole = search(settings, tmp_path, workers=0, evaluator=Here())
    lines = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "trials.jsonl").write_text("".join(lines[:kept]))
    assert outcomes(search(settings, tmp_path, workers=0, evaluator=Here())) == outcomes(whole)
    assert len({trial.sequence for trial in whole.trials}) == 6


def test_a_diverged_candidate_is_a_finished_trial_with_its_reason(tmp_path):
    class Diverging(Here):
        def evaluate(self, sequence):
            return Evaluation(score=float("nan") if sequence.letters == "AMA" else 0.5)

    settings = SearchSettings(length=3, budget=8, objective="accuracy - 0.1 flops")
    study = search(settings, tmp_path, workers=0, evaluator=Diverging())
    assert len(study.trials) == 8
    (failed,) = [trial for trial in study.trials if not trial.completed]
    assert (failed.sequence.letters, failed.error) == ("AMA", "diverged: the score is nan")
    assert failed.objective["flops"] > 0
    assert "value" not in failed.objective
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 8
    assert Study.load(tmp_path).trials == study.trials


def test_the_best_is_that_of_the_objective(tmp_path):
    evaluator = Here()
    plain = search(SearchSettings(length=4, budget=16), tmp_path / "plain", workers=0, evaluator=evaluator)
    mixed_settings = SearchSettings(length=4, budget=16, objective="accuracy - 3 kv_bytes")
    mixed = search(mixed_settings, tmp_path / "mixed", workers=0, evaluator=evaluator)
    assert plain.best.sequence.letters == "AAAA"
    assert plain.best.objective == {}
    assert mixed.best.objective["value"] == max(trial.objective["value"] for trial in mixed.trials)
    assert mixed.best.objective["kv_bytes"] < max(trial.objective["kv_bytes"] for trial in mixed.trials)
    with pytest.raises(UsageError, match="objective is 'accuracy - 3 kv_bytes' there and 'accuracy - 2 kv_bytes' now"):
        other = SearchSettings(length=4, budget=16, objective="accuracy - 2 kv_bytes")
        search(other, tmp_path / "mixed", workers=0, evaluator=evaluator)
    matched = SearchSettings(length=4, budget=16, objective="accuracy - 3 kv_bytes", match="parameters")
    with pytest.raises(UsageError, match=r"target.match is 'paper' there and 'parameters' now"):
        search(matched, tmp_path / "mixed", workers=0, evaluator=evaluator)
