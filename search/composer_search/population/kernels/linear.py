"""The two layers of each row's attention, y = x Wᵀ; both of their gradients in one pass over the tokens, in bf16.

    dx = dy W        dW = dyᵀ x

As two products each reads dy: for a token of H channels 16H bytes for the gradients of the projection from H channels
to 3H, and 8H for those of the output's layer. One pass moves 10H and 6H.

A program goes through a share of a row's tokens and keeps dW of COLUMNS of the layer's inputs in registers. Where those
are not all of them, the programs beside it read the same dy, from the cache. In a round dW comes before dx: for the
other order ptxas lets each instruction of the tensor cores wait for the one before.

Legend: `dy` [rows, tokens, WIDE], WIDE = HIDDEN or, if THREE, 3 · HIDDEN; `x` and `dx` [rows, tokens, HIDDEN]; `weight`
[rows, WIDE, HIDDEN]; `dweight` [rows, shares, WIDE, HIDDEN]; a share is `span` tokens, BLOCK at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_search.population.product import LEAST_TOKENS, PROGRAMS, gain_gradients, round_weight


class Launch(NamedTuple):
    """COLUMNS at most and BLOCK, warps, and rounds loaded at once."""

    columns: int
    block: int
    warps: int
    stages: int

    def shared_bytes(self, ins: int, outs: int) -> int:
        """Of shared memory: W, dy and x of each round, and dx on its way out."""
        columns = min(self.columns, ins)
        return 2 * (outs * columns + self.stages * self.block * (outs + columns) + self.block * columns)


NARROW, TRIPLE = Launch(128, 64, 8, 3), Launch(32, 64, 4, 3)
"""Of the layer to H and of that to 3H channels: the fastest of five and of four on an H100 at a width of 128, 0.29 and
0.61 ns a token in place of the two products' 0.40 and 0.74."""


@triton.jit
def _add(
    dy_ptr: tl.tensor, place: tl.tensor, mask: tl.tensor, x: tl.tensor, weight: tl.tensor, dx: tl.tensor,
    dweight: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Add what HIDDEN of the layer's outputs give to dx, and to their dW."""
    dy = tl.load(dy_ptr + place, mask=mask, other=0.0)
    dweight = tl.dot(tl.trans(dy), x, dweight)
    return tl.dot(dy, weight, dx), dweight


@triton.jit
def _kernel(
    dy_ptr: tl.tensor, x_ptr: tl.tensor, weight_ptr: tl.tensor, dx_ptr: tl.tensor, dweight_ptr: tl.tensor,
    tokens: tl.tensor, span: tl.tensor,
    HIDDEN: tl.constexpr, THREE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    WIDE: tl.constexpr = 3 * HIDDEN if THREE else HIDDEN
    SIDES: tl.constexpr = HIDDEN // COLUMNS
    row = tl.program_id(1).to(tl.int64)
    share = tl.program_id(0) // SIDES
    column = tl.program_id(0) % SIDES * COLUMNS + tl.arange(0, COLUMNS)
    out = tl.arange(0, HIDDEN)
    dy_ptr += row * tokens * WIDE
    x_ptr += row * tokens * HIDDEN
    dx_ptr += row * tokens * HIDDEN
    weight_ptr += row * (WIDE * HIDDEN)
    dweight_ptr += (row * (tl.num_programs(0) // SIDES) + share) * (WIDE * HIDDEN)
    side = out[:, None] * HIDDEN + column[None, :]
    weight0 = tl.load(weight_ptr + side)
    dweight0 = tl.zeros([HIDDEN, COLUMNS], tl.float32)
    if THREE:
        weight1 = tl.load(weight_ptr + HIDDEN * HIDDEN + side)
        weight2 = tl.load(weight_ptr + 2 * HIDDEN * HIDDEN + side)
        dweight1, dweight2 = dweight0, dweight0
    for start in range(share * span, tl.minimum((share + 1) * span, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = (token < tokens)[:, None]
        place = token[:, None] * WIDE + out[None, :]
        x = tl.load(x_ptr + token[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0)
        dx = tl.zeros([BLOCK, COLUMNS], tl.float32)
        dx, dweight0 = _add(dy_ptr, place, mask, x, weight0, dx, dweight0)
        if THREE:
            dx, dweight1 = _add(dy_ptr, place + HIDDEN, mask, x, weight1, dx, dweight1)
            dx, dweight2 = _add(dy_ptr, place + 2 * HIDDEN, mask, x, weight2, dx, dweight2)
        tl.store(dx_ptr + token[:, None] * HIDDEN + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    dtype = dweight_ptr.dtype.element_ty
    tl.store(dweight_ptr + side, dweight0.to(dtype))
    if THREE:
        tl.store(dweight_ptr + HIDDEN * HIDDEN + side, dweight1.to(dtype))
        tl.store(dweight_ptr + 2 * HIDDEN * HIDDEN + side, dweight2.to(dtype))


def default_launch(ins: int, outs: int) -> Launch:
    """That of a layer's size."""
    return TRIPLE if outs > ins else NARROW


def fits(h: Tensor, outs: int) -> bool:
    """Whether this kernel can: bf16, a power of two of channels that a tile can hold, as many out or three times.

    And a GPU with shared memory for it, such as an H100; others keep the two products.
    """
    ins = h.shape[2]
    alike = h.dtype == torch.bfloat16 and ins in (16, 32, 64, 128) and outs in (ins, 3 * ins)
    if not alike or not h.is_cuda:  # on a CPU it is Triton's interpreter that runs it
        return alike
    properties: Any = torch.cuda.get_device_properties(h.device)
    return bool(default_launch(ins, outs).shared_bytes(ins, outs) <= properties.shared_memory_per_block_optin)


def launch_backward(dy: Tensor, x: Tensor, weight: Tensor, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of x [rows, tokens, hidden] and of the rounded weight, the latter in shares to be added up."""
    rows, tokens, hidden = x.shape
    launch = launch or default_launch(hidden, dy.shape[2])
    columns = min(launch.columns, hidden)
    shares = 1
    while rows * (hidden // columns) * shares < PROGRAMS and tokens >= 2 * shares * LEAST_TOKENS:
        shares *= 2
    span = triton.cdiv(triton.cdiv(tokens, shares), launch.block) * launch.block
    dx, dweight = torch.empty_like(x), x.new_empty(rows, shares, *weight.shape[1:])
    _kernel[shares * (hidden // columns), rows](
        dy, x, weight, dx, dweight, tokens, span,
        HIDDEN=hidden, THREE=dy.shape[2] > hidden, COLUMNS=columns, BLOCK=launch.block,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return dx, dweight


class _Linear(torch.autograd.Function):
    """See `linear`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
        rounded = round_weight(weight, gain, h.dtype)
        ctx.save_for_backward(h, weight, gain, rounded)
        return torch.bmm(h, rounded.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        h, weight, gain, rounded = ctx.saved_tensors
        dh, dweight = launch_backward(grads[0].contiguous(), h, rounded)
        return dh, *gain_gradients(dweight.sum(1, dtype=weight.dtype), weight, gain)


def linear(h: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
    """Each row's linear layer on h [rows, tokens, hidden], where `fits` says so: see `Operations.linear`."""
    y: Tensor = _Linear.apply(h.contiguous(), weight, gain)
    return y
