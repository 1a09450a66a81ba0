"""Launches of the kernels behind `rms_norm` and `add_rms_norm`, which `_norm_kernels` holds, and their choice.

A forward pass is made ready once for all arguments of the same traits and settings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from composer_kernels._launch import Kernel, Variant, as_rows, multiprocessors
from composer_kernels._norm_kernels import _backward_kernel, _forward_kernel, _weight_grad_kernel
from composer_kernels.overlap import can_overlap


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        block: Columns handled at a time, a power of two; below the width a row is read twice.
        rows: Rows of a tile, a power of two.
        warps: Warps of a program.
        stages: Tiles in flight in the loop of a persistent program.
        programs: Persistent programs a multiprocessor, for the backward kernel.
        pin: Whether the backward kernel keeps a weight that fits a block in registers, or reads it for each tile.
        overlap: Whether the second backward kernel is launched while the first one ends, on GPUs that can.
    """

    block: int
    rows: int
    warps: int
    stages: int = 1
    programs: int = 1
    pin: bool = True
    overlap: bool = True

    @functools.cached_property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """As `Kernel.launch` takes them."""
        return (("num_warps", self.warps),)


@functools.cache
def forward_launch(width: int) -> Launch:
    """The forward kernel's launch for rows of that many elements: 16 elements a thread, whole rows up to 32768."""
    block = triton.next_power_of_2(width) if width <= 32768 else 8192
    rows = max(1, 2048 // block)
    return Launch(block, rows, warps=min(32, max(4, rows * block // 512)))


@functools.cache
def backward_launch(width: int, size: int = 4) -> Launch:
    """The backward kernel's launch: two or three programs a multiprocessor with tiles of 4096 elements, or longer rows.

    Each has its next tile on its way, one that is alone has two, as far as a small GPU's 99 KiB of shared memory go.

    Args:
        width: Elements of a row.
        size: Bytes of an element of all that is read, dy, x and dtotal.
    """
    if width > 8192:
        return Launch(block=8192, rows=1, warps=16, programs=2)
    block = triton.next_power_of_2(width)
    if (block, size) in _TUNED:
        return _TUNED[block, size]
    if block == 8192:
        return Launch(block, rows=1, warps=16, stages=3 if size <= 6 else 2 if size <= 10 else 1)
    return Launch(block, max(1, 4096 // block), warps=8, stages=2, programs=2)


# Found on an H100 with 8192 rows, by columns and bytes read. bfloat16 without a stream takes 38.1 and 72.2 us, with the
# launch of all others 42.3 and 78.9; with an fp32 stream 94.9, 187.0 and 368.7, before 103.6, 213.1 and 459.4. With a
# 16-bit stream none was better by 1 %. At 512 columns three programs would lack registers.
_TUNED = {
    (2048, 4): Launch(2048, rows=2, warps=4, programs=3, pin=False),
    (4096, 4): Launch(4096, rows=1, warps=4, programs=3, pin=False),
    (2048, 10): Launch(2048, rows=2, warps=4, programs=2, pin=False),
    (4096, 10): Launch(4096, rows=2, warps=16, pin=False),
    (8192, 10): Launch(8192, rows=1, warps=32, pin=False),
}

_forward = Kernel(_forward_kernel)
_backward = Kernel(_backward_kernel)
_weight_grad = Kernel(_weight_grad_kernel)


@dataclass(frozen=True)
class Forward:
    """The forward kernel made ready for all arguments of the same traits and settings.

    Attributes:
        variant: Of the kernel.
        programs: Of its grid.
        rows: R.
        like_x: What `empty_like` takes beside `x` to make y.
        like_residual: And beside the residual to make the total.
        keep_rstd: Whether to return rstd, which backward needs.
        in_rows: Whether the kernel reads the inputs as they lie.
    """

    variant: Variant
    programs: int
    rows: int
    like_x: dict[str, Any]
    like_residual: dict[str, Any]
    keep_rstd: bool
    in_rows: bool

    def run(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what `launch_forward` does."""
        y = torch.empty_like(x, **self.like_x)
        total = None if residual is None else torch.empty_like(residual, **self.like_residual)
        rstd = x.new_empty(self.rows, dtype=torch.float32) if self.keep_rstd else None
        if not self.in_rows:
            x = as_rows(x)[0]
            residual = None if residual is None else as_rows(residual)[0]
            weight = None if weight is None else weight.contiguous()
        self.variant.launch(self.programs, (x, residual, weight, y, total, rstd), (self.rows,), (eps,))
        return y, total, rstd


def prepare_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    zero_centered: bool,
    out_dtype: torch.dtype,
    launch: Launch | None = None,
    *,
    keep_rstd: bool = True,
) -> Forward:
    """Make the forward kernel ready for arguments of `launch_forward`."""
    width = x.shape[-1]
    rows = x.numel() // width
    launch = launch or forward_launch(width)
    strides = (as_rows(x)[1], 0 if residual is None else as_rows(residual)[1])
    total, rstd = (None if residual is None else residual.dtype), (torch.float32 if keep_rstd else None)
    given = (x.dtype, total, None if weight is None else weight.dtype)
    constants = (width, launch.block, launch.rows, zero_centered)
    inputs = [tensor for tensor in (x, residual, weight) if tensor is not None]
    return Forward(
        _forward.variant(x.get_device(), (*given, out_dtype, total, rstd), strides, constants, launch.options),
        -(-rows // launch.rows),
        rows,
        _contiguous_like(x, out_dtype),
        {} if residual is None else _contiguous_like(residual, residual.dtype),
        keep_rstd,
        all(tensor.is_contiguous() for tensor in inputs),
    )


def _contiguous_like(x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What `empty_like` must be told; to be told nothing takes it the least time."""
    layout = {} if x.is_contiguous() else {"memory_format": torch.contiguous_format}
    return layout if dtype == x.dtype else layout | {"dtype": dtype}


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    zero_centered: bool,
    out_dtype: torch.dtype,
    launch: Launch | None = None,
    *,
    keep_rstd: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the forward kernel.

    Args:
        x: (…, H).
        residual: Added to `x` first, if there is one, in its own type. Same shape.
        weight: (H,) or None.
        eps: Added to the mean square.
        zero_centered: Whether to scale by 1 + weight.
        out_dtype: Of y.
        launch: Instead of the heuristic's.
        keep_rstd: Whether to return rstd, which backward needs.

    Returns:
        y (…, H) in `out_dtype`, x + residual in the residual's type or None, and rstd (R,) in fp32 or None. Apart from
        these nothing is allocated, unless `as_rows` must copy.
    """
    ready = prepare_forward(x, residual, weight, zero_centered, out_dtype, launch, keep_rstd=keep_rstd)
    return ready.run(x, residual, weight, eps)


def launch_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    zero_centered: bool,
    needs_dweight: bool,
    main_grad: Tensor | None,
    copy_dtype: torch.dtype | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the backward kernels.

    Args:
        dy: Gradient of y, (…, H).
        dtotal: Gradient of x where it was used outside the norm too, added to the norm's, or None.
        x: What was normalised, (…, H).
        weight: (H,) or None.
        rstd: (R,) in fp32, from `launch_forward`.
        zero_centered: Whether y was scaled by 1 + weight.
        needs_dweight: Whether to compute the weight's gradient.
        main_grad: (H,) in fp32; where given the weight's gradient is added to it instead of being returned.
        copy_dtype: A second dtype in which to return dx.
        launch: Instead of the heuristic's.

    Returns:
        dx in the type of x, dx in `copy_dtype` or None, and dweight in the weight's type or None. Besides these, fp32
        partial sums (programs, H) are allocated where the weight's gradient is computed.
    """
    width, rows = x.shape[-1], rstd.numel()
    size = dy.element_size() + x.element_size() + (0 if dtotal is None else dtotal.element_size())
    launch = launch or backward_launch(width, size)
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dx_copy = None if copy_dtype is None else torch.empty_like(dx, dtype=copy_dtype)
    tiles = -(-rows // launch.rows)
    # As few programs as finish in the same number of rounds: fewer partial sums.
    rounds = -(-tiles // (multiprocessors(x.get_device()) * launch.programs))
    programs = max(1, -(-tiles // max(1, rounds)))
    partial = x.new_empty(programs * width, dtype=torch.float32) if needs_dweight else None
    pin = launch.pin and launch.block >= width
    overlap = launch.overlap and needs_dweight and can_overlap(x.get_device())
    dy, dy_stride = as_rows(dy)
    x, x_stride = as_rows(x)
    dtotal_stride = 0
    if dtotal is not None:
        dtotal, dtotal_stride = as_rows(dtotal)
    _backward.launch(
        programs,
        (dy, dtotal, x, weight, rstd, dx, dx_copy, partial),
        (dy_stride, dtotal_stride, x_stride),
        (rows, programs),
        (),
        (width, launch.block, launch.rows, zero_centered, pin, launch.stages, overlap),
        launch.options,
    )
    if partial is None or weight is None:
        return dx, dx_copy, None
    dweight = torch.empty_like(weight) if main_grad is None else main_grad
    reduced_rows = min(512, 1 << (programs - 1).bit_length())
    block = 8192 // reduced_rows  # one load of 8192 elements a program
    _weight_grad.launch(
        -(-width // block),
        (partial, dweight),
        (),
        (programs,),
        (),
        (width, block, reduced_rows, main_grad is not None, overlap),
        _OVERLAPPED if overlap else _ALONE,
    )
    return dx, dx_copy, dweight if main_grad is None else None


_ALONE = (("num_warps", 8),)
_OVERLAPPED = (("num_warps", 8), ("launch_pdl", True))
