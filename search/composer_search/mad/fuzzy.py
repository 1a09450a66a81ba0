"""Fuzzy in-context recall: keys and values are motifs of one to several tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from composer_search.mad.base import Mask, NoisySampler, Pair, Tokens, first_occurrence, next_token_pair


@dataclass(frozen=True, kw_only=True)
class FuzzyInContextRecall(NoisySampler):
    """Pairs of motifs, padded on the left; the last pair, the query, was shown before.

    A motif is a uniform permutation of different tokens. Keys have 1 to `k_motif_size` tokens, uniform, in training and
    always `k_motif_size` in tests; values have 1 to `v_motif_size`, uniform, in both. A key has one value throughout
    its sequence. Pairs follow each other while there is room for one more and for the query. The query's pair is
    planted as the first one that starts at or after a uniform place in [0, seq_len - 2·len(query)), unless chance
    showed it before. With noise, a whole pair is noise with probability `frac_noise`.

    Vocabulary: key tokens, value tokens, noise, the padding, and without `multi_query` the copy prefix last. Trained on
    the next token everywhere, scored on the tokens of values alone.

    `reference_behaviour`: where no pair starts late enough, the query's pair is left out, so that nothing in the
    sequence answers the query (2.4 % of test sequences at the baseline). Otherwise it takes the last pair's place then.

    Attributes:
        multi_query: Score the value of every key shown before, else the query's alone, which a copy prefix announces.
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
    def num_specials(self) -> int:
        """The padding, and the copy prefix if any."""
        return 1 if self.multi_query else 2

    def check(self) -> None:
        """Motifs need enough tokens, and two of the longest pairs must fit."""
        super().check()
        for name, kind, tokens in (
            ("k_motif_size", "key", self.num_keys),
            ("v_motif_size", "value", self.num_content - self.num_keys),
        ):
            if getattr(self, name) > tokens:
                raise self.refusal(name, f"a motif repeats no token, and the vocabulary has {tokens} {kind} tokens")
        if (self.num_keys + 1) ** self.k_motif_size >= 2**63:
            raise self.refusal("k_motif_size", f"expected fewer than 2^63 different keys of {self.num_keys} tokens")
        least = 2 * (self.k_motif_size + self.v_motif_size) + 1
        if self.seq_len < least:
            why = "the longest key and value must fit twice"
            raise self.refusal("seq_len", f"expected at least 2·(k_motif_size + v_motif_size) + 1 = {least}: {why}")

    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences; see `Sampler.draw`."""
        context = self._plant(rng, self._draw_context(rng, n, train=train))
        return next_token_pair(*self._lay_out(rng, context), train=train)

    def _draw_context(self, rng: Generator, n: int, *, train: bool) -> _Context:
        """Independent pairs, as many as could ever fit. Pair 0 is the query; the context begins at pair 1."""
        shortest = 1 if train else self.k_motif_size
        longest_pair = self.k_motif_size + self.v_motif_size
        most_room = self.seq_len - longest_pair - (shortest + 1)
        shape = n, 1 + -(-most_room // (shortest + 1))
        is_pair = np.ones(shape, bool)
        if self.frac_noise:
            is_pair[:, 1:] = rng.random((n, shape[1] - 1)) >= self.frac_noise
        return _Context(
            keys=_motifs(rng, shape, self.num_keys, self.k_motif_size),
            key_sizes=rng.integers(shortest, self.k_motif_size + 1, size=shape),
            values=_motifs(rng, shape, self.num_content - self.num_keys, self.v_motif_size) + self.num_keys,
            value_sizes=rng.integers(1, self.v_motif_size + 1, size=shape),
            is_pair=is_pair,
            room=self.seq_len - longest_pair,
        )

    def _plant(self, rng: Generator, context: _Context) -> _Context:
        """Put the query's pair into the context of every sequence that did not show it by chance."""
        places = context.places()
        earliest = rng.integers(self.seq_len - 2 * places.sizes[:, :1])
        column = np.arange(1, places.first.shape[1])
        due = places.used[:, 1:] & (places.starts[:, 1:] >= earliest)
        if not self.reference_behaviour:
            due |= column == places.used[:, 1:].sum(axis=1, keepdims=True)  # the last pair: those used come first
        planted = column[due.argmax(axis=1)]
        by_chance = (places.first[:, 1:] == 0) & (column < planted[:, None])
        row = np.flatnonzero(due.any(axis=1) & ~by_chance.any(axis=1))
        keys, key_sizes, is_pair = context.keys.copy(), context.key_sizes.copy(), context.is_pair.copy()
        keys[row, planted[row]], key_sizes[row, planted[row]] = keys[row, 0], key_sizes[row, 0]
        is_pair[row, planted[row]] = True
        return replace(context, keys=keys, key_sizes=key_sizes, is_pair=is_pair)

    def _lay_out(self, rng: Generator, context: _Context) -> tuple[Tokens, Mask]:
        """Tokens and the mask of scored ones, [n, seq_len + 1]: padding, context, query."""
        places = context.places()
        values = np.take_along_axis(context.values, places.first[..., None], axis=1)
        prefix = np.full((*places.first.shape, 1), self.vocab_size - 1)
        motifs = np.concatenate([prefix, context.keys, values], axis=2)
        if self.frac_noise:
            motifs = np.where(context.is_pair[..., None], motifs, self.noise(rng, motifs.shape))
        place = np.arange(motifs.shape[2]) - 1  # in the key, then in the value; -1 is the prefix
        value_place = place - self.k_motif_size
        is_value = (value_place >= 0) & (value_place < places.value_sizes[..., None])
        present = is_value | ((place >= 0) & (place < context.key_sizes[..., None]))
        present &= places.used[..., None]
        present[:, 0, 0] = not self.multi_query
        answer = places.shown & self.multi_query
        answer[:, 0] = True
        to_end = np.roll(np.arange(motifs.shape[1]), -1)
        present = present[:, to_end]
        scored = (is_value & answer[..., None])[:, to_end]
        padding = self.vocab_size - self.num_specials
        tokens = _push_right(motifs[:, to_end], present, self.seq_len + 1, padding)
        return tokens, _push_right(scored, present, self.seq_len + 1, False)


@dataclass(frozen=True)
class _Context:
    """Pairs of motifs of a number of sequences; pair 0 is the query.

    Attributes:
        keys: Key tokens [n, pairs, k_motif_size], of which the first `key_sizes` count.
        key_sizes: [n, pairs].
        values: Value tokens [n, pairs, v_motif_size] that a key gets if it is new, of which `value_sizes` count.
        value_sizes: [n, pairs].
        is_pair: Whether it is a pair and no noise [n, pairs].
        room: Pairs of the context start before this place less the query's length.
    """

    keys: Tokens
    key_sizes: Tokens
    values: Tokens
    value_sizes: Tokens
    is_pair: Mask
    room: int

    def places(self) -> _Places:
        """Where the pairs come to lie once every key has its first occurrence's value."""
        slot = np.arange(self.is_pair.shape[1])
        base = int(self.keys.max()) + 2
        digits = np.where(np.arange(self.keys.shape[2]) < self.key_sizes[..., None], self.keys + 1, 0)
        ids = np.zeros(self.is_pair.shape, np.int64)
        for position in range(digits.shape[2]):
            ids = ids * base + digits[..., position]
        first = first_occurrence(np.where(self.is_pair, ids, -1 - slot))
        value_sizes = np.take_along_axis(self.value_sizes, first, axis=1)
        sizes = self.key_sizes + value_sizes
        ends = sizes[:, 1:].cumsum(axis=1)
        starts = np.zeros_like(sizes)
        starts[:, 2:] = ends[:, :-1]
        used = starts < self.room - sizes[:, :1]
        again = first == 0
        shown = np.where(again, again.cumsum(axis=1) > 2, first < slot)  # the query itself comes first
        return _Places(first, value_sizes, sizes, starts, used, shown)


@dataclass(frozen=True)
class _Places:
    """What follows from a `_Context`; all [n, pairs].

    Attributes:
        first: First pair with the same key, the query included; noise has keys of its own.
        value_sizes: Tokens of the value.
        sizes: Tokens of key and value.
        starts: Where the pair starts in the context (the query: 0).
        used: Whether the pair is part of the sequence; used pairs come first.
        shown: Whether an earlier pair of the context has the same key.
    """

    first: Tokens
    value_sizes: Tokens
    sizes: Tokens
    starts: Tokens
    used: Mask
    shown: Mask


def _motifs(rng: Generator, shape: tuple[int, int], tokens: int, size: int) -> Tokens:
    """Uniform permutations of `size` different tokens below `tokens`, [*shape, size].

    Each token is a rank among those left; stepping over the earlier ones in ascending order turns it into a token.
    """
    motifs = np.empty((*shape, size), np.int64)
    for position in range(size):
        token = rng.integers(tokens - position, size=shape)
        taken = np.sort(motifs[..., :position], axis=2)
        for earlier in range(position):
            token += token >= taken[..., earlier]
        motifs[..., position] = token
    return motifs


def _push_right[T: np.generic](values: NDArray[T], present: Mask, width: int, padding: int | bool) -> NDArray[T]:
    """The present entries of each [pairs, places] sheet in reading order, at the right end of a row of `width`."""
    counts = present.sum(axis=(1, 2))
    rows = np.full((len(values), width), padding, values.dtype)
    rows[np.arange(width) >= width - counts[:, None]] = values[present]
    return rows
