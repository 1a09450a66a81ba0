"""A Llama of Hugging Face's as a source of weights: layer i becomes block 2i, attention, and block 2i + 1, MLP.

Only what the blocks compute exactly is taken: every difference in ``config.json`` or in the tensors is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from composer_megatron.architecture import Architecture
from composer_megatron.conversion import Source
from composer_megatron.errors import ComposerError, FileError
from composer_megatron.files import read_json
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

_DTYPES = MappingProxyType({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16})
_PARTS = MappingProxyType(
    {
        "A": MappingProxyType(
            {
                "input_layernorm.weight": ("input_layernorm",),
                "self_attention.linear_qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "self_attention.linear_proj.weight": ("self_attn.o_proj",),
            }
        ),
        "M": MappingProxyType(
            {
                "pre_mlp_layernorm.weight": ("post_attention_layernorm",),
                "mlp.linear_fc1.weight": ("mlp.gate_proj", "mlp.up_proj"),
                "mlp.linear_fc2.weight": ("mlp.down_proj",),
            }
        ),
    }
)
"""For each kind of block, our parameters and the modules of a Llama layer whose weights they join, in order."""

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


class _Stored(NamedTuple):
    """Where a tensor is, and what it looks like."""

    file: Path
    size: tuple[int, ...]
    dtype: torch.dtype


def open_llama(folder: Path) -> Source:
    """Read the configuration and the headers of a folder with ``config.json`` and safetensors; no weights yet.

    Raises:
        FileError: If a file is missing or corrupt, the model is not exactly a Llama, or a tensor is missing, of another
            size, or has no place in ours.
        ComposerError: If safetensors is not installed.
    """
    where = folder / "config.json"
    config = read_json(where, "a Hugging Face configuration")
    shape = llama_shape(config, where, name=folder.resolve().name)
    stored = _stored_tensors(folder)
    wanted = dict(_sizes(shape))
    _check_tensors(folder, stored, wanted, tied=shape.tied_embeddings)
    dtypes = [stored[name].dtype for name in wanted]
    return Source(
        path=folder,
        architecture=Architecture(
            CompositeSequence("AM" * shape.baseline_pairs), shape, {"method": "import", "source": shape.name}
        ),
        sequence_length=_number(config, "max_position_embeddings", where, 2048),
        dtype=functools.reduce(torch.promote_types, dtypes),
        tensors=dict(_readers(shape, stored)),
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
    heads = _number(config, "num_attention_heads", where)
    hidden = _number(config, "hidden_size", where)
    return Shape(
        name=name,
        hidden_size=hidden,
        ffn_hidden_size=_number(config, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=_number(config, "num_key_value_heads", where, heads),
        head_dim=_number(config, "head_dim", where, hidden // heads),
        vocab_size=_number(config, "vocab_size", where),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        baseline_pairs=_number(config, "num_hidden_layers", where),
        rope_theta=_rope_theta(config, where),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
    )


def _number(config: Mapping[str, Any], field: str, where: Path, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FileError(f"{where}: {field}={value!r}; expected a whole number of at least 1")
    return value


def _rope_theta(config: Mapping[str, Any], where: Path) -> int:
    """The base of a plain rotary embedding; transformers 4 and 5 write it in different places."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problem = f"rotary embedding of type {kind!r} (rope_scaling)"
        raise FileError(f"{where}: {problem}; only the plain one, 'default', can be imported exactly")
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if part != 1:
        raise FileError(f"{where}: partial_rotary_factor={part!r}; only 1.0 can be imported exactly")
    if not isinstance(theta, int | float) or theta != int(theta):
        raise FileError(f"{where}: rope_theta={theta!r}; expected a whole number")
    return int(theta)


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ComposerError('safetensors is not installed: pip install "composer-megatron[train]"') from None
    found: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(name)
                    found[name] = _Stored(path, tuple(part.get_shape()), _dtype(part.get_dtype(), name, path))
        except (SafetensorError, OSError) as error:
            raise FileError(f"cannot read {path}: {error}; restore it") from error
    return found


def _dtype(stored: str, name: str, path: Path) -> torch.dtype:
    if stored not in _DTYPES:
        raise FileError(f"{path}: {name} is of type {stored}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[stored]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index, "an index of safetensors").get("weight_map")
        if not isinstance(places, dict) or not places:
            raise FileError(f"{index} has no weight_map; restore it")
        return [folder / name for name in sorted(set(places.values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    hint = "; save the model again with safe_serialization=True" if list(folder.glob("*.bin")) else ""
    raise FileError(f"{folder} has no model.safetensors and no index of several{hint}")


def _sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of every tensor that a Llama of this shape has."""
    hidden, ffn, vocab = shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    modules: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(shape.baseline_pairs):
        for module, size in modules.items():
            yield f"model.layers.{layer}.{module}.weight", size
    yield "model.norm.weight", (hidden,)
    if not shape.tied_embeddings:
        yield "lm_head.weight", (vocab, hidden)


def _check_tensors(
    folder: Path, stored: Mapping[str, _Stored], wanted: Mapping[str, tuple[int, ...]], *, tied: bool
) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    for name, tensor in stored.items():
        copy_or_constant = name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
        if name in wanted and tensor.size != wanted[name]:
            problems.append(f"{name} is {tensor.size}; config.json makes it {wanted[name]}")
        elif name not in wanted and not copy_or_constant:
            problems.append(f"{name} is no tensor of a Llama")
    if problems:
        more = f"; and {len(problems) - 3} more" if problems[3:] else ""
        raise FileError(f"{folder} does not hold the model of its config.json: {'; '.join(problems[:3])}{more}")


def _readers(shape: Shape, stored: Mapping[str, _Stored]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    def reader(*names: str) -> Callable[[], Tensor]:
        return functools.partial(_read_joined, [(stored[name].file, name) for name in names], shape)

    yield "embedding.word_embeddings.weight", reader("model.embed_tokens.weight")
    for layer in range(shape.baseline_pairs):
        for place, kind in enumerate("AM"):
            for ours, modules in _PARTS[kind].items():
                theirs = (f"model.layers.{layer}.{module}.weight" for module in modules)
                yield f"decoder.layers.{2 * layer + place}.{ours}", reader(*theirs)
    yield "decoder.final_norm.weight", reader("model.norm.weight")
    if not shape.tied_embeddings:
        yield "output_layer.weight", reader("lm_head.weight")


def _read_joined(places: list[tuple[Path, str]], shape: Shape) -> Tensor:
    parts = [_read(file, name) for file, name in places]
    return join_attention(*parts, shape=shape) if len(parts) == 3 else torch.cat(parts)


def _read(path: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read {name} in {path}: {error}; restore it") from error


def join_attention(query: Tensor, key: Tensor, value: Tensor, *, shape: Shape) -> Tensor:
    """Query, key and value projections in Megatron's one matrix: group by group, query heads, key head, value head.

    Args:
        query: (heads · d, hidden).
        key: (groups · d, hidden).
        value: (groups · d, hidden).
        shape: Says how many heads and groups there are.

    Returns:
        ((heads + 2 groups) · d, hidden).
    """
    groups = shape.num_query_groups
    return torch.cat([part.unflatten(0, (groups, -1)) for part in (query, key, value)], dim=1).flatten(0, 1)
