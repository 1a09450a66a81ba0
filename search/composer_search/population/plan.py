"""What a row costs, in bytes and FLOPs, and how many rows fit on a device at once."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence

import torch

from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import Widths
from composer_search.population.feed import Row
from composer_search.population.model import ONE_HOT_VOCABULARY
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


def row_parameters(row: Row, widths: Widths) -> int:
    """The weights of a row, embedding and head included."""
    hidden, vocab_size = widths.hidden_size, row.data.vocab_size
    attention = hidden * (3 * hidden + 3) + hidden * (hidden + 1) + hidden
    mlp = 3 * hidden * widths.ffn_hidden_size + hidden
    head = 2 * vocab_size * hidden + vocab_size + hidden
    decoder = 2 * (hidden * hidden + 2 * hidden) if row.data.autoencoder else 0
    return row.sequence.count("A") * attention + row.sequence.count("M") * mlp + head + decoder


def row_bytes(row: Row, settings: TrainSettings, *, recorded: bool = False) -> int:
    """The memory that a row takes at most while it trains and is judged, an upper estimate.

    Weights, best weights and two moments stay; a step adds gradients, the optimizer's intermediates, what the forward
    pass keeps for the backward pass, and the largest intermediates of both. The data, which rows share, do not count.

    Args:
        row: The row.
        settings: Its widths, batch and precision.
        recorded: Whether steps are replayed as a CUDA graph, which keeps its memory while rows are judged.
    """
    wide = settings.weight_dtype.itemsize
    weights = row_parameters(row, settings.widths) * wide
    trained = min(settings.batch_size, len(row.data.train[0])) * row.data.train[0].shape[1]
    judged = judged_at_once(settings) * max(split[0].shape[1] for split in (row.data.validation, row.data.test))
    passing = _passing(row, settings)
    step, judging = trained * (_kept(row, settings) + passing), judged * passing
    return 8 * weights + (step + judging if recorded else max(step, judging))


def judged_at_once(settings: TrainSettings) -> int:
    """Sequences of a row that are judged in one pass, which keeps nothing for a backward pass."""
    return max(settings.batch_size, 64)


def _kept(row: Row, settings: TrainSettings) -> int:
    """Bytes that a training token keeps until the backward pass.

    A block keeps its input, the norm of it and: an A, queries, keys and values before and after the rotation, the
    mixture and the sums of its weights; an M, both halves, the activation and the product.
    """
    wide, narrow = _widths_of_numbers(settings)
    hidden, inner = settings.widths.hidden_size, settings.widths.ffn_hidden_size
    block = hidden * (wide + narrow)
    attention = block + narrow * 6 * hidden + 4 * settings.widths.num_heads
    mlp = block + narrow * 4 * inner
    vocab_size = row.data.vocab_size
    one_hot = vocab_size if vocab_size <= ONE_HOT_VOCABULARY else 0
    head = block + wide * (vocab_size + one_hot) + 4 * 8  # log-probabilities; tokens, targets and copies are int64
    decoder = 2 * (block + narrow * hidden) if row.data.autoencoder else 0
    return row.sequence.count("A") * attention + row.sequence.count("M") * mlp + head + decoder


def _passing(row: Row, settings: TrainSettings) -> int:
    """Bytes of a token's largest intermediates: gradients within one block, or the logits."""
    wide, narrow = _widths_of_numbers(settings)
    hidden, inner = settings.widths.hidden_size, settings.widths.ffn_hidden_size
    block = max(7 * hidden if "A" in row.sequence.letters else 0, 4 * inner if "M" in row.sequence.letters else 0)
    return 4 * hidden * wide + max(block * narrow, row.data.vocab_size * (2 * wide + narrow))


def _widths_of_numbers(settings: TrainSettings) -> tuple[int, int]:
    """Bytes of a number of the residual stream and of one between matrix products."""
    wide = settings.weight_dtype.itemsize
    return wide, 2 if settings.precision == "bfloat16" else wide


def free_bytes(device: torch.device) -> int:
    """What a population may allocate on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE_OF_GPU * (free + cached))
    return int(SHARE_OF_RAM * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def rows_at_once(rows: Sequence[Row], settings: TrainSettings, device: torch.device) -> int:
    """How many of these rows, all of one kind, are worth training at once and fit; at least one."""
    batch = min(settings.batch_size, len(rows[0].data.train[0]))
    if device.type == "cpu" and batch * rows[0].data.train[0].shape[1] > WORTHWHILE_TOKENS:
        return 1
    most = ROWS_ON_CPU if device.type == "cpu" else max(1, GRID_LIMIT // max(batch, judged_at_once(settings)))
    largest = max(row_bytes(row, settings, recorded=device.type == "cuda") for row in rows)
    return max(1, min(most, len(rows), free_bytes(device) // largest))


def chunks(number: int, at_once: int) -> list[range]:
    """`number` rows in as few spans of at most `at_once` as will do, as even as they can be."""
    spans = math.ceil(number / at_once)
    edges = [number * span // spans for span in range(spans + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]
