"""Objectives: what a search maximises. Accuracy comes from training; everything else is exact before anything runs.

The exact metrics are those of the model that a sequence is to become, its architecture grown to a target, and not of
the short sequence itself. In an objective they count relative to the target's Llama-style baseline:
`accuracy - 0.2 kv_bytes` takes away a fifth of the share of the baseline's cache. Several goals, as in
`accuracy, -kv_bytes`, ask for their Pareto front.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape
from composer_search.extrapolate import Match, Method, extrapolate
from composer_search.speed import Measured, latency, prefill, throughput

if TYPE_CHECKING:
    from composer_search.study import Trial

type Exact = int | float | Fraction

ACCURACY = "accuracy"
"""The metric that takes training: the score of a trial."""

_AUGMENTATION = 0.05
"""Weight of the sum beside the minimum in the augmented Chebyshev function (Knowles, ParEGO, 2006)."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model that a sequence is to become.

    Attributes:
        shape: Its widths.
        method: How a sequence is grown, as in `composer_search.extrapolate`.
        match: ``paper``, or ``parameters`` for the parameter-matched arm: the size closest to the baseline's.
        seq_len: Tokens of a sequence, for FLOPs and times.
        device: GPU of `composer_megatron.roofline` that times are predicted for.
        profile: Measured times, which throughput and prefill then come from instead.
    """

    shape: Shape
    method: Method = "stack"
    match: Match = "paper"
    seq_len: int = 4096
    device: str = "h100"
    profile: Measured | None = None

    def grow(self, sequence: CompositeSequence) -> Architecture:
        """The architecture of the target's size; a `UsageError` where the sequence is bigger already."""
        return extrapolate(sequence, self.shape, method=self.method, match=self.match)

    def baseline(self) -> Architecture:
        """The Llama-style model of the target's shape."""
        return Architecture(CompositeSequence("A"), self.shape).baseline()

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `from_dict` reads them back."""
        values = {**vars(self), "shape": self.shape.as_dict()}
        del values["profile"]
        return values if self.profile is None else {**values, "profile": self.profile.as_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Target:
        """The inverse of `as_dict`."""
        shape = Shape.from_dict(dict(values["shape"]), where="the target's shape")
        profile = Measured.from_dict(values["profile"]) if "profile" in values else None
        return cls(**{**values, "shape": shape, "profile": profile})


@dataclass(frozen=True)
class Metric:
    """An exact function of an architecture.

    Attributes:
        measure: Its value, an integer or a fraction where it is one.
        relative: Whether objectives take it as a share of the baseline's.
        more_is_better: Which way a Pareto front looks.
    """

    measure: Callable[[Architecture, Target], Exact]
    relative: bool = True
    more_is_better: bool = False


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "attention": Metric(lambda it, target: Fraction(it.sequence.count("A"), len(it.sequence)), relative=False),
        "kv_bytes": Metric(lambda it, target: it.kv_bytes_per_token()),
        "flops": Metric(lambda it, target: it.flops_per_token(target.seq_len)),
        "params": Metric(lambda it, target: it.params_non_embedding),
        "throughput": Metric(throughput, more_is_better=True),
        "prefill": Metric(prefill),
        "latency": Metric(latency),
    }
)
"""Every exact metric by its name: share of attention blocks, KV-cache bytes a token, training FLOPs a token, parameters
without embeddings; and predicted training tokens a second, seconds of a prompt, seconds of a decoded token."""


def read_number(text: str) -> Fraction:
    """A number such as 0.2 or 1/3; raises `ValueError` or `ZeroDivisionError`."""
    return Fraction(text.replace(" ", ""))


def known_metrics() -> str:
    """The names of the exact metrics, for messages."""
    return ", ".join(METRICS)


@dataclass(frozen=True)
class Objective:
    """Goals to maximise, each a weighted sum of accuracy and exact metrics; one goal is a mix, several a Pareto search.

    Attributes:
        text: As the user wrote it.
        goals: The weights of each goal, by metric.
    """

    text: str
    goals: tuple[Mapping[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read goals separated by commas, of terms such as ``accuracy``, ``- 0.2 kv_bytes``, ``+ 1/10 throughput``.

        Raises:
            UsageError: If a term is no term, or accuracy is not among the terms.
        """
        goals = tuple(_parse_goal(goal, text) for goal in text.split(","))
        if not any(goal.get(ACCURACY, 0) > 0 for goal in goals):
            raise UsageError(f"objective {text!r}: accuracy has no part in it, so that there is nothing to search for")
        for goal in goals:
            if goal.get(ACCURACY, 0) < 0:
                raise UsageError(f"objective {text!r}: it takes accuracy away; expected to add it")
        return cls(" ".join(text.split()), goals)

    @property
    def plain(self) -> bool:
        """Whether accuracy alone is wanted."""
        return len(self.goals) == 1 and set(self.goals[0]) == {ACCURACY}


def _parse_goal(goal: str, text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    position, pattern = 0, re.compile(r"\s*([+-]?)\s*(\d+(?:\.\d*)?(?:\s*/\s*\d+)?|\.\d+)?\s*\*?\s*([a-zA-Z_]+)\s*")
    while position < len(goal) or not weights:
        term = pattern.match(goal, position)
        if term is None or (weights and not term[1]):
            example = "accuracy - 0.2 kv_bytes"
            raise UsageError(f"objective {text!r}: expected a term at {goal[position:]!r}, as in {example!r}")
        sign, number, name = term.groups()
        if name not in METRICS and name != ACCURACY:
            raise UsageError(f"objective {text!r}: unknown metric {name!r}; known are {ACCURACY}, {known_metrics()}")
        try:
            weight = float(read_number(number or "1"))
        except ZeroDivisionError:
            raise UsageError(f"objective {text!r}: {number} divides by zero") from None
        weights[name] = weights.get(name, 0.0) + (-weight if sign == "-" else weight)
        position = term.end()
    return weights


@dataclass(frozen=True)
class Scalarisation:
    """One number of several goals: the goal itself, or the augmented Chebyshev function with some weights.

    With goals z scaled to [0, 1] over what was seen it is min_j w_j z_j + 0.05 · sum_j w_j z_j (Knowles, ParEGO, 2006,
    there written for minimisation). Its maxima over all weights are the Pareto front.

    Attributes:
        weights: Of each goal; they add up to 1.
        low: Of each goal, the value that scales to 0.
        span: Of each goal, the distance to the value that scales to 1.
    """

    weights: tuple[float, ...]
    low: tuple[float, ...]
    span: tuple[float, ...]

    @classmethod
    def draw(cls, seen: Sequence[Sequence[float]], rng: random.Random) -> Scalarisation:
        """Weights uniform over the simplex, scaled by the goals' values `seen`, a row a trial."""
        columns = list(zip(*seen, strict=True))
        edges = [0.0, *sorted(rng.random() for _ in columns[1:]), 1.0]
        weights = tuple(high - low for low, high in itertools.pairwise(edges))
        low = tuple(min(column) for column in columns)
        span = tuple(max(column) - min(column) or 1.0 for column in columns)
        return cls(weights, low, span)

    def of[T](self, goals: Sequence[T], minimum: Callable[[list[T]], T] = min) -> T:  # type: ignore[assignment]
        """The number of some goals: of numbers, or of arrays with the array library's elementwise `minimum`."""
        if len(goals) == 1:
            return goals[0]
        places = zip(self.weights, goals, self.low, self.span, strict=True)
        parts: list[Any] = [weight * (goal - low) / span for weight, goal, low, span in places]  # type: ignore[operator]
        total: T = minimum(parts) + _AUGMENTATION * sum(parts)
        return total


def pareto_front(trials: Sequence[Trial], metrics: Sequence[str]) -> list[Trial]:
    """The trials that no other beats: as good in every metric and better in one; in the order of their numbers.

    Args:
        trials: Those without a score, or without one of the metrics, are left out.
        metrics: ``accuracy`` and names of `METRICS`; each knows which way is better.

    Raises:
        UsageError: If there is no such metric.
    """
    for name in metrics:
        if name not in METRICS and name != ACCURACY:
            raise UsageError(f"unknown metric {name!r}; known are {ACCURACY}, {known_metrics()}")

    def place(trial: Trial) -> tuple[float, ...]:
        return tuple(
            float(trial.score or 0.0)
            if name == ACCURACY
            else (1 if METRICS[name].more_is_better else -1) * trial.objective[name]
            for name in metrics
        )

    exact = set(metrics) - {ACCURACY}
    return _unbeaten([(trial, place(trial)) for trial in trials if trial.completed and exact <= set(trial.objective)])


def goal_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in the goals of the search's own objective; none where it has but one."""

    def goals(trial: Trial) -> tuple[float, ...]:
        return tuple(worth for name, worth in trial.objective.items() if name.startswith("goal_"))

    return _unbeaten([(trial, goals(trial)) for trial in trials if trial.completed and goals(trial)])


def _unbeaten(places: Sequence[tuple[Trial, tuple[float, ...]]]) -> list[Trial]:
    """The trials whose place no other's reaches or passes in everything, equal places apart; by their numbers."""

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(
            other != mine and all(theirs >= ours for theirs, ours in zip(other, mine, strict=True))
            for _, other in places
        )

    return sorted((trial for trial, mine in places if not beaten(mine)), key=lambda trial: trial.trial)
