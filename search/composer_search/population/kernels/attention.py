"""Causal attention over short sequences with rotary positions, from the joint projection, forward and backward.

One kernel does what PyTorch needs a dozen for: it adds the projection's bias, turns queries and keys (Su et al., arXiv
2104.09864) and attends, and it reads the projection as a matrix product writes it, [queries | keys | values] of all
heads side by side. The general kernels for attention pad a head to 32 channels or more and a sequence to 128 positions;
a proxy's heads have 8 channels and many of its sequences 32 positions.

With s = scale · q kᵀ over the positions up to each, p = softmax(s) and delta = Σ o · do:

    o = p v        dv = pᵀ do        ds = p · (do vᵀ - delta)        dq = scale · ds k        dk = scale · dsᵀ q

Bytes for a token of H channels of 16 bits: forward reads 3H and writes H numbers, 8H bytes; backward reads 5H and
writes 3H, 16H bytes. Backward computes p again from the sums of the softmax, of which there is one a token and head.

A program handles BLOCK positions of one head of one sequence. Backward they are keys first, whose queries it goes
through, then queries, whose keys it goes through; where BLOCK is all of the sequence, one pass does for both. No two
programs add to the same number: the same inputs give the same bits.

Legend: WIDTH, channels of a head, and WIDE, the power of two that holds them; `joint` [sequences, length, 3, HEADS,
WIDTH]; `bias` [rows, 3, HEADS, WIDTH]; `cosine` and `sine` [length, WIDTH], the sine negative at even channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 256
"""Positions up to which these kernels are meant; beyond, the general kernels' padding costs little."""

WIDEST = 32
"""Channels of a head likewise; also, a program's registers hold no more."""

_LOG2E = 1.4426950408889634


@triton.jit
def _swap(x: tl.tensor, ROWS: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Return x [ROWS, WIDE] with each pair of channels swapped."""
    even, odd = tl.split(tl.reshape(x, (ROWS, WIDE // 2, 2)))
    return tl.reshape(tl.join(odd, even), (ROWS, WIDE))


@triton.jit
def _load(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, position: tl.tensor, length: tl.tensor,
    PART: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One part (0 queries, 1 keys, 2 values) of a head at these positions, bias added; 0 beyond the head's channels."""
    channel = tl.arange(0, WIDE)
    inside = channel < WIDTH
    start = PART * HEADS * WIDTH + channel
    mask = (position < length)[:, None] & inside[None, :]
    x = tl.load(joint_ptr + position[:, None] * (3 * HEADS * WIDTH) + start[None, :], mask=mask, other=0.0)
    bias = tl.load(bias_ptr + start, mask=inside, other=0.0)
    return (x.to(tl.float32) + bias[None, :]).to(joint_ptr.dtype.element_ty)


@triton.jit
def _angles(
    cosine_ptr: tl.tensor, sine_ptr: tl.tensor, position: tl.tensor, length: tl.tensor,
    WIDTH: tl.constexpr, WIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Cosines and signed sines at these positions."""
    channel = tl.arange(0, WIDE)
    mask = (position < length)[:, None] & (channel < WIDTH)[None, :]
    offset = position[:, None] * WIDTH + channel[None, :]
    return tl.load(cosine_ptr + offset, mask=mask, other=0.0), tl.load(sine_ptr + offset, mask=mask, other=0.0)


@triton.jit
def _turn(x: tl.tensor, cosine: tl.tensor, sine: tl.tensor, ROWS: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Turn x by the angles, or back where `sine` is negated; computed in fp32."""
    x = x.to(tl.float32)
    return x * cosine + _swap(x, ROWS, WIDE) * sine


@triton.jit
def _forward_kernel(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, cosine_ptr: tl.tensor, sine_ptr: tl.tensor,
    mixed_ptr: tl.tensor, sums_ptr: tl.tensor, length: tl.tensor, per_row: tl.tensor, scale: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(0) % HEADS
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    joint_ptr += sequence * length * (3 * HEADS * WIDTH) + head * WIDTH
    bias_ptr += (sequence // per_row) * (3 * HEADS * WIDTH) + head * WIDTH
    dtype = joint_ptr.dtype.element_ty
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cosine, sine = _angles(cosine_ptr, sine_ptr, query, length, WIDTH, WIDE)
    q = _load(joint_ptr, bias_ptr, query, length, 0, HEADS, WIDTH, WIDE)
    q = _turn(q, cosine, sine, BLOCK, WIDE).to(dtype)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, WIDE], tl.float32)
    for start in range(0, (tl.program_id(1) + 1) * BLOCK, BLOCK):
        key = start + tl.arange(0, BLOCK)
        cosine, sine = _angles(cosine_ptr, sine_ptr, key, length, WIDTH, WIDE)
        k = _load(joint_ptr, bias_ptr, key, length, 1, HEADS, WIDTH, WIDE)
        k = _turn(k, cosine, sine, BLOCK, WIDE).to(dtype)
        v = _load(joint_ptr, bias_ptr, key, length, 2, HEADS, WIDTH, WIDE)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        score = tl.where(query[:, None] >= key[None, :], score, float("-inf"))
        larger = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - larger[:, None])
        shrink = tl.exp2(most - larger)
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(dtype), v, input_precision=PRECISION)
        most = larger
    channel = tl.arange(0, WIDE)
    here = query < length
    token = sequence * length + query
    mask = here[:, None] & (channel < WIDTH)[None, :]
    offset = token[:, None] * (HEADS * WIDTH) + head * WIDTH + channel[None, :]
    tl.store(mixed_ptr + offset, (mixed / total[:, None]).to(dtype), mask=mask)
    tl.store(sums_ptr + token * HEADS + head, most + tl.log2(total), mask=here)


@triton.jit
def _queries(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, cosine_ptr: tl.tensor, sine_ptr: tl.tensor, mixed_ptr: tl.tensor,
    dmixed_ptr: tl.tensor, sums_ptr: tl.tensor, query: tl.tensor, length: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """What backward needs of queries: themselves, turned; the output's gradient, its delta, and the softmax's sums."""
    cosine, sine = _angles(cosine_ptr, sine_ptr, query, length, WIDTH, WIDE)
    q = _load(joint_ptr, bias_ptr, query, length, 0, HEADS, WIDTH, WIDE)
    q = _turn(q, cosine, sine, BLOCK, WIDE).to(joint_ptr.dtype.element_ty)
    channel = tl.arange(0, WIDE)
    mask = (query < length)[:, None] & (channel < WIDTH)[None, :]
    offset = query[:, None] * (HEADS * WIDTH) + channel[None, :]
    dmixed = tl.load(dmixed_ptr + offset, mask=mask, other=0.0)
    mixed = tl.load(mixed_ptr + offset, mask=mask, other=0.0)
    delta = tl.sum(mixed.to(tl.float32) * dmixed.to(tl.float32), 1)
    # a query beyond the end has a gradient of 0 and a sum that makes its weights 0 as well
    sums = tl.load(sums_ptr + query * HEADS, mask=query < length, other=float("inf"))
    return q, dmixed, delta, sums


@triton.jit
def _keys(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, cosine_ptr: tl.tensor, sine_ptr: tl.tensor, key: tl.tensor,
    length: tl.tensor, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Keys, turned, and values."""
    cosine, sine = _angles(cosine_ptr, sine_ptr, key, length, WIDTH, WIDE)
    k = _load(joint_ptr, bias_ptr, key, length, 1, HEADS, WIDTH, WIDE)
    k = _turn(k, cosine, sine, BLOCK, WIDE).to(joint_ptr.dtype.element_ty)
    return k, _load(joint_ptr, bias_ptr, key, length, 2, HEADS, WIDTH, WIDE)


@triton.jit
def _weights(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, dmixed: tl.tensor, delta: tl.tensor, sums: tl.tensor, query: tl.tensor,
    key: tl.tensor, scale: tl.tensor, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return p and ds of one tile, [queries, keys]."""
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    weight = tl.where(query[:, None] >= key[None, :], tl.exp2(score - sums[:, None]), 0.0)
    dweight = tl.dot(dmixed, tl.trans(v), input_precision=PRECISION)
    return weight.to(q.dtype), (weight * (dweight - delta[:, None])).to(q.dtype)


@triton.jit
def _store(
    out_ptr: tl.tensor, sum_ptr: tl.tensor, x: tl.tensor, position: tl.tensor, length: tl.tensor,
    PART: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """Write a part of the gradient, and its sum over these positions, of which those beyond the end are 0."""
    channel = tl.arange(0, WIDE)
    tl.store(sum_ptr + PART * HEADS * WIDTH + channel, tl.sum(x, 0), mask=channel < WIDTH)
    mask = (position < length)[:, None] & (channel < WIDTH)[None, :]
    offset = position[:, None] * (3 * HEADS * WIDTH) + PART * HEADS * WIDTH + channel[None, :]
    tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    joint_ptr: tl.tensor, bias_ptr: tl.tensor, cosine_ptr: tl.tensor, sine_ptr: tl.tensor, mixed_ptr: tl.tensor,
    dmixed_ptr: tl.tensor, sums_ptr: tl.tensor, djoint_ptr: tl.tensor, dbias_ptr: tl.tensor, length: tl.tensor,
    per_row: tl.tensor, scale: tl.tensor, root: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(0) % HEADS
    sequence = (tl.program_id(0) // HEADS).to(tl.int64)
    joint_ptr += sequence * length * (3 * HEADS * WIDTH) + head * WIDTH
    djoint_ptr += sequence * length * (3 * HEADS * WIDTH) + head * WIDTH
    bias_ptr += (sequence // per_row) * (3 * HEADS * WIDTH) + head * WIDTH
    dbias_ptr += (sequence * tl.num_programs(1) + tl.program_id(1)) * (3 * HEADS * WIDTH) + head * WIDTH
    mixed_ptr += sequence * length * (HEADS * WIDTH) + head * WIDTH
    dmixed_ptr += sequence * length * (HEADS * WIDTH) + head * WIDTH
    sums_ptr += sequence * length * HEADS + head
    here = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k, v = _keys(joint_ptr, bias_ptr, cosine_ptr, sine_ptr, here, length, HEADS, WIDTH, WIDE, BLOCK)
    dq = tl.zeros([BLOCK, WIDE], tl.float32)
    dk = tl.zeros([BLOCK, WIDE], tl.float32)
    dv = tl.zeros([BLOCK, WIDE], tl.float32)
    for start in range(tl.program_id(1) * BLOCK, length, BLOCK):
        query = start + tl.arange(0, BLOCK)
        q, dmixed, delta, sums = _queries(
            joint_ptr, bias_ptr, cosine_ptr, sine_ptr, mixed_ptr, dmixed_ptr, sums_ptr, query, length,
            HEADS, WIDTH, WIDE, BLOCK,
        )  # fmt: skip
        p, ds = _weights(q, k, v, dmixed, delta, sums, query, here, scale, PRECISION)
        dv += tl.dot(tl.trans(p), dmixed, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        if WHOLE:
            dq = tl.dot(ds, k, input_precision=PRECISION)
    if not WHOLE:
        q, dmixed, delta, sums = _queries(
            joint_ptr, bias_ptr, cosine_ptr, sine_ptr, mixed_ptr, dmixed_ptr, sums_ptr, here, length,
            HEADS, WIDTH, WIDE, BLOCK,
        )  # fmt: skip
        for start in range(0, (tl.program_id(1) + 1) * BLOCK, BLOCK):
            key = start + tl.arange(0, BLOCK)
            k, v = _keys(joint_ptr, bias_ptr, cosine_ptr, sine_ptr, key, length, HEADS, WIDTH, WIDE, BLOCK)
            p, ds = _weights(q, k, v, dmixed, delta, sums, here, key, scale, PRECISION)
            dq += tl.dot(ds, k, input_precision=PRECISION)
    cosine, sine = _angles(cosine_ptr, sine_ptr, here, length, WIDTH, WIDE)
    dq = _turn(dq * root, cosine, -sine, BLOCK, WIDE)
    dk = _turn(dk * root, cosine, -sine, BLOCK, WIDE)
    _store(djoint_ptr, dbias_ptr, dq, here, length, 0, HEADS, WIDTH, WIDE)
    _store(djoint_ptr, dbias_ptr, dk, here, length, 1, HEADS, WIDTH, WIDE)
    _store(djoint_ptr, dbias_ptr, dv, here, length, 2, HEADS, WIDTH, WIDE)


def tables(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [length, width] from `composer_search.candidate.rotation`'s [length, width / 2]."""
    cosine = turns.real.repeat_interleave(2, dim=-1).contiguous()
    sine = torch.stack([-turns.imag, turns.imag], dim=-1).flatten(-2).contiguous()
    return cosine, sine


class Launch(NamedTuple):
    """Positions and warps of a program."""

    positions: int
    warps: int


def default_launch(length: int, *, backward: bool) -> Launch:
    """The whole of a short sequence; of a longer one so much that several programs share a multiprocessor.

    As compiled for an H100; backward, tiles of 64 positions and more leave room for two programs and fewer.
    """
    whole = max(16, triton.next_power_of_2(length))
    if backward:
        return Launch(min(whole, 32), 1 if whole <= 32 else 2)
    return Launch(min(whole, 64), 1 if whole <= 32 else 4)


def launch_forward(
    joint: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor, heads: int, precision: str, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """The mixture, and the sums of the softmax [rows, tokens, heads] as logarithms to base 2."""
    length, width = cosine.shape
    rows, tokens, _ = joint.shape
    positions, warps = launch or default_launch(length, backward=False)
    mixed = joint.new_empty(rows, tokens, heads * width)
    sums = torch.empty(rows, tokens, heads, dtype=torch.float32, device=joint.device)
    _forward_kernel[rows * tokens // length * heads, triton.cdiv(length, positions)](
        joint, bias, cosine, sine, mixed, sums, length, tokens // length, width**-0.5 * _LOG2E,
        HEADS=heads, WIDTH=width, WIDE=max(16, triton.next_power_of_2(width)), BLOCK=positions, PRECISION=precision,
        num_warps=warps,
    )  # fmt: skip
    return mixed, sums


def launch_backward(
    joint: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor, mixed: Tensor, dmixed: Tensor, sums: Tensor,
    precision: str, launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of the joint projection and of its bias."""
    length, width = cosine.shape
    rows, tokens, heads = sums.shape
    positions, warps = launch or default_launch(length, backward=True)
    djoint = torch.empty_like(joint)
    blocks = triton.cdiv(length, positions)
    dbias = torch.empty(rows, tokens // length * blocks, joint.shape[2], dtype=torch.float32, device=joint.device)
    _backward_kernel[rows * tokens // length * heads, blocks](
        joint, bias, cosine, sine, mixed, dmixed.contiguous(), sums, djoint, dbias, length, tokens // length,
        width**-0.5 * _LOG2E, width**-0.5,
        HEADS=heads, WIDTH=width, WIDE=max(16, triton.next_power_of_2(width)), BLOCK=positions, WHOLE=blocks == 1,
        PRECISION=precision, num_warps=warps,
    )  # fmt: skip
    return djoint, dbias.sum(1)


class _Attention(torch.autograd.Function):
    """See `rotary_attention`."""

    @staticmethod
    def forward(
        ctx: Any, joint: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor, heads: int, precision: str
    ) -> Tensor:
        mixed, sums = launch_forward(joint, bias, cosine, sine, heads, precision)
        ctx.save_for_backward(joint, bias, cosine, sine, mixed, sums)
        ctx.precision = precision
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joint, bias, cosine, sine, mixed, sums = ctx.saved_tensors
        gradients = launch_backward(joint, bias, cosine, sine, mixed, grads[0], sums, ctx.precision)
        return *gradients, None, None, None, None


def rotary_attention(
    joint: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor, heads: int, *, precision: str = "ieee"
) -> Tensor:
    """Causal attention with rotary positions, from a joint projection without its bias.

    Args:
        joint: [rows, sequences · length, 3 · heads · width], queries, keys and values of all heads; bf16 or fp32.
        bias: [rows, 3 · heads · width], fp32, added first.
        cosine: [length, width], and
        sine: the same, from `tables`.
        heads: Attention heads.
        precision: Of products of fp32: ``ieee`` or ``tf32``.

    Returns:
        [rows, sequences · length, heads · width].
    """
    mixed: Tensor = _Attention.apply(joint, bias, cosine, sine, heads, precision)
    return mixed
