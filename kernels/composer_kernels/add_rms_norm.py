"""Residual addition and the RMSNorm after it in one pass, forward and backward.

    total = x + residual, rounded to the residual's type
    rstd = 1 / sqrt(mean(total²) + eps)          y = total · rstd · w          w = weight, or 1 + weight, or 1

Both results are used: y by the next block, total by the residual stream. With their gradients dy and dtotal, g = dy · w
and means over the H elements of a row:

    dx = dresidual = dtotal + rstd · (g - total · rstd² · mean(g · total))
    dweight = Σ over rows of dy · total · rstd

Bytes for R rows, x and y in 16 bits:

    residual stream   forward                          backward
    16 bits           x, residual, y, total:   8RH     dy, dtotal, total, dtotal':       8RH
    fp32              2 + 4 + 2 + 4:          12RH     2 + 4 + 4 + 4 and dx in 16 bits: 16RH

On top come 4R for rstd each time, the weight, and 8PH in fp32 for the parts of dweight that the P programs of the
backward pass write and a last kernel adds up (P is one or two a multiprocessor). The kernels are those of `_norm`.

Memory: y and total are allocated forward, and rstd where gradients are wanted; total, weight and rstd are kept for
backward, which allocates dx and dresidual (one tensor for both if they have one type, as PyTorch's own addition
returns), dweight and the 4PH bytes of its parts. Inputs whose rows no single stride can address are copied first.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from composer_kernels._launch import Function, differentiable_once
from composer_kernels._norm_op import Settings, backward, forward, wide
from composer_kernels.rms_norm import rms_norm_reference


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, settings: Settings
    ) -> tuple[Tensor, Tensor | None]:
        y, total, rstd = forward("add_rms_norm", x, residual, weight, settings, keep_rstd=True)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        return y, total

    @staticmethod
    @differentiable_once("add_rms_norm")
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        _, zero_centered, x_dtype, main_grad = ctx.settings
        copy_dtype = None if x_dtype == total.dtype else x_dtype
        if dy is None:  # y went unused
            return dtotal if copy_dtype is None else dtotal.to(copy_dtype), dtotal, None, None
        beside = (zero_centered, ctx.needs_input_grad[2], main_grad, copy_dtype)
        dresidual, dx_copy, dweight = backward(dy, dtotal, total, weight, rstd, *beside)
        return dresidual if dx_copy is None else dx_copy, dresidual, dweight, None


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered: bool = False,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum: total = x + residual, y = rms_norm(total) · w.

    Computed in fp32; each result is rounded once, and y is the norm of the rounded total. On a GPU Triton kernels do
    it, on a CPU and in float64 plain PyTorch. The gradients cannot be differentiated again; PyTorch says so where that
    is tried.

    Args:
        x: What a block adds, (…, H) in bfloat16, float16, float32 or float64.
        residual: The stream so far, same shape, in any of these types (float64 only with float64).
        weight: (H,) of any of these types, or None for w = 1.
        eps: Added to the mean square.
        zero_centered: Whether w is 1 + weight (Megatron's `--apply-layernorm-1p`) instead of the weight.
        main_grad: (H,) in fp32 (float64 for a float64 `x`), takes the weight's gradient as in `rms_norm`.

    Returns:
        y in the type of `x` and total in the type of `residual`, both (…, H) and contiguous.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes or devices that do not fit.
    """
    settings = (eps, zero_centered, x.dtype, main_grad)
    needs_grad = x.requires_grad or residual.requires_grad or (weight is not None and weight.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        return _AddRMSNorm.apply(x, residual, weight, settings)
    y, total, _ = forward("add_rms_norm", x, residual, weight, settings, keep_rstd=False)
    return y, cast(Tensor, total)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch on any device, which autograd differentiates as often as one likes."""
    total = (x.to(wide(x.dtype)) + residual).to(residual.dtype)
    return rms_norm_reference(total, weight, eps, zero_centered=zero_centered, out_dtype=x.dtype), total
