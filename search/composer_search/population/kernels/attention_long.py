"""Attention over sequences of several tiles: a program does one head of one sequence, a tile of scores at a time.

With s = scale · q kᵀ over the positions up to each, p = softmax(s) and delta = Σ o · do:

    o = p v        dv = pᵀ do        ds = p · (do vᵀ - delta)        dq = scale · ds k        dk = scale · dsᵀ q

A program first writes its head's queries and keys, turned, and its values to `turned`, 16 bytes a position and part for
a head of 8 channels in 16 bits, and then reads each tile from there as often as it needs it: from the second-level
cache mostly, and without adding a bias and turning again. Backward takes `turned` from the forward pass. It goes
through the keys, and for each tile of them through the queries; dq is a sum over tiles of keys, kept in `scratch`. No
two programs add to the same number: the same inputs give the same bits.

Bytes for a token of H channels of 16 bits: forward reads 3H numbers and writes 3H of `turned` and H, 14H bytes;
backward reads 5H and writes 3H, 16H bytes, and moves up to 8H of `scratch` and more where the caches do not hold it.

Measured on an H100 on 24 November 2026, forward and backward in ns a token of 128 channels: 1.03 and 2.13 of 128
positions, 1.28 and 2.83 of 256. What lost there the day before, to 1.01 and 2.62 of 128 positions: tiles of 16 and of
32 positions, 2 and 8 warps, two heads a program and more, and to load for two rounds at once, 1.17 and 3.62: hence
`num_stages=1`.

Tensor cores sum over 16 channels at least, of which a head of 8 fills half. In backward three of the others take the
softmax's sum and delta off within the products, q k - sum and do v - delta (`_with_parts`, `_with_ones`); wider heads
are given as many channels again for it.

The mixture may be asked for at the last positions of each sequence alone (LAST). Tiles of queries before them are then
left out, and a query that is not asked for has no gradient.

Legend: BLOCK, positions of a tile; `padded`, positions up to the end of the last tile; `wanted`, last positions that
are asked for, all unless LAST; `turned` [sequences, HEADS, 3, padded, WIDE] with queries multiplied by the scale,
`sums` and `delta` [sequences, HEADS, padded], `scratch` [sequences, HEADS, padded, WIDE].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_search.population.kernels.attention_parts import (
    LN2,
    LOG2E,
    Launch,
    channels,
    load_angles,
    load_mixed,
    load_part,
    store_part,
    turn,
)

NEVER = tl.constexpr(1e30)
"""A sum of the softmax that makes weights 0."""

PREPARED_NUMBERS = 1024
"""Numbers of each part that are turned at once, PREPARED positions."""


@triton.jit
def _first_tile(length: tl.tensor, wanted: tl.tensor, BLOCK: tl.constexpr, LAST: tl.constexpr) -> tl.tensor:
    """Where the first tile of queries begins."""
    return (length - wanted) // BLOCK * BLOCK if LAST else 0


@triton.jit
def _place(position: tl.tensor, length: tl.tensor, wanted: tl.tensor, LAST: tl.constexpr) -> tl.tensor:
    """The place of a position in the mixture; beyond its end if it has none there."""
    return tl.where(position < length - wanted, wanted, position - (length - wanted)) if LAST else position


@triton.jit
def _tile(ptr: tl.tensor, position: tl.tensor, WIDE: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """COUNT channels of one part of `turned` at these positions, 0 beyond WIDE."""
    channel = tl.arange(0, COUNT)
    offset = position[:, None] * WIDE + channel[None, :]
    inside = (channel < WIDE)[None, :] if COUNT > WIDE else None
    return tl.load(ptr + offset, mask=inside, other=None if COUNT == WIDE else 0.0)


@triton.jit
def _with_parts(tile: tl.tensor, x: tl.tensor, WIDE: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """A tile with x [positions] in three channels from WIDE on: each has 8 bits of what those before leave of it."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    channel = tl.arange(0, COUNT)[None, :]
    tile = tl.where(channel == WIDE, high[:, None].to(tile.dtype), tile)
    tile = tl.where(channel == WIDE + 1, middle[:, None].to(tile.dtype), tile)
    return tl.where(channel == WIDE + 2, low[:, None].to(tile.dtype), tile)


@triton.jit
def _with_ones(tile: tl.tensor, WIDE: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """A tile with 1 in the channels of `_with_parts`."""
    channel = tl.arange(0, COUNT)[None, :]
    return tl.where((channel >= WIDE) & (channel < WIDE + 3), tl.full((1, 1), 1.0, tl.float32).to(tile.dtype), tile)


@triton.jit
def _prepare(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, cosine_ptr: tl.tensor, sine_ptr: tl.tensor, turned_ptr: tl.tensor,
    length: tl.tensor, padded: tl.tensor, scale: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, PREPARED: tl.constexpr,
) -> None:  # fmt: skip
    """Write a head's `turned`."""
    dtype = joint_ptr.dtype.element_ty
    for start in range(0, padded, PREPARED):
        position = start + tl.arange(0, PREPARED)
        cosine, sine = load_angles(cosine_ptr, sine_ptr, position, length, WIDTH, WIDE)
        q = load_part(joint_ptr, bias_ptr, position, length, 0, HEADS, WIDTH, WIDE)
        k = load_part(joint_ptr, bias_ptr, position, length, 1, HEADS, WIDTH, WIDE)
        v = load_part(joint_ptr, bias_ptr, position, length, 2, HEADS, WIDTH, WIDE)
        q = turn(q * scale, cosine, sine, PREPARED, WIDE)
        k = turn(k, cosine, sine, PREPARED, WIDE)
        offset = position[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
        mask = (position < padded)[:, None]
        tl.store(turned_ptr + offset, q.to(dtype), mask=mask)
        tl.store(turned_ptr + padded * WIDE + offset, k.to(dtype), mask=mask)
        tl.store(turned_ptr + 2 * padded * WIDE + offset, v.to(dtype), mask=mask)


@triton.jit
def _forward_kernel(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, cosine_ptr: tl.tensor, sine_ptr: tl.tensor, turned_ptr: tl.tensor,
    mixed_ptr: tl.tensor, sums_ptr: tl.tensor,
    length: tl.tensor, wanted: tl.tensor, padded: tl.tensor, per_row: tl.tensor, scale: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
    BLOCK: tl.constexpr, PREPARED: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    wanted = wanted if LAST else length
    dtype = joint_ptr.dtype.element_ty
    joint_ptr += sequence * length * (3 * HEADS * WIDTH) + head * WIDTH
    bias_ptr += (sequence // per_row) * (3 * HEADS * WIDTH) + head * WIDTH
    mixed_ptr += sequence * wanted * (HEADS * WIDTH) + head * WIDTH
    sums_ptr += (sequence * HEADS + head) * padded
    q_ptr = turned_ptr + (sequence * HEADS + head) * (3 * padded * WIDE)
    k_ptr = q_ptr + padded * WIDE
    v_ptr = k_ptr + padded * WIDE
    _prepare(
        joint_ptr, bias_ptr, cosine_ptr, sine_ptr, q_ptr, length, padded, scale, HEADS, WIDTH, WIDE, PREPARED
    )  # fmt: skip
    tl.debug_barrier()  # other threads of the program wrote what a thread reads now
    causal = tl.arange(0, BLOCK)[:, None] >= tl.arange(0, BLOCK)[None, :]
    for start in range(_first_tile(length, wanted, BLOCK, LAST), padded, BLOCK):
        query = start + tl.arange(0, BLOCK)
        q = _tile(q_ptr, query, WIDE, DEEP)
        k = _tile(k_ptr, query, WIDE, DEEP)
        v = _tile(v_ptr, query, WIDE, WIDE)
        score = tl.where(causal, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
        most = tl.max(score, 1)
        weight = tl.exp2(score - most[:, None])
        total = tl.sum(weight, 1)
        mixed = tl.dot(weight.to(dtype), v, input_precision=PRECISION)
        for before in range(0, start, BLOCK):
            key = before + tl.arange(0, BLOCK)
            k = _tile(k_ptr, key, WIDE, DEEP)
            v = _tile(v_ptr, key, WIDE, WIDE)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            larger = tl.maximum(most, tl.max(score, 1))
            weight = tl.exp2(score - larger[:, None])
            shrink = tl.exp2(most - larger)
            total = total * shrink + tl.sum(weight, 1)
            mixed = tl.dot(weight.to(dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
            most = larger
        place = _place(query, length, wanted, LAST)
        here = place < wanted
        channel = tl.arange(0, WIDE)
        offset = place[:, None] * (HEADS * WIDTH) + channel[None, :]
        mask = here[:, None] & (channel < WIDTH)[None, :]
        tl.store(mixed_ptr + offset, (mixed * (1 / total)[:, None]).to(dtype), mask=mask)
        # a query that is not asked for has a sum that makes its weights 0 in the backward pass
        tl.store(sums_ptr + query, tl.where(here, most + tl.log2(total), NEVER))


@triton.jit
def _deltas(
    mixed_ptr: tl.tensor, dmixed_ptr: tl.tensor, delta_ptr: tl.tensor,
    length: tl.tensor, wanted: tl.tensor, padded: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, PREPARED: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    """Write a head's `delta`."""
    for start in range(0, padded, PREPARED):
        position = start + tl.arange(0, PREPARED)
        place = _place(position, length, wanted, LAST)
        dmixed = load_mixed(dmixed_ptr, place, wanted, HEADS, WIDTH, WIDE)
        mixed = load_mixed(mixed_ptr, place, wanted, HEADS, WIDTH, WIDE)
        delta = tl.sum(mixed.to(tl.float32) * dmixed.to(tl.float32), 1)
        tl.store(delta_ptr + position, delta, mask=position < padded)


@triton.jit
def _queries(
    q_ptr: tl.tensor, dmixed_ptr: tl.tensor, sums_ptr: tl.tensor, delta_ptr: tl.tensor, query: tl.tensor,
    length: tl.tensor, wanted: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """What backward needs of queries: themselves and the mixture's gradient; both also DEEP, less sums and deltas."""
    deep_q = _tile(q_ptr, query, WIDE, DEEP)
    place = _place(query, length, wanted, LAST)
    deep_dmixed = load_mixed(dmixed_ptr, place, wanted, HEADS, WIDTH, DEEP)
    q = _tile(q_ptr, query, WIDE, WIDE)
    dmixed = load_mixed(dmixed_ptr, place, wanted, HEADS, WIDTH, WIDE)
    deep_q = _with_parts(deep_q, -tl.load(sums_ptr + query), WIDE, DEEP)
    return q, deep_q, dmixed, _with_parts(deep_dmixed, -tl.load(delta_ptr + query), WIDE, DEEP)


@triton.jit
def _add_gradients(
    q: tl.tensor, deep_q: tl.tensor, k: tl.tensor, deep_k: tl.tensor, deep_v: tl.tensor, dmixed: tl.tensor,
    deep_dmixed: tl.tensor, dk: tl.tensor, dv: tl.tensor, causal: tl.tensor,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add one tile's share to dk and dv, and return its share of dq besides; on scores transposed, [keys, queries]."""
    weight = tl.exp2(tl.dot(deep_k, tl.trans(deep_q), input_precision=PRECISION))
    if DIAGONAL:
        weight = tl.where(causal, weight, 0.0)
    dweight = tl.dot(deep_v, tl.trans(deep_dmixed), input_precision=PRECISION)
    dscore = (weight * dweight).to(q.dtype)
    dv = tl.dot(weight.to(q.dtype), dmixed, dv, input_precision=PRECISION)
    dk = tl.dot(dscore, q, dk, input_precision=PRECISION)
    return dk, dv, tl.dot(tl.trans(dscore), k, input_precision=PRECISION)


@triton.jit
def _store_bias(
    dbias_ptr: tl.tensor, all_d: tl.tensor, PART: tl.constexpr, PIECES: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write a part's share of the bias's gradient in PIECES sums, each of one warp's rows: they need no barrier."""
    channel = tl.arange(0, WIDE)
    pieces = tl.sum(tl.reshape(all_d, (PIECES, BLOCK // PIECES, WIDE)), 1)
    offset = tl.arange(0, PIECES)[:, None] * (3 * HEADS * WIDTH) + PART * HEADS * WIDTH + channel[None, :]
    tl.store(dbias_ptr + offset, pieces, mask=(channel < WIDTH)[None, :])


@triton.jit
def _backward_kernel(
    turned_ptr: tl.tensor, cosine_ptr: tl.tensor, sine_ptr: tl.tensor, mixed_ptr: tl.tensor, dmixed_ptr: tl.tensor,
    sums_ptr: tl.tensor, delta_ptr: tl.tensor, scratch_ptr: tl.tensor, djoint_ptr: tl.tensor, dbias_ptr: tl.tensor,
    length: tl.tensor, wanted: tl.tensor, padded: tl.tensor, root: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, PIECES: tl.constexpr,
    BLOCK: tl.constexpr, PREPARED: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    wanted = wanted if LAST else length
    djoint_ptr += sequence * length * (3 * HEADS * WIDTH) + head * WIDTH
    dbias_ptr += sequence * (PIECES * 3 * HEADS * WIDTH) + head * WIDTH
    mixed_ptr += sequence * wanted * (HEADS * WIDTH) + head * WIDTH
    dmixed_ptr += sequence * wanted * (HEADS * WIDTH) + head * WIDTH
    sums_ptr += (sequence * HEADS + head) * padded
    delta_ptr += (sequence * HEADS + head) * padded
    scratch_ptr += (sequence * HEADS + head) * (padded * WIDE)
    q_ptr = turned_ptr + (sequence * HEADS + head) * (3 * padded * WIDE)
    k_ptr = q_ptr + padded * WIDE
    v_ptr = k_ptr + padded * WIDE
    _deltas(mixed_ptr, dmixed_ptr, delta_ptr, length, wanted, padded, HEADS, WIDTH, WIDE, PREPARED, LAST)
    tl.debug_barrier()  # other threads of the program wrote what a thread reads now
    causal = tl.arange(0, BLOCK)[:, None] <= tl.arange(0, BLOCK)[None, :]
    channel = tl.arange(0, WIDE)
    zeros = tl.zeros([BLOCK, WIDE], tl.float32)
    all_dq, all_dk, all_dv = zeros, zeros, zeros
    begin = _first_tile(length, wanted, BLOCK, LAST)
    for start in range(0, padded, BLOCK):
        key = start + tl.arange(0, BLOCK)
        deep_k = _with_ones(_tile(k_ptr, key, WIDE, DEEP), WIDE, DEEP)
        deep_v = _with_ones(_tile(v_ptr, key, WIDE, DEEP), WIDE, DEEP)
        k = _tile(k_ptr, key, WIDE, WIDE)
        dk, dv, dq = zeros, zeros, zeros
        if not LAST or start >= begin:
            q, deep_q, dmixed, deep_dmixed = _queries(
                q_ptr, dmixed_ptr, sums_ptr, delta_ptr, key, length, wanted, HEADS, WIDTH, WIDE, DEEP, LAST
            )  # fmt: skip
            dk, dv, dq = _add_gradients(
                q, deep_q, k, deep_k, deep_v, dmixed, deep_dmixed, dk, dv, causal, True, PRECISION
            )  # fmt: skip
            if start > 0:
                dq += tl.load(scratch_ptr + key[:, None] * WIDE + channel[None, :])
        for after in range(tl.maximum(start + BLOCK, begin) if LAST else start + BLOCK, padded, BLOCK):
            query = after + tl.arange(0, BLOCK)
            q, deep_q, dmixed, deep_dmixed = _queries(
                q_ptr, dmixed_ptr, sums_ptr, delta_ptr, query, length, wanted, HEADS, WIDTH, WIDE, DEEP, LAST
            )  # fmt: skip
            dk, dv, more = _add_gradients(
                q, deep_q, k, deep_k, deep_v, dmixed, deep_dmixed, dk, dv, causal, False, PRECISION
            )  # fmt: skip
            offset = query[:, None] * WIDE + channel[None, :]
            if start > 0:
                more += tl.load(scratch_ptr + offset)
            tl.store(scratch_ptr + offset, more)
        cosine, sine = load_angles(cosine_ptr, sine_ptr, key, length, WIDTH, WIDE)
        dq = turn(dq * root, cosine, -sine, BLOCK, WIDE)
        dk = turn(dk * LN2, cosine, -sine, BLOCK, WIDE)
        store_part(djoint_ptr, dq, key, length, 0, HEADS, WIDTH, WIDE)
        store_part(djoint_ptr, dk, key, length, 1, HEADS, WIDTH, WIDE)
        store_part(djoint_ptr, dv, key, length, 2, HEADS, WIDTH, WIDE)
        all_dq += dq
        all_dk += dk
        all_dv += dv
        tl.debug_barrier()  # as above, of `scratch`
    _store_bias(dbias_ptr, all_dq, 0, PIECES, HEADS, WIDTH, WIDE, BLOCK)
    _store_bias(dbias_ptr, all_dk, 1, PIECES, HEADS, WIDTH, WIDE, BLOCK)
    _store_bias(dbias_ptr, all_dv, 2, PIECES, HEADS, WIDTH, WIDE, BLOCK)


def head_bytes(length: int, width: int, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of a token and head: kept from `forward` to `backward` beside the mixture, and used within `backward`."""
    positions = default_launch(length, width, dtype).positions
    padding = triton.cdiv(length, positions) * positions / length
    wide = channels(width)["WIDE"]
    return padding * (3 * wide * dtype.itemsize + 4), padding * (4 * wide + 4)


def default_launch(length: int, width: int, dtype: torch.dtype) -> Launch:
    """The fastest of those measured, for heads of 8 channels in 16 bits; a tile of fp32 has room for half of it."""
    return Launch(32, 2) if dtype.itemsize > 2 else Launch(64, 4)


def _constants(width: int, launch: Launch) -> dict[str, int]:
    sizes = channels(width)
    prepared = PREPARED_NUMBERS // sizes["WIDE"]
    sizes["DEEP"] = 2 * sizes["WIDE"]  # room for `_with_parts`
    options = {"num_warps": launch.warps, "num_stages": 1}
    return sizes | options | {"BLOCK": launch.positions, "PREPARED": prepared}


def forward(
    joint: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor, heads: int, precision: str, launch: Launch,
    wanted: int | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:  # fmt: skip
    """What backward needs of the inputs, `turned`; the mixture; and the sums of the softmax as logarithms to base 2.

    With `wanted`, the mixture at so many last positions of each sequence.
    """
    length, width = cosine.shape[0], 2 * cosine.shape[1]
    wanted = wanted or length
    rows, tokens, _ = joint.shape
    sequences = rows * tokens // length
    constants = _constants(width, launch)
    padded = triton.cdiv(length, launch.positions) * launch.positions
    turned = joint.new_empty(sequences, heads, 3, padded, constants["WIDE"])
    mixed = joint.new_empty(rows, tokens // length * wanted, heads * width)
    sums = torch.empty(sequences, heads, padded, dtype=torch.float32, device=joint.device)
    _forward_kernel[(sequences * heads,)](
        joint, bias, cosine, sine, turned, mixed, sums, length, wanted, padded, tokens // length, width**-0.5 * LOG2E,
        HEADS=heads, PRECISION=precision, LAST=wanted < length, **constants,
    )  # fmt: skip
    return (turned,), mixed, sums


def backward(
    kept: Sequence[Tensor], cosine: Tensor, sine: Tensor, mixed: Tensor, dmixed: Tensor, sums: Tensor,
    precision: str, launch: Launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of the joint projection and of its bias, from what `forward` returned, launched alike."""
    (turned,) = kept
    length, width = cosine.shape[0], 2 * cosine.shape[1]
    rows, _, hidden = mixed.shape
    sequences, heads, _, padded, wide = turned.shape
    per_row = sequences // rows
    wanted = mixed.shape[1] // per_row
    delta = torch.empty_like(sums)
    scratch = torch.empty(sequences, heads, padded, wide, dtype=torch.float32, device=mixed.device)
    djoint = mixed.new_empty(rows, per_row * length, 3 * hidden)
    pieces = launch.warps
    dbias = torch.empty(rows, per_row * pieces, 3 * hidden, dtype=torch.float32, device=mixed.device)
    _backward_kernel[(sequences * heads,)](
        turned, cosine, sine, mixed, dmixed.contiguous(), sums, delta, scratch, djoint, dbias, length, wanted, padded,
        width**-0.5,
        HEADS=heads, PIECES=pieces, PRECISION=precision, LAST=wanted < length,
        **_constants(width, launch),
    )  # fmt: skip
    return djoint, dbias.sum(1)
