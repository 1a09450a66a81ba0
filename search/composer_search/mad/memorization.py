"""Memorization: name the value of a key from a fixed map that no sequence shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from composer_search.mad.base import IGNORE, NoisySampler, Pair


@dataclass(frozen=True, kw_only=True)
class Memorization(NoisySampler):
    """Keys, each followed by an insert token where its value is due: ``k ? k ? …``.

    One map from keys to different values holds for all sequences of a data set, training and test: the test asks
    whether the facts were learnt, on other sequences of the same keys. The map depends on the seed and on the
    vocabulary's split alone. Keys are uniform with replacement, so a test key may never have been trained on: of N keys
    about (1 - 1/N)^(n_train · seq_len/2) are not, and no model can know them. That bounds the accuracy where the
    vocabulary is large (at 8192 tokens and 256 training sequences, to about .63).

    Vocabulary: keys, values, noise, the insert token last. The same positions are scored in training and in tests: the
    insert tokens, with the value as target, not shifted. With noise, a pair's place holds two noise tokens instead,
    unscored, with probability `frac_noise`, but at least one place holds a pair.

    `reference_behaviour`: keys and values share the vocabulary as if there were no noise, so that noise tokens are
    values as well. Without noise tokens nothing changes.
    """

    task: ClassVar[str] = "memorization"

    vocab_size: int = 256
    seq_len: int = 32

    @property
    def num_specials(self) -> int:
        """The insert token."""
        return 1

    def check(self) -> None:
        """Keys and insert tokens alternate."""
        super().check()
        if self.seq_len % 2:
            raise self.refusal("seq_len", "expected an even number, since keys and insert tokens alternate")

    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences; see `Sampler.draw`."""
        content = self.num_content + (self.noise_vocab_size if self.reference_behaviour else 0)
        value_of = shared.permutation(np.arange(content // 2, content))
        slots = self.seq_len // 2
        keys = rng.integers(content // 2, size=(n, slots))
        is_pair = self.content_slots(rng, n, slots, protected=slots)[..., None]
        inputs = np.stack([keys, np.full_like(keys, self.vocab_size - 1)], axis=2)
        if self.frac_noise:
            inputs = np.where(is_pair, inputs, self.noise(rng, inputs.shape))
        targets = np.stack([np.full_like(keys, IGNORE), value_of[keys]], axis=2)
        targets = np.where(is_pair, targets, IGNORE)
        return inputs.reshape(n, -1), targets.reshape(n, -1)
