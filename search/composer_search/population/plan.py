"""What a row costs in FLOPs, and how many rows fit on a device at once."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence

import torch

from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import Widths
from composer_search.population.feed import Row
from composer_search.population.memory import judged_at_once, row_bytes
from composer_search.population.operations import fits_kernels
from composer_search.trainer import TrainSettings

WORTHWHILE_TOKENS = 512
"""Tokens a step of a row beyond which a CPU gains nothing from several rows at once: what is saved is the time that
each operation takes to begin."""

ROWS_ON_CPU = 64
"""Rows at once that a CPU gains anything from. So few that the memory does not decide and results do not hang on it."""

GRID_LIMIT = 65_535
"""Sequences of one attention call: more do not fit the second dimension of a CUDA grid."""

SHARE_OF_GPU, SHARE_OF_RAM = 0.85, 0.4
"""Of the free memory, what a population may take; the rest is for what the model of bytes does not know."""


def flops_per_token(sequence: CompositeSequence, widths: Widths, vocab_size: int, length: int) -> tuple[float, float]:
    """FLOPs of training on one token, forward and backward, a multiply-add counted as two.

    Args:
        sequence: The candidate.
        widths: Its widths.
        vocab_size: Width of the output layer.
        length: Length of the sequences.

    Returns:
        Of the products with weights, six for each weight; and of attention's two products, six for each pair of
        positions that it joins and each channel, causality used.
    """
    attention, mlp = sequence.count("A"), sequence.count("M")
    hidden = widths.hidden_size
    weights = attention * 4 * hidden**2 + mlp * 3 * hidden * widths.ffn_hidden_size + hidden * vocab_size
    return 6.0 * weights, 6.0 * attention * hidden * (length + 1)


def free_bytes(device: torch.device) -> int:
    """What a population may allocate on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE_OF_GPU * (free + cached))
    return int(SHARE_OF_RAM * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def rows_at_once(rows: Sequence[Row], settings: TrainSettings, device: torch.device, fused: bool | None = None) -> int:
    """How many of these rows, all of one kind, are worth training at once and fit; at least one.

    Args:
        rows: The rows.
        settings: What they share.
        device: Where they are trained.
        fused: Whether `composer_search.population.operations.Fused` computes them; without it, where it can.
    """
    batch = min(settings.batch_size, len(rows[0].data.train[0]))
    if device.type == "cpu" and batch * rows[0].data.train[0].shape[1] > WORTHWHILE_TOKENS:
        return 1
    most = ROWS_ON_CPU if device.type == "cpu" else max(1, GRID_LIMIT // max(batch, judged_at_once(settings)))
    fused = fits_kernels(device, settings) if fused is None else fused
    largest = max(row_bytes(row, settings, recorded=device.type == "cuda", fused=fused) for row in rows)
    return max(1, min(most, len(rows), free_bytes(device) // largest))


def chunks(number: int, at_once: int) -> list[range]:
    """`number` rows in as few spans of at most `at_once` as will do, as even as they can be."""
    spans = math.ceil(number / at_once)
    edges = [number * span // spans for span in range(spans + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]
