"""Widths of single primitives: mixtures of experts, Mamba-2, Gated DeltaNet, latent attention.

A `Shape` may give each of them. Where it does not, `default` derives them from the shape's other widths by the
proportions of a published model, so that every primitive can be built in every shape.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from composer_megatron.errors import ShapeError

if TYPE_CHECKING:
    from composer_megatron.shape import Shape


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Widths that belong together: whole numbers of at least 1, or of at least 0 where that is the default."""

    def __post_init__(self) -> None:
        """Raise a `ShapeError` that names the field, its value and what would do."""
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 1 if field.default is dataclasses.MISSING else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise self._error(field.name, value, f"a whole number of at least {least}")

    def _error(self, field: str, value: Any, expected: str) -> ShapeError:
        return ShapeError(f"{type(self).__name__}: {field}={value!r}; expected {expected}")

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Self:
        """The group from JSON values; `where` names the source in errors."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(values, dict):
            raise ShapeError(f"{where}: expected an object with {', '.join(known)}")
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
                raise ShapeError(f"{where}: unknown field {key!r}; {hint}")
        missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in values]
        if missing:
            raise ShapeError(f"{where}: missing {', '.join(missing)}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Experts(_Group):
    """Widths of a mixture of experts: SwiGLU MLPs of which a router sends each token to the `top_k` it scores highest.

    Attributes:
        num_experts: Experts of a block.
        top_k: Experts a token goes to.
        ffn_hidden_size: Inner width of an expert.
        shared_ffn_hidden_size: Inner width of an expert that all tokens go to as well; 0 for none.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0

    def __post_init__(self) -> None:
        """Raise a `ShapeError` where a token would have to go to more experts than there are."""
        super().__post_init__()
        if self.top_k > self.num_experts:
            raise self._error("top_k", self.top_k, f"at most num_experts={self.num_experts}")

    @classmethod
    def default(cls, shape: Shape) -> Experts:
        """Eight experts of which a token takes two, which together are as wide as the shape's MLP.

        So a token costs what it costs in an MLP block, router aside, and the block holds four times the weights.
        """
        return cls(num_experts=8, top_k=2, ffn_hidden_size=max(1, shape.ffn_hidden_size // 2))


@dataclass(frozen=True, kw_only=True)
class Mamba(_Group):
    """Widths of Mamba-2 (Dao and Gu, arXiv 2405.21060).

    Attributes:
        num_heads: Heads; with `head_dim` they make the inner width.
        head_dim: Width of a head.
        num_groups: Groups of heads that share B and C; a divisor of `num_heads`.
        state_dim: Width of a head's state, so that it has head_dim x state_dim elements.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int

    def __post_init__(self) -> None:
        """Raise a `ShapeError` where heads and groups do not fit together."""
        super().__post_init__()
        if self.num_heads % self.num_groups:
            raise self._error("num_groups", self.num_groups, f"a divisor of num_heads={self.num_heads}")

    @property
    def conv_width(self) -> int:
        """Tokens that the convolution sees: four, as Megatron-core has it."""
        return 4

    @property
    def inner(self) -> int:
        """Inner width."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.num_groups * self.state_dim

    @classmethod
    def default(cls, shape: Shape) -> Mamba:
        """Twice the heads of attention, or more narrower ones: at hidden = heads x 64 the paper's own proportions."""
        head_dim = min(64, shape.head_dim)
        return cls(
            num_heads=2 * shape.num_attention_heads * (shape.head_dim // head_dim),
            head_dim=head_dim,
            num_groups=shape.num_query_groups,
            state_dim=min(128, 2 * shape.head_dim),
        )


@dataclass(frozen=True, kw_only=True)
class DeltaNet(_Group):
    """Widths of Gated DeltaNet (Yang et al., arXiv 2412.06464).

    Attributes:
        num_key_heads: Heads of queries and keys.
        num_value_heads: Heads of values; equal groups of them share a query and a key.
        key_head_dim: Width of a query and of a key.
        value_head_dim: Width of a value, so that a head's state has key_head_dim x value_head_dim elements.
        conv_width: Tokens that the convolution sees.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int

    def __post_init__(self) -> None:
        """Raise a `ShapeError` where the heads do not fit together."""
        super().__post_init__()
        if self.num_value_heads % self.num_key_heads:
            raise self._error("num_value_heads", self.num_value_heads, f"a multiple of {self.num_key_heads} key heads")

    @property
    def keys(self) -> int:
        """Width of all keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @classmethod
    def default(cls, shape: Shape) -> DeltaNet:
        """Keys as wide as attention's queries, values twice as wide: the proportions of Qwen3-Next."""
        return cls(
            num_key_heads=shape.num_attention_heads,
            num_value_heads=2 * shape.num_attention_heads,
            key_head_dim=shape.head_dim,
            value_head_dim=shape.head_dim,
            conv_width=4,
        )


@dataclass(frozen=True, kw_only=True)
class Latent(_Group):
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        kv_rank: Width of the latent vector that keys and values are made of.
        rope_dim: Width of the part of a query and of the shared key that rotary embeddings turn; even.
        key_dim: Width of a head's other part.
        value_dim: Width of a head's value.
        q_rank: Width of the latent vector that queries are made of; 0 makes them of the hidden states.
    """

    kv_rank: int
    rope_dim: int
    key_dim: int
    value_dim: int
    q_rank: int = 0

    def __post_init__(self) -> None:
        """Raise a `ShapeError` for an odd rotary width."""
        super().__post_init__()
        if self.rope_dim % 2:
            raise self._error("rope_dim", self.rope_dim, "an even number, since rotary embeddings turn pairs")

    @classmethod
    def default(cls, shape: Shape) -> Latent:
        """Four head widths of latent and half a head width of rotary part, as section 2.1.4 of the paper chooses."""
        half = shape.head_dim // 2
        return cls(
            kv_rank=4 * shape.head_dim, rope_dim=half + half % 2, key_dim=shape.head_dim, value_dim=shape.head_dim
        )
