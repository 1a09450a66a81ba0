"""SwiGLU (arXiv 2002.05202), forward and backward: y = silu(gate) · up, with silu(g) = g · σ(g).

With s = σ(gate):

    dup = dy · gate · s          dgate = dy · up · s · (1 + gate · (1 - s))

A limit L clamps first, as Megatron does it: gate to at most L, up to [-L, L]; beyond, gradients are 0.

Bytes for R rows of F 16-bit elements: forward reads gate and up and writes y, 6RF; backward reads dy, gate and up and
writes dgate and dup, 10RF. About 6 (forward) and 15 (backward) FLOPs an element: memory decides.

Layout: gate and up lie side by side in one tensor (…, 2F) = [gate | up], as the fused first projection of an MLP writes
them, or apart. Backward writes its gradients in the same layout, never over the inputs.

Memory: y is allocated forward, the inputs are kept for backward, which allocates their gradients. Inputs whose rows no
single stride can address are copied first.

Legend: WIDTH = F; a program handles ROWS × BLOCK elements, in the order in which they lie.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._launch import (
    Function,
    Kernel,
    Launch,
    as_rows,
    check_dtypes,
    describe,
    differentiable_once,
    runs_kernel,
)


@triton.jit
def _tile(rows: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Rows, columns and mask of this program's tile."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = ((program // blocks) * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
    col = ((program % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, col, (row < rows) & (col < WIDTH)


@triton.jit
def clamped(gate: tl.tensor, up: tl.tensor, limit: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Gate to at most the limit, up to either side of 0; by comparisons, because a minimum would lose NaN."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, limit: tl.tensor, LIMITED: tl.constexpr) -> tl.tensor:
    """A tile of y from tiles of gate and up, in fp32."""
    if LIMITED:
        gate, up = clamped(gate, up, limit)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def gradients(
    dy: tl.tensor, gate: tl.tensor, up: tl.tensor, limit: tl.tensor, LIMITED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Tiles of dgate and dup from tiles of dy, gate and up, in fp32."""
    if LIMITED:
        gate_free = gate <= limit
        up_free = (up <= limit) & (up >= -limit)
        gate, up = clamped(gate, up, limit)
    s = tl.sigmoid(gate)
    dup = dy * gate * s
    dgate = dy * up * s * (1 + gate * (1 - s))
    if LIMITED:
        dgate = tl.where(gate_free, dgate, 0.0)
        dup = tl.where(up_free, dup, 0.0)
    return dgate, dup


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    gate_ptr: tl.tensor, up_ptr: tl.tensor, y_ptr: tl.tensor,
    gate_stride: tl.tensor, up_stride: tl.tensor, rows: tl.tensor, limit: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, UP_START: tl.constexpr, LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    row, col, mask = _tile(rows, WIDTH, BLOCK, ROWS)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + UP_START + col, mask=mask, other=0.0).to(tl.float32)
    y = gated(gate, up, limit, LIMITED)
    tl.store(y_ptr + row * WIDTH + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr: tl.tensor, gate_ptr: tl.tensor, up_ptr: tl.tensor, dgate_ptr: tl.tensor, dup_ptr: tl.tensor,
    dy_stride: tl.tensor, gate_stride: tl.tensor, up_stride: tl.tensor, rows: tl.tensor, limit: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, UP_START: tl.constexpr, LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    row, col, mask = _tile(rows, WIDTH, BLOCK, ROWS)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + UP_START + col, mask=mask, other=0.0).to(tl.float32)
    dgate, dup = gradients(dy, gate, up, limit, LIMITED)
    out = row * (WIDTH + UP_START) + col  # gradients lie as the inputs do, without gaps
    tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + out + UP_START, dup.to(dup_ptr.dtype.element_ty), mask=mask)


@functools.cache
def forward_launch(width: int) -> Launch:
    """Tiles of 1024 elements, four of each input a thread, which at 16 bits are an 8-byte load.

    On an H100 that takes 2 % less time than the tiles of `backward_launch` at 4,096 and 8,192 columns.
    """
    return _launch(width, 1024, warps=8)


@functools.cache
def backward_launch(width: int) -> Launch:
    """Tiles of 2048 elements, two 16-byte loads of each input a thread."""
    return _launch(width, 2048, warps=4)


def _launch(width: int, elements: int, warps: int) -> Launch:
    """Tiles of so many elements, of the block that wastes least of a row."""
    blocks = [block for block in (2048, 1024, 512) if block <= min(width, elements)] or [triton.next_power_of_2(width)]
    block = min(blocks, key=lambda block: -width % block)
    return Launch(block, max(1, elements // block), warps)


_forward = Kernel(_forward_kernel)
_backward = Kernel(_backward_kernel)


def launch_forward(gate: Tensor, up: Tensor | None, limit: float | None, launch: Launch | None = None) -> Tensor:
    """Run the forward kernel on gate and up, (…, F) each, or on the packed (…, 2F) where up is None; y is (…, F)."""
    width = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    launch = launch or forward_launch(width)
    y = gate.new_empty(*gate.shape[:-1], width)
    rows = y.numel() // width
    gate, gate_stride = as_rows(gate)
    other, other_stride = (gate, gate_stride) if up is None else as_rows(up)
    _forward.launch(
        -(-rows // launch.rows) * -(-width // launch.block),
        (gate, other, y),
        (gate_stride, other_stride),
        (rows,),
        (limit or 0.0,),
        (width, launch.block, launch.rows, width if up is None else 0, limit is not None),
        launch.options,
    )
    return y


def launch_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, limit: float | None, launch: Launch | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run the backward kernel: dgate and dup, or one packed gradient and None where up is None."""
    width = dy.shape[-1]
    launch = launch or backward_launch(width)
    rows = dy.numel() // width
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = None if up is None else torch.empty_like(up, memory_format=torch.contiguous_format)
    dy, dy_stride = as_rows(dy)
    gate, gate_stride = as_rows(gate)
    other, other_stride = (gate, gate_stride) if up is None else as_rows(up)
    _backward.launch(
        -(-rows // launch.rows) * -(-width // launch.block),
        (dy, gate, other, dgate, dgate if dup is None else dup),
        (dy_stride, gate_stride, other_stride),
        (rows,),
        (limit or 0.0,),
        (width, launch.block, launch.rows, width if up is None else 0, limit is not None),
        launch.options,
    )
    return dgate, dup


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up in fp32, or in float64."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return gate.to(torch.promote_types(gate.dtype, torch.float32)), up.to(torch.promote_types(up.dtype, torch.float32))


def _compute_forward(gate: Tensor, up: Tensor | None, limit: float | None) -> Tensor:
    """`launch_forward`, or the same in plain PyTorch where no kernel runs."""
    if runs_kernel(gate):
        return launch_forward(gate, up, limit)
    return swiglu_reference(gate, up, limit=limit)


def _compute_backward(dy: Tensor, gate: Tensor, up: Tensor | None, limit: float | None) -> tuple[Tensor, Tensor | None]:
    """`launch_backward`, or the same in plain PyTorch where no kernel runs."""
    if runs_kernel(gate):
        return launch_backward(dy, gate, up, limit)
    g, u = _halves(gate, up)
    gate_free, up_free = (g <= limit, u.abs() <= limit) if limit is not None else (1, 1)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    s = torch.sigmoid(g)
    dgate = dy * u * s * (1 + g * (1 - s)) * gate_free
    dup = dy * g * s * up_free
    if up is None:
        return torch.cat((dgate, dup), -1).to(gate.dtype), None
    return dgate.to(gate.dtype), dup.to(up.dtype)


@torch.library.custom_op("composer_kernels::swiglu_forward", mutates_args=())
def _forward_op(gate: Tensor, up: Tensor | None, limit: float | None) -> Tensor:
    return _compute_forward(gate, up, limit)


@_forward_op.register_fake
def _(gate: Tensor, up: Tensor | None, limit: float | None) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] if up is not None else gate.shape[-1] // 2))


@torch.library.custom_op("composer_kernels::swiglu_backward", mutates_args=())
def _backward_op(dy: Tensor, gate: Tensor, up: Tensor | None, limit: float | None) -> tuple[Tensor, Tensor]:
    dgate, dup = _compute_backward(dy, gate, up, limit)
    return dgate, dy.new_empty(0) if dup is None else dup  # an operator returns no None


@_backward_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor | None, limit: float | None) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), dy.new_empty(0) if up is None else up.new_empty(up.shape)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        # Only compiled code, which must not look inside, pays for an operator: its dispatch takes longer than a launch.
        return (_forward_op if torch.compiler.is_compiling() else _compute_forward)(gate, up, limit)

    @staticmethod
    @differentiable_once("swiglu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.compiler.is_compiling():
            dgate, dup = _backward_op(dy, gate, up, ctx.limit)
        else:
            dgate, dup = _compute_backward(dy, gate, up, ctx.limit)
        return dgate, None if up is None else dup, None


def swiglu(gate: Tensor, up: Tensor | None = None, *, limit: float | None = None) -> Tensor:
    """Gate one half of an MLP's hidden layer by the other: y = silu(gate) · up.

    Computed in fp32 and rounded once. On a GPU a Triton kernel does it, on a CPU and in float64 plain PyTorch. The
    gradient cannot be differentiated again; PyTorch says so where that is tried.

    Args:
        gate: (…, F) in bfloat16, float16, float32 or float64; or, without `up`, both halves as [gate | up], (…, 2F).
        up: Same shape as `gate`.
        limit: Clamps gate to at most this and up to plus and minus this (Megatron's `activation_func_clamp_value`).

    Returns:
        y, (…, F), in the type of `gate`, contiguous.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes or devices that do not fit, or a limit that is not positive.
    """
    _check(gate, up, limit)
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        return _SwiGLU.apply(gate, up, limit)
    return (_forward_op if torch.compiler.is_compiling() else _compute_forward)(gate, up, limit)


def _check(gate: Tensor, up: Tensor | None, limit: float | None) -> None:
    check_dtypes("swiglu", gate=gate.dtype, up=gate.dtype if up is None else up.dtype)
    if gate.dim() == 0 or gate.shape[-1] == 0 or (up is None and gate.shape[-1] % 2):
        wanted = "(…, 2F), gate and up side by side, where up is not given" if up is None else "(…, F)"
        raise ValueError(f"swiglu: gate must be {wanted}, with F at least 1; given {describe(gate)}")
    if up is not None and (up.shape != gate.shape or up.device != gate.device):
        raise ValueError(f"swiglu: up must have the shape and device of gate, {describe(gate)}; given {describe(up)}")
    if limit is not None and not limit > 0:
        raise ValueError(f"swiglu: limit must be positive, or None for no limit; given {limit!r}")


def swiglu_reference(gate: Tensor, up: Tensor | None = None, *, limit: float | None = None) -> Tensor:
    """`swiglu` in plain PyTorch on any device, which autograd differentiates as often as one likes."""
    g, u = _halves(gate, up)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return (torch.nn.functional.silu(g) * u).to(gate.dtype)
