"""Megatron-core's projections with their matrix products in 8 bits, by the kernels of `composer_kernels.fp8`.

Of a projection's three products Y = X·Wᵀ and dX = dY·W take 8-bit operands, quantised row by row as they come, without
state from step to step. The weight's gradient dW = dYᵀ·X is computed in the model's type and added to Megatron's buffer
in fp32, or in 8 bits, too (`EightBitGradients`). Parameters, their names and checkpoints are Megatron's: the 8-bit
copies live from forward to backward at most.

On a CPU the same numbers are rounded to 8 bits in the same way, and multiplied in fp32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from composer_kernels.fp8 import ALIGNMENT, Rows, matmul, quantise, transpose
from composer_kernels.wgrad_accumulate import wgrad_accumulate
from composer_megatron import cpu
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.layers.wgrad import main_grad, stand_in

_OLDEST = (8, 9)
"""The compute capability from which GPUs multiply e4m3: Ada, then Hopper and Blackwell."""


class Ranks(NamedTuple):
    """The tensor-parallel ranks that share a projection's work; None where there is nothing to do.

    Attributes:
        gather: Those that have the other parts of the sequence, under sequence parallelism.
        reduce: Those over whom the gradient of the input is to be summed, else.
    """

    gather: ProcessGroup | None = None
    reduce: ProcessGroup | None = None


class _Eight:
    """What both projections share: checks, and the product that Megatron's layers ask for."""

    eight_bit_gradients = False
    """Whether the weight's gradient is computed in 8 bits, too."""

    weight: Any
    config: Any
    gtp_remat_size: int
    """What Megatron's layers have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build Megatron's layer.

        Raises:
            ComposerError: If the GPU has no 8-bit products.
            UsageError: If the widths of the rank's part are no multiples of 16, or weights are gathered for each use.
        """
        super().__init__(*args, **kwargs)
        check_gpu()
        outputs, inputs = self.weight.shape
        if outputs % ALIGNMENT or inputs % ALIGNMENT:
            raise UsageError(
                f"linear=fp8: a projection from {inputs} to {outputs} features (of one tensor-parallel rank); both "
                f"must be multiples of {ALIGNMENT}: choose other widths or fewer ranks, or leave linear=fp8 out"
            )
        if self.gtp_remat_size > 1:
            raise UsageError("linear=fp8 does not serve weights that are gathered for each use: leave it out")

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        group = kwargs.get("tp_group")
        ranks = Ranks(
            gather=group if kwargs.get("sequence_parallel") else None,
            reduce=group if kwargs.get("allreduce_dgrad") else None,
        )
        buffer = main_grad(weight, self.config)
        output: Tensor = _Linear.apply(input, weight, buffer, ranks, self.eight_bit_gradients)
        return output if bias is None else output + bias

    def forward(self, *args: Any, alone: bool = True, **kwargs: Any) -> Any:
        """As Megatron's layer; where it is not to multiply `alone`, its weight, for whoever multiplies in its stead.

        That this is a call lets Megatron's hooks see to the weight first.
        """
        return super().forward(*args, **kwargs) if alone else self.weight  # type: ignore[misc]


class Fp8ColumnParallelLinear(_Eight, ColumnParallelLinear):
    """Megatron's projection into a block, in 8 bits; sequence parallelism gathers 8-bit numbers."""

    def ranks(self) -> Ranks:
        """Those that `forward` works with."""
        if self.explicit_expert_comm:
            return Ranks()
        return Ranks(
            gather=self.tp_group if self.sequence_parallel else None,
            reduce=self.tp_group if self.allreduce_dgrad else None,
        )


class Fp8RowParallelLinear(_Eight, RowParallelLinear):
    """Megatron's projection out of a block, in 8 bits."""

    def summed(self, part: Tensor) -> Tensor:
        """The sum of all ranks' products; under sequence parallelism this rank's part of it."""
        if self.explicit_expert_comm:
            return part
        if self.sequence_parallel:
            scattered: Tensor = reduce_scatter_to_sequence_parallel_region(part, group=self.tp_group)
            return scattered
        whole: Tensor = reduce_from_tensor_model_parallel_region(part, group=self.tp_group)
        return whole


class EightBitGradients:
    """Pairs of the two with the weight's gradient in 8 bits."""

    class Column(Fp8ColumnParallelLinear):
        """Into a block."""

        eight_bit_gradients = True

    class Row(Fp8RowParallelLinear):
        """Out of it."""

        eight_bit_gradients = True


def check_gpu() -> None:
    """See that the GPU, if there is one, multiplies 8-bit numbers.

    Raises:
        ComposerError: If it does not.
    """
    if cpu.has_gpu() and torch.cuda.get_device_capability() < _OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        raise ComposerError(
            f"linear=fp8: {name} (compute capability {major}.{minor}) has no 8-bit matrix products; they came with "
            "8.9 (Ada, Hopper, Blackwell): leave linear=fp8 out"
        )


class _Linear(torch.autograd.Function):
    """Y = X·Wᵀ over tensor-parallel ranks, as Megatron's own function does it, in 8 bits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, buffer: Tensor | None, ranks: Ranks, eight_bit_gradients: bool
    ) -> Tensor:
        """Multiply.

        Args:
            ctx: For backward.
            x: (s, b, K); under sequence parallelism the rank's part of s.
            weight: (N, K), the rank's part.
            buffer: Where its gradient is added; None for autograd to have it.
            ranks: Who shares the work.
            eight_bit_gradients: See `_Eight`.
        """
        ctx.buffer, ctx.ranks, ctx.eight_bit_gradients = buffer, ranks, eight_bit_gradients
        ctx.weight, ctx.shape = weight, x.shape  # the parameter itself, which bears Megatron's flags
        rows, weight_rows = quantise(x), quantise(weight)
        ctx.save_for_backward(*weight_rows, *(rows if eight_bit_gradients else (x,)))
        return matmul(gathered(rows, ranks), weight_rows, x.dtype).view(-1, *x.shape[1:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Give dX, and dW or what stands for it."""
        values, scales, *kept = ctx.saved_tensors
        rows = quantise(dy)
        dx, pending, dweight = None, None, None
        if ctx.needs_input_grad[0]:
            dx = matmul(rows, transpose(Rows(values, scales)), dy.dtype).view(*dy.shape[:-1], values.shape[1])
            dx, pending = reduced(dx, ctx.shape, ctx.ranks)
        if ctx.needs_input_grad[1]:
            x = gathered(operand(kept), ctx.ranks)
            dweight = weight_gradient(ctx.weight, ctx.buffer, rows if ctx.eight_bit_gradients else dy, x)
        if pending is not None:
            pending.wait()
        return dx, dweight, None, None, None


def operand(kept: Sequence[Tensor]) -> Rows | Tensor:
    """What was kept for the weight's gradient: one tensor, or the two of a quantised one."""
    return Rows(*kept) if len(kept) == 2 else kept[0]


def gathered[T: (Rows, Tensor, Rows | Tensor)](part: T, ranks: Ranks) -> T:
    """The rows of all parts of the sequence, where ranks have parts."""
    if ranks.gather is None:
        return part
    if isinstance(part, Rows):
        return Rows(*(_gathered(tensor, ranks.gather) for tensor in part))
    return _gathered(part, ranks.gather)


def _gathered(part: Tensor, group: ProcessGroup) -> Tensor:
    whole = part.new_empty((len(part) * group.size(), *part.shape[1:]))
    words = torch.uint8 if part.dtype.itemsize == 1 else part.dtype  # which every communication library knows
    torch.distributed.all_gather_into_tensor(whole.view(words), part.contiguous().view(words), group=group)
    return whole


def reduced(dx: Tensor, shape: torch.Size, ranks: Ranks) -> tuple[Tensor, Any]:
    """The sum of all ranks' dX, or the part of it in the shape of X, and what to wait for before it is read."""
    if ranks.gather is not None:
        part = dx.new_empty(shape)
        return part, torch.distributed.reduce_scatter_tensor(part, dx, group=ranks.gather, async_op=True)
    if ranks.reduce is not None:
        return dx, torch.distributed.all_reduce(dx, group=ranks.reduce, async_op=True)
    return dx, None


def weight_gradient(weight: Tensor, buffer: Tensor | None, dy: Rows | Tensor, x: Rows | Tensor) -> Tensor | None:
    """Multiply dW = dYᵀ·X in 8 bits or in the type of both, and add it to the buffer where there is one.

    Args:
        weight: The parameter.
        buffer: Megatron's.
        dy: (…, N), quantised or not.
        x: (…, K), likewise.

    Returns:
        What autograd is to have: dW, or what stands for it.
    """
    if isinstance(dy, Rows) and isinstance(x, Rows):
        return _eight_bit_gradient(weight, buffer, dy, x)
    assert isinstance(dy, Tensor)
    assert isinstance(x, Tensor)
    if buffer is None:
        rows = dy.shape[:-1].numel()
        return dy.reshape(rows, len(weight)).t() @ x.reshape(rows, weight.shape[1])
    wgrad_accumulate(x, dy, buffer)
    return stand_in(weight)


def _eight_bit_gradient(weight: Tensor, buffer: Tensor | None, dy: Rows, x: Rows) -> Tensor | None:
    if len(dy.values) == 0:
        return torch.zeros_like(weight) if buffer is None else stand_in(weight)
    dweight = matmul(transpose(dy), transpose(x), weight.dtype, fast=False, whole=True)
    if buffer is None:
        return dweight
    buffer.add_(dweight)
    return stand_in(weight)
