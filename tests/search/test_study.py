"""The study folder: what is written comes back, whatever stopped the writer, and nobody else's settings creep in."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.study import Space, Study, StudySettings, Trial

SETTINGS = StudySettings(
    space=Space("AM", 4),
    proposer="random",
    initial=3,
    seed=0,
    budget=5,
    evaluator={
        "name": "toy",
        "tasks": [{"task": "one", "steps": 20}, {"task": "two", "steps": 30}],
        "rates": [0.1, 0.2],
    },
)


def trial(number, text="AAMM", **changes):
    values = {
        "trial": number,
        "sequence": CompositeSequence(text),
        "proposer": "random",
        "seconds": 1.25,
        "finished": "2026-01-02T03:04:05+00:00",
        "score": 0.5,
        "spread": 0.1,
        "seed_scores": (0.4, 0.6),
        "tasks": {"one": 0.4, "two": 0.6},
        "test_score": 0.45,
        "details": {"curve": [[1, 0.5]]},
    }
    return Trial(**(values | changes))


def failed(number, text="MMMM"):
    nothing = {"score": None, "spread": 0.0, "seed_scores": (), "tasks": {}, "test_score": None}
    return trial(number, text, **nothing, error="out of memory")


@pytest.fixture
def folder(tmp_path):
    """A study of three trials."""
    path = tmp_path / "deep" / "study"
    with Study.open(path, SETTINGS) as study:
        for each in (trial(0), failed(1), trial(2, "MAMA", score=0.75)):
            study.record(each)
    return path


def with_(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def test_what_was_recorded_comes_back(folder):
    loaded = Study.load(str(folder))
    assert loaded.settings == SETTINGS
    assert loaded.trials == [trial(0), failed(1), trial(2, "MAMA", score=0.75)]
    assert [each.trial for each in loaded.completed] == [0, 2]
    assert loaded.best == trial(2, "MAMA", score=0.75)
    with Study.open(folder, SETTINGS) as again:
        assert again.trials == loaded.trials
        assert again.created == loaded.created
        assert again.free_numbers(running=[3]) == [4]


def test_the_files_are_those_of_the_documented_format(folder):
    head = json.loads((folder / "study.json").read_text())
    assert {key: head[key] for key in ("format", "version", "space", "proposer", "budget")} == {
        "format": "composer-study",
        "version": 1,
        "space": {"primitives": "AM", "length": 4},
        "proposer": {"name": "random", "initial": 3, "seed": 0, "batch": 1},
        "budget": 5,
    }
    assert head["evaluator"] == SETTINGS.evaluator
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "trial": 0,
        "sequence": "2A2M",
        "status": "completed",
        "score": 0.5,
        "spread": 0.1,
        "seed_scores": [0.4, 0.6],
        "tasks": {"one": 0.4, "two": 0.6},
        "test_score": 0.45,
        "proposer": "random",
        "seconds": 1.25,
        "finished": "2026-01-02T03:04:05+00:00",
        "details": {"curve": [[1, 0.5]]},
    }
    assert lines[1]["status"] == "failed"
    assert lines[1]["error"] == "out of memory"
    assert "score" not in lines[1]


def test_of_equal_scores_the_earliest_trial_is_the_best(tmp_path):
    with Study.open(tmp_path, SETTINGS) as study:
        assert study.best is None
        for number, text in ((3, "AAAA"), (1, "MMMM")):
            study.record(trial(number, text))
        assert study.best.trial == 1


@pytest.mark.parametrize("torn", [b'{"trial": 3, "seq', b"\x00\x00", b'{"a": 1}{', b"12"])
def test_a_torn_last_line_is_left_out_and_repaired(folder, torn):
    log = folder / "trials.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + torn)
    assert len(Study.load(folder).trials) == 3
    assert log.read_bytes() == whole + torn  # looking changes nothing
    with Study.open(folder, SETTINGS) as study:
        assert log.read_bytes() == whole
        study.record(trial(3, "AMAM"))
    assert [each.trial for each in Study.load(folder).trials] == [0, 1, 2, 3]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_log_cut_anywhere_keeps_the_whole_lines(folder, cut):
    log = folder / "trials.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    with Study.open(folder, SETTINGS) as study:
        assert len(study.trials) == (3 if cut == 1 else 2)  # only the line feed is missing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"proposer.seed is 0 there and 1 now"),
        ({"initial": 4}, r"proposer.initial is 3 there and 4 now"),
        ({"proposer": "bayesian"}, r"proposer.name is 'random' there and 'bayesian' now"),
        ({"space": Space("AM", 5)}, r"space.length is 4 there and 5 now"),
        ({"budget": 4}, r"budget is 5 there and 4 now"),
        (
            {"evaluator": {**SETTINGS.evaluator, "rates": [0.1]}},
            r"evaluator.rates is \[0.1, 0.2\] there and \[0.1\] now",
        ),
        ({"evaluator": {**SETTINGS.evaluator, "extra": 1}}, r"evaluator.extra is None there and 1 now"),
        (
            {"evaluator": {**SETTINGS.evaluator, "tasks": [{"task": "one", "steps": 21}]}},
            r"evaluator.tasks.0.steps is 20",
        ),
        ({"budget": 6, "seed": 1}, r"proposer.seed is 0 there"),
    ],
)
def test_other_settings_are_refused_and_named(folder, changes, message):
    before = (folder / "study.json").read_bytes()
    with pytest.raises(UsageError, match=message):
        Study.open(folder, with_(**changes))
    assert (folder / "study.json").read_bytes() == before
    Study.open(folder, SETTINGS).close()  # the refusal let go of the lock


def test_a_raised_budget_is_taken_over(folder):
    with Study.open(folder, with_(budget=8)) as study:
        assert study.free_numbers() == [3, 4, 5, 6, 7]
    loaded = Study.load(folder)
    assert loaded.settings.budget == 8
    with Study.open(folder, with_(budget=16, proposer="exhaustive")) as study:
        assert study.settings.proposer == "exhaustive"
        assert study.created == loaded.created
        assert len(study.trials) == 3


def test_settings_with_tuples_are_those_with_lists(tmp_path):
    tuples = with_(evaluator={"name": "toy", "rates": (0.1, 0.2)})
    Study.open(tmp_path, tuples).close()
    Study.open(tmp_path, tuples).close()


def test_a_second_process_is_told_who_has_the_study(folder):
    holder = "import sys; from composer_search.study import Study\nfrom pathlib import Path\nimport json\n"
    holder += "study = Study.load(sys.argv[1]); opened = Study.open(sys.argv[1], study.settings)\n"
    holder += "print('open', flush=True); sys.stdin.read()\n"
    command = [sys.executable, "-c", holder, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(ComposerError, match=f"in use by process {process.pid}; wait until it ends or stop it"):
            Study.open(folder, SETTINGS)
        assert len(Study.load(folder).trials) == 3  # looking is always possible
        process.kill()
        process.wait()
    Study.open(folder, SETTINGS).close()


def test_a_full_disk_loses_nothing_that_was_there(folder, monkeypatch):
    """The file system takes 40 bytes of the line, then no more."""
    whole = (folder / "trials.jsonl").read_bytes()
    real_open = type(folder).open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, line):
            return self.file.write(line[:40])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def full_open(path, *args, **kwargs):
        file = real_open(path, *args, **kwargs)
        return Full(file) if path.name == "trials.jsonl" and args[:1] == ("ab",) else file

    with Study.open(folder, SETTINGS) as study:
        with monkeypatch.context() as patch:
            patch.setattr(type(folder), "open", full_open)
            with pytest.raises(FileError, match=r"cannot append to .*trials.jsonl.*is the disk full"):
                study.record(trial(3, "AMAM"))
        assert (folder / "trials.jsonl").read_bytes() == whole
        assert len(study.trials) == 3
        study.record(trial(3, "AMAM"))
    assert len(Study.load(folder).trials) == 4


def test_a_study_that_is_only_looked_at_cannot_be_written(folder):
    with pytest.raises(ComposerError, match="not open for writing"):
        Study.load(folder).record(trial(3))


def write(folder, name, text):
    (folder / name).write_text(text)


def edit_head(folder, **changes):
    values = json.loads((folder / "study.json").read_text()) | changes
    write(folder, "study.json", json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "study.json").unlink(), "no study at .*no study.json"),
        (lambda path: write(path, "study.json", "{"), "study.json is not a study: line 1"),
        (lambda path: write(path, "study.json", "[]"), "expected a JSON object"),
        (lambda path: edit_head(path, format="other"), "is not a study: expected"),
        (lambda path: edit_head(path, version=2), "has version 2; this program reads version 1"),
        (lambda path: edit_head(path, space=None), "not a whole study: KeyError.'space'"),
        (lambda path: edit_head(path, space={"primitives": "AX", "length": 4}), "unknown 'X'"),
        (lambda path: edit_head(path, evaluator=3), "not a whole study"),
        (lambda path: write(path, "trials.jsonl", "nonsense\n{}\n"), "trials.jsonl, line 1: not a JSON object"),
        (lambda path: write(path, "trials.jsonl", '{"status": "completed"}\n'), "line 1: trial is None; expected int"),
        (
            lambda path: write(path, "trials.jsonl", json.dumps(trial(0).as_dict() | {"score": "high"}) + "\n"),
            "line 1: score is 'high'; expected float",
        ),
        (
            lambda path: write(path, "trials.jsonl", json.dumps(trial(0).as_dict() | {"sequence": "2Z"}) + "\n"),
            "line 1: bad sequence",
        ),
        (
            lambda path: write(path, "trials.jsonl", json.dumps(trial(0, "AAM").as_dict()) + "\n"),
            "line 1: 2A1M is not of 4 blocks of AM",
        ),
        (
            lambda path: write(path, "trials.jsonl", 2 * (json.dumps(trial(0).as_dict()) + "\n")),
            "line 2: trial 0 is there twice",
        ),
    ],
)
def test_a_damaged_study_is_an_error_that_names_the_place(folder, damage, message):
    damage(folder)
    with pytest.raises(FileError, match=message):
        Study.load(folder)


def test_a_log_without_its_study_is_not_taken_for_a_new_one(folder):
    (folder / "study.json").unlink()
    with pytest.raises(FileError, match=r"has trials.jsonl but no study.json"):
        Study.open(folder, SETTINGS)


def test_a_folder_that_cannot_be_made_is_an_error_for_people(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot make the study"):
        Study.open(tmp_path / "file", SETTINGS)


def test_the_snapshot_is_replaced_whole(folder):
    with Study.open(folder, SETTINGS) as study:
        study.save_snapshot({"one": 1})
        study.save_snapshot({"two": 2})
    assert json.loads((folder / "ax.json").read_text()) == {"two": 2}
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


@given(primitives=st.sampled_from(["AM", "MA", "A"]), length=st.integers(1, 12), data=st.data())
def test_ranks_number_the_sequences(primitives, length, data):
    space = Space(primitives, length)
    rank = data.draw(st.integers(0, space.size - 1))
    sequence = space.at(rank)
    assert space.rank(sequence) == rank
    assert sequence in space
    digits = "".join(str(primitives.index(letter)) for letter in sequence)
    assert int(digits, len(primitives)) == rank if len(primitives) > 1 else rank == 0


def test_a_space_knows_its_own():
    space = Space("A", 3)
    assert CompositeSequence("AAA") in space
    assert CompositeSequence("AAM") not in space
    assert CompositeSequence("AA") not in space
    assert (Space("AM", 3).size, space.size) == (8, 1)


@pytest.mark.parametrize(
    ("primitives", "length", "message"),
    [("", 4, "primitives=''"), ("AA", 4, "different letters"), ("AZ", 4, "unknown 'Z'"), ("AM", 0, "length=0")],
)
def test_impossible_spaces_are_named(primitives, length, message):
    with pytest.raises(UsageError, match=message):
        Space(primitives, length)


def test_studies_from_before_there_were_objectives_are_read_and_continued(folder):
    values = json.loads((folder / "study.json").read_text())
    for new in ("strategy", "objective", "constraints", "target"):
        del values[new]
    del values["proposer"]["batch"]
    write(folder, "study.json", json.dumps(values))
    assert Study.load(folder).settings == SETTINGS
    with Study.open(folder, SETTINGS) as study:
        assert len(study.trials) == 3


def test_exact_metrics_are_kept(folder):
    metrics = {"kv_bytes": 2048, "attention": 0.25, "value": 0.4}
    with Study.open(folder, SETTINGS) as study:
        study.record(trial(3, "AMMM", objective=metrics))
        study.record(dataclasses.replace(failed(4, "MMMA"), objective={"kv_bytes": 0}))
    *_, completed, without = Study.load(folder).trials
    assert completed.objective == metrics
    assert without.objective == {"kv_bytes": 0}


def test_fixed_blocks_belong_to_the_space():
    space = Space("AM", 5, prefix="AM", suffix="M")
    assert [space.at(rank).letters for rank in range(space.size)] == ["AMAAM", "AMAMM", "AMMAM", "AMMMM"]
    assert [space.rank(space.at(rank)) for rank in range(4)] == list(range(4))
    assert CompositeSequence("AMAMM") in space
    assert CompositeSequence("AMAMA") not in space
    with pytest.raises(UsageError, match="expected more blocks than prefix='AM' and suffix='M' fix"):
        Space("AM", 3, prefix="AM", suffix="M")
