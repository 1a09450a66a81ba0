"""The space of a search: which sequences there are to try, and their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from composer_megatron.errors import UsageError
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence


@dataclass(frozen=True)
class Space:
    """All sequences of `length` blocks over `primitives` that begin with `prefix` and end with `suffix`.

    Attributes:
        primitives: Their letters, each once.
        length: Blocks of a sequence, the fixed ones among them.
        prefix: Letters of the first blocks, which are fixed.
        suffix: Letters of the last blocks, which are fixed.
    """

    primitives: str
    length: int
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        """Raise a `UsageError` for a space of nothing, or of primitives that there are not."""
        if not self.primitives or len(set(self.primitives)) < len(self.primitives):
            raise UsageError(f"primitives={self.primitives!r}; expected different letters, such as 'AM'")
        for letter in self.primitives:
            if letter not in PRIMITIVES:
                raise UsageError(
                    f"primitives={self.primitives!r}: unknown {letter!r}; known are {', '.join(PRIMITIVES)}"
                )
        if self.length < 1:
            raise UsageError(f"length={self.length}; expected at least 1 block")
        if self.free < 1:
            fixed = f"prefix={self.prefix!r} and suffix={self.suffix!r}"
            raise UsageError(f"length={self.length}; expected more blocks than {fixed} fix")

    @property
    def free(self) -> int:
        """Blocks that are not fixed."""
        return self.length - len(self.prefix) - len(self.suffix)

    @property
    def size(self) -> int:
        """How many sequences there are."""
        return len(self.primitives) ** self.free

    def join(self, letters: str) -> CompositeSequence:
        """The sequence whose free blocks are `letters`."""
        return CompositeSequence(self.prefix + letters + self.suffix)

    def free_letters(self, sequence: CompositeSequence) -> str:
        """The inverse of `join`."""
        return sequence.letters[len(self.prefix) : len(self.prefix) + self.free]

    def at(self, rank: int) -> CompositeSequence:
        """The sequence of that rank in [0, size): its free letters are its digits, the first the highest."""
        letters = ""
        for _ in range(self.free):
            rank, digit = divmod(rank, len(self.primitives))
            letters = self.primitives[digit] + letters
        return self.join(letters)

    def rank(self, sequence: CompositeSequence) -> int:
        """The inverse of `at`."""
        rank = 0
        for letter in self.free_letters(sequence):
            rank = rank * len(self.primitives) + self.primitives.index(letter)
        return rank

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; fixed blocks appear where there are any."""
        return {name: value for name, value in vars(self).items() if value != ""}

    def __contains__(self, sequence: CompositeSequence) -> bool:
        fixed = sequence.letters.startswith(self.prefix) and sequence.letters.endswith(self.suffix)
        return len(sequence) == self.length and fixed and set(self.free_letters(sequence)) <= set(self.primitives)

    def __str__(self) -> str:
        fixed = [f"{word} {letters}" for word, letters in (("after", self.prefix), ("before", self.suffix)) if letters]
        return " ".join([f"{self.length} blocks of {self.primitives}", *fixed])
