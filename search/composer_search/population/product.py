"""Each row's own linear layer on its own tokens, as batched matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TILE = 128
"""Side of the tile of a product that one program of a GPU makes, about."""

PROGRAMS, LEAST_TOKENS = 528, 512
"""Programs that keep a GPU busy, four for each multiprocessor of an H100; and tokens at least of each part of a
weight's gradient, which is written once for each."""


class _Product(torch.autograd.Function):
    """See `product`.

    By hand, so that a weight's gradient is a sum over parts of the tokens. As one product it would be a tile or a few
    for each row, whose program goes through all tokens while most of a GPU has nothing to do.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
        rounded = round_weight(weight, gain, h.dtype)
        ctx.save_for_backward(h, weight, gain, rounded)
        return torch.bmm(h, rounded.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        h, weight, gain, rounded = ctx.saved_tensors
        grad = grads[0].contiguous()
        return torch.bmm(grad, rounded), *weight_gradients(grad, h, weight, gain)


def round_weight(weight: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [rows, out, in], its inputs multiplied by `gain` [rows, in], in the type of a product."""
    return (weight if gain is None else weight * gain[:, None]).to(dtype)


def weight_gradients(grad: Tensor, h: Tensor, weight: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight and gain, given the layer's input h [rows, tokens, in] and its output's gradient."""
    parts = token_parts(weight, h.shape[1]) if h.is_cuda else 1
    of_parts = torch.bmm(grad.view(len(h) * parts, -1, grad.shape[2]).mT, h.reshape(len(h) * parts, -1, h.shape[2]))
    return gain_gradients(of_parts.view(len(h), parts, *weight.shape[1:]).sum(1, dtype=weight.dtype), weight, gain)


def gain_gradients(whole: Tensor, weight: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight and gain, given that of their product `whole` [rows, out, in]."""
    return (whole, None) if gain is None else (whole * gain[:, None], (whole * weight).sum(1))


def token_parts(weight: Tensor, tokens: int) -> int:
    """In how many parts the tokens of a row go into the gradient of weights [rows, out, in]: a power of two."""
    rows, *sides = weight.shape
    tiles = rows * -(-sides[0] // _TILE) * -(-sides[1] // _TILE)
    parts = 1
    while tiles * parts < PROGRAMS and tokens % (2 * parts) == 0 and tokens >= 2 * parts * LEAST_TOKENS:
        parts *= 2
    return parts


def product(h: Tensor, weight: Tensor, gain: Tensor | None = None) -> Tensor:
    """Each row's linear layer on h [rows, tokens, in], its inputs multiplied by `gain` [rows, in].

    Args:
        h: In the type in which matrices are multiplied.
        weight: [rows, out, in], in the type of weights; it is rounded to that of h.
        gain: Likewise.

    Returns:
        [rows, tokens, out].
    """
    out: Tensor = _Product.apply(h, weight, gain)
    return out
