"""Megatron-core's SwiGLU MLP in 8 bits from end to end: what passes between its products is quantised where it is made.

    h = X·W₁ᵀ      y = silu(gate) · up      Z = y·W₂ᵀ

Of the 25 bytes that SwiGLU, its gradient and the quantisation of both move for each of the F hidden features this saves
6, and 12 where the weights' gradients are computed in 8 bits, too: then y and the gradient of h exist in no other form.
"""

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from composer_kernels.fp8 import Rows, matmul, quantise, transpose
from composer_kernels.fp8_swiglu import quantised_swiglu, quantised_swiglu_gradient
from composer_megatron.layers.activation import SwiGLU
from composer_megatron.layers.fp8 import (
    Fp8ColumnParallelLinear,
    Fp8RowParallelLinear,
    Ranks,
    gathered,
    operand,
    reduced,
    weight_gradient,
)
from composer_megatron.layers.wgrad import main_grad


class Fp8MLP(MLP):
    """Megatron's MLP on our 8-bit projections, as one function where nothing comes between these but our SwiGLU."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As `MLP.forward`."""
        first, second, activation = self.linear_fc1, self.linear_fc2, self.activation_func
        ours = isinstance(first, Fp8ColumnParallelLinear) and isinstance(second, Fp8RowParallelLinear)
        if not ours or not isinstance(activation, SwiGLU) or per_token_scale is not None or first.bias is not None:
            output, bias = super().forward(hidden_states, per_token_scale, **kwargs)
            return output, bias
        weights = first(alone=False), second(alone=False)
        buffers = tuple(main_grad(weight, self.config) for weight in weights)
        eight = first.eight_bit_gradients
        part = _MLP.apply(hidden_states, *weights, buffers, first.ranks(), activation.limit, eight)
        return second.summed(part), None


class _MLP(autograd.Function):
    """The MLP's three steps on a rank's part of the hidden features, before the sum over ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        second: Tensor,
        buffers: tuple[Tensor | None, Tensor | None],
        ranks: Ranks,
        limit: float | None,
        eight_bit_gradients: bool,
    ) -> Tensor:
        """Compute Z.

        Args:
            ctx: For backward.
            x: (s, b, K); under sequence parallelism the rank's part of s.
            first: W₁ (2F, K), the gates first.
            second: W₂ (K, F).
            buffers: Where their gradients are added; None for autograd to have them.
            ranks: Who shares the first product's work.
            limit: As for `swiglu`.
            eight_bit_gradients: Whether the weights' gradients are computed in 8 bits, too.
        """
        ctx.buffers, ctx.ranks, ctx.limit, ctx.eight_bit_gradients = buffers, ranks, limit, eight_bit_gradients
        ctx.weights, ctx.shape = (first, second), x.shape  # the parameters themselves, which bear Megatron's flags
        rows, first_rows, second_rows = quantise(x), quantise(first), quantise(second)
        h = matmul(gathered(rows, ranks), first_rows, x.dtype)
        y = quantised_swiglu(h, limit=limit, plain=not eight_bit_gradients)
        kept = (*rows, *y.rows) if eight_bit_gradients else (x, y.plain)
        ctx.save_for_backward(h, *first_rows, *second_rows, *kept)
        return matmul(y.rows, second_rows, x.dtype).view(-1, *x.shape[1:-1], len(second))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        """Give dX, and of each weight the gradient or what stands for it."""
        h, *saved = ctx.saved_tensors
        first, second, kept = Rows(*saved[:2]), Rows(*saved[2:4]), saved[4:]
        eight, half = ctx.eight_bit_gradients, len(kept) // 2
        dz_rows = quantise(dz)
        dy = matmul(dz_rows, transpose(second), dz.dtype)
        dh = quantised_swiglu_gradient(dy, h, limit=ctx.limit, plain=not eight)
        dx, pending, dfirst, dsecond = None, None, None, None
        if ctx.needs_input_grad[0]:
            dx = matmul(dh.rows, transpose(first), dz.dtype).view(*dz.shape[:-1], ctx.shape[-1])
            dx, pending = reduced(dx, ctx.shape, ctx.ranks)
        if ctx.needs_input_grad[2]:
            gradient = dz_rows if eight else dz.reshape(-1, dz.shape[-1])
            dsecond = weight_gradient(ctx.weights[1], ctx.buffers[1], gradient, operand(kept[half:]))
        if ctx.needs_input_grad[1]:
            x = gathered(operand(kept[:half]), ctx.ranks)
            x = x if isinstance(x, Rows) else x.reshape(-1, x.shape[-1])
            dfirst = weight_gradient(ctx.weights[0], ctx.buffers[0], dh.rows if dh.plain is None else dh.plain, x)
        if pending is not None:
            pending.wait()
        return dx, dfirst, dsecond, None, None, None, None
