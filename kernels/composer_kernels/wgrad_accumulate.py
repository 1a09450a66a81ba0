"""The gradient of a linear layer's weight, added to an accumulator in the matrix product itself: G += dYᵀ · X.

With R rows, N outputs and K inputs: 2RNK FLOPs, computed by cuBLAS, which adds up in fp32 and rounds once into G (where
G has 16 bits, PyTorch's `allow_…_reduced_precision_reduction` says whether parts of the sum may be rounded too). For
16-bit X and dY and an fp32 G that moves 2RK + 2RN + 8NK bytes: fewer by 4NK than a 16-bit gradient in memory of its own
and an addition, which also rounds, and by 8NK than an fp32 one. Below about a thousand rows these bytes decide.

Layout: X (…, K) and dY (…, N), whose leading dimensions are rows; G (N, K), in fp32 or in the type of X and dY.

Memory: nothing is allocated, except copies of matrices that cuBLAS cannot address: rows at no single stride, or
elements side by side neither in rows nor in columns.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType

import torch
from torch import Tensor

from composer_kernels._launch import check_dtypes, describe, dtype_name

MEGATRON_MODULE = "fused_weight_gradient_mlp_cuda"
"""The part of Apex that Megatron-core imports for ``gradient_accumulation_fusion``."""


def wgrad_accumulate(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add the gradient of a linear layer's weight to `main_grad`, which autograd does not follow.

    On a CPU, where PyTorch has no product of 16-bit matrices into fp32, 16-bit operands become fp32 first.

    Args:
        input: What the layer multiplied, (…, K), in bfloat16, float16, float32 or float64.
        grad_output: Gradient by the layer's result, (…, N), in the same type, with the same leading dimensions. Without
            a row `main_grad` stays as it is.
        main_grad: (N, K) in float32 or the type of `input`.

    Raises:
        TypeError: For element types that are not accepted.
        ValueError: For shapes or devices that do not fit.
    """
    _check("wgrad_accumulate", input, grad_output, main_grad)
    _accumulate(input, grad_output, main_grad)


def wgrad_gemm_accum_fp32(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """`wgrad_accumulate` under the name that Megatron calls where `main_grad` is in fp32.

    Args:
        input: (…, K).
        grad_output: (…, N).
        main_grad: (N, K) in float32.

    Raises:
        TypeError: For element types that are not accepted.
        ValueError: For shapes or devices that do not fit.
    """
    op = "wgrad_gemm_accum_fp32"
    if main_grad.dtype != torch.float32:
        raise TypeError(f"{op}: main_grad is {describe(main_grad)}; accepted is float32")
    _check(op, input, grad_output, main_grad)
    _accumulate(input, grad_output, main_grad)


def wgrad_gemm_accum_fp16(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """`wgrad_accumulate` under the name that Megatron calls where `main_grad` is in 16 bits, bfloat16 included.

    Args:
        input: (…, K).
        grad_output: (…, N).
        main_grad: (N, K) in the type of `input`, float16 or bfloat16.

    Raises:
        TypeError: For element types that are not accepted.
        ValueError: For shapes or devices that do not fit.
    """
    op = "wgrad_gemm_accum_fp16"
    if main_grad.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{op}: main_grad is {describe(main_grad)}; accepted are float16 and bfloat16")
    _check(op, input, grad_output, main_grad)
    _accumulate(input, grad_output, main_grad)


def install_wgrad_module() -> ModuleType:
    """Offer the two functions above under the module name that Megatron imports, unless Apex's module is there.

    To be called before `megatron.core.tensor_parallel.layers` is imported, since that remembers whether the import
    failed; or else the caller sets its `fused_weight_gradient_mlp_cuda` to the result and its
    `_grad_accum_fusion_available` to True.

    Returns:
        Apex's module where it can be imported; else ours, the same each time.
    """
    try:
        return importlib.import_module(MEGATRON_MODULE)
    except ImportError:
        module = module_from_spec(ModuleSpec(MEGATRON_MODULE, loader=None, origin=__name__))
    for function in (wgrad_gemm_accum_fp32, wgrad_gemm_accum_fp16):
        setattr(module, function.__name__, function)
    sys.modules[MEGATRON_MODULE] = module
    return module


def wgrad_accumulate_reference(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> Tensor:
    """`main_grad` plus the gradient, a new tensor, computed in fp32 (float64 for float64), in plain PyTorch."""
    wide = torch.promote_types(input.dtype, torch.float32)
    x, dy = _rows(input).to(wide), _rows(grad_output).to(wide)
    return (main_grad.to(wide) + dy.t() @ x).to(main_grad.dtype)


def _accumulate(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    # Only compiled code, which must not look inside, pays for an operator's dispatch.
    (_op if torch.compiler.is_compiling() else _compute)(input, grad_output, main_grad)


def _compute(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    if torch.is_grad_enabled():  # in a backward pass it is not, and switching it off takes as long as the rest
        with torch.no_grad():
            _compute(input, grad_output, main_grad)
        return
    if input.numel() == 0 or grad_output.numel() == 0:
        return
    x, dy = _rows(input), _rows(grad_output).t()
    if main_grad.dtype == x.dtype:
        main_grad.addmm_(dy, x)
    elif x.is_cuda:
        torch.addmm(main_grad, dy, x, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.addmm_(dy.to(main_grad.dtype), x.to(main_grad.dtype))


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


@torch.library.custom_op("composer_kernels::wgrad_accumulate", mutates_args=("main_grad",))
def _op(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    _compute(input, grad_output, main_grad)


@_op.register_fake
def _(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    return None


def _check(op: str, input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    check_dtypes(op, input=input.dtype, grad_output=grad_output.dtype)
    given = dtype_name(input.dtype)
    if grad_output.dtype != input.dtype:
        raise TypeError(f"{op}: grad_output is {describe(grad_output)}; accepted is the type of input, {given}")
    if main_grad.dtype != input.dtype and (main_grad.dtype != torch.float32 or input.dtype == torch.float64):
        raise TypeError(
            f"{op}: main_grad is {describe(main_grad)}; accepted are the type of input, {given}, and float32 where "
            "that has 16 bits"
        )
    if input.dim() < 1 or grad_output.shape[:-1] != input.shape[:-1] or grad_output.dim() != input.dim():
        raise ValueError(
            f"{op}: input is {describe(input)} and grad_output is {describe(grad_output)}; accepted are (…, K) and "
            "(…, N) with the same leading dimensions"
        )
    if main_grad.shape != (grad_output.shape[-1], input.shape[-1]):
        raise ValueError(
            f"{op}: main_grad is {describe(main_grad)}; accepted is ({grad_output.shape[-1]}, {input.shape[-1]}), N "
            "of grad_output and K of input"
        )
    if not input.device == grad_output.device == main_grad.device:
        raise ValueError(
            f"{op}: input, grad_output and main_grad are on {input.device}, {grad_output.device} and "
            f"{main_grad.device}; accepted is one device"
        )
