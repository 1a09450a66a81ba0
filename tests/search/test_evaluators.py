"""The MAD evaluator: what its score is made of, what it depends on, and its presets."""

import dataclasses
import json
import pickle
import statistics

import numpy as np
import pytest
import torch

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search import evaluators
from composer_search.evaluators import MadEvaluator, MadSettings, preset, training_seed
from composer_search.mad import Setting

SEQUENCE = CompositeSequence.parse("MAM")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch):
    """Replaces the training: the accuracy is a function of sequence, task, rate and seed that tests can repeat."""
    made = []

    def accuracy(rate, seed):
        return seed % 97 / 200 + (0.4 if rate == 2.0 else 0.1)

    def train(sequence, data, settings, seed):
        made.append((data.vocab_size, settings.learning_rates, seed, settings.steps))
        by_rate = tuple((rate, accuracy(rate, seed)) for rate in settings.learning_rates)
        rate, best = max(by_rate, key=lambda pair: pair[1])
        return evaluators.TrainResult(best, best / 2, rate, 5, by_rate, ((5, best),))

    monkeypatch.setattr(evaluators, "train", train)
    return made, accuracy


def test_the_score_is_the_mean_over_tasks_and_seeds(calls):
    _, accuracy = calls
    settings = preset("smoke", seeds=3, seed=7, learning_rates=(1.0, 2.0))
    result = MadEvaluator(settings).evaluate(SEQUENCE)
    seeds = [training_seed(7, number) for number in range(3)]
    expected = [accuracy(2.0, seed) for seed in seeds]
    assert result.seed_scores == pytest.approx(expected)
    assert result.score == pytest.approx(statistics.fmean(expected))
    assert result.spread == pytest.approx(np.std(expected, ddof=1))
    assert result.spread > 0
    assert result.tasks == pytest.approx(dict.fromkeys(("in-context-recall", "memorization"), result.score))
    assert result.test_score == pytest.approx(result.score / 2)


def test_the_rate_is_chosen_with_the_first_seed_and_kept(calls):
    made, _ = calls
    MadEvaluator(preset("smoke", seeds=3, learning_rates=(1.0, 2.0))).evaluate(SEQUENCE)
    first, second, third = (training_seed(0, number) for number in range(3))
    recall, facts = 6, 32
    assert [(vocab, rates, seed) for vocab, rates, seed, _ in made] == [
        (vocab, rates, seed)
        for vocab in (recall, facts)
        for rates, seed in (((1.0, 2.0), first), ((2.0,), second), ((2.0,), third))
    ]


def test_no_two_evaluations_share_a_training_seed():
    seeds = {training_seed(seed, number) for seed in range(30) for number in range(30)}
    assert len(seeds) == 900


def test_a_real_evaluation_repeats_itself_after_pickling_too():
    evaluator = MadEvaluator(preset("smoke"))
    first = evaluator.evaluate(SEQUENCE)
    assert MadEvaluator(preset("smoke")).evaluate(SEQUENCE) == first
    assert pickle.loads(pickle.dumps(evaluator)).evaluate(SEQUENCE) == first
    assert MadEvaluator(preset("smoke", seed=1)).evaluate(SEQUENCE) != first
    assert 0 < first.score < 1
    assert first.spread == 0
    json.dumps(dict(first.details))


def test_data_come_from_the_cache(tmp_path):
    cached = MadEvaluator(preset("smoke"), cache_dir=tmp_path)
    assert cached.evaluate(SEQUENCE) == MadEvaluator(preset("smoke")).evaluate(SEQUENCE)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_validation_sequence_is_trained_or_tested_on():
    evaluator = MadEvaluator(preset("demo", tasks="in-context-recall"))
    data = evaluator._task_data(evaluator.settings.tasks[0])
    train, validation, test = (
        {row.tobytes() for row in split[0]} for split in (data.train, data.validation, data.test)
    )
    assert not validation & train
    assert not validation & test
    assert not test & train
    assert len(data.validation[0]) == 256


def test_without_attention_the_demo_is_not_learnt():
    """The coarse fact that any proxy must show; finer ones are noisy at this size."""
    evaluator = MadEvaluator(preset("demo", tasks="memorization", seeds=1, learning_rates=[6e-3]))
    assert evaluator.evaluate(CompositeSequence.parse("3M")).score < 0.05
    assert evaluator.evaluate(CompositeSequence.parse("MAM")).score > 0.5


def test_compression_is_rebuilt_from_one_vector():
    """Copied position by position it would be solved in a few steps; through one vector of 16 it cannot be."""
    setting = Setting("compression", 256, 64, (("vocab_size", 16), ("seq_len", 16)))
    plan = dataclasses.replace(preset("smoke", steps=60).tasks[0], setting=setting)
    settings = dataclasses.replace(preset("smoke"), tasks=(plan,))
    score = MadEvaluator(settings).evaluate(SEQUENCE).score
    assert 1 / 16 < score < 0.5  # the special token is free


def test_a_task_at_two_difficulties_has_two_names():
    easy, hard = (Setting("memorization", 64, 16, (("vocab_size", size), ("seq_len", 8))) for size in (8, 16))
    base = preset("smoke", steps=2)
    plans = tuple(dataclasses.replace(base.tasks[1], setting=setting) for setting in (easy, hard))
    result = MadEvaluator(dataclasses.replace(base, tasks=plans)).evaluate(SEQUENCE)
    assert len(result.tasks) == 2
    assert all("memorization" in name for name in result.tasks)


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": 2},
        {"seed": 1},
        {"learning_rates": [1e-3]},
        {"steps": 21},
        {"batch_size": 17},
        {"evaluate_every": 5},
        {"n_valid": 65},
        {"hidden_size": 20},
        {"ffn_hidden_size": 49},
        {"num_heads": 4},
        {"cosine": True},
        {"warmup_steps": 1},
        {"weight_decay": 0.1},
        {"patience": 3},
        {"solved": 0.9},
        {"min_learning_rate": 0.0},
        {"metric": "macro_accuracy"},
        {"tasks": "memorization"},
    ],
    ids=str,
)
def test_the_description_holds_every_setting(change):
    before = MadEvaluator(preset("smoke")).describe()
    after = MadEvaluator(preset("smoke", **change)).describe()
    assert json.loads(json.dumps(after)) == after
    assert after != before
    assert after["name"] == "mad"


def test_where_it_runs_is_not_part_of_the_description(tmp_path):
    plain = MadEvaluator(preset("smoke")).describe()
    assert MadEvaluator(preset("smoke", device="auto"), cache_dir=tmp_path).describe() == plain


def test_the_baseline_is_that_of_mad():
    settings = preset("baseline")
    steps = {plan.setting.task: plan.steps for plan in settings.tasks}
    assert len(steps) == 6
    assert steps.pop("memorization") == 400  # 200 epochs of 256 examples in batches of 128
    assert set(steps.values()) == {20_000}
    assert settings.train.learning_rates == (1e-4, 5e-4, 1e-3)
    assert settings.train.widths == evaluators.Widths(hidden_size=128, num_heads=16, ffn_hidden_size=352)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dmo", {}, "unknown evaluator preset 'dmo'; expected smoke, demo, baseline"),
        ("demo", {"stepz": 3}, "no setting 'stepz'; did you mean 'steps'"),
        ("demo", {"qqq": 3}, "no setting 'qqq'; known are"),
        ("demo", {"steps": "many"}, "steps='many'; expected int"),
        ("demo", {"steps": True}, "steps=True; expected int"),
        ("demo", {"steps": 0}, "steps=0"),
        ("demo", {"cosine": 1}, "cosine=1; expected bool"),
        ("demo", {"learning_rates": ["fast"]}, "learning_rates='fast'"),
        ("demo", {"hidden_size": 33}, "hidden_size=33"),
        ("demo", {"seeds": 0}, "seeds=0"),
        ("demo", {"tasks": "memorisation"}, "'memorisation' is not in this preset"),
        ("demo", {"train": None}, "no setting 'train'"),
    ],
)
def test_wrong_overrides_are_named(name, overrides, message):
    with pytest.raises(UsageError, match=message):
        preset(name, **overrides)


def test_impossible_tasks_fail_before_any_trial():
    plan = preset("smoke").tasks[0]
    odd = dataclasses.replace(plan, setting=Setting("in-context-recall", 8, 8, (("seq_len", 7),)))
    for tasks, message in (((), "at least one task"), ((plan, plan), "twice"), ((odd,), "seq_len=7")):
        with pytest.raises(UsageError, match=message):
            MadSettings(tasks=tasks)


def test_overrides_accept_whole_numbers_and_single_rates():
    settings = preset("demo", learning_rates=1, weight_decay=0, tasks=["selective-copying", "memorization"])
    assert settings.train.learning_rates == (1.0,)
    assert settings.train.weight_decay == 0.0
    assert [plan.setting.task for plan in settings.tasks] == ["selective-copying", "memorization"]
