"""The oracle: a space searched exhaustively with several seeds, and how far its ranking can be believed.

With S seeds a candidate, r_1 is the mean Spearman correlation between the rankings of two single seeds. By the
Spearman-Brown formula the mean of S seeds then agrees with that of S other seeds to

    r_S = S · r_1 / (1 + (S - 1) · r_1),

and with a ranking free of noise to sqrt(r_S), which is the most that any proxy can be expected to reach: the ceiling.
The formula is exact for variances (Pearson) and an approximation for ranks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer_megatron.errors import UsageError
from composer_search.evidence.exhibit import Exhibit
from composer_search.evidence.ranks import LEAST, Floats, Interval, bootstrap_weights, generator, interval, spearman
from composer_search.evidence.scores import Scores

RESAMPLES = 2000
_MOST_SPLITS = 200


@dataclass(frozen=True)
class Ceiling:
    """How well rankings by seeds agree.

    Attributes:
        seeds: S, seeds a candidate.
        single: r_1, with its interval over candidates.
        halves: Mean correlation between halves of the seeds, brought to S seeds by Spearman-Brown; None below 4 seeds.
        repeat: r_S, the expected agreement with a repetition of the study.
        ceiling: sqrt(r_S), the most that a proxy free of noise can reach.
    """

    seeds: int
    single: Interval
    halves: float | None
    repeat: float
    ceiling: float


@dataclass(frozen=True)
class Oracle:
    """The ranking, best first.

    Attributes:
        scores: The candidates in the order of their mean scores.
        errors: Standard error of each mean, from the candidate's own seeds.
        rank_low: 5 % quantile of each candidate's rank over resampled seeds.
        rank_high: 95 % quantile.
        wins: Share of the resamples in which each candidate has the highest mean.
        within: Standard deviation between seeds of a candidate, pooled.
        between: Standard deviation between candidates, free of the seeds' part.
        ceiling: None where rankings cannot be compared: too few candidates, or no difference between them.
    """

    scores: Scores
    errors: Floats
    rank_low: Floats
    rank_high: Floats
    wins: Floats
    within: float
    between: float
    ceiling: Ceiling | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        ranking = [
            {
                "sequence": str(sequence),
                "score": float(self.scores.values[index]),
                "standard_error": float(self.errors[index]),
                "rank_low": float(self.rank_low[index]),
                "rank_high": float(self.rank_high[index]),
                "wins": float(self.wins[index]),
            }
            for index, sequence in enumerate(self.scores.sequences)
        ]
        found = self.ceiling
        ceiling = found and {**vars(found), "single": found.single.as_dict()}
        return {"ranking": ranking, "within_std": self.within, "between_std": self.between, "noise_ceiling": ceiling}

    def exhibit(self) -> Exhibit:
        """The ranking as a table, with what can be said about it."""
        columns = ("Rank", "Sequence", "Score", "Standard error", "Rank, 5 % to 95 %", "Wins, share of resamples")
        rows = tuple(
            (
                index + 1,
                sequence.notation,
                float(self.scores.values[index]),
                float(self.errors[index]),
                f"{self.rank_low[index]:.0f} to {self.rank_high[index]:.0f}",
                float(self.wins[index]),
            )
            for index, sequence in enumerate(self.scores.sequences)
        )
        return Exhibit(f"Ranking of {len(rows)} sequences", columns, rows, (*self._winner(), *self._noise()))

    def _winner(self) -> tuple[str, ...]:
        first = self.scores.sequences[0].notation
        contenders = int((self.wins >= 0.05).sum())
        most = self.scores.sequences[int(self.wins.argmax())].notation
        words = f"{first} has the highest mean and wins {self.wins[0]:.0%} of the resamples"
        if most != first:
            words += f"; {most} wins most often, {self.wins.max():.0%}"
        others = "1 sequence wins" if contenders == 1 else f"{contenders} sequences win"
        return (f"{words}. {others} at least one resample in twenty.",)

    def _noise(self) -> tuple[str, ...]:
        spread = (
            f"Standard deviation between seeds of a candidate {self.within:.4f}, between candidates {self.between:.4f}."
        )
        if self.ceiling is None:
            return spread, "Not enough to compare rankings: too few candidates, or their scores do not differ."
        found = self.ceiling
        words = [spread, f"Rankings of two single seeds agree with Spearman {found.single} (95 %, over candidates)."]
        if found.halves is not None:
            words.append(f"From halves of the seeds, by Spearman-Brown: {found.halves:.2f} for all {found.seeds}.")
        if found.repeat <= 0:
            return *words, "The seeds' rankings do not agree: no proxy can be judged against this study."
        words.append(
            f"By Spearman-Brown a repetition with {found.seeds} other seeds would agree with {found.repeat:.2f}, and a "
            f"ranking free of noise with {found.ceiling:.2f}: the ceiling for any proxy."
        )
        return tuple(words)


def oracle(scores: Scores, *, seed: int = 0, resamples: int = RESAMPLES) -> Oracle:
    """Rank the candidates and say how far the ranking can be believed.

    Seeds are drawn with replacement for each candidate by itself. With S seeds such a mean varies too little by
    sqrt((S - 1)/S), so deviations from the mean are widened by the inverse.

    Args:
        scores: Candidates with at least two seeds each.
        seed: Of the resampling.
        resamples: How many.

    Raises:
        UsageError: If there are fewer than two seeds, or fewer than two candidates.
    """
    scores.require_seeds()
    if len(scores) < 2:
        raise UsageError(f"{scores.name}: one candidate alone has no rank; search more")
    scores = scores.at([int(index) for index in np.argsort(-scores.values, kind="stable")])
    by_seed = scores.require_seeds()
    count = by_seed.shape[1]
    draws = resampled_means(by_seed, seed, resamples)
    ranks = 1 + np.argsort(np.argsort(-draws, axis=1, kind="stable"), axis=1)
    low, high = np.quantile(ranks, [0.05, 0.95], axis=0, method="nearest")
    variance = by_seed.var(axis=1, ddof=1)
    within = float(variance.mean())
    between = float(by_seed.mean(axis=1).var(ddof=1)) - within / count
    return Oracle(
        scores=scores,
        errors=np.sqrt(variance / count),
        rank_low=low,
        rank_high=high,
        wins=_winners(draws),
        within=math.sqrt(within),
        between=math.sqrt(max(0.0, between)),
        ceiling=noise_ceiling(by_seed, seed),
    )


def resampled_means(by_seed: Floats, seed: int, resamples: int) -> Floats:
    """Means of seeds [n, S] drawn with replacement, widened as `oracle` says: [resamples, n]."""
    rng = generator(seed)
    candidates, count = by_seed.shape
    mean = by_seed.mean(axis=1)
    drawn = rng.integers(count, size=(resamples, candidates, count))
    means = np.take_along_axis(by_seed[None], drawn, axis=2).mean(axis=2)
    widened: Floats = mean + (means - mean) * math.sqrt(count / (count - 1))
    return widened


def _winners(draws: Floats) -> Floats:
    """Share of the resamples that each candidate wins; those who share a victory share its point."""
    best = draws == draws.max(axis=1, keepdims=True)
    shares: Floats = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    return shares


def noise_ceiling(by_seed: Floats, seed: int = 0) -> Ceiling | None:
    """How well rankings by seeds [n, S] agree; None if there are too few candidates or a seed does not tell them apart.

    Args:
        by_seed: Scores of every candidate and seed.
        seed: Of the bootstrap over candidates.
    """
    candidates, count = by_seed.shape
    if candidates < LEAST:
        return None
    pairs = list(itertools.combinations(range(count), 2))
    single = float(np.mean([spearman(by_seed[:, a], by_seed[:, b])[0] for a, b in pairs]))
    if math.isnan(single):
        return None
    weights = bootstrap_weights(candidates, seed)
    draws = np.mean([spearman(by_seed[:, a], by_seed[:, b], weights) for a, b in pairs], axis=0)
    repeat = spearman_brown(single, count)
    return Ceiling(count, interval(single, draws), _halves(by_seed, seed), repeat, math.sqrt(max(0.0, repeat)))


def spearman_brown(single: float, times: float) -> float:
    """The reliability of a mean of `times` as many measurements; a negative one stays as it is."""
    return single if single <= 0 else times * single / (1 + (times - 1) * single)


def _halves(by_seed: Floats, seed: int) -> float | None:
    """Mean correlation between the means of two halves of the seeds, brought to all seeds."""
    count = by_seed.shape[1]
    half = count // 2
    if half < 2:
        return None
    rng = generator(seed)
    found = []
    for _ in range(_MOST_SPLITS):
        order = rng.permutation(count)
        parts = by_seed[:, order[:half]].mean(axis=1), by_seed[:, order[half : 2 * half]].mean(axis=1)
        found.append(float(spearman(*parts)[0]))
    known = [value for value in found if not math.isnan(value)]
    return spearman_brown(float(np.mean(known)), count / half) if known else None
