"""The region of a search: the part of its space that the constraints leave."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from composer_megatron.sequence import CompositeSequence
from composer_search.constraints import ENUMERABLE, Criteria, look_through
from composer_search.space import Space


@dataclass(frozen=True)
class Region:
    """The sequences of a space that meet the constraints.

    Attributes:
        space: The space.
        criteria: The constraints, and the objective.
    """

    space: Space
    criteria: Criteria = field(default_factory=Criteria)

    def allows(self, sequence: CompositeSequence) -> bool:
        """Whether a sequence of the space meets the constraints."""
        return self.criteria.allows(sequence)

    @cached_property
    def ranks(self) -> list[int] | None:
        """The ranks of its sequences, lowest first; None where the space is too large to enumerate."""
        return self.criteria.allowed(self.space)

    @property
    def size(self) -> int:
        """How many sequences it has; of a space too large to enumerate, at most."""
        if not self.criteria.constraints or self.ranks is None:
            return self.space.size
        return len(self.ranks)

    def draw(self, tried: Collection[CompositeSequence], rng: random.Random) -> CompositeSequence | None:
        """One of the sequences that were not tried, each as likely; None when no sequence is left."""
        if not self.criteria.constraints:
            return self._draw_rank(sorted(map(self.space.rank, tried)), rng)
        if self.ranks is not None:
            done = set(map(self.space.rank, tried))
            left = [rank for rank in self.ranks if rank not in done]
            return self.space.at(rng.choice(left)) if left else None
        for _ in range(ENUMERABLE):
            sequence = self.space.at(rng.randrange(self.space.size))
            if sequence not in tried and self.allows(sequence):
                return sequence
        rare = (each for each in look_through(self.space) if each not in tried and self.allows(each))
        return next(rare, None)

    def _draw_rank(self, tried: list[int], rng: random.Random) -> CompositeSequence | None:
        """Draw the rank among the untried, then skip the tried ones below it: uniform without a rejection."""
        if len(tried) >= self.space.size:
            return None
        rank = rng.randrange(self.space.size - len(tried))
        for other in tried:
            rank += other <= rank
        return self.space.at(rank)

    def mutate(self, sequence: CompositeSequence, rng: random.Random) -> CompositeSequence:
        """The sequence with one of its free letters, drawn at random, replaced by another; it may break constraints."""
        letters = list(self.space.free_letters(sequence))
        place = rng.randrange(len(letters))
        letters[place] = rng.choice([letter for letter in self.space.primitives if letter != letters[place]])
        return self.space.join("".join(letters))
