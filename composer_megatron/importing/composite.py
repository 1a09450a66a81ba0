"""A model that `composer_megatron.export_hf` wrote, fine-tuned since or not, as a source of weights.

The way back: the folder becomes a run again, which any parallel layout loads. Weights come over bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import read_json
from composer_megatron.huggingface.config import number, shape_fields
from composer_megatron.huggingface.files import open_weights
from composer_megatron.huggingface.names import composite_parts
from composer_megatron.importing.conversion import Source
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

MODEL_TYPE = "composite"
"""What ``config.json`` calls such a model."""


def open_composite(folder: Path) -> Source:
    """Read the configuration and the headers of an exported folder; no weights yet.

    Raises:
        FileError: If a file is missing or corrupt, or the weights are not those of the configuration.
        ComposerError: If safetensors is not installed.
    """
    where = folder / "config.json"
    config = read_json(where, "a Hugging Face configuration")
    try:
        architecture = _architecture(config, where)
        parts = composite_parts(architecture)
    except UsageError as error:
        raise FileError(f"{where}: {error}") from None
    weights = open_weights(folder, parts, architecture.shape, what=f"a Composite {architecture.sequence.notation}")
    return Source(
        path=folder,
        architecture=architecture,
        sequence_length=number(config, "max_position_embeddings", where),
        dtype=weights.dtype,
        tensors=weights.readers,
        tokenizer=folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else None,
    )


def _architecture(config: Mapping[str, Any], where: Path) -> Architecture:
    """What ``config.json`` says; name, depth and origin are those of the architecture file beside it."""
    sequence = config.get("sequence")
    if not isinstance(sequence, str):
        raise FileError(f"{where}: sequence={sequence!r}; expected a sequence such as '2A4M'")
    blocks, name = CompositeSequence.parse(sequence), where.parent.resolve().name
    widths = shape_fields(config, where)
    if "W" in blocks.letters:
        widths["window"] = number(config, "sliding_window", where)
    origin = {"method": "import", "source": name}
    beside = where.with_name("architecture.json")
    if not beside.is_file():
        shape = Shape(name=name, baseline_pairs=max(1, len(blocks) // 2), **widths)
        return Architecture(blocks, shape, origin)
    known = Architecture.load(beside)
    changed = Architecture(blocks, dataclasses.replace(known.shape, **widths), origin)
    return known if known == changed else changed
