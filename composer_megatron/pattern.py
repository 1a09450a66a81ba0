"""Megatron-core's hybrid layer pattern: a sequence in its alphabet, with a bar between pipeline stages.

Our letters never reach Megatron: its ``M`` is a Mamba block. Nothing here needs Megatron.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from composer_megatron.block_config import check_together
from composer_megatron.errors import UsageError
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence

STAGE_SEPARATOR = "|"
"""Stands between pipeline stages in a hybrid layer pattern."""


def hybrid_pattern(sequence: CompositeSequence, stages: Sequence[int] | None = None) -> str:
    """The sequence in Megatron-core's alphabet, cut into pipeline stages.

    >>> hybrid_pattern(CompositeSequence.parse("2A4M2A"), [4, 4])
    '**--|--**'

    Args:
        sequence: The blocks.
        stages: Blocks in each stage, in order; None for one stage. Interleaved schedules have more stages than ranks:
            stage i then belongs to rank i modulo the pipeline size.

    Raises:
        UsageError: If the stages' blocks are not those of the sequence, or Megatron-core refuses two of its primitives
            in one model.
    """
    check_together(sequence.letters)
    letters = "".join(PRIMITIVES[letter].megatron_symbol for letter in sequence)
    counts = [len(letters)] if stages is None else list(stages)
    if any(count < 0 for count in counts) or sum(counts) != len(letters):
        raise UsageError(f"stages of {counts} blocks; expected whole numbers that sum to {len(letters)} for {sequence}")
    ends = itertools.accumulate(counts)
    return STAGE_SEPARATOR.join(letters[end - count : end] for count, end in zip(counts, ends, strict=True))
