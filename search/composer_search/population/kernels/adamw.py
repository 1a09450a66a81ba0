"""One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) on stacked weights, each block of them at its own rate.

    w ← decay · w        m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²        w ← w - rate · m / (√v / root + eps)

Bytes for a weight: 28, four numbers read and three written. PyTorch's operations one after the other move 100.

Legend: a program handles BLOCK of the `size` weights of one block; `coefficients` [3, blocks] are decay, rate and root.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["blocks"])
def _kernel(
    weight_ptr: tl.tensor, gradient_ptr: tl.tensor, first_ptr: tl.tensor, second_ptr: tl.tensor,
    coefficients_ptr: tl.tensor, size: tl.tensor, blocks: tl.tensor, eps: tl.tensor,
    BETA1: tl.constexpr, BETA2: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    owner = tl.program_id(1).to(tl.int64)
    decay = tl.load(coefficients_ptr + owner)
    rate = tl.load(coefficients_ptr + blocks + owner)
    root = tl.load(coefficients_ptr + 2 * blocks + owner)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    offset += owner * size
    weight = tl.load(weight_ptr + offset, mask=mask)
    gradient = tl.load(gradient_ptr + offset, mask=mask)
    first = tl.load(first_ptr + offset, mask=mask)
    second = tl.load(second_ptr + offset, mask=mask)
    first += (1 - BETA1) * (gradient - first)
    second = BETA2 * second + (1 - BETA2) * gradient * gradient
    weight = decay * weight - rate * first / (tl.sqrt_rn(second) / root + eps)
    tl.store(weight_ptr + offset, weight, mask=mask)
    tl.store(first_ptr + offset, first, mask=mask)
    tl.store(second_ptr + offset, second, mask=mask)


def adamw(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    coefficients: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take one step in place.

    Args:
        weight: [blocks, …], fp32 and contiguous, as are
        gradient: its gradient,
        first: the first moment and
        second: the second one.
        coefficients: [3, blocks]: what the weight is multiplied by, the rate over the first moment's correction, and
            the root of the second one's.
        betas: Of the moments.
        eps: Added to the root of the second moment.
    """
    blocks = len(weight)
    size = weight.numel() // blocks
    grid = triton.cdiv(size, BLOCK), blocks
    _kernel[grid](
        weight, gradient.contiguous(), first, second, coefficients.contiguous(), size, blocks, eps,
        BETA1=betas[0], BETA2=betas[1], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
