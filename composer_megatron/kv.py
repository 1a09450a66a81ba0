"""What decoding keeps in memory, and how many requests fit: exact cache bytes, and an estimate of everything else.

The cache is counted exactly (`Architecture.kv_bytes_per_token`, `Architecture.state_bytes`). What a GPU needs besides
is weights, passes over prompts and over one token of each request, as PyTorch's allocator keeps them, a row of logits
and of tokens a request, and a round sum for CUDA; `fitting_batch` leaves that free. ``composer-megatron kv --check``
allocates and runs such batches on a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.inference.limits import PREFILL_TOKENS, SPARE

BYTES = 2
"""Of an element of weights, cache and activations: bf16."""

CUDA_BYTES = 1_000_000_000
"""Left for CUDA's context and kernels, 802 MB in processes on an H100 and on an H200 (`tests/composer/test_kv.py`),
two workspaces of cuBLAS of 32 MiB, for prompts and for steps, and tables.
"""


@dataclass(frozen=True)
class Keeping:
    """What one model keeps while it decodes.

    Attributes:
        shape: The shape's name.
        model: Llama, or how the Composite was grown.
        sequence: Its blocks.
        bytes_per_token: That a token of a request adds to the cache; of a window's blocks until it is full.
        ratio: The baseline's `bytes_per_token` over this; None where this is 0.
        batches: Requests that fit, by memory in bytes and then by tokens of a request.
    """

    shape: str
    model: str
    sequence: str
    bytes_per_token: int
    ratio: float | None
    batches: Mapping[int, Mapping[int, int]]


def keeping(model: str, architecture: Architecture, contexts: Sequence[int], memories: Sequence[int]) -> Keeping:
    """Count one model.

    Args:
        model: For people.
        architecture: Sequence and shape.
        contexts: Tokens of a request, prompt and continuation.
        memories: Bytes of a GPU.

    Raises:
        UsageError: For a context or memory that is not positive.
    """
    mine, baseline = architecture.kv_bytes_per_token(), architecture.baseline().kv_bytes_per_token()
    return Keeping(
        architecture.shape.name,
        model,
        architecture.sequence.notation,
        mine,
        baseline / mine if mine else None,
        {memory: {each: fitting_batch(architecture, each, memory) for each in contexts} for memory in memories},
    )


def mean_ratio(rows: Sequence[Keeping]) -> float | None:
    """The mean of what Composites save, the Llamas left out; None where there are none."""
    ratios = [row.ratio for row in rows if row.model != "llama" and row.ratio is not None]
    return statistics.mean(ratios) if ratios else None


def fitting_batch(architecture: Architecture, context: int, memory: int) -> int:
    """How many requests of so many tokens decode at a time on one GPU; 0 where not even the weights fit.

    Args:
        architecture: Sequence and shape; weights and cache in bf16.
        context: Tokens of a request, prompt and continuation.
        memory: Bytes of the GPU.

    Raises:
        UsageError: For a context or memory that is not positive.
    """
    for name, value in (("context", context), ("memory", memory)):
        if value < 1:
            raise UsageError(f"{name}={value}; expected at least 1")
    return max(0, (memory - fixed_bytes(architecture, context)) // request_bytes(architecture, context))


def request_bytes(architecture: Architecture, context: int) -> int:
    """Bytes of one request: cache, logits and their copy while a step is captured, tokens, and its part of a step."""
    cache = architecture.state_bytes(context, BYTES)
    logits = 2 * BYTES * architecture.shape.vocab_size
    return cache + logits + 8 * (context + SPARE + 1) + pass_bytes(architecture)


def fixed_bytes(architecture: Architecture, context: int) -> int:
    """Bytes whatever the batch: weights, the copy that keeps query, key and value apart, a pass over prompts, CUDA.

    A prompt of several passes has its keys and values taken out of the cache for each.
    """
    shape = architecture.shape
    heads = shape.num_attention_heads + 2 * shape.num_query_groups
    attends = _attends(architecture)
    copies = attends * heads * shape.head_dim * shape.hidden_size
    past = 2 * context * shape.num_query_groups * shape.head_dim if attends and context > PREFILL_TOKENS else 0
    prompts = PREFILL_TOKENS * pass_bytes(architecture)
    return CUDA_BYTES + BYTES * (architecture.params_total + copies + past) + prompts


def pass_bytes(architecture: Architecture) -> int:
    """Bytes that a pass over many tokens takes of the allocator for each of them.

    More than what is in use at a time: a block that was freed waits for the next of its size. So each size counts as
    often as it is in use at its own time. That is five times the width of the residual stream, around a norm (what
    comes in, what goes out, and its input of the norm before), three times an MLP's inner width (gate, up, product),
    two projections to heads, where attention follows attention, rotated keys, queries and results as far as they are
    wider than the stream, and a log-sum-exp a head in fp32.
    """
    shape = architecture.shape
    elements = 5 * shape.hidden_size + 3 * shape.ffn_hidden_size
    if _attends(architecture):
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
        wider = max(0, queries - shape.hidden_size)
        elements += 2 * (queries + 2 * keys) + keys + 2 * wider + 2 * shape.num_attention_heads
    return BYTES * elements


def _attends(architecture: Architecture) -> int:
    """Blocks of attention, with and without a window."""
    return sum(architecture.sequence.count(letter) for letter in "AW")
