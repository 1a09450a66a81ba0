"""Compression: random tokens and one special token at the end; give every token back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from composer_search.mad.base import IGNORE, NoisySampler, Pair


@dataclass(frozen=True, kw_only=True)
class Compression(NoisySampler):
    """Uniform tokens, then the compression token, from whose state alone a decoder has to rebuild the sequence.

    Targets are the inputs, in training and in tests. A model that sees each input at its own position copies them for
    nothing; the task means something only behind a bottleneck (the MAD model hands the last position's vector alone to
    a decoder). The compression token is a target too, the same in each sequence. With noise, each token but the last
    is noise instead with probability `frac_noise`, and not scored.

    Vocabulary: content, noise, the compression token last.

    `reference_behaviour`: noise is scored like content, though it carries nothing. Without noise nothing changes.
    """

    task: ClassVar[str] = "compression"

    vocab_size: int = 16
    seq_len: int = 32

    @property
    def num_specials(self) -> int:
        """The compression token."""
        return 1

    def check(self) -> None:
        """There must be something to compress."""
        super().check()
        if self.seq_len < 2:
            raise self.refusal("seq_len", "expected at least 2, a token and the compression token")

    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences; see `Sampler.draw`."""
        inputs = rng.integers(self.num_content, size=(n, self.seq_len))
        inputs[:, -1] = self.vocab_size - 1
        targets = inputs.copy()
        if self.frac_noise:
            is_noise = rng.random(inputs.shape) < self.frac_noise
            is_noise[:, -1] = False
            inputs = np.where(is_noise, self.noise(rng, inputs.shape), inputs)
            targets = inputs.copy() if self.reference_behaviour else np.where(is_noise, IGNORE, inputs)
        return inputs, targets
