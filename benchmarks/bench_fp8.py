"""Time 8-bit matrix products and what makes 8-bit numbers: ``python benchmarks/bench_fp8.py --output results.json``.

Products are those of a projection's training step: forward, of the input's gradient and of the weight's. The ceiling
is the rate of a large bfloat16 product: a fraction of 2 is what the data sheet of a GPU promises for 8 bits. Errors are
those of the whole way from 16 bits to the result. Of the kernels, which differ from their formulas in PyTorch by the
error shown, the ceiling is the copy.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from session import session
from timing import Call, Row, contend, host_seconds, measure, relative_error, set_count, tune
from torch import Tensor

from composer_kernels import fp8
from composer_kernels.fp8_swiglu import (
    quantised_swiglu,
    quantised_swiglu_gradient,
    quantised_swiglu_gradient_reference,
    quantised_swiglu_reference,
)
from composer_kernels.wgrad_accumulate import wgrad_accumulate

swiglu = importlib.import_module("composer_kernels.swiglu")  # the package's attribute of that name is the function
BF16 = torch.bfloat16
CHECKED = 512
"""Rows of a product that are compared with float64."""


@dataclass(frozen=True)
class Shape:
    """Rows, outputs and inputs of a linear layer."""

    rows: int
    outputs: int
    inputs: int

    def products(self) -> dict[str, tuple[int, int, int]]:
        """Rows, columns and terms of each of the three products."""
        r, n, k = self.rows, self.outputs, self.inputs
        return {"forward": (r, n, k), "dX": (r, k, n), "dW": (n, k, r)}


QUICK = [Shape(16_384, 3072, 2048), Shape(16_384, 2048, 2048), Shape(16_384, 16_384, 2048), Shape(16_384, 2048, 8192)]
"""Those of the 1b shape."""
SHAPES = [*QUICK, Shape(8192, 6144, 4096), Shape(8192, 28_672, 4096), Shape(8192, 4096, 14_336)]

Product = Callable[[Tensor, Tensor], Callable[[], Tensor]]
"""From A (M, K) and B (N, K) in 16 bits to what computes A · Bᵀ, once they are prepared."""


def sixteen_bits(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """PyTorch's product."""
    return lambda: torch.mm(a, b.t())


def eight_bits(*, fast: bool, whole: bool, out_dtype: torch.dtype = BF16) -> Product:
    """Ours, with operands quantised before."""

    def prepare(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
        def one_scale(x: Tensor) -> fp8.Rows:
            return fp8.transpose(fp8.quantise(x.t().contiguous()))

        eight_a, eight_b = map(one_scale if whole else fp8.quantise, (a, b))
        return functools.partial(fp8.matmul, eight_a, eight_b, out_dtype, fast=fast, whole=whole)

    return prepare


def sixteen_bits_added(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """Ours in 16 bits, added to an fp32 accumulator in the product itself."""
    x, dy, total = b.t().contiguous(), a.t().contiguous(), torch.zeros(len(a), len(b), device=a.device)

    def call() -> Tensor:
        wgrad_accumulate(x, dy, total)
        return total

    return call


def eight_bits_added(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """An 8-bit product, added to an fp32 accumulator by a kernel of its own."""
    product = eight_bits(fast=False, whole=True)(a, b)
    total = torch.zeros(len(a), len(b), device=a.device)
    return lambda: total.add_(product())


CONTENDERS: dict[str, Product] = {
    "bf16": sixteen_bits,
    "fp8 rows, fast": eight_bits(fast=True, whole=False),
    "fp8 rows": eight_bits(fast=False, whole=False),
    "fp8 one, fast": eight_bits(fast=True, whole=True),
    "fp8 one": eight_bits(fast=False, whole=True),
    "fp8 one, fp32": eight_bits(fast=False, whole=True, out_dtype=torch.float32),
}
ADDING: dict[str, Product] = {"bf16, added": sixteen_bits_added, "fp8 one, added": eight_bits_added}


def products(shape: Shape, contenders: dict[str, Product], gemm_rate: float, *, quick: bool) -> Iterator[Row]:
    """Time the three products of a layer."""
    for name, (m, n, k) in shape.products().items():
        count = set_count(m * k + n * k + 2 * m * n)
        sets = [[torch.randn(size, k, device="cuda", dtype=BF16) for size in (m, n)] for _ in range(count)]
        exact = sets[0][0][:CHECKED].double() @ sets[0][1].double().t()
        for label, prepare in contenders.items():
            row = Row(f"{name} {m} x {n} x {k}", label, 2 * (m * k + n * k + m * n))
            if label in ADDING and name != "dW":
                continue
            try:
                calls = [prepare(a, b) for a, b in sets]
                row.error = relative_error(calls[0]()[:CHECKED], exact)  # accumulators are 0 before the first call
                row.graph = measure(calls, graph=True, seconds=0.04 if quick else 0.15)
                row.fraction = 2 * m * n * k / gemm_rate / row.graph
            except Exception as failure:  # a product that this GPU or this PyTorch lacks
                row.note = f"{type(failure).__name__}: {failure}"[:160]
            yield row


def kernels(rows: int, width: int, limit: float) -> Iterator[Row]:
    """Time `quantise` and `transpose`."""
    size = rows * width
    sets = [torch.randn(rows, width, device="cuda", dtype=BF16) for _ in range(set_count(2 * size))]
    quantised = [fp8.quantise(x) for x in sets]

    def quantise(index: int) -> Call:
        return functools.partial(fp8.quantise, sets[index])

    def transpose(index: int) -> Call:
        return functools.partial(fp8.transpose, quantised[index])

    wrong = relative_error(fp8.dequantise(quantised[0]), fp8.dequantise(fp8.quantise_reference(sets[0])))
    turned = relative_error(fp8.dequantise(fp8.transpose(quantised[0])).t()[:rows], fp8.dequantise(quantised[0]))
    name = f"{rows} x {width}"
    yield contend(f"quantise {name}", "composer", 3 * size, limit, quantise, error=wrong)
    yield contend(f"transpose {name}", "composer", 2 * size, limit, transpose, error=turned)


def gates(rows: int, width: int, limit: float) -> Iterator[Row]:
    """Time SwiGLU and its gradient in 8 bits, beside the passes over 16 bits that they replace.

    Errors are those against the formula in PyTorch, with its one rounding to 8 bits.
    """
    size = rows * width
    sets = [torch.randn(rows, 3 * width, device="cuda", dtype=BF16).split((2 * width, width), 1) for _ in range(2)]
    sets = [(h.contiguous(), dy.contiguous()) for h, dy in sets]

    def forward(index: int) -> Callable[[], Any]:
        return functools.partial(quantised_swiglu, sets[index % 2][0])

    def backward(index: int) -> Callable[[], Any]:
        return functools.partial(quantised_swiglu_gradient, sets[index % 2][1], sets[index % 2][0])

    def two_passes(index: int) -> Callable[[], fp8.Rows]:
        return lambda: fp8.quantise(swiglu.swiglu(sets[index % 2][0]))

    def two_passes_back(index: int) -> Callable[[], fp8.Rows]:
        h, dy = sets[index % 2]
        return lambda: fp8.quantise(swiglu.launch_backward(dy, h, None, None)[0])

    h, dy = (tensor[:CHECKED] for tensor in sets[0])
    exact = fp8.dequantise(quantised_swiglu_reference(h).rows)
    exact_back = fp8.dequantise(quantised_swiglu_gradient_reference(dy, h).rows)

    cases: dict[str, tuple[int, Tensor, dict[str, Callable[[int], Callable[[], Any]]]]] = {
        "swiglu": (5, exact, {"composer": forward, "two passes": two_passes}),
        "swiglu gradient": (8, exact_back, {"composer": backward, "two passes": two_passes_back}),
    }
    for case, (each, wanted, contenders) in cases.items():
        for name, make in contenders.items():
            row = Row(f"{case} {rows} x {width}", name, each * size)
            try:
                result = make(0)()
                error = relative_error(fp8.dequantise(getattr(result, "rows", result))[:CHECKED], wanted)
            except Exception as failure:
                row.note = f"{type(failure).__name__}: {failure}"[:160]
                yield row
                continue
            yield contend(row.case, name, row.bytes, limit, make, error=error)


def host_times() -> dict[str, dict[str, float]]:
    """The host's microseconds a call on a tiny shape."""
    x = torch.randn(16, 64, device="cuda", dtype=BF16)
    eight = fp8.quantise(x)
    calls = {
        "quantise": functools.partial(fp8.quantise, x),
        "transpose": functools.partial(fp8.transpose, eight),
        "matmul": functools.partial(fp8.matmul, eight, eight),
    }
    return {"composer": {name: 1e6 * host_seconds(call) for name, call in calls.items()}}


def tune_kernels(rows: int, width: int, limit: float) -> list[Row]:
    """Time launches of both kernels, best first."""
    size = rows * width
    sets = [torch.randn(rows, width, device="cuda", dtype=BF16) for _ in range(set_count(2 * size))]
    quantised = [fp8.quantise(x) for x in sets]

    def quantise(index: int, launch: fp8.Launch) -> Sequence[Tensor]:
        return fp8.launch_quantise(sets[index], launch)

    def transpose(index: int, launch: fp8.Launch) -> Sequence[Tensor]:
        return fp8.launch_transpose(quantised[index], launch)

    default = fp8.quantise_launch(width)
    wholes = [
        fp8.Launch(default.block, count, warps)
        for count, warps in itertools.product((1, 2, 4, 8), (2, 4, 8, 16))
        if 8 <= count * default.block / warps / 32 <= 64
    ]
    tiles = [fp8.Launch(*tile) for tile in itertools.product((32, 64, 128, 256), (64, 128, 256), (4, 8))]
    return tune(f"quantise {rows} x {width}", 3 * size, limit, quantise, default, wholes, show_best=3) + tune(
        f"transpose {rows} x {width}", 2 * size, limit, transpose, fp8.TRANSPOSE_LAUNCH, tiles, show_best=4
    )


def main() -> None:
    """Run from the command line."""
    with session("fp8", __doc__, gemm=True) as run:
        shapes = QUICK if run.options.quick else SHAPES
        sizes = list(dict.fromkeys((each.rows, width) for each in shapes for width in (each.inputs, each.outputs)))
        if run.options.tune:
            for rows, width in (min(sizes), max(sizes)):
                run.add(tune_kernels(rows, width, run.limits.copy))
            return
        contenders = run.chosen(CONTENDERS | ADDING)
        for shape in shapes:
            run.add(products(shape, contenders, run.limits.gemm or 0.0, quick=run.options.quick))
        for rows, width in sizes:
            run.add(kernels(rows, width, run.limits.copy))
        for rows, width in dict.fromkeys((each.rows, each.inputs) for each in shapes if each.inputs > each.outputs):
            run.add(gates(rows, width, run.limits.copy))
        run.add_host_times(host_times())


if __name__ == "__main__":
    main()
