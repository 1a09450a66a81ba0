"""Causal attention over short sequences with rotary positions, from the joint projection, forward and backward.

One kernel does what PyTorch needs a dozen for: it adds the projection's bias, turns queries and keys (Su et al., arXiv
2104.09864) and attends, and it reads the projection as a matrix product writes it, [queries | keys | values] of all
heads side by side. The general kernels for attention pad a head to 32 channels or more and a sequence to 128 positions;
a proxy's heads have 8 channels and many of its sequences 32 positions.

What a sequence's length asks for differs: `attention_short` keeps all of it in registers, `attention_long` goes through
it by tiles. On an H100, 16 heads of 8 channels in bf16, forward and backward of both took this many ns a token on 23
November 2026:

    positions         32       64      128      256      272
    short           2.33     2.46     5.94
    long            2.94     3.00     3.64     4.81     6.08
    PyTorch         34.0              19.1     20.8
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from composer_search.population.kernels import attention_long, attention_short

LONGEST = 512
"""Positions up to which these kernels are meant. Measured up to 272: from 128 to 256 the time of a token grows by 1.2
ns, and is then a quarter of PyTorch's."""

WIDEST = 32
"""Channels of a head likewise; also, a program's registers hold no more."""


def takes(length: int, width: int) -> bool:
    """Whether these kernels are meant for such sequences and heads."""
    return length <= LONGEST and width <= WIDEST


def tables(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, width / 2] of `composer_search.candidate.rotation`'s complex numbers."""
    return turns.real.contiguous(), turns.imag.contiguous()


def form(length: int, dtype: torch.dtype) -> ModuleType:
    """The kernels for sequences of this length: `attention_short` where a tile can be all of one."""
    return attention_short if length <= attention_short.longest(dtype) else attention_long


class _Attention(torch.autograd.Function):
    """See `rotary_attention`."""

    @staticmethod
    def forward(
        ctx: Any, joint: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor, heads: int, wanted: int, precision: str
    ) -> Tensor:
        ctx.form, ctx.precision = form(len(cosine), joint.dtype), precision
        ctx.launch = ctx.form.default_launch(len(cosine), 2 * cosine.shape[1], joint.dtype)
        last = {} if wanted == len(cosine) else {"wanted": wanted}
        kept, mixed, sums = ctx.form.forward(joint, bias, cosine, sine, heads, precision, ctx.launch, **last)
        ctx.save_for_backward(cosine, sine, mixed, sums, *kept)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine, mixed, sums, *kept = ctx.saved_tensors
        gradients = ctx.form.backward(kept, cosine, sine, mixed, grads[0], sums, ctx.precision, ctx.launch)
        return *gradients, *[None] * 5


def rotary_attention(
    joint: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor, heads: int, wanted: int, *, precision: str = "ieee"
) -> Tensor:
    """Causal attention with rotary positions, from a joint projection without its bias.

    Args:
        joint: [rows, sequences · length, 3 · heads · width], queries, keys and values of all heads; bf16 or fp32.
        bias: [rows, 3 · heads · width], fp32, added first.
        cosine: [length, width / 2], and
        sine: the same, from `tables`.
        heads: Attention heads.
        wanted: Last positions of each sequence that are asked for.
        precision: Of products of fp32: ``ieee`` or ``tf32``.

    Returns:
        [rows, sequences · wanted, heads · width].
    """
    length = len(cosine)
    computed = length if form(length, joint.dtype) is attention_short else wanted  # one tile: there is nothing to save
    mixed: Tensor = _Attention.apply(joint, bias, cosine, sine, heads, computed, precision)
    return mixed if computed == wanted else mixed.unflatten(1, (-1, length))[:, :, length - wanted :].flatten(1, 2)
