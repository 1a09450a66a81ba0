"""Time `wgrad_accumulate` beside its peers: ``python benchmarks/bench_wgrad_accumulate.py --output results.json``.

The ceiling is the rate of a large bfloat16 product; notes compare with the plain product of the same shape, which
writes bfloat16 and adds to nothing. There is no launch to tune: cuBLAS chooses its kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from session import Session, session
from timing import Call, Row, contend, host_seconds, in_turns, relative_error, set_count
from torch import Tensor

from composer_kernels.wgrad_accumulate import wgrad_accumulate, wgrad_gemm_accum_fp32

BF16 = torch.bfloat16
PLAIN = "torch.mm, bf16"
Accumulate = Callable[[Tensor, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Shape:
    """Rows, outputs and inputs of a linear layer."""

    rows: int
    outputs: int
    inputs: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.outputs} x {self.inputs}"

    @property
    def work(self) -> int:
        """FLOPs."""
        return 2 * self.rows * self.outputs * self.inputs

    @property
    def bytes(self) -> int:
        """That must move: 16-bit operands, and an fp32 accumulator read and written."""
        return 2 * self.rows * (self.outputs + self.inputs) + 8 * self.outputs * self.inputs


QUICK = [Shape(8192, 3072, 2048), Shape(8192, 16384, 2048), Shape(8192, 4096, 14336)]
SHAPES = [
    *QUICK,
    Shape(8192, 2048, 2048),
    Shape(8192, 2048, 8192),
    Shape(8192, 6144, 4096),
    Shape(8192, 28672, 4096),
    Shape(4096, 128256, 4096),
    Shape(1024, 16384, 2048),
]


def draw(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """X, dY in bfloat16 and an accumulator in fp32."""
    x, dy = (torch.randn(shape.rows, width, device="cuda", dtype=BF16) for width in (shape.inputs, shape.outputs))
    return x, dy, torch.randn(shape.outputs, shape.inputs, device="cuda")


def contenders() -> dict[str, Callable[[], Accumulate]]:
    """Everyone who adds a weight's gradient to an accumulator; and the plain product, which does not."""

    def megatron_unfused(x: Tensor, dy: Tensor, main_grad: Tensor) -> None:
        main_grad.add_(dy.t().matmul(x))

    def apex() -> Accumulate:
        function: Accumulate = importlib.import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32
        return function

    def transformer_engine() -> Accumulate:
        gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions").general_gemm
        settings = {"layout": "NT", "grad": True, "accumulate": True, "out_dtype": torch.float32}
        return lambda x, dy, main_grad: gemm(x, dy, out=main_grad, **settings)

    return {
        PLAIN: lambda: lambda x, dy, main_grad: torch.mm(dy.t(), x),
        "composer": lambda: wgrad_accumulate,
        "te": transformer_engine,
        "apex": apex,
        "megatron unfused": lambda: megatron_unfused,
    }


def compare(shape: Shape, run: Session) -> list[Row]:
    """Time all contenders on one shape."""
    sets = [draw(shape) for _ in range(set_count(shape.bytes))]
    x, dy, start = (tensor.clone() for tensor in sets[0])  # whoever is timed adds to the accumulators of the sets
    gradient = dy.double().t() @ x.double()
    rows: dict[str, Row] = {}
    for name, load in run.chosen(contenders()).items():
        try:
            accumulate, result = load(), start.clone()
            product = accumulate(x, dy, result)
            done, wanted = (product, gradient) if name == PLAIN else (result, start.double() + gradient)
            error = relative_error(done, wanted)
        except Exception as failure:  # an absent peer must not end the comparison
            rows[name] = Row(str(shape), name, shape.bytes, note=f"{type(failure).__name__}: {failure}"[:160])
            continue

        def make(index: int, accumulate: Accumulate = accumulate) -> Call:
            return functools.partial(accumulate, *sets[index])

        rows[name] = contend(str(shape), name, shape.bytes, run.limits.gemm or 0.0, make, work=shape.work, error=error)
    timed = [name for name, row in rows.items() if row.graph]
    seconds = in_turns({name: [functools.partial(contenders()[name](), *each) for each in sets] for name in timed})
    for name in timed:
        row = rows[name]
        row.graph = seconds[name]
        row.fraction = shape.work / (run.limits.gemm or 1.0) / seconds[name]
        if PLAIN in seconds:
            row.note = f"{seconds[PLAIN] / seconds[name]:.3f} of the plain product, in turns"
    return list(rows.values())


def host_times() -> dict[str, dict[str, float]]:
    """The host's microseconds a call on a tiny shape."""
    x, dy, main_grad = draw(Shape(16, 64, 64))
    calls = {"composer": wgrad_accumulate, "composer, Megatron's name": wgrad_gemm_accum_fp32}
    return {
        name: {"call": 1e6 * host_seconds(functools.partial(call, x, dy, main_grad))} for name, call in calls.items()
    }


def main() -> None:
    """Run from the command line."""
    with session("wgrad_accumulate", __doc__, gemm=True) as run:
        if run.options.tune:
            print("wgrad_accumulate has nothing to tune: cuBLAS chooses its kernel")
            return
        for shape in QUICK if run.options.quick else SHAPES:
            run.add(compare(shape, run))
        run.add_host_times(host_times())


if __name__ == "__main__":
    main()
