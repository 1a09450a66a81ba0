"""A model's weights as decoding wants them: plain tensors, queries, keys and values apart in the first projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.rotary import inverse_frequencies

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

DECODED = frozenset("AMW")
"""The primitives that `Decoder` computes: attention with and without a window, and the MLP."""


@dataclass(frozen=True)
class Block:
    """One block: ``x + second(body(first(norm(x))))``, where the body is SwiGLU or attention.

    Attributes:
        norm: Weight of the norm, (h,).
        first: (gate and up, h), or (all query heads, then all key heads, then all value heads, h).
        second: (h, what the body puts out).
        attends: Whether the body is attention.
        window: Keys that a query sees, its own included; None for all.
    """

    norm: Tensor
    first: Tensor
    second: Tensor
    attends: bool
    window: int | None = None


@dataclass(frozen=True)
class Weights:
    """A whole model.

    Attributes:
        embedding: (v, h).
        blocks: In order.
        final_norm: (h,).
        output: (v, h); the embedding itself where they are tied.
        heads: Query heads.
        groups: Key-value heads.
        head_dim: Width of a head.
        epsilon: Of the norms.
        frequencies: Radians by which a pair of a head's elements turns from one position to the next, (head_dim / 2,).
    """

    embedding: Tensor
    blocks: tuple[Block, ...]
    final_norm: Tensor
    output: Tensor
    heads: int
    groups: int
    head_dim: int
    epsilon: float
    frequencies: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """Every tensor once."""
        yield self.embedding
        for block in self.blocks:
            yield from (block.norm, block.first, block.second)
        yield self.final_norm
        if self.output is not self.embedding:
            yield self.output

    @property
    def bytes(self) -> int:
        """What a decoding step reads of them: all but the embedding, of which it needs a row a request, if not tied."""
        read = sum(tensor.nbytes for tensor in self)
        return read if self.output is self.embedding else read - self.embedding.nbytes


def is_decoded(model: HybridModel) -> bool:
    """Whether all blocks of a model are such as `DECODED` names."""
    return all(_is_attention(layer) or _is_mlp(layer) for layer in model.decoder.layers)


def _is_attention(layer: Any) -> bool:
    from megatron.core.transformer.attention import SelfAttention

    return type(getattr(layer, "self_attention", None)) is SelfAttention


def _is_mlp(layer: Any) -> bool:
    from megatron.core.transformer.mlp import MLP

    return type(getattr(layer, "mlp", None)) is MLP


def weights_of(model: HybridModel) -> Weights:
    """The weights of a model of one process, as `composer_megatron.model.build_model` makes it.

    They share the model's memory, but for the first projections of attention blocks, which are copied in another order.

    Raises:
        UsageError: If the model is a part of one.
    """
    config = model.config
    if config.tensor_model_parallel_size > 1 or config.pipeline_model_parallel_size > 1:
        raise UsageError("decoding takes a whole model in one process, this one is split over several; load its run")
    embedding = model.embedding.word_embeddings.weight.detach()
    output = embedding if model.share_embeddings_and_output_weights else model.output_layer.weight.detach()
    return Weights(
        embedding=embedding,
        blocks=tuple(_block(layer) for layer in model.decoder.layers),
        final_norm=model.decoder.final_norm.weight.detach(),
        output=output,
        heads=config.num_attention_heads,
        groups=config.num_query_groups,
        head_dim=config.kv_channels,
        epsilon=config.layernorm_epsilon,
        frequencies=model.rotary_pos_emb.inv_freq.to(embedding.device, torch.float32),
    )


def _block(layer: Any) -> Block:
    if _is_mlp(layer):
        return Block(
            layer.pre_mlp_layernorm.weight.detach(),
            layer.mlp.linear_fc1.weight.detach(),
            layer.mlp.linear_fc2.weight.detach(),
            attends=False,
        )
    attention = layer.self_attention
    return Block(
        layer.input_layernorm.weight.detach(),
        _heads_apart(attention),
        attention.linear_proj.weight.detach(),
        attends=True,
        window=_window(layer),
    )


def _heads_apart(attention: Any) -> Tensor:
    """Megatron keeps the rows group by group, each group's query heads before its key and its value head."""
    groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    weight = attention.linear_qkv.weight.detach()
    grouped = weight.unflatten(0, (groups, -1, dim))
    query, key, value = grouped.split((grouped.shape[1] - 2, 1, 1), dim=1)
    return torch.cat([part.flatten(0, 2) for part in (query, key, value)])


def _window(layer: Any) -> int | None:
    from megatron.core.transformer.utils import is_layer_window_attention

    config = layer.config
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer.layer_number):
        return None
    return int(config.window_size[0]) + 1


def random_weights(architecture: Architecture, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weights:
    """Weights that nobody trained, for measurements: normal with the shape's standard deviation, norms of ones.

    Raises:
        UsageError: If the sequence has blocks that `DECODED` does not name.
    """
    shape, sequence = architecture.shape, architecture.sequence
    others = set(sequence) - DECODED
    if others:
        known = ", ".join(sorted(DECODED))
        raise UsageError(f"{sequence}: blocks {', '.join(sorted(others))} are not decoded here, {known} are")
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns, dtype=dtype, device=device)
        return weight.normal_(std=shape.init_std, generator=generator)

    hidden = shape.hidden_size
    ones = torch.ones(hidden, dtype=dtype, device=device)
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim

    def block(letter: str) -> Block:
        if letter == "M":
            first, second = draw(2 * shape.ffn_hidden_size, hidden), draw(hidden, shape.ffn_hidden_size)
            return Block(ones.clone(), first, second, attends=False)
        window = shape.window if letter == "W" else None
        return Block(ones.clone(), draw(queries + 2 * keys, hidden), draw(hidden, queries), attends=True, window=window)

    embedding = draw(shape.vocab_size, hidden)
    return Weights(
        embedding=embedding,
        blocks=tuple(block(letter) for letter in sequence),
        final_norm=ones,
        output=embedding if shape.tied_embeddings else draw(shape.vocab_size, hidden),
        heads=shape.num_attention_heads,
        groups=shape.num_query_groups,
        head_dim=shape.head_dim,
        epsilon=shape.norm_epsilon,
        frequencies=inverse_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling_factor).to(device),
    )
