"""The residual stream from one depth to the next: add the blocks' outputs, re-order the rows, normalise; and backward.

For the row at place s before and t after, with out the output of its block, if it has one, and b that block's bias:

    y[t] = x[s] + out[s] + b[s]        r = 1 / √(mean(y²) + eps)        h[t] = r · y[t]
    dx[s] = dout[s] = dy[t] + r · (dh[t] - h[t] · mean(dh[t] · h[t]))

Bytes for a token of H channels, the stream in fp32 and the rest in 16 bits: forward reads x and out and writes y and h,
12H; backward reads dy, dh and h and writes dx, which is dout, 8H. PyTorch's operations one after the other move five
times as much. Backward takes h as rounded as it is, like dh: y, twice the bytes, is not kept.

Each group before has an output of its own, and each group after a normalised stream, so that no gradient of parts has
to be put together. Forward is launched once for each group before, backward once for each group after.

Legend: `back`, for each place before the place after, and `order`, the inverse; HIDDEN, channels, and WIDE, the power
of two that holds them; a program handles BLOCK tokens of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_search.population.stream import Stream, numberless

BLOCK_NUMBERS = 4096
"""Numbers a program handles: 32 a thread."""

Moves = tuple[Tensor | None, Tensor | None]
"""`order` and `back`; None where all stay."""


@triton.jit(do_not_specialize=["first"])
def _forward_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, bias_ptr: tl.tensor, back_ptr: tl.tensor, y_ptr: tl.tensor, h_ptr: tl.tensor,
    roots_ptr: tl.tensor, first: tl.tensor, tokens: tl.tensor, eps: tl.tensor,
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
    tl.store(roots_ptr + target * tokens + token, root, mask=token < tokens)


@triton.jit(do_not_specialize=["first"])
def _backward_kernel(
    dy_ptr: tl.tensor, dh_ptr: tl.tensor, h_ptr: tl.tensor, roots_ptr: tl.tensor, order_ptr: tl.tensor,
    dx_ptr: tl.tensor, dbias_ptr: tl.tensor, first: tl.tensor, tokens: tl.tensor,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    MOVE: tl.constexpr, BIAS: tl.constexpr, DY: tl.constexpr, DH: tl.constexpr,
) -> None:  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    target = first + member
    source = tl.load(order_ptr + target) if MOVE else target
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDE)
    mask = (token < tokens)[:, None] & (channel < HIDDEN)[None, :]
    offset = token[:, None] * HIDDEN + channel[None, :]
    dx = tl.zeros([BLOCK, WIDE], tl.float32)
    if DY:
        dx += tl.load(dy_ptr + target * tokens * HIDDEN + offset, mask=mask, other=0.0).to(tl.float32)
    if DH:
        h = tl.load(h_ptr + target * tokens * HIDDEN + offset, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + member * tokens * HIDDEN + offset, mask=mask, other=0.0).to(tl.float32)
        root = tl.load(roots_ptr + target * tokens + token, mask=token < tokens, other=0.0)
        along = tl.sum(dh * h, 1) / HIDDEN
        dx += root[:, None] * (dh - h * along[:, None])
    tl.store(dx_ptr + source * tokens * HIDDEN + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if BIAS:
        place = (source * tl.num_programs(0) + tl.program_id(0)) * HIDDEN + channel
        tl.store(dbias_ptr + place, tl.sum(dx, 0), mask=channel < HIDDEN)


class _Residual(torch.autograd.Function):
    """See `residual`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, traced: Tensor, moves: Moves, sizes: Sequence[int], dtype: torch.dtype, eps: float,
        biased: Sequence[bool], *rest: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        outs, biases = rest[: len(biased)], iter(rest[len(biased) :])
        order, back = moves
        y, h = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        roots = x.new_empty(x.shape[:2])
        groups = _groups([len(out) for out in outs], len(x))
        for (first, size), out, has in zip(groups, [*outs, None], [*biased, False], strict=False):
            bias = next(biases) if has else None
            grid, shape = _grid(x, size)
            _forward_kernel[grid](
                x, x if out is None else out, x if bias is None else bias, x if back is None else back, y, h, roots,
                first, x.shape[1], eps,
                **shape, MOVE=back is not None, ADD=out is not None, BIAS=has, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(h, roots, order)
        ctx.sizes, ctx.biased, ctx.of_outs = sizes, biased, [len(out) for out in outs]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(y)
        return y, numberless(y, dtype), *h.split(sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        h, roots, order = ctx.saved_tensors
        dy, *dhs = (None if grad is None else grad.contiguous() for grad in grads[1:])
        added, (rows, tokens, hidden) = sum(ctx.of_outs), h.shape
        dx = torch.empty_like(h)
        dbias = roots.new_empty(rows, _grid(h, rows)[0][0], hidden) if any(ctx.biased) else roots
        for (first, size), dh in zip(_groups(ctx.sizes, rows), dhs, strict=True):
            grid, shape = _grid(h, size)
            _backward_kernel[grid](
                dx if dy is None else dy, h if dh is None else dh, h, roots, dx if order is None else order, dx, dbias,
                first, tokens,
                **shape, MOVE=order is not None, BIAS=any(ctx.biased), DY=dy is not None, DH=dh is not None,
                num_warps=4,
            )  # fmt: skip
        parts = zip(dbias[:added].split(ctx.of_outs), ctx.biased, strict=True)
        dbiases = (part.sum(1) for part, has in parts if has)
        return None, dx, *[None] * 5, *dx[:added].split(ctx.of_outs), *dbiases


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
    x: Stream,
    outs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    moves: Moves,
    sizes: Sequence[int],
    dtype: torch.dtype,
    eps: float,
) -> tuple[Stream, list[Tensor]]:
    """Add the groups' outputs to the stream, re-order the rows and normalise.

    Args:
        x: The stream [rows, tokens, hidden], fp32, with a gradient in `dtype`.
        outs: Each group's output [rows of the group, tokens, hidden] in `dtype`, the groups in the order of their rows.
        biases: Each group's bias [rows of the group, hidden], fp32, or None.
        moves: For each place after, the place before, and the inverse; None where all stay.
        sizes: Rows of each part of the new order; all rows together.
        dtype: Of the normalised stream and of the gradients.
        eps: Of the norm.

    Returns:
        The stream [rows, tokens, hidden] in the new order, and the parts of the stream normalised.
    """
    biased = [bias is not None for bias in biases]
    given = [bias for bias in biases if bias is not None]
    own = [out.contiguous() for out in outs]
    y, traced, *parts = _Residual.apply(x.values.contiguous(), x.traced, moves, sizes, dtype, eps, biased, *own, *given)
    return Stream(y, traced), parts
