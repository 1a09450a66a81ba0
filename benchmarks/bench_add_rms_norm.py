"""Time `add_rms_norm` beside its peers: ``python benchmarks/bench_add_rms_norm.py --output results.json``.

Bytes a case must move: forward x, residual, y and total; backward dy, dtotal, total and the gradient, with an fp32
stream once more in the type of x; each with rstd and the weight.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from bench_rms_norm import BF16, EPS, QUICK, SHAPES, TUNED, tune_norm
from contest import Contest, Inputs, Operation, compare, compiled, host_times
from session import session
from torch import Tensor

from composer_kernels.add_rms_norm import add_rms_norm

STREAMS = (BF16, torch.float32)


def draw(rows: int, width: int, stream: torch.dtype) -> Inputs:
    """X, residual, weight; dy, dtotal."""
    x, residual, dy, dtotal = (torch.randn(rows, width, device="cuda") for _ in range(4))
    weight = 1 + 0.1 * torch.randn(width, device="cuda")
    return Inputs((x.to(BF16), residual.to(stream), weight.to(BF16)), (dy.to(BF16), dtotal.to(stream)))


def exact(inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(y, total) and (dx, dresidual, dweight) in float64, from the total as it is stored."""
    x, residual, weight = (leaf.detach() for leaf in inputs.leaves)
    total = (x.float() + residual.float()).to(residual.dtype).double()
    dy, dtotal, w = inputs.grads[0].double(), inputs.grads[1].double(), weight.double()
    rstd = (total.square().mean(-1, keepdim=True) + EPS).rsqrt()
    g, normed = dy * w, total * rstd
    dx = dtotal + rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return (normed * w, total), (dx, dx, (dy * normed).sum(0))


def contest(rows: int, width: int, stream: torch.dtype) -> Contest:
    """The operation on one shape."""
    size = stream.itemsize
    statistics = 4 * rows + 2 * width
    forward = (4 + 2 * size) * rows * width + statistics
    backward = (2 + 3 * size + (2 if size > 2 else 0)) * rows * width + statistics + 2 * width
    name = f"{rows} x {width} {'bf16' if size == 2 else 'fp32'} stream"
    spared = {"liger": (size - 2) * rows * width}  # rounds the total to the type of x
    return Contest(name, forward, backward, lambda: draw(rows, width, stream), exact, spared)


def contenders() -> dict[str, Callable[[], Operation]]:
    """Everyone who adds and normalises. Liger rounds the total to the type of x."""

    def quack() -> Operation:
        rmsnorm = importlib.import_module("quack.rmsnorm").rmsnorm
        return lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)

    def liger() -> Operation:
        function = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
        return lambda x, residual, weight: function.apply(x, residual, weight, EPS, 0.0, "llama", False)

    return {
        "composer": lambda: lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS),
        "quack": quack,
        "liger": liger,
        "torch.compile": lambda: compiled(_in_torch),
        "torch": lambda: _in_torch,
    }


def _in_torch(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total.to(x.dtype), weight.shape, weight, EPS), total


def main() -> None:
    """Run from the command line."""
    with session("add_rms_norm", __doc__) as run:
        for stream in STREAMS:
            if run.options.tune:
                for count, width in QUICK if run.options.quick else TUNED:
                    run.add(tune_norm(count, width, run, stream))
            else:
                for count, width in QUICK[:2] if run.options.quick else SHAPES:
                    run.add(compare(contest(count, width, stream), run.chosen(contenders()), run.limits.copy))
        if not run.options.tune:
            run.add_host_times(host_times(contest(16, 4096, BF16), run.chosen(contenders())))


if __name__ == "__main__":
    main()
