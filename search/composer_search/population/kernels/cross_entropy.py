"""Cross-entropy of small vocabularies, forward and backward, for logits in 16 bits or 32.

    loss = log Σ exp(x) - x[target]        dx = (exp(x) / Σ exp(x) - 1[target]) · dloss

A position whose target is the ignored one has loss 0 and gradient 0. Bytes for a position of V logits of 16 bits: 2V
forward and 4V backward. PyTorch's way over log-probabilities in fp32 moves 36V.

Legend: a program handles ROWS positions of WIDE logits, the power of two that holds them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 2048
"""Vocabulary up to which a position's logits fit a program."""

_NUMBERS = 4096


@triton.jit(do_not_specialize=["positions"])
def _forward_kernel(
    logits_ptr: tl.tensor, target_ptr: tl.tensor, loss_ptr: tl.tensor, sums_ptr: tl.tensor, positions: tl.tensor,
    IGNORE: tl.constexpr, VOCABULARY: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, WIDE)
    here = position < positions
    mask = here[:, None] & (token < VOCABULARY)[None, :]
    x = tl.load(logits_ptr + position[:, None] * VOCABULARY + token[None, :], mask=mask, other=float("-inf"))
    x = tl.where(here[:, None], x.to(tl.float32), 0.0)
    target = tl.load(target_ptr + position, mask=here, other=IGNORE)
    most = tl.max(x, 1)
    sums = most + tl.log(tl.sum(tl.exp(x - most[:, None]), 1))
    own = tl.sum(tl.where(token[None, :] == target[:, None], x, 0.0), 1)
    tl.store(loss_ptr + position, tl.where(target == IGNORE, 0.0, sums - own), mask=here)
    tl.store(sums_ptr + position, sums, mask=here)


@triton.jit(do_not_specialize=["positions"])
def _backward_kernel(
    logits_ptr: tl.tensor, target_ptr: tl.tensor, sums_ptr: tl.tensor, dloss_ptr: tl.tensor, dlogits_ptr: tl.tensor,
    positions: tl.tensor,
    IGNORE: tl.constexpr, VOCABULARY: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, WIDE)
    here = position < positions
    mask = here[:, None] & (token < VOCABULARY)[None, :]
    offset = position[:, None] * VOCABULARY + token[None, :]
    x = tl.load(logits_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + position, mask=here, other=IGNORE)
    sums = tl.load(sums_ptr + position, mask=here, other=0.0)
    dloss = tl.load(dloss_ptr + position, mask=here, other=0.0)
    share = tl.exp(x - sums[:, None]) - tl.where(token[None, :] == target[:, None], 1.0, 0.0)
    dx = tl.where((target == IGNORE)[:, None], 0.0, share * dloss[:, None])
    tl.store(dlogits_ptr + offset, dx.to(dlogits_ptr.dtype.element_ty), mask=mask)


class _CrossEntropy(torch.autograd.Function):
    """See `cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
        loss = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        sums = torch.empty_like(loss)
        grid, ctx.shape = _grid(logits)
        _forward_kernel[grid](logits, targets, loss, sums, targets.numel(), IGNORE=ignore, **ctx.shape, num_warps=4)
        ctx.save_for_backward(logits, targets, sums)
        ctx.ignore = ignore
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, sums = ctx.saved_tensors
        dlogits, dloss = torch.empty_like(logits), grads[0].contiguous()
        grid, _ = _grid(logits)
        _backward_kernel[grid](
            logits, targets, sums, dloss, dlogits, targets.numel(), IGNORE=ctx.ignore, **ctx.shape, num_warps=4
        )
        return dlogits, None, None


def _grid(logits: Tensor) -> tuple[tuple[int], dict[str, int]]:
    vocabulary = logits.shape[-1]
    wide = triton.next_power_of_2(vocabulary)
    rows = max(1, _NUMBERS // wide)
    return (triton.cdiv(logits.numel() // vocabulary, rows),), {"VOCABULARY": vocabulary, "WIDE": wide, "ROWS": rows}


def cross_entropy(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """The loss of each position in nats, fp32.

    Args:
        logits: [..., vocabulary], bf16 or fp32, of at most `LARGEST` tokens.
        targets: [...], int64.
        ignore: The target of positions that do not count.
    """
    loss: Tensor = _CrossEntropy.apply(logits.contiguous(), targets.contiguous(), ignore)
    return loss
