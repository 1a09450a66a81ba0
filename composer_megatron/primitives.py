"""The primitives a Composite is made of: one row each.

A row says what one block of the primitive costs, as exact integers of a `Shape`. To add a primitive, add a row here
and a layer spec in `composer_megatron.specs`; nothing else names primitives one by one.

Our letters and Megatron-core's differ (there ``M`` is Mamba, ``*`` attention and ``-`` an MLP). The two alphabets meet
in `Primitive.megatron_symbol` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composer_megatron.shape import Shape


@dataclass(frozen=True)
class Primitive:
    """One kind of block, and what one block of it holds and costs.

    Attributes:
        symbol: Our letter in a Composite sequence.
        name: For people.
        megatron_symbol: Megatron-core's letter in a hybrid layer pattern.
        matrix_parameters: Elements of the weight matrices; what Composer calls the model size, and what a GEMM reads.
        norm_parameters: Elements of the block's normalisation weights.
        mixing_flops: Forward FLOPs a token outside the weight matrices at a sequence length, as twice their value, so
            that the causal average (S + 1) / 2 stays an integer.
        cache_elements: Elements of the decoding cache a token adds.
        saved_elements: Elements a token keeps for the backward pass, with fused norm, activation and attention and no
            recomputation.
    """

    symbol: str
    name: str
    megatron_symbol: str
    matrix_parameters: Callable[[Shape], int]
    norm_parameters: Callable[[Shape], int]
    mixing_flops: Callable[[Shape, int], int]
    cache_elements: Callable[[Shape], int]
    saved_elements: Callable[[Shape], int]


def _attention_matrices(shape: Shape) -> int:
    queries = shape.num_attention_heads * shape.head_dim
    keys_and_values = 2 * shape.num_query_groups * shape.head_dim
    return shape.hidden_size * (queries + keys_and_values) + queries * shape.hidden_size


def _attention_saved(shape: Shape) -> int:
    """Block input, normed input, q, k, v, the attention's output, and its log-sum-exp in fp32 (two elements)."""
    heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups
    return 2 * shape.hidden_size + heads * shape.head_dim + 2 * shape.num_attention_heads


def _causal_attention_flops(shape: Shape, seq_len: int) -> int:
    """Twice the mean over positions t = 1..S of 2 GEMVs (scores, values) of t keys: 2 · 4·heads·head_dim·(S+1)/2."""
    return 4 * shape.num_attention_heads * shape.head_dim * (seq_len + 1)


_ROWS = (
    Primitive(
        symbol="A",
        name="grouped-query attention",
        megatron_symbol="*",
        matrix_parameters=_attention_matrices,
        norm_parameters=lambda shape: shape.hidden_size,
        mixing_flops=_causal_attention_flops,
        cache_elements=lambda shape: 2 * shape.num_query_groups * shape.head_dim,
        saved_elements=_attention_saved,
    ),
    Primitive(
        symbol="M",
        name="SwiGLU MLP",
        megatron_symbol="-",
        matrix_parameters=lambda shape: 3 * shape.hidden_size * shape.ffn_hidden_size,
        norm_parameters=lambda shape: shape.hidden_size,
        mixing_flops=lambda shape, seq_len: 0,
        cache_elements=lambda shape: 0,
        saved_elements=lambda shape: 2 * shape.hidden_size + 3 * shape.ffn_hidden_size,
    ),
)

PRIMITIVES = MappingProxyType({row.symbol: row for row in _ROWS})
"""Every primitive by its letter, in the order in which reports list them."""
