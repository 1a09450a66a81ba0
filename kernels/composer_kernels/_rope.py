"""Launches of the kernel behind `rope` and its kin: on one tensor or two, on a packed one, from three to a packed one.

What a launch takes beside addresses and the first position follows from the plan and from how tensors lie. A settled
plan keeps it for all calls that agree in these.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from composer_kernels._launch import Kept, Kernel, Variant
from composer_kernels._rope_kernels import _kernel

_rotate = Kernel(_kernel)


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched.

    Attributes:
        tokens: Tokens of a tile, a power of two.
        heads: Heads of a tile, a power of two.
        warps: Warps of a program.
    """

    tokens: int
    heads: int
    warps: int

    @functools.cached_property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """As `Kernel.launch` takes them."""
        return (("num_warps", self.warps),)


@functools.cache
def default_launch(q_heads: int, kv_heads: int, with_v: bool, half: int) -> Launch:
    """Tiles of 512 pairs a warp, four 16-byte loads a thread; many heads share a token's cosines, but few are padding.

    Heads of 32 pairs go four at a time to programs of one warp: on an H100, where (8, 8, 4) was also timed, 8192 tokens
    of 32 query and 8 key heads take 35.7 us in place of 36.3, and packed again 35.8 in place of 36.1.
    """
    parts = (q_heads, kv_heads, kv_heads if with_v else 0)
    most, warps = (4, 1) if half == 32 else (16, 4)
    heads = max(h for h in (1, 2, 4, 8, 16) if h <= most and (h == 1 or sum(-n % h for n in parts) <= sum(parts) / 8))
    return Launch(max(1, 512 * warps // (heads * triton.next_power_of_2(half))), heads, warps)


class Plan(NamedTuple):
    """How tokens are numbered and heads lie; a tuple of integers, which is what operators take.

    Attributes:
        q_heads: Heads of the tensor, or query heads of a packed one.
        kv_heads: Key heads of a packed tensor; 0 for a plain one.
        head_dim: Elements of a head.
        interleaved: Whether pairs are neighbours and not HALF apart.
        offset: Position of the first token.
        cp_rank: This process in its context-parallel group.
        cp_size: Processes of that group.
        restart: Whether each packed sequence begins at position 0.
        sign: 1, or -1 to turn back.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    interleaved: bool
    offset: int
    cp_rank: int
    cp_size: int
    restart: bool
    sign: int = 1

    def back(self) -> Plan:
        """The plan that undoes this one."""
        return Plan(*self[:-1], -self.sign)

    def kept(self, kind: Hashable) -> Ready | None:
        """What a settled plan keeps of that kind: nothing here."""
        return None

    def keep(self, kind: Hashable, ready: Ready) -> Ready:
        """Keep `ready`, if this plan is settled, and return it."""
        return ready


class Settled(Plan):
    """A plan that fits tensors of one shape, type and device and one kind of tables, and keeps what is ready for these.

    Attributes:
        most_offset: The last position that the first token may have.
    """

    most_offset: int
    _ready: Kept[Ready]

    @classmethod
    def of(cls, plan: Plan, most_offset: int) -> Settled:
        """`plan`, nothing made ready yet; in integers proper, since those that equal them will find it."""
        return cls._sharing(Kept(), most_offset, map(operator.index, plan))

    @classmethod
    def _sharing(cls, ready: Kept[Ready], most_offset: int, values: Iterable[int]) -> Settled:
        settled = cls(*values)  # type: ignore[arg-type]
        settled.most_offset, settled._ready = most_offset, ready
        return settled

    def at(self, offset: int) -> Settled:
        """The same for another first position."""
        if offset == self.offset:
            return self
        return self._sharing(self._ready, self.most_offset, (*self[:4], offset, *self[5:]))

    def back(self) -> Settled:
        """The plan that undoes this one, for gradients."""
        return self._sharing(self._ready, self.most_offset, (*self[:-1], -self.sign))

    def kept(self, kind: Hashable) -> Ready | None:
        """What was made ready, of that kind and in this direction."""
        return self._ready.get((self.sign, kind))

    def keep(self, kind: Hashable, ready: Ready) -> Ready:
        """Keep and return `ready`."""
        return self._ready.keep((self.sign, kind), ready)


class Tables(NamedTuple):
    """What depends on positions.

    Attributes:
        cos: (positions, HALF), or the angles themselves.
        sin: Likewise, strided alike; or None where `cos` holds angles.
        cu_seqlens: (sequences + 1,) boundaries of packed sequences in the whole batch, or None.
    """

    cos: Tensor
    sin: Tensor | None
    cu_seqlens: Tensor | None


Parts = tuple[Tensor, Tensor | None, Tensor | None]
"""Query, key and value; or one tensor, plain or packed, alone."""


def part_strides(x: Tensor) -> tuple[int, int, int]:
    """From place to place, from batch entry to batch entry and from head to head of ([t or s, b], heads, d)."""
    stride = x.stride()
    return (stride[0], stride[1], stride[2]) if x.dim() == 4 else (stride[0], 0, stride[1])


def with_neighbours(x: Tensor) -> Tensor:
    """`x` with the elements of a head or row side by side: itself, or a copy."""
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Ready:
    """The kernel made ready for all calls that agree in plans, but for the first position, and in traits.

    Attributes:
        variant: Of the kernel.
        programs: Of its grid.
        tokens: (length, batch) or (length,).
        row_strides: Of the key heads, or the value heads, of a packed input.
        before: What the kernel counts, up to the first position.
        after: And after it.
        sign: Of the angle.
    """

    variant: Variant
    programs: int
    tokens: tuple[int, ...]
    row_strides: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    sign: float

    def launch(self, parts: Parts, out: Parts, tables: Tables, offset: int) -> None:
        """Launch on query, key and value, or on one tensor, the first token at position `offset`."""
        counts = (*self.before, offset, *self.after)
        self.variant.launch(self.programs, (*parts, *out, *tables), counts, (self.sign,))


def launch_turn(x: Tensor, tables: Tables, plan: Plan, in_place: bool, launch: Launch | None = None) -> Tensor:
    """Turn a plain tensor (…, heads, d) or a packed one (…, W) into one of the same shape, or itself."""
    if not in_place:
        x = with_neighbours(x)
    kind = ("turn", in_place, x.stride())
    ready = plan.kept(kind)
    if ready is None:
        packed = plan.kv_heads > 0
        strides = _packed_strides(x) if packed else (*part_strides(x), 0, 0, 0, 0, 0, 0)
        made = _prepare(x, strides, tables, plan, (packed, packed), in_place, not in_place, launch)
        ready = plan.keep(kind, made)
    y = x if in_place else x.new_empty(*x.shape)
    ready.launch((x, None, None), (y, None, None), tables, plan.offset)
    return y


def launch_pair(
    q: Tensor, k: Tensor, tables: Tables, plan: Plan, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Turn two tensors (…, heads, d), the second with heads of its own number, in one launch; `plan` is the first's."""
    q, k = with_neighbours(q), with_neighbours(k)
    kind = ("pair", q.stride(), k.shape[-2], k.stride())
    ready = plan.kept(kind)
    if ready is None:
        strides = (*part_strides(q), *part_strides(k), 0, 0, 0)
        both = Plan(plan.q_heads, k.shape[-2], *plan[2:])
        ready = plan.keep(kind, _prepare(q, strides, tables, both, (False, False), False, False, launch))
    turned = q.new_empty(*q.shape), k.new_empty(*k.shape)
    ready.launch((q, k, None), (*turned, None), tables, plan.offset)
    return turned


def launch_split(
    qkv: Tensor, tables: Tables, plan: Plan, copy_v: bool, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn packed (…, W) into query (…, q_heads, d), key and value (…, kv_heads, d); the value a view unless copied."""
    qkv = with_neighbours(qkv)
    kind = ("split", copy_v, qkv.stride())
    ready = plan.kept(kind)
    if ready is None:
        made = _prepare(qkv, _packed_strides(qkv), tables, plan, (True, False), False, copy_v, launch)
        ready = plan.keep(kind, made)
    q_heads, kv_heads, head_dim = plan[:3]
    q = qkv.new_empty(*ready.tokens, q_heads, head_dim)
    k = qkv.new_empty(*ready.tokens, kv_heads, head_dim)
    if copy_v:
        v = torch.empty_like(k)
    else:  # in one step, which takes the host less time than `value_view`
        start = qkv.storage_offset() + ready.row_strides[-2] - head_dim
        v = torch.as_strided(qkv, (*ready.tokens, kv_heads, head_dim), ready.row_strides, start)
    ready.launch((qkv, None, None), (q, k, v), tables, plan.offset)
    return q, k, v


def launch_join(q: Tensor, k: Tensor, v: Tensor, tables: Tables, plan: Plan, launch: Launch | None = None) -> Tensor:
    """The reverse of `launch_split`: turned query and key, and value, packed."""
    q, k, v = with_neighbours(q), with_neighbours(k), with_neighbours(v)
    kind = ("join", q.stride(), k.stride(), v.stride())
    ready = plan.kept(kind)
    if ready is None:
        strides = (*part_strides(q), *part_strides(k), *part_strides(v))
        ready = plan.keep(kind, _prepare(q, strides, tables, plan, (False, True), False, True, launch))
    qkv = q.new_empty(*ready.tokens, (plan.q_heads + 2 * plan.kv_heads) * plan.head_dim)
    ready.launch((q, k, v), (qkv, None, None), tables, plan.offset)
    return qkv


def value_view(qkv: Tensor, plan: Plan) -> Tensor:
    """The value heads (…, kv_heads, d) within a packed tensor (…, W)."""
    return qkv.unflatten(-1, (plan.kv_heads, -1))[..., -plan.head_dim :]


def _packed_strides(qkv: Tensor) -> tuple[int, ...]:
    """Of (…, W): from place to place and from batch entry to batch entry."""
    stride = qkv.stride()
    return (stride[0], stride[1] if len(stride) == 3 else 0, 0, 0, 0, 0, 0, 0, 0)


def _prepare(
    x: Tensor,
    strides: tuple[int, ...],
    tables: Tables,
    plan: Plan,
    packed: tuple[bool, bool],
    in_place: bool,
    with_v: bool,
    launch: Launch | None,
) -> Ready:
    """Make the kernel ready for `x`, the query or the one tensor, of (length, batch, …) or (length, …) tokens."""
    q_heads, kv_heads, head_dim, interleaved, _, cp_rank, cp_size, restart, sign = plan
    tokens = x.shape[:-1] if packed[0] else x.shape[:-2]
    length, batch = tokens[0], tokens[1] if len(tokens) > 1 else 1
    cos, sin, cu_seqlens = tables
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with_v = with_v and kv_heads > 0
    positions, half = cos.shape
    launch = launch or default_launch(q_heads, kv_heads, with_v, half)
    blocks = -(-q_heads // launch.heads) + (2 if with_v else 1) * -(-kv_heads // launch.heads)
    constants = (
        *(q_heads, kv_heads, head_dim, half, *packed, in_place, with_v, interleaved, sin is None, *cos.stride()),
        *(cp_size, 0 if cu_seqlens is None else (sequences + 1).bit_length(), restart, launch.tokens, launch.heads),
    )
    parts = [(x.dtype, None, None) if one or kv_heads == 0 else (x.dtype,) * 3 for one in packed]
    dtypes = (*parts[0], *parts[1], *[None if table is None else table.dtype for table in tables])
    return Ready(
        _rotate.variant(x.get_device(), dtypes, strides, constants, launch.options),
        -(-length * batch // launch.tokens) * blocks,
        tuple(tokens),
        (*x.stride()[: len(tokens)], (q_heads // kv_heads + 2) * head_dim if kv_heads else head_dim, 1),
        (length * batch, batch, length),
        (cp_rank, positions, sequences),
        float(sign),
    )
