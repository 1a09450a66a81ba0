"""The grammar of Composite sequences: text such as ``2A4M`` to an immutable `CompositeSequence` and back.

    sequence := item { ["+"] item }
    item     := [count] letter | "(" sequence ")" ["x" count]
    count    := digits, at least 1
    letter   := a primitive's letter (`composer_megatron.primitives`)

Spaces between tokens mean nothing. ``2A4M``, ``2A+4M``, ``AAMMMM`` and ``(AMM)x2`` are all sequences of six blocks; the
last one has another order. Digits bind to the left: after ``(2A)x2`` write ``+1A``, not ``1A``.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from composer_megatron.errors import SequenceError
from composer_megatron.primitives import PRIMITIVES

MAX_BLOCKS = 100_000
"""Longest sequence accepted: far beyond any model, short enough that a slip of the finger fails at once."""


class Run(NamedTuple):
    """Equal neighbouring blocks: the letter and how many."""

    symbol: str
    length: int


@dataclass(frozen=True, slots=True)
class CompositeSequence:
    """An ordered list of primitives, hashable, equal when its blocks are equal.

    >>> sequence = CompositeSequence.parse("2A+4M")
    >>> str(sequence), sequence.letters, len(sequence), sequence.counts
    ('2A4M', 'AAMMMM', 6, {'A': 2, 'M': 4})
    """

    letters: str

    def __post_init__(self) -> None:
        """Refuse what no grammar text could have produced."""
        if not self.letters:
            raise SequenceError("", 0, "the sequence is empty", "at least one block, such as 2A4M")
        for position, letter in enumerate(self.letters):
            if letter not in PRIMITIVES:
                raise SequenceError(self.letters, position, f"unknown primitive {letter!r}", _known())

    @classmethod
    def parse(cls, text: str) -> CompositeSequence:
        """Read a sequence.

        Raises:
            SequenceError: With the text, the position and what was expected there.
        """
        return cls(_Parser(text).parse())

    @classmethod
    def from_runs(cls, runs: Iterable[tuple[str, int]]) -> CompositeSequence:
        """The sequence of the given (letter, length) runs, in order; equal neighbours merge."""
        return cls("".join(symbol * length for symbol, length in runs))

    @property
    def runs(self) -> tuple[Run, ...]:
        """Maximal groups of equal neighbours, in order: the paper's groups {(p_g, h_g)}."""
        return tuple(Run(symbol, sum(1 for _ in group)) for symbol, group in itertools.groupby(self.letters))

    @property
    def counts(self) -> dict[str, int]:
        """Blocks of each primitive that occurs, in the primitives' order."""
        found = Counter(self.letters)
        return {symbol: found[symbol] for symbol in PRIMITIVES if symbol in found}

    @property
    def ratio(self) -> dict[str, int]:
        """`counts` in lowest terms: ``{'A': 1, 'M': 2}`` for 8A16M."""
        divisor = math.gcd(*self.counts.values())
        return {symbol: count // divisor for symbol, count in self.counts.items()}

    def count(self, symbol: str) -> int:
        """Blocks of one primitive; 0 when it does not occur."""
        return self.letters.count(symbol)

    def format(self, separator: str = "") -> str:
        """The runs as text, ``2A4M``, or with a separator, ``2A+4M``. `parse` reads both back."""
        return separator.join(f"{length}{symbol}" for symbol, length in self.runs)

    @property
    def notation(self) -> str:
        """The shortest text that `parse` reads: a long repetition by its period, ``(AM)x16`` for sixteen pairs."""
        plain = self.format()
        period = (self.letters * 2).index(self.letters, 1)
        if period == len(self.letters) or len(plain) <= len("1A2M3A4M5A6M"):
            return plain
        unit = min(CompositeSequence(self.letters[:period]).format(), self.letters[:period], key=len)
        return min(plain, f"({unit})x{len(self.letters) // period}", key=len)

    def __str__(self) -> str:
        return self.format()

    def __len__(self) -> int:
        return len(self.letters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.letters)

    def __getitem__(self, index: int) -> str:
        return self.letters[index]

    def __add__(self, other: CompositeSequence) -> CompositeSequence:
        return CompositeSequence(self.letters + other.letters)

    def __mul__(self, times: int) -> CompositeSequence:
        return CompositeSequence(self.letters * times)


def _known() -> str:
    return "one of " + ", ".join(f"{row.symbol} ({row.name})" for row in PRIMITIVES.values())


class _Parser:
    """One scan from left to right; `position` is where the next token starts."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

    def parse(self) -> str:
        if not self.text.strip():
            raise SequenceError(self.text, 0, "the sequence is empty", "at least one block, such as 2A4M")
        letters = self._sequence(depth=0)
        if self._peek():  # only a closing bracket stops a sequence early
            raise self._error("')' closes nothing", "a '(' before it, or no ')'")
        return letters

    def _sequence(self, depth: int) -> str:
        letters = self._item(depth)
        while (following := self._peek()) and following != ")":
            if following == "+":
                self.position += 1
            letters += self._item(depth)
            self._check_length(len(letters))
        return letters

    def _item(self, depth: int) -> str:
        if self._peek() == "(":
            return self._group(depth)
        count = self._count() if self._peek().isdecimal() else 1
        letter = self._peek()
        if letter not in PRIMITIVES or not letter:
            raise self._error(*self._no_letter(letter, depth))
        self._check_length(count)
        self.position += 1
        return letter * count

    def _group(self, depth: int) -> str:
        opened = self.position
        if depth >= 50:
            raise self._error("brackets nested more than 50 deep", "a flatter sequence")
        self.position += 1
        letters = self._sequence(depth + 1)
        if self._peek() != ")":
            raise SequenceError(self.text, opened, "'(' is never closed", "a ')' after it")
        self.position += 1
        if self._peek() != "x":
            return letters
        self.position += 1
        if not self._peek().isdecimal():
            raise self._error("no count after 'x'", "a whole number, as in (2A4M)x4")
        times = self._count()
        self._check_length(len(letters) * times)
        return letters * times

    def _count(self) -> int:
        start = self.position
        while self.position < len(self.text) and self.text[self.position].isdecimal():
            self.position += 1
        digits = self.text[start : self.position]
        if not digits.strip("0"):
            raise SequenceError(self.text, start, f"the count is {digits}", "a count of at least 1")
        if len(digits) > 9:
            raise SequenceError(self.text, start, "the count is huge", f"at most {MAX_BLOCKS} blocks in all")
        return int(digits)

    def _no_letter(self, found: str, depth: int) -> tuple[str, str]:
        if not found:
            return "the text ends", "a block, " + _known()
        if found == ")":
            return ("nothing before ')'", "a block, " + _known()) if depth else ("')' closes nothing", "no ')'")
        if found.upper() in PRIMITIVES:
            return f"unknown primitive {found!r}", f"{found.upper()!r} in upper case"
        return f"unknown primitive {found!r}" if found.isalpha() else f"unexpected {found!r}", _known()

    def _check_length(self, blocks: int) -> None:
        if blocks > MAX_BLOCKS:
            raise self._error(f"{blocks} blocks", f"at most {MAX_BLOCKS} blocks in all")

    def _peek(self) -> str:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        return self.text[self.position : self.position + 1]

    def _error(self, problem: str, expected: str) -> SequenceError:
        return SequenceError(self.text, self.position, problem, expected)
