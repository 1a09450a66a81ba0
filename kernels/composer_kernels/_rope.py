"""The kernel behind `rope` and `rope_qkv`: heads of one tensor, or of query, key and value, turned by their positions.

Bytes and layouts: see `rope.py`.

Legend: T tokens and H heads of one part (query, key or value) are a program's tile; (length, batch) are the tokens in
the order in which they lie; HALF pairs of a head's HEAD_DIM elements are turned, the others pass through. A packed row
holds KV_HEADS groups of [query head × Q_HEADS / KV_HEADS | key head | value head].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._launch import Kernel


@triton.jit
def _of_part(
    is_q: tl.tensor, is_v: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor, KV_HEADS: tl.constexpr,
    WITH_V: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """That of `q`, `k` and `v` which belongs to the part at hand."""
    if KV_HEADS == 0:
        chosen = q
    elif WITH_V:
        chosen = tl.where(is_q, q, tl.where(is_v, v, k))
    else:
        chosen = tl.where(is_q, q, k)
    return chosen


@triton.jit
def _in_packed_row(
    head: tl.tensor, is_q: tl.tensor, is_v: tl.tensor, PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
) -> tl.tensor:
    """Where a part's heads begin in a packed row."""
    group = tl.where(is_q, head // PER_GROUP, head)
    member = tl.where(is_q, head % PER_GROUP, tl.where(is_v, PER_GROUP + 1, PER_GROUP))
    return (group * (PER_GROUP + 2) + member) * HEAD_DIM


@triton.jit
def _in_sequence(
    place: tl.tensor, cu_seqlens_ptr: tl.tensor, sequences: tl.tensor, CP: tl.constexpr, SEARCH: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Of the packed sequence that holds each place: the place in it, its length here, its start in the whole; if any.

    Bisection: `before` counts the boundaries at or before a place; of two equal ones (an empty sequence) the last wins.
    """
    before = tl.zeros_like(place)
    for step in tl.static_range(SEARCH):
        probe = before + (1 << (SEARCH - 1 - step))
        exists = probe <= sequences + 1
        boundary = tl.load(cu_seqlens_ptr + probe - 1, mask=exists, other=0).to(tl.int32)
        before = tl.where(exists & (boundary // CP <= place), probe, before)
    inside = (before > 0) & (before <= sequences)
    start = tl.load(cu_seqlens_ptr + before - 1, mask=inside, other=0).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + before, mask=inside, other=0).to(tl.int32)
    return place - start // CP, end // CP - start // CP, start, inside


@triton.jit
def _positions(
    place: tl.tensor, length: tl.tensor, offset: tl.tensor, cp_rank: tl.tensor, cu_seqlens_ptr: tl.tensor,
    sequences: tl.tensor, CP: tl.constexpr, SEARCH: tl.constexpr, RESTART: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Position of each place of (length,), and whether it belongs to a sequence."""
    position = place
    inside = place >= 0
    start = tl.zeros_like(place)
    if SEARCH > 0:
        position, length, start, inside = _in_sequence(place, cu_seqlens_ptr, sequences, CP, SEARCH)
    if CP > 1:  # the second of the two chunks here lies as far from the sequence's end as the first from its start
        chunk = length // 2
        position += tl.where(position < chunk, cp_rank, 2 * CP - 2 - cp_rank) * chunk
    if not RESTART:
        position += start
    return position + offset, inside


@triton.jit
def _cosines(
    cos_ptr: tl.tensor, sin_ptr: tl.tensor, position: tl.tensor, wanted: tl.tensor, positions: tl.tensor,
    HALF: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr, ANGLES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Cosines and sines (T, HALF) where wanted; NaN past the tables."""
    column = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    entry = position.to(tl.int64)[:, None] * STRIDE + column * STEP
    known = (wanted & (position < positions))[:, None] & (column < HALF)
    cos = tl.load(cos_ptr + entry, mask=known, other=float("nan")).to(tl.float32)
    if ANGLES:
        sin = tl.sin(cos)
        cos = tl.cos(cos)
    else:
        sin = tl.load(sin_ptr + entry, mask=known, other=float("nan")).to(tl.float32)
    return cos, sin


@triton.jit
def _load_pairs(
    source: tl.tensor, present: tl.tensor, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, T: tl.constexpr,
    H: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """First and second elements (T, H, HALF) of the pairs from `source` (T, H, 1) on."""
    BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, None, :]
        pairs = tl.load(source + column, mask=present & (column < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(pairs, (T, H, BLOCK, 2)))
    else:
        column = tl.arange(0, BLOCK)[None, None, :]
        mask = present & (column < HALF)
        first = tl.load(source + column, mask=mask, other=0.0)
        second = tl.load(source + HALF + column, mask=mask, other=0.0)
    return first, second


@triton.jit
def _store_pairs(
    target: tl.tensor, first: tl.tensor, second: tl.tensor, present: tl.tensor, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
) -> None:  # fmt: skip
    """The reverse of `_load_pairs`."""
    BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, None, :]
        pairs = tl.reshape(tl.join(first, second), (T, H, 2 * BLOCK))
        tl.store(target + column, pairs, mask=present & (column < 2 * HALF))
    else:
        column = tl.arange(0, BLOCK)[None, None, :]
        mask = present & (column < HALF)
        tl.store(target + column, first, mask=mask)
        tl.store(target + HALF + column, second, mask=mask)


@triton.jit(do_not_specialize=["tokens", "batch", "length", "offset", "cp_rank", "positions", "sequences"])
def _kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, q_out_ptr: tl.tensor, k_out_ptr: tl.tensor,
    v_out_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, cu_seqlens_ptr: tl.tensor,
    q_place_stride: tl.tensor, q_batch_stride: tl.tensor, q_head_stride: tl.tensor,
    k_place_stride: tl.tensor, k_batch_stride: tl.tensor, k_head_stride: tl.tensor,
    v_place_stride: tl.tensor, v_batch_stride: tl.tensor, v_head_stride: tl.tensor,
    tokens: tl.tensor, batch: tl.tensor, length: tl.tensor, offset: tl.tensor, cp_rank: tl.tensor,
    positions: tl.tensor, sequences: tl.tensor, sign: tl.tensor,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    PACKED_IN: tl.constexpr, PACKED_OUT: tl.constexpr, IN_PLACE: tl.constexpr, WITH_V: tl.constexpr,
    INTERLEAVED: tl.constexpr, ANGLES: tl.constexpr, TABLE_STRIDE: tl.constexpr, TABLE_STEP: tl.constexpr,
    CP: tl.constexpr, SEARCH: tl.constexpr, RESTART: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
) -> None:  # fmt: skip
    Q_BLOCKS: tl.constexpr = (Q_HEADS + H - 1) // H
    KV_BLOCKS: tl.constexpr = (KV_HEADS + H - 1) // H
    BLOCKS: tl.constexpr = Q_BLOCKS + (2 if WITH_V else 1) * KV_BLOCKS
    PER_GROUP: tl.constexpr = Q_HEADS // max(KV_HEADS, 1)
    program = tl.program_id(0)
    token = (program // BLOCKS) * T + tl.arange(0, T)
    place = token // batch

    block = program % BLOCKS
    is_q = block < Q_BLOCKS
    is_v = block >= Q_BLOCKS + KV_BLOCKS
    heads = tl.where(is_q, Q_HEADS, KV_HEADS)
    head = (block - _of_part(is_q, is_v, 0, Q_BLOCKS, Q_BLOCKS + KV_BLOCKS, KV_HEADS, WITH_V)) * H + tl.arange(0, H)
    present = ((token < tokens)[:, None] & (head < heads)[None, :])[:, :, None]

    source, place_stride, batch_stride = q_ptr, q_place_stride, q_batch_stride
    if PACKED_IN:
        start = _in_packed_row(head, is_q, is_v, PER_GROUP, HEAD_DIM)
    else:
        source = _of_part(is_q, is_v, q_ptr, k_ptr, v_ptr, KV_HEADS, WITH_V)
        place_stride = _of_part(is_q, is_v, q_place_stride, k_place_stride, v_place_stride, KV_HEADS, WITH_V)
        batch_stride = _of_part(is_q, is_v, q_batch_stride, k_batch_stride, v_batch_stride, KV_HEADS, WITH_V)
        head_stride = _of_part(is_q, is_v, q_head_stride, k_head_stride, v_head_stride, KV_HEADS, WITH_V)
        start = head.to(tl.int64) * head_stride
    row = place.to(tl.int64) * place_stride + (token % batch).to(tl.int64) * batch_stride
    source += row[:, None, None] + start[None, :, None]
    target = source
    if not IN_PLACE:
        if PACKED_OUT:
            target, width = q_out_ptr, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
            start = _in_packed_row(head, is_q, is_v, PER_GROUP, HEAD_DIM)
        else:
            target, width = _of_part(is_q, is_v, q_out_ptr, k_out_ptr, v_out_ptr, KV_HEADS, WITH_V), heads * HEAD_DIM
            start = head * HEAD_DIM
        target += (token.to(tl.int64) * width)[:, None, None] + start[None, :, None]

    # Elements are on their way before their cosines are looked for, which may take long.
    first, second = _load_pairs(source, present, HALF, INTERLEAVED, T, H)
    position, inside = _positions(place, length, offset, cp_rank, cu_seqlens_ptr, sequences, CP, SEARCH, RESTART)
    wanted = (token < tokens) & inside
    if WITH_V:
        wanted = wanted & (not is_v)
    cos, sin = _cosines(cos_ptr, sin_ptr, position, wanted, positions, HALF, TABLE_STRIDE, TABLE_STEP, ANGLES)
    cos, sin = cos[:, None, :], (sin * sign)[:, None, :]

    a, b = first.to(tl.float32), second.to(tl.float32)
    one, two = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
    if WITH_V or SEARCH > 0:
        keep = wanted[:, None, None]
        one, two = tl.where(keep, one, first), tl.where(keep, two, second)
    _store_pairs(target, one, two, present, HALF, INTERLEAVED, T, H)
    if not IN_PLACE and HEAD_DIM > 2 * HALF:
        column = 2 * HALF + tl.arange(0, triton.next_power_of_2(HEAD_DIM - 2 * HALF))[None, None, :]
        mask = present & (column < HEAD_DIM)
        tl.store(target + column, tl.load(source + column, mask=mask), mask=mask)


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
    """Tiles of 2048 pairs, four 16-byte loads a thread; many heads share a token's cosines, but few are padding."""
    parts = (q_heads, kv_heads, kv_heads if with_v else 0)
    heads = max(h for h in (1, 2, 4, 8, 16) if h == 1 or sum(-n % h for n in parts) <= sum(parts) / 8)
    return Launch(max(1, 2048 // (heads * triton.next_power_of_2(half))), heads, warps=4)


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


def launch_turn(x: Tensor, tables: Tables, plan: Plan, in_place: bool, launch: Launch | None = None) -> Tensor:
    """Turn a plain tensor (…, heads, d) or a packed one (…, W) into one of the same shape, or itself."""
    if not in_place:
        x = with_neighbours(x)
    y = x if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)
    packed = plan.kv_heads > 0
    strides = _packed_strides(x) if packed else (*part_strides(x), 0, 0, 0, 0, 0, 0)
    out = (y, None, None)
    _run(x.shape, (x, None, None), out, strides, tables, plan, (packed, packed), in_place, not in_place, launch)
    return y


def launch_split(
    qkv: Tensor, tables: Tables, plan: Plan, copy_v: bool, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn packed (…, W) into query (…, q_heads, d), key and value (…, kv_heads, d); the value a view unless copied."""
    qkv = with_neighbours(qkv)
    lead = qkv.shape[:-1]
    q = qkv.new_empty(*lead, plan.q_heads, plan.head_dim)
    k = qkv.new_empty(*lead, plan.kv_heads, plan.head_dim)
    if copy_v:
        v = torch.empty_like(k)
    else:  # in one step, which takes the host less time than `value_view`
        group = (plan.q_heads // plan.kv_heads + 2) * plan.head_dim
        start = qkv.storage_offset() + group - plan.head_dim
        v = qkv.as_strided(k.shape, (*qkv.stride()[:-1], group, 1), start)
    parts, strides = (qkv, None, None), _packed_strides(qkv)
    _run(qkv.shape, parts, (q, k, v), strides, tables, plan, (True, False), False, copy_v, launch)
    return q, k, v


def launch_join(q: Tensor, k: Tensor, v: Tensor, tables: Tables, plan: Plan, launch: Launch | None = None) -> Tensor:
    """The reverse of `launch_split`: turned query and key, and value, packed."""
    q, k, v = with_neighbours(q), with_neighbours(k), with_neighbours(v)
    qkv = q.new_empty(*q.shape[:-2], (plan.q_heads + 2 * plan.kv_heads) * plan.head_dim)
    strides = (*part_strides(q), *part_strides(k), *part_strides(v))
    _run(qkv.shape, (q, k, v), (qkv, None, None), strides, tables, plan, (False, True), False, True, launch)
    return qkv


def value_view(qkv: Tensor, plan: Plan) -> Tensor:
    """The value heads (…, kv_heads, d) within a packed tensor (…, W)."""
    return qkv.unflatten(-1, (plan.kv_heads, -1))[..., -plan.head_dim :]


def _packed_strides(qkv: Tensor) -> tuple[int, ...]:
    """Of (…, W): from place to place and from batch entry to batch entry."""
    stride = qkv.stride()
    return (stride[0], stride[1] if len(stride) == 3 else 0, 0, 0, 0, 0, 0, 0, 0)


def _run(
    shape: torch.Size,
    parts: Parts,
    out: Parts,
    strides: tuple[int, ...],
    tables: Tables,
    plan: Plan,
    packed: tuple[bool, bool],
    in_place: bool,
    with_v: bool,
    launch: Launch | None,
) -> None:
    """Launch the kernel on query, key and value, or on one tensor of (length, batch, …) or (length, …) tokens."""
    q_heads, kv_heads, head_dim, interleaved, offset, cp_rank, cp_size, restart, sign = plan
    length, batch = shape[0], shape[1] if len(shape) > (2 if kv_heads else 3) else 1
    cos, sin, cu_seqlens = tables
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with_v = with_v and kv_heads > 0
    positions, half = cos.shape
    launch = launch or default_launch(q_heads, kv_heads, with_v, half)
    blocks = -(-q_heads // launch.heads) + (2 if with_v else 1) * -(-kv_heads // launch.heads)
    _rotate.launch(
        -(-length * batch // launch.tokens) * blocks,
        (*parts, *out, cos, sin, cu_seqlens),
        strides,
        (length * batch, batch, length, offset, cp_rank, positions, sequences),
        (float(sign),),
        (
            q_heads,
            kv_heads,
            head_dim,
            half,
            *packed,
            in_place,
            with_v,
            interleaved,
            sin is None,
            *cos.stride(),
            cp_size,
            0 if cu_seqlens is None else (sequences + 1).bit_length(),
            restart,
            launch.tokens,
            launch.heads,
        ),
        launch.options,
    )
