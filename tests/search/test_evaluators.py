"""The MAD evaluator: what its score is made of, what it depends on, and its presets."""

import dataclasses
import itertools
import json
import pickle
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import Candidate, Widths
from composer_search.evaluators import (
    EVALUATORS,
    PRESETS,
    MadEvaluator,
    MadSettings,
    mad,
    make_evaluator,
    preset,
    training_seed,
)
from composer_search.evaluators.settings import block_weights, equal_weights, fitting_widths, matched_widths
from composer_search.mad import PROXIES, Setting
from composer_search.trainer import TrainResult, best_rate, train

SEQUENCE = CompositeSequence.parse("MAM")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def alone(sequence, settings, tasks):
    """The reference: the one-at-a-time trainer on each task, rates, decays and seeds chosen as the class says."""
    first, *others = (training_seed(settings.seed, number) for number in range(settings.seeds))
    found = {}
    for plan, data in tasks.items():
        grid = []
        for rate, decay in settings.recipes:
            own = dataclasses.replace(settings.for_task(plan), learning_rates=(rate,), weight_decay=decay)
            grid.append(train(sequence, data, own, first))
        best = best_rate(grid, settings.train.solved)
        chosen = dataclasses.replace(
            settings.for_task(plan), learning_rates=(best.learning_rate,), weight_decay=best.weight_decay
        )
        found[plan.setting.task] = [best, *(train(sequence, data, chosen, seed) for seed in others)]
    return found


@pytest.mark.parametrize("batch_size", [8, 64], ids=["together", "in turn"])
def test_the_evaluation_is_that_of_training_each_model_by_itself(batch_size):
    """In float64, where the order of sums cannot flip a prediction; 64 sequences of 8 or 12 are trained in turn."""
    settings = preset(
        "smoke",
        precision="float64",
        batch_size=batch_size,
        learning_rates=(3e-2, 1e-2),
        weight_decays=(0.0, 1.0),
        seeds=3,
        seed=7,
    )
    evaluator = MadEvaluator(settings)
    sequences = [CompositeSequence(letters) for letters in ("MAM", "AAM", "MM")]
    assert {evaluator._pays(plan) for plan in settings.tasks} == {batch_size == 8}
    evaluations = evaluator.evaluate_many(sequences)
    tasks = {plan: evaluator._task_data(plan) for plan in settings.tasks}
    for sequence, evaluation in zip(sequences, evaluations, strict=True):
        expected = alone(sequence, settings, tasks)
        seeds = [statistics.fmean(results[seed].validation for results in expected.values()) for seed in range(3)]
        assert evaluation.seed_scores == pytest.approx(seeds)
        assert evaluation.score == pytest.approx(statistics.fmean(seeds))
        assert evaluation.spread == pytest.approx(np.std(seeds, ddof=1))
        assert evaluation.spread > 0
        tried = {task: results[0].by_rate for task, results in expected.items()}
        tests = [result.test for results in expected.values() for result in results]
        assert evaluation.test_score == pytest.approx(statistics.fmean(tests))
        for task, results in expected.items():
            assert evaluation.tasks[task] == pytest.approx(statistics.fmean(result.validation for result in results))
            detail = evaluation.details["tasks"][task]
            assert (detail["learning_rate"], detail["weight_decay"]) == (
                results[0].learning_rate,
                results[0].weight_decay,
            )
            assert [rate for rate, _ in detail["by_rate"]] == [rate for rate, _ in tried[task]]
            assert [value for _, value in detail["by_rate"]] == pytest.approx([value for _, value in tried[task]])


def test_company_does_not_change_a_score_and_order_is_kept():
    evaluator = MadEvaluator(preset("smoke", seeds=2))
    sequences = [CompositeSequence(letters) for letters in ("MAM", "AAAM", "MAM", "M")]
    together = evaluator.evaluate_many(sequences)
    assert together == [evaluator.evaluate(sequence) for sequence in sequences]
    assert evaluator.evaluate_many(sequences[::-1]) == together[::-1]
    assert evaluator.evaluate_many([]) == []


def test_a_whole_candidate_trains_the_grid_once_and_the_choice_for_the_other_seeds(monkeypatch):
    trained = []

    def population(rows, settings, at_most, finished):
        trained.append([(row.sequence.letters, row.learning_rate, row.weight_decay, row.seed) for row in rows])
        found = [TrainResult(row.learning_rate, 0.5, row.learning_rate, 1, (), ((1, 0.5),)) for row in rows]
        finished(dict(enumerate(found)))
        return found

    monkeypatch.setattr(mad, "train_population", population)
    settings = preset("smoke", tasks="memorization", seeds=3, learning_rates=(0.1, 0.2), weight_decays=(0.0, 0.1))
    MadEvaluator(settings).evaluate_many([CompositeSequence("A"), CompositeSequence("M")])
    first, *others = (training_seed(0, number) for number in range(3))
    grid = [(letter, rate, decay, first) for letter in "AM" for decay in (0.0, 0.1) for rate in (0.1, 0.2)]
    assert trained == [grid, [(letter, 0.2, 0.0, seed) for letter in "AM" for seed in others]]
    assert settings.runs == (len(trained[0]) + len(trained[1])) / 2


def test_tasks_weigh_the_same_whatever_their_number_of_difficulties():
    easy, hard = (Setting("memorization", 64, 16, (("vocab_size", size), ("seq_len", 8))) for size in (8, 32))
    base = preset("smoke", steps=3)
    plans = (base.tasks[0], *(dataclasses.replace(base.tasks[1], setting=setting) for setting in (easy, hard)))
    result = MadEvaluator(dataclasses.replace(base, tasks=plans)).evaluate(SEQUENCE)
    details = [found["validation"][0] for found in result.details["tasks"].values()]
    assert len(details) == 3
    assert "memorization n_train=64 vocab_size=8 seq_len=8" in result.details["tasks"]
    assert result.tasks["memorization"] == pytest.approx((details[1] + details[2]) / 2)
    assert result.score == pytest.approx((details[0] + (details[1] + details[2]) / 2) / 2)


def test_less_training_and_other_widths():
    evaluator = MadEvaluator(preset("demo", warmup_steps=6))
    less = evaluator.at_fidelity(1 / 3)
    assert [plan.steps for plan in less.settings.tasks] == [100, 20, 50]
    assert less.settings.train.warmup_steps == 2
    assert [plan.steps for plan in evaluator.at_fidelity(1e-9).settings.tasks] == [1, 1, 1]
    assert less.evaluate_many([]) == []
    half = evaluator.scaled(Fraction(3, 8)).settings.train.widths
    assert half == Widths(hidden_size=16, num_heads=2, ffn_hidden_size=36)  # 1.5 heads are 2, of 8 each
    assert evaluator.scaled(Fraction(1, 100)).settings.train.widths.num_heads == 1
    with pytest.raises(UsageError, match="share=0"):
        evaluator.scaled(Fraction(0))


@settings(max_examples=200, deadline=None)
@given(
    letters=st.text("AM", min_size=1, max_size=16),
    heads=st.integers(2, 16),
    head=st.sampled_from([4, 8, 16]),
    inner=st.integers(16, 600),
    factor=st.floats(0.5, 3.0),
)
def test_matched_widths_hold_the_weights_asked_for(letters, heads, head, inner, factor):
    """Counted on the candidate's own matrices; where there is an MLP, to within half a unit of its width."""
    sequence = CompositeSequence(letters)
    widths = Widths(hidden_size=heads * head, num_heads=heads, ffn_hidden_size=inner)
    weights = round(factor * equal_weights(len(letters), widths))
    try:
        found = matched_widths(sequence, widths, weights)
    except UsageError as error:
        assert "too few" in str(error)
        return
    blocks = Candidate(sequence, 5, found).blocks
    held = sum(matrix.numel() for matrix in blocks.parameters() if matrix.dim() == 2)
    assert held == block_weights(sequence, found)
    assert found.hidden_size // found.num_heads == head
    mlps = letters.count("M")
    if mlps and found.ffn_hidden_size > 1:
        assert abs(held - weights) <= mlps * 3 * found.hidden_size / 2
    elif not mlps:
        ideal = (weights / 4 / len(letters)) ** 0.5 / head
        assert found.num_heads in {int(ideal), int(ideal) + 1}


def test_at_mads_widths_every_six_block_sequence_is_as_big_as_the_mean():
    widths = Widths()
    wanted = equal_weights(6, widths)
    for letters in map("".join, itertools.product("AM", repeat=6)):
        sequence = CompositeSequence(letters)
        held = block_weights(sequence, fitting_widths(sequence, widths, 0))
        assert held == pytest.approx(wanted, rel=0.06 if letters == "AAAAAA" else 0.002), letters
    own = {block_weights(CompositeSequence(letters), widths) for letters in ("AAAAAA", "MMMMMM")}
    assert max(own) / min(own) > 2  # what it evens out


def test_candidates_of_equal_weights_train_at_their_own_widths(monkeypatch):
    """The score is that of training the sequence alone at its matched widths; the log says which they are."""
    base = MadEvaluator(preset("smoke", precision="float64", tasks="memorization"))
    evaluator, sequences = base.with_weights(0), [CompositeSequence(text) for text in ("AAM", "MMM", "MMA")]
    for sequence, found in zip(sequences, evaluator.evaluate_many(sequences), strict=True):
        widths = fitting_widths(sequence, base.settings.train.widths, 0)
        own = dataclasses.asdict(widths)
        alone = MadEvaluator(preset("smoke", precision="float64", tasks="memorization", **own)).evaluate(sequence)
        assert (found.score, found.test_score) == (alone.score, alone.test_score)
        assert found.details["widths"] == own and found.details["weights"] == block_weights(sequence, widths)
    assert evaluator.describe() == base.describe() | {"weights": 0}
    assert "widths" not in base.evaluate(SEQUENCE).details


def test_too_few_weights_are_refused():
    with pytest.raises(UsageError, match=r"weights=10: too few for 1A1M"):
        matched_widths(CompositeSequence("AM"), Widths(), 10)
    with pytest.raises(UsageError, match="not for S"):
        matched_widths(CompositeSequence("AS"), Widths(), 10_000)


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
        {"weight_decays": [0.0, 0.1]},
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
    assert settings.train.widths == Widths(hidden_size=128, num_heads=16, ffn_hidden_size=352)
    assert {preset(name).train.precision for name in ("baseline", "full", "proxies")} == {"bfloat16"}


def test_epochs_give_each_task_the_steps_of_its_own_data():
    """Of 12,800 examples in batches of 128, and of memorization's 256; half the batch takes twice the steps."""
    for batch, steps in ((128, {5000, 100}), (64, {10_000, 200})):
        assert {plan.steps for plan in preset("baseline", epochs=50, batch_size=batch).tasks} == steps


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dmo", {}, "unknown evaluator preset 'dmo'; did you mean 'demo'"),
        ("xyz", {}, "unknown evaluator preset 'xyz'; expected smoke, demo, baseline, full, proxies"),
        ("demo", {"stepz": 3}, "no setting 'stepz'; did you mean 'steps'"),
        ("demo", {"qqq": 3}, "no setting 'qqq'; known are"),
        ("demo", {"steps": "many"}, "steps='many'; expected int"),
        ("demo", {"steps": True}, "steps=True; expected int"),
        ("demo", {"steps": 0}, "steps=0"),
        ("demo", {"epochs": 0}, "epochs=0"),
        ("demo", {"epochs": 2, "steps": 3}, "no steps beside"),
        ("demo", {"weights": 3}, "no setting 'weights'"),
        ("demo", {"cosine": 1}, "cosine=1; expected bool"),
        ("demo", {"learning_rates": ["fast"]}, "learning_rates='fast'"),
        ("demo", {"hidden_size": 33}, "hidden_size=33"),
        ("demo", {"seeds": 0}, "seeds=0"),
        ("demo", {"tasks": "memorisation"}, "'memorisation' is not in this preset; did you mean 'memorization'"),
        ("demo", {"tasks": "parity"}, "'parity' is not in this preset; expected in-context-recall, memorization"),
        ("demo", {"weight_decays": [0.1], "weight_decay": 0.2}, "give one of the two"),
        ("demo", {"weight_decays": [-0.1]}, "weight_decays=.*at least 0"),
        ("demo", {"difficulty_sweep": True}, "difficulty_sweep belongs to the presets baseline and full"),
        ("full", {"difficulty_sweep": "no"}, "difficulty_sweep='no'; expected bool"),
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


def test_the_full_protocol_is_that_of_mad():
    settings = preset("full")
    assert len(settings.tasks) == 66
    assert settings.recipes == tuple((rate, decay) for decay in (0.0, 0.1) for rate in (1e-4, 5e-4, 1e-3))
    assert settings.runs == 396
    steps = {plan.setting.name: plan.steps for plan in settings.tasks}
    assert steps["compression n_train=800"] == 200 * 7  # seven batches of at most 128 an epoch
    assert preset("full", difficulty_sweep=False).runs == 36
    assert preset("baseline", difficulty_sweep=True).runs == 198
    assert preset("full", tasks="memorization", seeds=3).runs == 6 * 8


def test_the_proxies_are_tested_beyond_the_length_of_training():
    settings = preset("proxies")
    assert [plan.setting.task for plan in settings.tasks] == list(PROXIES)
    parity = preset("proxies", tasks="parity", n_valid=4)
    small = dataclasses.replace(parity.tasks[0], setting=Setting("parity", 64, 8), steps=4, evaluate_every=2)
    widths = Widths(hidden_size=16, num_heads=2, ffn_hidden_size=16)
    trainer = dataclasses.replace(parity.train, widths=widths, learning_rates=(1e-2,), device="cpu")
    evaluator = MadEvaluator(dataclasses.replace(parity, tasks=(small,), train=trainer))
    data = evaluator._task_data(small)
    assert data.train[0].shape[1] * 2 == data.validation[0].shape[1] == data.test[0].shape[1]
    assert 0.3 < evaluator.evaluate(SEQUENCE).score < 0.7  # chance is one half


def test_one_door_for_all_evaluators(tmp_path):
    assert set(PRESETS) < set(EVALUATORS)
    assert make_evaluator("demo", seeds=1).describe() == MadEvaluator(preset("demo", seeds=1)).describe()
    halved = make_evaluator("smoke", halving=2, log=tmp_path / "rungs.jsonl")
    assert halved.describe()["full"] == make_evaluator("smoke", halving=1).describe()
    story = tmp_path / "story.txt"
    story.write_text("a line of a story that goes on and on\n" * 400)
    text = make_evaluator("small-text", text=[story], n_train=8, n_valid=1, n_test=1, seq_len=16)
    assert text.describe()["name"] == "small-text"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("small-txt", {}, "unknown evaluator 'small-txt'; did you mean 'small-text'"),
        ("demo", {"text": ["a"]}, "text=.*belongs to the evaluator small-text or large-text, not to demo"),
        ("small-text", {"text": ["a"], "shape": "1b"}, "shape='1b' belongs to the evaluator large-text"),
        ("small-text", {}, "small-text needs text"),
        ("demo", {"halving": -1}, "rungs=-1"),
    ],
)
def test_the_door_names_what_is_wrong(name, options, message):
    with pytest.raises(UsageError, match=message):
        make_evaluator(name, **options)
