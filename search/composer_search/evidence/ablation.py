"""Ablation of the aggregator: how good is the sequence that each rule makes out of a study, by the oracle's scores?

Studies of fewer trials are drawn from the exhaustive one. Each rule sees a drawn study and hands over one sequence,
whose score and rank the oracle knows whether it was among the drawn or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.aggregate import aggregate
from composer_search.evidence.exhibit import Exhibit
from composer_search.evidence.posterior import LEAST, available, fit_posterior
from composer_search.evidence.ranks import Floats, generator
from composer_search.evidence.scores import Scores

Rule = Callable[[Sequence[CompositeSequence], Floats], CompositeSequence]
"""Makes one sequence out of tried ones and their scores."""

CLUSTERS = (2, 3, 5, 8)
PAPER = "5 clusters, N_0"


@dataclass(frozen=True)
class RuleResult:
    """What one rule chose in each drawn study.

    Attributes:
        rule: Its name.
        scores: The oracle's scores of the choices, [draws]; NaN for a choice that the oracle has no score for.
        ranks: Their ranks, 1 the best; NaN alike.
        most_frequent: The sequence chosen most often.
    """

    rule: str
    scores: Floats
    ranks: Floats
    most_frequent: CompositeSequence

    @property
    def known(self) -> Floats:
        """The scores that are numbers."""
        return self.scores[np.isfinite(self.scores)]

    def quantiles(self) -> tuple[float, float, float] | None:
        """10 %, median and 90 % of the known scores; None where there are none."""
        if not len(self.known):
            return None
        low, middle, high = np.quantile(self.known, [0.1, 0.5, 0.9])
        return float(low), float(middle), float(high)


@dataclass(frozen=True)
class Ablation:
    """Every rule's result, the best mean score first.

    Attributes:
        size: Trials of a drawn study.
        table: Sequences that the oracle has scored.
        best: The oracle's best score.
        noisy: Whether rules saw one seed and were judged by the mean of the others.
        rules: A result for each rule.
        missing: Why a rule was left out.
    """

    size: int
    table: int
    best: float
    noisy: bool
    rules: tuple[RuleResult, ...]
    missing: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rules = {
            each.rule: {
                "mean_score": float(each.known.mean()) if len(each.known) else None,
                "median_rank": float(np.nanmedian(each.ranks)) if len(each.known) else None,
                "draws": len(each.scores),
                "unknown": len(each.scores) - len(each.known),
                "most_frequent": str(each.most_frequent),
            }
            for each in self.rules
        }
        head = {"trials": self.size, "candidates": self.table, "best_score": self.best, "noisy": self.noisy}
        return {**head, "rules": rules, "left_out": list(self.missing)}

    def exhibit(self) -> Exhibit:
        """The rules as a table."""
        columns = ("Rule", "Mean score", "Mean regret", "Median rank", "Finds the best", "Most frequent choice")
        rows = tuple(
            (
                each.rule,
                float(each.known.mean()) if len(each.known) else None,
                float(self.best - each.known.mean()) if len(each.known) else None,
                f"{np.nanmedian(each.ranks):.0f} of {self.table}" if len(each.known) else None,
                f"{np.mean(each.ranks == 1):.0%}",
                each.most_frequent.notation,
            )
            for each in self.rules
        )
        return Exhibit(f"Aggregators on studies of {self.size} trials", columns, rows, self._findings())

    def _findings(self) -> tuple[str, ...]:
        draws = len(self.rules[0].scores)
        words = [f"{draws} studies of {self.size} trials, drawn from {self.table}. First by mean score: "]
        words[0] += f"{self.rules[0].rule}."
        words += self._against_paper()
        if self.noisy:
            words.append("Rules saw one seed's scores; choices are judged by the mean of the other seeds.")
        else:
            words.append("Rules saw the scores that they are judged by: 'best trial' has no bad luck to suffer here.")
        unknown = sum(len(each.scores) - len(each.known) for each in self.rules)
        if unknown:
            words.append(f"{unknown} choices have no score in the oracle and are not counted.")
        return (*words, *self.missing)

    def _against_paper(self) -> list[str]:
        """How far the first rule is ahead of the paper's, over the same draws."""
        paper = next((each for each in self.rules if each.rule == PAPER), None)
        if paper is None or paper is self.rules[0]:
            return []
        gaps = self.rules[0].scores - paper.scores
        gaps = gaps[np.isfinite(gaps)]
        if len(gaps) < 2:
            return []
        error = float(gaps.std(ddof=1) / np.sqrt(len(gaps)))
        sure = "" if gaps.mean() > 2 * error else ", which these draws cannot tell from nothing"
        return [f"It is ahead of the paper's rule, {PAPER}, by {gaps.mean():.4f} ± {error:.4f} (standard error){sure}."]


def ablate(
    scores: Scores,
    *,
    size: int | None = None,
    draws: int = 50,
    clusters: Sequence[int] = CLUSTERS,
    noisy: bool = False,
    gaussian_process: bool = True,
    seed: int = 0,
) -> Ablation:
    """Judge every rule on drawn studies.

    Args:
        scores: The oracle: scores of sequences of one length.
        size: Trials of a drawn study; None for a quarter of the oracle, at least 8.
        draws: How many studies are drawn.
        clusters: Numbers of K-means clusters to compare.
        noisy: Show one seed's scores, seed d mod S in draw d, and judge by the mean of the others.
        gaussian_process: Whether to fit a Gaussian process for each draw, too, the slowest rule.
        seed: Of the draws.

    Raises:
        UsageError: If the oracle is too small, or a number is out of range.
        ComposerError: If scikit-learn is not installed.
    """
    size = min(len(scores), max(8, len(scores) // 4)) if size is None else size
    if not 2 <= size <= len(scores) or draws < 1:
        expected = f"expected 2 to {len(scores)} trials, all that {scores.name} has, and at least 1 draw"
        raise UsageError(f"trials={size}, draws={draws}; {expected}")
    if len({len(sequence) for sequence in scores.sequences}) > 1:
        raise UsageError(f"{scores.name} has sequences of several lengths; only those of one length can be aggregated")
    rules, missing = _rules(scores, clusters), []
    if gaussian_process and size >= LEAST and available():
        rules["GP posterior mode"] = partial(_posterior_mode, scores.sequences)
    elif gaussian_process:
        missing.append(f"The Gaussian process is left out: it needs BoTorch and at least {LEAST} trials.")
    views = [scores.view(number if noisy else None) for number in range(draws)]
    rng = generator(seed)
    drawn = [rng.choice(len(scores), size=size, replace=False) for _ in range(draws)]
    found = []
    for name, rule in rules.items():
        try:
            found.append(_judge(name, rule, scores, drawn, views))
        except UsageError as error:
            missing.append(f"{name} is left out: {error}.")
    if not found:
        raise ComposerError(f"no rule could be applied: {' '.join(missing)}")
    found.sort(key=lambda each: -each.known.mean() if len(each.known) else np.inf)
    best = float(np.mean([truth.max() for _, truth in views]))
    return Ablation(size, len(scores), best, noisy, tuple(found), tuple(missing))


def _rules(scores: Scores, clusters: Sequence[int]) -> dict[str, Rule]:
    """Rules by name: the vote with every number of clusters and context, and the best trial."""
    whole = len(scores.sequences[0]) - 1
    contexts = {"N_0": 0, "N_1": 1, "N_all": whole}
    rules: dict[str, Rule] = {"best trial": _best_trial, "all trials vote, N_0": partial(_vote, clusters=1, context=0)}
    for number in clusters:
        for name, context in contexts.items():
            if context <= whole:
                rules[f"{number} clusters, {name}"] = partial(_vote, clusters=number, context=context)
    return rules


def _judge(
    name: str,
    rule: Rule,
    scores: Scores,
    drawn: Sequence[np.ndarray],
    views: Sequence[tuple[Floats, Floats]],
) -> RuleResult:
    place = {sequence: index for index, sequence in enumerate(scores.sequences)}
    chosen: list[CompositeSequence] = []
    values, ranks = [], []
    for rows, (observed, truth) in zip(drawn, views, strict=True):
        chosen.append(rule([scores.sequences[row] for row in rows], observed[rows]))
        index = place.get(chosen[-1])
        values.append(np.nan if index is None else truth[index])
        ranks.append(np.nan if index is None else 1.0 + (truth > truth[index]).sum())
    counts: Mapping[CompositeSequence, int] = {each: chosen.count(each) for each in dict.fromkeys(chosen)}
    return RuleResult(name, np.array(values), np.array(ranks), max(counts, key=lambda each: counts[each]))


def _best_trial(sequences: Sequence[CompositeSequence], scores: Floats) -> CompositeSequence:
    return sequences[int(np.argmax(scores))]


def _vote(sequences: Sequence[CompositeSequence], scores: Floats, *, clusters: int, context: int) -> CompositeSequence:
    return aggregate(sequences, scores.tolist(), context=context, clusters=clusters).sequence


def _posterior_mode(
    space: Sequence[CompositeSequence], sequences: Sequence[CompositeSequence], scores: Floats
) -> CompositeSequence:
    """The sequence of the highest posterior mean among all that the oracle knows."""
    if np.ptp(scores) == 0:
        return sequences[0]
    return space[int(fit_posterior(sequences, scores, space).mean.argmax())]
