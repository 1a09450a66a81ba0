"""A Llama of Hugging Face's as a source of weights: layer i becomes block 2i, attention, and block 2i + 1, MLP.

Only what the blocks compute exactly is taken: every difference in ``config.json`` or in the tensors is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError
from composer_megatron.files import read_json
from composer_megatron.huggingface.config import number, rope_scaling, shape_fields, without_rope_scaling
from composer_megatron.huggingface.files import open_weights
from composer_megatron.huggingface.names import llama_parts
from composer_megatron.importing.conversion import Source
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

_FIXED = MappingProxyType(
    {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
    }
)
"""Fields that may have one value only; a field that is absent has it, but for the first."""


def open_llama(folder: Path, *, drop_rope_scaling: bool = False) -> Source:
    """Read the configuration and the headers of a folder with ``config.json`` and weights; no weights yet.

    Args:
        folder: As transformers saves it.
        drop_rope_scaling: Take a model with a scaled rotary embedding and leave the scaling out, Llama 3's or any
            other: a place to start training from, whose logits are not the source's. The origin says so.

    Raises:
        FileError: If a file is missing or corrupt, the model is not exactly a Llama, or a tensor is missing, of another
            size, or has no place in ours.
        ComposerError: If safetensors is not installed.
    """
    where = folder / "config.json"
    config = read_json(where, "a Hugging Face configuration")
    scaling = rope_scaling(config)
    dropped = scaling is not None and drop_rope_scaling
    shape = llama_shape(without_rope_scaling(config) if dropped else config, where, name=folder.resolve().name)
    origin = {"method": "import", "source": shape.name} | ({"dropped": f"rope_scaling {scaling}"} if dropped else {})
    weights = open_weights(folder, llama_parts(shape), shape, what="a Llama")
    return Source(
        path=folder,
        architecture=Architecture(CompositeSequence("AM" * shape.baseline_pairs), shape, origin),
        sequence_length=number(config, "max_position_embeddings", where, 2048),
        dtype=weights.dtype,
        tensors=weights.readers,
        tokenizer=folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else None,
    )


def llama_shape(config: Mapping[str, Any], where: Path, *, name: str) -> Shape:
    """The shape that a ``config.json`` describes, whose baseline has as many pairs as the model has layers.

    Raises:
        FileError: If a field is missing or says what our blocks do not compute.
    """
    for field, wanted in _FIXED.items():
        value = config.get(field, wanted if field != "model_type" else None)
        if value != wanted:
            raise FileError(f"{where}: {field}={value!r}; only {wanted!r} can be imported exactly")
    layers = number(config, "num_hidden_layers", where)
    return Shape(name=name, baseline_pairs=layers, **shape_fields(config, where))
