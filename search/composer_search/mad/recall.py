"""In-context recall, plain and noisy: a sequence of key-value pairs; name the value of a key that was shown before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from composer_search.mad.base import NoisySampler, Pair, first_occurrence, next_token_pair


@dataclass(frozen=True, kw_only=True)
class InContextRecall(NoisySampler):
    """Pairs ``k v k v …`` whose last key was shown before.

    Keys are uniform with replacement. A key has one value throughout its sequence, uniform with replacement, so that
    two keys may share one. The last key is uniform over the different keys shown before. With noise, a pair's place
    holds two independent noise tokens instead with probability `frac_noise`, but at least one place before the last
    holds a pair.

    Vocabulary: keys, values, noise, and without `multi_query` the copy prefix last. Trained on the next token
    everywhere, scored on values alone.

    `reference_behaviour`: the place that noise must leave alone is drawn from one place too many, the last pair, so
    that with probability 2 / seq_len no place is protected. (The reference fails where noise then covers everything;
    here the first place holds a pair.) Without noise nothing changes.

    Attributes:
        multi_query: Score the value of every key shown before; arrays are seq_len - 1 long. Without it only the last
            value is scored, a copy prefix comes before the last key, and arrays are seq_len long.
    """

    task: ClassVar[str] = "in-context-recall"

    vocab_size: int = 16
    seq_len: int = 128
    multi_query: bool = True

    @property
    def num_specials(self) -> int:
        """The copy prefix, if any."""
        return 0 if self.multi_query else 1

    @property
    def length(self) -> int:
        """Whole sequences less the last value."""
        return self.seq_len - 1 if self.multi_query else self.seq_len

    def check(self) -> None:
        """Pairs need an even length, and one pair must come before the last."""
        super().check()
        if self.seq_len % 2 or self.seq_len < 4:
            raise self.refusal("seq_len", "expected an even number of at least 4, since the sequence is made of pairs")

    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences; see `Sampler.draw`."""
        slots = self.seq_len // 2 - 1
        keys = rng.integers(self.num_keys, size=(n, slots))
        value_of = rng.integers(self.num_keys, self.num_content, size=(n, self.num_keys))
        is_pair = self.content_slots(rng, n, slots, protected=slots + 1 if self.reference_behaviour else slots)
        is_pair[~is_pair.any(axis=1), 0] = True

        slot = np.arange(slots)
        is_new = first_occurrence(np.where(is_pair, keys, self.num_keys + slot)) == slot  # all noise is new
        last_slot = np.where(is_pair & is_new, rng.random((n, slots)), -1).argmax(axis=1)
        last_key = np.take_along_axis(keys, last_slot[:, None], axis=1)

        pairs = np.stack([keys, np.take_along_axis(value_of, keys, axis=1)], axis=2)
        if self.frac_noise:
            pairs = np.where(is_pair[..., None], pairs, self.noise(rng, pairs.shape))
        scored = np.zeros(pairs.shape, bool)
        scored[..., 1] = ~is_new & self.multi_query

        last = [last_key, np.take_along_axis(value_of, last_key, axis=1)]
        prefix = [] if self.multi_query else [np.full((n, 1), self.vocab_size - 1)]
        tokens = np.concatenate([pairs.reshape(n, -1), *prefix, *last], axis=1)
        all_scored = np.zeros(tokens.shape, bool)
        all_scored[:, : 2 * slots] = scored.reshape(n, -1)
        all_scored[:, -1] = True
        return next_token_pair(tokens, all_scored, train=train)


@dataclass(frozen=True, kw_only=True)
class NoisyInContextRecall(InContextRecall):
    """`InContextRecall` with noise by default; nothing else differs."""

    task: ClassVar[str] = "noisy-in-context-recall"

    vocab_size: int = 32
    noise_vocab_size: int = 16
    frac_noise: float = 0.2
