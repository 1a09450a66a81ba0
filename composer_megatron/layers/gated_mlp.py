"""Megatron-core's MLP with SwiGLU inside its matrix products, by quack's kernels for Hopper and Blackwell GPUs.

As a pass of its own SwiGLU reads both halves that the first product wrote and writes their product, and its backward
pass reads both and a gradient to write two: 16 bytes a feature and token that nothing hides. Here the first product
writes the activation beside its operands, and the product that carries the gradient back through the second weight
reads them and writes their gradients, and the activation once more, which so need not be kept.

Gate and up alternate in what the first product writes, which never leaves this module; weights, their gradients and
checkpoints are Megatron's, all rows of the gate first.
"""

import functools
import importlib
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from composer_kernels.wgrad_accumulate import wgrad_accumulate
from composer_megatron.layers.activation import SwiGLU
from composer_megatron.layers.wgrad import main_grad, stand_in

_OLDEST = (9, 0)

# Rows and columns of a tile, and whether two groups of warps take turns at tiles: of 12 configurations each the fastest
# on an H100 (16384 x 2048 x 2·8192, bf16, quack 0.6.5). Untuned, and without nvMatmulHeuristics, quack takes the first
# for all, with which the others take 1.04, 1.16 and 1.12 times as long.
_HOPPER = {
    "gate": (128, 192, True),
    "through": (128, 160, True),
    "to_input": (128, 256, False),
    "gradient": (128, 256, False),
}


class GatedMLP(MLP):
    """Megatron's MLP; wherever quack cannot compute it, Megatron's forward pass does, with the activation's kernel."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        """As `MLP.forward`."""
        if per_token_scale is not None or not self._fits(hidden_states):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        first, second = self.linear_fc1.weight, self.linear_fc2.weight
        buffers = (main_grad(weight, self.config) for weight in (first, second))
        output = _Gated.apply(hidden_states.flatten(0, -2), first, second, *buffers)
        return output.view(*hidden_states.shape[:-1], -1), None

    def _fits(self, x: Tensor) -> bool:
        """Whether the kernels take it: whole matrices in 16 bits, and nobody waits for the projections to be called."""
        first, second = self.linear_fc1, self.linear_fc2
        plain = type(first) is ColumnParallelLinear and type(second) is RowParallelLinear
        if not plain or first.bias is not None or first.gtp_remat_size > 1 or self.tp_group.size() > 1:
            return False
        # Megatron's data parallelism waits for weights on their way in hooks of the projections.
        watched = any(layer._forward_pre_hooks or layer._forward_hooks for layer in (first, second))
        swiglu = isinstance(self.activation_func, SwiGLU) and self.activation_func.limit is None
        widths = x.shape[-1] % 8 == 0 and len(first.weight) % 32 == 0
        return swiglu and widths and not watched and x.numel() > 0 and _runs_kernels(x, first.weight)


class GatedSwiGLU(SwiGLU):
    """SwiGLU that brings its own MLP (`composer_megatron.specs.mlp_spec`)."""

    mlp = GatedMLP


def _runs_kernels(x: Tensor, weight: Tensor) -> bool:
    sixteen = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and sixteen and torch.cuda.get_device_capability(x.device) >= _OLDEST


class _Gated(torch.autograd.Function):
    """Y = (silu(X·Gᵀ) · (X·Uᵀ))·Wᵀ, where the first weight is G above U."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, first_buffer: Tensor | None, second_buffer: Tensor | None
    ) -> Tensor:
        """Multiply.

        Args:
            ctx: For backward.
            x: (R, H).
            first: (2F, H).
            second: (H, F).
            first_buffer: Where the first weight's gradient is added; None for autograd to have it.
            second_buffer: Likewise.
        """
        halves, activation = _gate(x, first)
        ctx.save_for_backward(x, halves)
        ctx.weights, ctx.buffers = (first, second), (first_buffer, second_buffer)  # which bear Megatron's flags
        return activation @ second.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Give dX, and each weight's gradient or what stands for it."""
        x, halves = ctx.saved_tensors
        (first, second), (first_buffer, second_buffer) = ctx.weights, ctx.buffers
        dhalves, activation = _through(dy.contiguous(), second, halves)
        dx = _to_input(dhalves, first) if ctx.needs_input_grad[0] else None
        dfirst = dsecond = None
        if ctx.needs_input_grad[2] and second_buffer is not None:
            wgrad_accumulate(activation, dy, second_buffer)
            dsecond = stand_in(second)
        elif ctx.needs_input_grad[2]:
            dsecond = dy.t() @ activation
        if ctx.needs_input_grad[1] and first_buffer is not None:
            _accumulate(dhalves, x, first_buffer)
            dfirst = stand_in(first)
        elif ctx.needs_input_grad[1]:
            dfirst = _gradient(dhalves, x)
        return dx, dfirst, dsecond, None, None


def _gate(x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """X·Gᵀ and X·Uᵀ in alternating columns, (R, 2F), and silu of the one times the other, (R, F)."""
    halves, activation = _quack().gemm_gated(
        x, first.t(), activation="swiglu", concat_layout=("B",), config=_config("gate", x), tuned=False
    )
    return halves, activation


def _through(dy: Tensor, second: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of those columns from that of the output, and the activation again."""
    dhalves, activation = _quack().gemm_dgated(
        dy,
        second,
        halves,
        activation="swiglu",
        dynamic_scheduler=False,
        config=_config("through", dy),
        tuned=False,
    )
    return dhalves, activation


def _to_input(dhalves: Tensor, first: Tensor) -> Tensor:
    dx = dhalves.new_empty(len(dhalves), first.shape[1])
    _product("to_input", dhalves, first, dx, concat_layout=("B",))
    return dx


def _accumulate(dhalves: Tensor, x: Tensor, buffer: Tensor) -> None:
    """Add the first weight's gradient, all rows of the gate first."""
    _product("gradient", dhalves.t(), x, buffer, add_to_output=True, concat_layout=("out",))


def _gradient(dhalves: Tensor, x: Tensor) -> Tensor:
    gradient = x.new_empty(dhalves.shape[1], x.shape[1])
    _product("gradient", dhalves.t(), x, gradient, concat_layout=("out",))
    return gradient


def _product(name: str, *operands: Tensor, **options: Any) -> None:
    """A plain product, by the function below quack's tuner: its `gemm` takes no configuration."""
    _quack().gemm_tuned.fn(*operands, config=_config(name, operands[0]), **options)


def _config(name: str, operand: Tensor) -> Any:
    """What was measured on Hopper GPUs; None, for quack to choose, on others."""
    return _hopper(name) if torch.cuda.get_device_capability(operand.device)[0] == 9 else None


@functools.cache
def _hopper(name: str) -> Any:
    rows, columns, in_turns = _HOPPER[name]
    return importlib.import_module("quack.gemm_config").GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=in_turns,
        cluster_m=2,
        cluster_n=1,
        is_dynamic_persistent=False,
        device_capacity=9,
    )


def _quack() -> Any:
    return importlib.import_module("quack.gemm_interface")
