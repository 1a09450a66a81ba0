"""What a Composite gains in training at any sequence length, from where the time of measured steps went.

Of a token's time, attention's part grows with the keys that a query sees, (L + 1) / 2 in the mean at length L; its
passes over memory and the rest stay. With a line f + g · (L + 1) through attention's seconds a token, as measured at
one length (then f = 0) or several, and the mean rest r:

    T(L) = r + f + g · (L + 1)          gain(L) = T of Llama / T of the Composite

A Composite has fewer attention blocks and slightly more to multiply: short of some length it loses, far beyond it gains
the ratio of the slopes. The faster attention is beside the rest, the greater is the length for the same gain. From a
single length the gain at others comes out too great: kernels reach less of their peak at short ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from composer_megatron.bench.report import Row, comparable


@dataclass(frozen=True)
class TokenTime:
    """Seconds a token, by sequence length.

    Attributes:
        rest: Of everything but attention, idling included.
        fixed: Of attention, at any length.
        slope: Of attention, for each token of length, and one.
    """

    rest: float
    fixed: float
    slope: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> TokenTime:
        """From rows of the training benchmark with breakdowns, each at another length."""
        spans = [row["seq_len"] + 1 for row in rows]
        attention = [row["breakdown"].get("attention", 0.0) / _tokens(row) for row in rows]
        rest = statistics.fmean(1 / row["tokens_per_second"] - some for row, some in zip(rows, attention, strict=True))
        if len(rows) == 1:
            return cls(rest, 0.0, attention[0] / spans[0])
        slope, fixed = statistics.linear_regression(spans, attention)
        return cls(rest, fixed, slope)

    def attention(self, seq_len: float) -> float:
        """Attention's part at that length."""
        return self.fixed + self.slope * (seq_len + 1)

    def at(self, seq_len: float) -> float:
        """The whole at that length."""
        return self.rest + self.attention(seq_len)

    def share(self, seq_len: float) -> float:
        """Attention's share at that length."""
        return self.attention(seq_len) / self.at(seq_len)


@dataclass(frozen=True)
class Gain:
    """A Composite beside Llama on the same backend, measured in one run.

    Attributes:
        shape: Its name.
        model: The Composite's name.
        backend: Of both.
        gpu: Of both.
        lengths: Where their parts were measured, in order.
        llama: Llama's time.
        composite: The Composite's.
    """

    shape: str
    model: str
    backend: str
    gpu: str
    lengths: tuple[int, ...]
    llama: TokenTime
    composite: TokenTime

    @property
    def name(self) -> str:
        """For legends."""
        return f"{self.shape} {self.model}, {self.backend}, {self.gpu}"

    def at(self, seq_len: float) -> float:
        """Tokens/s over Llama's at that length."""
        return self.llama.at(seq_len) / self.composite.at(seq_len)

    @property
    def limit(self) -> float:
        """The gain that long sequences tend to; infinite without attention."""
        return self.llama.slope / self.composite.slope if self.composite.slope else float("inf")

    def length_of(self, gain: float) -> float | None:
        """The length from which on it is so much; None where no length is long enough, 1 where every one is."""
        missing = gain * (self.composite.rest + self.composite.fixed) - (self.llama.rest + self.llama.fixed)
        each = self.llama.slope - gain * self.composite.slope
        return max(1.0, missing / each - 1) if each > 0 else None

    def says(self, gain: float = 1.25) -> str:
        """In a sentence: attention's shares, and where the gain is reached."""
        shortest = self.lengths[0]
        shares = f"{self.llama.share(shortest):.0%} of Llama's time and {self.composite.share(shortest):.0%} of the "
        length = self.length_of(gain)
        reached = "at no length" if length is None else f"from {length:,.0f} tokens on"
        *others, last = (f"{some:,}" for some in self.lengths)
        measured = f"{', '.join(others)} and {last}" if others else last
        return (
            f"{self.name}: attention took {shares}Composite's at {shortest:,} tokens. By the steps measured at "
            f"{measured} tokens x{gain:.2f} is reached {reached}, and x{self.limit:.2f} is the limit."
        )


def gains(rows: Sequence[Row]) -> list[Gain]:
    """For each shape, Composite, backend and GPU that was profiled beside Llama.

    Where a length was measured more than once, the run of the fastest Composite counts, as in the README.

    Args:
        rows: Of the training benchmark, each with its ``source``.
    """
    pairs: dict[tuple[str, str, str, str], dict[int, tuple[Row, Row]]] = {}
    for row in filter(_told, rows):
        llama = None if row["model"] == "llama" else _llama_beside(row, rows)
        if llama is not None:
            of_key = pairs.setdefault((row["shape"], row["model"], row["backend"], row["source"].gpu), {})
            _, known = of_key.get(row["seq_len"], (None, None))
            if known is None or row["tokens_per_second"] > known["tokens_per_second"]:
                of_key[row["seq_len"]] = (llama, row)
    found = []
    for key, by_length in pairs.items():
        lengths = tuple(sorted(by_length))
        sides = zip(*(by_length[length] for length in lengths), strict=True)
        llama_time, composite_time = (TokenTime.of(side) for side in sides)
        found.append(Gain(*key, lengths, llama_time, composite_time))
    return found


def at_ceilings(row: Row, rows: Iterable[Row]) -> float | None:
    """A Composite's gain at this GPU's ceilings, where both rows say what their parts would take."""
    llama = _llama_beside(row, rows)
    if llama is None or row.get("unfair") or not row.get("ideal") or not llama.get("ideal"):
        return None
    return float(sum(llama["ideal"].values()) / sum(row["ideal"].values()))


def _tokens(row: Row) -> int:
    return int(row["seq_len"] * row["micro_batch"] * row["micro_batches"])


def _told(row: Row) -> bool:
    return bool(row.get("breakdown")) and comparable(row)


def _llama_beside(row: Row, rows: Iterable[Row]) -> Row | None:
    """Llama on the same backend at the same length in the same file."""
    same = ("backend", "seq_len", "shape", "source")
    beside = (each for each in rows if each["model"] == "llama" and all(each[name] == row[name] for name in same))
    return next(filter(_told, beside), None)
