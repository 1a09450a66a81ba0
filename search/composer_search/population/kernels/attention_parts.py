"""What the kernels of `attention_short` and `attention_long` share: parts of a head in, their gradients out.

Legend: WIDTH, channels of a head, and WIDE, the power of two that holds them, 8 at least; DEEP, as many as a product
sums over, 16 at least; `joint` [sequences, length, 3, HEADS, WIDTH], of which a pointer given here is at its head.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
"""Scores are multiplied by it, since a GPU takes powers of 2."""

LN2 = tl.constexpr(0.6931471805599453)
"""And the gradient of keys, computed with queries that were multiplied by it, by this."""


class Launch(NamedTuple):
    """Positions of a tile, and warps of a program."""

    positions: int
    warps: int


def channels(width: int) -> dict[str, int]:
    """WIDTH, WIDE and DEEP of a head."""
    wide = max(8, triton.next_power_of_2(width))
    return {"WIDTH": width, "WIDE": wide, "DEEP": max(16, wide)}


@triton.jit
def load_angles(
    cosine_ptr: tl.tensor, sine_ptr: tl.tensor, position: tl.tensor, length: tl.tensor,
    WIDTH: tl.constexpr, WIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Cosines and sines [positions, WIDE / 2] of these positions."""
    pair = tl.arange(0, WIDE // 2)
    mask = (position < length)[:, None] & (pair < WIDTH // 2)[None, :]
    offset = position[:, None] * (WIDTH // 2) + pair[None, :]
    return tl.load(cosine_ptr + offset, mask=mask, other=0.0), tl.load(sine_ptr + offset, mask=mask, other=0.0)


@triton.jit
def turn(x: tl.tensor, cosine: tl.tensor, sine: tl.tensor, ROWS: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Turn x [ROWS, WIDE] by the angles, or back where `sine` is negated."""
    even, odd = tl.split(tl.reshape(x, (ROWS, WIDE // 2, 2)))
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (ROWS, WIDE))


@triton.jit
def load_part(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, position: tl.tensor, length: tl.tensor,
    PART: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A part (0 queries, 1 keys, 2 values) with its bias, fp32; 0 beyond the end and beyond the head's channels."""
    channel = tl.arange(0, WIDE)
    mask = (position < length)[:, None] & (channel < WIDTH)[None, :]
    start = PART * HEADS * WIDTH + channel
    x = tl.load(joint_ptr + position[:, None] * (3 * HEADS * WIDTH) + start[None, :], mask=mask, other=0.0)
    bias = tl.load(bias_ptr + start, mask=channel < WIDTH, other=0.0)
    return tl.where((position < length)[:, None], x.to(tl.float32) + bias[None, :], 0.0)


@triton.jit
def load_mixed(
    mixed_ptr: tl.tensor, position: tl.tensor, length: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """COUNT channels of the mixture or its gradient; 0 beyond the end and beyond the head's channels."""
    channel = tl.arange(0, COUNT)
    mask = (position < length)[:, None] & (channel < WIDTH)[None, :]
    return tl.load(mixed_ptr + position[:, None] * (HEADS * WIDTH) + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_part(
    djoint_ptr: tl.tensor, x: tl.tensor, position: tl.tensor, length: tl.tensor,
    PART: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """Write a part's gradient."""
    channel = tl.arange(0, WIDE)
    mask = (position < length)[:, None] & (channel < WIDTH)[None, :]
    offset = position[:, None] * (3 * HEADS * WIDTH) + PART * HEADS * WIDTH + channel[None, :]
    tl.store(djoint_ptr + offset, x.to(djoint_ptr.dtype.element_ty), mask=mask)
