"""Variable tracking (after RULER, arXiv 2404.06654): follow assignments from a variable back to its value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from composer_search.mad.base import IGNORE, ExtrapolatingSampler, Pair


@dataclass(frozen=True, kw_only=True)
class VariableTracking(ExtrapolatingSampler):
    """Assignments ``x 7 y x z y …``, the query token, then variables; at each its value is asked for.

    A chain starts with a variable that takes a value, and each next one takes the variable before it, `hops` times.
    Chains are interleaved at random; every variable is assigned once, and always after the one that it takes. Queries
    are uniform over the assigned variables, and the only targets, in training and in tests: one in hops + 1 is looked
    up at once, the others after up to `hops` steps.

    Vocabulary: variables, values, the query token last.

    Attributes:
        hops: Longest way from a variable to one that has a value.
        num_queries: Variables asked for.
    """

    task: ClassVar[str] = "variable-tracking"

    vocab_size: int = 128
    seq_len: int = 64
    hops: int = 2
    num_queries: int = 15

    @property
    def num_variables(self) -> int:
        """Tokens below this are variables; values and the query token follow."""
        return (self.vocab_size - 1) // 2

    def check(self) -> None:
        """Assignments come in pairs of tokens, and each needs a variable of its own."""
        super().check()
        for name, length in (("seq_len", self.seq_len), ("test_seq_len", self.scored_length)):
            assigning = length - 1 - self.num_queries
            if assigning % 2 or assigning < 2 * (self.hops + 1):
                wanted = f"1 + num_queries={self.num_queries} and an even number of at least {2 * (self.hops + 1)}"
                raise self.refusal(name, f"expected {wanted}: a whole chain and the queries")
            if assigning // 2 > self.num_variables:
                least = assigning + 1
                raise self.refusal("vocab_size", f"expected at least {least}: {name} holds {assigning // 2} variables")

    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences; see `Sampler.draw`."""
        count = (self.size(train=train) - 1 - self.num_queries) // 2
        chain = rng.permuted(np.broadcast_to(np.arange(count) // (self.hops + 1), (n, count)), axis=1)
        variable = rng.random((n, self.num_variables)).argsort(axis=1)[:, :count]
        value_of = rng.integers(self.num_variables, self.vocab_size - 1, size=(n, chain.max() + 1))
        value = np.take_along_axis(value_of, chain, axis=1)
        before = _previous_of_its_kind(chain)
        source = np.where(before < 0, value, np.take_along_axis(variable, np.maximum(before, 0), axis=1))

        asked = rng.integers(count, size=(n, self.num_queries))
        assignments = np.stack([variable, source], axis=2).reshape(n, -1)
        query = np.full((n, 1), self.vocab_size - 1)
        inputs = np.concatenate([assignments, query, np.take_along_axis(variable, asked, axis=1)], axis=1)
        targets = np.full_like(inputs, IGNORE)
        targets[:, -self.num_queries :] = np.take_along_axis(value, asked, axis=1)
        return inputs, targets


def _previous_of_its_kind(kinds: np.ndarray) -> np.ndarray:
    """For each entry of `kinds` [n, count] the last place before it with the same kind, or -1."""
    order = np.argsort(kinds, axis=1, kind="stable")
    ordered = np.take_along_axis(kinds, order, axis=1)
    before = np.full_like(order, -1)
    before[:, 1:] = np.where(ordered[:, 1:] == ordered[:, :-1], order[:, :-1], -1)
    previous = np.empty_like(order)
    np.put_along_axis(previous, order, before, axis=1)
    return previous
