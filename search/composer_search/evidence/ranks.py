"""Rank correlations, and how far they would differ with other candidates: Spearman's rho and Kendall's tau-b.

Both are computed for many weightings of the candidates at once. A bootstrap resample is a weighting by whole numbers
(how often each candidate was drawn), so that a bootstrap is a few matrix products instead of a loop of sortings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from composer_megatron.errors import UsageError

Floats = NDArray[np.float64]
Coefficient = Literal["spearman", "kendall"]

LEAST = 5
"""Fewer candidates than these are not enough to speak of an agreement of rankings."""
RESAMPLES = 1000
_FEWEST_RESAMPLES = 200
LEVEL = 0.95

_CHUNK = 1 << 24
"""Elements of the largest intermediate matrix of a bootstrap."""


def generator(seed: int) -> np.random.Generator:
    """NumPy's, of a seed that a person chose.

    Raises:
        UsageError: If it is negative.
    """
    if seed < 0:
        raise UsageError(f"seed={seed}; expected 0 or more")
    return np.random.default_rng(seed)


@dataclass(frozen=True)
class Interval:
    """An estimate with a percentile interval of `LEVEL`; the bounds are None where no resample gave a value."""

    value: float
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """As JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{_two(self.value)} (no interval)"
        return f"{_two(self.value)} [{_two(self.low)}, {_two(self.high)}]"


def _two(value: float) -> str:
    """Two decimals; what rounds to zero has no sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def average_ranks(values: Floats) -> Floats:
    """Ranks from 1 of values [n], equal ones sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def spearman(x: Floats, y: Floats, weights: Floats | None = None) -> Floats:
    """Spearman's rho of x [n] and y [n] for each row of weights [resamples, n], by default one row of ones.

    Returns:
        [resamples]; NaN where x or y is the same throughout a resample.
    """
    rows = np.ones((1, len(x))) if weights is None else weights
    if weights is None:
        ranks_x, ranks_y = (average_ranks(values)[None] for values in (x, y))
    else:
        ranks_x, ranks_y = (rows @ _below(values).T for values in (x, y))
    total = rows.sum(axis=1, keepdims=True)
    off_x, off_y = (ranks - (rows * ranks).sum(axis=1, keepdims=True) / total for ranks in (ranks_x, ranks_y))
    shared, own_x, own_y = ((rows * product).sum(axis=1) for product in (off_x * off_y, off_x**2, off_y**2))
    return _quotient(shared, own_x, own_y)


def kendall(x: Floats, y: Floats, weights: Floats | None = None) -> Floats:
    """Kendall's tau-b, as `spearman`: concordant less discordant pairs over the geometric mean of untied pairs."""
    rows = np.ones((1, len(x))) if weights is None else weights
    order_x, order_y = (np.sign(values[:, None] - values[None, :]) for values in (x, y))
    shared, own_x, own_y = (
        ((rows @ pairs) * rows).sum(axis=1) for pairs in (order_x * order_y, order_x**2, order_y**2)
    )
    return _quotient(shared, own_x, own_y)


def bootstrap_weights(candidates: int, seed: int, resamples: int | None = None) -> Floats:
    """How often each candidate was drawn in each resample: [resamples, candidates].

    By default `RESAMPLES`, and fewer above 500 candidates, since a resample takes time in their square.
    """
    if resamples is None:
        resamples = max(_FEWEST_RESAMPLES, min(RESAMPLES, RESAMPLES * 500**2 // candidates**2))
    rng = generator(seed)
    even = np.full(candidates, 1 / candidates)
    return rng.multinomial(candidates, even, size=resamples).astype(np.float64)


def resampled(coefficient: Coefficient, x: Floats, y: Floats, weights: Floats) -> Floats:
    """The coefficient of each resample, in portions that fit into memory."""
    function = spearman if coefficient == "spearman" else kendall
    size = max(1, _CHUNK // len(x))
    parts = [function(x, y, weights[start : start + size]) for start in range(0, len(weights), size)]
    return np.concatenate(parts)


def interval(value: float, draws: Floats) -> Interval:
    """The estimate with the percentile interval of those draws that are numbers."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return Interval(value)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def correlation(coefficient: Coefficient, x: Floats, y: Floats, *, seed: int = 0) -> Interval | None:
    """A rank correlation with its bootstrap interval over candidates.

    None with fewer than `LEAST` candidates, or where all values of x or of y are equal.
    """
    if len(x) < LEAST:
        return None
    value = float(resampled(coefficient, x, y, np.ones((1, len(x))))[0])
    if math.isnan(value):
        return None
    return interval(value, resampled(coefficient, x, y, bootstrap_weights(len(x), seed)))


def _below(values: Floats) -> Floats:
    """[i, j]: 1 where value j is below value i, 1/2 where they are equal; its weighted row sums are ranks less 1/2."""
    return np.where(values[None, :] == values[:, None], 0.5, values[None, :] < values[:, None])


def _quotient(shared: Floats, own_x: Floats, own_y: Floats) -> Floats:
    varying = (own_x > 1e-9) & (own_y > 1e-9)
    scale = np.sqrt(np.where(varying, own_x * own_y, 1.0))
    return np.where(varying, np.clip(shared / scale, -1.0, 1.0), np.nan)
