"""SwiGLU between 8-bit matrix products: `swiglu` and its gradient, quantised row by row in the same pass.

Forward makes of h = [gate | up] the 8-bit rows of y = silu(gate) · up; backward of dy and h those of [dgate | dup].
What a product takes next is all that is written: nothing is rounded to 16 bits between. On request the same numbers
are also written in the type of the input (`plain`), for a product that takes that.

Bytes for R rows of F: forward reads 4RF and writes RF, where `swiglu` and `quantise` move 9RF; backward reads 6RF and
writes 2RF, where they move 16RF; `plain` adds 2RF and 4RF. Beyond 16,384 columns, or half of that with a limit, the
inputs are read twice.

Formulas as in `composer_kernels.swiglu`, rounding as in `composer_kernels.fp8`.

Memory: results are allocated. Inputs whose rows no single stride can address are copied first.

Legend: WIDTH = F; a program handles ROWS rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._launch import DTYPES, INTERPRETING, Kernel, Launch, as_rows, describe, dtype_name
from composer_kernels.fp8 import E4M3, Rows, largest_bits, quantise_reference, scale_and_inverse
from composer_kernels.swiglu import gated, gradients

_WHOLE = 16_384
"""The widest row that a program holds in registers."""


@triton.jit
def _gated(
    h_ptr: tl.tensor, place: tl.tensor, mask: tl.tensor, limit: tl.tensor, WIDTH: tl.constexpr, LIMITED: tl.constexpr
) -> tl.tensor:
    """A tile of y, whose gates begin at `place`."""
    gate = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    return gated(gate, up, limit, LIMITED)


@triton.jit
def _gradients(
    dy: tl.tensor, h_ptr: tl.tensor, place: tl.tensor, mask: tl.tensor, limit: tl.tensor,
    WIDTH: tl.constexpr, LIMITED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Tiles of dgate and dup."""
    gate = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    return gradients(dy, gate, up, limit, LIMITED)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    h_ptr: tl.tensor, q_ptr: tl.tensor, scale_ptr: tl.tensor, y_ptr: tl.tensor | None,
    h_stride: tl.tensor, rows: tl.tensor, limit: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < WIDTH)
    y = _gated(h_ptr, row * h_stride + col, mask, limit, WIDTH, LIMITED)
    bits = largest_bits(y)
    for start in tl.static_range(BLOCK, WIDTH, BLOCK):
        mask = (row < rows) & (start + col < WIDTH)
        bits = tl.maximum(bits, largest_bits(_gated(h_ptr, row * h_stride + start + col, mask, limit, WIDTH, LIMITED)))
    scale, inverse = scale_and_inverse(bits)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    for start in tl.static_range(0, WIDTH, BLOCK):
        mask = (row < rows) & (start + col < WIDTH)
        if BLOCK < WIDTH:
            y = _gated(h_ptr, row * h_stride + start + col, mask, limit, WIDTH, LIMITED)
        tl.store(q_ptr + row * WIDTH + start + col, (y * inverse).to(tl.float8e4nv), mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + row * WIDTH + start + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr: tl.tensor, h_ptr: tl.tensor, q_ptr: tl.tensor, scale_ptr: tl.tensor, dh_ptr: tl.tensor | None,
    dy_stride: tl.tensor, h_stride: tl.tensor, rows: tl.tensor, limit: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < WIDTH)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    dgate, dup = _gradients(dy, h_ptr, row * h_stride + col, mask, limit, WIDTH, LIMITED)
    bits = tl.maximum(largest_bits(dgate), largest_bits(dup))
    for start in tl.static_range(BLOCK, WIDTH, BLOCK):
        mask = (row < rows) & (start + col < WIDTH)
        dy = tl.load(dy_ptr + row * dy_stride + start + col, mask=mask, other=0.0).to(tl.float32)
        dgate, dup = _gradients(dy, h_ptr, row * h_stride + start + col, mask, limit, WIDTH, LIMITED)
        bits = tl.maximum(bits, tl.maximum(largest_bits(dgate), largest_bits(dup)))
    scale, inverse = scale_and_inverse(bits)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    for start in tl.static_range(0, WIDTH, BLOCK):
        mask = (row < rows) & (start + col < WIDTH)
        if BLOCK < WIDTH:
            dy = tl.load(dy_ptr + row * dy_stride + start + col, mask=mask, other=0.0).to(tl.float32)
            dgate, dup = _gradients(dy, h_ptr, row * h_stride + start + col, mask, limit, WIDTH, LIMITED)
        place = row * (2 * WIDTH) + start + col
        tl.store(q_ptr + place, (dgate * inverse).to(tl.float8e4nv), mask=mask)
        tl.store(q_ptr + place + WIDTH, (dup * inverse).to(tl.float8e4nv), mask=mask)
        if dh_ptr is not None:
            tl.store(dh_ptr + place, dgate.to(dh_ptr.dtype.element_ty), mask=mask)
            tl.store(dh_ptr + place + WIDTH, dup.to(dh_ptr.dtype.element_ty), mask=mask)


@functools.cache
def default_launch(width: int, *, limited: bool = False) -> Launch:
    """Whole rows, 4096 elements or more together, 16 a thread; wide limited ones in parts, for want of registers."""
    whole = _WHOLE // 2 if limited else _WHOLE
    block = min(triton.next_power_of_2(width), whole if width <= whole else 4096)
    rows = max(1, 4096 // block)
    return Launch(block, rows, warps=max(4, rows * block // 512))


_forward = Kernel(_forward_kernel)
_backward = Kernel(_backward_kernel)


class Gated(NamedTuple):
    """A result.

    Attributes:
        rows: In 8 bits.
        plain: In the type of h, with its leading dimensions; None where it was not asked for.
    """

    rows: Rows
    plain: Tensor | None


def _empty(like: Tensor, width: int, plain: bool) -> Gated:
    rows = like.shape[:-1].numel()
    result = Rows(like.new_empty((rows, width), dtype=E4M3), like.new_empty(rows, dtype=torch.float32))
    return Gated(result, like.new_empty((*like.shape[:-1], width)) if plain else None)


def launch_forward(h: Tensor, limit: float | None, plain: bool, launch: Launch | None = None) -> Gated:
    """Run the forward kernel on (…, 2F)."""
    width = h.shape[-1] // 2
    launch = launch or default_launch(width, limited=limit is not None)
    result = _empty(h, width, plain)
    h, stride = as_rows(h)
    rows = len(result.rows.scales)
    _forward.launch(
        -(-rows // launch.rows),
        (h, *result.rows, result.plain),
        (stride,),
        (rows,),
        (limit or 0.0,),
        (width, launch.block, launch.rows, limit is not None),
        launch.options,
    )
    return result


def launch_backward(dy: Tensor, h: Tensor, limit: float | None, plain: bool, launch: Launch | None = None) -> Gated:
    """Run the backward kernel on (…, F) and (…, 2F)."""
    width = h.shape[-1] // 2
    launch = launch or default_launch(width, limited=limit is not None)
    result = _empty(h, 2 * width, plain)
    dy, dy_stride = as_rows(dy)
    h, h_stride = as_rows(h)
    rows = len(result.rows.scales)
    _backward.launch(
        -(-rows // launch.rows),
        (dy, h, *result.rows, result.plain),
        (dy_stride, h_stride),
        (rows,),
        (limit or 0.0,),
        (width, launch.block, launch.rows, limit is not None),
        launch.options,
    )
    return result


def quantised_swiglu(h: Tensor, *, limit: float | None = None, plain: bool = False) -> Gated:
    """Compute y = silu(gate) · up in 8 bits; autograd does not follow.

    Args:
        h: [gate | up], (…, 2F) in bfloat16, float16 or float32.
        limit: As for `swiglu`.
        plain: Whether to return y in the type of `h`, too.

    Returns:
        y, as rows of F.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For an odd width, or a limit that is not positive.
    """
    _check("quantised_swiglu", h, limit)
    if h.is_cuda or INTERPRETING:
        return launch_forward(h, limit, plain)
    return quantised_swiglu_reference(h, limit=limit, plain=plain)


def quantised_swiglu_gradient(dy: Tensor, h: Tensor, *, limit: float | None = None, plain: bool = False) -> Gated:
    """Compute [dgate | dup] in 8 bits; autograd does not follow.

    Args:
        dy: (…, F) in bfloat16, float16 or float32.
        h: What `quantised_swiglu` had.
        limit: Likewise.
        plain: Whether to return the gradient in the type of `h`, too.

    Returns:
        The gradient, as rows of 2F.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes that do not fit, or a limit that is not positive.
    """
    op = "quantised_swiglu_gradient"
    _check(op, h, limit)
    if dy.dtype not in DTYPES:
        raise TypeError(f"{op}: dy is {dtype_name(dy.dtype)}; accepted are bfloat16, float16 and float32")
    if dy.shape != (*h.shape[:-1], h.shape[-1] // 2) or dy.device != h.device:
        raise ValueError(f"{op}: dy must be half as wide as h, {describe(h)}, on its device; given {describe(dy)}")
    if h.is_cuda or INTERPRETING:
        return launch_backward(dy, h, limit, plain)
    return quantised_swiglu_gradient_reference(dy, h, limit=limit, plain=plain)


@torch.no_grad()
def quantised_swiglu_reference(h: Tensor, *, limit: float | None = None, plain: bool = False) -> Gated:
    """`quantised_swiglu` in plain PyTorch on any device."""
    y = _formula(h.float(), limit)
    return Gated(quantise_reference(y), y.to(h.dtype) if plain else None)


@torch.no_grad()
def quantised_swiglu_gradient_reference(
    dy: Tensor, h: Tensor, *, limit: float | None = None, plain: bool = False
) -> Gated:
    """`quantised_swiglu_gradient` in plain PyTorch on any device."""
    with torch.enable_grad():
        leaf = h.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(_formula(leaf, limit), leaf, dy.float())
    return Gated(quantise_reference(gradient), gradient.to(h.dtype) if plain else None)


def _formula(h: Tensor, limit: float | None) -> Tensor:
    gate, up = h.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up


def _check(op: str, h: Tensor, limit: float | None) -> None:
    if h.dtype not in DTYPES:
        raise TypeError(f"{op}: h is {dtype_name(h.dtype)}; accepted are bfloat16, float16 and float32")
    if h.dim() == 0 or h.shape[-1] == 0 or h.shape[-1] % 2:
        raise ValueError(f"{op}: h must be (…, 2F), gate and up side by side, with F at least 1; given {describe(h)}")
    if limit is not None and not limit > 0:
        raise ValueError(f"{op}: limit must be positive, or None for no limit; given {limit!r}")
