"""``composer_search.evidence.votes``: what the vote of a study depends on."""

import numpy as np
import pytest

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.evidence.scores import Scores
from composer_search.evidence.votes import votes


def table(seeds, tasks=None):
    """Scores of AA and MM from those of their seeds."""
    pair = CompositeSequence("AA"), CompositeSequence("MM")
    by_seed = np.array(seeds)
    return Scores("table", pair, by_seed.mean(axis=1), by_seed, tasks or {})


def test_shares_are_those_of_the_seeds():
    """A mean of two seeds 0 and 1 is below 1/2, at it or above with chances 1/4, 1/2, 1/4; a tie goes to A."""
    found = votes(table([[0.0, 1.0], [0.5, 0.5]]), resamples=400)
    error = np.sqrt(0.75 * 0.25 / 400)
    assert found.shares[CompositeSequence("AA")] == pytest.approx(0.75, abs=4 * error)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert str(found.others["seed 1 alone"]) == "2M"
    assert str(found.others["seed 2 alone"]) == "2A"


def test_a_task_may_decide():
    tasks = {"one": np.array([0.9, 0.1]), "two": np.array([0.0, 0.6])}
    found = votes(table([[0.45, 0.45], [0.35, 0.35]], tasks), resamples=4)
    assert str(found.chosen) == "2A"
    assert str(found.others["without one"]) == "2M"
    assert str(found.others["without two"]) == "2A"
    assert found.shares == {CompositeSequence("AA"): 1.0}
    shown = found.exhibit()
    assert ("without one", "2M") in shown.rows
    assert shown.findings[-1] == "2A is chosen by 100% of them."


def test_clusters_decide_how_many_vote():
    """Two clusters let both of 1 vote against 0; with as many clusters as scores the best is alone."""
    sequences = tuple(CompositeSequence(letters) for letters in ("AMM", "MAM", "MMA", "AAA"))
    values = np.array([1.0, 0.98, 0.97, 0.0])
    found = votes(Scores("four", sequences, values, np.stack([values, values], axis=1)), resamples=1)
    assert str(found.others["2 clusters"]) == "3M"
    assert str(found.others["4 clusters"]) == "1A2M"


def test_one_seed_has_no_resamples():
    pair = CompositeSequence("AA"), CompositeSequence("MM")
    with pytest.raises(UsageError, match="--seeds 3"):
        votes(Scores("one", pair, np.array([0.0, 1.0])))
    with pytest.raises(UsageError, match="resamples=0; expected at least 1"):
        votes(table([[0.0, 1.0], [0.5, 0.5]]), resamples=0)
