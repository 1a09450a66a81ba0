"""Matrix products of 8-bit numbers (e4m3, arXiv 2209.05433), each row of a matrix scaled by a power of two of its own.

A row becomes 8-bit numbers of at most 448 and a scale 2^e, the smallest power of two that lets its largest element fit:

    q = round(x / 2^e),    e = ceil(log2(max|x| / 448)),    x ≈ q · 2^e

Dividing by a power of two is exact, so that the one rounding (to nearest, ties to even) is e4m3's: at most 2^-4 of an
element, or 2^-10 · 2^e where that is more, for elements below 2^-14 or so of the row's largest. A row of zeros stays
one; a row with an infinity or NaN gets a NaN scale, and makes NaN of all that is multiplied by it. A gradient's rows
are e4m3, too, not e5m2: scaled one by one they do not need its range.

`matmul` gives A · Bᵀ by cuBLAS, which takes both operands with the dimension that is summed over side by side. Where
the other dimension is to be summed over, `transpose` turns a quantised matrix: it brings all rows to one scale, the
largest, which powers of two allow without rounding again, except for elements below 2^-14 or so of the matrix's
largest.

Bytes for R rows of K 16-bit elements: `quantise` reads 2RK and writes RK, in one pass up to 32,768 columns, else
reading twice; `transpose` reads and writes RK each. FLOPs are few.

Memory: results are allocated. Inputs whose rows no single stride can address are copied first.

Legend: WIDTH = K; a program handles ROWS rows (`quantise`) or a tile of ROWS × COLUMNS (`transpose`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._launch import INTERPRETING, Kernel, Launch, as_rows, check_dtypes, describe

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3, 1.75 · 2^8."""

ALIGNMENT = 16
"""What sizes of operands must be multiples of, for cuBLAS; the rows of the left one are free."""

_WHOLE = 32_768
"""The widest row that a program holds in registers."""


class Rows(NamedTuple):
    """A quantised matrix.

    Attributes:
        values: (R, K) in e4m3, contiguous.
        scales: (R,) in fp32, powers of two or NaN; row r stands for values[r] · scales[r].
    """

    values: Tensor
    scales: Tensor


@triton.jit
def largest_bits(x: tl.tensor) -> tl.tensor:
    """Of each row, the bits of the largest |x|: integers order numbers as they are, infinity and NaN above all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)


@triton.jit
def scale_and_inverse(bits: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """For a row whose largest |x| has these bits its scale 2^e and 2^-e; NaN and 0 where there is none.

    448 is 1.75 · 2^8: what is above 1.75 · 2^k carries into the exponent, and needs one more. With 0 as the inverse,
    whatever stands in a row of infinities becomes a number or NaN: its scale makes NaN of both.
    """
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1)
    finite = bits < 0x7F800000
    scale = tl.where(finite, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, tl.where(finite, (254 - exponent) << 23, 0).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def _quantise_kernel(
    x_ptr: tl.tensor, q_ptr: tl.tensor, scale_ptr: tl.tensor, x_stride: tl.tensor, rows: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < WIDTH)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    bits = largest_bits(x)
    if BLOCK < WIDTH:
        for start in tl.static_range(BLOCK, WIDTH, BLOCK):
            mask = (row < rows) & (start + col < WIDTH)
            x = tl.load(x_ptr + row * x_stride + start + col, mask=mask, other=0.0).to(tl.float32)
            bits = tl.maximum(bits, largest_bits(x))
    scale, inverse = scale_and_inverse(bits)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    if BLOCK < WIDTH:
        for start in tl.static_range(0, WIDTH, BLOCK):
            mask = (row < rows) & (start + col < WIDTH)
            x = tl.load(x_ptr + row * x_stride + start + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(q_ptr + row * WIDTH + start + col, (x * inverse).to(tl.float8e4nv), mask=mask)
    else:
        tl.store(q_ptr + row * WIDTH + col, (x * inverse).to(tl.float8e4nv), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _transpose_kernel(
    q_ptr: tl.tensor, scale_ptr: tl.tensor, largest_ptr: tl.tensor, out_ptr: tl.tensor, out_scale_ptr: tl.tensor,
    padded: tl.tensor, rows: tl.tensor,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Write out (WIDTH, padded) from q (rows, WIDTH), zeros beyond rows, and the same scale for each row of out."""
    strips: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = (program // strips) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = (program % strips) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (col < WIDTH)[None, :]
    q = tl.load(q_ptr + row[:, None] * WIDTH + col[None, :], mask=mask, other=0.0).to(tl.float32)
    largest = tl.load(largest_ptr)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    # the quotient of two powers of two, in their bits: exact, or 0 where it is below 2^-126
    bits = scale.to(tl.int32, bitcast=True) - largest.to(tl.int32, bitcast=True) + 0x3F800000
    factor = tl.maximum(bits, 0).to(tl.float32, bitcast=True)
    out = tl.trans((q * factor[:, None]).to(tl.float8e4nv))
    mask = (col < WIDTH)[:, None] & (row < padded)[None, :]
    tl.store(out_ptr + col[:, None].to(tl.int64) * padded + row[None, :], out, mask=mask)
    if program < strips:
        tl.store(out_scale_ptr + col, tl.zeros([COLUMNS], tl.float32) + largest, mask=col < WIDTH)


@functools.cache
def quantise_launch(width: int) -> Launch:
    """Whole rows, 8192 elements or more together, 32 a thread up to 16 warps."""
    block = min(triton.next_power_of_2(width), _WHOLE if width <= _WHOLE else 8192)
    rows = max(1, 8192 // block)
    return Launch(block, rows, warps=max(4, min(16, rows * block // 1024)))


TRANSPOSE_LAUNCH = Launch(block=128, rows=128, warps=8)
"""Whole sectors and lines on both sides."""

_quantise = Kernel(_quantise_kernel)
_transpose = Kernel(_transpose_kernel)


def launch_quantise(x: Tensor, launch: Launch | None = None) -> Rows:
    """Run the kernel of `quantise`."""
    width = x.shape[-1]
    launch = launch or quantise_launch(width)
    rows = x.numel() // width
    values, scales = x.new_empty((rows, width), dtype=E4M3), x.new_empty(rows, dtype=torch.float32)
    x, stride = as_rows(x)
    constants = (width, launch.block, launch.rows)
    _quantise.launch(-(-rows // launch.rows), (x, values, scales), (stride,), (rows,), (), constants, launch.options)
    return Rows(values, scales)


def launch_transpose(matrix: Rows, launch: Launch = TRANSPOSE_LAUNCH) -> Rows:
    """Run the kernel of `transpose`."""
    rows, width = matrix.values.shape
    padded = -(-rows // ALIGNMENT) * ALIGNMENT
    values, scales = matrix.values.new_empty((width, padded)), matrix.scales.new_empty(width)
    _transpose.launch(
        -(-padded // launch.rows) * -(-width // launch.block),
        (matrix.values, matrix.scales, matrix.scales.amax(), values, scales),
        (padded,),
        (rows,),
        (),
        (width, launch.rows, launch.block),
        launch.options,
    )
    return Rows(values, scales)


def quantise(x: Tensor) -> Rows:
    """Make 8-bit numbers of a matrix's rows, each with a scale of its own; autograd does not follow.

    On a GPU a Triton kernel does it, on a CPU plain PyTorch, to the same bits.

    Args:
        x: (…, K) in bfloat16, float16 or float32; the leading dimensions are rows.

    Returns:
        (R, K) values and (R,) scales.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For a tensor without a column.
    """
    check_dtypes("quantise", x=x.dtype)
    if x.dtype == torch.float64:
        raise TypeError("quantise: x is float64; accepted are bfloat16, float16 and float32")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantise: x must be (…, K) with K at least 1; given {describe(x)}")
    return launch_quantise(x) if x.is_cuda or INTERPRETING else quantise_reference(x)


def transpose(matrix: Rows) -> Rows:
    """Turn a quantised matrix, for a product that sums over its rows.

    Args:
        matrix: R rows of K; its scales powers of two.

    Returns:
        K rows of R and as many zeros as make a multiple of 16 of it, all with one scale, the largest of `matrix`.

    Raises:
        TypeError: For other element types than a `Rows` has.
        ValueError: For shapes that do not fit, or a matrix without a row.
    """
    _check("transpose", "matrix", matrix)
    if len(matrix.values) == 0:
        raise ValueError("transpose: matrix has no row, and so no scale")
    return launch_transpose(matrix) if matrix.values.is_cuda or INTERPRETING else transpose_reference(matrix)


def matmul(
    a: Rows, b: Rows, out_dtype: torch.dtype = torch.bfloat16, *, fast: bool = True, whole: bool = False
) -> Tensor:
    """A · Bᵀ of quantised matrices, by cuBLAS on a GPU, in fp32 elsewhere.

    Args:
        a: (M, K).
        b: (N, K); N and K multiples of 16.
        out_dtype: Of the result, bfloat16, float16 or float32.
        fast: Whether the GPU may add up in the few bits of its 8-bit units (about 14 on Hopper), which is faster.
        whole: Whether each operand has one scale for all its rows, as `transpose` makes them: cuBLAS has more kernels.

    Returns:
        (M, N).

    Raises:
        TypeError: For other element types than a `Rows` has.
        ValueError: For shapes that do not fit.
    """
    for name, matrix in (("a", a), ("b", b)):
        _check("matmul", name, matrix)
    n, k = b.values.shape
    if a.values.shape[1] != k or n % ALIGNMENT or k % ALIGNMENT:
        raise ValueError(
            f"matmul: a is {describe(a.values)} and b is {describe(b.values)}; accepted are (M, K) and (N, K), N and K "
            f"multiples of {ALIGNMENT}"
        )
    if not a.values.is_cuda:
        return (dequantise(a) @ dequantise(b).t()).to(out_dtype)
    if len(a.values) == 0:
        return a.values.new_empty((0, n), dtype=out_dtype)
    scale_a, scale_b = (a.scales[:1], b.scales[:1]) if whole else (a.scales[:, None], b.scales[None])
    return torch._scaled_mm(
        a.values, b.values.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=fast
    )


@torch.no_grad()
def quantise_reference(x: Tensor) -> Rows:
    """`quantise` in plain PyTorch on any device."""
    rows = x.reshape(-1, x.shape[-1]).float()
    bits = rows.abs().view(torch.int32).amax(1)
    exponent = (((bits + 0x1FFFFF) >> 23) - 8).clamp_min(1)
    finite = bits < 0x7F800000
    scales = torch.where(finite, (exponent << 23).view(torch.float32), torch.nan)
    inverse = torch.where(finite, ((254 - exponent) << 23).view(torch.float32), 0.0)
    return Rows((rows * inverse[:, None]).to(E4M3), scales)


@torch.no_grad()
def transpose_reference(matrix: Rows) -> Rows:
    """`transpose` in plain PyTorch on any device."""
    largest = matrix.scales.amax()
    values = (matrix.values.float() * (matrix.scales / largest)[:, None]).t().contiguous()
    padding = -values.shape[1] % ALIGNMENT
    return Rows(torch.nn.functional.pad(values, (0, padding)).to(E4M3), largest.repeat(len(values)))


@torch.no_grad()
def dequantise(matrix: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that a quantised matrix stands for, (R, K), rounded once to `dtype`."""
    return (matrix.values.float() * matrix.scales[:, None]).to(dtype)


def _check(op: str, name: str, matrix: Rows) -> None:
    values, scales = matrix
    if values.dtype != E4M3 or scales.dtype != torch.float32:
        raise TypeError(
            f"{op}: {name} is {describe(values)} with scales {describe(scales)}; accepted are float8_e4m3fn and float32"
        )
    if values.dim() != 2 or not values.is_contiguous() or scales.shape != values.shape[:1]:
        raise ValueError(
            f"{op}: {name} is {describe(values)} with scales {describe(scales)}; accepted are (R, K), contiguous, and "
            "(R,)"
        )
