"""Time `cross_entropy` beside its peers: ``python benchmarks/bench_cross_entropy.py --output results.json``.

A call is forward and backward of the mean loss. Bytes a logit that a case must move: 4 (16-bit) in one pass; 6 in two
passes, as a vocabulary split over processes needs; here one process has all of it, so that no collective runs. What
works in place leaves gradients where the next call finds its logits: other values, the same bytes.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import contest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from session import Session, session
from timing import Call, Row, compile_all, contend, host_seconds, measure, relative_error, set_count
from torch import Tensor

from composer_kernels import _cross_entropy as kernels
from composer_kernels._cross_entropy import Launch, LossTerms
from composer_kernels.cross_entropy import cross_entropy, cross_entropy_reference

BF16, FP32 = torch.bfloat16, torch.float32
QUICK = [(8192, 131072, BF16)]
SHAPES = [
    *QUICK,
    (8192, 128256, BF16),
    (8192, 50257, BF16),
    (16384, 32000, BF16),
    (4096, 262144, BF16),
    (4096, 128256, FP32),
]
TUNED = [SHAPES[0], *SHAPES[2:]]
TERMS = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
Gradient = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Inputs:
    """One set of tensors; the logits (rows, width) want a gradient."""

    logits: Tensor
    target: Tensor

    @classmethod
    def draw(cls, rows: int, width: int, dtype: torch.dtype) -> Inputs:
        """Draw logits of standard deviation 3 and labels, all of which count."""
        logits = torch.empty(rows, width, device="cuda", dtype=dtype).normal_(std=3)
        return cls(logits.requires_grad_(), torch.randint(width, (rows,), device="cuda"))


def by_autograd(loss: Gradient) -> Gradient:
    """From a loss the gradient by the logits."""
    return lambda logits, target: torch.autograd.grad(loss(logits, target), logits)[0]


def in_one_pass() -> dict[str, Callable[[], Gradient]]:
    """Everyone who makes loss and gradient of whole rows; imports happen when called, as peers may be absent."""

    def quack() -> Gradient:
        from quack.cross_entropy import cross_entropy_fwd

        def gradient(logits: Tensor, target: Tensor) -> Tensor:
            loss, slope = cross_entropy_fwd(logits.detach(), target, return_dx=True, inplace_backward=True)
            loss.mean()
            return slope  # of the sum: whoever uses it folds the scale into the product that follows

        return gradient

    def quack_two_kernels() -> Gradient:
        from quack.cross_entropy import cross_entropy as quack_cross_entropy

        return by_autograd(lambda x, y: quack_cross_entropy(x, y, reduction="mean", inplace_backward=True))

    def liger() -> Gradient:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        return by_autograd(lambda x, y: LigerCrossEntropyFunction.apply(x, y, None)[0])

    def compiled() -> Gradient:
        return by_autograd(contest.compiled(F.cross_entropy))

    return {
        "composer inplace": lambda: by_autograd(lambda x, y: cross_entropy(x, y, inplace=True)),
        "quack fwd+dx": quack,
        "quack": quack_two_kernels,
        "liger": liger,
        "torch.compile": compiled,
        "torch": lambda: by_autograd(F.cross_entropy),
    }


def in_two_passes() -> dict[str, Callable[[], Gradient]]:
    """Everyone who can split the vocabulary over processes."""

    def transformer_engine(overwrite: bool) -> Gradient:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return parallel_cross_entropy(x[:, None], y[:, None], overwrite_input=overwrite).mean()

        return by_autograd(loss)

    def liger() -> Gradient:
        from liger_kernel.ops.vocab_parallel_cross_entropy import LigerVocabParallelCEFunction

        settings = (None, -100, 0.0, "pytorch", "global")
        return by_autograd(lambda x, y: LigerVocabParallelCEFunction.apply(x[:, None], y[:, None], *settings).mean())

    def megatron() -> Gradient:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        group = dist.group.WORLD
        return by_autograd(lambda x, y: fused_vocab_parallel_cross_entropy(x[:, None], y[:, None], group).mean())

    return {
        "composer inplace": lambda: by_autograd(
            lambda x, y: cross_entropy(x, y, inplace=True, reduction="none").mean()
        ),
        "composer": lambda: by_autograd(cross_entropy),
        "composer all terms": lambda: by_autograd(
            lambda x, y: cross_entropy(x, y, inplace=True, reduction="none", **TERMS).mean()
        ),
        "te overwrite": lambda: transformer_engine(True),
        "te": lambda: transformer_engine(False),
        "liger": liger,
        "megatron": megatron,
    }


def compare(rows: int, width: int, dtype: torch.dtype, run: Session, everyone: bool) -> Iterator[Row]:
    """Time all contenders on one shape; but for the first shape only those who come close."""
    shape = f"{rows} x {width} {str(dtype).removeprefix('torch.')}"
    elements = rows * width * dtype.itemsize
    near = ("composer", "quack", "liger", "te overwrite")
    for case, passes, group in (("1 pass", 2, in_one_pass()), ("2 passes", 3, in_two_passes())):
        for name, load in run.chosen(group).items():
            if not (everyone or name.startswith(near)):
                continue
            try:
                gradient = load()
                error = _error(gradient, width, dtype, TERMS if "all terms" in name else {})
            except Exception as failure:
                yield Row(f"{case} {shape}", name, 0, note=f"{type(failure).__name__}: {failure}"[:160])
                continue
            sets = [Inputs.draw(rows, width, dtype) for _ in range(set_count(elements))]

            def make(index: int, by: Gradient = gradient, drawn: list[Inputs] = sets) -> Call:
                return lambda: by(drawn[index].logits, drawn[index].target)

            yield contend(f"{case} {shape}", name, passes * elements, run.limits.copy, make, error=error)
            del sets, make
            torch.cuda.empty_cache()


def _error(gradient: Gradient, width: int, dtype: torch.dtype, terms: dict[str, float]) -> float:
    """Of the gradient, freed of its scale."""
    inputs = Inputs.draw(64, width, dtype)
    double = inputs.logits.detach().double().requires_grad_()
    exact = torch.autograd.grad(cross_entropy_reference(double, inputs.target, **terms), double)[0]
    ours = gradient(inputs.logits, inputs.target).double()
    return relative_error(ours / ours.norm(), exact / exact.norm())


def host_times() -> dict[str, dict[str, float]]:
    """The host's microseconds for our forward and backward on 16 rows of 1024."""
    times = {}
    for name, options in {"mean": {}, "none": {"reduction": "none"}, "mean inplace": {"inplace": True}}.items():
        inputs = Inputs.draw(16, 1024, BF16)

        def step(x: Tensor = inputs.logits, y: Tensor = inputs.target, options: dict[str, Any] = options) -> Tensor:
            return torch.autograd.grad(cross_entropy(x, y, **options).sum(), x)[0]

        times[name] = host_seconds(step) * 1e6
    return {"composer": times}


def launches(kernel: str) -> Iterator[Launch]:
    """Launches worth timing."""
    if kernel != "one pass":
        return itertools.starmap(Launch, itertools.product((4, 8, 16), (1, 2, 4, 8)))
    policies = list(itertools.product(("", "evict_last"), ("", "evict_first")))
    whole = [
        Launch(warps, vectors, policy, 0, store)
        for warps, vectors in itertools.product((8, 16, 32), (1, 2, 4))
        for policy, store in policies
    ]
    # As many tiles as fit into the registers, and some more, which then spill a little.
    kept = ((32, 1, (2, 4, 6)), (32, 2, (1, 2, 3)), (32, 4, (1,)), (16, 2, (4, 6, 8)), (16, 4, (1, 2, 3, 4)))
    sizes = [(warps, vectors, keep) for warps, vectors, keeps in kept for keep in keeps]
    return iter(whole + [Launch(w, v, policy, keep, store) for w, v, keep in sizes for policy, store in policies])


def tune(rows: int, width: int, dtype: torch.dtype, run: Session) -> Iterator[Row]:
    """Time launches of the three kernels, best first."""
    shape = f"{rows} x {width} {str(dtype).removeprefix('torch.')}"
    sets = [Inputs.draw(rows, width, dtype) for _ in range(2)]
    size, shifted = dtype.itemsize, bool(width % 16)
    logits, target = [x.logits.detach()[None] for x in sets], sets[0].target
    terms, scale = LossTerms(-100, 0.0, 0.0, 0.0, 0, width), torch.ones(1, device="cuda")
    _, norm = kernels.losses(logits[0], target, terms, None)
    defaults = (
        kernels.statistics_launch(width, size, shifted),
        kernels.gradient_launch(width, size, shifted),
        kernels.one_pass_launch(width, size, shifted, plain=True),
    )

    def statistics(i: int, launch: Launch) -> Any:
        return kernels.statistics(logits[i], target, terms, launch)

    def gradient(i: int, launch: Launch) -> Any:
        return kernels.gradient_into(logits[i], logits[i], target, norm, scale, terms, launch)

    def both(i: int, launch: Launch) -> Any:
        return kernels.loss_and_gradient_into(logits[i], logits[i], target, scale, terms, launch)

    cases: dict[str, tuple[int, float, Callable[[int, Launch], Any], Launch]] = {
        "statistics": (1, run.limits.read, statistics, defaults[0]),
        "gradient": (2, run.limits.copy, gradient, defaults[1]),
        "one pass": (2, run.limits.copy, both, defaults[2]),
    }
    for name, (passes, limit, call, default) in run.chosen(cases).items():
        timed, found = [], list(dict.fromkeys([default, *launches(name)]))
        compile_all(partial(call, 0), found)
        for launch in found:
            row = Row(f"{name} {shape}", "default" if launch == default else "", passes * rows * width * size)
            row.note = str(launch)
            try:
                calls = [partial(call, i, launch) for i in range(2)]
                row.graph = measure(calls, graph=True, seconds=0.03)
                row.fraction = row.bytes / limit / row.graph
            except Exception as failure:
                row.note = f"{launch}: {failure}"[:160]
            timed.append(row)
        yield from sorted(timed, key=lambda row: row.graph or 1.0)


def _best(rows: list[Row]) -> list[Row]:
    """The first six of each case, and the default."""
    cases = itertools.groupby(rows, key=lambda row: row.case)
    return [row for _, group in cases for place, row in enumerate(group) if place < 6 or row.name]


def main() -> None:
    """Run from the command line."""
    with tempfile.TemporaryDirectory() as folder, session("cross_entropy", __doc__) as run:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        if run.options.tune:
            for shape in TUNED[: 2 if run.options.quick else None]:
                run.add(_best(list(tune(*shape, run))))
        else:
            for place, shape in enumerate(QUICK if run.options.quick else SHAPES):
                run.add(compare(*shape, run, everyone=place == 0))
            run.add_host_times(host_times())
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
