"""The kernel of `linear_decode` for two rows and more: tensor cores, and each weight read once for all of them.

A program takes some rows of W whole. Each of its warps has columns of its own: in every round it multiplies BLOCK_N
rows and BLOCK_K columns of W with these columns of x (W is the wide operand, the rows of x are padded to LINES), and
the sums of the warps are added in their order at the end. So few rows of W keep a program busy, there are programs
enough for a large GPU, and no partial sums go through memory. Blocks are on their way to shared memory STAGES - 1
rounds ahead; the lines of the first ones can come to the L2 cache while the kernel before ends.

Norm: x · norm_weight is rounded to the type of x before it is multiplied, as PyTorch rounds a norm's result, and the
factor 1 / sqrt(mean(x²) + eps) multiplies the sums at the end. The squares are the diagonal of x · xᵀ, which tensor
cores multiply on the way. That pays for few rows only, and in float16 x · norm_weight could overflow: `launch_rows`
runs `rms_norm` first for `MOST_NORMED` rows and more, and in float16.

Results are the same bit for bit each time, and what a row gets does not depend on what other rows hold. Its last bits
depend on how many they are, as the launch does.

Bytes: W once from memory, and x once a program from the L2 cache, which is ROWS / BLOCK_N of the bytes of W (half with
a gate). With 64 rows that is as much as W itself or more, so that the cache's bandwidth ends the gain.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._launch import Kernel, as_rows, power_of_2
from composer_kernels.overlap import Overlap, can_overlap, launch_options
from composer_kernels.rms_norm import rms_norm

MOST_NORMED = 16
"""Rows up to which this kernel norms them; registers hold their products with each other."""

_SHARED_MEMORY = 96_000
"""Bytes of a program's blocks: GPUs since compute capability 8.0 have a little more."""


@triton.jit
def _fetch(rows_ptr: tl.tensor, K: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    """Ask the L2 cache for the first columns of these rows, in its lines of 128 bytes, and wait for nothing."""
    line: tl.constexpr = 1024 // rows_ptr.dtype.element_ty.primitive_bitwidth
    k = tl.minimum(tl.arange(0, COLUMNS // line) * line, K - 1)
    address = (rows_ptr[:, None] + k[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _kernel(
    x_ptr: tl.tensor, w_ptr: tl.tensor, norm_ptr: tl.tensor, residual_ptr: tl.tensor, y_ptr: tl.tensor,
    x_stride: tl.tensor, w_stride: tl.tensor, residual_stride: tl.tensor, eps: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr,
) -> None:  # fmt: skip
    if OVERLAP == "full":
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.arange(0, LINES)
    columns = tl.arange(0, WARPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # of each warp
    w_rows = w_ptr + n.to(tl.int64) * w_stride
    up_rows = w_rows + N * w_stride
    if OVERLAP != "none":  # W alone may be read before the kernels before have ended, and nothing be written
        ahead: tl.constexpr = WARPS * BLOCK_K * triton.next_power_of_2(STAGES - 1)
        first_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64) * w_stride
        _fetch(first_rows, K, ahead)
        if GATED:
            _fetch(first_rows + N * w_stride, K, ahead)
        tl.extra.cuda.gdc_wait()
    if OVERLAP == "tail":
        tl.extra.cuda.gdc_launch_dependents()
    inside = (n < N)[None, :, None]
    present = (line < ROWS)[None, None, :]
    x_rows = x_ptr + line.to(tl.int64)[None, None, :] * x_stride
    sums = tl.zeros([WARPS, BLOCK_N, LINES], tl.float32)
    sums_up = tl.zeros([WARPS, BLOCK_N, LINES], tl.float32)
    products = tl.zeros([WARPS, LINES, LINES] if NORM else [1, 1, 1], tl.float32)  # of the rows of x with each other
    for start in tl.range(0, K, WARPS * BLOCK_K, num_stages=STAGES):
        k = start + columns
        valid = (k < K)[:, :, None]
        w_mask = (k < K)[:, None, :] & inside
        x = tl.load(x_rows + k[:, :, None], mask=valid & present, other=0.0)
        w = tl.load(w_rows[None, :, None] + k[:, None, :], mask=w_mask, other=0.0, eviction_policy="evict_first")
        if NORM:
            products = tl.dot(tl.trans(x, (0, 2, 1)), x, products, input_precision="ieee")
            scale = tl.load(norm_ptr + k[:, :, None], mask=valid, other=0.0)
            x = (x.to(tl.float32) * scale.to(tl.float32)).to(x.dtype)
        sums = tl.dot(w, x, sums, input_precision="ieee")
        if GATED:
            up = tl.load(up_rows[None, :, None] + k[:, None, :], mask=w_mask, other=0.0, eviction_policy="evict_first")
            sums_up = tl.dot(up, x, sums_up, input_precision="ieee")
    y = tl.sum(sums, 0)
    y_up = tl.sum(sums_up, 0)
    if NORM:
        diagonal = tl.where(line[:, None] == line[None, :], tl.sum(products, 0), 0.0)
        factor = tl.rsqrt(tl.sum(diagonal, 0) / K + eps)
        y *= factor[None, :]
        y_up *= factor[None, :]
    if GATED:
        y = y * tl.sigmoid(y) * y_up
    mask = (n < N)[:, None] & (line < ROWS)[None, :]
    if ADD:
        y += tl.load(residual_ptr + line[None, :] * residual_stride + n[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + line[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class RowsLaunch:
    """How the kernel is launched.

    Attributes:
        outputs: Rows of W of a program, a power of two from 16 on; with a gate so many of each half.
        block: Columns of W of a warp at a time, a power of two from 16 on.
        stages: Rounds of the loop that are under way at a time, the one that multiplies included.
        warps: Warps of a program.
        overlap: When the kernel begins, and lets the next one begin.
    """

    outputs: int
    block: int
    stages: int
    warps: int = 4
    overlap: Overlap = "none"

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """As `Kernel.launch` takes them."""
        return launch_options(self.warps, self.overlap)


def padded(rows: int) -> int:
    """LINES for so many rows: a tensor core multiplies with 8 at least."""
    return max(8, power_of_2(rows))


@functools.cache
def default_rows_launch(
    rows: int, outputs: int, gated: bool, dtype: torch.dtype, overlap: Overlap = "none"
) -> RowsLaunch:
    """About one program a multiprocessor of a large GPU at least, and as many blocks on their way as have room.

    Args:
        rows: Of x.
        outputs: N.
        gated: Whether W has two halves.
        dtype: Of x and W.
        overlap: As `RowsLaunch`.
    """
    lines, warps = padded(rows), 4
    largest = min(2048 // lines, 64) // (1 + gated)  # what the registers hold
    share = next((size for size in (64, 32) if size <= largest and outputs >= 128 * size), 16)
    block = 64 if lines <= 16 else 32
    if dtype == torch.float32:  # which no tensor core multiplies without rounding
        share, block = 16, 16
    bytes_of_stage = warps * block * (share * (1 + gated) + lines) * dtype.itemsize
    ahead = min(5, max(1, _SHARED_MEMORY // bytes_of_stage))
    return RowsLaunch(share, block, 1 + ahead, warps, overlap)


_decode_rows = Kernel(_kernel)


def launch_rows(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    out: Tensor | None = None,
    launch: RowsLaunch | None = None,
    overlap: Overlap = "none",
) -> Tensor:
    """Run the kernel; arguments as for `linear_decode`, whose `overlap` goes into the default launch."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if launch is None:
        chosen = overlap if can_overlap(x.get_device()) else "none"
        launch = default_rows_launch(rows, outputs, gated, x.dtype, chosen)
    if norm_weight is not None and (rows > MOST_NORMED or x.dtype == torch.float16):
        x, norm_weight = rms_norm(x, norm_weight, eps), None
    y = x.new_empty(rows, outputs) if out is None else out
    x, x_stride = as_rows(x)
    other, other_stride = (x, 0) if residual is None else as_rows(residual)  # stands there unread
    constants = (outputs, inputs, rows, padded(rows), launch.outputs, launch.block, launch.warps, launch.stages)
    _decode_rows.launch(
        -(-outputs // launch.outputs),
        (x, weight, x if norm_weight is None else norm_weight, other, y),
        (x_stride, weight.stride(0), other_stride),
        (),
        (eps,),
        (*constants, launch.overlap, norm_weight is not None, residual is not None, gated),
        launch.options,
    )
    return y
