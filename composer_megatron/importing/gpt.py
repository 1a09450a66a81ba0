"""A ``torch_dist`` checkpoint of Megatron's GPTModel as a source of weights: each layer becomes its A, its M, or both.

A Llama's layers have both and become ``(AM)xN``; those of `composer_megatron.gpt_spec` have one and keep the sequence.
Both of Megatron's layouts are read: equal layers stacked in one tensor, the default, and each layer under its own name.
So are both names of the norms: Megatron stores a norm before a matrix with that matrix, unless told otherwise.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.checkpoint import TRACKER
from composer_megatron.errors import ComposerError, FileError
from composer_megatron.files import naming
from composer_megatron.importing.conversion import Source
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape
from composer_megatron.stored import Place, read_tensor, unreadable

_PARTS = MappingProxyType(
    {
        "A": MappingProxyType(
            {
                "input_layernorm.weight": ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
                "self_attention.linear_qkv.weight": ("self_attention.linear_qkv.weight",),
                "self_attention.linear_proj.weight": ("self_attention.linear_proj.weight",),
            }
        ),
        "M": MappingProxyType(
            {
                "pre_mlp_layernorm.weight": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
                "mlp.linear_fc1.weight": ("mlp.linear_fc1.weight",),
                "mlp.linear_fc2.weight": ("mlp.linear_fc2.weight",),
            }
        ),
    }
)
"""For each kind of block, our parameters and the names that each may have in a layer of GPTModel."""

_ENDS = MappingProxyType(
    {
        "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
        "decoder.final_norm.weight": "decoder.final_layernorm.weight",
        "output_layer.weight": "output_layer.weight",
    }
)
"""Our parameters outside the blocks, and their names in GPTModel."""

_FIXED = MappingProxyType(
    {
        "swiglu": (True,),
        "normalization": ("RMSNorm",),
        "position_embedding_type": ("rope",),
        "add_bias_linear": (False,),
        "add_qkv_bias": (False, None),
        "qk_layernorm": (False, None),
        "rotary_percent": (1.0, None),
        "rotary_interleaved": (False, None),
        "use_rope_scaling": (False, None),
        "rotary_seq_len_interpolation_factor": (None,),
        "apply_layernorm_1p": (False, None),
        "apply_residual_connection_post_layernorm": (False, None),
        "attention_output_gate": (False, None),
        "multi_latent_attention": (False, None),
        "window_size": (None,),
        "num_experts": (None,),
        "mtp_num_layers": (None, 0),
        "experimental_attention_variant": (None,),
        "use_mup": (False, None),
        "hybrid_layer_pattern": (None,),
    }
)
"""Megatron's arguments that change what a model computes, and the values that ours have; None, too, where absent."""

_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.")


def open_gpt(path: Path) -> Source:
    """Read what a checkpoint says about itself; no weights yet.

    Args:
        path: A folder of Megatron's ``--save``, or an iteration's folder in it.

    Raises:
        FileError: If it is no ``torch_dist`` checkpoint, was not trained with blocks like ours, or a tensor is missing
            or has no place in ours.
        ComposerError: If Megatron-core is not installed.
    """
    folder = _iteration_folder(path)
    tensors, training = _metadata(folder)
    _check_arguments(folder, training)
    places = _layer_places(tensors)
    letters = "".join(kind for layer in places for kind in "AM" if any(name in layer for name in _weights(kind)))
    shape = _shape(folder, training, tensors, pairs=max(1, letters.count("A")))
    named = dict(_named_places(folder, tensors, places, tied=shape.tied_embeddings))
    _check_nothing_left(folder, tensors, used={place.key for place in named.values()})
    dtypes = [place.dtype for place in named.values()]
    return Source(
        path=folder,
        architecture=Architecture(
            CompositeSequence(letters), shape, {"method": "import", "source": str(training.get("save") or folder)}
        ),
        sequence_length=training["seq_length"],
        dtype=functools.reduce(torch.promote_types, dtypes),
        tensors={name: functools.partial(read_tensor, folder, place) for name, place in named.items()},
        tokenizer=None,
    )


def _iteration_folder(path: Path) -> Path:
    if (path / "metadata.json").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise FileError(f"{path} is no checkpoint of Megatron's: it has neither metadata.json nor {TRACKER}")
    with naming(tracker, "read"):
        newest = tracker.read_text(encoding="utf-8", errors="replace").strip()
    folder = path / (f"iter_{int(newest):07d}" if newest.isdecimal() else newest)
    if not (folder / "metadata.json").is_file():
        hint = "a checkpoint of the older 'torch' format has to be converted by Megatron (--ckpt-convert-format)"
        raise FileError(f"{folder}, which {tracker} names, is no whole torch_dist checkpoint; {hint}")
    return folder


def _metadata(folder: Path) -> tuple[dict[str, Place], dict[str, Any]]:
    """Every tensor of the model in the checkpoint, and the arguments of the run that saved it."""
    cpu.skip_compilation()
    try:
        from megatron.core.dist_checkpointing import load_common_state_dict, load_tensors_metadata
    except ModuleNotFoundError as error:
        raise ComposerError(f'{error.name} is not installed: pip install "composer-megatron[train]"') from None
    try:
        tensors = load_tensors_metadata(str(folder))
        common = load_common_state_dict(str(folder))
    except (Exception, CheckpointException) as error:  # Megatron, PyTorch, pickle and zip each raise their own
        raise unreadable(folder, error) from error
    if "args" not in common:
        raise FileError(f"{folder} does not say how it was trained (it has no args); it has to be saved by Megatron")
    places = {
        key: Place(key, tuple(tensor.global_shape), tensor.dtype)
        for key, tensor in tensors.items()
        if key.startswith(_MODEL_PREFIXES) and not key.endswith("_extra_state")
    }
    return places, vars(common["args"])


def _check_arguments(folder: Path, training: Mapping[str, Any]) -> None:
    wrong = [
        f"{name}={training.get(name)!r} (ours have {wanted[0]!r})"
        for name, wanted in _FIXED.items()
        if training.get(name) not in wanted
    ]
    if wrong:
        raise FileError(f"{folder} cannot be imported exactly: it was trained with {', '.join(wrong)}")


def _shape(folder: Path, training: Mapping[str, Any], tensors: Mapping[str, Place], *, pairs: int) -> Shape:
    needed = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "layernorm_epsilon", "rotary_base", "seq_length")
    missing = [name for name in needed if training.get(name) is None]
    if missing or "embedding.word_embeddings.weight" not in tensors:
        lacking = ", ".join(missing) or "embedding.word_embeddings.weight"
        raise FileError(f"{folder} is no whole checkpoint of a language model: it lacks {lacking}")
    hidden, heads = training["hidden_size"], training["num_attention_heads"]
    grouped = training.get("group_query_attention", True) and training.get("num_query_groups")
    return Shape(
        name="imported",
        hidden_size=hidden,
        ffn_hidden_size=training["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=training["num_query_groups"] if grouped else heads,
        head_dim=training.get("kv_channels") or hidden // heads,
        vocab_size=tensors["embedding.word_embeddings.weight"].size[0],  # as Megatron padded it
        tied_embeddings=not training.get("untie_embeddings_and_output_weights", False),
        baseline_pairs=pairs,
        rope_theta=training["rotary_base"],
        norm_epsilon=training["layernorm_epsilon"],
        init_std=training.get("init_method_std") or 0.02,
    )


def _layer_places(tensors: Mapping[str, Place]) -> list[dict[str, Place]]:
    """For each layer of GPTModel, its tensors by their names in it."""
    layers: dict[int, dict[str, Place]] = {}
    for key, place in tensors.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            continue
        number, name = match.groups()
        if number is not None:
            layers.setdefault(int(number), {})[name] = place
            continue
        count, *size = place.size
        for layer in range(count):
            layers.setdefault(layer, {})[name] = Place(key, tuple(size), place.dtype, layer)
    return [layers[number] for number in sorted(layers)]


def _weights(kind: str) -> list[str]:
    """The matrices by which a layer shows that it has a block of that kind."""
    return [name for names in _PARTS[kind].values() if len(names) == 1 for name in names]


def _named_places(
    folder: Path, tensors: Mapping[str, Place], layers: list[dict[str, Place]], *, tied: bool
) -> Iterator[tuple[str, Place]]:
    """Each of our parameters, and where the checkpoint has it."""
    for ours, theirs in _ENDS.items():
        if ours == "output_layer.weight" and tied:
            continue
        if theirs not in tensors:
            raise FileError(f"{folder} lacks {theirs}; restore it")
        yield ours, tensors[theirs]
    block = 0
    for number, layer in enumerate(layers):
        for kind in "AM":
            if not any(name in layer for name in _weights(kind)):
                continue
            for ours, names in _PARTS[kind].items():
                found = [layer[name] for name in names if name in layer]
                if len(found) != 1:
                    raise FileError(f"{folder} has {len(found)} of {' and '.join(names)} in layer {number}; needs one")
                yield f"decoder.layers.{block}.{ours}", found[0]
            block += 1


def _check_nothing_left(folder: Path, tensors: Mapping[str, Place], used: set[str]) -> None:
    left = [key for key in tensors if key not in used]
    if left:
        more = f" and {len(left) - 3} more" if left[3:] else ""
        raise FileError(f"{folder} cannot be imported exactly: ours have no place for {', '.join(left[:3])}{more}")
