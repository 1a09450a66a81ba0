"""Widths: everything about a model but the order of its blocks, and the Llama-aligned presets."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer_megatron.errors import ShapeError
from composer_megatron.files import read_json
from composer_megatron.widths import DeltaNet, Experts, Latent, Mamba


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The widths of a model and the depth of the Llama-style baseline that it is measured against.

    Attributes:
        name: A preset's name, or the user's.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Inner width of the SwiGLU MLP.
        num_attention_heads: Query heads.
        num_query_groups: Key/value heads; query heads share them in equal groups.
        head_dim: Width of a head; even, for rotary embeddings.
        vocab_size: Rows of the embedding.
        tied_embeddings: Whether the output layer is the embedding.
        baseline_pairs: Attention+MLP pairs of the Llama baseline, so that it is ``(AM)xN``.
        rope_theta: Base of the rotary embedding.
        norm_epsilon: Added to the mean square in RMSNorm.
        init_std: Standard deviation of the initial weights.
        window: Keys that a query of a sliding-window block sees, its own included.
        experts: Widths of mixtures of experts; None for `Experts.default`.
        mamba: Widths of Mamba-2; None for `Mamba.default`.
        delta_net: Widths of Gated DeltaNet; None for `DeltaNet.default`.
        latent: Widths of latent attention; None for `Latent.default`.
        rope_scaling_factor: By how much Llama 3's rule slows its slowest pairs down, for long texts; 1 leaves them as
            they are. See `composer_megatron.rotary`.
    """

    name: str
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    baseline_pairs: int
    rope_theta: int = 500_000
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    window: int = 1024
    experts: Experts | None = None
    mamba: Mamba | None = None
    delta_net: DeltaNet | None = None
    latent: Latent | None = None
    rope_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        """Raise a `ShapeError` that names the field, its value and what would do."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise self._error(field.name, value, "a whole number of at least 1")
            if field.type == "float" and not (isinstance(value, int | float) and value > 0):
                raise self._error(field.name, value, "a positive number")
            if field.type == "bool" and not isinstance(value, bool):
                raise self._error(field.name, value, "true or false")
        if self.num_attention_heads % self.num_query_groups:
            expected = f"a divisor of num_attention_heads={self.num_attention_heads}"
            raise self._error("num_query_groups", self.num_query_groups, expected)
        if self.head_dim % 2:
            raise self._error("head_dim", self.head_dim, "an even number, since rotary embeddings turn pairs")
        if not 1 <= self.rope_scaling_factor < math.inf:
            raise self._error("rope_scaling_factor", self.rope_scaling_factor, "a number of at least 1")

    def _error(self, field: str, value: Any, expected: str) -> ShapeError:
        return ShapeError(f"shape {self.name!r}: {field}={value!r}; expected {expected}")

    @property
    def expert_widths(self) -> Experts:
        """The widths of mixtures of experts, given or derived."""
        return self.experts or Experts.default(self)

    @property
    def mamba_widths(self) -> Mamba:
        """The widths of Mamba-2, given or derived."""
        return self.mamba or Mamba.default(self)

    @property
    def delta_net_widths(self) -> DeltaNet:
        """The widths of Gated DeltaNet, given or derived."""
        return self.delta_net or DeltaNet.default(self)

    @property
    def latent_widths(self) -> Latent:
        """The widths of latent attention, given or derived."""
        return self.latent or Latent.default(self)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `from_dict` reads them back.

        A `rope_scaling_factor` of 1 is left out, as in files from before there was one.
        """
        values = dataclasses.asdict(self)
        if self.rope_scaling_factor == 1:
            del values["rope_scaling_factor"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "shape") -> Shape:
        """A shape from JSON values.

        ``head_dim`` may be left out when the heads divide ``hidden_size``. `where` names the source in errors.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known fields: {', '.join(known)}"
                raise ShapeError(f"{where}: unknown field {key!r}{hint}")
        values = {"name": "custom"} | values
        if "head_dim" not in values:
            values["head_dim"] = _head_dim(values, where)
        missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in values]
        if missing:
            raise ShapeError(f"{where}: missing {', '.join(missing)}")
        groups = {
            name: group.from_dict(values[name], f"{where}: {name}")
            for name, group in _GROUPS.items()
            if values.get(name) is not None
        }
        return cls(**(values | groups))


_GROUPS: Mapping[str, type[Experts] | type[Mamba] | type[DeltaNet] | type[Latent]] = MappingProxyType(
    {"experts": Experts, "mamba": Mamba, "delta_net": DeltaNet, "latent": Latent}
)
"""The widths of single primitives by their field of `Shape`."""


def _head_dim(values: dict[str, Any], where: str) -> int:
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        raise ShapeError(f"{where}: needs hidden_size and num_attention_heads as whole numbers")
    if hidden % heads:
        problem = f"num_attention_heads={heads} does not divide hidden_size={hidden}"
        raise ShapeError(f"{where}: {problem}; choose heads that divide it, or give head_dim")
    return hidden // heads


def _llama(name: str, widths: str, pairs: int, *, tied: bool, vocab_size: int = 128_256) -> Shape:
    hidden, ffn, heads, groups, head_dim = map(int, widths.split("/"))
    return Shape(
        name=name,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=vocab_size,
        tied_embeddings=tied,
        baseline_pairs=pairs,
    )


_PRESETS = (
    # 1b and 3b are Llama 3.2 1B and 3B, 8b and 70b are Llama 3.1 8B and 70B; 350m is Table 8 of arXiv 2510.04800.
    _llama("350m", "1536/4096/24/8/64", 14, tied=True),
    _llama("1b", "2048/8192/32/8/64", 16, tied=True),
    _llama("3b", "3072/8192/24/8/128", 28, tied=True),
    _llama("8b", "4096/14336/32/8/128", 32, tied=False),
    _llama("70b", "8192/28672/64/8/128", 80, tied=False),
    # Ours: small enough for two CPU cores, with Llama 3.2 1B's ratios of ffn to hidden (4) and of heads to groups (4).
    _llama("tiny", "64/256/4/1/16", 4, tied=True, vocab_size=512),
    _llama("demo", "160/640/8/2/20", 6, tied=True, vocab_size=4096),
    _llama("60m", "512/2048/8/2/64", 8, tied=True, vocab_size=32_768),
)

PRESETS = MappingProxyType({shape.name: shape for shape in _PRESETS})
"""The shapes that have a name."""


def load_shape(name_or_path: str) -> Shape:
    """A preset by name, or a shape from a JSON file.

    Raises:
        ShapeError: If it is neither, or its widths do not fit together.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".json" or path.is_file():
        return Shape.from_dict(read_json(path, "a shape"), where=str(path))
    near = difflib.get_close_matches(name_or_path.lower(), PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "give a preset's name or a JSON file"
    raise ShapeError(f"unknown shape {name_or_path!r}: {hint}; presets: {', '.join(PRESETS)}")
