"""Selective copying: repeat the tokens of a sequence in order, without the blanks between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from composer_search.mad.base import IGNORE, MadSampler, Pair


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(MadSampler):
    """Content among blanks, a copy token, then as many blanks as there is content to repeat there.

    The seq_len - 2·num_tokens_to_copy - 1 blanks of the first part fall before the content tokens, each before one
    chosen at random. Content is uniform with replacement. The same positions are scored in training and in tests: the
    blanks after the copy token.

    Vocabulary: content, the blank, the copy token last.

    `reference_behaviour` changes nothing here: the reference draws the blanks from another, global random state, which
    has the same distribution. (Up to 2024-12-17 it copied 16 tokens whatever the setting said; for numbers from before,
    ask for num_tokens_to_copy=16.)

    Attributes:
        num_tokens_to_copy: Content tokens.
    """

    task: ClassVar[str] = "selective-copying"

    vocab_size: int = 16
    seq_len: int = 256
    num_tokens_to_copy: int = 16

    def check(self) -> None:
        """Content, blanks and copy must fit."""
        if self.vocab_size < 4:
            raise self.refusal("vocab_size", "expected at least 4: two content tokens, the blank and the copy token")
        least = 2 * self.num_tokens_to_copy + 2
        if self.seq_len < least:
            needed = f"2·num_tokens_to_copy + 2 = {least}"
            raise self.refusal("seq_len", f"expected at least {needed}: content, a blank, the copy token, the copy")

    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences; see `Sampler.draw`."""
        copied, blank, copy = self.num_tokens_to_copy, self.vocab_size - 2, self.vocab_size - 1
        content = rng.integers(blank, size=(n, copied))
        before = rng.multinomial(self.seq_len - 2 * copied - 1, np.full(copied, 1 / copied), size=n)
        places = np.arange(copied) + before.cumsum(axis=1)
        inputs = np.full((n, self.seq_len), blank)
        np.put_along_axis(inputs, places, content, axis=1)
        inputs[:, -copied - 1] = copy
        targets = np.full_like(inputs, IGNORE)
        targets[:, -copied:] = content
        return inputs, targets
