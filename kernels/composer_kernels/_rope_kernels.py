"""The kernel behind `rope` and `rope_qkv`: heads of one tensor, or of query, key and value, turned by their positions.

`rope` says what is computed, how it lies and how many bytes that moves; `_rope` launches it.

Legend: T tokens and H heads of one part (query, key or value) are a program's tile; (length, batch) are the tokens in
the order in which they lie; HALF pairs of a head's HEAD_DIM elements are turned, the others pass through. A packed row
holds KV_HEADS groups of [query head × Q_HEADS / KV_HEADS | key head | value head].
"""

from __future__ import annotations

import triton
import triton.language as tl


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
