"""Surgery: a Composite made of a trained model's blocks, copied, dropped and put in another order by a stated map.

Blocks are copied, never mixed: a block of attention (A, or W, which has the same weights and sees fewer tokens) comes
from a block of attention, an MLP from an MLP. Each kind is counted on its own, from 0 at the input, so that A3 and M3
are the two halves of a Llama's layer 3. A map says for each kind which blocks of the source the new ones are copied
from, in the order of the new ones::

    map   := rule | entry { " " entry }
    entry := ("A" | "M") ":" (rule | list)
    rule  := "even" | "depth"
    list  := item { "," item }
    item  := number | number "-" number

``depth`` takes blocks in order of depth, from the first on; ``even`` takes them evenly spaced, from the first to the
last, and some of them twice where there are more new ones. A kind that a map leaves out is taken evenly::

    graft(open_llama(Path("llama")), CompositeSequence.parse("2A4M2A4M"), "A:0-3 M:0-6,6")
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import NoReturn

from torch import Tensor

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.importing.conversion import Source
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence

KINDS = MappingProxyType({"A": "A", "W": "A", "M": "M"})
"""For each letter that can be grafted, the letter of its kind: blocks of a kind have the same weights."""

_ENTRY = re.compile(r"([A-Za-z]):(\S+)")
_ITEM = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True)
class BlockMap:
    """Where each block of a new sequence comes from.

    Attributes:
        sequence: The new sequence.
        source: The sequence of the model that gives the blocks.
        donors: For each new block, which block of its kind in the source, counted from 0.
    """

    sequence: CompositeSequence
    source: CompositeSequence
    donors: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The donors by kind and number, such as ``A3``."""
        return tuple(f"{KINDS[letter]}{donor}" for letter, donor in zip(self.sequence, self.donors, strict=True))

    @property
    def places(self) -> tuple[int, ...]:
        """For each new block, the donor's place among all blocks of the source."""
        found = _places(self.source)
        return tuple(found[KINDS[letter]][donor] for letter, donor in zip(self.sequence, self.donors, strict=True))

    @property
    def repeated(self) -> dict[str, int]:
        """Blocks of the source that are used more than once, and how often."""
        return {name: count for name, count in Counter(self.names).items() if count > 1}

    @property
    def dropped(self) -> tuple[str, ...]:
        """Blocks of the source that are not used, in its order."""
        used = set(self.names)
        names = [f"{kind}{number}" for kind, places in _places(self.source).items() for number in range(len(places))]
        return tuple(name for name in names if name not in used)

    def __str__(self) -> str:
        """The map in full, as `read_map` reads it: ``A:0-3 M:0,0,1``."""
        return " ".join(
            f"{kind}:{_as_list(self._of(kind))}" for kind in dict.fromkeys(KINDS.values()) if self._of(kind)
        )

    def _of(self, kind: str) -> list[int]:
        return [donor for letter, donor in zip(self.sequence, self.donors, strict=True) if KINDS[letter] == kind]


def read_map(text: str, sequence: CompositeSequence, source: CompositeSequence) -> BlockMap:
    """Read a map.

    Args:
        text: In the notation above.
        sequence: The new sequence.
        source: The sequence of the model that gives the blocks.

    Raises:
        UsageError: If the text is no map, names a block that the source does not have, says too many or too few, or
            the sequence has blocks that nothing can be copied to.
    """
    wanted, given = _places(sequence), _places(source)
    entries = _entries(text, [kind for kind, places in wanted.items() if places])
    for kind in entries:
        if not wanted.get(kind):
            _fail(text, f"{sequence} has no blocks of {kind}; leave {kind} out")
    chosen = {
        kind: iter(_choose(text, kind, entries.get(kind, "even"), len(places), len(given.get(kind, ()))))
        for kind, places in wanted.items()
        if places
    }
    return BlockMap(sequence, source, tuple(next(chosen[KINDS[letter]]) for letter in sequence))


def graft(source: Source, sequence: CompositeSequence, text: str = "even", window: int | None = None) -> Source:
    """A model of another sequence from the blocks of a trained one; embedding, final norm and output layer stay.

    Args:
        source: The trained model.
        sequence: The new sequence.
        text: Which block comes from where, as for `read_map`.
        window: Keys that a query of a W block sees; None for the shape's own.

    Returns:
        The new model; its architecture's origin says where each block comes from. Nothing is read yet.

    Raises:
        UsageError: As for `read_map`.
    """
    blocks = read_map(text, sequence, source.architecture.sequence)
    shape = source.architecture.shape
    if window is not None:
        if "W" not in sequence.letters:
            raise UsageError(f"window={window}, but {sequence} has no W block, which alone has a window")
        shape = dataclasses.replace(shape, window=window)
    before = source.architecture.origin
    origin = {key: value for key, value in before.items() if key == "dropped"} | {
        "method": "surgery",
        "source": before.get("source", shape.name),
        "source_sequence": str(source.architecture.sequence),
        "map": str(blocks),
        "blocks": list(blocks.names),
    }
    tensors = {name: read for name, read in source.tensors.items() if not name.startswith(_PREFIX)}
    for index, place in enumerate(blocks.places):
        tensors |= {f"{_PREFIX}{index}.{name}": read for name, read in _block(source, place).items()}
    return dataclasses.replace(source, architecture=Architecture(sequence, shape, origin), tensors=tensors)


_PREFIX = "decoder.layers."


def _block(source: Source, place: int) -> dict[str, Callable[[], Tensor]]:
    prefix = f"{_PREFIX}{place}."
    return {name.removeprefix(prefix): read for name, read in source.tensors.items() if name.startswith(prefix)}


def _places(sequence: CompositeSequence) -> dict[str, list[int]]:
    """For each kind, the places of its blocks."""
    for letter in sequence.counts:
        if letter not in KINDS:
            row = PRIMITIVES[letter]
            raise UsageError(f"{sequence}: {letter} ({row.name}) has weights that no block of a Llama has; use A, W, M")
    found: dict[str, list[int]] = {kind: [] for kind in KINDS.values()}
    for place, letter in enumerate(sequence):
        found[KINDS[letter]].append(place)
    return found


def _entries(text: str, kinds: list[str]) -> dict[str, str]:
    """What a map says of each kind, unread; a rule alone is said of all `kinds`."""
    if text.strip() in _RULES:
        return dict.fromkeys(kinds, text.strip())
    entries: dict[str, str] = {}
    for word in text.split():
        match = _ENTRY.fullmatch(word)
        if match is None or match[1] not in KINDS.values():
            _fail(text, f"{word!r} is no entry; expected {' or '.join(_RULES)}, or entries such as A:0-3 and M:0,0,1")
        if match[1] in entries:
            _fail(text, f"{match[1]} is given twice")
        entries[match[1]] = match[2]
    if not entries:
        _fail(text, f"it says nothing; expected {' or '.join(_RULES)}, or entries such as A:0-3 and M:0,0,1")
    return entries


def _choose(text: str, kind: str, value: str, wanted: int, given: int) -> list[int]:
    """The donors of one kind."""
    if not given:
        _fail(text, f"the source has no blocks of {kind}, the new sequence has {wanted}")
    if value in _RULES:
        if value == "depth" and wanted > given:
            _fail(text, f"depth gives {kind}0 to {kind}{given - 1}, the new sequence has {wanted}; use even or a list")
        return _RULES[value](wanted, given)
    donors = [number for item in value.split(",") for number in _numbers(text, kind, item, given)]
    if len(donors) != wanted:
        _fail(text, f"it gives {len(donors)} blocks of {kind}, the new sequence has {wanted}")
    return donors


def _numbers(text: str, kind: str, item: str, given: int) -> list[int]:
    """The numbers of one item; a range may go down."""
    match = _ITEM.fullmatch(item)
    if match is None:
        _fail(text, f"{item!r} is no number and no range such as 0-3")
    first, last = int(match[1]), int(match[2] or match[1])
    if max(first, last) >= given:
        known = f"{kind}0 to {kind}{given - 1}" if given > 1 else f"{kind}0 alone"
        _fail(text, f"the source has no {kind}{max(first, last)}; its blocks of that kind are {known}")
    return list(range(first, last + 1)) if first <= last else list(range(first, last - 1, -1))


def _even(wanted: int, given: int) -> list[int]:
    """From the first to the last, evenly; halves are rounded down. One block alone is the first."""
    if wanted == 1:
        return [0]
    half = Fraction(1, 2)
    return [math.ceil(Fraction(index * (given - 1), wanted - 1) - half) for index in range(wanted)]


def _depth(wanted: int, given: int) -> list[int]:
    """From the first on."""
    return list(range(wanted))


_RULES = MappingProxyType({"even": _even, "depth": _depth})
"""Maps with a name: donors from how many blocks are wanted, and how many there are."""


def _as_list(numbers: list[int]) -> str:
    """Numbers as `_numbers` reads them, neighbours in a range."""
    items: list[list[int]] = []
    for number in numbers:
        if items and number == items[-1][-1] + 1:
            items[-1].append(number)
        else:
            items.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in items)


def _fail(text: str, problem: str) -> NoReturn:
    raise UsageError(f"map {text!r}: {problem}")
