"""Constraints on exact metrics, and the criteria of a search: its target, objective and constraints together."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.objectives import ACCURACY, METRICS, Exact, Objective, Target, known_metrics, read_number
from composer_search.space import Space

ENUMERABLE = 2**16
"""Spaces up to this many sequences are looked through whole; of larger ones, a sample of this size."""


@dataclass(frozen=True)
class Constraint:
    """A bound on an exact metric.

    Attributes:
        text: As the user wrote it.
        metric: A name of `METRICS`.
        at_most: Whether the bound is the highest value allowed, or else the lowest.
        bound: The bound.
        of_baseline: Whether it is a multiple of the baseline's value.
    """

    text: str
    metric: str
    at_most: bool
    bound: Fraction
    of_baseline: bool

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read ``attention <= 1/3``, ``kv_bytes <= 0.6x`` (x: the Llama-style baseline's) or ``params >= 900000000``.

        Raises:
            UsageError: If it is none of these, or bounds what is only known after training.
        """
        found = re.fullmatch(r"\s*([a-zA-Z_]+)\s*(<=|>=)\s*(\d+(?:\.\d*)?(?:\s*/\s*\d+)?|\.\d+)\s*(x?)\s*", text)
        if found is None:
            raise UsageError(f"constraint {text!r}; expected one such as 'attention <= 1/3' or 'kv_bytes <= 0.6x'")
        name, relation, number, unit = found.groups()
        if name == ACCURACY:
            raise UsageError(f"constraint {text!r}: accuracy is known after training alone; bound {known_metrics()}")
        if name not in METRICS:
            raise UsageError(f"constraint {text!r}: unknown metric {name!r}; known are {known_metrics()}")
        try:
            bound = read_number(number)
        except ZeroDivisionError:
            raise UsageError(f"constraint {text!r}: {number} divides by zero") from None
        return cls(" ".join(text.split()), name, relation == "<=", bound, bool(unit))

    def excess(self, value: Exact, baseline: Exact) -> Exact:
        """By how much a value is beyond the bound; 0 or less is allowed."""
        beyond = value - self.bound * (baseline if self.of_baseline else 1)
        return beyond if self.at_most else -beyond


@dataclass(frozen=True)
class Criteria:
    """What a search wants: an objective under constraints, both of the model that a sequence is to become.

    Attributes:
        objective: What is maximised.
        constraints: What every candidate meets.
        target: What candidates are grown to; None where neither needs it.
    """

    objective: Objective = field(default_factory=lambda: Objective.parse(ACCURACY))
    constraints: tuple[Constraint, ...] = ()
    target: Target | None = None
    _known: dict[Any, dict[str, Exact]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise a `UsageError` where exact metrics are asked for and there is no target to compute them for."""
        if self.target is None and not (self.objective.plain and not self.constraints):
            raise UsageError("objectives and constraints on exact metrics need a target shape")

    @property
    def plain(self) -> bool:
        """Whether accuracy alone counts and everything is allowed."""
        return self.objective.plain and not self.constraints

    def metrics(self, sequence: CompositeSequence) -> dict[str, Exact]:
        """The exact metrics of the grown sequence that the log keeps; none without a target.

        How many blocks of each kind a sequence grows to depends on its runs alone and not on their order, so that a
        space of 2^16 sequences takes a few thousand extrapolations.
        """
        if self.target is None:
            return {}
        runs = tuple(sorted(sequence.runs))
        if runs not in self._known:
            grown = self.target.grow(sequence)
            self._known[runs] = {name: METRICS[name].measure(grown, self.target) for name in METRICS}
        return self._known[runs]

    def baseline(self) -> dict[str, Exact]:
        """The exact metrics of the target's baseline."""
        if self.target is None:
            return {}
        if None not in self._known:
            model = self.target.baseline()
            self._known[None] = {name: METRICS[name].measure(model, self.target) for name in METRICS}
        return self._known[None]

    def costs(self, sequence: CompositeSequence) -> tuple[float, ...]:
        """The exact part of each goal."""
        values, baseline = self.metrics(sequence), self.baseline()

        def share(name: str) -> float:
            return float(Fraction(values[name]) / Fraction(baseline[name]) if METRICS[name].relative else values[name])

        return tuple(
            sum(weight * share(name) for name, weight in goal.items() if name != ACCURACY)
            for goal in self.objective.goals
        )

    def goals(self, sequence: CompositeSequence, accuracy: float) -> tuple[float, ...]:
        """The value of each goal, given the accuracy."""
        weights = [goal.get(ACCURACY, 0.0) for goal in self.objective.goals]
        return tuple(weight * accuracy + cost for weight, cost in zip(weights, self.costs(sequence), strict=True))

    def record(self, sequence: CompositeSequence, accuracy: float | None) -> dict[str, float]:
        """What a trial's line keeps: the exact metrics; of a mix its ``value``, of several goals each as ``goal_N``."""
        exact = {
            name: float(value) if isinstance(value, Fraction) else value
            for name, value in self.metrics(sequence).items()
        }
        if accuracy is None or self.objective.plain:
            return exact
        goals = self.goals(sequence, accuracy)
        names = ["value"] if len(goals) == 1 else [f"goal_{number}" for number in range(1, len(goals) + 1)]
        return exact | dict(zip(names, goals, strict=True))

    def allows(self, sequence: CompositeSequence) -> bool:
        """Whether the sequence meets every constraint."""
        return not self.constraints or max(self._excesses(sequence)) <= 0

    def _excesses(self, sequence: CompositeSequence) -> list[Exact]:
        values, baseline = self.metrics(sequence), self.baseline()
        return [each.excess(values[each.metric], baseline[each.metric]) for each in self.constraints]

    def allowed(self, space: Space) -> list[int] | None:
        """The ranks of the space's sequences that meet the constraints; None where the space is too large to say."""
        if space.size > ENUMERABLE:
            return None
        return [rank for rank in range(space.size) if self.allows(space.at(rank))]

    def check(self, space: Space) -> None:
        """Refuse, before anything runs, what cannot be met.

        Raises:
            UsageError: If a sequence is too big to be grown to the target, or none meets the constraints; the message
                says what comes nearest.
        """
        if self.target is None:
            return
        for letter in space.primitives:
            self.metrics(space.join(letter * space.free))  # refuses a sequence that is bigger than the target
        if not self.constraints or any(self.allows(sequence) for sequence in look_through(space)):
            return
        baseline = self.baseline()

        def miss(sequence: CompositeSequence) -> float:
            parts = zip(self.constraints, self._excesses(sequence), strict=True)
            return max(float(excess) / float(baseline[each.metric]) for each, excess in parts)

        nearest = min(look_through(space), key=miss)
        values = self.metrics(nearest)
        shown = ", ".join(
            _shown(name, values[name], baseline[name]) for name in dict.fromkeys(c.metric for c in self.constraints)
        )
        wanted = " and ".join(repr(each.text) for each in self.constraints)
        looked = "no sequence" if space.size <= ENUMERABLE else f"none of {ENUMERABLE:,} sampled sequences"
        grown = f"grown to {self.target.shape.name!r} by {self.target.method}, match {self.target.match}"
        raise UsageError(f"{looked} of {space} meets {wanted} ({grown}); the nearest is {nearest} with {shown}")

    def as_dict(self) -> dict[str, Any]:
        """The criteria as they stand in `study.json`."""
        return {
            "objective": self.objective.text,
            "constraints": [each.text for each in self.constraints],
            "target": None if self.target is None else self.target.as_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Criteria:
        """The inverse of `as_dict`; what is absent, as in studies of the first version, is plain accuracy."""
        target = values.get("target")
        return cls.parse(
            values.get("objective", ACCURACY),
            values.get("constraints", ()),
            None if target is None else Target.from_dict(target),
        )

    @classmethod
    def parse(cls, objective: str, constraints: Sequence[str], target: Target | None) -> Criteria:
        """Read an objective and constraints; raises a `UsageError` for what is none."""
        return cls(Objective.parse(objective), tuple(Constraint.parse(text) for text in constraints), target)


def _shown(name: str, value: Exact, baseline: Exact) -> str:
    number = f"{value:,}" if isinstance(value, int) else f"{float(value):.4g}"
    return f"{name} {number}" + (f" ({float(value) / float(baseline):.3g}x)" if METRICS[name].relative else "")


def look_through(space: Space) -> Iterator[CompositeSequence]:
    """Every sequence of the space, or of a large one a sample with every share of each letter in it."""
    if space.size <= ENUMERABLE:
        yield from map(space.at, range(space.size))
        return
    for first in space.primitives:
        for second in space.primitives:
            for count in range(space.free + 1):
                yield space.join(first * count + second * (space.free - count))
    rng = random.Random(0)
    for _ in range(ENUMERABLE):
        yield space.at(rng.randrange(space.size))
