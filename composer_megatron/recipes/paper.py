"""Llama and the two Composites at four sizes, as arXiv 2510.00379 ("Composer") compares them.

That paper's sequences, sizes, corpus and the 37.5B tokens at 1b are known to us; its optimizer, schedule, batch and
sequence length are not. There stands what the same group published days later (arXiv 2510.04800). Each value's
`Recipe.sources` says which it is, and which is only ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from composer_megatron.recipes.recipe import Recipe
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

_COMPOSER = "arXiv 2510.00379"
_SAME_GROUP = "arXiv 2510.04800, the same group's set-up"
_GROWN = f"{_COMPOSER}, its rule applied to our reading of model size: weights without embeddings"


class Size(NamedTuple):
    """What the three models of a size share.

    Attributes:
        shape: A preset's name.
        shape_source: Where its widths come from.
        tokens: Training tokens.
        tokens_source: Where that number comes from.
        learning_rate: Peak learning rate.
        learning_rate_source: Where that comes from.
        stacked: ``2A4M`` stacked to the size of the Llama.
        stretched: ``2A5M2A3M1A3M`` stretched to it.
    """

    shape: str
    shape_source: str
    tokens: int
    tokens_source: str
    learning_rate: float
    learning_rate_source: str
    stacked: str
    stretched: str


_AS_AT_1B = "ours: about as many for each weight of the Llama, embeddings left out, as at 1b"

_ROWS = (
    Size(
        shape="350m",
        shape_source="arXiv 2510.04800, Table 8",
        tokens=13_600_000_000,
        tokens_source=_AS_AT_1B,
        learning_rate=3e-3,
        learning_rate_source=_SAME_GROUP,
        stacked="(2A4M)x4",
        stretched="3A8M 3A5M 2A5M",
    ),
    Size(
        shape="1b",
        shape_source=f"{_COMPOSER}: Llama 3.2 1B",
        tokens=37_500_000_000,
        tokens_source=_COMPOSER,
        learning_rate=6e-4,
        learning_rate_source=_SAME_GROUP,
        stacked="(2A4M)x4 1A2M",
        stretched="4A9M 4A5M 2A5M",
    ),
    Size(
        shape="3b",
        shape_source="Llama 3.2 3B",
        tokens=108_500_000_000,
        tokens_source=_AS_AT_1B,
        learning_rate=3e-4,
        learning_rate_source=_SAME_GROUP,
        stacked="(2A4M)x8",
        stretched="6A15M 6A9M 3A9M",
    ),
    Size(
        shape="8b",
        shape_source="Llama 3.1 8B",
        tokens=269_000_000_000,
        tokens_source=_AS_AT_1B,
        learning_rate=3e-4,
        learning_rate_source="arXiv 2407.21783 (Llama 3), 8B",
        stacked="(2A4M)x9",
        stretched="7A17M 7A10M 4A10M",
    ),
)

SIZES: Mapping[str, Size] = MappingProxyType({row.shape: row for row in _ROWS})
"""The sizes by the name of their shape."""


def paper_recipe(size: Size, name: str, about: str, sequence: str, sequence_source: str) -> Recipe:
    """One model of a size."""
    return Recipe(
        name=name,
        about=about,
        sequence=CompositeSequence.parse(sequence),
        shape=PRESETS[size.shape],
        data="DCLM-Baseline",
        tokenizer="Llama 3.2",
        tokens=size.tokens,
        seq_len=8192,
        global_batch_size=256,  # 2,097,152 tokens
        learning_rate=size.learning_rate,
        sources={
            "sequence": sequence_source,
            "shape": size.shape_source,
            "data": f"{_COMPOSER} (DCLM); which part of it: {_SAME_GROUP}",
            "tokens": size.tokens_source,
            "learning_rate": size.learning_rate_source,
        }
        | dict.fromkeys(("tokenizer", "seq_len", "global_batch_size", "warmup", "cooldown"), _SAME_GROUP),
    )


def _models(size: Size) -> tuple[Recipe, ...]:
    shape, pairs = size.shape, PRESETS[size.shape].baseline_pairs
    return (
        paper_recipe(size, f"{shape}-llama", f"(AM)x{pairs}, the baseline", f"(AM)x{pairs}", size.shape_source),
        paper_recipe(size, f"{shape}-stacked", "2A4M stacked", size.stacked, _GROWN),
        paper_recipe(size, f"{shape}-stretched", "2A5M2A3M1A3M stretched", size.stretched, _GROWN),
    )


PAPER = tuple(recipe for size in SIZES.values() for recipe in _models(size))
"""Twelve recipes: four sizes, each as Llama, stacked and stretched."""
