"""The kernels of `rms_norm` and `add_rms_norm`: RMSNorm of x or of x + residual, forward and backward.

`_norm` launches them.

With w = weight, or 1 + weight, or 1, and means over the H elements of a row:

    total = x + residual, or x          rstd = 1 / sqrt(mean(total²) + eps)          y = total · rstd · w

    g = dy · w          dtotal' = dtotal + rstd · (g - total · rstd² · mean(g · total))
    dweight = Σ over rows of dy · total · rstd

The files of the two operations count the bytes. About 4 (forward) and 9 (backward) FLOPs an element: memory decides.

A row stays in registers from its one read to its write; rows too wide for that are read a second time, from L2. The
backward kernel is persistent: each of its P programs takes every P-th tile of rows, with the next one already on its
way, and keeps its part of dweight in registers. A second kernel adds the P parts, always in the same order. Where the
GPU can, it is launched while the first one ends, and waits for that end before it reads or writes anything: whoever
comes after it on the stream comes after both.

Legend: ROWS rows of a tile; WIDTH = H; BLOCK the power of two of columns handled at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The elements in fp32, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr: tl.tensor, residual_ptr: tl.tensor | None, weight_ptr: tl.tensor | None, y_ptr: tl.tensor,
    total_ptr: tl.tensor, rstd_ptr: tl.tensor | None, x_stride: tl.tensor, residual_stride: tl.tensor, rows: tl.tensor,
    eps: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
) -> None:  # fmt: skip
    """Write y = norm(x + residual) · w for a tile of rows; total = x + residual, as it is rounded when stored."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        col = (start + tl.arange(0, BLOCK))[None, :]
        mask = (row < rows) & (col < WIDTH)
        x = _load(x_ptr + row * x_stride + col, mask)
        if residual_ptr is not None:
            total = (x + _load(residual_ptr + row * residual_stride + col, mask)).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * WIDTH + col, total, mask=mask)
            x = total.to(tl.float32)
        if BLOCK >= WIDTH and weight_ptr is not None:
            weight = _load(weight_ptr + col, col < WIDTH)  # before the reduction, which hides its latency
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / WIDTH + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
    if BLOCK < WIDTH:
        tl.debug_barrier()  # the totals stored above are read again below
    for start in tl.static_range(0, WIDTH, BLOCK):
        col = (start + tl.arange(0, BLOCK))[None, :]
        mask = (row < rows) & (col < WIDTH)
        if BLOCK < WIDTH:
            if residual_ptr is not None:
                x = _load(total_ptr + row * WIDTH + col, mask)
            else:
                x = _load(x_ptr + row * x_stride + col, mask)
            if weight_ptr is not None:
                weight = _load(weight_ptr + col, col < WIDTH)
        y = x * rstd
        if weight_ptr is not None:
            y *= weight + ZERO_CENTERED
        tl.store(y_ptr + row * WIDTH + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "programs"])
def _backward_kernel(  # noqa: PLR0912, PLR0915 - two ways through one formula
    dy_ptr: tl.tensor, dtotal_ptr: tl.tensor | None, x_ptr: tl.tensor, weight_ptr: tl.tensor | None,
    rstd_ptr: tl.tensor, dx_ptr: tl.tensor, dx_copy_ptr: tl.tensor | None, partial_ptr: tl.tensor | None,
    dy_stride: tl.tensor, dtotal_stride: tl.tensor, x_stride: tl.tensor, rows: tl.tensor, programs: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    PIN: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """Write dx (plus dtotal, twice where dx_copy asks) of every `programs`-th tile; this program's part of dweight."""
    program = tl.program_id(0)
    partial_row = partial_ptr
    if partial_ptr is not None:
        partial_row = partial_ptr + program.to(tl.int64) * WIDTH
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    weight = tl.full([1, BLOCK], 1.0, tl.float32)
    if weight_ptr is not None and PIN:
        col = tl.arange(0, BLOCK)[None, :]
        weight = _load(weight_ptr + col, col < WIDTH) + ZERO_CENTERED
    if partial_ptr is not None and BLOCK < WIDTH:
        for start in tl.static_range(0, WIDTH, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(partial_row + cols, tl.zeros([BLOCK], tl.float32), mask=cols < WIDTH)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        tile_rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        rstd = _load(rstd_ptr + tile_rows, tile_rows < rows)[:, None]
        row = tile_rows[:, None]
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in tl.static_range(0, WIDTH, BLOCK):
            col = (start + tl.arange(0, BLOCK))[None, :]
            mask = (row < rows) & (col < WIDTH)
            x = _load(x_ptr + row * x_stride + col, mask)
            dy = _load(dy_ptr + row * dy_stride + col, mask)
            if dtotal_ptr is not None and BLOCK >= WIDTH:
                dtotal = _load(dtotal_ptr + row * dtotal_stride + col, mask)
            if weight_ptr is not None and not PIN:
                weight = _load(weight_ptr + col, col < WIDTH) + ZERO_CENTERED
            products += dy * weight * x
        pull = tl.sum(products, axis=1, keep_dims=True) / WIDTH * rstd * rstd
        if BLOCK < WIDTH:
            tl.debug_barrier()  # partial sums stored by the last round are read below
        for start in tl.static_range(0, WIDTH, BLOCK):
            col = (start + tl.arange(0, BLOCK))[None, :]
            mask = (row < rows) & (col < WIDTH)
            if BLOCK < WIDTH:
                x = _load(x_ptr + row * x_stride + col, mask)
                dy = _load(dy_ptr + row * dy_stride + col, mask)
                if dtotal_ptr is not None:
                    dtotal = _load(dtotal_ptr + row * dtotal_stride + col, mask)
                if weight_ptr is not None:
                    weight = _load(weight_ptr + col, col < WIDTH) + ZERO_CENTERED
            dx = rstd * (dy * weight - x * pull)
            if dtotal_ptr is not None:
                dx += dtotal
            tl.store(dx_ptr + row * WIDTH + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dx_copy_ptr is not None:
                tl.store(dx_copy_ptr + row * WIDTH + col, dx.to(dx_copy_ptr.dtype.element_ty), mask=mask)
            if partial_ptr is not None:
                if BLOCK < WIDTH:
                    cols = start + tl.arange(0, BLOCK)
                    sums = _load(partial_row + cols, cols < WIDTH) + tl.sum(dy * x * rstd, axis=0)
                    tl.store(partial_row + cols, sums, mask=cols < WIDTH)
                else:
                    dweight += dy * (x * rstd)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if partial_ptr is not None and BLOCK >= WIDTH:
        cols = tl.arange(0, BLOCK)
        tl.store(partial_row + cols, tl.sum(dweight, axis=0), mask=cols < WIDTH)


@triton.jit(do_not_specialize=["programs"])
def _weight_grad_kernel(
    partial_ptr: tl.tensor, dweight_ptr: tl.tensor, programs: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACCUMULATE: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """Write to dweight (=, or += where ACCUMULATE) the sum of the programs' parts, for BLOCK columns."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for start in range(0, programs, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        mask = (row < programs) & (cols < WIDTH)[None, :]
        sums += _load(partial_ptr + row * WIDTH + cols[None, :], mask)
    dweight = tl.sum(sums, axis=0)
    if ACCUMULATE:
        dweight += _load(dweight_ptr + cols, cols < WIDTH)
    tl.store(dweight_ptr + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=cols < WIDTH)
