"""Attention over sequences that are one tile: a program does one head of one sequence, all of it in registers.

    s = scale · q kᵀ        p = softmax(s)        o = p v        delta = Σ o · do
    dv = pᵀ do        ds = p · (do vᵀ - delta)        dq = scale · ds k        dk = scale · dsᵀ q

Bytes for a token of H channels of 16 bits: forward reads 3H and writes H numbers, 8H bytes; backward reads 5H and
writes 3H, 16H bytes. Backward computes p again from the logarithm of the softmax's sum, one number a token and head. It
works on scores transposed, [keys, queries]: two of the three products after them find them in registers as they are.

Each kernel is told `num_stages=1`. It has no loop, and whoever adds one should know that Triton's default, to load for
three rounds at once, made a forward kernel of 32 positions take six times as long (H100, 23 November 2026: 6.31 ns a
token against 1.06). What lost there: four heads a program and more, one after the other, and 128 positions in one tile.
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

WARP_BYTES = 1024
"""Of one part of a head, what one warp handles: its registers then hold what it computes of them."""


def longest(dtype: torch.dtype) -> int:
    """Positions up to which a tile fits a program's registers."""
    return 64 if dtype.itemsize == 2 else 32


@triton.jit
def _deepen(x: tl.tensor, ROWS: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr) -> tl.tensor:
    """Put a 0 after each channel of x [ROWS, WIDE] where a product needs DEEP: the order of what it sums is all one."""
    if DEEP > WIDE:
        x = tl.reshape(tl.join(x, tl.zeros_like(x)), (ROWS, DEEP))
    return x


@triton.jit
def _forward_kernel(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, cosine_ptr: tl.tensor, sine_ptr: tl.tensor,
    mixed_ptr: tl.tensor, sums_ptr: tl.tensor, length: tl.tensor, per_row: tl.tensor, scale: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    dtype = joint_ptr.dtype.element_ty
    joint_ptr += sequence * length * (3 * HEADS * WIDTH) + head * WIDTH
    bias_ptr += (sequence // per_row) * (3 * HEADS * WIDTH) + head * WIDTH
    mixed_ptr += sequence * length * (HEADS * WIDTH) + head * WIDTH
    sums_ptr += (sequence * HEADS + head) * length
    position = tl.arange(0, BLOCK)
    cosine, sine = load_angles(cosine_ptr, sine_ptr, position, length, WIDTH, WIDE)
    q = load_part(joint_ptr, bias_ptr, position, length, 0, HEADS, WIDTH, WIDE)
    k = load_part(joint_ptr, bias_ptr, position, length, 1, HEADS, WIDTH, WIDE)
    v = load_part(joint_ptr, bias_ptr, position, length, 2, HEADS, WIDTH, WIDE).to(dtype)
    q = _deepen(turn(q * scale, cosine, sine, BLOCK, WIDE).to(dtype), BLOCK, WIDE, DEEP)
    k = _deepen(turn(k, cosine, sine, BLOCK, WIDE).to(dtype), BLOCK, WIDE, DEEP)
    causal = position[:, None] >= position[None, :]
    score = tl.where(causal, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
    most = tl.max(score, 1)
    weight = tl.exp2(score - most[:, None])
    total = tl.sum(weight, 1)
    mixed = tl.dot(weight.to(dtype), v, input_precision=PRECISION) * (1 / total)[:, None]
    here = position < length
    channel = tl.arange(0, WIDE)
    offset = position[:, None] * (HEADS * WIDTH) + channel[None, :]
    tl.store(mixed_ptr + offset, mixed.to(dtype), mask=here[:, None] & (channel < WIDTH)[None, :])
    tl.store(sums_ptr + position, most + tl.log2(total), mask=here)


@triton.jit
def _store_bias(
    dbias_ptr: tl.tensor, dq: tl.tensor, dk: tl.tensor, dv: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """Write a sequence's share of the bias's gradient: the parts' gradients, summed over the positions."""
    channel = tl.arange(0, WIDE)
    tl.store(dbias_ptr + channel, tl.sum(dq, 0), mask=channel < WIDTH)
    tl.store(dbias_ptr + HEADS * WIDTH + channel, tl.sum(dk, 0), mask=channel < WIDTH)
    tl.store(dbias_ptr + 2 * HEADS * WIDTH + channel, tl.sum(dv, 0), mask=channel < WIDTH)


@triton.jit
def _backward_kernel(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, cosine_ptr: tl.tensor, sine_ptr: tl.tensor, mixed_ptr: tl.tensor,
    dmixed_ptr: tl.tensor, sums_ptr: tl.tensor, djoint_ptr: tl.tensor, dbias_ptr: tl.tensor,
    length: tl.tensor, per_row: tl.tensor, scale: tl.tensor, root: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    dtype = joint_ptr.dtype.element_ty
    joint_ptr += sequence * length * (3 * HEADS * WIDTH) + head * WIDTH
    djoint_ptr += sequence * length * (3 * HEADS * WIDTH) + head * WIDTH
    bias_ptr += (sequence // per_row) * (3 * HEADS * WIDTH) + head * WIDTH
    dbias_ptr += sequence * (3 * HEADS * WIDTH) + head * WIDTH
    mixed_ptr += sequence * length * (HEADS * WIDTH) + head * WIDTH
    dmixed_ptr += sequence * length * (HEADS * WIDTH) + head * WIDTH
    sums_ptr += (sequence * HEADS + head) * length
    position = tl.arange(0, BLOCK)
    cosine, sine = load_angles(cosine_ptr, sine_ptr, position, length, WIDTH, WIDE)
    q = load_part(joint_ptr, bias_ptr, position, length, 0, HEADS, WIDTH, WIDE)
    k = load_part(joint_ptr, bias_ptr, position, length, 1, HEADS, WIDTH, WIDE)
    v = load_part(joint_ptr, bias_ptr, position, length, 2, HEADS, WIDTH, WIDE).to(dtype)
    mixed = load_mixed(mixed_ptr, position, length, HEADS, WIDTH, WIDE)
    dmixed = load_mixed(dmixed_ptr, position, length, HEADS, WIDTH, WIDE)
    delta = tl.sum(mixed.to(tl.float32) * dmixed.to(tl.float32), 1)
    # a query beyond the end has a sum that makes its weights 0
    sums = tl.load(sums_ptr + position, mask=position < length, other=float("inf"))
    q = turn(q * scale, cosine, sine, BLOCK, WIDE).to(dtype)
    k = turn(k, cosine, sine, BLOCK, WIDE).to(dtype)
    deep_q, deep_k = _deepen(q, BLOCK, WIDE, DEEP), _deepen(k, BLOCK, WIDE, DEEP)
    deep_v, deep_dmixed = _deepen(v, BLOCK, WIDE, DEEP), _deepen(dmixed, BLOCK, WIDE, DEEP)
    score = tl.dot(deep_k, tl.trans(deep_q), input_precision=PRECISION)
    causal = position[:, None] <= position[None, :]
    weight = tl.where(causal, tl.exp2(score - sums[None, :]), 0.0)
    dweight = tl.dot(deep_v, tl.trans(deep_dmixed), input_precision=PRECISION)
    dscore = (weight * (dweight - delta[None, :])).to(dtype)
    dv = tl.dot(weight.to(dtype), dmixed, input_precision=PRECISION)
    dk = tl.dot(dscore, q, input_precision=PRECISION)
    dq = tl.dot(tl.trans(dscore), k, input_precision=PRECISION)
    dq = turn(dq * root, cosine, -sine, BLOCK, WIDE)
    dk = turn(dk * LN2, cosine, -sine, BLOCK, WIDE)
    store_part(djoint_ptr, dq, position, length, 0, HEADS, WIDTH, WIDE)
    store_part(djoint_ptr, dk, position, length, 1, HEADS, WIDTH, WIDE)
    store_part(djoint_ptr, dv, position, length, 2, HEADS, WIDTH, WIDE)
    _store_bias(dbias_ptr, dq, dk, dv, HEADS, WIDTH, WIDE)


def head_bytes(length: int, width: int, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of a token and head: kept from `forward` to `backward` beside the mixture, and used within `backward`."""
    return 3 * width * dtype.itemsize + 4, 0.0


def default_launch(length: int, width: int, dtype: torch.dtype) -> Launch:
    """All of a sequence: one warp for heads of 8 channels in 16 bits, the fastest of those measured."""
    positions = max(16, triton.next_power_of_2(length))
    part = positions * channels(width)["WIDE"] * dtype.itemsize
    return Launch(positions, max(1, part // WARP_BYTES))


def forward(
    joint: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor, heads: int, precision: str, launch: Launch
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """What backward needs of the inputs; the mixture; and the sums of the softmax as logarithms to base 2."""
    length, width = cosine.shape[0], 2 * cosine.shape[1]
    rows, tokens, _ = joint.shape
    sequences = rows * tokens // length
    mixed = joint.new_empty(rows, tokens, heads * width)
    sums = torch.empty(sequences, heads, length, dtype=torch.float32, device=joint.device)
    _forward_kernel[(sequences * heads,)](
        joint, bias, cosine, sine, mixed, sums, length, tokens // length, width**-0.5 * LOG2E,
        HEADS=heads, **channels(width), BLOCK=launch.positions, PRECISION=precision,
        num_warps=launch.warps, num_stages=1,
    )  # fmt: skip
    return (joint, bias), mixed, sums


def backward(
    kept: Sequence[Tensor], cosine: Tensor, sine: Tensor, mixed: Tensor, dmixed: Tensor, sums: Tensor,
    precision: str, launch: Launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of the joint projection and of its bias, from what `forward` returned."""
    joint, bias = kept
    length, width = cosine.shape[0], 2 * cosine.shape[1]
    rows, tokens, hidden = mixed.shape
    sequences, heads, _ = sums.shape
    djoint = torch.empty_like(joint)
    dbias = torch.empty(rows, tokens // length, 3 * hidden, dtype=torch.float32, device=mixed.device)
    _backward_kernel[(sequences * heads,)](
        joint, bias, cosine, sine, mixed, dmixed.contiguous(), sums, djoint, dbias, length, tokens // length,
        width**-0.5 * LOG2E, width**-0.5,
        HEADS=heads, **channels(width), BLOCK=launch.positions, PRECISION=precision,
        num_warps=launch.warps, num_stages=1,
    )  # fmt: skip
    return djoint, dbias.sum(1)
