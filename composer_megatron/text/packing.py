"""Sequences of equal length out of a stream of documents, and out of several streams in given shares."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from composer_megatron.errors import FileError
from composer_megatron.text.stream import Place, RawText
from composer_megatron.text.tokenizing import encode_documents


@dataclass(frozen=True)
class Sample:
    """A training sequence.

    Attributes:
        tokens: Its tokens and the one after them, int64 [length + 1].
        documents: Tokens of each document in it, without the one after; each ends with the end of text, the last one
            perhaps later. They sum to the length.
        source: Which of several texts it comes from.
    """

    tokens: np.ndarray
    documents: tuple[int, ...]
    source: int = 0


@dataclass(frozen=True)
class Packing:
    """How documents become sequences.

    Attributes:
        tokenizer: The tokenizer's file.
        end_of_text: Id that closes each document.
        length: Tokens of a sequence.
        workers: Processes that tokenize; 1 does it in this one.
    """

    tokenizer: Path
    end_of_text: int
    length: int
    workers: int = 1

    def samples(self, documents: Iterable[tuple[Place, str]], skip: int = 0) -> Iterator[tuple[Sample, Place]]:
        """Lay documents end to end and cut: each sequence begins with the token that the last one had to predict.

        Args:
            documents: Places and texts.
            skip: Tokens of the first document that are behind us.

        Yields:
            A sequence, and the place at which the next one begins.
        """
        waiting: deque[tuple[Place, np.ndarray]] = deque()
        tokens = 0
        for place, _, ids in encode_documents(documents, self.tokenizer, self.workers):
            whole = np.append(ids, self.end_of_text).astype(np.int64)
            waiting.append((replace(place, token=skip), whole[skip:]))
            tokens += len(whole) - skip
            skip = 0
            while tokens > self.length:
                sample = self._take(waiting)
                yield sample, waiting[0][0]
                tokens -= self.length

    def _take(self, waiting: deque[tuple[Place, np.ndarray]]) -> Sample:
        """The sequence at the front of what waits, of which all but the last token are taken away."""
        parts: list[np.ndarray] = []
        left = self.length
        while left:
            place, ids = waiting.popleft()
            parts.append(ids[:left])
            left -= len(parts[-1])
            if len(parts[-1]) < len(ids):
                waiting.appendleft((replace(place, token=place.token + len(parts[-1])), ids[len(parts[-1]) :]))
        return Sample(np.concatenate([*parts, waiting[0][1][:1]]), tuple(map(len, parts)))


class Blend:
    """One stream of training sequences from one or several texts, which knows where it stands."""

    def __init__(
        self,
        texts: Sequence[RawText],
        weights: Sequence[float],
        packing: Packing,
        *,
        shard: int,
        shards: int,
        block_bytes: int,
        seed: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin, or go on.

        Args:
            texts: What to read.
            weights: The share of the sequences that each text gives; together 1.
            packing: How documents become sequences.
            shard: Which stream of each text, from 0.
            shards: How many there are.
            block_bytes: See `RawText.training`.
            seed: See `RawText.training`.
            state: What `state` said; None to begin.
        """
        self._weights = weights
        self._taken = list(state["taken"]) if state else [0] * len(texts)
        self._places = [Place.from_dict(place) for place in state["places"]] if state else [Place()] * len(texts)
        self._streams = [
            packing.samples(
                text.training(place, shard=shard, shards=shards, block_bytes=block_bytes, seed=seed), place.token
            )
            for text, place in zip(texts, self._places, strict=True)
        ]

    @property
    def state(self) -> dict[str, Any]:
        """Sequences taken from each text, and where each stands."""
        return {"taken": list(self._taken), "places": [place.as_dict() for place in self._places]}

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        source = most_behind(self._taken, self._weights)
        sample, self._places[source] = next(self._streams[source])
        self._taken[source] += 1
        return replace(sample, source=source)


def most_behind(taken: Sequence[int], weights: Sequence[float]) -> int:
    """The source that has given least of its share, were it one sequence further on; Megatron's rule for blends."""
    further = max(1, sum(taken))
    return max(range(len(taken)), key=lambda source: (weights[source] * further - taken[source], -source))


def held_out_samples(texts: Sequence[RawText], weights: Sequence[float], packing: Packing, number: int) -> list[Sample]:
    """Sequences to evaluate on: of each text the first ones that are held out, again from the first after the last.

    Raises:
        FileError: If a text holds out too little for one sequence.
    """
    order, taken = [], [0] * len(texts)
    for _ in range(number):
        order.append(most_behind(taken, weights))
        taken[order[-1]] += 1
    of_text = []
    for source, (text, wanted) in enumerate(zip(texts, taken, strict=True)):
        documents = ((Place(), document) for document in text.held_out())
        found = [replace(sample, source=source) for sample, _ in itertools.islice(packing.samples(documents), wanted)]
        if wanted and not found:
            problem = f"{text.path}: the held-out documents have fewer tokens than a sequence of {packing.length}"
            raise FileError(f"{problem}; use more text, a larger --text-valid-fraction, or a shorter --seq-length")
        of_text.append(itertools.cycle(found))
    return [next(of_text[source]) for source in order]
