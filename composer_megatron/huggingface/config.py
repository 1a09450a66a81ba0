"""Widths from a Hugging Face ``config.json``: the fields that Llama and our own exported models share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer_megatron.errors import FileError
from composer_megatron.rotary import LLAMA3


def shape_fields(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The fields of a `Shape` that a configuration holds: all widths, but neither name nor depth.

    Args:
        config: The content of ``config.json``.
        where: That file, for messages.

    Raises:
        FileError: If a field is missing, is no number, or says what our blocks do not compute.
    """
    heads = number(config, "num_attention_heads", where)
    hidden = number(config, "hidden_size", where)
    return {
        "hidden_size": hidden,
        "ffn_hidden_size": number(config, "intermediate_size", where),
        "num_attention_heads": heads,
        "num_query_groups": number(config, "num_key_value_heads", where, heads),
        "head_dim": number(config, "head_dim", where, max(1, hidden // heads)),
        "vocab_size": number(config, "vocab_size", where),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "rope_theta": _rope_theta(config, where),
        "rope_scaling_factor": _rope_scaling_factor(config, where),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "init_std": config.get("initializer_range", 0.02),
    }


def number(config: Mapping[str, Any], field: str, where: Path, default: int | None = None) -> int:
    """A whole number of at least 1 from a configuration; `default` where it is absent or null.

    Raises:
        FileError: If it is something else.
    """
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FileError(f"{where}: {field}={value!r}; expected a whole number of at least 1")
    return value


def rope_scaling(config: Mapping[str, Any]) -> str | None:
    """The kind of scaling of the rotary embedding, such as ``llama3``; None for a plain one."""
    kind = _rope(config).get("rope_type", _rope(config).get("type", "default"))
    return None if kind == "default" else str(kind)


def without_rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with a plain rotary embedding of the same base."""
    plain = {name: value for name, value in _rope(config).items() if name in ("rope_theta", "partial_rotary_factor")}
    return {**config, "rope_parameters": plain, "rope_scaling": None}


def rope_scaling_fields(factor: float) -> dict[str, Any]:
    """What a configuration says of the scaling, beside its ``rope_theta``; nothing where there is none.

    In the words of transformers 4, which 5 reads, too, and turns into its own ``rope_parameters``.
    """
    return {} if factor == 1 else {"rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3}}


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a configuration says of the rotary embedding; transformers 4 and 5 write it in different places."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    return rope if isinstance(rope, Mapping) else {}


def _rope_theta(config: Mapping[str, Any], where: Path) -> int:
    """The base of the rotary embedding."""
    rope = _rope(config)
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if part != 1:
        raise FileError(f"{where}: partial_rotary_factor={part!r}; only 1.0 can be imported exactly")
    if not isinstance(theta, int | float) or theta != int(theta):
        raise FileError(f"{where}: rope_theta={theta!r}; expected a whole number")
    return int(theta)


def _rope_scaling_factor(config: Mapping[str, Any], where: Path) -> float:
    """The factor of a scaling by Llama 3's rule; 1 for none."""
    kind, rope = rope_scaling(config), _rope(config)
    if kind is None:
        return 1.0
    without = "a Llama is taken without its scaling by --drop-rope-scaling, to be trained further"
    if kind != "llama3":
        problem = f"rotary embedding of type {kind!r} (rope_scaling); only 'llama3' can be imported exactly"
        raise FileError(f"{where}: {problem}; {without}")
    for name, wanted in LLAMA3.items():
        if rope.get(name) != wanted:
            problem = f"{name}={rope.get(name)!r} (rope_scaling); only {wanted!r} can be imported exactly"
            raise FileError(f"{where}: {problem}; {without}")
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 1 <= factor < math.inf:
        raise FileError(f"{where}: factor={factor!r} (rope_scaling); expected a number of at least 1")
    return float(factor)
