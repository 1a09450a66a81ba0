"""What decoding keeps in memory, and how many requests fit: exact cache bytes, and an estimate of everything else.

The cache is counted exactly (`Architecture.kv_bytes_per_token`, `Architecture.state_bytes`). What a GPU needs besides
is weights, a pass over prompts, a row of logits and of tokens a request, and a round sum for CUDA; `fitting_batch`
leaves that free. ``composer-megatron kv --check`` allocates and runs such batches on a GPU.
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

CUDA_BYTES = 1_500_000_000
"""Left for CUDA's own context, compiled kernels, cuBLAS's workspaces and the allocator's gaps; an estimate."""


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
    return max(0, (memory - fixed_bytes(architecture)) // request_bytes(architecture, context))


def request_bytes(architecture: Architecture, context: int) -> int:
    """Bytes of one request: cache, logits, tokens, and the hidden states of a decoding step."""
    shape = architecture.shape
    cache = architecture.state_bytes(context, BYTES)
    hidden = BYTES * (4 * shape.hidden_size + 3 * shape.ffn_hidden_size)
    return cache + 2 * BYTES * shape.vocab_size + 8 * (context + SPARE + 1) + hidden


def fixed_bytes(architecture: Architecture) -> int:
    """Bytes whatever the batch: weights, the copy that keeps query, key and value apart, a pass over prompts, CUDA."""
    shape = architecture.shape
    heads = shape.num_attention_heads + 2 * shape.num_query_groups
    attends = sum(architecture.sequence.count(letter) for letter in "AW")
    copies = attends * heads * shape.head_dim * shape.hidden_size
    widest = 4 * shape.hidden_size + max(3 * shape.ffn_hidden_size, 3 * heads * shape.head_dim)
    return CUDA_BYTES + BYTES * (architecture.params_total + copies + PREFILL_TOKENS * widest)
