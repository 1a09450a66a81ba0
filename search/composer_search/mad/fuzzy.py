"""Fuzzy in-context recall: keys and values are motifs of one to several tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from composer_search.mad.base import Mask, NoisySampler, Pair, Tokens, first_occurrence, next_token_pair


@dataclass(frozen=True, kw_only=True)
class FuzzyInContextRecall(NoisySampler):
    """Pairs of motifs, left-padded; the last pair, the query, was shown before.

    A motif is a uniform permutation of distinct tokens: keys have 1 to `k_motif_size` tokens, uniform, in training and
    always `k_motif_size` in tests; values always have 1 to `v_motif_size`. A key has one value throughout its sequence.
    Pairs are drawn until the query, and then the query's pair may no longer fit; the query's pair is planted at the
    first pair that starts at or after a uniform place in [0, seq_len - 2·len(query)), unless it occurred before by
    chance. Noise replaces a whole pair.

    Vocabulary: key tokens, value tokens, noise, the padding, and without `multi_query` the copy prefix last. Trained on
    the next token everywhere, scored on the tokens of values alone.

    `reference_behaviour`: where no pair starts late enough, the query's pair is not planted at all and the query cannot
    be answered (2.35 % of test sequences at the baseline); else it then takes the place of the last pair.

    Attributes:
        multi_query: Score the value of every key shown before, else that of the query alone, which a copy prefix
            announces.
        k_motif_size: Longest key in tokens.
        v_motif_size: Longest value in tokens.
    """

    task: ClassVar[str] = "fuzzy-in-context-recall"

    vocab_size: int = 16
    seq_len: int = 128
    multi_query: bool = True
    k_motif_size: int = 3
    v_motif_size: int = 3

    @property
    def specials(self) -> int:
        """The padding, and the copy prefix if any."""
        return 1 if self.multi_query else 2

    def check(self) -> None:
        """Motifs need enough tokens, and two of the longest pairs must fit."""
        super().check()
        for name, kind, tokens in (
            ("k_motif_size", "key", self.keys),
            ("v_motif_size", "value", self.content - self.keys),
        ):
            if getattr(self, name) > tokens:
                raise self.refusal(name, f"a motif repeats no token, and there are only {tokens} {kind} tokens")
        if (self.keys + 1) ** self.k_motif_size >= 2**63:
            raise self.refusal("k_motif_size", f"{self.keys} key tokens make more than 2^63 keys; shorten the motifs")
        least = 2 * (self.k_motif_size + self.v_motif_size) + 1
        if self.seq_len < least:
            why = "a key and value of k_motif_size + v_motif_size tokens must fit twice"
            raise self.refusal("seq_len", f"expected at least {least}, since {why}")

    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences; see `Sampler.draw`."""
        context = self._plant(rng, self._draw_context(rng, n, train=train))
        tokens, scored = self._lay_out(rng, context)
        return next_token_pair(tokens, scored, train=train)

    def _draw_context(self, rng: Generator, n: int, *, train: bool) -> _Context:
        """Independent pairs, as many as could ever fit; the query is pair 0 and stands outside the context."""
        shortest_key = 1 if train else self.k_motif_size
        room = self.seq_len - shortest_key - 1 - (self.k_motif_size + self.v_motif_size)
        pairs = 1 + -(-room // (shortest_key + 1))
        is_pair = np.ones((n, pairs), bool)
        if self.frac_noise:
            is_pair[:, 1:] = rng.random((n, pairs - 1)) >= self.frac_noise
        return _Context(
            keys=_motifs(rng, (n, pairs), self.keys, self.k_motif_size),
            key_sizes=rng.integers(shortest_key, self.k_motif_size + 1, size=(n, pairs)),
            values=self.keys + _motifs(rng, (n, pairs), self.content - self.keys, self.v_motif_size),
            value_sizes=rng.integers(1, self.v_motif_size + 1, size=(n, pairs)),
            is_pair=is_pair,
            room=self.seq_len - (self.k_motif_size + self.v_motif_size),
        )

    def _plant(self, rng: Generator, context: _Context) -> _Context:
        """Put the query's pair into the context of each sequence where chance did not."""
        first, starts, inside = context.places()
        due = inside & (starts >= rng.integers(self.seq_len - 2 * context.sizes(first)[:, :1]))
        if not self.reference_behaviour:
            last = inside.sum(axis=1) - 1  # `inside` is a prefix of the pairs
            due |= np.arange(due.shape[1]) == last[:, None]
        place = due.argmax(axis=1)
        by_chance = ((first[:, 1:] == 0) & (np.arange(due.shape[1]) < place[:, None])).any(axis=1)
        rows = np.flatnonzero(due.any(axis=1) & ~by_chance)
        columns = place[rows] + 1
        keys, key_sizes, is_pair = context.keys.copy(), context.key_sizes.copy(), context.is_pair.copy()
        keys[rows, columns], key_sizes[rows, columns], is_pair[rows, columns] = keys[rows, 0], key_sizes[rows, 0], True
        return replace(context, keys=keys, key_sizes=key_sizes, is_pair=is_pair)

    def _lay_out(self, rng: Generator, context: _Context) -> tuple[Tokens, Mask]:
        """The tokens [n, seq_len + 1] and which of them are scored: the context, then the query, pushed to the right."""
        n, pairs = context.is_pair.shape
        first, _, inside = context.places()
        is_query_key = first[:, 1:] == 0
        shown = np.where(is_query_key, is_query_key.cumsum(axis=1) > 1, first[:, 1:] < np.arange(1, pairs))
        order = np.r_[1:pairs, 0]
        at_end = np.arange(pairs) == pairs - 1

        prefix = np.full((n, pairs, 1), self.vocab_size - 1)
        values = np.take_along_axis(context.values, first[..., None], axis=1)
        tokens = np.concatenate([prefix, context.keys[:, order], values[:, order]], axis=2)
        if self.frac_noise:
            tokens = np.where(context.is_pair[:, order, None], tokens, self.noise(rng, tokens.shape))
        value_sizes = np.take_along_axis(context.value_sizes, first, axis=1)[:, order]
        used = np.concatenate(
            [
                np.broadcast_to((at_end & (not self.multi_query))[:, None], prefix.shape),
                np.arange(self.k_motif_size) < context.key_sizes[:, order, None],
                np.arange(self.v_motif_size) < value_sizes[..., None],
            ],
            axis=2,
        )
        used &= np.concatenate([inside, np.ones((n, 1), bool)], axis=1)[..., None]
        answered = np.concatenate([shown & self.multi_query & context.is_pair[:, 1:], np.ones((n, 1), bool)], axis=1)
        scored = answered[..., None] & (np.arange(tokens.shape[2]) > self.k_motif_size)
        return _push_right(tokens, used, self.seq_len + 1, self.vocab_size - self.specials), _push_right(
            scored, used, self.seq_len + 1, False
        )
