"""The primitives a Composite is made of: one row each.

A row says what one block of the primitive costs, as exact integers of a `Shape`. To add a primitive, add a row here
and a layer spec in `composer_megatron.specs`; nothing else names primitives one by one (docs/primitives.md walks
through it).

Our letters and Megatron-core's differ (there ``M`` is Mamba, ``*`` attention and ``-`` an MLP). The two alphabets meet
in `Primitive.megatron_symbol` alone. A and W share one symbol: to Megatron they are the same layer, and its
configuration says which of them have a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        matrix_parameters: Elements of the weight matrices; what Composer calls the model size.
        active_parameters: Those of them that one token is multiplied with; fewer in a mixture of experts alone.
        vector_parameters: Elements of all other weights: norms, convolutions, decays.
        replicated_parameters: How many of all these a tensor-parallel rank holds whole.
        mixing_flops: Forward FLOPs a token outside the weight matrices at a sequence length, as twice their value, so
            that the causal average (S + 1) / 2 stays an integer.
        cache_elements: Elements of the decoding cache that a token adds; 0 for states of constant size.
        state_elements: Elements of everything that decoding keeps of a sequence of that length.
        saved_elements: Elements a token keeps for the backward pass, with fused norm, activation and attention and no
            recomputation.
        split: Widths that tensor-parallel ranks must divide, by name, beside those that every block shares.
    """

    symbol: str
    name: str
    megatron_symbol: str
    matrix_parameters: Callable[[Shape], int]
    active_parameters: Callable[[Shape], int]
    vector_parameters: Callable[[Shape], int]
    replicated_parameters: Callable[[Shape], int]
    mixing_flops: Callable[[Shape, int], int]
    cache_elements: Callable[[Shape], int]
    state_elements: Callable[[Shape, int], int]
    saved_elements: Callable[[Shape], int]
    split: Callable[[Shape], Mapping[str, int]] = lambda shape: {}


def _norm(shape: Shape) -> int:
    return shape.hidden_size


def _nothing(shape: Shape) -> int:
    return 0


# A and W: grouped-query attention


def _attention_matrices(shape: Shape) -> int:
    queries = shape.num_attention_heads * shape.head_dim
    keys_and_values = 2 * shape.num_query_groups * shape.head_dim
    return shape.hidden_size * (queries + keys_and_values) + queries * shape.hidden_size


def _attention_saved(shape: Shape) -> int:
    """Block input, normed input, q, k, v, the attention's output, and its log-sum-exp in fp32 (two elements)."""
    heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups
    return 2 * shape.hidden_size + heads * shape.head_dim + 2 * shape.num_attention_heads


def _attention_cache(shape: Shape) -> int:
    return 2 * shape.num_query_groups * shape.head_dim


def _causal_attention_flops(shape: Shape, seq_len: int) -> int:
    """Twice the mean over positions t = 1..S of 2 GEMVs (scores, values) of t keys: 2 · 4·heads·head_dim·(S+1)/2."""
    return 4 * shape.num_attention_heads * shape.head_dim * (seq_len + 1)


def _window_attention_flops(shape: Shape, seq_len: int) -> int:
    """The same with min(t, window) keys at position t; the mean is rounded down."""
    window = min(shape.window, seq_len)
    seen = window * (window + 1) // 2 + (seq_len - window) * window
    return 8 * shape.num_attention_heads * shape.head_dim * seen // seq_len


# M and E: MLPs


def _mlp_matrices(shape: Shape) -> int:
    return 3 * shape.hidden_size * shape.ffn_hidden_size


def _router(shape: Shape) -> int:
    return shape.hidden_size * shape.expert_widths.num_experts


def _experts(shape: Shape, number: int) -> int:
    """The router, so many experts, and the shared one."""
    widths = shape.expert_widths
    inner = number * widths.ffn_hidden_size + widths.shared_ffn_hidden_size
    return _router(shape) + 3 * shape.hidden_size * inner


def _experts_saved(shape: Shape) -> int:
    """As the MLP, for each expert a token goes to; there, too, its copy of the input and its output; the scores."""
    widths = shape.expert_widths
    routed = widths.top_k * (3 * widths.ffn_hidden_size + 2 * shape.hidden_size)
    return 2 * shape.hidden_size + routed + 3 * widths.shared_ffn_hidden_size + widths.num_experts


# S: Mamba-2


def _mamba_projected(shape: Shape) -> int:
    """What the input is projected to: gate, x, B, C and the step sizes."""
    widths = shape.mamba_widths
    return 2 * widths.inner + 2 * widths.num_groups * widths.state_dim + widths.num_heads


def _mamba_matrices(shape: Shape) -> int:
    return shape.hidden_size * (_mamba_projected(shape) + shape.mamba_widths.inner)


def _mamba_vectors(shape: Shape) -> int:
    """Both norms, the convolution and its bias; for each head its decay, step size and skip weight."""
    widths = shape.mamba_widths
    convolution = widths.conv_channels * (widths.conv_width + 1)
    return shape.hidden_size + widths.inner + convolution + 3 * widths.num_heads


def _mamba_flops(shape: Shape, seq_len: int) -> int:
    """Twice the convolution's, and 5 for each element of the state: decay, add the outer product (2), read (2)."""
    widths = shape.mamba_widths
    return 2 * (2 * widths.conv_width * widths.conv_channels + 5 * widths.inner * widths.state_dim)


def _mamba_state(shape: Shape, seq_len: int) -> int:
    widths = shape.mamba_widths
    return widths.conv_channels * widths.conv_width + widths.inner * widths.state_dim


def _mamba_saved(shape: Shape) -> int:
    """Input, normed input, projections, the scan's output and its gated norm; the convolution is made again."""
    return 2 * shape.hidden_size + _mamba_projected(shape) + 2 * shape.mamba_widths.inner


# G: Gated DeltaNet


def _delta_projected(shape: Shape) -> int:
    """What the input is projected to: q, k, v, the output gate, and for each value head strength and decay."""
    widths = shape.delta_net_widths
    return 2 * widths.keys + 2 * widths.values + 2 * widths.num_value_heads


def _delta_matrices(shape: Shape) -> int:
    return shape.hidden_size * (_delta_projected(shape) + shape.delta_net_widths.values)


def _delta_vectors(shape: Shape) -> int:
    """Both norms, the convolution; for each value head its decay and step size."""
    widths = shape.delta_net_widths
    convolution = widths.conv_channels * widths.conv_width
    return shape.hidden_size + widths.value_head_dim + convolution + 2 * widths.num_value_heads


def _delta_flops(shape: Shape, seq_len: int) -> int:
    """Twice the convolution's, and 7 for each element of the state: decay, recall (2), add the news (2), read (2)."""
    widths = shape.delta_net_widths
    return 2 * (2 * widths.conv_width * widths.conv_channels + 7 * widths.values * widths.key_head_dim)


def _delta_state(shape: Shape, seq_len: int) -> int:
    widths = shape.delta_net_widths
    return widths.conv_channels * widths.conv_width + widths.values * widths.key_head_dim


def _delta_saved(shape: Shape) -> int:
    """Input, normed input, projections, the convolution's output, the rule's output and its gated norm."""
    widths = shape.delta_net_widths
    return 2 * shape.hidden_size + _delta_projected(shape) + widths.conv_channels + 2 * widths.values


# L: latent attention


def _latent_matrices(shape: Shape) -> int:
    widths, heads, hidden = shape.latent_widths, shape.num_attention_heads, shape.hidden_size
    queries = heads * (widths.key_dim + widths.rope_dim)
    to_queries = widths.q_rank * (hidden + queries) if widths.q_rank else hidden * queries
    to_latent = hidden * (widths.kv_rank + widths.rope_dim)
    from_latent = widths.kv_rank * heads * (widths.key_dim + widths.value_dim)
    return to_queries + to_latent + from_latent + heads * widths.value_dim * hidden


def _latent_norms(shape: Shape) -> int:
    return shape.hidden_size + shape.latent_widths.kv_rank + shape.latent_widths.q_rank


def _latent_attention_flops(shape: Shape, seq_len: int) -> int:
    """As for attention, with keys and values of their own widths."""
    widths = shape.latent_widths
    return 2 * shape.num_attention_heads * (widths.key_dim + widths.rope_dim + widths.value_dim) * (seq_len + 1)


def _latent_cache(shape: Shape) -> int:
    """The latent vector and the rotary key, as the paper caches them."""
    return shape.latent_widths.kv_rank + shape.latent_widths.rope_dim


def _latent_saved(shape: Shape) -> int:
    """As for attention, and the latent vectors before and after their norms."""
    widths, heads = shape.latent_widths, shape.num_attention_heads
    latents = 2 * (widths.kv_rank + widths.q_rank) + widths.rope_dim
    attended = heads * (2 * (widths.key_dim + widths.rope_dim) + 2 * widths.value_dim + 2)
    return 2 * shape.hidden_size + latents + attended


_ROWS = (
    Primitive(
        symbol="A",
        name="grouped-query attention",
        megatron_symbol="*",
        matrix_parameters=_attention_matrices,
        active_parameters=_attention_matrices,
        vector_parameters=_norm,
        replicated_parameters=_norm,
        mixing_flops=_causal_attention_flops,
        cache_elements=_attention_cache,
        state_elements=lambda shape, seq_len: _attention_cache(shape) * seq_len,
        saved_elements=_attention_saved,
    ),
    Primitive(
        symbol="M",
        name="SwiGLU MLP",
        megatron_symbol="-",
        matrix_parameters=_mlp_matrices,
        active_parameters=_mlp_matrices,
        vector_parameters=_norm,
        replicated_parameters=_norm,
        mixing_flops=lambda shape, seq_len: 0,
        cache_elements=_nothing,
        state_elements=lambda shape, seq_len: 0,
        saved_elements=lambda shape: 2 * shape.hidden_size + 3 * shape.ffn_hidden_size,
    ),
    Primitive(
        symbol="W",
        name="sliding-window attention",
        megatron_symbol="*",
        matrix_parameters=_attention_matrices,
        active_parameters=_attention_matrices,
        vector_parameters=_norm,
        replicated_parameters=_norm,
        mixing_flops=_window_attention_flops,
        cache_elements=_attention_cache,
        state_elements=lambda shape, seq_len: _attention_cache(shape) * min(seq_len, shape.window),
        saved_elements=_attention_saved,
    ),
    Primitive(
        symbol="E",
        name="mixture of experts",
        megatron_symbol="E",
        matrix_parameters=lambda shape: _experts(shape, shape.expert_widths.num_experts),
        active_parameters=lambda shape: _experts(shape, shape.expert_widths.top_k),
        vector_parameters=_norm,
        replicated_parameters=lambda shape: _norm(shape) + _router(shape),
        mixing_flops=lambda shape, seq_len: 0,
        cache_elements=_nothing,
        state_elements=lambda shape, seq_len: 0,
        saved_elements=_experts_saved,
        split=lambda shape: {
            "experts.ffn_hidden_size": shape.expert_widths.ffn_hidden_size,
            "experts.shared_ffn_hidden_size": shape.expert_widths.shared_ffn_hidden_size,
        },
    ),
    Primitive(
        symbol="S",
        name="Mamba-2",
        megatron_symbol="M",
        matrix_parameters=_mamba_matrices,
        active_parameters=_mamba_matrices,
        vector_parameters=_mamba_vectors,
        replicated_parameters=_norm,
        mixing_flops=_mamba_flops,
        cache_elements=_nothing,
        state_elements=_mamba_state,
        saved_elements=_mamba_saved,
        split=lambda shape: {"mamba.num_groups": shape.mamba_widths.num_groups},
    ),
    Primitive(
        symbol="G",
        name="Gated DeltaNet",
        megatron_symbol="G",
        matrix_parameters=_delta_matrices,
        active_parameters=_delta_matrices,
        vector_parameters=_delta_vectors,
        replicated_parameters=lambda shape: _norm(shape) + shape.delta_net_widths.value_head_dim,
        mixing_flops=_delta_flops,
        cache_elements=_nothing,
        state_elements=_delta_state,
        saved_elements=_delta_saved,
        split=lambda shape: {"delta_net.num_key_heads": shape.delta_net_widths.num_key_heads},
    ),
    Primitive(
        symbol="L",
        name="latent attention",
        megatron_symbol="+",
        matrix_parameters=_latent_matrices,
        active_parameters=_latent_matrices,
        vector_parameters=_latent_norms,
        replicated_parameters=_latent_norms,
        mixing_flops=_latent_attention_flops,
        cache_elements=_latent_cache,
        state_elements=lambda shape, seq_len: _latent_cache(shape) * seq_len,
        saved_elements=_latent_saved,
        split=lambda shape: {
            "latent.q_rank": shape.latent_widths.q_rank,
            "latent.kv_rank + rope_dim": shape.latent_widths.kv_rank + shape.latent_widths.rope_dim,
        },
    ),
)

PRIMITIVES = MappingProxyType({row.symbol: row for row in _ROWS})
"""Every primitive by its letter, in the order in which reports list them."""
