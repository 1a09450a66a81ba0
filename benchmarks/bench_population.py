"""Where a population's training step spends its time on a GPU: ``python benchmarks/bench_population.py --output F``.

Each part of a step of attention blocks and MLPs at MAD's widths in bfloat16, alone: matrix products, attention, gate,
residual stream and optimizer. A line tells nanoseconds for a token of one block, what the bytes that the part has to
move would take at this GPU's own copying speed, and how often that goes into the time. `--tune` times the launches of
attention and of the MLP's kernels instead. Lines are printed, and all of them written as JSON, as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_megatron.env import environment
from composer_megatron.files import write_json
from composer_search.candidate import Widths, rotation
from composer_search.population.kernels import mlp as mlp_kernels
from composer_search.population.kernels.attention import form, tables
from composer_search.population.kernels.attention_parts import Launch
from composer_search.population.operations import Fused, Operations, Plain
from composer_search.population.product import product
from composer_search.population.stream import Stream

WIDTHS = Widths()
BATCH = 128
BF16 = torch.bfloat16
LENGTHS, TUNED_LENGTHS = (32, 128, 256), (32, 64, 128, 272, 512)
TILES = [Launch(*each) for each in ((32, 1), (32, 2), (64, 2), (64, 4))]
"""Of attention over sequences of several tiles, what comes near the fastest."""

MLPS = [
    mlp_kernels.Launch(*each)
    for each in (
        *((128, 32, 8, 3), (128, 32, 8, 3, 128), (128, 32, 8, 2, 128), (128, 32, 8, 1, 128), (128, 16, 8, 2, 128)),
        *((64, 32, 4, 3), (64, 32, 4, 2), (64, 32, 4, 1), (64, 32, 4, 1, 160), (64, 32, 4, 1, 128), (64, 16, 4, 2)),
    )
]
"""Of an MLP's kernels: what leaves room for two programs or more on a multiprocessor, and what does not."""

Part = tuple[str, int, Callable[[], object]]
"""What it is called, the bytes that it has to move, and what does it."""


@dataclasses.dataclass(frozen=True)
class Size:
    """`rows` rows of BATCH sequences."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * BATCH * self.length

    def draw(self, width: int, dtype: torch.dtype = BF16) -> Tensor:
        """Random numbers [rows, tokens of a row, width]."""
        return torch.randn(self.rows, BATCH * self.length, width, device="cuda", dtype=dtype)


def seconds(call: Callable[[], object], rounds: int = 5) -> float:
    """Median seconds of a call, as many in a row as take 20 ms."""
    for _ in range(2):
        call()
    calls = max(1, int(0.02 / _elapsed(call, 1)))
    return statistics.median(_elapsed(call, calls) for _ in range(rounds))


def _elapsed(call: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def copy_speed() -> float:
    """Bytes a second of a copy, read and written bytes both counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def both_ways(
    name: str, moved: tuple[int, int], inputs: Sequence[Tensor], run: Callable[..., Tensor | tuple[Tensor, ...]]
) -> Iterator[Part]:
    """A function forward, and backward for random gradients."""
    leaves = [each.requires_grad_() for each in inputs]
    found = run(*leaves)
    outs = found if isinstance(found, tuple) else (found,)
    grads = [torch.randn_like(out) for out in outs]
    yield f"{name}, forward", moved[0], functools.partial(run, *leaves)
    yield f"{name}, backward", moved[1], lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)


def projections(size: Size, operations: Operations, who: str) -> Iterator[Part]:
    """The two layers of an A; backward both gradients, by the bytes of one pass."""
    hidden = WIDTHS.hidden_size
    for name, after in (("A in", 3 * hidden), ("A out", hidden)):
        weight = torch.randn(size.rows, after, hidden, device="cuda")
        moved = 2 * size.tokens * (hidden + after), 2 * size.tokens * (2 * hidden + after)
        run = functools.partial(operations.linear, gain=None)
        yield from both_ways(f"{name}, {who}", moved, [size.draw(hidden), weight], run)


def products(size: Size) -> Iterator[Part]:
    """The two layers of an M; backward both gradients."""
    hidden, inner = WIDTHS.hidden_size, WIDTHS.ffn_hidden_size
    for name, (before, after) in {"M in": (hidden, 2 * inner), "M out": (inner, hidden)}.items():
        weight = torch.randn(size.rows, after, before, device="cuda")
        moved = 2 * size.tokens * (before + after)
        yield from both_ways(name, (moved, 2 * moved), [size.draw(before), weight], product)


def attend(size: Size, operations: Operations, who: str) -> Iterator[Part]:
    """Attention with its bias and its rotation."""
    hidden, heads = WIDTHS.hidden_size, WIDTHS.num_heads
    turns = rotation(size.length, hidden // heads, torch.device("cuda"))
    inputs = [size.draw(3 * hidden), torch.zeros(size.rows, 3 * hidden, device="cuda")]
    moved = 8 * hidden * size.tokens, 16 * hidden * size.tokens
    run = functools.partial(operations.attend, turns=turns, heads=heads, wanted=size.length)
    yield from both_ways(f"attention, {who}", moved, inputs, run)


def stream(size: Size, operations: Operations, who: str) -> Iterator[Part]:
    """The residual stream from one depth to the next, half of the rows in attention."""
    hidden, half = WIDTHS.hidden_size, size.rows // 2
    order = torch.randperm(size.rows, device="cuda")
    moves = order, order.argsort()
    outs = [size.draw(hidden)[:half].clone() for _ in range(2)]
    traced = operations.stream(size.draw(hidden, torch.float32), BF16)
    inputs = [traced.traced.detach(), *outs, torch.zeros(half, hidden, device="cuda")]
    moved = 12 * hidden * size.tokens, 8 * hidden * size.tokens

    def run(x: Tensor, a: Tensor, m: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        given = Stream.plain(x) if traced.traced is traced.values else Stream(traced.values, x)
        y, parts = operations.residual(given, [a, m], [bias, None], moves, [half, half], BF16)
        return y.traced, *parts

    yield from both_ways(f"stream, {who}", moved, inputs, run)


def mlp(size: Size, operations: Operations, who: str) -> Iterator[Part]:
    """An M; its bytes are those of one kernel, which forward keeps nothing of its inner width."""
    hidden, inner = WIDTHS.hidden_size, WIDTHS.ffn_hidden_size
    sides = (2 * inner, hidden), (hidden,), (hidden, inner)
    weights = [torch.randn(size.rows, *side, device="cuda") / side[-1] ** 0.5 for side in sides]
    moved = 4 * hidden * size.tokens, (10 * hidden + 12 * inner) * size.tokens
    yield from both_ways(f"MLP, {who}", moved, [size.draw(hidden), *weights], operations.mlp)


def optimizer(size: Size, operations: Operations, who: str) -> Iterator[Part]:
    """AdamW on six blocks of a row."""
    weight, gradient, first, second = ([torch.rand(6 * size.rows, 100_000, device="cuda")] for _ in range(4))
    spread = [torch.rand(3, 6 * size.rows, device="cuda")]
    moved = 28 * weight[0].numel()
    yield f"AdamW, six blocks, {who}", moved, lambda: operations.update(weight, gradient, (first, second), spread)


def parts(size: Size) -> Iterator[Part]:
    """Everything, fused and not."""
    yield from products(size)
    yield from mlp(size, Fused("ieee", whole_mlp=True), "one kernel")
    yield from mlp(size, Fused("ieee", whole_mlp=False), "gate fused")
    for operations, who in ((Fused("ieee"), "fused"), (Plain(), "PyTorch")):
        for part in (projections, attend, stream, optimizer):
            yield from part(size, operations, who)
    yield from mlp(size, Plain(), "PyTorch")


def launches(size: Size) -> Iterator[Part]:
    """Attention's launches; of sequences that are one tile, the warps for it."""
    hidden, heads = WIDTHS.hidden_size, WIDTHS.num_heads
    cosine, sine = tables(rotation(size.length, hidden // heads, torch.device("cuda")))
    joint, bias, dmixed = size.draw(3 * hidden), torch.zeros(size.rows, 3 * hidden, device="cuda"), size.draw(hidden)
    kernels = form(size.length, BF16)
    default = kernels.default_launch(size.length, hidden // heads, BF16)
    whole = default.positions >= size.length
    for launch in [Launch(default.positions, warps) for warps in (1, 2, 4)] if whole else TILES:
        name = f"{launch.positions} positions, {launch.warps} warps{', the default' if launch == default else ''}"
        forward = functools.partial(kernels.forward, joint, bias, cosine, sine, heads, "ieee", launch)
        kept, mixed, sums = forward()
        backward = functools.partial(kernels.backward, kept, cosine, sine, mixed, dmixed, sums, "ieee", launch)
        yield f"forward, {name}", 8 * hidden * size.tokens, forward
        yield f"backward, {name}", 16 * hidden * size.tokens, backward


def mlp_launches(size: Size) -> Iterator[Part]:
    """Those of the MLP's two kernels, without the gradients of weights."""
    hidden, inner = WIDTHS.hidden_size, WIDTHS.ffn_hidden_size
    h, dy = size.draw(hidden), size.draw(hidden)
    sides = (2 * inner, hidden), (hidden, inner)
    up, down = (torch.randn(size.rows, *side, device="cuda", dtype=BF16) / side[1] ** 0.5 for side in sides)
    forward, backward = mlp_kernels.FORWARD, mlp_kernels.BACKWARD
    for launch in dict.fromkeys((*MLPS, forward, backward)):
        name = ", ".join(f"{value} {key}" for key, value in launch._asdict().items() if value is not None)
        mark = ["; the default" if launch == default else "" for default in (forward, backward)]
        run = functools.partial(mlp_kernels.launch_forward, h, up, down, launch)
        yield f"MLP forward, {name}{mark[0]}", 4 * hidden * size.tokens, run
        moved = (6 * hidden + 6 * inner) * size.tokens
        run_back = functools.partial(mlp_kernels.launch_backward, h, dy, up, down, launch)
        yield f"MLP backward, {name}{mark[1]}", moved, run_back


def main() -> None:
    """Run from the command line."""
    options = argparse.ArgumentParser(description="Time the parts of a population's training step.")
    options.add_argument("--tune", action="store_true", help="time launches of attention and the MLP instead")
    options.add_argument("--tokens", type=int, default=2**20, help="of all rows; few leave the GPU waiting for Python")
    options.add_argument("--output", type=Path, help="write all figures there as JSON")
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_population.py needs a CUDA GPU, and there is none")
    speed = copy_speed()
    print(f"copy: {speed / 1e12:.2f} TB/s", flush=True)
    figures: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "copy": speed,
        "parts": [],
    }
    sources = [(mlp_launches, (128,)), (launches, TUNED_LENGTHS)] if chosen.tune else [(parts, LENGTHS)]
    for source, length in [(source, length) for source, lengths in sources for length in lengths]:
        size = Size(max(2, chosen.tokens // (BATCH * length)), length)
        for name, moved, call in source(size):
            figures["parts"].append(_timed(size, name, moved, call, speed))
            if chosen.output is not None:
                write_json(chosen.output, figures)


def _timed(size: Size, name: str, moved: int, call: Callable[[], object], speed: float) -> dict[str, Any]:
    """Time a part and print its line; what it raises becomes the line's note."""
    line: dict[str, Any] = {"part": name, "length": size.length, "rows": size.rows, "bytes": moved}
    label = f"S={size.length:<4} {size.rows:4} rows  {name:40}"
    try:
        line["seconds"] = took = seconds(call)
    except Exception as error:  # a launch that does not fit must not end the others
        line["note"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:120]
        print(label, line["note"], flush=True)
        return line
    each, least = took / size.tokens * 1e9, moved / speed / size.tokens * 1e9
    print(f"{label} {each:8.3f} ns a token, {least:7.3f} by its bytes, {each / least:6.2f} times", flush=True)
    return line


if __name__ == "__main__":
    main()
