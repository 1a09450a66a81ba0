"""Extrapolation: grow a small sequence to the size of a target, by stacking or by stretching it (arXiv 2510.00379).

"Size" is the elements of the blocks' weight matrices, without norms and embeddings; with that reading the paper's
layer counts come out exactly. All arithmetic is on integers and fractions, since a float floor can drop a copy where
the sizes divide evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil
from typing import Literal

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

Method = Literal["stack", "stretch"]
Match = Literal["paper", "parameters"]


def stretch(sequence: CompositeSequence, scale: Fraction) -> CompositeSequence:
    """Lengthen every run {(p_g, h_g)} to ceil(scale · h_g): ``2A4M`` at 3/2 becomes ``3A6M``."""
    return CompositeSequence.from_runs((run.symbol, ceil(scale * run.length)) for run in sequence.runs)


def stack(sequence: CompositeSequence, scale: Fraction) -> CompositeSequence:
    """Repeat the sequence floor(scale) times and end with a copy stretched by the fraction that is left."""
    copies, rest = divmod(scale, 1)
    letters = sequence.letters * int(copies)
    if rest:
        letters += stretch(sequence, rest).letters
    return CompositeSequence(letters)


_GROW: dict[Method, Callable[[CompositeSequence, Fraction], CompositeSequence]] = {"stack": stack, "stretch": stretch}


def extrapolate(
    sequence: CompositeSequence, shape: Shape, *, method: Method = "stack", match: Match = "paper"
) -> Architecture:
    """Grow `sequence` to the size of the shape's Llama-style baseline.

    Args:
        sequence: The small sequence that a search found.
        shape: The target widths; `Shape.baseline_pairs` sets the target size.
        method: ``stack`` suits short sequences, ``stretch`` those of 16 blocks and more; a stretched ``2A4M`` is all
            attention first.
        match: ``paper`` scales by target size over own size and rounds up as the paper does, so that the result can be
            up to a tenth bigger than the baseline. ``parameters`` takes, among the same method's results at every
            scale, the one closest to the baseline's size; of two as close, the smaller.

    Returns:
        The architecture, with `Architecture.origin` saying how it came about.

    Raises:
        UsageError: If method or match is unknown, or the sequence is already bigger than the target.
    """
    if method not in _GROW:
        raise UsageError(f"unknown method {method!r}; expected one of {', '.join(_GROW)}")
    if match not in ("paper", "parameters"):
        raise UsageError(f"unknown match {match!r}; expected 'paper' or 'parameters'")
    source = Architecture(sequence, shape)
    target = source.baseline().matrix_parameters
    scale = Fraction(target, source.matrix_parameters)
    if scale < 1:
        raise UsageError(
            f"{sequence} has {source.matrix_parameters:,} weights at shape {shape.name!r}, more than the "
            f"{target:,} of its baseline; search shorter sequences or choose a deeper shape"
        )
    if match == "paper":
        grown = _GROW[method](sequence, scale)
    else:
        grown = min(_grown_at_every_scale(sequence, scale, method), key=lambda each: _distance(each, shape, target))
    origin = {"method": method, "match": match, "from": str(sequence), "scale": str(scale)}
    return Architecture(grown, shape, origin)


def _grown_at_every_scale(sequence: CompositeSequence, scale: Fraction, method: Method) -> Iterator[CompositeSequence]:
    """Every different result at scales from 1 up to two beyond `scale`; past that all are bigger than needed.

    A result changes only where ``scale · h_g`` passes a whole number, that is at multiples of 1/h_g.
    """
    steps = {Fraction(n, run.length) for run in sequence.runs for n in range(run.length, ceil(scale + 2) * run.length)}
    for step in sorted(steps):
        yield _GROW[method](sequence, step)


def _distance(sequence: CompositeSequence, shape: Shape, target: int) -> tuple[int, int]:
    size = Architecture(sequence, shape).matrix_parameters
    return abs(size - target), size
