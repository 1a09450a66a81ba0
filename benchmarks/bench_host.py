"""Print the host's time for a call of each operation: ``python benchmarks/bench_host.py --output results.json``.

Shapes are so small that the GPU is done before the next call. Beside the operations stand what PyTorch and Triton
themselves take on the same machine: an `autograd.Function` that only allocates, and a launch by Triton's own code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_adamw
import bench_add_rms_norm
import bench_attention
import bench_cross_entropy
import bench_decode_attention
import bench_linear_decode
import bench_rms_norm
import bench_rope
import bench_swiglu
import bench_wgrad_accumulate
import torch
from contest import Contest, Inputs, Operation, host_times
from timing import host_seconds, own_stream
from torch import Tensor

from composer_kernels import _norm
from composer_megatron.files import write_json

BF16 = torch.bfloat16
PEERS = ("torch", "te", "te, angles", "composer triton", "composer cudnn", "cudnn itself")
Times = dict[str, dict[str, float]]


class _Nothing(torch.autograd.Function):
    """As little as an operation with two inputs can do: save them, allocate the result and two gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def floor() -> Times:
    """What no operation can go below, or does without help."""

    def draw() -> Inputs:
        return bench_rms_norm.draw(16, 4096)

    times = timed(Contest("", 0, 0, draw, lambda _: ((), ())), {"autograd alone": lambda: _Nothing.apply})
    x, weight = (leaf.detach() for leaf in draw().leaves)
    y, rstd, launch = torch.empty_like(x), torch.empty(16, device="cuda"), _norm.forward_launch(4096)
    constants = (4096, launch.block, launch.rows, False)
    options = dict(launch.options)

    def by_triton() -> None:
        _norm._forward.function[(16,)](x, None, weight, y, None, rstd, 4096, 0, 16, 1e-5, *constants, **options)

    def by_us() -> None:
        pointers = (x, None, weight, y, None, rstd)
        _norm._forward.launch(16, pointers, (4096, 0), (16,), (1e-5,), constants, launch.options)

    calls = {"Triton's launch": by_triton, "our launch": by_us}
    return times | {name: {"call": 1e6 * host_seconds(call)} for name, call in calls.items()}


def timed(contest: Contest, contenders: dict[str, Callable[[], Operation]]) -> Times:
    """The times of `host_times`, and of a backward pass in a graph of many, as there are in training.

    A backward pass alone waits until the thread that runs it wakes up, which takes longer than the pass.
    """
    times = host_times(contest, contenders)
    for name in times:
        times[name]["backward among 32"] = 1e6 * _backward_seconds(contest, contenders[name]())
    return times


def _backward_seconds(contest: Contest, operation: Operation, count: int = 32) -> float:
    sets = [contest.draw() for _ in range(count)]
    results = [operation(*inputs.leaves) for inputs in sets]
    outputs = [tensor for result in results for tensor in (result if isinstance(result, tuple) else (result,))]
    leaves, grads = [leaf for inputs in sets for leaf in inputs.leaves], [g for inputs in sets for g in inputs.grads]

    def call() -> object:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)

    return host_seconds(call, 10) / count


def chosen(contenders: dict[str, Callable[[], Operation]]) -> dict[str, Callable[[], Operation]]:
    """Ours and the peers that are quick to start."""
    return {name: load for name, load in contenders.items() if name in PEERS or name.startswith("composer")}


def without_imports(contenders: dict[str, Callable[[], Operation]]) -> dict[str, Callable[[], Operation]]:
    """Attention by what needs no other package, of which some compile for long."""
    return {name: load for name, load in contenders.items() if name in PEERS}


def measurements() -> Iterator[tuple[str, Callable[[], Times]]]:
    """The operations, and what times each."""
    norm, stream, gate = (
        bench_rms_norm.contest(16, 4096),
        bench_add_rms_norm.contest(16, 4096, BF16),
        bench_swiglu.contest(16, 4096),
    )
    rope = bench_rope.Shape(16, 1, 32, 8, 64)
    heads = bench_attention.Shape(1, 128, 4, 2, 64)
    yield "floor", floor
    yield "rms_norm", lambda: timed(norm, chosen(bench_rms_norm.contenders(4096)))
    yield "add_rms_norm", lambda: timed(stream, chosen(bench_add_rms_norm.contenders()))
    yield "swiglu", lambda: timed(gate, chosen(bench_swiglu.contenders()))
    yield (
        "rope_qkv",
        lambda: timed(bench_rope.packed_contest(rope), chosen(bench_rope.packed_contenders(rope))),
    )
    yield "rope", lambda: timed(bench_rope.apart_contest(rope), chosen(bench_rope.apart_contenders(rope)))
    yield "wgrad_accumulate", bench_wgrad_accumulate.host_times
    yield "decode_attention", torch.no_grad()(bench_decode_attention.host_times)
    yield "linear_decode", torch.no_grad()(bench_linear_decode.host_times)
    yield "cross_entropy", bench_cross_entropy.host_times
    yield (
        "attention",
        lambda: timed(bench_attention.host_contest(heads), without_imports(bench_attention.contenders(heads))),
    )
    yield "adamw, 300 tensors", lambda: _adamw(("composer", "torch fused"))


def _adamw(names: tuple[str, ...]) -> Times:
    times: Times = {}
    for name in names:
        for clip, what in ((False, "update"), (True, "clip and update")):
            step = bench_adamw.STEPS[name](bench_adamw.Weights([(16,)] * 300), clip=clip)
            times.setdefault(name, {})[what] = 1e6 * host_seconds(step, 50)
    return times


def main() -> None:
    """Run from the command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--output", type=Path, help="write all figures there as JSON")
    options.add_argument("--only", nargs="*", help="operations to time")
    given = options.parse_args()
    measured: dict[str, Times] = {}
    known: list[str] = []
    with own_stream():
        for op, measure in measurements():
            known.append(op)
            if given.only and op not in given.only:
                continue
            try:
                measured[op] = measure()
            except Exception as failure:  # one operation must not end the others' turn
                print(f"{op:20} {type(failure).__name__}: {failure}"[:160], flush=True)
                continue
            for name, times in measured[op].items():
                values = ", ".join(f"{what} {us:.1f}" for what, us in times.items())
                print(f"{op:20} {name:24} {values}", flush=True)
            if given.output is not None:
                write_json(given.output, {"gpu": torch.cuda.get_device_name(), "host_us": measured})
    if given.only and not set(given.only) & set(known):
        raise SystemExit(f"bench_host: --only {' '.join(given.only)} names nothing here; known: {', '.join(known)}")


if __name__ == "__main__":
    main()
