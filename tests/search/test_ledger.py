"""The ledger of finished trainings: nothing is trained twice, whatever was interrupted, and nothing is mixed up."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from composer_megatron.cli import main
from composer_megatron.errors import FileError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluators import MadEvaluator, mad, make_evaluator, preset
from composer_search.evaluators.ledger import Ledger, settings_digest

SEQUENCES = [CompositeSequence.parse(text) for text in ("1A1M", "1M1A", "2A")]
SMALL = preset("smoke", steps=4, evaluate_every=2, batch_size=8, seeds=2, learning_rates=[1e-2, 3e-3])
"""Rows of 64 and 96 tokens a step, which a CPU trains together; with 64 sequences a step it trains them in turn."""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def trainings(monkeypatch):
    """How many trainings have been run, by way of the population and in turn."""
    counts = {"together": 0, "in turn": 0}
    population, single = mad.train_population, mad.train

    def together(rows, *args, **kwargs):
        counts["together"] += len(rows)
        return population(rows, *args, **kwargs)

    def in_turn(*args):
        counts["in turn"] += 1
        return single(*args)

    monkeypatch.setattr(mad, "train_population", together)
    monkeypatch.setattr(mad, "train", in_turn)
    return counts


@pytest.mark.parametrize("batch_size", [8, 64], ids=["together", "in turn"])
def test_a_second_evaluation_trains_nothing_and_is_the_same(batch_size, tmp_path, trainings):
    settings = preset("smoke", steps=4, evaluate_every=2, batch_size=batch_size, seeds=2, learning_rates=[1e-2, 3e-3])
    ledger = Ledger(tmp_path / "trainings.jsonl")
    plain = MadEvaluator(settings).evaluate_many(SEQUENCES)
    first = MadEvaluator(settings, ledger=ledger).evaluate_many(SEQUENCES)
    done = sum(trainings.values())
    again = MadEvaluator(settings, ledger=Ledger(ledger.path)).evaluate_many(SEQUENCES)
    assert plain == first == again
    assert sum(trainings.values()) == done and trainings["in turn" if batch_size == 8 else "together"] == 0


def test_tasks_and_seeds_one_after_the_other_make_the_whole(tmp_path, trainings):
    """One task and one seed, the other task, then all of both: only what is new is trained."""
    whole = MadEvaluator(SMALL).evaluate_many(SEQUENCES)
    trainings["together"] = 0
    ledger = Ledger(tmp_path / "trainings.jsonl")
    first, second = SMALL.tasks
    MadEvaluator(dataclasses.replace(SMALL, tasks=(first,), seeds=1), ledger=ledger).evaluate_many(SEQUENCES)
    MadEvaluator(dataclasses.replace(SMALL, tasks=(second,)), ledger=ledger).evaluate_many(SEQUENCES[:2])
    assert MadEvaluator(SMALL, ledger=ledger).evaluate_many(SEQUENCES) == whole
    assert trainings["together"] == len(SEQUENCES) * len(SMALL.tasks) * (2 + 1)  # the grid, and the other seed


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 6},
        {"evaluate_every": 1},
        {"n_valid": 32},
        {"seed": 1},
        {"hidden_size": 8},
        {"weight_decay": 0.1},
        {"learning_rates": [2e-2]},
        {"patience": 3},
        {"precision": "float64"},
    ],
    ids=str,
)
def test_whatever_a_result_depends_on_is_in_the_key(change, tmp_path):
    ledger = Ledger(tmp_path / "trainings.jsonl")
    settings = {"steps": 4, "evaluate_every": 2, "tasks": "memorization", "batch_size": 8}
    MadEvaluator(preset("smoke", **settings), ledger=ledger).evaluate(SEQUENCES[0])
    changed = preset("smoke", **(settings | change))
    found = MadEvaluator(changed, ledger=ledger).evaluate(SEQUENCES[0])
    assert found == MadEvaluator(changed).evaluate(SEQUENCES[0]) and len(ledger.read()) == 2


def test_the_device_is_not_in_the_key():
    """A ledger filled on a GPU is read on a CPU."""
    plan, train = SMALL.tasks[0], SMALL.train
    assert settings_digest(plan, train, 0) == settings_digest(plan, dataclasses.replace(train, device="cuda"), 0)


def test_chunks_are_kept_as_they_end(tmp_path, monkeypatch):
    ledger, sizes = Ledger(tmp_path / "trainings.jsonl"), []
    record = Ledger.record

    def counted(self, results, *args):
        sizes.append(len(results))
        record(self, results, *args)

    monkeypatch.setattr(Ledger, "record", counted)
    one_task = dataclasses.replace(SMALL, tasks=SMALL.tasks[:1], seeds=1)
    MadEvaluator(one_task, ledger=ledger, at_once=2).evaluate_many(SEQUENCES)
    assert sizes == [2, 2, 2] and len(ledger.read()) == 6


def test_a_torn_line_is_mended_and_a_damaged_one_is_named(tmp_path):
    ledger = Ledger(tmp_path / "trainings.jsonl")
    whole = MadEvaluator(SMALL, ledger=ledger).evaluate_many(SEQUENCES)
    text = ledger.path.read_text()
    ledger.path.write_text(text[:-40])
    assert MadEvaluator(SMALL, ledger=ledger).evaluate_many(SEQUENCES) == whole
    assert sorted(ledger.path.read_text().splitlines()) == sorted(text.splitlines())
    ledger.path.write_text('{"key": {"settings": "x"}}\n' + text)
    with pytest.raises(FileError, match=r"line 1: no training"):
        ledger.read()


def test_a_killed_search_goes_on_in_the_middle_of_a_batch(tmp_path):
    """Killed while its only batch runs, so that no trial is done; what was trained is not trained again."""
    options = ["--preset", "smoke", "--length", "3", "--batch", "8", "--workers", "1", "--at-once", "1"]
    command = [sys.executable, "-m", "composer_megatron", "search", str(tmp_path / "s"), *options]
    search = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    kept = tmp_path / "s" / "trainings.jsonl"
    try:
        while not (kept.exists() and kept.read_bytes().count(b"\n") >= 3):
            assert search.poll() is None
            time.sleep(0.002)
    finally:
        search.send_signal(signal.SIGKILL)
        search.wait()
    time.sleep(0.5)  # the worker sees that its parent is gone
    lines = kept.read_text().splitlines()
    assert 3 <= len(lines) < 16 and not (tmp_path / "s" / "trials.jsonl").exists()
    main(["search", str(tmp_path / "s"), *options])
    whole = kept.read_text().splitlines()
    assert whole[: len(lines) - 1] == lines[:-1] and len(whole) == 16  # the last one may have been torn
    main(["search", str(tmp_path / "t"), *options])
    scores = [
        {line["sequence"]: line["score"] for line in map(json.loads, (tmp_path / name / "trials.jsonl").open())}
        for name in "st"
    ]
    assert scores[0] == scores[1]


def test_time_that_is_up_ends_a_search_in_good_order(tmp_path, capsys):
    options = ["--preset", "demo", "--length", "2", "--workers", "0", "--at-once", "1"]
    start = time.perf_counter()
    with pytest.raises(SystemExit) as stop:
        main(["search", str(tmp_path / "s"), *options, "--max-minutes", "0.03"])
    assert stop.value.code == 0 and time.perf_counter() - start < 20
    assert "the same command goes on" in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with pytest.raises(SystemExit) as stop:
        main(["search", str(tmp_path / "s"), *options, "--max-minutes", "-1"])
    assert stop.value.code == 2 and "--max-minutes -1" in capsys.readouterr().err


def test_a_ledger_is_of_mad_trainings_alone(tmp_path):
    with pytest.raises(UsageError, match=r"trainings=.* belongs to the evaluator smoke or demo"):
        make_evaluator("small-text", text=[str(tmp_path)], ledger=tmp_path / "t.jsonl")


def test_chunks_of_nothing_are_refused():
    with pytest.raises(UsageError, match="at_once=0"):
        MadEvaluator(SMALL, at_once=0)
