"""Objectives: exact metrics against the architecture's own counts, scalarisations and fronts by definition."""

import dataclasses
import itertools
import json
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.planner.profile import Profile
from composer_megatron.roofline import Passes
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape
from composer_search.constraints import Criteria
from composer_search.extrapolate import extrapolate
from composer_search.objectives import METRICS, Objective, Scalarisation, Target, goal_front, pareto_front
from composer_search.speed import Measured
from composer_search.study import Trial

TARGET = Target(shape=load_shape("1b"))


def parse(text, target=TARGET, constraints=()):
    return Criteria.parse(text, constraints, target)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("AM", min_size=1, max_size=16), min_size=1, max_size=4),
    st.sampled_from(["stack", "stretch"]),
    st.sampled_from(["paper", "parameters"]),
)
def test_metrics_are_those_of_the_grown_architecture_whatever_was_asked_before(texts, method, match):
    """What is remembered by a sequence's runs must hold for every sequence with those runs."""
    target = dataclasses.replace(TARGET, method=method, match=match, seq_len=2048)
    criteria = parse("accuracy", target)
    for text in texts:
        pieces = ["".join(group) for _, group in itertools.groupby(text)]
        other = sorted(pieces[::2], reverse=True), sorted(pieces[1::2])  # the same runs in another order
        mixed = "".join(itertools.chain(*itertools.zip_longest(*other, fillvalue="")))
        for each in (mixed, text):
            grown = extrapolate(CompositeSequence(each), TARGET.shape, method=method, match=match)
            found = criteria.metrics(CompositeSequence(each))
            assert found["attention"] == Fraction(grown.sequence.count("A"), len(grown.sequence))
            assert found["kv_bytes"] == grown.kv_bytes_per_token()
            assert found["params"] == grown.params_non_embedding
            assert found["flops"] == grown.flops_per_token(2048)


def test_throughput_is_predicted_and_falls_with_the_work():
    criteria = parse("accuracy")
    few = Architecture(CompositeSequence("AM"), TARGET.shape)
    many = Architecture(CompositeSequence("AMAM"), TARGET.shape)
    measure = METRICS["throughput"].measure
    assert measure(few, TARGET) > measure(many, TARGET) > 0
    assert measure(few, dataclasses.replace(TARGET, device="a100")) < measure(few, TARGET)
    assert criteria.baseline()["throughput"] == measure(TARGET.baseline(), TARGET)


def test_decoding_takes_the_bytes_of_weights_output_layer_and_cache():
    """At batch 1 on an H100 that copies 3.0 TB/s: 2A4M grown to 1b, counted by hand from its widths."""
    grown, seq_len = TARGET.grow(CompositeSequence.parse("2A4M")), TARGET.seq_len
    weights = 9 * 10_485_760 + 18 * 50_331_648 + 27 * 2048
    cache = 9 * 2 * 8 * 64 * seq_len
    expected = 2 * (weights + 128_256 * 2048 + cache) / 3.0e12
    assert METRICS["latency"].measure(grown, TARGET) == pytest.approx(expected, rel=1e-12)
    longer = dataclasses.replace(TARGET, seq_len=65_536)
    faster = METRICS["latency"].measure(TARGET.baseline(), longer) / METRICS["latency"].measure(grown, longer)
    assert faster > 1.2  # at long contexts the cache decides, of which the baseline has 16 / 9


def profile_of(shape, seconds, seq_len=64):
    blocks = {letter: Passes(own, 2 * own) for letter, own in seconds.items()}
    ends = Passes(0.5, 1.0), Passes(0.25, 0.75)
    return Profile("some GPU", "bfloat16", shape, seq_len, 2, blocks, *ends, environment={})


def test_measured_times_take_the_place_of_predicted_ones(tmp_path):
    profile_of(TARGET.shape, {"A": 3.0, "M": 1.0, "W": 9.0}).save(tmp_path / "profile.json")
    profile = Measured.load(tmp_path / "profile.json", TARGET.shape, 64, "AM")
    target = dataclasses.replace(TARGET, seq_len=64, profile=profile)
    grown = Architecture(CompositeSequence("AMM"), TARGET.shape)
    assert METRICS["throughput"].measure(grown, target) == 2 * 64 / (3 * (3 + 1 + 1) + 1.5 + 1.0)
    assert METRICS["prefill"].measure(grown, target) == (3 + 1 + 1 + 0.5 + 0.25) / 2
    kept = json.loads(json.dumps(target.as_dict()))
    assert Target.from_dict(kept) == target and "environment" not in kept["profile"]
    assert "profile" not in TARGET.as_dict()  # studies of before go on
    mixed = parse("accuracy + 0.1 throughput", target)
    (few,), (many,) = (mixed.costs(CompositeSequence.parse(text)) for text in ("1A5M", "5A1M"))
    assert few > many  # there an attention block takes three times an MLP's time


@pytest.mark.parametrize(
    ("seconds", "seq_len", "message"),
    [
        ({"A": 1.0, "M": 1.0}, 128, "seq_len=64"),
        ({"A": 1.0}, 64, "no times of M"),
        ({"A": 1.0, "M": 1.0}, 64, "no times of W"),
    ],
)
def test_a_profile_of_something_else_is_refused(tmp_path, seconds, seq_len, message):
    profile_of(TARGET.shape, seconds).save(tmp_path / "profile.json")
    with pytest.raises(UsageError, match=message):
        Measured.load(tmp_path / "profile.json", TARGET.shape, seq_len, "AMW")


def test_a_mix_counts_shares_of_the_baseline():
    sequence = CompositeSequence.parse("2A4M")  # grown to 9A18M, as the paper's: 9/16 of the cache
    mixed = parse("accuracy - 0.2 kv_bytes + 1/2 attention - 3*attention")
    (value,) = mixed.goals(sequence, 0.8)
    assert value == pytest.approx(0.8 - 0.2 * 9 / 16 - 2.5 * 9 / 27, abs=1e-12)
    assert mixed.record(sequence, 0.8)["value"] == value
    assert "value" not in mixed.record(sequence, None)
    assert json.loads(json.dumps(mixed.record(sequence, 0.8)))["kv_bytes"] == 9 * 2048


def test_plain_accuracy_needs_no_target_and_records_nothing():
    criteria = parse("accuracy", None)
    assert criteria.plain
    assert criteria.goals(CompositeSequence("AM"), 0.7) == (0.7,)
    assert criteria.record(CompositeSequence("AM"), 0.7) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a term"),
        ("accuracy - ", "expected a term"),
        ("accuracy 0.2 kv_bytes", r"expected a term at '0.2 kv_bytes'"),
        ("accuracy - 0.2 kv", "unknown metric 'kv'"),
        ("-kv_bytes", "nothing to search for"),
        ("-accuracy", "nothing to search for"),
        ("accuracy, -accuracy", "takes accuracy away"),
        ("accuracy - 1/0 flops", "divides by zero"),
        ("accuracy,,-flops", "expected a term"),
        ("0 accuracy", "nothing to search for"),
    ],
)
def test_what_is_no_objective_is_named(text, message):
    with pytest.raises(UsageError, match=message):
        Objective.parse(text)


def test_exact_metrics_need_a_target():
    with pytest.raises(UsageError, match="need a target shape"):
        parse("accuracy - flops", None)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-5, 5)), min_size=2, max_size=8), st.integers(0, 99))
def test_a_scalarisation_agrees_with_dominance(goals, seed):
    """Whoever is at least as good in all goals and better in one is better; one goal alone is itself."""
    scalarisation = Scalarisation.draw(goals, random.Random(seed))
    assert sum(scalarisation.weights) == pytest.approx(1)
    for first, second in itertools.permutations(goals, 2):
        if all(one >= other for one, other in zip(first, second, strict=True)):
            assert scalarisation.of(first) >= scalarisation.of(second) - 1e-12
    assert Scalarisation.draw([goal[:1] for goal in goals], random.Random(seed)).of((0.3,)) == 0.3


def test_the_weights_reach_every_corner_of_the_simplex():
    drawn = [Scalarisation.draw([(0, 0, 0), (1, 1, 1)], random.Random(seed)).weights for seed in range(300)]
    assert all(min(weights) >= 0 for weights in drawn)
    for goal in range(3):
        assert max(weights[goal] for weights in drawn) > 0.9
        assert abs(sum(weights[goal] for weights in drawn) / 300 - 1 / 3) < 0.06  # four standard deviations


def trial(number, score, **metrics):
    return Trial(
        trial=number,
        sequence=CompositeSequence("AM"),
        proposer="random",
        seconds=1.0,
        finished="",
        score=score,
        objective=metrics,
        error=None if score is not None else "failed",
    )


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_the_front_is_what_nothing_dominates(points):
    trials = [trial(n, a / 3, kv_bytes=k, throughput=t) for n, (a, k, t) in enumerate(points)]
    found = {each.trial for each in pareto_front(trials[::-1], ("accuracy", "kv_bytes", "throughput"))}
    for number, (a, k, t) in enumerate(points):
        better = [(x, y, z) for x, y, z in points if x >= a and y <= k and z >= t and (x, y, z) != (a, k, t)]
        assert (number in found) == (not better)


def test_a_front_leaves_out_failures_and_trials_without_the_metric():
    trials = [trial(1, 0.5, flops=3), trial(0, None, flops=1), trial(2, 0.9)]
    assert [each.trial for each in pareto_front(trials, ("accuracy", "flops"))] == [1]
    with pytest.raises(UsageError, match="unknown metric 'speed'"):
        pareto_front(trials, ("speed",))


def test_the_front_of_the_objectives_own_goals():
    """Each goal is worth more the higher it is, whatever its metric; a plain or mixed objective has no front."""
    goals = [(0.5, -1.0), (0.4, -0.5), (0.4, -0.6), (0.5, -1.0), (0.1, 0.0)]
    trials = [trial(number, first, goal_1=first, goal_2=second) for number, (first, second) in enumerate(goals)]
    failed = trial(5, None, kv_bytes=0.0)
    assert [each.trial for each in goal_front([failed, *trials[::-1]])] == [0, 1, 3, 4]
    assert goal_front([failed, trial(0, 0.5), trial(1, 0.5, value=0.4, kv_bytes=1.0)]) == []


def test_criteria_come_back_from_json():
    criteria = parse("accuracy - 0.2 kv_bytes, -flops", constraints=("attention <= 1/3",))
    assert Criteria.from_dict(json.loads(json.dumps(criteria.as_dict()))) == criteria
    assert Criteria.from_dict({}) == Criteria()
