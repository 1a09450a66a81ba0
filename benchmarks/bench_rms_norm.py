"""Time `rms_norm` beside its peers: ``python benchmarks/bench_rms_norm.py --output results.json``.

Bytes a case must move: forward x and y, backward dy, x and dx, each with rstd and the weight; parts of the weight's
gradient count as our overhead.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from contest import Contest, Inputs, Operation, compare, compiled, host_times
from session import Session, session
from timing import Row, set_count, tune
from torch import Tensor

from composer_kernels import _norm
from composer_kernels._norm import Launch
from composer_kernels.rms_norm import rms_norm

EPS = 1e-5
BF16 = torch.bfloat16
QUICK = [(8192, 2048), (8192, 4096), (8192, 8192)]
SHAPES = [*QUICK, (8192, 1024), (8192, 1536), (8192, 3072), (8192, 5120), (32768, 4096), (4096, 16384), (2048, 32768)]
TUNED = [*QUICK, (8192, 1536), (4096, 16384)]


def draw(rows: int, width: int) -> Inputs:
    """X, weight and dy in bfloat16."""
    x, dy = (torch.randn(rows, width, device="cuda", dtype=BF16) for _ in range(2))
    return Inputs((x, (1 + 0.1 * torch.randn(width, device="cuda")).to(BF16)), (dy,))


def exact(inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(y,) and (dx, dweight) in float64."""
    x, weight, dy = (tensor.detach().double() for tensor in (*inputs.leaves, *inputs.grads))
    rstd = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    g, normed = dy * weight, x * rstd
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return (normed * weight,), (dx, (dy * normed).sum(0))


def contest(rows: int, width: int) -> Contest:
    """The operation on one shape."""
    statistics, tensor = 4 * rows + 2 * width, 2 * rows * width
    sizes = (2 * tensor + statistics, 3 * tensor + statistics + 2 * width)
    return Contest(f"{rows} x {width} bf16", *sizes, lambda: draw(rows, width), exact)


def contenders(width: int) -> dict[str, Callable[[], Operation]]:
    """Everyone who normalises."""
    main_grad = torch.zeros(width, device="cuda")

    def quack() -> Operation:
        rmsnorm = importlib.import_module("quack.rmsnorm").rmsnorm
        return lambda x, weight: rmsnorm(x, weight, eps=EPS)

    def liger() -> Operation:
        function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        return lambda x, weight: function.apply(x, weight, EPS, 0.0, "llama", True)

    def transformer_engine() -> Operation:
        dtype = importlib.import_module("transformer_engine.pytorch.constants").TE_DType[BF16]
        kernels = importlib.import_module("transformer_engine_torch")  # which the line above loaded
        return lambda x, weight: _TransformerEngine.apply(x, weight, kernels, dtype)

    return {
        "composer": lambda: lambda x, weight: rms_norm(x, weight, EPS),
        "composer, main_grad": lambda: lambda x, weight: rms_norm(x, weight, EPS, main_grad=main_grad),
        "quack": quack,
        "liger": liger,
        "te": transformer_engine,
        "torch.compile": lambda: compiled(_in_torch),
        "torch": lambda: _in_torch,
    }


class _TransformerEngine(torch.autograd.Function):
    """TransformerEngine's two kernels without its module, which frees what it saved after one backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernels: Any, dtype: Any) -> Tensor:
        y, _, rstd = kernels.rmsnorm_fwd(x, weight, EPS, None, None, dtype, 0, False)
        ctx.save_for_backward(x, rstd, weight)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dweight = ctx.kernels.rmsnorm_bwd(dy, *ctx.saved_tensors, 0, False)
        return dx, dweight, None, None


def _in_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def forward_launches(width: int) -> Iterator[Launch]:
    """Launches worth timing for the forward kernel: 8 to 64 elements a thread, rows whole or, where wide, in parts."""
    whole = 1 << (width - 1).bit_length()
    for block in {whole, 8192} if width > 8192 else {whole}:
        for rows, warps in itertools.product((1, 2, 4, 8), (2, 4, 8, 16, 32)):
            if 8 <= rows * block / warps / 32 <= 64:
                yield Launch(block, rows, warps)


def backward_launches(width: int) -> Iterator[Launch]:
    """Launches worth timing for the backward kernel: 8 to 32 elements a thread, up to 1024 threads a multiprocessor."""
    whole = 1 << (width - 1).bit_length()
    for block in {whole, 4096, 8192} if width > 8192 else {whole}:
        depths = (1, 2) if block >= width else (1,)
        for rows, warps, programs, stages in itertools.product((1, 2, 4, 8), (4, 8, 16, 32), (1, 2, 3, 4), depths):
            if 8 <= rows * block / warps / 32 <= 32 and programs * warps <= 32:
                yield Launch(block, rows, warps, stages, programs)


def backward_variants(best: Launch) -> Iterator[Launch]:
    """The best with each of its lesser settings changed."""
    yield replace(best, overlap=not best.overlap)
    yield replace(best, pin=not best.pin)
    for stages in (1, 2, 3, 4):
        yield replace(best, stages=stages)
        yield replace(best, stages=stages, pin=not best.pin)


def tune_norm(rows: int, width: int, run: Session, stream: torch.dtype | None = None) -> Iterator[Row]:
    """Time launches of both kernels, best first; those of `add_rms_norm` where `stream` is a residual's type."""
    sets = [draw(rows, width) for _ in range(set_count(4 * rows * width))]
    xs, weight = [inputs.leaves[0].detach() for inputs in sets], sets[0].leaves[1].detach()
    residuals, of_stream = ([_like_stream(rows, width, stream) for _ in sets] for _ in range(2))
    _, _, rstd = _norm.launch_forward(xs[0], residuals[0], weight, EPS, False, BF16)
    copy_dtype = BF16 if stream == torch.float32 else None
    kind = "" if stream is None else f", {str(stream).removeprefix('torch.')} stream"

    def forward(index: int, launch: Launch) -> Sequence[Tensor | None]:
        return _norm.launch_forward(xs[index], residuals[index], weight, EPS, False, BF16, launch)

    def backward(index: int, launch: Launch) -> Sequence[Tensor | None]:
        residual = residuals[index]
        total = xs[index] if residual is None else residual
        settings = (rstd, False, True, None, copy_dtype, launch)
        return _norm.launch_backward(sets[index].grads[0], of_stream[index], total, weight, *settings)

    size, elements = 0 if stream is None else stream.itemsize, rows * width
    moved = {
        "forward": (4 + 2 * size) * elements,
        "backward": (6 if stream is None else 2 + 3 * size + (0 if copy_dtype is None else 2)) * elements,
    }
    default = _norm.backward_launch(width, 4 if stream is None else 2 + 2 * size)
    cases = {
        "forward": (forward, _norm.forward_launch(width), forward_launches(width), lambda best: ()),
        "backward": (backward, default, backward_launches(width), backward_variants),
    }
    for name, how in run.chosen(cases).items():
        yield from tune(f"{name} {rows} x {width}{kind}", moved[name], run.limits.copy, *how)


def _like_stream(rows: int, width: int, stream: torch.dtype | None) -> Tensor | None:
    return None if stream is None else torch.randn(rows, width, device="cuda").to(stream)


def main() -> None:
    """Run from the command line."""
    with session("rms_norm", __doc__) as run:
        if run.options.tune:
            for count, width in QUICK if run.options.quick else TUNED:
                run.add(tune_norm(count, width, run))
            return
        for count, width in QUICK if run.options.quick else SHAPES:
            run.add(compare(contest(count, width), run.chosen(contenders(width)), run.limits.copy))
        run.add_host_times(host_times(contest(16, 4096), run.chosen(contenders(4096))))


if __name__ == "__main__":
    main()
