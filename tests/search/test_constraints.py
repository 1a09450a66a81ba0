"""Constraints: their grammar, exact bounds, what nothing can meet, and that every proposer keeps to them."""

import dataclasses
import random

import pytest

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape
from composer_search.constraints import Constraint, Criteria
from composer_search.objectives import Target
from composer_search.proposers import make_proposer, propose_batch
from composer_search.region import Region
from composer_search.space import Space
from composer_search.study import StudySettings, Trial

TARGET = Target(shape=load_shape("1b"))


def criteria(*constraints, objective="accuracy", **changes):
    return Criteria.parse(objective, constraints, dataclasses.replace(TARGET, **changes))


def allowed(space, wanted):
    return {space.at(rank) for rank in range(space.size) if wanted.allows(space.at(rank))}


def test_a_bound_that_is_met_exactly_is_met():
    """2A4M grows to 9A18M: a third of its blocks and 9/16 of the baseline's cache, neither exact in floating point."""
    sequence = CompositeSequence.parse("2A4M")
    for text in (
        "attention <= 1/3",
        "attention >= 1/3",
        "kv_bytes<=0.5625x",
        "kv_bytes >= 0.5625 x",
        "kv_bytes <= 18432",
    ):
        assert criteria(text).allows(sequence), text
    for text in ("attention <= 0.333333", "kv_bytes <= 0.5624x", "kv_bytes >= 18433"):
        assert not criteria(text).allows(sequence), text


def test_several_constraints_hold_at_once():
    space, both = Space("AM", 6), ("attention <= 1/2", "kv_bytes >= 0.5x")
    one, other = (allowed(space, criteria(text)) for text in both)
    assert allowed(space, criteria(*both)) == one & other
    assert one - other and other - one and one & other


def test_equal_parameters_are_the_matched_arm():
    """Grown as in the paper sequences exceed the baseline by up to a tenth; matched, most are within two percent."""
    space = Space("AM", 6)
    bound = ("params <= 1.02x", "params >= 0.98x")
    paper, matched = (len(allowed(space, criteria(*bound, match=match))) for match in ("paper", "parameters"))
    assert paper < matched


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention < 1/3", "expected one such as"),
        ("attention", "expected one such as"),
        ("attention <= -1", "expected one such as"),
        ("attention <= 1/0", "divides by zero"),
        ("atention <= 1/3", "unknown metric 'atention'; known are attention"),
        ("accuracy >= 0.5", "known after training alone"),
    ],
)
def test_what_is_no_constraint_is_named(text, message):
    with pytest.raises(UsageError, match=message):
        Constraint.parse(text)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (
            ("params <= 0.5x",),
            r"no sequence of 6 blocks of AM meets 'params <= 0.5x' .*nearest is \S+ with params .*x\)",
        ),
        (("attention <= 1/100", "attention >= 1/200"), r"nearest is 6M with attention 0$"),
    ],
)
def test_what_nothing_meets_is_refused_with_what_comes_nearest(constraints, message):
    with pytest.raises(UsageError, match=message):
        criteria(*constraints).check(Space("AM", 6))


def test_a_space_too_large_to_look_through_is_sampled(monkeypatch):
    monkeypatch.setattr("composer_search.constraints.ENUMERABLE", 200)
    monkeypatch.setattr("composer_search.region.ENUMERABLE", 200)
    space, deep = Space("AM", 20), load_shape("8b")
    rare = criteria("attention <= 1/100", shape=deep)
    with pytest.raises(UsageError, match="none of 200 sampled"):
        criteria("params <= 0.5x", shape=deep).check(space)
    rare.check(space)  # 20M alone meets it, which a random sample does not hold
    region = Region(space, rare)
    assert region.ranks is None
    assert region.draw(set(), random.Random(0)).letters == "M" * 20
    assert region.draw({CompositeSequence("M" * 20)}, random.Random(0)) is None


def test_a_sequence_bigger_than_the_target_is_refused_before_anything_runs():
    with pytest.raises(UsageError, match=r"60A has .* weights at shape 'tiny'"):
        criteria(shape=load_shape("tiny")).check(Space("AM", 60))


@pytest.mark.parametrize("name", ["random", "exhaustive", "evolution", "bayesian"])
@pytest.mark.parametrize("objective", ["accuracy", "accuracy, -kv_bytes"])
def test_every_proposer_keeps_to_the_constraints_and_finds_all_that_they_leave(name, objective):
    space, wanted = Space("AM", 5), criteria("attention <= 1/2", objective=objective)
    inside = allowed(space, wanted)
    assert 8 <= len(inside) < 20
    settings = StudySettings(
        space=space, proposer=name, initial=3, seed=1, budget=len(inside), evaluator={}, criteria=wanted
    )
    proposer, trials = make_proposer(settings), []
    while batch := propose_batch(proposer, trials, [], range(len(trials), len(trials) + 2)):
        for each in batch:
            common = {"trial": each.trial, "sequence": each.sequence, "proposer": each.proposer, "seconds": 1.0}
            trials.append(Trial(**common, finished="", score=each.sequence.count("M") / 5))
    assert {each.sequence for each in trials} == inside
    assert len(trials) == len(inside)
