"""Agreement: do two sets of scores rank the same candidates alike, and better than the parameter count alone does?

A bigger model is often the better one, so that a proxy which only counts parameters already correlates with most
targets. A proxy is worth something if it ranks better than that count; the difference has its own interval here, from
resamples that both correlations share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer_megatron.errors import UsageError
from composer_search.evidence.exhibit import Cell, Exhibit
from composer_search.evidence.oracle import resampled_means
from composer_search.evidence.ranks import (
    LEAST,
    Coefficient,
    Floats,
    Interval,
    bootstrap_weights,
    correlation,
    interval,
    resampled,
    spearman,
)
from composer_search.evidence.scores import Scores, parameters

SIZE = "parameter count"
SEED_RESAMPLES = 300
_COLUMNS = (
    "Proxy",
    "Target",
    "Candidates",
    "Spearman [95 %]",
    "Kendall [95 %]",
    "Spearman over seeds",
    "Parameter count alone",
    "Difference",
)


@dataclass(frozen=True)
class Agreement:
    """How one set of scores, the proxy, ranks the candidates of another, the target.

    Attributes:
        proxy: Its name.
        target: The name of the target.
        candidates: How many both have scored.
        spearman: Over candidates; None where there is not enough to compare.
        kendall: Tau-b, alike.
        over_seeds: Interval of Spearman's rho over resampled seeds of the same candidates; None without seeds.
        by_parameters: Spearman's rho of the parameter count with the target; None where all have as many.
        gain: `spearman` less `by_parameters`.
        points: The scores that were compared, proxy and target, [candidates] each.
        names: The candidates.
    """

    proxy: str
    target: str
    candidates: int
    spearman: Interval | None
    kendall: Interval | None
    over_seeds: Interval | None
    by_parameters: Interval | None
    gain: Interval | None
    points: tuple[Floats, Floats]
    names: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One sentence: is the proxy worth more than the parameter count?"""
        pair = f"{self.proxy} against {self.target}"
        if self.spearman is None:
            few = f"{self.candidates} candidates" if self.candidates < LEAST else "scores that are all equal"
            return f"{pair}: not enough to compare rankings ({few})."
        return f"{pair}: Spearman {self.spearman}{self._judgement()}."

    def _judgement(self) -> str:
        """What follows from the correlation."""
        if np.array_equal(*self.points):
            return "; but the scores are the same numbers, so this is no comparison of two measurements"
        if self.proxy == SIZE:
            return ": what any proxy has to beat"
        if self.gain is None or self.by_parameters is None:
            return "; all candidates have as many parameters, so size ranks nothing"
        return f"; the parameter count alone reaches {self.by_parameters}: {self._against_size(self.gain)}"

    def _against_size(self, gain: Interval) -> str:
        """What the difference to the parameter count says; its interval decides, not its value."""
        chance = self.spearman is None or self.spearman.low is None or self.spearman.low <= 0
        if gain.low is not None and gain.low > 0:
            return "the proxy ranks better" + (" than that, yet no better than chance" if chance else self._turned())
        if gain.high is not None and gain.high < 0:
            return "the proxy ranks worse, and is worth nothing here"
        return "no evidence that the proxy ranks better"

    def _turned(self) -> str:
        """What there is to add where the count ranks as well as the proxy once the smallest comes first."""
        if self.spearman is None or self.by_parameters is None or -self.by_parameters.value < self.spearman.value:
            return ""
        return " than that, yet not than the parameter count turned round, fewest first"

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        names = ("spearman", "kendall", "over_seeds", "by_parameters", "gain")
        found: dict[str, Interval | None] = {name: getattr(self, name) for name in names}
        values = {name: each and each.as_dict() for name, each in found.items()}
        head = {"proxy": self.proxy, "target": self.target, "candidates": self.candidates}
        return {**head, **values, "verdict": self.verdict}

    def row(self) -> tuple[Cell, ...]:
        """As a row of a table."""
        found = (self.spearman, self.kendall, self.over_seeds, self.by_parameters, self.gain)
        return self.proxy, self.target, self.candidates, *(None if each is None else str(each) for each in found)


def exhibit(agreements: list[Agreement]) -> Exhibit:
    """Comparisons as a table, with a verdict for each."""
    rows = tuple(each.row() for each in agreements)
    return Exhibit("Agreement of rankings", _COLUMNS, rows, tuple(each.verdict for each in agreements))


def agreement(proxy: Scores, target: Scores, *, seed: int = 0) -> Agreement:
    """Compare two sets of scores on the candidates that both have.

    Args:
        proxy: The scores to be judged.
        target: What they should predict.
        seed: Of the resampling.

    Raises:
        UsageError: If they have no candidate in common.
    """
    place = {sequence: index for index, sequence in enumerate(target.sequences)}
    common = [(index, place[each]) for index, each in enumerate(proxy.sequences) if each in place]
    if not common:
        lengths = [f"{each.name} holds {len(each)} of {_lengths(each)} blocks" for each in (proxy, target)]
        raise UsageError(f"no sequence is in both: {'; '.join(lengths)}; compare scores of the same sequences")
    x, y = proxy.at([here for here, _ in common]), target.at([there for _, there in common])
    sizes = parameters(x.sequences)
    return Agreement(
        proxy=proxy.name,
        target=target.name,
        candidates=len(common),
        spearman=correlation("spearman", x.values, y.values, seed=seed),
        kendall=correlation("kendall", x.values, y.values, seed=seed),
        over_seeds=_over_seeds(x, y, seed),
        by_parameters=None if proxy.name == SIZE else correlation("spearman", sizes, y.values, seed=seed),
        gain=None if proxy.name == SIZE else _gain("spearman", x.values, sizes, y.values, seed),
        points=(x.values, y.values),
        names=tuple(sequence.notation for sequence in x.sequences),
    )


def task_agreements(scores: Scores, *, seed: int = 0) -> list[Agreement]:
    """Each task against the mean of the others, so that none is compared with itself; empty with one task."""
    found = []
    for task, values in scores.tasks.items() if len(scores.tasks) > 1 else ():
        rest = np.mean([other for name, other in scores.tasks.items() if name != task], axis=0)
        proxy = Scores(task, scores.sequences, values)
        found.append(agreement(proxy, Scores("mean of the other tasks", scores.sequences, rest), seed=seed))
    return found


def compare(proxy: Scores, target: Scores, *, seed: int = 0) -> list[Agreement]:
    """A proxy against a target, and each of the proxy's tasks alone against it; raises as `agreement`."""
    tasks = [Scores(name, proxy.sequences, values) for name, values in proxy.tasks.items()]
    return [agreement(each, target, seed=seed) for each in (proxy, *(tasks if len(tasks) > 1 else ()))]


def size_agreement(scores: Scores, *, seed: int = 0) -> Agreement:
    """The parameter count as a proxy for the score."""
    sizes = Scores(SIZE, scores.sequences, parameters(scores.sequences))
    return agreement(sizes, Scores(scores.name, scores.sequences, scores.values, scores.seeds), seed=seed)


def at_equal_counts(scores: Scores) -> Scores:
    """The scores less the mean of the sequences that have as many parameters: what the order of their blocks is worth.

    Sequences that are alone with their number are left out.
    """
    sizes = parameters(scores.sequences)
    kept = scores.at(np.flatnonzero((sizes[:, None] == sizes).sum(1) > 1).tolist())
    sizes = parameters(kept.sequences)
    alike = sizes[:, None] == sizes
    centre = np.eye(len(sizes)) - alike / alike.sum(1, keepdims=True)

    def centred(values: Floats) -> Floats:
        return (centre @ values).round(12)  # else equal scores would be ranked by their rounding

    return Scores(
        name=f"{scores.name}, equal sizes",
        sequences=kept.sequences,
        values=centred(kept.values),
        seeds=None if kept.seeds is None else centred(kept.seeds),
        tasks={f"{task}, equal sizes": centred(values) for task, values in kept.tasks.items()},
    )


def _gain(coefficient: Coefficient, x: Floats, sizes: Floats, y: Floats, seed: int) -> Interval | None:
    """How much better x ranks y than sizes do, over the same resampled candidates."""
    if len(y) < LEAST:
        return None
    weights = bootstrap_weights(len(y), seed)
    whole = np.ones((1, len(y)))
    value = float((resampled(coefficient, x, y, whole) - resampled(coefficient, sizes, y, whole))[0])
    if math.isnan(value):
        return None
    return interval(value, resampled(coefficient, x, y, weights) - resampled(coefficient, sizes, y, weights))


def _over_seeds(x: Scores, y: Scores, seed: int) -> Interval | None:
    """Spearman's rho when the seeds of the scores are drawn anew; scores without seeds stay as they are."""
    if x.seeds is None and y.seeds is None:
        return None
    value = correlation("spearman", x.values, y.values, seed=seed)
    if value is None:
        return None
    draws_x, draws_y = (
        np.broadcast_to(each.values, (SEED_RESAMPLES, len(each)))
        if each.seeds is None
        else resampled_means(each.seeds, seed + number, SEED_RESAMPLES)
        for number, each in enumerate((x, y))
    )
    draws = np.array([spearman(a, b)[0] for a, b in zip(draws_x, draws_y, strict=True)])
    return interval(value.value, draws)


def _lengths(scores: Scores) -> str:
    lengths = sorted({len(sequence) for sequence in scores.sequences})
    return str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
