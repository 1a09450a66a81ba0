"""The SwiGLU MLP of each row in one pass over its tokens: both products and the gate between them, in bf16.

    g, u = h Wgᵀ, h Wuᵀ        a = silu(g) · u        y = a Wdᵀ

and backward, with s = σ(g) and g, u and a computed again:

    da = dy Wd        dg = da · u · s · (1 + g · (1 - s))        du = da · g · s        dh = dg Wg + du Wu

A proxy's layers are so narrow that what lies between the products is most of the bytes: with H channels outside and F
inside, forward reads and writes 4H bytes a token instead of 4H + 12F, and nothing of F is kept. Backward writes dg, du
and a, 6F bytes, of which the weights' gradients are matrix products.

A program waits for one product after the other, so that other programs have to fill its multiprocessor meanwhile. Gate
and up projection are one product of twice the width, for which h is read half as often from shared memory.

Legend: a program handles TOKENS tokens of a row and goes through the MLP's channels by CHUNK; `up` [rows, 2 · INNER,
HIDDEN] holds Wg and Wu, `down` [rows, HIDDEN, INNER] is Wd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_search.population.product import round_weight, weight_gradients


class Launch(NamedTuple):
    """Of one kernel: TOKENS and CHUNK, warps, rounds loaded at once, and registers of a thread at most, if limited."""

    tokens: int
    chunk: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """As Triton calls them."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


FORWARD, BACKWARD = Launch(64, 32, 4, 3, 168), Launch(64, 32, 4, 3)
"""The fastest of those tried on an H100, in bfloat16 at a width of 128: 0.62 ns a token forward, 1.49 backward; with
gate and up projection as two products 0.64 and 1.57."""


@triton.jit
def _gate_and_up(
    ptr: tl.tensor, first: tl.tensor, HIDDEN: tl.constexpr, INNER: tl.constexpr, COUNT: tl.constexpr
) -> tl.tensor:
    """COUNT rows of the gate's projection, and below them the same ones of the up projection."""
    place = tl.arange(0, 2 * COUNT)
    row = first + place % COUNT + place // COUNT * INNER
    return tl.load(ptr + row[:, None] * HIDDEN + tl.arange(0, HIDDEN)[None, :])


@triton.jit
def _halves(x: tl.tensor, TOKENS: tl.constexpr, COUNT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """[g | u] of so many tokens, COUNT channels each, as g and u."""
    return tl.split(tl.permute(tl.reshape(x, [TOKENS, 2, COUNT]), [0, 2, 1]))


@triton.jit
def _tokens_of(ptr: tl.tensor, token: tl.tensor, tokens: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """All channels of these tokens, 0 beyond the last one."""
    places = ptr + token[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(places, mask=(token < tokens)[:, None], other=0.0)


@triton.jit
def _store(
    ptr: tl.tensor, x: tl.tensor, token: tl.tensor, tokens: tl.tensor, first: tl.tensor,
    WIDTH: tl.constexpr, COUNT: tl.constexpr,
) -> None:  # fmt: skip
    """Write COUNT of the WIDTH channels of these tokens, from `first` on."""
    places = ptr + token[:, None] * WIDTH + first + tl.arange(0, COUNT)[None, :]
    tl.store(places, x.to(ptr.dtype.element_ty), mask=(token < tokens)[:, None])


@triton.jit
def _forward_kernel(
    h_ptr: tl.tensor, up_ptr: tl.tensor, down_ptr: tl.tensor, y_ptr: tl.tensor, tokens: tl.tensor,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    up_ptr += row * (2 * INNER * HIDDEN)
    down_ptr += row * (INNER * HIDDEN)
    h = _tokens_of(h_ptr + row * tokens * HIDDEN, token, tokens, HIDDEN)
    y = tl.zeros([TOKENS, HIDDEN], tl.float32)
    for first in range(0, INNER, CHUNK):
        g, u = _halves(tl.dot(h, tl.trans(_gate_and_up(up_ptr, first, HIDDEN, INNER, CHUNK))), TOKENS, CHUNK)
        a = (g * tl.sigmoid(g) * u).to(h.dtype)
        inner = first + tl.arange(0, CHUNK)
        down = tl.load(down_ptr + tl.arange(0, HIDDEN)[None, :] * INNER + inner[:, None])  # [CHUNK, HIDDEN]
        y += tl.dot(a, down)
    _store(y_ptr + row * tokens * HIDDEN, y, token, tokens, 0, HIDDEN, HIDDEN)


@triton.jit
def _backward_kernel(
    h_ptr: tl.tensor, dy_ptr: tl.tensor, up_ptr: tl.tensor, down_ptr: tl.tensor, dh_ptr: tl.tensor, dup_ptr: tl.tensor,
    a_ptr: tl.tensor, tokens: tl.tensor,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    up_ptr += row * (2 * INNER * HIDDEN)
    down_ptr += row * (INNER * HIDDEN)
    dup_ptr += row * tokens * (2 * INNER)
    a_ptr += row * tokens * INNER
    h = _tokens_of(h_ptr + row * tokens * HIDDEN, token, tokens, HIDDEN)
    dy = _tokens_of(dy_ptr + row * tokens * HIDDEN, token, tokens, HIDDEN)
    dh = tl.zeros([TOKENS, HIDDEN], tl.float32)
    for first in range(0, INNER, CHUNK):
        up = _gate_and_up(up_ptr, first, HIDDEN, INNER, CHUNK)
        g, u = _halves(tl.dot(h, tl.trans(up)), TOKENS, CHUNK)
        inner = first + tl.arange(0, CHUNK)
        down = tl.load(down_ptr + tl.arange(0, HIDDEN)[:, None] * INNER + inner[None, :])  # [HIDDEN, CHUNK]
        da = tl.dot(dy, down)
        s = tl.sigmoid(g)
        dg = (da * u * s * (1 + g * (1 - s))).to(h.dtype)
        du = (da * g * s).to(h.dtype)
        dup = tl.reshape(tl.permute(tl.join(dg, du), [0, 2, 1]), [TOKENS, 2 * CHUNK])
        dh += tl.dot(dup, up)
        _store(dup_ptr, dg, token, tokens, first, 2 * INNER, CHUNK)
        _store(dup_ptr, du, token, tokens, INNER + first, 2 * INNER, CHUNK)
        _store(a_ptr, g * s * u, token, tokens, first, INNER, CHUNK)
    _store(dh_ptr + row * tokens * HIDDEN, dh, token, tokens, 0, HIDDEN, HIDDEN)


def fits(dtype: torch.dtype, hidden: int, inner: int) -> bool:
    """Whether these kernels can: bf16, a power of two of channels that a tile can hold, whole chunks of the MLP's."""
    chunks = all(inner % launch.chunk == 0 for launch in (FORWARD, BACKWARD))
    return dtype == torch.bfloat16 and hidden in (16, 32, 64, 128) and chunks


def launch_forward(h: Tensor, up: Tensor, down: Tensor, launch: Launch = FORWARD) -> Tensor:
    """The MLP of h [rows, tokens, hidden], given the rounded weights."""
    rows, tokens, hidden = h.shape
    y = torch.empty_like(h)
    _forward_kernel[triton.cdiv(tokens, launch.tokens), rows](
        h, up, down, y, tokens,
        HIDDEN=hidden, INNER=down.shape[2], TOKENS=launch.tokens, CHUNK=launch.chunk, **launch.options,
    )  # fmt: skip
    return y


def launch_backward(
    h: Tensor, dy: Tensor, up: Tensor, down: Tensor, launch: Launch = BACKWARD
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of h and of [g | u], and a."""
    rows, tokens, hidden = h.shape
    inner = down.shape[2]
    dh, dup, a = torch.empty_like(h), h.new_empty(rows, tokens, 2 * inner), h.new_empty(rows, tokens, inner)
    _backward_kernel[triton.cdiv(tokens, launch.tokens), rows](
        h, dy, up, down, dh, dup, a, tokens,
        HIDDEN=hidden, INNER=inner, TOKENS=launch.tokens, CHUNK=launch.chunk, **launch.options,
    )  # fmt: skip
    return dh, dup, a


class _Mlp(torch.autograd.Function):
    """See `mlp`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, up: Tensor, gain: Tensor, down: Tensor) -> Tensor:
        rounded = round_weight(up, gain, h.dtype), round_weight(down, None, h.dtype)
        ctx.save_for_backward(h, up, gain, down, *rounded)
        return launch_forward(h, *rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, up, gain, down, *rounded = ctx.saved_tensors
        dy = grads[0].contiguous()
        dh, dup, a = launch_backward(h, dy, *rounded)
        of_down, _ = weight_gradients(dy, a, down, None)
        return dh, *weight_gradients(dup, h, up, gain), of_down


def mlp(h: Tensor, up: Tensor, gain: Tensor, down: Tensor) -> Tensor:
    """Each row's MLP on h [rows, tokens, hidden], where `fits` says so.

    Args:
        h: In bf16.
        up: [rows, 2 · inner, hidden], fp32, as are
        gain: [rows, hidden], by which h is multiplied first, and
        down: [rows, hidden, inner].

    Returns:
        [rows, tokens, hidden].
    """
    y: Tensor = _Mlp.apply(h.contiguous(), up, gain, down)
    return y
