"""State tracking: the running product of the elements of a group, as in the word problem of arXiv 2404.08819.

Parity is the group of two elements; the permutations of three items are solvable, those of five are not, and so beyond
what a network of constant depth can track for any length (arXiv 2207.00729). Recurrent primitives are judged by it,
best on sequences longer than those of training.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from composer_search.mad.base import ExtrapolatingSampler, Pair


@dataclass(frozen=True, kw_only=True)
class StateTracking(ExtrapolatingSampler):
    """Uniform elements x1, x2, … of a group; at each the product x1·x2·…·xt of all so far is asked for.

    Every position is scored, in training and in tests. Token and target i is the i-th permutation in lexicographic
    order, so that 0 is the identity; a product p·x first applies p, then x.
    """

    items: ClassVar[int]

    def check(self) -> None:
        """The vocabulary is the group."""
        super().check()
        order = len(products(self.items))
        if self.vocab_size != order:
            raise self.refusal("vocab_size", f"expected {order}, the elements of the group")

    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences; see `Sampler.draw`."""
        table = products(self.items)
        inputs = rng.integers(len(table), size=(n, self.size(train=train)))
        targets = np.empty_like(inputs)
        state = np.zeros(n, np.int64)
        for place in range(inputs.shape[1]):
            state = targets[:, place] = table[state, inputs[:, place]]
        return inputs, targets


@dataclass(frozen=True, kw_only=True)
class Parity(StateTracking):
    """Whether the ones so far are odd in number; tested on twice the length."""

    task: ClassVar[str] = "parity"
    items: ClassVar[int] = 2

    vocab_size: int = 2
    seq_len: int = 32
    test_seq_len: int = 64


@dataclass(frozen=True, kw_only=True)
class Permutations3(StateTracking):
    """The permutations of three items (S3), six elements; tested on twice the length."""

    task: ClassVar[str] = "permutations-3"
    items: ClassVar[int] = 3

    vocab_size: int = 6
    seq_len: int = 16
    test_seq_len: int = 32


@dataclass(frozen=True, kw_only=True)
class Permutations5(StateTracking):
    """The permutations of five items (S5), 120 elements; tested on twice the length."""

    task: ClassVar[str] = "permutations-5"
    items: ClassVar[int] = 5

    vocab_size: int = 120
    seq_len: int = 16
    test_seq_len: int = 32


@functools.cache
def products(items: int) -> NDArray[np.int64]:
    """The group's table: entry [p, x] is the permutation that applies the p-th and then the x-th."""
    permutations = list(itertools.permutations(range(items)))
    rank = {permutation: index for index, permutation in enumerate(permutations)}
    return np.array([[rank[tuple(x[place] for place in p)] for x in permutations] for p in permutations])
