"""Successive halving: who goes on, what is remembered, and how far early rankings are right."""

import json
import logging
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.errors import FileError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluation import Evaluation
from composer_search.evaluators import MadEvaluator, preset
from composer_search.evidence.agreement import SIZE
from composer_search.evidence.scores import Scores
from composer_search.fidelity import Halving, HalvingEvaluator, proxy_agreements, rank_agreement

SPACE = [CompositeSequence(format(rank, "04b").replace("0", "A").replace("1", "M")) for rank in range(16)]


class Table:
    """An evaluator whose scores are known: a true worth and an error that shrinks with training."""

    def __init__(self, noise=0.0, share=1.0, calls=None, broken_after=None):
        self.noise, self.share, self.broken_after = noise, share, broken_after
        self.calls = [] if calls is None else calls

    def worth(self, sequence, share=None):
        rank = SPACE.index(sequence)
        error = np.random.default_rng(rank).normal() * self.noise
        return rank / 16 + error * (1 - (share or self.share))

    def describe(self):
        return {"name": "table", "noise": self.noise, "share": self.share}

    def evaluate(self, sequence):
        return self.evaluate_many([sequence])[0]

    def evaluate_many(self, sequences):
        if self.broken_after is not None and len(self.calls) >= self.broken_after:
            raise KeyboardInterrupt
        self.calls.append((self.share, [sequence.letters for sequence in sequences]))
        return [Evaluation(self.worth(sequence), 0.0, (self.worth(sequence),), {"t": 0.5}) for sequence in sequences]

    def at_fidelity(self, share):
        return Table(self.noise, self.share * share, self.calls, self.broken_after)


@given(
    st.lists(st.sampled_from(SPACE), min_size=1, max_size=16, unique=True),
    st.integers(2, 4),
    st.integers(2, 4),
    st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_the_best_go_on_and_the_cost_is_as_announced(sequences, rungs, eta, audit):
    table = Table()
    halving = Halving(rungs=rungs, eta=eta, audit=audit)
    found = HalvingEvaluator(table, halving).evaluate_many(sequences)
    spent = sum(share * len(letters) for share, letters in table.calls)
    assert (len(table.calls) == 1) == (len(sequences) < halving.least)  # too few to drop any: all in full
    assert spent <= halving.cost(len(sequences)) + 1e-9
    assert audit or spent == pytest.approx(halving.cost(len(sequences)))
    best = max(sequences, key=SPACE.index)
    places = {sequence: place for place, sequence in enumerate(sequences)}
    assert found[places[best]].details["fidelity"]["share"] == 1.0
    for (before, ran), (after, went_on) in zip(table.calls, table.calls[1:], strict=False):
        assert after / before == pytest.approx(round(after / before))
        ranked = sorted(ran, key=lambda letters: SPACE.index(CompositeSequence(letters)), reverse=True)
        top = ranked[: math.ceil(len(ran) / eta)]
        assert set(top) <= set(went_on) <= set(ran)
        assert len(went_on) <= len(top) + audit
    for sequence, evaluation in zip(sequences, found, strict=True):
        fidelity = evaluation.details["fidelity"]
        assert evaluation.score == pytest.approx(table.worth(sequence, fidelity["share"]))
        assert fidelity["scores"][-1] == [fidelity["share"], evaluation.score]
        shares = [share for share, letters in table.calls if sequence.letters in letters]
        assert [share for share, _ in fidelity["scores"]] == pytest.approx(shares)


def test_nine_of_three_rungs():
    table = Table()
    HalvingEvaluator(table, Halving(audit=0)).evaluate_many(SPACE[:9])
    assert [(share, len(letters)) for share, letters in table.calls] == [
        (pytest.approx(1 / 9), 9),
        (pytest.approx(1 / 3), 3),
        (1.0, 1),
    ]
    assert Halving(audit=0).cost(9) == pytest.approx(3)


def test_one_alone_is_trained_in_full_and_repeats_are_trained_once():
    table = Table()
    assert HalvingEvaluator(table).evaluate(SPACE[3]).score == 3 / 16
    assert table.calls == [(1.0, ["AAMM"])]
    twice = HalvingEvaluator(Table()).evaluate_many([SPACE[3], SPACE[3]])
    assert twice[0] == twice[1]


def test_some_go_on_whatever_their_ranking():
    """Over many companies each place in the ranking is drawn at times, the last ones too."""
    lasting = set()
    for seed in range(30):
        found = HalvingEvaluator(Table(), Halving(audit=1, seed=seed)).evaluate_many(SPACE)
        lasting |= {place for place, each in enumerate(found) if each.details["fidelity"]["share"] == 1.0}
    assert len(lasting) > 10
    assert min(lasting) < 5


def test_what_was_measured_is_not_measured_again(tmp_path):
    log = tmp_path / "rungs.jsonl"
    first = Table()
    expected = HalvingEvaluator(first, log=log).evaluate_many(SPACE)
    again = Table()
    assert HalvingEvaluator(again, log=log).evaluate_many(SPACE) == expected
    assert again.calls == []
    other = Table(noise=0.1)
    HalvingEvaluator(other, log=log).evaluate_many(SPACE)
    assert len(other.calls) == 3  # of other settings nothing is taken
    with log.open("a") as file:
        file.write('{"settings": "torn')
    assert HalvingEvaluator(Table(), log=log).evaluate_many(SPACE) == expected


@pytest.mark.parametrize("calls", range(6))
def test_an_interruption_costs_what_was_trained_together_and_changes_nothing(tmp_path, calls):
    halving, log = Halving(together=4), tmp_path / "rungs.jsonl"
    expected = HalvingEvaluator(Table(noise=0.3), halving).evaluate_many(SPACE)
    with pytest.raises(KeyboardInterrupt):
        HalvingEvaluator(Table(noise=0.3, broken_after=calls), halving, log).evaluate_many(SPACE)
    resumed = Table(noise=0.3)
    assert HalvingEvaluator(resumed, halving, log).evaluate_many(SPACE) == expected
    whole = Table(noise=0.3)
    HalvingEvaluator(whole, halving).evaluate_many(SPACE)
    assert len(resumed.calls) == len(whole.calls) - calls


def test_order_does_not_matter():
    shuffled = [SPACE[place] for place in np.random.default_rng(0).permutation(16)]
    by_order = dict(zip(SPACE, HalvingEvaluator(Table(noise=0.5)).evaluate_many(SPACE), strict=True))
    again = dict(zip(shuffled, HalvingEvaluator(Table(noise=0.5)).evaluate_many(shuffled), strict=True))
    assert again == by_order


@pytest.mark.parametrize(("noise", "warned"), [(0.0, False), (3.0, True)])
def test_early_rankings_are_checked_and_warned_about(caplog, noise, warned):
    table = Table(noise=noise)
    with caplog.at_level(logging.WARNING):
        found = HalvingEvaluator(table, Halving(rungs=2, eta=2, audit=2)).evaluate_many(SPACE)
    finalists = [each for each in found if each.details["fidelity"]["share"] == 1.0]
    (agreement,) = finalists[0].details["fidelity"]["agreement"]
    pairs = np.array([[score for _, score in each.details["fidelity"]["scores"]] for each in finalists])
    assert agreement["spearman"] == pytest.approx(scipy.stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)
    assert agreement["sequences"] == len(finalists)
    assert agreement["share"] == 0.5
    assert bool(caplog.records) == warned
    assert all("agreement" not in each.details["fidelity"] for each in found if each not in finalists)


def test_a_score_that_is_no_number_is_worth_nothing():
    class Diverging(Table):
        def evaluate_many(self, sequences):
            found = super().evaluate_many(sequences)
            return [
                Evaluation(math.nan) if sequence == SPACE[-1] else each
                for sequence, each in zip(sequences, found, strict=True)
            ]

        def at_fidelity(self, share):
            return Diverging(self.noise, share, self.calls)

    found = HalvingEvaluator(Diverging(), Halving(audit=0)).evaluate_many(SPACE)
    assert math.isnan(found[-1].score)
    assert found[-1].details["fidelity"]["share"] < 1
    assert found[-2].details["fidelity"]["share"] == 1


def test_real_trainings_are_the_evaluators_own(tmp_path):
    torch.set_num_threads(1)
    base = MadEvaluator(preset("smoke", tasks="memorization"))
    sequences = [CompositeSequence(letters) for letters in ("MAM", "AMA", "MMM")]
    halved = HalvingEvaluator(base, Halving(rungs=2, audit=0), tmp_path / "log.jsonl")
    found = halved.evaluate_many(sequences)
    for sequence, evaluation in zip(sequences, found, strict=True):
        share = evaluation.details["fidelity"]["share"]
        assert evaluation.score == base.at_fidelity(share).evaluate(sequence).score
    assert sorted(each.details["fidelity"]["share"] for each in found) == pytest.approx([1 / 3, 1 / 3, 1])
    assert halved.describe()["full"] == base.describe()
    assert json.loads(json.dumps(halved.describe())) == halved.describe()
    widths = halved.scaled(Fraction(1, 2)).describe()["full"]
    assert (widths["hidden_size"], widths["num_heads"]) == (8, 1)
    with pytest.raises(UsageError, match="Table has no widths to scale"):
        HalvingEvaluator(Table()).scaled(Fraction(1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rungs": 1}, "rungs=1"),
        ({"eta": 1}, "eta=1"),
        ({"audit": -1}, "audit=-1"),
        ({"warn_below": 2.0}, "warn_below"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        Halving(**change)


@pytest.mark.parametrize("line", ['{"settings": 1}', '{"settings": "a", "sequence": "A", "evaluation": {"scor": 1}}'])
def test_a_log_of_something_else_is_refused(tmp_path, line):
    log = tmp_path / "rungs.jsonl"
    log.write_text(line + "\n")
    with pytest.raises(FileError, match="line 1: no evaluation"):
        HalvingEvaluator(Table(), log=log).evaluate(SPACE[0])


def test_few_or_equal_scores_agree_on_nothing():
    assert rank_agreement([1, 2, 3, 4], [1, 2, 3, 4]) is None
    assert rank_agreement([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]) is None
    assert rank_agreement([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]) == pytest.approx(-1)


def test_each_task_and_the_parameter_count_are_held_against_a_target():
    rng = np.random.default_rng(0)
    worth = rng.normal(size=16)
    tasks = {"good": worth + 0.1 * rng.normal(size=16), "noise": rng.normal(size=16)}
    proxy = Scores("proxy", tuple(SPACE), (tasks["good"] + tasks["noise"]) / 2, None, tasks)
    target = Scores("text", tuple(SPACE[4:]), worth[4:])
    whole, good, noise, size = proxy_agreements(proxy, target)
    assert [each.proxy for each in (whole, good, noise, size)] == ["proxy", "good", "noise", SIZE]
    assert {each.candidates for each in (whole, good, noise, size)} == {12}
    for each, values in ((whole, proxy.values), (good, tasks["good"]), (noise, tasks["noise"])):
        assert each.spearman.value == pytest.approx(scipy.stats.spearmanr(values[4:], worth[4:]).statistic)
        assert each.kendall.value == pytest.approx(scipy.stats.kendalltau(values[4:], worth[4:]).statistic)
        assert each.gain.value == pytest.approx(each.spearman.value - each.by_parameters.value)
    attention = [-sequence.letters.count("A") for sequence in SPACE[4:]]  # an M has more parameters than an A
    assert size.spearman.value == pytest.approx(scipy.stats.spearmanr(attention, worth[4:]).statistic)
    assert "ranks better" in good.verdict
    assert noise.spearman.value < good.spearman.value
