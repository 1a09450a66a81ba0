"""Attention in tiles, backward: the scores of a tile come back from q, k and each row's log-sum-exp (`_flash`).

With p = exp(q kᵀ · scale - lse), do the gradient of the output and dlse that of the log-sum-exp:

    delta = rowsum(do · out) - dlse        ds = p · (do vᵀ - delta)
    dv = pᵀ do        dk = dsᵀ q · scale        dq = ds k · scale

Two kernels, each owning what it writes, so that nothing is added up in memory by several programs: the same inputs
give the same bits. In the first a tile of queries walks over its keys, for dq and delta; in the second a tile of keys
of one key head walks over its queries, of all the query heads that share it, for dk and dv. The price is that the
scores come back twice: 7 products of the size of the forward's 2, where atomic additions would need 5.

FLOPs: 14 · d for each visible pair, of which 10 · d count as useful. Memory: dq, dk, dv, and 4 bytes a query and head
for delta.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._flash import (
    LOG2_E,
    Launch,
    Problem,
    gpu,
    key_range,
    load_tile,
    sequence_span,
    shape_of,
    shrunk,
    store_tile,
    strides_of,
    visible_pairs,
    width_class,
)
from composer_kernels._launch import Kernel


@triton.jit(do_not_specialize=["heads", "blocks", "queries", "keys", "window", "lse_batch", "lse_head"])
def _dq_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, out_ptr: tl.tensor, dout_ptr: tl.tensor, lse_ptr: tl.tensor,
    dlse_ptr: tl.tensor, dq_ptr: tl.tensor, delta_ptr: tl.tensor, q_starts_ptr: tl.tensor, k_starts_ptr: tl.tensor,
    q_batch: tl.tensor, q_row: tl.tensor, q_head: tl.tensor, k_batch: tl.tensor, k_row: tl.tensor, k_head: tl.tensor,
    v_batch: tl.tensor, v_row: tl.tensor, v_head: tl.tensor, o_batch: tl.tensor, o_row: tl.tensor, o_head: tl.tensor,
    do_batch: tl.tensor, do_row: tl.tensor, do_head: tl.tensor,
    dq_batch: tl.tensor, dq_row: tl.tensor, dq_head: tl.tensor,
    heads: tl.tensor, blocks: tl.tensor, queries: tl.tensor, keys: tl.tensor, window: tl.tensor,
    lse_batch: tl.tensor, lse_head: tl.tensor, scale: tl.tensor, scale_log2: tl.tensor,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    head = (program // blocks % heads).to(tl.int64)
    batch = (program // blocks // heads).to(tl.int64)
    first_row = block * ROWS
    q_start, queries = sequence_span(q_starts_ptr, batch, queries, PACKED)
    k_start, keys = sequence_span(k_starts_ptr, batch, keys, PACKED)
    if first_row >= queries:
        return
    rows = first_row + tl.arange(0, ROWS)
    q_base = q_ptr + batch * q_batch + q_start * q_row + head * q_head
    o_base = out_ptr + batch * o_batch + q_start * o_row + head * o_head
    do_base = dout_ptr + batch * do_batch + q_start * do_row + head * do_head
    k_base = k_ptr + batch * k_batch + k_start * k_row + head // GROUP * k_head
    v_base = v_ptr + batch * v_batch + k_start * v_row + head // GROUP * v_head
    statistics = batch * lse_batch + head * lse_head + q_start + rows
    q = load_tile(q_base, first_row, q_row, queries, ROWS, DIM, WIDTH)
    dout = load_tile(do_base, first_row, do_row, queries, ROWS, DIM, WIDTH)
    out = load_tile(o_base, first_row, o_row, queries, ROWS, DIM, WIDTH)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + statistics, mask=rows < queries, other=0.0)
    tl.store(delta_ptr + statistics, delta, mask=rows < queries)
    lse = tl.load(lse_ptr + statistics, mask=rows < queries, other=0.0) * 1.4426950408889634
    begin, end, all_begin, all_end = key_range(first_row, queries, keys, window, ROWS, CAUSAL, WINDOWED)
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in tl.range(begin, end, COLUMNS):
        k = load_tile(k_base, first, k_row, keys, COLUMNS, DIM, WIDTH)
        v = load_tile(v_base, first, v_row, keys, COLUMNS, DIM, WIDTH)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
        if (first < all_begin) | (first + COLUMNS > all_end):
            cols = first + tl.arange(0, COLUMNS)
            visible = visible_pairs(rows[:, None], cols[None, :], queries, keys, window, CAUSAL, WINDOWED)
            p = tl.where(visible, p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq_base = dq_ptr + batch * dq_batch + q_start * dq_row + head * dq_head
    store_tile(dq_base, dq * scale, first_row, dq_row, queries, ROWS, DIM, WIDTH)


@triton.jit
def _query_range(
    first_col: tl.tensor, queries: tl.tensor, keys: tl.tensor, window: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """The queries that see some key of a tile, [begin, end), and those that see all of them; see `key_range`."""
    row = first_col + queries - keys
    last_row = tl.minimum(first_col + COLUMNS, keys) - 1 + queries - keys
    begin, all_begin, end, all_end = 0, 0, queries, queries
    if CAUSAL:
        begin = tl.maximum(row, 0)
        all_begin = last_row
    if WINDOWED:
        end = tl.minimum(queries, tl.maximum(last_row + window + 1, 0))
        all_end = tl.minimum(queries, row + window + 1)
    return begin, end, all_begin, all_end


@triton.jit(do_not_specialize=["heads", "blocks", "queries", "keys", "window", "lse_batch", "lse_head"])
def _dkdv_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, dout_ptr: tl.tensor, lse_ptr: tl.tensor,
    delta_ptr: tl.tensor, dk_ptr: tl.tensor, dv_ptr: tl.tensor, q_starts_ptr: tl.tensor, k_starts_ptr: tl.tensor,
    q_batch: tl.tensor, q_row: tl.tensor, q_head: tl.tensor, k_batch: tl.tensor, k_row: tl.tensor, k_head: tl.tensor,
    v_batch: tl.tensor, v_row: tl.tensor, v_head: tl.tensor,
    do_batch: tl.tensor, do_row: tl.tensor, do_head: tl.tensor,
    dk_batch: tl.tensor, dk_row: tl.tensor, dk_head: tl.tensor,
    dv_batch: tl.tensor, dv_row: tl.tensor, dv_head: tl.tensor,
    heads: tl.tensor, blocks: tl.tensor, queries: tl.tensor, keys: tl.tensor, window: tl.tensor,
    lse_batch: tl.tensor, lse_head: tl.tensor, scale: tl.tensor, scale_log2: tl.tensor,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    block = program % blocks  # causal tiles with most queries first
    key_heads = heads // GROUP
    key_head = (program // blocks % key_heads).to(tl.int64)
    batch = (program // blocks // key_heads).to(tl.int64)
    first_col = block * COLUMNS
    q_start, queries = sequence_span(q_starts_ptr, batch, queries, PACKED)
    k_start, keys = sequence_span(k_starts_ptr, batch, keys, PACKED)
    if first_col >= keys:
        return
    cols = first_col + tl.arange(0, COLUMNS)
    k_base = k_ptr + batch * k_batch + k_start * k_row + key_head * k_head
    v_base = v_ptr + batch * v_batch + k_start * v_row + key_head * v_head
    q_base = q_ptr + batch * q_batch + q_start * q_row + key_head * GROUP * q_head
    do_base = dout_ptr + batch * do_batch + q_start * do_row + key_head * GROUP * do_head
    statistics = batch * lse_batch + key_head * GROUP * lse_head + q_start
    k = load_tile(k_base, first_col, k_row, keys, COLUMNS, DIM, WIDTH)
    v = load_tile(v_base, first_col, v_row, keys, COLUMNS, DIM, WIDTH)
    begin, end, all_begin, all_end = _query_range(first_col, queries, keys, window, ROWS, COLUMNS, CAUSAL, WINDOWED)
    steps = tl.cdiv(tl.maximum(end - begin, 0), ROWS)
    dk = tl.zeros((COLUMNS, WIDTH), tl.float32)
    dv = tl.zeros((COLUMNS, WIDTH), tl.float32)
    for step in tl.range(0, steps * GROUP):  # one walk over the rows of all heads keeps the pipeline full
        head = tl.cast(step // steps, tl.int64)
        first = begin + step % steps * ROWS
        rows = first + tl.arange(0, ROWS)
        q = load_tile(q_base + head * q_head, first, q_row, queries, ROWS, DIM, WIDTH)
        dout = load_tile(do_base + head * do_head, first, do_row, queries, ROWS, DIM, WIDTH)
        at = statistics + head * lse_head + first  # a scalar, so that the many addresses differ by constants
        lse = tl.load(lse_ptr + at + tl.arange(0, ROWS), mask=rows < queries, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_ptr + at + tl.arange(0, ROWS), mask=rows < queries, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :])
        if (first < all_begin) | (first + ROWS > all_end):
            visible = visible_pairs(rows[None, :], cols[:, None], queries, keys, window, CAUSAL, WINDOWED)
            p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk_base = dk_ptr + batch * dk_batch + k_start * dk_row + key_head * dk_head
    dv_base = dv_ptr + batch * dv_batch + k_start * dv_row + key_head * dv_head
    store_tile(dk_base, dk * scale, first_col, dk_row, keys, COLUMNS, DIM, WIDTH)
    store_tile(dv_base, dv, first_col, dv_row, keys, COLUMNS, DIM, WIDTH)


DQ = {64: Launch(128, 64, 8, 3), 128: Launch(128, 64, 8, 2), 256: Launch(128, 32, 8, 2)}
DQ_AMPERE = {64: Launch(128, 64, 8, 3), 128: Launch(64, 64, 8, 2), 256: Launch(64, 32, 8, 2)}
DQ_FP32 = {64: Launch(32, 16, 8, 1), 128: Launch(16, 16, 8, 1), 256: Launch(16, 16, 8, 1)}
DKDV = {64: Launch(64, 128, 8, 2), 128: Launch(64, 128, 8, 2), 256: Launch(32, 64, 8, 2)}
DKDV_AMPERE = {64: Launch(32, 128, 8, 2), 128: Launch(64, 64, 8, 2), 256: Launch(16, 64, 8, 2)}
DKDV_FP32 = {64: Launch(16, 32, 8, 1), 128: Launch(16, 16, 8, 1), 256: Launch(16, 16, 8, 1)}
"""As `composer_kernels._flash.FORWARD`; those called AMPERE are for compute capability 8."""


@functools.cache
def dq_launch(dim: int, itemsize: int, device: int) -> Launch:
    """By head dimension, bytes of an element and device."""
    major, shared = gpu(device)
    width = width_class(dim)
    launch = (DQ_FP32 if itemsize == 4 else DQ_AMPERE if major == 8 else DQ)[width]
    return shrunk(launch, shared, 2 * width * itemsize, 2 * width * itemsize)


@functools.cache
def dkdv_launch(dim: int, itemsize: int, device: int) -> Launch:
    """By head dimension, bytes of an element and device."""
    major, shared = gpu(device)
    width = width_class(dim)
    launch = (DKDV_FP32 if itemsize == 4 else DKDV_AMPERE if major == 8 else DKDV)[width]
    turned = replace(launch, rows=launch.columns, columns=launch.rows)  # here the queries walk
    turned = shrunk(turned, shared, 2 * width * itemsize, 2 * width * itemsize)
    return replace(turned, rows=turned.columns, columns=turned.rows)


_dq = Kernel(_dq_kernel)
_dkdv = Kernel(_dkdv_kernel)


def launch_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    problem: Problem,
    launches: tuple[Launch, Launch] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run both kernels.

    Args:
        dout: Like the output.
        dlse: Like `lse`, contiguous, or None for zeros.
        q: As in `launch_forward`, and so the others down to `problem`.
        k: Keys.
        v: Values.
        out: What `launch_forward` returned.
        lse: Likewise.
        q_starts: First rows of packed sequences.
        k_starts: Likewise.
        problem: What was computed.
        launches: How, for dq and for dk and dv, instead of `dq_launch` and `dkdv_launch`.

    Returns:
        dq, dk and dv, with the shapes of q, k and v and their strides where these leave no gaps.
    """
    shape = shape_of(q, k, q_starts, problem)
    kind = shape.dim, q.element_size(), q.get_device()
    first, second = launches or (dq_launch(*kind), dkdv_launch(*kind))
    dq, dk, dv, delta = (torch.empty_like(tensor) for tensor in (q, k, v, lse))
    scales = (problem.scale, problem.scale * LOG2_E)
    variant = (
        shape.group, shape.dim, shape.width, problem.causal, problem.window is not None, q_starts is not None,
    )  # fmt: skip
    blocks = -(-shape.queries // first.rows)
    _dq.launch(
        blocks * shape.heads * shape.batch,
        (q, k, v, out, dout, lse, dlse, dq, delta, q_starts, k_starts),
        tuple(stride for tensor in (q, k, v, out, dout, dq) for stride in strides_of(tensor)),
        (shape.heads, blocks, shape.queries, shape.keys, problem.window or 0, *shape.lse),
        scales,
        (*variant, first.rows, first.columns),
        first.options,
    )
    blocks = -(-shape.keys // second.columns)
    _dkdv.launch(
        blocks * (shape.heads // shape.group) * shape.batch,
        (q, k, v, dout, lse, delta, dk, dv, q_starts, k_starts),
        tuple(stride for tensor in (q, k, v, dout, dk, dv) for stride in strides_of(tensor)),
        (shape.heads, blocks, shape.queries, shape.keys, problem.window or 0, *shape.lse),
        scales,
        (*variant, second.rows, second.columns),
        second.options,
    )
    return dq, dk, dv
