"""Which row runs which primitive at which depth, and in which order the rows lie there.

A population is one leading axis of rows. At each depth the rows that run the same primitive lie next to each other, so
that a group is a slice; between two depths the rows change places once. The weights of all blocks of one primitive lie
in one tensor, ordered by depth and then by place: what a group needs is a slice of it as well.

Where a task scores few positions, at the end of its sequences, the rows are aligned by their last attention: what comes
after it is needed at those positions alone, since only attention carries anything from one position to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from composer_megatron.sequence import CompositeSequence

ROW = "row"
"""The kind of the weights that each row has once: embedding, decoder, output layer. The other kinds are letters."""


@dataclass(frozen=True)
class Group:
    """The rows that run one primitive at one depth.

    Attributes:
        letter: The primitive.
        size: How many rows.
        first: Place of the first one's block among all blocks of that primitive.
    """

    letter: str
    size: int
    first: int


@dataclass(frozen=True)
class Depth:
    """One depth: the groups in the order in which their rows lie; rows that run nothing there come last.

    Attributes:
        groups: At least one.
        order: For each place after this depth, the place before; None where all stay.
    """

    groups: tuple[Group, ...]
    order: tuple[int, ...] | None

    def sizes(self, rows: int) -> list[int]:
        """Rows of each group and, where there are any, of none; `rows` in all."""
        sizes = [group.size for group in self.groups]
        idle = rows - sum(sizes)
        return [*sizes, idle] if idle else sizes


@dataclass(frozen=True)
class Layout:
    """The plan of a population.

    Attributes:
        sequences: One a row.
        start: The row at each place at depth 0; None where they lie in their own order.
        depths: From the first block to the last, after which rows lie in their own order.
        blocks: For each primitive, the (row, block of its sequence) of its blocks in the order of their weights.
        mixing: Where rows are aligned, the first depths, of which the last is all rows' last attention; else None.
    """

    sequences: tuple[CompositeSequence, ...]
    start: tuple[int, ...] | None
    depths: tuple[Depth, ...]
    blocks: dict[str, tuple[tuple[int, int], ...]]
    mixing: int | None = None

    @classmethod
    def of(cls, sequences: Sequence[CompositeSequence], *, aligned: bool = False) -> Layout:
        """Lay out rows of the given sequences, which may differ in length; `aligned` by their last attention or not."""
        mixing = [sequence.letters.rfind("A") + 1 for sequence in sequences]
        waits = [max(mixing) - own if aligned else 0 for own in mixing]
        runs = [" " * wait + sequence.letters for wait, sequence in zip(waits, sequences, strict=True)]
        own = list(range(len(sequences)))
        places, orders = own, [own]
        for depth in range(max(map(len, runs))):
            # a stable sort of the order before: rows that keep their company keep their places
            places = sorted(places, key=lambda row: _letter(runs[row], depth))
            orders.append(places)
        orders.append(own)
        blocks: dict[str, list[tuple[int, int]]] = {}
        depths = []
        for depth, here in enumerate(orders[1:-1]):
            groups = _groups(runs, waits, here, depth, blocks)
            depths.append(Depth(groups, _moves(here, orders[depth + 2])))
        ordered = {letter: tuple(of_letter) for letter, of_letter in blocks.items()}
        until = max(mixing) if aligned else None
        return cls(tuple(sequences), _moves(own, orders[1]), tuple(depths), ordered, until)

    def owners(self, kind: str) -> tuple[int, ...]:
        """The row that each weight of that kind belongs to, in the order of the weights."""
        return tuple(range(len(self.sequences))) if kind == ROW else tuple(row for row, _ in self.blocks[kind])

    def take(self, rows: Sequence[int]) -> tuple[Layout, dict[str, tuple[int, ...]]]:
        """The layout of some of the rows and, for each kind, where its weights were before."""
        taken = Layout.of([self.sequences[row] for row in rows], aligned=self.mixing is not None)
        sources = {ROW: tuple(rows)}
        for letter, blocks in taken.blocks.items():
            places = {block: place for place, block in enumerate(self.blocks[letter])}
            sources[letter] = tuple(places[rows[row], depth] for row, depth in blocks)
        return taken, sources


def _letter(run: str, depth: int) -> tuple[bool, str]:
    """Sorts by primitive, and rows that run nothing there last."""
    letter = run[depth : depth + 1].strip()
    return not letter, letter


def _groups(
    runs: Sequence[str], waits: Sequence[int], here: list[int], depth: int, blocks: dict[str, list[tuple[int, int]]]
) -> tuple[Group, ...]:
    """The groups of one depth; notes their blocks in `blocks`."""
    letters = [letter for row in here if (letter := runs[row][depth : depth + 1].strip())]
    groups = []
    for letter in dict.fromkeys(letters):
        of_letter = blocks.setdefault(letter, [])
        groups.append(Group(letter, letters.count(letter), len(of_letter)))
        of_letter += [(row, depth - waits[row]) for row, found in zip(here, letters, strict=False) if found == letter]
    return tuple(groups)


def _moves(before: list[int], after: list[int]) -> tuple[int, ...] | None:
    """For each place after, the place before; None where nothing moves."""
    places = {row: place for place, row in enumerate(before)}
    return None if before == after else tuple(places[row] for row in after)
