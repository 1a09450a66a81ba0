"""Regularised evolution against a straightforward queue of the paper's, and its edges."""

import random
from collections import deque

import pytest

from composer_megatron.errors import UsageError
from composer_search.evolution import EvolutionProposer
from composer_search.proposers import Proposal, propose_batch
from composer_search.region import Region
from composer_search.space import Space
from composer_search.study import Trial


def score(sequence):
    return sum((letter == "A") * (position + 1) for position, letter in enumerate(sequence)) / 100


def trial(proposal, value):
    error = None if value is not None else "failed"
    common = {"trial": proposal.trial, "sequence": proposal.sequence, "proposer": proposal.proposer}
    return Trial(**common, seconds=1.0, finished="", score=value, error=error)


def run(proposer, budget, value=score):
    trials = []
    while len(trials) < budget and (proposal := proposer.propose(trials, [], len(trials))) is not None:
        trials.append(trial(proposal, value(proposal.sequence)))
    return trials


def distance(one, other):
    return sum(a != b for a, b in zip(one, other, strict=True))


def test_parents_win_among_the_youngest_and_differ_by_a_letter():
    """The reference keeps the paper's queue: push the new one, pop the oldest."""
    proposer = EvolutionProposer(Region(Space("AM", 14)), seed=0, population=8)
    alive = deque(maxlen=8)
    trials = run(proposer, 60)
    parents = []
    for number, each in enumerate(trials):
        if number < 8:
            assert each.proposer == "random"
        else:
            assert each.proposer == "evolution"
            parents.append([place for place, other in enumerate(alive) if distance(each.sequence, other.sequence) == 1])
        alive.append(each)
    assert sum(map(bool, parents)) > 45  # a child that was tried before is mutated on, but seldom in a space this large
    # a tournament of 2 of 8 is won by the worst with probability 1/64; without selection it would be 1/8
    assert max(each.score for each in trials[50:]) > max(each.score for each in trials[:8])


def test_old_trials_are_dead_however_good_they_were():
    proposer = EvolutionProposer(Region(Space("AM", 10)), seed=0, population=4)
    letters = ["AAAAAAAAAA", "MMMMMMMMMM", "MMMMMMMMMA", "MMMMMMMMAM", "MMMMMMMAMM"]
    space = Space("AM", 10)
    trials = [trial(Proposal(n, space.join(text), "random"), score(text)) for n, text in enumerate(letters)]
    children = {EvolutionProposer(proposer.region, seed, 4).propose(trials, [], 5).sequence for seed in range(40)}
    assert all(child.count("A") <= 3 for child in children)


def test_failed_trials_have_no_children_and_do_not_fill_the_population():
    space = Space("AM", 6)
    proposals = [Proposal(n, space.at(n), "random") for n in range(6)]
    trials = [trial(each, None if each.trial % 2 else 0.5) for each in proposals]
    assert EvolutionProposer(Region(space), 0, 4).propose(trials, [], 6).proposer == "random"
    assert EvolutionProposer(Region(space), 0, 3).propose(trials, [], 6).proposer == "evolution"


def test_a_proposal_is_a_function_of_log_seed_and_number():
    region = Region(Space("AM", 9))
    trials = run(EvolutionProposer(region, 3, 5), 20)
    shuffled = random.Random(0).sample(trials, 20)
    first, again = (EvolutionProposer(region, 3, 5).propose(each, [], 20) for each in (trials, shuffled))
    assert first == again
    assert run(EvolutionProposer(region, 4, 5), 20) != trials


def test_a_batch_has_no_twins_and_a_space_is_used_up():
    proposer = EvolutionProposer(Region(Space("AM", 3)), seed=0, population=2)
    trials = run(proposer, 3)
    batch = propose_batch(proposer, trials, [], range(3, 20))
    assert len(batch) == 5
    assert len({each.sequence for each in [*trials, *batch]}) == 8


def test_fixed_blocks_never_change():
    space = Space("AM", 8, prefix="AMA", suffix="MM")
    trials = run(EvolutionProposer(Region(space), seed=0, population=2), 20)
    assert {each.sequence for each in trials} == {space.at(rank) for rank in range(8)}


def test_a_population_of_one_is_refused():
    with pytest.raises(UsageError, match="initial=1"):
        EvolutionProposer(Region(Space("AM", 3)), 0, 1)
