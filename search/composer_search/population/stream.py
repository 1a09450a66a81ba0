"""The residual stream of a population, whose gradient may be narrower than itself.

A weight's gradient is made of the stream's gradient in the type of matrix products, rounded. Kept in that type from one
depth to the next, too, it is one tensor in place of two, for 16 bits a third of the bytes; a block's rounding then
reaches the blocks before it, as those of its products do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """A residual stream [rows, tokens, hidden].

    Attributes:
        values: Its numbers; not followed by autograd, unless they are `traced` themselves.
        traced: What autograd follows. A gradient has the type of its tensor: where the stream's is to have another than
            `values`, this is a tensor of that type and of the shape of `values`, without numbers of its own.
    """

    values: Tensor
    traced: Tensor

    @classmethod
    def plain(cls, x: Tensor) -> Stream:
        """The stream x with a gradient of its own type."""
        return cls(x, x)

    @classmethod
    def narrow(cls, x: Tensor, dtype: torch.dtype) -> Stream:
        """The stream x with a gradient in `dtype`."""
        return cls(x.detach(), _Narrow.apply(x, dtype))

    def last(self, length: int, wanted: int) -> Stream:
        """The last `wanted` positions of sequences of `length`."""
        if self.traced is self.values:
            return Stream.plain(_last(self.values, length, wanted))
        return Stream(_last(self.values, length, wanted), _last(self.traced, length, wanted))

    def tensor(self) -> Tensor:
        """The stream as a tensor that autograd follows."""
        if self.traced is self.values:
            return self.values
        x: Tensor = _Open.apply(self.values, self.traced)
        return x


def numberless(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape of x, for autograd alone to follow: all its numbers are one and the same memory."""
    return x.new_empty(1, dtype=dtype).expand(x.shape)


def _last(x: Tensor, length: int, wanted: int) -> Tensor:
    return x.unflatten(1, (-1, length))[:, :, length - wanted :].flatten(1, 2)


class _Narrow(torch.autograd.Function):
    """From a tensor to what autograd follows in its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return numberless(x, dtype)  # autograd itself converts the gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Open(torch.autograd.Function):
    """And back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, traced: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]
