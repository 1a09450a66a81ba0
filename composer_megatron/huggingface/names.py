"""Our parameters and those of Hugging Face modules: which of theirs make up each of ours, and how.

Megatron keeps query, key and value in one matrix, group by group, each group's query heads before its key and its value
head; and gate and up in one, gate first. Hugging Face keeps each in a matrix of its own. `join` and `split` are each
other's inverse and change no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.shape import Shape

EMBEDDING, FINAL_NORM, OUTPUT = "embedding.word_embeddings.weight", "decoder.final_norm.weight", "output_layer.weight"
"""Our parameters outside the blocks."""

_ATTENTION = MappingProxyType(
    {
        "input_layernorm.weight": ("norm",),
        "self_attention.linear_qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_proj.weight": ("self_attn.o_proj",),
    }
)
BLOCKS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "A": _ATTENTION,
        "W": _ATTENTION,
        "M": MappingProxyType(
            {
                "pre_mlp_layernorm.weight": ("norm",),
                "mlp.linear_fc1.weight": ("mlp.gate_proj", "mlp.up_proj"),
                "mlp.linear_fc2.weight": ("mlp.down_proj",),
            }
        ),
    }
)
"""For each kind of block in Hugging Face models of ours, our parameters and the modules whose weights they join."""

_LLAMA_NORMS = MappingProxyType({"A": "input_layernorm", "M": "post_attention_layernorm"})


class Part(NamedTuple):
    """One parameter of ours.

    Attributes:
        ours: Its name in a model of one stage.
        theirs: The names of the tensors that it joins.
        sizes: Their shapes.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]

    def join(self, pieces: Iterable[Tensor], shape: Shape) -> Tensor:
        """Our parameter from their tensors, which are in the order of `theirs`."""
        pieces = list(pieces)
        if len(pieces) == 3:
            return _interleave(pieces, shape)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def split(self, parameter: Tensor, shape: Shape) -> tuple[Tensor, ...]:
        """Their tensors from our parameter; views of it, where it holds them in one piece."""
        if len(self.theirs) == 3:
            queries = shape.num_attention_heads // shape.num_query_groups
            grouped = parameter.unflatten(0, (shape.num_query_groups, queries + 2, -1))
            return tuple(part.flatten(0, 2) for part in grouped.split((queries, 1, 1), dim=1))
        return parameter.chunk(len(self.theirs))


def _interleave(pieces: list[Tensor], shape: Shape) -> Tensor:
    """((heads + 2 groups) · d, hidden) from query (heads · d, hidden), key and value (groups · d, hidden)."""
    grouped = [piece.unflatten(0, (shape.num_query_groups, -1)) for piece in pieces]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def composite_parts(architecture: Architecture) -> list[Part]:
    """Every parameter of an architecture, with the names of `template/modeling_composite.py`.

    Raises:
        UsageError: If a block has no modelling code there.
    """
    other = [PRIMITIVES[letter] for letter in architecture.sequence.counts if letter not in BLOCKS]
    if other:
        named = " and ".join(f"{row.symbol} ({row.name})" for row in other)
        known = ", ".join(letter for letter in BLOCKS if letter in PRIMITIVES)
        raise UsageError(
            f"{architecture.sequence} has blocks of {named}; Hugging Face models of ours have {known} only"
        )
    names = ((index, letter, "norm") for index, letter in enumerate(architecture.sequence))
    return list(_parts(architecture.shape, names))


def llama_parts(shape: Shape) -> list[Part]:
    """Every parameter of the sequence ``(AM)xN``, with the names of transformers' Llama of N layers."""
    layers = range(shape.baseline_pairs)
    return list(_parts(shape, ((layer, kind, _LLAMA_NORMS[kind]) for layer in layers for kind in "AM")))


def _parts(shape: Shape, blocks: Iterable[tuple[int, str, str]]) -> Iterator[Part]:
    """Parameters in order; a block is their layer's number, its letter, and their name of its norm."""
    hidden, vocabulary, sizes = shape.hidden_size, shape.vocab_size, _module_sizes(shape)
    yield Part(EMBEDDING, ("model.embed_tokens.weight",), ((vocabulary, hidden),))
    for index, (layer, letter, norm) in enumerate(blocks):
        for ours, modules in BLOCKS[letter].items():
            theirs = tuple(f"model.layers.{layer}.{norm if name == 'norm' else name}.weight" for name in modules)
            yield Part(f"decoder.layers.{index}.{ours}", theirs, tuple(sizes[name] for name in modules))
    yield Part(FINAL_NORM, ("model.norm.weight",), ((hidden,),))
    if not shape.tied_embeddings:
        yield Part(OUTPUT, ("lm_head.weight",), ((vocabulary, hidden),))


def _module_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    return {
        "norm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
