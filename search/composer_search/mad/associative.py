"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927): many keys, each asked for once, near or far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from composer_search.mad.base import IGNORE, ExtrapolatingSampler, Pair


@dataclass(frozen=True, kw_only=True)
class MultiQueryRecall(ExtrapolatingSampler):
    """Pairs ``k v k v …``, then every key once more among blanks; at each of those its value is asked for.

    Keys differ within a sequence, values are uniform with replacement. A query stands at place x = 1, 2, … after the
    pairs with a weight of x^(power - 1), without replacement: most come soon, a few late, as names recur in text. The
    queries alone are targets, in training and in tests.

    Vocabulary: keys, values, the blank last.

    Attributes:
        num_pairs: Pairs, and queries.
        power: Exponent of the power law, above 0; 1 spreads queries evenly.
    """

    task: ClassVar[str] = "multi-query-recall"

    vocab_size: int = 256
    seq_len: int = 128
    num_pairs: int = 16
    power: float = 0.1

    @property
    def num_keys(self) -> int:
        """Tokens below this are keys; values and the blank follow."""
        return (self.vocab_size - 1) // 2

    def check(self) -> None:
        """The pairs need as many keys, and the queries as many places."""
        super().check()
        if self.num_keys < self.num_pairs:
            raise self.refusal("vocab_size", f"expected at least 2·num_pairs + 1 = {2 * self.num_pairs + 1}")
        if self.seq_len < 3 * self.num_pairs:
            raise self.refusal(
                "seq_len", f"expected at least 3·num_pairs = {3 * self.num_pairs}: the pairs, the queries"
            )
        if not self.power > 0:
            raise self.refusal("power", "expected a number above 0")

    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences; see `Sampler.draw`."""
        pairs, length = self.num_pairs, self.size(train=train)
        keys = rng.random((n, self.num_keys)).argsort(axis=1)[:, :pairs]
        values = rng.integers(self.num_keys, self.vocab_size - 1, size=(n, pairs))
        inputs = np.full((n, length), self.vocab_size - 1)
        inputs[:, : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values

        # The largest of log-weights plus Gumbel noise are a weighted draw without replacement.
        log_weights = (self.power - 1) * np.log(np.arange(1, length - 2 * pairs + 1))
        places = (log_weights + rng.gumbel(size=(n, len(log_weights)))).argsort(axis=1)[:, -pairs:]
        order = rng.random((n, pairs)).argsort(axis=1)  # any key may come soon, whatever its weight
        np.put_along_axis(inputs, 2 * pairs + places, np.take_along_axis(keys, order, axis=1), axis=1)
        targets = np.full_like(inputs, IGNORE)
        np.put_along_axis(targets, 2 * pairs + places, np.take_along_axis(values, order, axis=1), axis=1)
        return inputs, targets
