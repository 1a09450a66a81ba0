"""Bytes and parameters of each part of a model on one rank of a layout, in Megatron-core's bf16 training.

Counted are weights, gradients, optimizer state, and what passes keep for the backward pass. Left out are the
allocator's fragmentation, buffers of NCCL and CUDA's own memory.
"""

from __future__ import annotations

from typing import NamedTuple

from composer_megatron.architecture import Architecture
from composer_megatron.layout import Layout
from composer_megatron.primitives import PRIMITIVES, Primitive
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

WEIGHT_AND_GRADIENT_BYTES = 2 + 4
"""A parameter in bf16 and its gradient in fp32."""

OPTIMIZER_BYTES = 12
"""A parameter's fp32 copy and the two moments of Adam."""

LOGIT_BYTES = 6
"""A logit in bf16 and its fp32 copy in the loss."""


class Holding(NamedTuple):
    """What a rank holds of one part of the model.

    Attributes:
        parameters: Weights, exact.
        kept: Bytes kept for the backward pass of one micro-batch.
    """

    parameters: int
    kept: int


def state_bytes(parameters: int, layout: Layout) -> int:
    """Bytes of weights, gradients and optimizer state; the distributed optimizer shares the last among replicas."""
    shared = layout.replicas if layout.distributed_optimizer else 1
    return WEIGHT_AND_GRADIENT_BYTES * parameters + -(-OPTIMIZER_BYTES * parameters // shared)


def block(row: Primitive, shape: Shape, layout: Layout) -> Holding:
    """One block: its input and normed input split by sequence parallelism alone, the rest by tensor parallelism."""
    whole = row.replicated_parameters(shape)
    split = row.matrix_parameters(shape) + row.vector_parameters(shape) - whole
    parameters = split // layout.tensor_parallel + whole
    if layout.recompute == "full":
        return Holding(parameters, input_bytes(shape, layout))
    inner = row.saved_elements(shape) - 2 * shape.hidden_size
    if layout.recompute == "selective" and row.cache_elements(shape):
        inner -= 2 * shape.num_attention_heads  # core attention made again needs no log-sum-exp; its inputs stay
    kept = 2 * input_bytes(shape, layout) + 2 * layout.tokens * inner // layout.tensor_parallel
    return Holding(parameters, kept)


def input_bytes(shape: Shape, layout: Layout) -> int:
    """The hidden states of a micro-batch between two blocks, in bf16."""
    return 2 * layout.tokens * shape.hidden_size // layout.hidden_split


def embedding(shape: Shape, layout: Layout) -> Holding:
    """The embedding; what it puts out is the first block's input."""
    return Holding(shape.vocab_size * shape.hidden_size // layout.tensor_parallel, 0)


def head(shape: Shape, layout: Layout) -> Holding:
    """Final norm, output layer and loss; a tied output layer lives twice where first and last stage differ."""
    own_matrix = layout.pipeline_parallel > 1 or not shape.tied_embeddings
    parameters = shape.hidden_size + own_matrix * embedding(shape, layout).parameters
    return Holding(parameters, 2 * input_bytes(shape, layout) + _logits(shape, layout))


def multi_token_prediction(blocks: CompositeSequence, shape: Shape, layout: Layout) -> Holding:
    """One depth of multi-token prediction on the last stage: norms, the joining projection, blocks, norm and loss.

    It reads the embedding, of which an untied model then has a copy on the last stage.
    """
    rows = [block(PRIMITIVES[letter], shape, layout) for letter in blocks]
    copied = layout.pipeline_parallel > 1 and not shape.tied_embeddings
    own = 2 * shape.hidden_size**2 // layout.tensor_parallel + 3 * shape.hidden_size
    own += copied * embedding(shape, layout).parameters
    kept = 6 * input_bytes(shape, layout) + _logits(shape, layout)
    return Holding(own + sum(row.parameters for row in rows), kept + sum(row.kept for row in rows))


def working_bytes(architecture: Architecture, layout: Layout) -> int:
    """What a rank needs besides while it runs a backward pass: with full recomputation one block's kept tensors."""
    if layout.recompute != "full":
        return 0
    shape = architecture.shape
    widest = max(
        PRIMITIVES[letter].saved_elements(shape) - 2 * shape.hidden_size for letter in architecture.sequence.counts
    )
    return input_bytes(shape, layout) + 2 * layout.tokens * widest // layout.tensor_parallel


def _logits(shape: Shape, layout: Layout) -> int:
    return LOGIT_BYTES * layout.tokens * shape.vocab_size // layout.tensor_parallel
