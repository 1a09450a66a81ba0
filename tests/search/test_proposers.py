"""Proposers: pure functions of seed, trials and number, that never repeat themselves; and Ax with its known traps."""

import importlib.util
import itertools
import json
import random
import statistics
from collections import Counter

import pytest
import torch
from ax.adapter import torch as torch_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron import architecture as architecture_module
from composer_megatron import roofline as roofline_module
from composer_megatron import sequence as sequence_module
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape
from composer_search import proposers
from composer_search import space as space_module
from composer_search.botorch_proposer import BotorchProposer
from composer_search.climbing import climb
from composer_search.constraints import Criteria
from composer_search.objectives import Target
from composer_search.proposers import (
    BayesianProposer,
    ExhaustiveProposer,
    Proposal,
    RandomProposer,
    make_proposer,
    propose_batch,
)
from composer_search.region import Region
from composer_search.study import Space, StudySettings, Trial

TARGET = "AAMMAMMM"


def toy(sequence):
    """Near-additive with a bonus for right neighbours; the optimum is the beginning of TARGET, at 1."""
    hits = [letter == wanted for letter, wanted in zip(sequence, TARGET, strict=False)]
    weights = [1.5 - position / len(hits) for position in range(len(hits))]
    pairs = [first and second for first, second in itertools.pairwise(hits)]
    additive = sum(weight * hit for weight, hit in zip(weights, hits, strict=True)) / sum(weights)
    return 0.8 * additive + 0.2 * sum(pairs) / len(pairs)


def trial(proposal, score):
    error = "failed" if score is None else None
    common = {"trial": proposal.trial, "sequence": proposal.sequence, "proposer": proposal.proposer}
    return Trial(**common, seconds=1.0, finished="", score=score, error=error)


def run(proposer, budget, objective=toy):
    trials = []
    for number in range(budget):
        proposal = proposer.propose(trials, [], number)
        if proposal is None:
            break
        trials.append(trial(proposal, objective(proposal.sequence)))
    return trials


@pytest.mark.parametrize("kind", [RandomProposer, ExhaustiveProposer])
def test_every_sequence_comes_once_and_then_none(kind):
    trials = run(kind(Region(Space("AM", 5)), 3), 40)
    assert Counter(each.sequence for each in trials) == Counter(Space("AM", 5).at(rank) for rank in range(32))


@pytest.mark.parametrize("kind", [RandomProposer, ExhaustiveProposer])
def test_the_seed_decides_and_nothing_else(kind):
    first, same, other = (run(kind(Region(Space("AM", 8)), seed), 20) for seed in (0, 0, 1))
    assert first == same
    assert first != other


@settings(max_examples=40, deadline=None)
@given(tried=st.sets(st.integers(0, 7), max_size=7), running=st.sets(st.integers(0, 7), max_size=3))
def test_random_proposals_reach_exactly_the_untried(tried, running):
    space = Space("AM", 3)
    trials = [trial(Proposal(number, space.at(rank), "random"), 0.5) for number, rank in enumerate(tried)]
    pending = [Proposal(10 + rank, space.at(rank), "random") for rank in running]
    found = {RandomProposer(Region(space), seed).propose(trials, pending, 20) for seed in range(150)}
    ranks = {space.rank(proposal.sequence) for proposal in found if proposal}
    # a sequence of at most 8 is missed by 150 draws with probability (7/8)^150 = 2e-9
    assert ranks == set(range(8)) - tried - running


def test_random_proposals_are_uniform():
    space = Space("AM", 3)
    trials = [trial(Proposal(0, space.at(2), "random"), 0.5), trial(Proposal(1, space.at(5), "random"), None)]
    counts = Counter(RandomProposer(Region(space), seed).propose(trials, [], 2).sequence for seed in range(3000))
    assert len(counts) == 6
    assert all(abs(count - 500) < 100 for count in counts.values())  # five standard deviations


def test_random_search_works_in_spaces_beyond_64_bits():
    trials = run(RandomProposer(Region(Space("AM", 100)), 0), 5, objective=lambda sequence: 0.0)
    assert len({each.sequence for each in trials}) == 5


def test_bayesian_search_covers_a_space_without_repeating_itself():
    """Traps: Ax raises when a space is exhausted, proposes failed points again, and must not stumble over ties."""
    space, failing = Space("AM", 3), {"AMM", "MMM"}

    def objective(sequence):
        return None if sequence.letters in failing else round(toy(sequence), 1)

    trials = run(BayesianProposer(space, seed=0, initial=3), 12, objective)
    assert Counter(each.sequence for each in trials) == Counter(space.at(rank) for rank in range(8))
    by = [each.proposer for each in trials]
    assert by[:3] == ["sobol"] * 3
    assert by[3:7] == ["bayesian"] * 4


def acquisition_value(proposer, trials, running, number):
    """The value that Ax found: it changes with any random draw, even where the choice does not."""
    with proposers.quiet_single_thread():
        run = proposer._generate(proposer._adapter(trials), trials, running, number)
    return run.gen_metadata["expected_acquisition_value"]


def test_a_proposal_depends_on_the_trials_and_not_on_their_order_or_the_past():
    space = Space("AM", 6)
    trials = run(BayesianProposer(space, seed=1, initial=4), 7)
    tried = {each.sequence for each in trials}
    running = [Proposal(7, next(space.at(rank) for rank in range(64) if space.at(rank) not in tried), "bayesian")]
    torch.manual_seed(0)
    fresh = BayesianProposer(space, 1, 4)
    expected = fresh.propose(trials, running, 16)
    torch.manual_seed(99)
    shuffled = random.Random(0).sample(trials, len(trials))
    used = BayesianProposer(space, 1, 4)
    propose_batch(used, trials[:-1], [], [16, 17])
    propose_batch(used, trials, [], [17, 18])
    again = used.propose(shuffled, running, 16)
    assert (again.sequence, again.proposer) == (expected.sequence, "bayesian")
    assert acquisition_value(used, shuffled, running, 16) == acquisition_value(fresh, trials, running, 16)
    assert acquisition_value(used, shuffled, running, 16) != acquisition_value(fresh, trials, running, 17)


def test_a_batch_is_one_fit_and_each_of_its_proposals_what_it_is_alone(monkeypatch):
    """Of a space that Ax does not enumerate, where its search starts at random."""
    space = Space("AM", 14)
    trials = run(RandomProposer(Region(space), 0), 12, lambda sequence: sequence.count("A") / 14)
    fits, fit = [], torch_adapter.TorchAdapter._fit
    monkeypatch.setattr(
        torch_adapter.TorchAdapter, "_fit", lambda *args, **kwargs: fits.append(1) or fit(*args, **kwargs)
    )
    batch = propose_batch(BayesianProposer(space, 2, 8), trials, [], [12, 13, 14])
    assert len(fits) == 1
    assert {each.proposer for each in batch} == {"bayesian"}
    assert BayesianProposer(space, 2, 8).propose(trials, batch[:2], 14) == batch[2]
    used = BayesianProposer(space, 2, 8)
    assert [used.propose(trials, batch[:place], 12 + place) for place in (2, 1, 0)] == batch[::-1]
    values = [acquisition_value(each, trials, batch[:2], 14) for each in (used, BayesianProposer(space, 2, 8))]
    assert values[0] == values[1]


def test_of_three_primitives_too_the_process_finds_what_is_untried():
    """Ax searches one-hot vectors as a continuum, whose best point again and again rounds to one that was tried."""
    space = Space("AMW", 3)
    proposer, trials = BayesianProposer(space, 0, 4), []
    while len(trials) < 16:
        batch = propose_batch(proposer, trials, [], range(len(trials), len(trials) + 4))
        assert [each.note for each in batch] == [None] * 4
        trials += [trial(each, each.sequence.count("A") / 3) for each in batch]
    assert [each.proposer for each in trials] == ["sobol"] * 4 + ["bayesian"] * 12


def test_a_process_is_of_the_sequences_that_were_scored():
    """Two studies may hold the same numbers and scores."""
    space = Space("AM", 6)
    scores = [0.1, 0.9, 0.4, 0.7, 0.2, 0.6]
    one, other = (
        [
            trial(Proposal(number, space.at(first + step * number), "random"), score)
            for number, score in enumerate(scores)
        ]
        for first, step in ((0, 5), (63, -7))
    )
    used = BayesianProposer(space, 0, 4)
    used.propose(one, [], 6)
    assert used.propose(other, [], 6) == BayesianProposer(space, 0, 4).propose(other, [], 6)
    assert acquisition_value(used, other, [], 6) == acquisition_value(BayesianProposer(space, 0, 4), other, [], 6)


def test_where_sobol_points_are_all_tried_the_note_says_so():
    space = Space("AM", 4)
    trials = [trial(Proposal(rank, space.at(rank), "random"), 0.5) for rank in range(15)]
    found = [BayesianProposer(space, seed, 99).propose(trials, [], 15) for seed in range(4)]
    assert {each.sequence for each in found} == {space.at(15)}
    assert "random" in {each.proposer for each in found}
    for each in found:
        assert each.note is None if each.proposer == "sobol" else "again" in each.note, each.note


class Rugged(torch.nn.Module):
    """An acquisition of independent random values, where every way up ends soon."""

    def __init__(self, letters, places):
        super().__init__()
        generator = torch.Generator().manual_seed(places)
        self.heights = torch.rand(letters**places, generator=generator, dtype=torch.float64)
        self.weights = letters ** torch.arange(places)

    def forward(self, points):
        return self.heights[(points.squeeze(-2) @ self.weights.double()).long()]


@pytest.mark.parametrize(("letters", "places"), [(2, 12), (3, 6)])
def test_climbs_that_go_up_together_end_where_botorch_gets_one_after_the_other(letters, places):
    from botorch.optim import optimize_acqf_discrete_local_search

    rugged, values = Rugged(letters, places), [torch.arange(letters).double()] * places
    avoid = torch.randint(letters, (200, places)).double()
    ends = set()
    for seed in range(10):
        torch.manual_seed(seed)
        point, value = climb(rugged, values, avoid, 4, 32)
        torch.manual_seed(seed)
        expected, height = optimize_acqf_discrete_local_search(
            rugged, values, q=1, num_restarts=4, raw_samples=32, X_avoid=avoid
        )
        assert torch.equal(point, expected[0])
        assert value == height
        assert not (point == avoid).all(dim=1).any()
        ends.add(float(value))
    assert len(ends) > 1


def test_the_sequence_of_a_failed_trial_is_not_wanted_again():
    """Ax proposes the points of trials that are marked as failed again, and here AAA looks best by far."""
    trials = [
        trial(Proposal(number, CompositeSequence(text), "sobol"), None if text == "AAA" else text.count("A") / 3)
        for number, text in enumerate(("MMM", "AAA", "AMM", "MAM", "MMA", "AAM"))
    ]
    proposal = BayesianProposer(Space("AM", 3), 0, 3).propose(trials, [], 6)
    assert proposal.sequence.letters in ("AMA", "MAA")
    assert (proposal.proposer, proposal.note) == ("bayesian", None)


def test_a_batch_holds_different_sequences_and_none_that_runs():
    proposer = BayesianProposer(Space("AM", 3), seed=0, initial=2)
    trials = run(proposer, 3)
    running = propose_batch(proposer, trials, [], [3, 4])
    batch = propose_batch(proposer, trials, running, [5, 6])
    assert [proposal.trial for proposal in batch] == [5, 6]
    assert len({each.sequence for each in [*trials, *running, *batch]}) == 7
    assert len(propose_batch(proposer, trials, [*running, *batch], range(7, 20))) == 1


def test_bayesian_search_finds_the_optimum_sooner_than_random_search():
    """Of 128 sequences, random search has seen the best by trial 64 half of the time."""
    space = Space("AM", 7)

    def trials_needed(proposer, budget):
        trials = []
        while len(trials) < budget and not (trials and trials[-1].sequence.letters == TARGET[:7]):
            proposal = proposer.propose(trials, [], len(trials))
            trials.append(trial(proposal, toy(proposal.sequence)))
        return len(trials)

    bayesian = statistics.median(trials_needed(BayesianProposer(space, seed, 6), 20) for seed in range(3))
    by_chance = statistics.median(trials_needed(RandomProposer(Region(space), seed), 128) for seed in range(21))
    assert bayesian < 20 < by_chance


def test_the_kernel_has_a_length_scale_for_each_block():
    """Trap: naming RBFKernel as the kernel's class gives Ax an isotropic one, without a prior."""
    space = Space("AM", 5)
    proposer = BayesianProposer(space, 0, 3)
    trials = run(proposer, 6)
    with proposers.quiet_single_thread():
        model = proposer._adapter(trials).generator.surrogate.model
    assert type(model).__name__ == "SingleTaskGP"
    assert type(model.covar_module).__name__ == "RBFKernel"
    assert model.covar_module.lengthscale.shape == (1, 5)
    assert model.covar_module.lengthscale_prior is not None
    assert model.train_inputs[0].shape == (6, 5)
    assert type(model.likelihood).__name__ == "GaussianLikelihood"  # noise is inferred


def test_three_primitives_are_not_put_on_a_line(monkeypatch):
    """Of 0, 1 and 2 an RBF kernel would hold the outer two further apart than either is from the middle one."""
    rows = {**PRIMITIVES, "W": PRIMITIVES["A"]}
    for module in (sequence_module, space_module):
        monkeypatch.setattr(module, "PRIMITIVES", rows)
    proposer = BayesianProposer(Space("AMW", 3), 0, 4)
    trials = run(proposer, 6, objective=lambda sequence: sequence.count("W") / 3)
    assert [each.proposer for each in trials[4:]] == ["bayesian"] * 2
    with proposers.quiet_single_thread():
        model = proposer._adapter(trials).generator.surrogate.model
    encoded = model.train_inputs[0].reshape(6, 3, 3)
    assert encoded.sum(-1).eq(1).all()  # one-hot
    assert encoded[:, :, 2].sum() == sum(each.sequence.count("W") for each in trials)


def test_torch_has_one_thread_while_proposing_and_its_own_after(monkeypatch):
    seen = []
    monkeypatch.setattr(BayesianProposer, "_sobol_point", lambda *_: seen.append(torch.get_num_threads()) or 1 / 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        BayesianProposer(Space("AM", 4), 0, 2).propose([], [], 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_where_ax_fails_a_random_sequence_stands_in(monkeypatch):
    def broken(self, *_):
        raise RuntimeError("not positive definite")

    monkeypatch.setattr(BayesianProposer, "_sobol_point", broken)
    space = Space("AM", 4)
    proposal = BayesianProposer(space, 0, 2).propose([], [], 0)
    assert proposal.proposer == "random"
    assert proposal.note == "Ax: RuntimeError: not positive definite"
    assert proposal.sequence in space


def test_a_repeated_proposal_is_replaced(monkeypatch):
    space = Space("AM", 2)
    monkeypatch.setattr(BayesianProposer, "_best_candidate", lambda *_: CompositeSequence("AM"))
    trials = [trial(Proposal(0, CompositeSequence("AM"), "sobol"), 0.5)]
    proposal = BayesianProposer(space, 0, 1).propose(trials, [], 1)
    assert proposal.sequence != CompositeSequence("AM")
    assert (proposal.proposer, proposal.note) == ("random", "Ax proposed 1A1M again")


def test_the_snapshot_is_one_that_ax_reads(tmp_path):
    from ax.api.client import Client

    proposer = BayesianProposer(Space("AM", 4), seed=0, initial=3)
    trials = run(proposer, 5)
    (tmp_path / "ax.json").write_text(json.dumps(proposer.snapshot(trials)))
    client = Client.load_from_json_file(str(tmp_path / "ax.json"))
    best, values, _, _ = client.get_best_parameterization(use_model_predictions=False)
    expected = max(trials, key=lambda each: each.score)
    assert "".join(best[f"block_{position}"] for position in range(4)) == expected.sequence.letters
    assert values["score"][0] == pytest.approx(expected.score)


def settings_for(**changes):
    values = {"space": Space("AM", 4), "proposer": "random", "initial": 3, "seed": 0, "budget": 8, "evaluator": {}}
    return StudySettings(**(values | changes))


def test_the_settings_name_the_proposer():
    assert isinstance(make_proposer(settings_for()), RandomProposer)
    assert isinstance(make_proposer(settings_for(proposer="exhaustive", budget=16)), ExhaustiveProposer)
    assert isinstance(make_proposer(settings_for(proposer="bayesian")), BayesianProposer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proposer": "genetic"}, "unknown proposer 'genetic'"),
        ({"proposer": "exhaustive"}, "budget=8 is too small for an exhaustive search of all 16 sequences of 4 blocks"),
        ({"proposer": "bayesian", "initial": 0}, "initial=0"),
        ({"budget": 0}, "budget=0"),
    ],
)
def test_impossible_searches_are_named(changes, message):
    with pytest.raises(UsageError, match=message):
        make_proposer(settings_for(**changes))


def test_a_list_is_tried_in_its_order_and_then_nothing():
    listed = tuple(CompositeSequence(letters) for letters in ("MAMA", "AAAA", "AAMM"))
    proposer = make_proposer(settings_for(proposer="listed", only=listed, budget=3))
    assert tuple(each.sequence for each in propose_batch(proposer, [], [], range(8))) == listed
    assert StudySettings.from_dict(settings_for(proposer="listed", only=listed).as_dict()).only == listed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "a list of no sequences"),
        ({"only": (CompositeSequence("AAM"),)}, "2A1M is not of 4 blocks"),
        ({"only": (CompositeSequence("AAAA"),), "constraint": "attention <= 1/2"}, "4A breaks a constraint"),
    ],
)
def test_a_list_that_does_not_fit_the_search_is_refused(changes, message):
    if constraint := changes.pop("constraint", None):
        changes["criteria"] = criteria("accuracy", constraint)
    with pytest.raises(UsageError, match=message):
        make_proposer(settings_for(proposer="listed", **changes))


def test_without_ax_a_mix_is_searched_by_botorch_alone(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ax" else find(name))
    mix = settings_for(proposer="bayesian", criteria=criteria("accuracy - 0.2 kv_bytes"))
    assert isinstance(make_proposer(mix), BotorchProposer)
    with pytest.raises(ComposerError, match="needs Ax"):
        make_proposer(settings_for(proposer="bayesian"))


def test_without_ax_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ComposerError, match=r'pip install "composer-megatron\[search\]"'):
        make_proposer(settings_for(proposer="bayesian"))


def criteria(objective, *constraints, method="stack"):
    return Criteria.parse(objective, constraints, Target(shape=load_shape("1b"), method=method))


def test_costs_and_constraints_go_to_botorch_and_accuracy_stays_with_ax():
    for changes, kind in (
        ({}, BayesianProposer),
        ({"criteria": criteria("accuracy")}, BayesianProposer),
        ({"criteria": criteria("accuracy", "attention <= 1/2")}, BotorchProposer),
        ({"criteria": criteria("accuracy - 0.1 flops")}, BotorchProposer),
    ):
        assert isinstance(make_proposer(settings_for(proposer="bayesian", **changes)), kind)


def test_the_exact_part_of_an_objective_decides_where_accuracy_does_not():
    """Accuracy is flat: the candidate that costs least must come next, though no model ever saw a cost."""
    region = Region(Space("AM", 6), criteria("accuracy - kv_bytes", "attention >= 1/6"))
    trials = run(RandomProposer(region, 0), 8, objective=lambda sequence: 0.5)
    proposal = BotorchProposer(region, 0, 4).propose(trials, [], 8)
    left = [region.space.at(rank) for rank in region.ranks]
    left = [each for each in left if each not in {trial.sequence for trial in trials}]
    cheapest = max(region.criteria.costs(each) for each in left)
    assert (proposal.proposer, proposal.note) == ("bayesian", None)
    assert region.criteria.costs(proposal.sequence) == cheapest


def test_a_mix_is_optimised_sooner_than_by_chance():
    region = Region(Space("AM", 8), criteria("accuracy - 0.3 kv_bytes", method="stretch"))
    value = {each: region.criteria.goals(each, toy(each))[0] for each in map(region.space.at, region.ranks)}
    best = max(value, key=value.get)
    trials = run(BotorchProposer(region, 0, 6), 26)
    assert best in {each.sequence for each in trials}  # by chance with probability 26/256


def test_pareto_search_looks_along_the_front():
    region = Region(Space("AM", 6), criteria("accuracy, -kv_bytes"))
    trials = run(BotorchProposer(region, 0, 6), 24)
    whole = [region.criteria.goals(each, toy(each)) for each in map(region.space.at, range(64))]
    found = [region.criteria.goals(each.sequence, each.score) for each in trials]
    front = {q for q in whole if not any(p != q and p[0] >= q[0] and p[1] >= q[1] for p in whole)}
    assert len(front & set(found)) > len(front) / 2


def test_botorch_is_a_function_of_log_seed_and_number_and_heeds_what_runs():
    region = Region(Space("AM", 6), criteria("accuracy - 0.1 kv_bytes"))
    trials = run(RandomProposer(region, 0), 8)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = BotorchProposer(region, 1, 4).propose(trials, [], 8)
    again = BotorchProposer(region, 1, 4).propose(random.Random(0).sample(trials, 8), [], 8)
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    batch = propose_batch(BotorchProposer(region, 1, 4), trials, [], range(8, 12))
    assert batch[0] == first
    assert len({each.sequence for each in [*trials, *batch]}) == 12


def test_botorch_works_in_spaces_beyond_enumeration_and_with_three_primitives(monkeypatch):
    rows = {**PRIMITIVES, "W": PRIMITIVES["A"]}
    for module in (sequence_module, space_module, architecture_module, roofline_module):
        monkeypatch.setattr(module, "PRIMITIVES", rows)
    monkeypatch.setattr("composer_search.constraints.ENUMERABLE", 500)
    monkeypatch.setattr("composer_search.botorch_proposer.ENUMERABLE", 800)
    region = Region(Space("AMW", 6), Criteria.parse("accuracy", ["attention <= 1/2"], Target(shape=load_shape("1b"))))
    trials = run(RandomProposer(region, 0), 6)
    proposal = BotorchProposer(region, 0, 4).propose(trials, [], 6)
    assert (proposal.proposer, proposal.note) == ("bayesian", None)
    assert region.allows(proposal.sequence)
    assert region.ranks is None


def test_where_botorch_fails_a_random_sequence_stands_in(monkeypatch):
    def broken(self, *_):
        raise RuntimeError("not positive definite")

    monkeypatch.setattr(BotorchProposer, "_best_candidate", broken)
    region = Region(Space("AM", 4), criteria("accuracy", "attention <= 1/2"))
    proposal = BotorchProposer(region, 0, 2).propose(run(RandomProposer(region, 0), 3), [], 3)
    assert (proposal.proposer, proposal.note) == ("random", "BoTorch: RuntimeError: not positive definite")
    assert region.allows(proposal.sequence)
