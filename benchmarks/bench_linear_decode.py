"""Time `linear_decode` beside its peers: ``python benchmarks/bench_linear_decode.py --output results.json``.

The ceiling is the rate at which this GPU reads memory, the bytes are those of the matrix. A case is what a model's
block asks for: a norm before, a gate or a residual addition after. The peers compute the same with a product by cuBLAS,
once with our kernels around it and once as torch.compile fuses it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from contest import compiled
from session import Session, session
from timing import Call, Row, contend, host_seconds, relative_error, set_count, tune
from torch import Tensor

from composer_kernels._linear_decode_rows import (
    RowsLaunch,
    default_rows_launch,
    launch_rows,
    padded,
)
from composer_kernels.linear_decode import (
    Launch,
    default_launch,
    launch_row,
    linear_decode,
    linear_decode_reference,
)
from composer_kernels.overlap import Overlap, can_overlap
from composer_kernels.rms_norm import rms_norm
from composer_kernels.swiglu import swiglu

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Rows, outputs and inputs, and what goes with the product."""

    rows: int
    outputs: int
    inputs: int
    norm: bool = False
    gated: bool = False

    def __str__(self) -> str:
        around = "norm, gate" if self.gated else "norm" if self.norm else "add"
        return f"{self.rows} rows, {self.outputs} x {self.inputs}, {around}"

    @property
    def bytes(self) -> int:
        """Of the matrix."""
        return 2 * self.outputs * self.inputs * (2 if self.gated else 1)


QUICK = [
    Shape(1, 3072, 2048, norm=True),
    Shape(1, 2048, 2048),
    Shape(1, 8192, 2048, norm=True, gated=True),
    Shape(1, 2048, 8192),
    Shape(1, 128_256, 2048, norm=True),
]
SHAPES = [
    *QUICK,
    *(dataclasses.replace(shape, rows=rows) for rows in (2, 8, 16, 32, 64) for shape in QUICK),
    Shape(1, 5120, 3072, norm=True),
    Shape(1, 8192, 3072, norm=True, gated=True),
    Shape(1, 3072, 8192),
    Shape(1, 14336, 4096, norm=True, gated=True),
    Shape(1, 4096, 14336),
]

TUNED_ROWS = (1, 2, 8, 16, 32, 64)
"""Rows with which ``--tune`` times the quick shapes; ``--only`` chooses some, as in `8 rows`."""

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""x, weight, and the norm's weight or the residual."""


def draw(shape: Shape) -> Inputs:
    """Random inputs; the weights such that results are about 1."""
    x, residual = (torch.randn(shape.rows, width, device="cuda", dtype=BF16) for width in (shape.inputs, shape.outputs))
    lines = shape.outputs * (2 if shape.gated else 1)
    weight = torch.randn(lines, shape.inputs, device="cuda", dtype=BF16) * shape.inputs**-0.5
    return x, weight, torch.ones_like(x[0]) if shape.norm else None, None if shape.norm else residual


def contenders(shape: Shape) -> dict[str, Callable[[Inputs], Tensor]]:
    """Everyone who multiplies."""

    def ours(inputs: Inputs, overlap: Overlap = "none") -> Tensor:
        x, weight, norm, residual = inputs
        return linear_decode(x, weight, norm_weight=norm, residual=residual, gated=shape.gated, overlap=overlap)

    def cublas(inputs: Inputs) -> Tensor:
        x, weight, norm, residual = inputs
        y = F.linear(x if norm is None else rms_norm(x, norm), weight)
        y = swiglu(y) if shape.gated else y
        return y if residual is None else y + residual

    def written_down(inputs: Inputs) -> Tensor:
        x, weight, norm, residual = inputs
        return linear_decode_reference(x, weight, norm_weight=norm, residual=residual, gated=shape.gated)

    overlapping = functools.partial(ours, overlap="tail")
    peers = {"cublas + ours": cublas, "torch.compile": compiled(written_down)}
    return {"composer": ours, "composer overlap": overlapping, **peers}


def compare(shape: Shape, run: Session) -> Iterator[Row]:
    """Time all contenders on one shape."""
    sets = [draw(shape) for _ in range(set_count(shape.bytes))]
    x, weight, *others = sets[0]
    norm, residual = (None if tensor is None else tensor.double() for tensor in others)
    exact = linear_decode_reference(x.double(), weight.double(), norm_weight=norm, residual=residual, gated=shape.gated)
    for name, multiply in run.chosen(contenders(shape)).items():
        try:
            error = relative_error(multiply(sets[0]), exact)
        except Exception as failure:  # an absent peer must not end the comparison
            yield Row(str(shape), name, shape.bytes, note=f"{type(failure).__name__}: {failure}"[:160])
            continue

        def make(index: int, multiply: Callable[[Inputs], Tensor] = multiply) -> Call:
            return functools.partial(multiply, sets[index])

        yield contend(str(shape), name, shape.bytes, run.limits.read, make, error=error)


def overlap_here() -> Overlap:
    """What a decoding step uses on this GPU."""
    return "tail" if can_overlap(torch.cuda.current_device()) else "none"


def launches(shape: Shape) -> Iterator[Launch]:
    """Launches of one row worth timing: they give a thread 16 to 64 elements of a block, which are 2 to 8 accesses."""
    for outputs, block, warps in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024, 2048, 4096, 8192), (2, 4, 8, 16)):
        elements = outputs * block * (2 if shape.gated else 1) // (32 * warps)
        if elements in (16, 32, 64) and block <= min(8192, shape.inputs):
            yield Launch(outputs, block, warps, overlap_here())


def rows_launches(shape: Shape) -> Iterator[RowsLaunch]:
    """Launches of several rows worth timing: 24 to 100 KB of blocks in a program, and registers for its sums."""
    lines, halves = padded(shape.rows), 2 if shape.gated else 1
    for outputs, block, warps in itertools.product((16, 32, 64), (32, 64), (4, 8)):
        kilobytes = warps * block * (outputs * halves + lines) * 2 / 1024
        stages = 1 + min(5, int(96 / kilobytes))
        fits = stages > 2 and kilobytes * (stages - 1) >= 24
        if fits and outputs * halves * lines <= 4096 and shape.outputs // outputs >= 64:
            yield RowsLaunch(outputs, block, stages, warps, overlap_here())


def refine[L: (Launch, RowsLaunch)](best: L) -> Iterator[L]:
    """The best one with other overlaps."""
    for overlap in get_args(Overlap) if can_overlap(torch.cuda.current_device()) else ():
        yield dataclasses.replace(best, overlap=overlap)


def tune_linear(shape: Shape, limit: float) -> list[Row]:
    """Time launches, best first."""
    sets = [draw(shape) for _ in range(set_count(shape.bytes))]

    def call(index: int, launch: Launch) -> list[Tensor | None]:
        x, weight, norm, residual = sets[index]
        return [launch_row(x, weight, norm, 1e-5, residual, shape.gated, None, launch)]

    def call_rows(index: int, launch: RowsLaunch) -> list[Tensor | None]:
        x, weight, norm, residual = sets[index]
        return [launch_rows(x, weight, norm, 1e-5, residual, shape.gated, None, launch)]

    if shape.rows == 1:
        default = default_launch(shape.outputs, shape.inputs, shape.gated)
        return tune(str(shape), shape.bytes, limit, call, default, launches(shape), refine)
    default_rows = default_rows_launch(shape.rows, shape.outputs, shape.gated, BF16)
    return tune(str(shape), shape.bytes, limit, call_rows, default_rows, rows_launches(shape), refine)


def host_times() -> dict[str, dict[str, float]]:
    """The host's microseconds a call on a tiny shape."""
    shape = Shape(1, 64, 64, norm=True)
    inputs, contender = draw(shape), contenders(shape)
    return {
        name: {"call": 1e6 * host_seconds(functools.partial(contender[name], inputs))}
        for name in ("composer", "cublas + ours")
    }


def main() -> None:
    """Run from the command line."""
    with session("linear_decode", __doc__) as run, torch.no_grad():
        shapes = QUICK if run.options.quick else SHAPES
        if run.options.tune:
            by_rows = {f"{n} rows": [dataclasses.replace(shape, rows=n) for shape in QUICK] for n in TUNED_ROWS}
            shapes = [shape for group in run.chosen(by_rows).values() for shape in group]
        for shape in shapes:
            if run.options.tune:
                run.add(tune_linear(shape, run.limits.read))
            else:
                run.add(compare(shape, run))
            torch.cuda.empty_cache()
        if not run.options.tune:
            run.add_host_times(host_times())


if __name__ == "__main__":
    main()
