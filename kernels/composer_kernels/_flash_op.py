"""The tiled attention as one differentiable operation: operators for compiled code, autograd for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from composer_kernels._flash import Problem, empty_statistics, launch_forward
from composer_kernels._flash_backward import launch_backward
from composer_kernels._launch import Function, differentiable_once


@torch.library.custom_op("composer_kernels::attention_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    q_longest: int,
    k_longest: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, q_starts, k_starts, Problem(q_longest, k_longest, causal, window, scale))


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), empty_statistics(q)


@torch.library.custom_op("composer_kernels::attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    q_longest: int,
    k_longest: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(q_longest, k_longest, causal, window, scale)
    return launch_backward(dout, dlse, q, k, v, out, lse, q_starts, k_starts, problem)


@_backward_op.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Flash(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor | None, k_starts: Tensor | None, *settings: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # the log-sum-exp seldom has a gradient
        out, lse = _attend(q, k, v, q_starts, k_starts, *settings)
        ctx.save_for_backward(q, k, v, out, lse, q_starts, k_starts)
        ctx.settings = settings
        return out, lse

    @staticmethod
    @differentiable_once("attention")
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, q_starts, k_starts = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        given = dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse, q_starts, k_starts
        # Only compiled code, which must not look inside, pays for an operator: its dispatch takes longer than a launch.
        if torch.compiler.is_compiling():
            gradients = _backward_op(*given, *ctx.settings)
        else:
            gradients = launch_backward(*given, Problem(*ctx.settings))
        return *gradients, None, None, *[None] * len(ctx.settings)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor | None, k_starts: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return _forward_op(q, k, v, q_starts, k_starts, *settings)
    return launch_forward(q, k, v, q_starts, k_starts, Problem(*settings))


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    q_longest: int,
    k_longest: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`launch_forward` that autograd differentiates, once; both results carry gradients. See `Problem`."""
    settings = q_longest, k_longest, causal, window, scale
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Flash.apply(q, k, v, q_starts, k_starts, *settings)
    return _attend(q, k, v, q_starts, k_starts, *settings)
