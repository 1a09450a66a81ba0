"""What `rms_norm` and `add_rms_norm` share beside the kernels: checks, plain PyTorch formulas, PyTorch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from composer_kernels._launch import Kept, check_dtypes, describe, dtype_name, runs_kernel, traits
from composer_kernels._norm import Forward, launch_backward, launch_forward, prepare_forward


def check(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    out_dtype: torch.dtype,
    main_grad: Tensor | None,
    residual: Tensor | None = None,
) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes or devices that do not fit.
    """
    beside = x.dtype if residual is None else residual.dtype
    check_dtypes(op, x=x.dtype, residual=beside, weight=x.dtype if weight is None else weight.dtype, out=out_dtype)
    shape, device = x.shape, x.device  # asking a tensor takes longer than all the rest
    width = shape[-1] if shape else 0
    if width == 0:
        raise ValueError(f"{op}: x must be (…, H) with H at least 1; given {describe(x)}")
    if residual is not None and (residual.shape != shape or residual.device != device):
        raise ValueError(
            f"{op}: residual must have the shape and device of x, {describe(x)}; given {describe(residual)}"
        )
    if weight is not None and (weight.shape != (width,) or weight.device != device):
        raise ValueError(f"{op}: weight must be ({width},), the width of x, on {device}; given {describe(weight)}")
    if main_grad is not None:
        _check_main_grad(op, x, weight, main_grad)


def _check_main_grad(op: str, x: Tensor, weight: Tensor | None, main_grad: Tensor) -> None:
    if weight is None:
        raise ValueError(f"{op}: main_grad takes the gradient of a weight, and there is none")
    fits = main_grad.shape == weight.shape and main_grad.device == x.device and main_grad.is_contiguous()
    if not fits or main_grad.dtype != wide(x.dtype):
        wanted = f"{dtype_name(wide(x.dtype))} {tuple(weight.shape)}, contiguous, on {x.device}"
        raise ValueError(f"{op}: main_grad must be {wanted}; given {describe(main_grad)}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which the formulas compute: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def forward(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    settings: Settings,
    *,
    keep_rstd: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check the arguments, then give y, x + residual (or None) and rstd, as `launch_forward` does, on any device.

    Raises:
        TypeError: As `check`.
        ValueError: As `check`.
    """
    eps, zero_centered, out_dtype, main_grad = settings
    if torch.compiler.is_compiling() or not runs_kernel(x):
        check(op, x, weight, out_dtype, main_grad, residual)
        # Only compiled code, which must not look inside, pays for an operator: its dispatch takes longer than a launch.
        run = _forward_op if torch.compiler.is_compiling() else _compute_forward
        y, total, rstd = run(x, residual, weight, eps, zero_centered, out_dtype)
        return y, None if residual is None else total, rstd
    beside = (zero_centered, out_dtype, keep_rstd)
    key = (traits(x), traits(residual), traits(weight), traits(main_grad), beside)
    ready = _ready.get(key)
    if ready is None:  # the rules and what is made ready read nothing that the key does not hold
        check(op, x, weight, out_dtype, main_grad, residual)
        ready = _ready.keep(key, prepare_forward(x, residual, weight, zero_centered, out_dtype, keep_rstd=keep_rstd))
    return ready.run(x, residual, weight, eps)


_ready: Kept[Forward] = Kept()

Settings = tuple[float, bool, torch.dtype, Tensor | None]
"""Of a norm: eps, whether the weight is centred at zero, the type of the result, main_grad."""


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    zero_centered: bool,
    needs_dweight: bool,
    main_grad: Tensor | None,
    copy_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Give dx, dx in `copy_dtype` and what autograd gets for the weight, each None where it is not asked for."""
    arguments = (dy, dtotal, x, weight, rstd, zero_centered, needs_dweight, main_grad, copy_dtype)
    if torch.compiler.is_compiling():
        dx, dx_copy, dweight = _backward_op(*arguments)
    else:
        dx, dx_copy, dweight = _compute_backward(*arguments)
    if weight is None or not needs_dweight:
        dweight = None
    elif main_grad is not None:
        dweight = _stand_in(weight)
    return dx, None if copy_dtype is None else dx_copy, dweight


def _stand_in(weight: Tensor) -> Tensor | None:
    """What autograd gets for a weight whose gradient went to its main_grad.

    Nothing; but where Megatron's data parallelism flags the parameter, whose hooks run only on a gradient, an unwritten
    one, after setting that flag.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def _compute_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, zero_centered: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`launch_forward`, or the same in plain PyTorch where no kernel runs."""
    if runs_kernel(x):
        return launch_forward(x, residual, weight, eps, zero_centered, out_dtype)
    total = None if residual is None else (x.to(wide(x.dtype)) + residual).to(residual.dtype)
    normed = x if total is None else total
    normed = normed.to(wide(normed.dtype))
    rstd = torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    y = normed * rstd
    if weight is not None:
        y = y * (weight.to(y.dtype) + zero_centered)
    return y.to(out_dtype), total, rstd.flatten()


def _compute_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    zero_centered: bool,
    needs_dweight: bool,
    main_grad: Tensor | None,
    copy_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`launch_backward`, or the same in plain PyTorch where no kernel runs."""
    if runs_kernel(x):
        return launch_backward(dy, dtotal, x, weight, rstd, zero_centered, needs_dweight, main_grad, copy_dtype)
    rstd = rstd.view(*x.shape[:-1], 1)
    dy, normed = dy.to(rstd.dtype), x.to(rstd.dtype) * rstd
    g = dy if weight is None else dy * (weight.to(rstd.dtype) + zero_centered)
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd
    if dtotal is not None:
        dx = dx + dtotal
    dweight = None
    if needs_dweight and weight is not None:
        dweight = (dy * normed).reshape(-1, x.shape[-1]).sum(0)
        if main_grad is not None:
            main_grad.add_(dweight)
        dweight = dweight.to(weight.dtype) if main_grad is None else None
    return dx.to(x.dtype), None if copy_dtype is None else dx.to(copy_dtype), dweight


@torch.library.custom_op("composer_kernels::norm_forward", mutates_args=())
def _forward_op(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, zero_centered: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _tensors(x, _compute_forward(x, residual, weight, eps, zero_centered, out_dtype))


@_forward_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, zero_centered: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total = None if residual is None else residual.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=wide(x.dtype))
    return _tensors(x, (x.new_empty(x.shape, dtype=out_dtype), total, rstd))


@torch.library.custom_op("composer_kernels::norm_backward", mutates_args=("main_grad",))
def _backward_op(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    zero_centered: bool,
    needs_dweight: bool,
    main_grad: Tensor | None,
    copy_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (dy, dtotal, x, weight, rstd, zero_centered, needs_dweight, main_grad, copy_dtype)
    return _tensors(x, _compute_backward(*arguments))


@_backward_op.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    zero_centered: bool,
    needs_dweight: bool,
    main_grad: Tensor | None,
    copy_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx_copy = None if copy_dtype is None else x.new_empty(x.shape, dtype=copy_dtype)
    dweight = weight.new_empty(weight.shape) if weight is not None and needs_dweight and main_grad is None else None
    return _tensors(x, (x.new_empty(x.shape), dx_copy, dweight))


def _tensors(x: Tensor, results: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns no None: an empty tensor stands for it."""
    first, second, third = (x.new_empty(0) if result is None else result for result in results)
    return first, second, third
