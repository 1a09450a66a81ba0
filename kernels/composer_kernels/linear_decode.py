"""Products of a few rows with a large matrix, as decoding has them, with the norm before and what comes after them.

    y = x̂ · Wᵀ  (+ residual)          x̂ = x, or its RMSNorm x / sqrt(mean(x²) + eps) · norm_weight
    y = silu(x̂ · Gᵀ) · (x̂ · Uᵀ)       with gate and up one above the other in W = [G; U]

so that a whole block of a model takes two calls beside its attention. Sums are in fp32.

Bytes: W once, 2NK (4NK with a gate) in 16 bits; everything else is small. FLOPs: 1 for each byte and row. Launches: 1;
with several rows in float16, and with more than 16 in any type, one of `rms_norm` before it where there is a norm.
Error: that of sums in fp32 and one rounding of the result; with several rows x · norm_weight is rounded besides, as
PyTorch rounds a norm's result.

Here is the kernel for one row, on the scalar units: memory decides. `_linear_decode_rows` has that for more, on tensor
cores. On an H100 its steps of decoding are 11 % shorter than cuBLAS's at 8 rows, and longer at 32 and 64.

A program takes some rows of W whole, so that no partial sums go through memory; the norm's factor is the same for all
of the products and multiplies their sum at the end, so that no program waits for it before it streams.

A block of W is on its way while the one before is summed. The first needs nothing of the kernel before, and can be
loaded while that one ends (`composer_kernels.overlap`).

Memory: y.

Legend: N outputs, K inputs; a program handles BLOCK_N outputs, BLOCK_K inputs at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._launch import Kernel, as_rows, check_dtypes, describe, runs_kernel
from composer_kernels._linear_decode_rows import launch_rows
from composer_kernels.overlap import Overlap, can_overlap, launch_options
from composer_kernels.rms_norm import rms_norm_reference
from composer_kernels.swiglu import swiglu_reference

MOST_ROWS = 64
"""Rows of x up to which the kernels compute; with more, x is no longer small beside W."""


@triton.jit
def _load(
    rows_ptr: tl.tensor, start: tl.tensor, inside: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """Columns of W from `start` on, zeros outside of it."""
    k = start + tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (k < K)[None, :]
    return tl.load(rows_ptr + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _kernel(
    x_ptr: tl.tensor, w_ptr: tl.tensor, norm_ptr: tl.tensor, residual_ptr: tl.tensor, y_ptr: tl.tensor,
    w_stride: tl.tensor, eps: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr,
) -> None:  # fmt: skip
    if OVERLAP == "full":
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    w_rows = w_ptr + n.to(tl.int64)[:, None] * w_stride
    up_rows = w_rows + N * w_stride
    w = _load(w_rows, 0, inside, K, BLOCK_K)
    up = w
    if GATED:
        up = _load(up_rows, 0, inside, K, BLOCK_K)
    if OVERLAP != "none":  # W alone may be read before the kernels before have ended, and nothing be written
        tl.extra.cuda.gdc_wait()
    if OVERLAP == "tail":
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)  # each of every BLOCK_K-th product
    sums_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        next_w = _load(w_rows, start + BLOCK_K, inside, K, BLOCK_K)  # on its way while this block is summed
        next_up = next_w
        if GATED:
            next_up = _load(up_rows, start + BLOCK_K, inside, K, BLOCK_K)
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        squares += x * x
        if NORM:
            x *= tl.load(norm_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        sums += w.to(tl.float32) * x[None, :]
        if GATED:
            sums_up += up.to(tl.float32) * x[None, :]
        w, up = next_w, next_up
    y = tl.sum(sums, 1)
    factor = tl.rsqrt(tl.sum(squares, 0) / K + eps) if NORM else 1.0
    y *= factor
    if GATED:
        y = y * tl.sigmoid(y) * (tl.sum(sums_up, 1) * factor)
    if ADD:
        y += tl.load(residual_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched.

    Attributes:
        outputs: Rows of W of a program, a power of two; with a gate so many of each half.
        block: Columns of W at a time, a power of two.
        warps: Warps of a program.
        overlap: When the kernel begins, and lets the next one begin.
    """

    outputs: int
    block: int
    warps: int = 4
    overlap: Overlap = "none"

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """As `Kernel.launch` takes them."""
        return launch_options(self.warps, self.overlap)


@functools.cache
def default_launch(outputs: int, inputs: int, gated: bool, overlap: Overlap = "none") -> Launch:
    """At least about four programs a multiprocessor of a large GPU, with 16 bytes a thread and more on their way each.

    Args:
        outputs: N.
        inputs: K.
        gated: Whether W has two halves.
        overlap: As `Launch`.
    """
    share = (4 if outputs <= 4096 else 8) // (4 if gated else 1)
    fitting = [size for size in (1024, 512, 256) if inputs % size == 0]
    block = fitting[0] if fitting else min(1024, triton.next_power_of_2(inputs))
    return Launch(share, block, overlap=overlap)


_decode = Kernel(_kernel)


def launch_row(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    out: Tensor | None = None,
    launch: Launch | None = None,
    overlap: Overlap = "none",
) -> Tensor:
    """Run the kernel of one row; arguments as for `linear_decode`, whose `overlap` goes into the default launch."""
    inputs = x.shape[1]
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if launch is None:
        chosen = overlap if can_overlap(x.get_device()) else "none"
        launch = default_launch(outputs, inputs, gated, chosen)
    y = x.new_empty(1, outputs) if out is None else out
    x, _ = as_rows(x)
    other = x if residual is None else as_rows(residual)[0]  # stands there unread
    _decode.launch(
        -(-outputs // launch.outputs),
        (x, weight, x if norm_weight is None else norm_weight, other, y),
        (weight.stride(0),),
        (),
        (eps,),
        (
            outputs,
            inputs,
            launch.outputs,
            launch.block,
            launch.overlap,
            norm_weight is not None,
            residual is not None,
            gated,
        ),
        launch.options,
    )
    return y


def linear_decode(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    overlap: Overlap = "none",
) -> Tensor:
    """Multiply up to `MOST_ROWS` rows with a matrix: y = x̂ · Wᵀ, with the norm before it and what follows.

    On a GPU Triton kernels do it, on a CPU and in float64 plain PyTorch. For inference: there is no gradient.

    Args:
        x: (B, K) in bfloat16, float16, float32 or float64, B from 1 to `MOST_ROWS`.
        weight: (N, K), or with a gate (2N, K), the gate's rows first; in the type of x, rows of neighbouring elements.
        norm_weight: (K,) in the type of x: multiply with the RMSNorm of x; None for x itself.
        eps: Of the norm: added to the mean square.
        residual: (B, N) in the type of x, added to the product; None for nothing.
        gated: Whether y is silu(gate) · up.
        out: (B, N) in the type of x, contiguous: takes y; may be `residual`, and else lies over no argument.
        overlap: When reading `weight` begins, on GPUs that can. The caller sees to it that nothing that may still run
            writes `weight`: neither the kernel before on the stream, nor, where that overlaps too, those before it.
            Nothing would report such a slip.

    Returns:
        y, (B, N), in the type of x, contiguous. A row of it does not depend on what the other rows of x hold; its last
        bits do on how many these are.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes or devices that do not fit.
        RuntimeError: Where a gradient is wanted.
    """
    _check(x, weight, norm_weight, residual, gated, out)
    if runs_kernel(x):
        launch = launch_row if len(x) == 1 else launch_rows
        return launch(x, weight, norm_weight, eps, residual, gated, out, overlap=overlap)
    y = linear_decode_reference(x, weight, norm_weight=norm_weight, eps=eps, residual=residual, gated=gated)
    return y if out is None else out.copy_(y)


def _check(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    out: Tensor | None,
) -> None:
    check_dtypes("linear_decode", x=x.dtype)
    if x.dim() != 2 or not 1 <= x.shape[0] <= MOST_ROWS or x.shape[1] == 0:
        raise ValueError(f"linear_decode: x must be (B, K) with B from 1 to {MOST_ROWS}; given {describe(x)}")
    rows, inputs = x.shape
    outputs = weight.shape[0] // (2 if gated else 1) if weight.dim() == 2 else 0
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, (outputs * (2 if gated else 1), inputs)),
        "norm_weight": (norm_weight, (inputs,)),
        "residual": (residual, (rows, outputs)),
        "out": (out, (rows, outputs)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        same = tensor.dtype == x.dtype and tensor.device == x.device
        if tensor.shape != shape or not same or outputs == 0 or tensor.stride(-1) != 1:
            halves = ", an even number of rows" if gated and name == "weight" else ""
            wanted = f"{shape if outputs else '(N, K)'}{halves}, elements of a row side by side, like x, {describe(x)}"
            raise ValueError(f"linear_decode: {name} must be {wanted}; given {describe(tensor)}")
    if out is not None and not out.is_contiguous():
        raise ValueError(f"linear_decode: out must be contiguous; its strides are {out.stride()}")
    given = (x, weight, norm_weight, residual)
    if out is not None:
        place = out.data_ptr(), out.stride()
        shared = [each for each in given if each is not None and _overlap(out, each)]
        if any(each is not residual or (each.data_ptr(), each.stride()) != place for each in shared):
            raise ValueError(
                "linear_decode: out lies over what other programs still read; accepted is residual itself, or memory "
                "of its own"
            )
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        raise RuntimeError("linear_decode: has no gradient; call it under torch.no_grad()")


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the memory from the first to the last element of one meets that of the other."""
    ranges = []
    for tensor in (one, other):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        ranges.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize))
    return ranges[0][0] < ranges[1][1] and ranges[1][0] < ranges[0][1]


def linear_decode_reference(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`linear_decode` in plain PyTorch on any device, rounded after each operation, and with any number of rows."""
    y = F.linear(x if norm_weight is None else rms_norm_reference(x, norm_weight, eps), weight)
    if gated:
        y = swiglu_reference(y)
    return y if residual is None else y + residual
