"""Regret: how soon each proposer finds the best of a space whose scores are all known.

A proposer is run against the table of an exhaustive study instead of against trainings. Its simple regret after t
trials is the best score of the table less the score of the sequence that it would hand over then, the best it has seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.constraints import Criteria
from composer_search.evidence.exhibit import Exhibit
from composer_search.evidence.ranks import Floats
from composer_search.evidence.scores import Scores, scores_of
from composer_search.proposers import Proposer, make_proposer
from composer_search.study import Study, StudySettings, Trial

PROPOSERS = ("random", "evolution", "bayesian")
_MARKS = (0.1, 0.25, 0.5)


@dataclass(frozen=True)
class Replay:
    """One proposer's replays: simple regret after each trial, [replays, trials]."""

    proposer: str
    regret: Floats

    def quantiles(self) -> tuple[Floats, Floats, Floats]:
        """10 %, median and 90 % over replays, [trials] each."""
        low, middle, high = np.quantile(self.regret, [0.1, 0.5, 0.9], axis=0)
        return low, middle, high

    @property
    def until_found(self) -> float | None:
        """Median number of trials until the regret is zero; None where more than half never get there."""
        found = self.regret <= 1e-12
        first = np.where(found.any(axis=1), found.argmax(axis=1) + 1.0, math.inf)
        median = float(np.median(first))
        return median if math.isfinite(median) else None


@dataclass(frozen=True)
class RegretResult:
    """The regret of several proposers on one table.

    Attributes:
        table: Sequences whose scores are known.
        noisy: Whether proposers saw one seed's scores and were judged by the mean of the others.
        replays: One for each proposer.
        expected_random: Exact mean regret of draws without replacement, [trials]; None where proposers saw noise.
        missing: Why a proposer was left out.
    """

    table: int
    noisy: bool
    replays: tuple[Replay, ...]
    expected_random: Floats | None
    missing: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        curves = {}
        for replay in self.replays:
            names = ("p10", "median", "p90")
            quantiles = {name: each.tolist() for name, each in zip(names, replay.quantiles(), strict=True)}
            curves[replay.proposer] = {
                "replays": len(replay.regret),
                **quantiles,
                "mean": replay.regret.mean(axis=0).tolist(),
                "median_trials_until_best": replay.until_found,
            }
        exact = None if self.expected_random is None else self.expected_random.tolist()
        return {
            "candidates": self.table,
            "noisy": self.noisy,
            "proposers": curves,
            "expected_random": exact,
            "left_out": list(self.missing),
        }

    def exhibit(self) -> Exhibit:
        """Regret at some numbers of trials."""
        trials = self.replays[0].regret.shape[1]
        marks = sorted({min(trials, max(1, round(share * self.table))) for share in _MARKS} | {trials})
        headings = tuple(f"Regret after {mark}: median [10 %, 90 %]" for mark in marks)
        rows = []
        for replay in self.replays:
            low, middle, high = replay.quantiles()
            cells = (f"{middle[mark - 1]:.4f} [{low[mark - 1]:.4f}, {high[mark - 1]:.4f}]" for mark in marks)
            rows.append((replay.proposer, len(replay.regret), replay.until_found, *cells))
        columns = ("Proposer", "Replays", "Trials to the best, median", *headings)
        return Exhibit(f"Simple regret on {self.table} sequences", columns, tuple(rows), self._findings())

    def _findings(self) -> tuple[str, ...]:
        how = (
            "Proposers saw one seed's scores; their choice is judged by the mean of the other seeds, so that regret "
            "need not reach zero."
            if self.noisy
            else "Proposers saw the mean scores of the table, without further noise."
        )
        finals = sorted((float(replay.regret.mean()), replay.proposer) for replay in self.replays)
        order = " < ".join(f"{name} {value:.4f}" for value, name in finals)
        return f"Mean regret over all trials: {order}.", how, *self.missing


def regret(
    study: Study,
    *,
    proposers: Sequence[str] = PROPOSERS,
    replays: int = 10,
    budget: int | None = None,
    noisy: bool = False,
    seed: int = 0,
) -> RegretResult:
    """Replay proposers against a study that has tried every sequence of its space.

    Args:
        study: The exhaustive study; sequences whose trials failed fail again.
        proposers: Their names; one that this installation lacks is left out, and the result says so.
        replays: Seeds of each proposer.
        budget: Trials of a replay; None for half the space.
        noisy: Show one seed's scores, seed r mod S in replay r, and judge by the mean of the others.
        seed: Of the first replay.

    Raises:
        UsageError: If the study is not exhaustive, has too few seeds for `noisy`, a number is out of range, or no
            proposer can be run.
    """
    scores = _require_oracle(study)
    budget = max(1, len(scores) // 2) if budget is None else budget
    if replays < 1 or not 1 <= budget <= study.settings.space.size:
        expected = f"expected at least 1 replay and a budget of 1 to {study.settings.space.size}"
        raise UsageError(f"replays={replays}, budget={budget}; {expected}")
    if noisy:
        scores.require_seeds()
    found, missing = [], []
    for name in dict.fromkeys(proposers):
        runs = []
        try:
            for number in range(replays):
                observed, truth = scores.view(number if noisy else None)
                settings = _settings(study.settings, name, seed + number, budget)
                runs.append(_replay(make_proposer(settings), scores, observed, truth, budget))
        except ComposerError as error:
            missing.append(f"{name} is left out: {error}.")
            continue
        found.append(Replay(name, np.array(runs)))
    if not found:
        raise UsageError(f"no proposer could be replayed: {' '.join(missing)}")
    exact = None if noisy else expected_random_regret(scores.values, budget)
    return RegretResult(len(scores), noisy, tuple(found), exact, tuple(missing))


def expected_random_regret(values: Floats, budget: int) -> Floats:
    """Exact mean simple regret of draws without replacement from values [n]: [budget].

    The best of t draws is the k-th best of all with probability C(n - k, t - 1) / C(n, t).
    """
    ordered = np.sort(values)[::-1]
    count = len(ordered)
    means = []
    for drawn in range(1, budget + 1):
        taken = min(drawn, count)
        whole = math.comb(count, taken)
        chances = [math.comb(count - rank, taken - 1) / whole for rank in range(1, count + 1)]
        means.append(float(ordered[0] - np.dot(chances, ordered)))
    return np.array(means)


def _require_oracle(study: Study) -> Scores:
    space = study.settings.space
    tried = len({trial.sequence for trial in study.trials})
    if tried < space.size:
        advice = f"search with --budget {space.size} first, or take a smaller space"
        raise UsageError(f"{study.path} has tried {tried:,} of its {space.size:,} sequences; {advice}")
    scores = scores_of(str(study.path), study.trials)
    if len(scores) < 2:
        raise UsageError(f"{study.path} has {len(scores)} scored sequences; regret needs at least two")
    return scores


def _settings(settings: StudySettings, proposer: str, seed: int, budget: int) -> StudySettings:
    """The study's settings for a search of the whole space for accuracy alone, one trial after another."""
    initial = min(settings.initial, max(1, budget // 2))
    plain = dataclasses.replace(settings, criteria=Criteria(), strategy="one-shot", step=0, batch=1)
    return dataclasses.replace(plain, proposer=proposer, seed=seed, budget=budget, initial=initial)


def _replay(proposer: Proposer, scores: Scores, observed: Floats, truth: Floats, budget: int) -> list[float]:
    """Simple regret after each trial; where no sequence is left, the last one stays."""
    place = {sequence: index for index, sequence in enumerate(scores.sequences)}
    best, most = None, float(truth.max())
    trials: list[Trial] = []
    course: list[float] = []
    for number in range(budget):
        proposal = proposer.propose(trials, (), number)
        if proposal is not None:
            index = place.get(proposal.sequence)
            trials.append(_trial(number, proposal.sequence, None if index is None else float(observed[index])))
            if index is not None and (best is None or observed[index] > observed[best]):
                best = index
        course.append(most - float(truth.min() if best is None else truth[best]))
    return course


def _trial(number: int, sequence: CompositeSequence, score: float | None) -> Trial:
    error = "failed in the study" if score is None else None
    return Trial(trial=number, sequence=sequence, proposer="replay", seconds=0.0, finished="", score=score, error=error)
