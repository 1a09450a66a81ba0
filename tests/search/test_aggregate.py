"""The aggregator against a brute-force reading of its definition."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.aggregate import aggregate, best_cluster, conditional_vote

SCORES = st.integers(0, 20).map(lambda number: number / 20)


@st.composite
def studies(draw, most=12):
    length = draw(st.integers(1, 6))
    rows = draw(st.lists(st.tuples(st.text("AM", min_size=length, max_size=length), SCORES), min_size=1, max_size=most))
    return [CompositeSequence(text) for text, _ in rows], [score for _, score in rows]


def brute_force_vote(members, chosen, context):
    """(letters with the most votes, all votes) among the members that end their prefix like `chosen`."""
    prefix_start = max(0, len(chosen) - context)
    votes = [
        (member.letters[len(chosen)], score)
        for member, score in members
        if all(member.letters[i] == chosen[i] for i in range(prefix_start, len(chosen)))
    ]
    letters = [letter for letter in "AM" if any(letter in member.letters for member, _ in members)]
    counts = {letter: sum(1 for vote, _ in votes if vote == letter) for letter in letters}
    return [letter for letter in letters if counts[letter] == max(counts.values())], counts, votes


@settings(max_examples=60, deadline=None)
@given(study=studies(), context=st.integers(0, 5))
def test_every_block_is_the_conditional_mode_of_the_best_cluster(study, context):
    sequences, scores = study
    assume(context < len(sequences[0]))
    result = aggregate(sequences, scores, context)
    members = list(zip(result.members, result.member_scores, strict=True))
    for position, vote in enumerate(result.votes):
        leaders, counts, votes = brute_force_vote(members, result.sequence.letters[:position], context)
        assert vote.counts == counts
        assert vote.letter in leaders
        assert vote.decision == ("tie" if len(leaders) > 1 else "vote")
        if len(leaders) > 1:
            means = {leader: np.mean([score for letter, score in votes if letter == leader]) for leader in leaders}
            assert means[vote.letter] == pytest.approx(max(means.values()))
            if means["A"] == pytest.approx(means["M"], abs=1e-12):
                assert vote.letter == "A"
    assert len(result.sequence) == len(sequences[0])


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(SCORES, min_size=1, max_size=8), clusters=st.integers(1, 4))
def test_the_best_cluster_is_the_top_of_the_best_partition(scores, clusters):
    """In one dimension clusters are intervals: try every cut of the sorted scores and compare the sums of squares."""
    ordered = sorted(scores)
    number = min(clusters, len(set(scores)))
    costs = {}
    for cuts in itertools.combinations(range(1, len(ordered)), number - 1):
        parts = [ordered[start:end] for start, end in itertools.pairwise((0, *cuts, len(ordered)))]
        costs[cuts] = sum(len(part) * np.var(part) for part in parts), len(parts[-1])
    least = min(cost for cost, _ in costs.values())
    best = {size for cost, size in costs.values() if cost <= least + 1e-9}
    found = best_cluster(scores, clusters, seed=0)
    assert len(found) in best
    others = [score for index, score in enumerate(scores) if index not in found]
    assert min(scores[index] for index in found) > max(others, default=-1)


def test_a_worked_example():
    """Three good sequences, of which none is the vote."""
    good = {"AMMA": 0.91, "AAMM": 0.90, "MMAM": 0.92}
    poor = {"AAAA": 0.1, "MMMM": 0.11, "MAAA": 0.12}
    texts = {**good, **poor}
    result = aggregate([CompositeSequence(text) for text in texts], list(texts.values()), clusters=2)
    assert result.sequence.letters == "AMMM"
    assert [member.letters for member in result.members] == ["MMAM", "AMMA", "AAMM"]
    assert [vote.counts for vote in result.votes] == [
        {"A": 2, "M": 1},
        {"A": 1, "M": 2},
        {"A": 1, "M": 2},
        {"A": 1, "M": 2},
    ]
    after_one = aggregate([CompositeSequence(text) for text in texts], list(texts.values()), context=1, clusters=2)
    # A leads by 2 to 1; after A it is one to one, and AMMA has the better score
    assert [vote.decision for vote in after_one.votes[:2]] == ["vote", "tie"]
    assert after_one.sequence.letters[:2] == "AM"


def test_ties_go_to_the_better_voters_and_then_to_the_first_primitive():
    members = [CompositeSequence(text) for text in ("AM", "MA")]
    assert conditional_vote(members, [0.5, 0.6], "", 0).letter == "M"
    assert conditional_vote(members, [0.6, 0.5], "", 0).letter == "A"
    equal = conditional_vote(members, [0.5, 0.5], "", 0)
    assert (equal.letter, equal.decision) == ("A", "tie")


def test_an_unseen_context_falls_back_to_the_longest_shorter_one_that_was_seen():
    members = [CompositeSequence(text) for text in ("AAAM", "AAAM", "MMMA", "MAMM", "MAMM")]
    scores = [0.5] * 5
    # no member begins with MAA; two have AA before their last block
    vote = conditional_vote(members, scores, "MAA", 3)
    assert (vote.letter, vote.counts, vote.decision) == ("M", {"A": 0, "M": 2}, "unseen context")
    # no member begins with AAM; two have AM before their last block
    vote = conditional_vote(members, scores, "AAM", 3)
    assert (vote.counts, vote.decision) == ({"A": 0, "M": 2}, "unseen context")
    only_attention = [CompositeSequence("AAM"), CompositeSequence("AAA")]
    vote = conditional_vote(only_attention, [0.1, 0.2], "MM", 2)  # not even one letter was seen
    assert (vote.letter, vote.counts, vote.decision) == ("A", {"A": 1, "M": 1}, "unseen context")


@settings(max_examples=60, deadline=None)
@given(study=studies(), context=st.integers(1, 5))
def test_votes_of_the_same_members_never_meet_an_unseen_context(study, context):
    assume(context < len(study[0][0]))
    assert "unseen context" not in aggregate(*study, context=context).as_dict()["decisions"]


def test_a_full_context_follows_one_member():
    texts = ["AMAM", "MMAA", "MAMA", "AAMM"]
    result = aggregate([CompositeSequence(text) for text in texts], [0.5, 0.7, 0.6, 0.4], context=3, clusters=1)
    assert result.sequence.letters in texts


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.7]])
def test_fewer_different_scores_than_clusters(scores):
    texts = ["AM", "MA", "MM"][: len(scores)]
    result = aggregate([CompositeSequence(text) for text in texts], scores, clusters=5)
    assert result.clusters == 5
    assert set(result.member_scores) == {max(scores)}


def test_the_file_holds_all_that_the_report_shows():
    values = aggregate([CompositeSequence("AAMM"), CompositeSequence("AAMA")], [0.5, 0.5]).as_dict()
    assert json.loads(json.dumps(values)) == {
        "sequence": "2A1M1A",
        "runs": [["A", 2], ["M", 1], ["A", 1]],
        "context": 0,
        "clusters": 5,
        "cluster_size": 2,
        "members": ["2A1M1A", "2A2M"],
        "member_scores": [0.5, 0.5],
        "votes": [{"A": 2, "M": 0}, {"A": 2, "M": 0}, {"A": 0, "M": 2}, {"A": 1, "M": 1}],
        "decisions": ["vote", "vote", "vote", "tie"],
    }


@pytest.mark.parametrize(
    ("texts", "scores", "options", "message"),
    [
        ([], [], {}, "no completed trial"),
        (["AM", "AMM"], [0.1, 0.2], {}, "2 and 3 blocks"),
        (["AM"], [0.1, 0.2], {}, "1 sequences and 2 scores"),
        (["AM"], [float("nan")], {}, "1A1M is nan"),
        (["AM"], [0.1], {"context": -1}, "context=-1; expected 0 to 1"),
        (["AM"], [0.1], {"context": 2}, "context=2; expected 0 to 1"),
        (["AM"], [0.1], {"clusters": 0}, "clusters=0"),
    ],
)
def test_what_cannot_be_aggregated_is_an_error_for_people(texts, scores, options, message):
    with pytest.raises(UsageError, match=message):
        aggregate([CompositeSequence(text) for text in texts], scores, **options)
