"""Attention in tiles, forward: softmax(q kᵀ · scale) v with the scores of one tile at a time (arXiv 2307.08691).

A program holds ROWS queries of one head on chip and walks over their keys COLUMNS at a time. It keeps each row's
largest score so far, the sum of the exponentials below it and the weighted sum of values, and rescales both whenever a
larger score turns up. Exponentials are powers of two: scale · log2(e) is one factor. Keys that no row of the tile sees
are skipped; only tiles of keys that some rows see and others do not (on the diagonal, at the window's left edge, at the
end) branch to a mask. That is one loop, not one with and one without: the pipeline of loads then never runs empty
between them, and ptxas does not serialise the matrix products (C7515), as it did with two. `_flash_backward` has the
other direction.

FLOPs: 4 · d for each visible pair of query and key, and one exponential. Bytes: q, k, v read and the output written
once, 4 bytes a row of statistics; k and v come from the L2 cache again for each tile of queries.

Layout: any strides with neighbouring elements of a head side by side. Dense tensors are (b, s, h, d); packed ones
(t, h, d), where sequence i is the rows from starts[i] to starts[i + 1]. Query row i of sq stands at key i + sk - sq.
Query head i reads key and value head i // GROUP.

Offsets of a tile's first element have 64 bits, those inside a tile 32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._launch import Kernel, power_of_2

LOG2_E = math.log2(math.e)


@triton.jit
def sequence_span(
    starts_ptr: tl.tensor, sequence: tl.tensor, length: tl.tensor, PACKED: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """First row (64 bits) and length of a sequence."""
    start = tl.full((), 0, tl.int64)
    if PACKED:
        start = tl.load(starts_ptr + sequence).to(tl.int64)
        length = tl.load(starts_ptr + sequence + 1) - start.to(tl.int32)
    return start, length


@triton.jit
def load_tile(
    base: tl.tensor, first: tl.tensor, stride: tl.tensor, count: tl.tensor,
    HEIGHT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """HEIGHT rows from `first` on, WIDTH elements each; zero from row `count` and element DIM on."""
    rows = tl.arange(0, HEIGHT)[:, None]
    cols = tl.arange(0, WIDTH)[None, :]
    mask = first + rows < count
    if DIM != WIDTH:
        mask &= cols < DIM
    return tl.load(base + tl.cast(first, tl.int64) * stride + rows * stride + cols, mask=mask, other=0.0)


@triton.jit
def store_tile(
    base: tl.tensor, tile: tl.tensor, first: tl.tensor, stride: tl.tensor, count: tl.tensor,
    HEIGHT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """The opposite of `load_tile`."""
    rows = tl.arange(0, HEIGHT)[:, None]
    cols = tl.arange(0, WIDTH)[None, :]
    pointers = base + tl.cast(first, tl.int64) * stride + rows * stride + cols
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(first + rows < count) & (cols < DIM))


@triton.jit
def visible_pairs(
    rows: tl.tensor, cols: tl.tensor, queries: tl.tensor, keys: tl.tensor, window: tl.tensor,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Which of these queries see which of these keys; the two broadcast against each other."""
    visible = (rows < queries) & (cols < keys)
    if CAUSAL:
        visible &= cols <= rows + keys - queries
    if WINDOWED:
        visible &= cols >= rows + keys - queries - window
    return visible


@triton.jit
def key_range(
    first_row: tl.tensor, queries: tl.tensor, keys: tl.tensor, window: tl.tensor,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """The keys that some row of a tile sees, [begin, end), and those that every row sees, [all_begin, all_end)."""
    position = first_row + keys - queries
    last_position = tl.minimum(first_row + ROWS, queries) - 1 + keys - queries
    begin, all_begin, end, all_end = 0, 0, keys, keys
    if CAUSAL:
        end = tl.minimum(keys, tl.maximum(last_position + 1, 0))
        all_end = tl.minimum(keys, position + 1)
    if WINDOWED:
        begin = tl.maximum(position - window, 0)
        all_begin = last_position - window
    return begin, end, all_begin, all_end


@triton.jit(do_not_specialize=["heads", "blocks", "queries", "keys", "window", "lse_batch", "lse_head"])
def _forward_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, out_ptr: tl.tensor, lse_ptr: tl.tensor,
    q_starts_ptr: tl.tensor, k_starts_ptr: tl.tensor,
    q_batch: tl.tensor, q_row: tl.tensor, q_head: tl.tensor, k_batch: tl.tensor, k_row: tl.tensor, k_head: tl.tensor,
    v_batch: tl.tensor, v_row: tl.tensor, v_head: tl.tensor, o_batch: tl.tensor, o_row: tl.tensor, o_head: tl.tensor,
    heads: tl.tensor, blocks: tl.tensor, queries: tl.tensor, keys: tl.tensor, window: tl.tensor,
    lse_batch: tl.tensor, lse_head: tl.tensor, scale: tl.tensor,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks  # causal tiles with most keys first, so that the last ones are short
    head = (program // blocks % heads).to(tl.int64)
    batch = (program // blocks // heads).to(tl.int64)
    first_row = block * ROWS
    q_start, queries = sequence_span(q_starts_ptr, batch, queries, PACKED)
    k_start, keys = sequence_span(k_starts_ptr, batch, keys, PACKED)
    if first_row >= queries:
        return
    q = load_tile(
        q_ptr + batch * q_batch + q_start * q_row + head * q_head,
        first_row, q_row, queries, ROWS, DIM, WIDTH,
    )  # fmt: skip
    k_base = k_ptr + batch * k_batch + k_start * k_row + head // GROUP * k_head
    v_base = v_ptr + batch * v_batch + k_start * v_row + head // GROUP * v_head
    begin, end, all_begin, all_end = key_range(first_row, queries, keys, window, ROWS, CAUSAL, WINDOWED)
    rows = first_row + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    for first in tl.range(begin, end, COLUMNS):
        k = load_tile(k_base, first, k_row, keys, COLUMNS, DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if (first < all_begin) | (first + COLUMNS > all_end):
            cols = first + tl.arange(0, COLUMNS)
            visible = visible_pairs(rows[:, None], cols[None, :], queries, keys, window, CAUSAL, WINDOWED)
            scores = tl.where(visible, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        # A row that has seen no key yet stays at minus infinity, and that minus itself is not a number.
        level = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores * scale - level[:, None])
        shrink = tl.exp2(peak - level)
        v = load_tile(v_base, first, v_row, keys, COLUMNS, DIM, WIDTH)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = higher
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    store_tile(
        out_ptr + batch * o_batch + q_start * o_row + head * o_head,
        out, first_row, o_row, queries, ROWS, DIM, WIDTH,
    )  # fmt: skip
    lse = (peak + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + batch * lse_batch + head * lse_head + q_start + rows, lse, mask=rows < queries)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        rows: Queries of a tile, a power of two from 16.
        columns: Keys of a tile, likewise.
        warps: Warps of a program.
        stages: Tiles of the walk under way at a time.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    @functools.cached_property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """As `Kernel.launch` takes them."""
        return (("num_warps", self.warps), ("num_stages", self.stages))


@functools.cache
def gpu(device: int) -> tuple[int, int]:
    """Major compute capability and bytes of shared memory a program can have; of an H100 under the interpreter (-1)."""
    if device < 0:
        return 9, 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # PyTorch's types lack the second
    return properties.major, properties.shared_memory_per_block_optin


FORWARD = {64: Launch(128, 64, 4, 3), 128: Launch(128, 64, 8, 3), 256: Launch(128, 32, 8, 2)}
FORWARD_FP32 = {64: Launch(32, 32, 8, 1), 128: Launch(32, 16, 8, 1), 256: Launch(16, 16, 8, 1)}
"""By head dimension, the largest that the launch is for. Chosen by what ptxas says of sm_90 (registers, spills, whether
it serialises the matrix products), not by time; `benchmarks/bench_attention.py --tune` times the alternatives."""


def shrunk(launch: Launch, shared: int, resident: int, walking: int) -> Launch:
    """A launch whose tiles fit into the shared memory: fewer stages first, then smaller tiles.

    Args:
        launch: The one for GPUs with enough.
        shared: Bytes there are.
        resident: Bytes a row of the tile of queries needs while the program lives.
        walking: Bytes a row of the tile of keys needs in each stage.
    """
    while launch.rows * resident + launch.columns * walking * launch.stages > shared - 1024:
        if launch.stages > 1:
            launch = replace(launch, stages=launch.stages - 1)
        elif launch.columns > 16:
            launch = replace(launch, columns=launch.columns // 2)
        else:
            launch = replace(launch, rows=launch.rows // 2)
    return launch


def width_class(dim: int) -> int:
    """The entry of a launch table for a head dimension."""
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


@functools.cache
def forward_launch(dim: int, itemsize: int, device: int) -> Launch:
    """By head dimension, bytes of an element and device."""
    width = width_class(dim)
    launch = (FORWARD_FP32 if itemsize == 4 else FORWARD)[width]
    return shrunk(launch, gpu(device)[1], width * itemsize, 2 * width * itemsize)


class Problem(NamedTuple):
    """What the kernels compute, besides the tensors.

    Attributes:
        q_longest: Queries of the longest packed sequence, or more; of dense tensors their own number is taken.
        k_longest: Likewise keys.
        causal: Whether a query sees no key after its own position.
        window: Keys that a query sees before its own position, or None for all.
        scale: Of the scores, positive.
    """

    q_longest: int
    k_longest: int
    causal: bool
    window: int | None
    scale: float


class Shape(NamedTuple):
    """Sizes that all kernels need.

    Attributes:
        batch: Sequences.
        queries: Of the longest sequence.
        keys: Likewise.
        heads: Of the queries.
        group: Query heads that share a head of keys and values.
        dim: Of a head.
        width: Its power of two.
        lse: Strides from sequence to sequence and head to head of what has one number a query and head.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    group: int
    dim: int
    width: int
    lse: tuple[int, int]


def shape_of(q: Tensor, k: Tensor, q_starts: Tensor | None, problem: Problem) -> Shape:
    """Read the sizes off the tensors."""
    heads, dim = q.shape[-2:]
    group = heads // k.shape[-2]
    width = max(16, power_of_2(dim))
    if q_starts is not None:
        batch = q_starts.shape[0] - 1
        return Shape(batch, problem.q_longest, problem.k_longest, heads, group, dim, width, (0, q.shape[0]))
    batch, queries = q.shape[:2]
    return Shape(batch, queries, k.shape[1], heads, group, dim, width, (heads * queries, queries))


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    """From sequence to sequence, row to row and head to head; packed sequences find theirs by their first rows."""
    strides = tensor.stride()[:-1]
    return strides if len(strides) == 3 else (0, *strides)  # type: ignore[return-value]


def empty_statistics(q: Tensor) -> Tensor:
    """One fp32 number a query and head: (b, h, s), or (h, t) for packed tensors."""
    return q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)


_forward = Kernel(_forward_kernel)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    problem: Problem,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        q: (b, sq, h, d) or (t, h, d).
        k: (b, sk, h / GROUP, d) or (t, h / GROUP, d).
        v: Like `k`.
        q_starts: For packed tensors, the first rows of the sequences and the end of the last: (sequences + 1,), int32.
        k_starts: Likewise.
        problem: What to compute.
        launch: How, instead of `forward_launch`.

    Returns:
        The output, with the shape of `q` and its strides where these leave no gaps, and the logarithm of each row's
        sum of exponentials (`empty_statistics`), minus infinity where a query sees no key.
    """
    shape = shape_of(q, k, q_starts, problem)
    launch = launch or forward_launch(shape.dim, q.element_size(), q.get_device())
    out, lse = torch.empty_like(q), empty_statistics(q)
    blocks = -(-shape.queries // launch.rows)
    _forward.launch(
        blocks * shape.heads * shape.batch,
        (q, k, v, out, lse, q_starts, k_starts),
        (*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(out)),
        (shape.heads, blocks, shape.queries, shape.keys, problem.window or 0, *shape.lse),
        (problem.scale * LOG2_E,),
        (
            shape.group, shape.dim, shape.width, problem.causal, problem.window is not None, q_starts is not None,
            launch.rows, launch.columns,
        ),
        launch.options,
    )  # fmt: skip
    return out, lse
