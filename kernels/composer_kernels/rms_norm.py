"""RMSNorm (arXiv 1910.07467), forward and backward.

    rstd = 1 / sqrt(mean(x²) + eps)          y = x · rstd · w          w = weight, or 1 + weight, or 1

With g = dy · w and means over the H elements of a row:

    dx = rstd · (g - x · rstd² · mean(g · x))          dweight = Σ over rows of dy · x · rstd

Bytes for R rows of 16-bit elements: forward reads x and writes y, 4RH; backward reads dy and x and writes dx, 6RH.
On top come 4R for rstd each time, the weight, and 8PH in fp32 for the parts of dweight that the P programs of the
backward pass write and a last kernel adds up (P is one to three a multiprocessor).

Memory: y is allocated forward, and rstd where gradients are wanted; x, weight and rstd are kept for backward, which
allocates dx, dweight and the 4PH bytes of its parts. Inputs whose rows no single stride can address are copied first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from composer_kernels._launch import Function, differentiable_once
from composer_kernels._norm_op import Settings, backward, forward, wide


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, settings: Settings) -> Tensor:
        y, _, rstd = forward("rms_norm", x, None, weight, settings, keep_rstd=True)
        ctx.save_for_backward(x, weight, rstd)
        ctx.settings = settings
        return y

    @staticmethod
    @differentiable_once("rms_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        _, zero_centered, _, main_grad = ctx.settings
        dx, _, dweight = backward(dy, None, x, weight, rstd, zero_centered, ctx.needs_input_grad[1], main_grad)
        return dx, dweight, None


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Normalise each row of `x` by its root mean square: y = x / sqrt(mean(x²) + eps) · w.

    Computed in fp32 and rounded once. On a GPU two Triton kernels do it, on a CPU and in float64 plain PyTorch. The
    gradient cannot be differentiated again; PyTorch says so where that is tried.

    Args:
        x: (…, H) in bfloat16, float16, float32 or float64.
        weight: (H,) of any of these types (float64 only with float64), or None for w = 1.
        eps: Added to the mean square.
        zero_centered: Whether w is 1 + weight (Megatron's `--apply-layernorm-1p`) instead of the weight.
        out_dtype: Type of the result; that of `x` by default. For a residual stream in fp32 and blocks in bfloat16.
        main_grad: (H,) in fp32 (float64 for a float64 `x`). Where given, backward adds the weight's gradient to it,
            unrounded, and `weight.grad` is left alone. A weight that has Megatron's flag `grad_added_to_main_grad`
            gets it set, and autograd a gradient of no meaning, so that the hooks of distributed data parallelism run.

    Returns:
        y, (…, H), contiguous.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes or devices that do not fit.
    """
    settings = (eps, zero_centered, out_dtype or x.dtype, main_grad)
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _RMSNorm.apply(x, weight, settings)
    return forward("rms_norm", x, None, weight, settings, keep_rstd=False)[0]


def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`rms_norm` in plain PyTorch on any device, which autograd differentiates as often as one likes."""
    exact = x.to(wide(x.dtype))
    y = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + zero_centered)
    return y.to(out_dtype or x.dtype)
