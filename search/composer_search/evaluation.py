"""What an evaluator is, and what it says about a sequence. An evaluator of your own needs this module alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

from composer_megatron.sequence import CompositeSequence


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found out about one sequence.

    Attributes:
        score: What the search maximises: mean task accuracy on validation data, mean over seeds.
        spread: Standard deviation of `seed_scores`; 0 for one seed.
        seed_scores: The score of each seed.
        tasks: Each task's validation accuracy, mean over seeds.
        test_score: The same as `score` on data that nothing was chosen by; None where there are none.
        details: More, as JSON values, for the log.
    """

    score: float
    spread: float = 0.0
    seed_scores: tuple[float, ...] = ()
    tasks: Mapping[str, float] = field(default_factory=dict)
    test_score: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Evaluator(Protocol):
    """Scores sequences. It is pickled and sent to worker processes."""

    def evaluate(self, sequence: CompositeSequence) -> Evaluation:
        """Score one sequence; higher is better."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that the scores depend on, as JSON values; ``name`` first. Kept in the study."""
        ...


@runtime_checkable
class BatchEvaluator(Evaluator, Protocol):
    """An evaluator that is faster with several sequences at once."""

    def evaluate_many(self, sequences: Sequence[CompositeSequence]) -> list[Evaluation]:
        """Score sequences, in their order; each score is what `evaluate` would give.

        If it raises, the sequences are evaluated one by one.
        """
        ...


def runs_on_gpu(evaluator: Evaluator) -> bool:
    """Whether an evaluator takes a GPU where there is one; one that trains says so by its `device`."""
    return str(getattr(evaluator, "device", "cpu")).startswith(("auto", "cuda"))


@runtime_checkable
class MatchableEvaluator(Evaluator, Protocol):
    """An evaluator that can give every candidate the same number of weights."""

    def with_weights(self, weights: int) -> Evaluator:
        """The same evaluator with every candidate at widths that give its blocks so many weights.

        0 is for as many as a candidate of the same length has that is half attention and half MLPs.
        """
        ...


@runtime_checkable
class ScalableEvaluator(Evaluator, Protocol):
    """An evaluator whose candidates can be made narrower or wider."""

    def scaled(self, share: Fraction) -> Evaluator:
        """The same evaluator with every width of the candidates times `share`, rounded to what its blocks allow."""
        ...
