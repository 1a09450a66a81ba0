"""Time `swiglu` beside its peers: ``python benchmarks/bench_swiglu.py --output results.json``.

Bytes a case must move: forward gate, up and y; backward dy, gate and up, dgate and dup.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from contest import Contest, Inputs, Operation, compare, compiled, host_times
from session import session
from timing import Row, set_count, tune
from torch import Tensor

ours = importlib.import_module("composer_kernels.swiglu")  # the package's attribute of that name is the function
BF16 = torch.bfloat16
QUICK = [(8192, 4096), (8192, 8192), (8192, 14336)]
SHAPES = [*QUICK, (8192, 2048), (8192, 3072), (8192, 11008), (32768, 8192), (4096, 28672)]


def draw(rows: int, width: int) -> Inputs:
    """[gate | up] and dy in bfloat16."""
    packed = torch.randn(rows, 2 * width, device="cuda", dtype=BF16)
    return Inputs((packed,), (torch.randn(rows, width, device="cuda", dtype=BF16),))


def exact(inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(y,) and ([dgate | dup],) in float64."""
    gate, up = inputs.leaves[0].detach().double().chunk(2, -1)
    dy, s = inputs.grads[0].double(), torch.sigmoid(gate)
    return (gate * s * up,), (torch.cat((dy * up * s * (1 + gate * (1 - s)), dy * gate * s), -1),)


def contest(rows: int, width: int) -> Contest:
    """The operation on one shape."""
    tensor = 2 * rows * width
    return Contest(f"{rows} x {width} bf16", 3 * tensor, 5 * tensor, lambda: draw(rows, width), exact)


def contenders() -> dict[str, Callable[[], Operation]]:
    """Everyone who gates a packed tensor."""

    def megatron() -> Operation:
        bias_swiglu_impl = importlib.import_module("megatron.core.fusions.fused_bias_swiglu").bias_swiglu_impl
        return lambda packed: bias_swiglu_impl(packed, None)

    def liger() -> Operation:
        function = importlib.import_module("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction
        return function.apply

    def transformer_engine() -> Operation:
        importlib.import_module("transformer_engine.pytorch")  # loads the library that the next one needs
        kernels = importlib.import_module("transformer_engine_torch")
        return lambda packed: _TransformerEngine.apply(packed, kernels)

    return {
        "composer": lambda: ours.swiglu,
        "megatron": megatron,
        "liger": liger,
        "te": transformer_engine,
        "torch.compile": lambda: compiled(_in_torch),
        "torch": lambda: _in_torch,
    }


class _TransformerEngine(torch.autograd.Function):
    """TransformerEngine's two kernels without its modules, which quantise."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, kernels: Any) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.kernels = kernels
        return kernels.swiglu(packed, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (packed,) = ctx.saved_tensors
        return ctx.kernels.dswiglu(dy, packed, None), None


def _in_torch(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, -1)
    return F.silu(gate) * up


def launches(width: int) -> Iterator[object]:
    """Launches worth timing: 4 to 32 elements a thread."""
    for block, rows, warps in itertools.product((256, 512, 1024, 2048, 4096, 8192), (1, 2, 4), (2, 4, 8, 16)):
        if 4 <= rows * block / warps / 32 <= 32 and block < 2 * width:
            yield ours.Launch(block, rows, warps)


def tune_swiglu(rows: int, width: int, limit: float) -> list[Row]:
    """Time launches of both kernels, best first."""
    sets = [draw(rows, width) for _ in range(set_count(6 * rows * width))]
    packed, dys = [inputs.leaves[0].detach() for inputs in sets], [inputs.grads[0] for inputs in sets]

    def forward(index: int, launch: object) -> Sequence[Tensor | None]:
        return [ours.launch_forward(packed[index], None, None, launch)]

    def backward(index: int, launch: object) -> Sequence[Tensor | None]:
        return ours.launch_backward(dys[index], packed[index], None, None, launch)

    tensor = 2 * rows * width
    shape = f"{rows} x {width}"
    return tune(f"forward {shape}", 3 * tensor, limit, forward, ours.forward_launch(width), launches(width)) + tune(
        f"backward {shape}", 5 * tensor, limit, backward, ours.backward_launch(width), launches(width)
    )


def main() -> None:
    """Run from the command line."""
    with session("swiglu", __doc__) as run:
        if run.options.tune:
            for count, width in QUICK:
                run.add(tune_swiglu(count, width, run.limits.copy))
            return
        for count, width in QUICK if run.options.quick else SHAPES:
            run.add(compare(contest(count, width), run.chosen(contenders()), run.limits.copy))
        run.add_host_times(host_times(contest(16, 4096), run.chosen(contenders())))


if __name__ == "__main__":
    main()
