"""What the MAD tasks share: checked settings, the noise, and the helpers that keep the generators free of loops.

A task at given settings is a `Sampler`, a frozen dataclass whose fields are the settings and whose defaults are the
baseline of the MAD benchmark (arXiv 2403.17844). It draws many sequences at once.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from composer_megatron.errors import UsageError

IGNORE = -100
"""The target of a position that is not scored."""

MAX_SIZE = 2**17
"""Bound on every whole-number setting, above Llama 3's vocabulary: a slip of the finger fails at once."""

type Tokens = NDArray[np.int64]
type Mask = NDArray[np.bool_]
type Pair = tuple[Tokens, Tokens]
"""Inputs and targets, both [sequences, length]."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """One task at chosen settings; `draw` makes its sequences.

    Attributes:
        vocab_size: Tokens are in [0, vocab_size), special ones and noise included.
        seq_len: Length in tokens that the task is named by; `length` is the length of the arrays.
    """

    task: ClassVar[str]

    vocab_size: int
    seq_len: int

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind, then impossible combinations."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, self._typed(field.name, str(field.type), value))
        self.check()

    def _typed(self, name: str, kind: str, value: Any) -> int | float | bool:
        is_bool = isinstance(value, bool | np.bool_)
        if kind == "bool":
            if not is_bool:
                raise self.refusal(name, "expected True or False")
            return bool(value)
        if kind == "float":
            if is_bool or not isinstance(value, int | float | np.number):
                raise self.refusal(name, "expected a number")
            return float(value)
        least = 0 if name in ("noise_vocab_size", "test_seq_len") else 1
        if is_bool or not isinstance(value, int | np.integer) or not least <= value <= MAX_SIZE:
            raise self.refusal(name, f"expected a whole number from {least} to {MAX_SIZE}")
        return int(value)

    def refusal(self, name: str, why: str) -> UsageError:
        """The error for setting `name`, with its value and the reason."""
        return UsageError(f"{self.task}: {name}={getattr(self, name)!r}: {why}")

    @abstractmethod
    def check(self) -> None:
        """Raise a `UsageError` for settings that no sequence can have."""

    @property
    def length(self) -> int:
        """Second dimension of the training arrays."""
        return self.seq_len

    @property
    def scored_length(self) -> int:
        """Second dimension of the other arrays; longer where a task asks for more than training showed."""
        return self.length

    @abstractmethod
    def draw(self, rng: Generator, shared: Generator, n: int, *, train: bool) -> Pair:
        """Draw `n` sequences.

        Args:
            rng: Source of what differs between sequences.
            shared: Source of what all sequences of a data set have in common; in the same state at each call.
            n: How many.
            train: Training sequences and targets, else those that are scored.

        Returns:
            Inputs and targets, int64 [n, length], or [n, scored_length] where not `train`; targets are `IGNORE` where
            nothing is scored.
        """


@dataclass(frozen=True, kw_only=True)
class MadSampler(Sampler):
    """A task of MAD, which has a published generator.

    Attributes:
        reference_behaviour: Generate as the published code does (athms/mad-lab), defects included. Each sampler says
            what that changes.
    """

    reference_behaviour: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtrapolatingSampler(Sampler):
    """A task that can ask, once trained, for longer sequences than it trained on.

    Attributes:
        test_seq_len: Length of validation and test sequences; 0 for that of training.
    """

    test_seq_len: int = 0

    def size(self, *, train: bool) -> int:
        """Length of a sequence."""
        return self.seq_len if train or not self.test_seq_len else self.test_seq_len

    @property
    def scored_length(self) -> int:
        """Length of validation and test sequences."""
        return self.size(train=False)

    def check(self) -> None:
        """Longer means longer."""
        if self.test_seq_len and self.test_seq_len < self.seq_len:
            raise self.refusal("test_seq_len", f"expected 0, or at least seq_len={self.seq_len}")


@dataclass(frozen=True, kw_only=True)
class NoisySampler(MadSampler):
    """A task whose sequences can hold noise: tokens of a range of their own, between content and special tokens.

    Attributes:
        noise_vocab_size: Tokens of the vocabulary that are noise.
        frac_noise: Probability that a place holds noise, in [0, 1).
    """

    noise_vocab_size: int = 0
    frac_noise: float = 0.0

    @property
    @abstractmethod
    def num_specials(self) -> int:
        """Special tokens at the end of the vocabulary."""

    @property
    def num_content(self) -> int:
        """Tokens below this carry information; noise follows."""
        return self.vocab_size - self.num_specials - self.noise_vocab_size

    @property
    def num_keys(self) -> int:
        """Tokens below this are keys, the other content tokens are values, in tasks that have them."""
        return self.num_content // 2

    def check(self) -> None:
        """Check the vocabulary's split and the noise."""
        if self.num_content < 2:
            reserved = f"{self.num_specials} special and {self.noise_vocab_size} noise tokens"
            raise self.refusal("vocab_size", f"expected at least 2 tokens more than its {reserved}")
        if not 0 <= self.frac_noise < 1:
            raise self.refusal("frac_noise", "expected a fraction of at least 0 and below 1")
        if self.frac_noise and not self.noise_vocab_size:
            raise self.refusal("frac_noise", "noise needs tokens; give noise_vocab_size as well")

    def noise(self, rng: Generator, shape: tuple[int, ...]) -> Tokens:
        """Uniform noise tokens."""
        return rng.integers(self.num_content, self.num_content + self.noise_vocab_size, size=shape)

    def content_slots(self, rng: Generator, n: int, slots: int, protected: int) -> Mask:
        """Which slots hold content and no noise [n, slots]; one of the first `protected`, uniform, always does."""
        if not self.frac_noise:
            return np.ones((n, slots), bool)
        safe = rng.integers(protected, size=(n, 1))
        return (rng.random((n, slots)) >= self.frac_noise) | (np.arange(slots) == safe)


def first_occurrence(ids: Tokens) -> Tokens:
    """For each entry of `ids` [n, slots], the first slot of its row that holds the same id."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    starts = np.zeros_like(order)
    starts[:, 1:] = np.where(ordered[:, 1:] != ordered[:, :-1], np.arange(1, ids.shape[1]), 0)
    group = np.maximum.accumulate(starts, axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, group, axis=1), axis=1)
    return first


def next_token_pair(tokens: Tokens, scored: Mask, *, train: bool) -> Pair:
    """Inputs and targets of next-token prediction from whole sequences [n, length + 1].

    Training targets are the sequence shifted by one, every position scored, what cannot be known included; otherwise
    only the tokens in `scored` are, each at the position before it.
    """
    following = tokens[:, 1:]
    targets = following.copy() if train else np.where(scored[:, 1:], following, IGNORE)
    return tokens[:, :-1].copy(), targets
