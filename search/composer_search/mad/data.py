"""Data sets of the MAD tasks: reproducible from one seed, with no sequence in two parts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence

from composer_megatron.errors import UsageError
from composer_search.mad.base import Pair, Sampler, Tokens
from composer_search.mad.tasks import Value, find_task

GENERATOR_VERSION = 1
"""Raised whenever a seed comes to mean other sequences; part of every key."""

_CHUNK = 256
"""Sequences drawn at a time, each chunk from a stream of its own."""


def dataset(task: str, n_train: int, n_test: int, seed: int, *, n_valid: int = 0, **settings: Value) -> dict[str, Pair]:
    """Generate a data set.

    The arrays depend on the arguments alone. Different seeds, tasks and settings give independent streams. The numbers
    of sequences do not enter there, so that a small training set is the beginning of a larger one.

    No sequence of a part occurs in a part before it, in the order train, valid, test: such a draw is thrown away and
    replaced. That holds for every task. (For memorization the map from keys to values is one throughout, by design:
    the test asks for the facts that were trained, in other sequences.) Within a part, sequences may repeat by chance.

    Args:
        task: A name of `TASKS` or `PROXIES`.
        n_train: Training sequences.
        n_test: Test sequences.
        seed: A whole number of at least 0.
        n_valid: Validation sequences, with targets like the test's, so that nothing need be chosen on the test set.
        **settings: The task's settings, which are the fields of its sampler; the baseline holds for the rest.

    Returns:
        ``train``, ``valid`` if asked for, and ``test``: each inputs and targets, int64 [n, length]. Targets of -100 are
        not scored. Where a task asks for longer sequences than it trains on, so are ``valid`` and ``test``.

    Raises:
        UsageError: For an unknown task or setting, an impossible value, or settings with so few different sequences
            that the parts cannot be disjoint.

    >>> inputs, targets = dataset("in-context-recall", 256, 64, seed=0, vocab_size=32)["test"]
    >>> inputs.shape, targets.shape
    ((64, 127), (64, 127))
    """
    return Request.of(task, n_train, n_test, seed, n_valid=n_valid, **settings).generate()


@dataclass(frozen=True)
class Request:
    """What determines a data set; the arguments of `dataset`, checked."""

    sampler: Sampler
    seed: int
    n_train: int
    n_valid: int
    n_test: int

    @classmethod
    def of(cls, task: str, n_train: int, n_test: int, seed: int, *, n_valid: int = 0, **settings: Value) -> Request:
        """Check the arguments; see `dataset`."""
        return cls(
            sampler=find_task(task).at(**settings),
            seed=_whole("seed", seed, least=0),
            n_train=_whole("n_train", n_train, least=1),
            n_valid=_whole("n_valid", n_valid, least=0),
            n_test=_whole("n_test", n_test, least=1),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Sequences of each part that there is, in order."""
        counts = {"train": self.n_train, "valid": self.n_valid, "test": self.n_test}
        return {part: number for part, number in counts.items() if number}

    @property
    def stream_key(self) -> str:
        """Everything that the sequences depend on, except how many are taken."""
        return json.dumps([GENERATOR_VERSION, self.sampler.task, self.seed, dataclasses.asdict(self.sampler)])

    @property
    def key(self) -> str:
        """Everything that the arrays depend on."""
        return json.dumps([self.stream_key, self.counts])

    def generate(self) -> dict[str, Pair]:
        """Draw the parts."""
        parts: dict[str, Pair] = {}
        seen: set[bytes] = set()
        for part, number in self.counts.items():
            parts[part] = self._take_unseen(part, number, seen)
            seen.update(self._as_bytes(parts[part][0]))
        return parts

    def _take_unseen(self, part: str, number: int, seen: set[bytes]) -> Pair:
        """The first sequences of the part's stream that are not in `seen`."""
        taken: list[Pair] = []
        found = drawn = 0
        for inputs, targets in self._stream(part):
            new = [index for index, row in enumerate(self._as_bytes(inputs)) if row not in seen][: number - found]
            taken.append((inputs[new], targets[new]))
            found, drawn = found + len(new), drawn + _CHUNK
            if found == number:
                break
            if drawn >= 4096 and found < drawn // 100:
                raise self._too_few(part, drawn, drawn - found)
        return np.concatenate([inputs for inputs, _ in taken]), np.concatenate([targets for _, targets in taken])

    def _stream(self, part: str) -> Iterator[Pair]:
        """Endless sequences of a part, `_CHUNK` at a time."""
        common = SeedSequence(_entropy(json.dumps([GENERATOR_VERSION, self.sampler.task, self.seed])))
        split = ("train", "valid", "test").index(part)
        for chunk in count():
            own = SeedSequence(_entropy(self.stream_key), spawn_key=(split, chunk))
            rng, shared = Generator(PCG64(own)), Generator(PCG64(common))
            yield self.sampler.draw(rng, shared, _CHUNK, train=part == "train")

    def _as_bytes(self, inputs: Tokens) -> Iterator[bytes]:
        """Each sequence as a hashable value, as small as the vocabulary allows."""
        return map(bytes, inputs.astype(np.min_scalar_type(self.sampler.vocab_size - 1)))

    def _too_few(self, part: str, drawn: int, repeated: int) -> UsageError:
        sampler = self.sampler
        sizes = f"vocab_size={sampler.vocab_size}, seq_len={sampler.seq_len}"
        return UsageError(
            f"{sampler.task} with {sizes} has too few different sequences: {repeated:,} of {drawn:,} drawn for the "
            f"{part} set occur in the parts before it ({self.n_train:,} training sequences); raise vocab_size or "
            "seq_len, or ask for fewer sequences"
        )


def _whole(name: str, value: int, *, least: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name}={value!r}; expected a whole number of at least {least}")
    return int(value)


def _entropy(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest())
