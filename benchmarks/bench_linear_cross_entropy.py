"""Time `linear_cross_entropy` beside its peers: ``python benchmarks/bench_linear_cross_entropy.py --output out.json``.

A call is forward and backward of the mean loss, gradients by hidden and weight. Its work is that of three matrix
products, 6 · rows · features · columns FLOPs, whatever a contender really does; the ceiling is the rate of a square
product in the same run. "products alone" are the three of them with nothing else, which nobody beats who uses cuBLAS.
Times in a graph are those of all contenders in turns, as clocks change by more than these differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import contest
import torch
import torch.nn.functional as F
from session import Session, session
from timing import Call, Ceilings, Row, contend, in_turns, measure, relative_error
from torch import Tensor

from composer_kernels._linear_loss_chunks import default_chunk_rows
from composer_kernels.cross_entropy import cross_entropy_reference
from composer_kernels.linear_cross_entropy import linear_cross_entropy

BF16 = torch.bfloat16
QUICK = [(4096, 4096, 128256), (16384, 4096, 128256)]  # rows, features, columns
SHAPES = [*QUICK, (16384, 2048, 128256), (16384, 2048, 50257), (16384, 4096, 16032)]
TERMS = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
Gradients = Callable[["Inputs"], Any]


@dataclass
class Inputs:
    """One set of tensors; hidden and weight want gradients, main_grad is fp32."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    main_grad: Tensor

    @classmethod
    def draw(cls, rows: int, features: int, columns: int) -> Inputs:
        """Draw hidden (rows, features) and weight (columns, features) such that logits have unit variance."""
        hidden = torch.empty(rows, features, device="cuda", dtype=BF16).normal_()
        weight = torch.empty(columns, features, device="cuda", dtype=BF16).normal_(std=features**-0.5)
        main_grad = torch.zeros(columns, features, device="cuda")
        target = torch.randint(columns, (rows,), device="cuda")
        return cls(hidden.requires_grad_(), weight.requires_grad_(), target, main_grad)


def by_autograd(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Gradients:
    """From a loss the gradients by hidden and weight."""
    return lambda x: torch.autograd.grad(loss(x.hidden, x.weight, x.target), (x.hidden, x.weight))


def contenders(rows: int, features: int) -> dict[str, Callable[[], Gradients]]:
    """Everyone who has this loss; imports happen when called, as peers may be absent."""
    # quack 0.6 cannot tell rows from columns where a chunk has as many rows as hidden has features; 4096 is its own
    # choice, and twice the features, where there are as many rows, means fewer chunks.
    chunk = 4096 if features != 4096 else 8192 if rows >= 8192 else 2048

    def into_main_grad(x: Inputs) -> Any:
        loss = linear_cross_entropy(x.hidden, x.weight, x.target, main_grad=x.main_grad)
        return torch.autograd.grad(loss, (x.hidden, x.weight), allow_unused=True)

    def quack(scaled_exp: bool | None) -> Gradients:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        # Without the search for the best product kernels, which takes minutes and concerns the chunked form alone.
        options = {"use_scaled_exp": scaled_exp, "tuned": False, "chunk_size": chunk if scaled_exp is None else 4096}
        return by_autograd(lambda h, w, y: chunked_linear_cross_entropy(h, w, y, **options))

    def liger() -> Gradients:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        return by_autograd(lambda h, w, y: LigerFusedLinearCrossEntropyFunction.apply(h, w, y)[0])

    def liger_sm90() -> Gradients:
        from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
            LigerFusedLinearCrossEntropySM90Function,
        )

        def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            result = LigerFusedLinearCrossEntropySM90Function.apply(h, w, y)
            return result[0] if isinstance(result, tuple) else result

        return by_autograd(loss)

    def cut() -> Gradients:
        from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

        return by_autograd(cut_cross_entropy)

    def in_torch(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    def compiled() -> Gradients:
        return by_autograd(contest.compiled(in_torch))

    return {
        "composer main_grad": lambda: into_main_grad,
        "composer": lambda: by_autograd(linear_cross_entropy),
        "composer all terms": lambda: by_autograd(lambda h, w, y: linear_cross_entropy(h, w, y, **TERMS)),
        "quack": lambda: quack(None),
        "quack chunked": lambda: quack(False),
        "liger": liger,
        "liger sm90": liger_sm90,
        "cut (apple)": cut,
        "torch.compile": compiled,
        "torch": lambda: by_autograd(in_torch),
        "products alone": lambda: products_alone,
    }


def products_alone(x: Inputs) -> Tensor:
    """The three products, in the chunks that `linear_cross_entropy` takes with `main_grad`."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    result = torch.empty_like(hidden)
    step = default_chunk_rows(len(hidden), hidden.shape[1], len(weight), BF16.itemsize)
    buffer = hidden.new_empty(step, -(-len(weight) // 16) * 16)[:, : len(weight)]
    for start in range(0, len(hidden), step):
        part = hidden[start : start + step]
        logits = buffer[: len(part)]
        torch.mm(part, weight.t(), out=logits)
        torch.mm(logits, weight, out=result[start : start + step])
        torch.addmm(x.main_grad, logits.t(), part, out_dtype=torch.float32, out=x.main_grad)
    return result


def compare(rows: int, features: int, columns: int, run: Session, everyone: bool) -> Iterator[Row]:
    """Time all contenders on one shape; but for the first shape only those who come close."""
    assert run.limits.gemm
    case = f"{rows} x {features} x {columns} bf16"
    work = 6.0 * rows * features * columns
    near = ("composer", "quack", "liger sm90", "products")
    sets = [Inputs.draw(rows, features, columns) for _ in range(2)]
    timed: dict[str, tuple[Row, list[Call]]] = {}
    for name, load in run.chosen(contenders(rows, features)).items():
        if not (everyone or name.startswith(near)):
            continue
        try:
            gradients, error = load(), None
            if name != "products alone":
                error = _error(gradients, features, columns, TERMS if "all terms" in name else {})
        except Exception as failure:
            yield Row(case, name, 0, note=f"{type(failure).__name__}: {failure}"[:160])
            continue

        def make(index: int, by: Gradients = gradients) -> Call:
            return lambda: by(sets[index % 2])

        # Weight and logits of one call are far larger than the cache: two sets are enough.
        row = contend(case, name, 8.0 * rows * columns, run.limits.gemm, make, work=work, error=error)
        torch.cuda.empty_cache()
        if row.graph is None:
            yield row
        else:
            timed[name] = row, [make(index) for index in range(2)]
    seconds = in_turns({name: calls for name, (_, calls) in timed.items()})
    for name, (row, _) in timed.items():
        row.graph, row.fraction = seconds[name], work / run.limits.gemm / seconds[name]
        yield row


def _error(run: Gradients, features: int, columns: int, terms: dict[str, float]) -> float:
    """The larger one of the two gradients on few rows, against products in float64."""
    x = Inputs.draw(256, features, columns)
    hidden, weight = (y.detach().double().requires_grad_() for y in (x.hidden, x.weight))
    loss = cross_entropy_reference(F.linear(hidden, weight), x.target, **terms)
    exact = torch.autograd.grad(loss, (hidden, weight))
    results = run(x)
    by_weight = x.main_grad if results[1] is None else results[1]
    return max(relative_error(results[0], exact[0]), relative_error(by_weight, exact[1]))


def tune(rows: int, features: int, columns: int, limits: Ceilings) -> Iterator[Row]:
    """Time chunk sizes, and the three products of a chunk alone."""
    assert limits.gemm
    case = f"{rows} x {features} x {columns}"
    x = Inputs.draw(rows, features, columns)
    hidden, weight = x.hidden.detach(), x.weight.detach()
    for step in sorted({1024, 1536, 2048, default_chunk_rows(rows, features, columns, 2), 4096, 8192}):
        for name, main_grad in (("main_grad", x.main_grad), ("no main_grad", None)):

            def call(step: int = step, main_grad: Tensor | None = main_grad) -> Any:
                loss = linear_cross_entropy(x.hidden, x.weight, x.target, main_grad=main_grad, chunk_rows=step)
                return torch.autograd.grad(loss, (x.hidden, x.weight), allow_unused=True)

            yield _timed(f"{case} chunk {step}", name, 6.0 * rows * features * columns, call, limits.gemm)
        part = hidden[:step]
        logits = torch.empty(len(part), -(-columns // 16) * 16, device="cuda", dtype=BF16)[:, :columns].normal_()
        products: dict[str, Call] = {
            "logits": lambda part=part, logits=logits: torch.mm(part, weight.t(), out=logits),
            "dhidden": lambda logits=logits: torch.mm(logits, weight),
            "dweight bf16": lambda part=part, logits=logits: torch.mm(logits.t(), part),
            "dweight fp32": lambda part=part, logits=logits: torch.mm(logits.t(), part, out_dtype=torch.float32),
            "dweight fp32 +=": lambda part=part, logits=logits: torch.addmm(
                x.main_grad, logits.t(), part, out_dtype=torch.float32, out=x.main_grad
            ),
        }
        for name, product in products.items():
            yield _timed(
                f"product {len(part)} x {features} x {columns}",
                name,
                2.0 * logits.numel() * features,
                product,
                limits.gemm,
            )
        del logits, products
        torch.cuda.empty_cache()


def _timed(case: str, name: str, work: float, call: Call, limit: float) -> Row:
    row = Row(case, name, 0)
    try:
        row.graph = measure([call], graph=True, seconds=0.05)
        row.fraction = work / limit / row.graph
    except Exception as failure:
        row.note = f"{type(failure).__name__}: {failure}"[:160]
    return row


def main() -> None:
    """Run from the command line."""
    with session("linear_cross_entropy", __doc__, gemm=True) as run:
        if run.options.tune:
            for shape in [QUICK[1]] if run.options.quick else [QUICK[1], SHAPES[2], SHAPES[3]]:
                run.add(tune(*shape, run.limits))
        else:
            for place, shape in enumerate(QUICK if run.options.quick else SHAPES):
                run.add(compare(*shape, run, everyone=place == 0))


if __name__ == "__main__":
    main()
