"""Regularised evolution (Real et al., arXiv 1802.01548): tournaments, one mutated letter, and the oldest dies.

Nothing is kept but the log: the population is the last completed trials in the order of their numbers, which is what
remains when each new one pushes out the oldest. So an evolution goes on wherever it was stopped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.objectives import Scalarisation
from composer_search.proposers import Proposal, tried_sequences
from composer_search.region import Region
from composer_search.study import Trial

_ATTEMPTS = 1000
"""Children that are drawn before a random sequence stands in, as near the end of a small space."""


@dataclass(frozen=True)
class EvolutionProposer:
    """Mutates one letter of the winner of a tournament among the youngest trials.

    A child that was tried before, or that breaks a constraint, is mutated on, so that letters which can only change
    together do. Where the objective has several goals, each tournament weighs them anew (`Scalarisation`).

    Attributes:
        region: Where children may lie.
        seed: Of all choices, with the trial's number.
        population: How many of the youngest trials are alive, and how many random ones come first.
    """

    region: Region
    seed: int
    population: int

    def __post_init__(self) -> None:
        """Raise a `UsageError` for a population in which there is no tournament."""
        if self.population < 2:
            raise UsageError(f"initial={self.population}; an evolution needs a population of at least 2")

    @property
    def sample(self) -> int:
        """Entrants of a tournament, drawn with replacement: a quarter of the population, as 25 of 100 in the paper."""
        return max(2, self.population // 4)

    def propose(self, trials: Sequence[Trial], running: Sequence[Proposal], number: int) -> Proposal | None:
        """A child, or a random sequence while the population is not full and where no new child is found."""
        rng = random.Random(f"{self.seed}/{number}")
        tried = tried_sequences(trials, running)
        grown_up = sorted((trial for trial in trials if trial.completed), key=lambda trial: trial.trial)
        alive = grown_up[-self.population :]
        if len(alive) == self.population:
            child = self._child(self._winner(alive, rng), tried, rng)
            if child is not None:
                return Proposal(number, child, "evolution")
        sequence = self.region.draw(tried, rng)
        return None if sequence is None else Proposal(number, sequence, "random")

    def _winner(self, alive: Sequence[Trial], rng: random.Random) -> CompositeSequence:
        """The best of the entrants; of equals, the youngest."""
        goals = [self.region.criteria.goals(trial.sequence, trial.score or 0.0) for trial in alive]
        scalarisation = Scalarisation.draw(goals, rng)
        entrants = [rng.randrange(len(alive)) for _ in range(self.sample)]
        best = max(entrants, key=lambda entrant: (scalarisation.of(goals[entrant]), entrant))
        return alive[best].sequence

    def _child(
        self, parent: CompositeSequence, tried: set[CompositeSequence], rng: random.Random
    ) -> CompositeSequence | None:
        child = parent
        for attempt in range(_ATTEMPTS):
            child = self.region.mutate(parent if attempt % self.region.space.free == 0 else child, rng)
            if child not in tried and self.region.allows(child):
                return child
        return None

    def snapshot(self, trials: Sequence[Trial]) -> None:
        """There is no state."""
