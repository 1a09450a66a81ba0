"""Aggregation: one sequence out of the best ones that a search found (arXiv 2510.00379).

The scores are clustered with K-means, and the cluster of the highest mean score votes: block by block, the letter
chosen is the most frequent one among the members whose last `context` letters before it are those chosen so far,

    a_i = mode { a_i^m : m in C, a^m_{i-c:i-1} = a_{i-c:i-1} },

which the paper calls N_c. N_0, where every position votes for itself, is its choice and the default here.

The paper leaves open which cluster is the top, how ties are broken and what happens in a context that no member has.
Here: the top cluster is that of the highest mean. Of letters with as many votes, the one whose voters have the higher
mean score wins, then the one that comes first among the primitives. Where no member has the context, the longest
shorter one that some member has decides; without a context every member has it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence

Decision = Literal["vote", "tie", "unseen context"]


@dataclass(frozen=True)
class Vote:
    """How one block was chosen.

    Attributes:
        letter: The choice.
        counts: Members for each letter, in the primitives' order.
        decision: ``vote`` by more votes than any other letter, ``tie`` by the rule for ties, ``unseen context`` by
            members with a shorter context, whether by votes or by tie.
    """

    letter: str
    counts: dict[str, int]
    decision: Decision


@dataclass(frozen=True)
class Aggregation:
    """The aggregated sequence and how it came about.

    Attributes:
        sequence: The result.
        context: Letters before a block that its vote depends on.
        clusters: Clusters asked for; fewer where there are fewer different scores.
        members: The best cluster, best first.
        member_scores: Their scores.
        votes: One for each block.
    """

    sequence: CompositeSequence
    context: int
    clusters: int
    members: tuple[CompositeSequence, ...]
    member_scores: tuple[float, ...]
    votes: tuple[Vote, ...]

    def as_dict(self) -> dict[str, Any]:
        """The content of `aggregate.json`."""
        return {
            "sequence": str(self.sequence),
            "runs": [[run.symbol, run.length] for run in self.sequence.runs],
            "context": self.context,
            "clusters": self.clusters,
            "cluster_size": len(self.members),
            "members": [str(member) for member in self.members],
            "member_scores": list(self.member_scores),
            "votes": [vote.counts for vote in self.votes],
            "decisions": [vote.decision for vote in self.votes],
        }


def aggregate(
    sequences: Sequence[CompositeSequence],
    scores: Sequence[float],
    context: int = 0,
    clusters: int = 5,
    seed: int = 0,
) -> Aggregation:
    """Aggregate evaluated sequences of one length.

    Args:
        sequences: The completed trials' sequences.
        scores: Their scores; higher is better.
        context: c of N_c.
        clusters: Of K-means on the scores.
        seed: Of K-means.

    Raises:
        UsageError: If there are no sequences, they differ in length, their number is not that of the scores, a score is
            not finite, or `context` or `clusters` are out of range.
        ComposerError: If scikit-learn is not installed.
    """
    length = _check(sequences, scores, context, clusters)
    best = best_cluster(scores, clusters, seed)
    order = sorted(best, key=lambda index: (-scores[index], sequences[index].letters))
    members = tuple(sequences[index] for index in order)
    member_scores = tuple(float(scores[index]) for index in order)
    votes: list[Vote] = []
    for _ in range(length):
        chosen = "".join(vote.letter for vote in votes)
        votes.append(conditional_vote(members, member_scores, chosen, context))
    sequence = CompositeSequence("".join(vote.letter for vote in votes))
    return Aggregation(sequence, context, clusters, members, member_scores, tuple(votes))


def best_cluster(scores: Sequence[float], clusters: int, seed: int) -> list[int]:
    """Indices of the scores in the K-means cluster of the highest mean, ascending.

    There are no more clusters than different scores.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        message = 'aggregation needs scikit-learn: pip install "composer-megatron[search]"'
        raise ComposerError(message) from None
    values = np.asarray(scores, dtype=np.float64).reshape(-1, 1)
    number = min(clusters, len(np.unique(values)))
    fitted = KMeans(n_clusters=number, n_init=10, random_state=seed).fit(values)
    top = int(fitted.cluster_centers_.argmax())
    return [int(index) for index in np.flatnonzero(fitted.labels_ == top)]


def conditional_vote(members: Sequence[CompositeSequence], scores: Sequence[float], chosen: str, context: int) -> Vote:
    """Choose the block after the letters `chosen` by N_c.

    When `chosen` came out of such votes of the same members, some member always has the context: one that voted for
    its last letter. An unseen context takes a beginning from elsewhere.

    Args:
        members: The voters, longer than `chosen`.
        scores: Their scores, for ties.
        chosen: The letters before the block.
        context: How many of them, at most, a voter must share.
    """
    position = len(chosen)
    for length in range(min(context, position), -1, -1):
        start = position - length
        voters = [index for index, member in enumerate(members) if member.letters[start:position] == chosen[start:]]
        if voters:
            break
    ballots: dict[str, list[float]] = {
        letter: [] for letter in PRIMITIVES if any(letter in member.letters for member in members)
    }
    for index in voters:
        ballots[members[index][position]].append(scores[index])
    most = max(len(ballot) for ballot in ballots.values())
    leaders = [letter for letter, ballot in ballots.items() if len(ballot) == most]
    letter = max(leaders, key=lambda letter: statistics.fmean(ballots[letter]))  # max keeps the first of equals
    decision: Decision = "tie" if len(leaders) > 1 else "vote"
    if length < min(context, position):
        decision = "unseen context"
    return Vote(letter, {letter: len(ballot) for letter, ballot in ballots.items()}, decision)


def _check(sequences: Sequence[CompositeSequence], scores: Sequence[float], context: int, clusters: int) -> int:
    """Refuse what cannot be aggregated; the sequences' length."""
    if not sequences:
        raise UsageError("nothing to aggregate: the study has no completed trial; run the search first")
    if len(sequences) != len(scores):
        raise UsageError(f"{len(sequences)} sequences and {len(scores)} scores; expected one score a sequence")
    lengths = sorted({len(sequence) for sequence in sequences})
    if len(lengths) > 1:
        raise UsageError(f"sequences of {' and '.join(map(str, lengths))} blocks; only those of one length can vote")
    for sequence, score in zip(sequences, scores, strict=True):
        if not math.isfinite(score):
            raise UsageError(f"the score of {sequence} is {score}; expected a finite number")
    if not 0 <= context < lengths[0]:
        raise UsageError(f"context={context}; expected 0 to {lengths[0] - 1} for sequences of {lengths[0]} blocks")
    if clusters < 1:
        raise UsageError(f"clusters={clusters}; expected at least 1")
    return lengths[0]
