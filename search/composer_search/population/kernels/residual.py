"""The residual stream from one depth to the next: add the blocks' outputs, re-order the rows, normalise; and backward.

For the row at place s before and t after, with out the output of its block, if it has one, and b that block's bias:

    y[t] = x[s] + out[s] + b[s]        r = 1 / √(mean(y²) + eps)        h[t] = r · y[t]
    dy' = dy[t] + r · (dh[t] - r² · y[t] · mean(dh[t] · y[t]))          dx[s] = dout[s] = dy'

Bytes for a token of H channels, the stream in fp32 and the rest in 16 bits: forward reads x and out and writes y and h,
12H; backward reads dy, dh and y and writes dx and dout, 16H. PyTorch's operations one after the other move four times
as much.

Legend: `back`, for each place before the place after; HIDDEN, channels, and WIDE, the power of two that holds them;
a program handles BLOCK tokens of one row. One launch for each group of rows, which share a block's output.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_NUMBERS = 4096
"""Numbers a program handles: 32 a thread."""


@triton.jit(do_not_specialize=["first"])
def _forward_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, bias_ptr: tl.tensor, back_ptr: tl.tensor, y_ptr: tl.tensor, h_ptr: tl.tensor,
    first: tl.tensor, tokens: tl.tensor, eps: tl.tensor,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    MOVE: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    source = first + member
    target = tl.load(back_ptr + source) if MOVE else source
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDE)
    mask = (token < tokens)[:, None] & (channel < HIDDEN)[None, :]
    offset = token[:, None] * HIDDEN + channel[None, :]
    y = tl.load(x_ptr + source * tokens * HIDDEN + offset, mask=mask, other=0.0)
    if ADD:
        y += tl.load(out_ptr + member * tokens * HIDDEN + offset, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + member * HIDDEN + channel, mask=channel < HIDDEN, other=0.0)[None, :]
    root = tl.rsqrt(tl.sum(y * y, 1) / HIDDEN + eps)
    tl.store(y_ptr + target * tokens * HIDDEN + offset, y, mask=mask)
    tl.store(h_ptr + target * tokens * HIDDEN + offset, (y * root[:, None]).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first"])
def _backward_kernel(
    dy_ptr: tl.tensor, dh_ptr: tl.tensor, y_ptr: tl.tensor, back_ptr: tl.tensor, dx_ptr: tl.tensor, dout_ptr: tl.tensor,
    dbias_ptr: tl.tensor, first: tl.tensor, tokens: tl.tensor, eps: tl.tensor,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    MOVE: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, DY: tl.constexpr, DH: tl.constexpr,
) -> None:  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    source = first + member
    target = tl.load(back_ptr + source) if MOVE else source
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDE)
    mask = (token < tokens)[:, None] & (channel < HIDDEN)[None, :]
    offset = token[:, None] * HIDDEN + channel[None, :]
    moved = target * tokens * HIDDEN + offset
    dx = tl.zeros([BLOCK, WIDE], tl.float32)
    if DY:
        dx += tl.load(dy_ptr + moved, mask=mask, other=0.0)
    if DH:
        y = tl.load(y_ptr + moved, mask=mask, other=0.0)
        dh = tl.load(dh_ptr + moved, mask=mask, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(y * y, 1) / HIDDEN + eps)
        along = tl.sum(dh * y, 1) / HIDDEN * root * root
        dx += root[:, None] * (dh - y * along[:, None])
    tl.store(dx_ptr + source * tokens * HIDDEN + offset, dx, mask=mask)
    if ADD:
        dout = dx.to(dout_ptr.dtype.element_ty)
        tl.store(dout_ptr + member * tokens * HIDDEN + offset, dout, mask=mask)
    if BIAS:
        place = (member * tl.num_programs(0) + tl.program_id(0)) * HIDDEN + channel
        tl.store(dbias_ptr + place, tl.sum(dx, 0), mask=channel < HIDDEN)


class _Residual(torch.autograd.Function):
    """See `residual`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, back: Tensor | None, dtype: torch.dtype, eps: float, biased: Sequence[bool], *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        outs, biases = rest[: len(biased)], iter(rest[len(biased) :])
        y, h = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        ctx.groups = list(_groups([len(out) for out in outs], len(x)))
        for (first, size), out, has in zip(ctx.groups, [*outs, None], [*biased, False], strict=False):
            bias = next(biases) if has else None
            grid, shape = _grid(x, size)
            _forward_kernel[grid](
                x, x if out is None else out, x if bias is None else bias, x if back is None else back, y, h,
                first, x.shape[1], eps,
                **shape, MOVE=back is not None, ADD=out is not None, BIAS=has, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(y, back)
        ctx.eps, ctx.biased, ctx.dtype = eps, biased, outs[0].dtype if outs else None
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y, back = ctx.saved_tensors
        dy, dh = (None if grad is None else grad.contiguous() for grad in grads)
        dx = torch.empty_like(y)
        douts = [y.new_empty(size, *y.shape[1:], dtype=ctx.dtype) for _, size in ctx.groups[: len(ctx.biased)]]
        dbiases = []
        for (first, size), dout, has in itertools.zip_longest(ctx.groups, douts, ctx.biased):
            grid, shape = _grid(y, size)
            dbiases += [y.new_empty(size, grid[0], y.shape[2])] if has else []
            _backward_kernel[grid](
                y if dy is None else dy, y if dh is None else dh, y, y if back is None else back, dx,
                dx if dout is None else dout, dbiases[-1] if has else dx, first, y.shape[1], ctx.eps,
                **shape, MOVE=back is not None, ADD=dout is not None, BIAS=bool(has), DY=dy is not None,
                DH=dh is not None, num_warps=4,
            )  # fmt: skip
        return dx, None, None, None, None, *douts, *(each.sum(1) for each in dbiases)


def _groups(sizes: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """First row and size of each group; rows without a block are the last one."""
    first = 0
    for size in sizes:
        yield first, size
        first += size
    if first < rows:
        yield first, rows - first


def _grid(x: Tensor, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The programs for so many rows, and the constants that say what a program handles."""
    hidden = x.shape[2]
    wide = triton.next_power_of_2(hidden)
    tokens = max(1, BLOCK_NUMBERS // wide)
    return (triton.cdiv(x.shape[1], tokens), rows), {"HIDDEN": hidden, "WIDE": wide, "BLOCK": tokens}


def residual(
    x: Tensor,
    outs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    back: Tensor | None,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Add the groups' outputs to the stream, re-order the rows and normalise.

    Args:
        x: The stream [rows, tokens, hidden], fp32.
        outs: Each group's output [rows of the group, tokens, hidden], the groups in the order of their rows.
        biases: Each group's bias [rows of the group, hidden], fp32, or None.
        back: For each place before, the place after; None where all stay.
        dtype: Of the normalised stream.
        eps: Of the norm.

    Returns:
        The stream and the stream normalised, both [rows, tokens, hidden] in the new order.
    """
    biased = [bias is not None for bias in biases]
    given = [bias for bias in biases if bias is not None]
    y, h = _Residual.apply(x.contiguous(), back, dtype, eps, biased, *[out.contiguous() for out in outs], *given)
    return y, h
