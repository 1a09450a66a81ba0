"""How firm a study's vote is: the same rule with other clusters, one seed, one task less, and resampled seeds.

The vote is a function of noisy scores through a clustering, whose cuts move with any of them. This says how far the
sequence that comes out depends on that; what a rule's choices are worth says `composer_search.evidence.ablation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.aggregate import aggregate
from composer_search.evidence.exhibit import Exhibit
from composer_search.evidence.oracle import resampled_means
from composer_search.evidence.ranks import Floats
from composer_search.evidence.scores import Scores

CLUSTERS = (2, 3, 4, 6, 8)
SHOWN = 5


@dataclass(frozen=True)
class Votes:
    """What the vote, with five clusters and without context, becomes.

    Attributes:
        chosen: By the mean scores.
        others: By other scores or numbers of clusters, in words.
        shares: Share of the resamples of each candidate's seeds that choose a sequence, the most frequent first.
        resamples: How many there were.
    """

    chosen: CompositeSequence
    others: Mapping[str, CompositeSequence]
    shares: Mapping[CompositeSequence, float]
    resamples: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "chosen": self.chosen.notation,
            "others": {words: found.notation for words, found in self.others.items()},
            "shares": {each.notation: share for each, share in self.shares.items()},
            "resamples": self.resamples,
        }

    def exhibit(self) -> Exhibit:
        """The votes as a table, and how often resampled seeds repeat them."""
        rows = (("as it is", self.chosen.notation), *((words, found.notation) for words, found in self.others.items()))
        often = ", ".join(f"{each.notation} {share:.0%}" for each, share in [*self.shares.items()][:SHOWN])
        findings = (
            f"{self.resamples} resamples of the seeds choose {len(self.shares)} sequences: {often}.",
            f"{self.chosen.notation} is chosen by {self.shares.get(self.chosen, 0.0):.0%} of them.",
        )
        return Exhibit("What the vote depends on", ("Vote", "Sequence"), rows, findings)


def votes(scores: Scores, *, resamples: int = 500, seed: int = 0) -> Votes:
    """Repeat the vote of a study of sequences of one length.

    Args:
        scores: Candidates with at least two seeds each.
        resamples: How many, drawn as `composer_search.evidence.oracle` does.
        seed: Of the resampling.

    Raises:
        UsageError: If there are fewer than two seeds, no resamples, or sequences of several lengths.
        ComposerError: If scikit-learn is not installed.
    """
    if resamples < 1:
        raise UsageError(f"resamples={resamples}; expected at least 1")

    def vote(values: Floats, clusters: int = 5) -> CompositeSequence:
        return aggregate(scores.sequences, values.tolist(), clusters=clusters).sequence

    by_seed = scores.require_seeds()
    others = {f"{number} clusters": vote(scores.values, number) for number in CLUSTERS}
    others |= {f"seed {number} alone": vote(values) for number, values in enumerate(by_seed.T, start=1)}
    if len(scores.tasks) > 1:
        total = sum(scores.tasks.values())
        others |= {f"without {task}": vote(total - values) for task, values in scores.tasks.items()}
    drawn = Counter(vote(means) for means in resampled_means(by_seed, seed, resamples))
    shares = {sequence: count / resamples for sequence, count in drawn.most_common()}
    return Votes(vote(scores.values), others, shares, resamples)
