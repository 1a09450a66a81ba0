"""The kernels of `decode_attention`, and how they are launched; what they compute and move is written there.

Legend: a program handles ROWS query heads (those of one key-value head, padded to the 16 that tensor cores want) and
BLOCK tokens at a time. Scores are in base 2: scale holds log2(e).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._launch import Kernel, multiprocessors, power_of_2


@triton.jit
def _rotated(
    pointer: tl.tensor, mask: tl.tensor, dim: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The elements at `pointer + dim`, the first ROTARY of them turned by the angles; in fp32."""
    x = tl.load(pointer + dim, mask=mask, other=0.0).to(tl.float32)
    if ROTARY > 0:
        half: tl.constexpr = ROTARY // 2
        turned = dim < ROTARY
        if INTERLEAVED:
            partner, angle, first = dim ^ 1, dim // 2, dim % 2 == 0
        else:
            partner, angle, first = tl.where(dim < half, dim + half, dim - half), dim % half, dim < half
        other = tl.load(pointer + partner, mask=mask & turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0).to(tl.float32)
        x = x * cos + tl.where(first, -other, other) * sin
    return x


@triton.jit
def _place(
    token: tl.tensor, mask: tl.tensor, request: tl.tensor, pages_ptr: tl.tensor, PAGE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Where tokens of a request lie: request or page, and the place in it; 64 bits, since caches are large."""
    place = token.to(tl.int64)
    block = request
    if PAGE > 0:
        block = tl.load(pages_ptr + token // PAGE, mask=mask, other=0).to(tl.int64)
        place = place % PAGE
    return block, place


@triton.jit
def _share(
    cached: tl.tensor, split: tl.tensor,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, APPEND: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """First and end of the cached tokens of a split: equal numbers of whole blocks, the last ones fewer."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(cached + APPEND - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(cached - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * share
    return begin, tl.minimum(begin + share, cached)


@triton.jit(do_not_specialize=["capacity", "table_stride", "angle_stride"])
def _split_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, new_k_ptr: tl.tensor, new_v_ptr: tl.tensor,
    length_ptr: tl.tensor, table_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    out_ptr: tl.tensor, lse_ptr: tl.tensor,
    q_stride: tl.tensor, q_head: tl.tensor,
    k_stride: tl.tensor, k_token: tl.tensor, k_head: tl.tensor,
    v_stride: tl.tensor, v_token: tl.tensor, v_head: tl.tensor,
    new_k_stride: tl.tensor, new_k_head: tl.tensor, new_v_stride: tl.tensor, new_v_head: tl.tensor,
    capacity: tl.tensor, table_stride: tl.tensor, angle_stride: tl.tensor, scale: tl.tensor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, APPEND: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)  # neighbours take the heads of the same tokens, which lie side by side
    head = program % KV_HEADS
    split = (program // KV_HEADS) % SPLITS
    request = (program // (KV_HEADS * SPLITS)).to(tl.int64)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_BLOCK)
    in_head = dim < DIM

    given = tl.load(length_ptr + request).to(tl.int32)
    begin, end = _share(tl.minimum(tl.maximum(given, 0), capacity), split, BLOCK, SPLITS, WINDOW, APPEND)

    angles = tl.maximum(given + APPEND - 1, 0).to(tl.int64) * angle_stride
    in_group = (row[:, None] < GROUP) & in_head[None, :]
    query_ptr = q_ptr + request * q_stride + (head * GROUP + row[:, None]) * q_head
    q = _rotated(
        query_ptr, in_group, dim[None, :], cos_ptr + angles, sin_ptr + angles, ROTARY, INTERLEAVED
    ).to(k_ptr.dtype.element_ty)  # fmt: skip

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    if APPEND:  # the first split starts from the new token, out of registers, and puts it into the cache
        mine = split == 0
        new_k = _rotated(
            new_k_ptr + request * new_k_stride + head * new_k_head, in_head, dim,
            cos_ptr + angles, sin_ptr + angles, ROTARY, INTERLEAVED,
        ).to(k_ptr.dtype.element_ty)  # fmt: skip
        new_v = tl.load(new_v_ptr + request * new_v_stride + head * new_v_head + dim, mask=in_head, other=0.0)
        fits = mine & (given >= 0) & (given < capacity)
        home, slot = _place(given, fits, request, table_ptr + request * table_stride, PAGE)
        tl.store(k_ptr + home * k_stride + slot * k_token + head * k_head + dim, new_k, mask=in_head & fits)
        tl.store(v_ptr + home * v_stride + slot * v_token + head * v_head + dim, new_v, mask=in_head & fits)
        score_of_new = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
        highest = tl.where(mine, score_of_new, highest)
        total = tl.where(mine, 1.0, total)
        mixed = tl.where(mine, new_v.to(tl.float32)[None, :], mixed)

    for start in tl.range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        valid = token < end
        block, place = _place(token, valid, request, table_ptr + request * table_stride, PAGE)
        mask = valid[:, None] & in_head[None, :]
        k_rows = k_ptr + (block * k_stride + place * k_token + head * k_head)[:, None]
        k = tl.load(k_rows + dim[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(valid[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(highest - higher)
        v_rows = v_ptr + (block * v_stride + place * v_token + head * v_head)[:, None]
        v = tl.load(v_rows + dim[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        mixed = tl.dot(weight.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        highest = higher

    result = mixed / tl.where(total > 0.0, total, 1.0)[:, None]  # nothing to attend to gives 0
    line = (request * SPLITS + split) * (KV_HEADS * GROUP) + head * GROUP + row  # of (batch, splits, heads)
    tl.store(out_ptr + line[:, None] * DIM + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=in_group)
    if SPLITS > 1:
        tl.store(lse_ptr + line, highest + tl.log2(total), mask=row < GROUP)


@triton.jit
def _join_kernel(
    part_ptr: tl.tensor, lse_ptr: tl.tensor, out_ptr: tl.tensor,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """One query head of one request: the mean of its parts, weighted by 2^lse."""
    program = tl.program_id(0).to(tl.int64)
    first = (program // HEADS) * SPLITS * HEADS + program % HEADS
    dim = tl.arange(0, DIM_BLOCK)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    mixed = tl.zeros([DIM_BLOCK], tl.float32)
    for start in tl.range(0, SPLITS, CHUNK):
        split = start + tl.arange(0, CHUNK)
        line = first + split * HEADS
        lse = tl.load(lse_ptr + line, mask=split < SPLITS, other=float("-inf"))
        mask = (split < SPLITS)[:, None] & (dim < DIM)[None, :]
        part = tl.load(part_ptr + line[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # so far nothing but empty splits
        weight = tl.exp2(lse - base)
        shrink = tl.exp2(highest - base)
        mixed = mixed * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        highest = higher
    result = mixed / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + program * DIM + dim, result.to(out_ptr.dtype.element_ty), mask=dim < DIM)


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched.

    Attributes:
        splits: Programs that share a request's tokens.
        block: Tokens that a program takes at a time, a power of two of at least 16.
        warps: Warps of a program.
        stages: Blocks of keys and values on their way at once.
    """

    splits: int
    block: int
    warps: int = 4
    stages: int = 3

    @functools.cached_property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """As `Kernel.launch` takes them."""
        return (("num_warps", self.warps), ("num_stages", self.stages))

    @functools.cached_property
    def paged_options(self) -> tuple[tuple[str, Any], ...]:
        """Likewise for a paged cache: Triton counts the stages of the table's entries and of what they lead to alike.

        With 3 of them it has one block of keys on its way behind an entry, as with 2 where there is no table.
        """
        return (("num_warps", self.warps), ("num_stages", 2 * self.stages - 1))


@functools.cache
def default_launch(pairs: int, tokens: int, dim: int, itemsize: int, processors: int) -> Launch:
    """The splits that end first when two programs run on each multiprocessor.

    Args:
        pairs: Requests times key-value heads.
        tokens: Most tokens of a request.
        dim: Elements of a head.
        itemsize: Bytes of an element.
        processors: Multiprocessors of the GPU.
    """
    row = triton.next_power_of_2(dim) * itemsize
    block = min(64, max(16, 16384 // row))  # 16 KiB of keys and as many of values, three times over, twice an SM
    most = min(256, max(1, tokens // (2 * block)))

    def cost(splits: int) -> float:
        """Tokens' time: waves of equal programs, each with a start-up; then the join reads a part a split."""
        waves = math.ceil(pairs * splits / (2 * processors))
        return waves * (math.ceil(tokens / splits / block) * block + 2 * block) + splits * (splits > 1)

    return Launch(min(range(1, most + 1), key=cost), block)


_split = Kernel(_split_kernel)
_join = Kernel(_join_kernel)


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding: tables (positions, rotary / 2) of cosines and sines, and which elements make a pair."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def launch_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    new: tuple[Tensor, Tensor] | None,
    page_table: Tensor | None,
    rotation: Rotation | None,
    window: int | None,
    scale: float,
    launch: Launch | None = None,
) -> Tensor:
    """Run the kernels; arguments as for `decode_attention`."""
    batch, heads, dim = q.shape
    kv_heads, page = k_cache.shape[2], k_cache.shape[1]
    capacity = page if page_table is None else page * page_table.shape[1]
    tokens = capacity if window is None else min(capacity, window)
    if launch is None:
        launch = default_launch(batch * kv_heads, tokens, dim, q.element_size(), multiprocessors(q.get_device()))
    out = q.new_empty(batch, heads, dim)
    part, lse = out, None
    if launch.splits > 1:
        part = q.new_empty(batch, launch.splits, heads, dim, dtype=torch.float32)
        lse = q.new_empty(batch, launch.splits, heads, dtype=torch.float32)
    new_k, new_v = new or (None, None)
    table = lengths if page_table is None else page_table  # stands there unread
    angles = (q, q) if rotation is None else (rotation.cos, rotation.sin)  # likewise
    strides = (0, 0, 0, 0) if new is None else (*new[0].stride()[:2], *new[1].stride()[:2])
    width = power_of_2(dim)
    _split.launch(
        batch * kv_heads * launch.splits,
        (q, k_cache, v_cache, new_k, new_v, lengths, table, *angles, part, lse),
        (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *strides),
        (
            capacity,
            0 if page_table is None else page_table.stride(0),
            0 if rotation is None else rotation.cos.stride(0),
        ),
        (scale * math.log2(math.e),),
        (
            kv_heads,
            heads // kv_heads,
            dim,
            max(16, width),
            max(16, power_of_2(heads // kv_heads)),
            launch.block,
            launch.splits,
            0 if page_table is None else page,
            window or 0,
            int(new is not None),
            0 if rotation is None else 2 * rotation.cos.shape[1],
            rotation is not None and rotation.interleaved,
        ),
        launch.options if page_table is None else launch.paged_options,
    )
    if lse is not None:
        constants = (heads, dim, width, launch.splits, min(32, power_of_2(launch.splits)))
        _join.launch(batch * heads, (part, lse, out), (), (), (), constants, (("num_warps", 4),))
    return out
