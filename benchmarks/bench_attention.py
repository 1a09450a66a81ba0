"""Time `attention` beside its peers: ``python benchmarks/bench_attention.py --output results.json``.

The ceiling is the GEMM rate of this GPU, the work 4 · d FLOPs forward and 10 · d backward for each pair of query and
key that see each other. "composer" is what `attention` chooses; "composer NAME" what it does with that backend;
"NAME itself" calls the implementation as its own documentation does, so that the difference is what our call costs.
Times in a graph are those of all contenders in turns, as clocks change by more than some of these differ.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from contest import Contest, Inputs, Operation, backward_call, forward_call, host_times
from session import Session, session
from timing import Call, Row, contend, in_turns, relative_error, set_count, tune
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from composer_kernels._flash import Launch, Problem, forward_launch, launch_forward
from composer_kernels._flash_backward import dkdv_launch, dq_launch, launch_backward
from composer_kernels.attention import attention, attention_reference, choose_attention

BF16 = torch.bfloat16
BACKENDS = ("triton", "flash4", "flash3", "flash2", "cudnn", "torch_flash", "torch_efficient")
LONGEST_EXACT = 8192
"""Tokens up to which float64 scores of one group of heads fit into the GPU's memory."""


@dataclass(frozen=True)
class Shape:
    """Sequences, queries and keys of each, heads of queries and keys, their width; packed ones have `lengths`."""

    batch: int
    queries: int
    heads: int
    key_heads: int
    dim: int
    keys: int | None = None
    causal: bool = True
    window: int | None = None
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        size = f"{len(self.lengths)} packed" if self.lengths else f"{self.batch}"
        keys = "" if self.keys is None else f" of {self.keys}"
        extras = "" if self.causal else " full"
        extras += "" if self.window is None else f" window {self.window}"
        return f"{size} x {self.queries}{keys}, {self.heads}/{self.key_heads} of {self.dim}{extras}"

    @property
    def pairs(self) -> int:
        """Of a query and a key that see each other, of one head."""
        if self.lengths:
            return sum(_pairs(n, n, self.causal, self.window) for n in self.lengths)
        return self.batch * _pairs(self.queries, self.keys or self.queries, self.causal, self.window)

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return 4.0 * self.dim * self.heads * self.pairs

    @property
    def bytes(self) -> float:
        """Of q, k, v and the output."""
        tokens = sum(self.lengths) or self.batch * self.queries
        keys = sum(self.lengths) or self.batch * (self.keys or self.queries)
        return 4.0 * self.dim * (tokens * self.heads + keys * self.key_heads)

    @property
    def options(self) -> dict[str, Any]:
        """As `attention` takes them."""
        options: dict[str, Any] = {"causal": self.causal, "window": self.window}
        if self.lengths:
            starts = torch.tensor((0, *itertools.accumulate(self.lengths)), dtype=torch.int32, device="cuda")
            options |= {"cu_seqlens_q": starts, "max_seqlen_q": max(self.lengths)}
        return options


def _pairs(queries: int, keys: int, causal: bool, window: int | None) -> int:
    ends = ((keys - queries + row + 1) if causal else keys for row in range(queries))
    begins = (0 if window is None else max(0, keys - queries + row - window) for row in range(queries))
    return sum(max(0, min(keys, end) - begin) for begin, end in zip(begins, ends, strict=True))


QUICK = [Shape(4, 4096, 32, 8, 64), Shape(2, 8192, 32, 8, 64), Shape(2, 8192, 24, 8, 128)]
SHAPES = [
    *QUICK,
    Shape(8, 2048, 32, 8, 64),
    Shape(4, 4096, 24, 8, 128),
    Shape(1, 16384, 32, 8, 64),
    Shape(1, 16384, 24, 8, 128),
    Shape(2, 8192, 16, 16, 128, causal=False),
    Shape(2, 8192, 8, 4, 256),
    Shape(2, 8192, 24, 8, 96),
    Shape(1, 16384, 24, 8, 128, window=4096),
    Shape(4, 2048, 24, 8, 128, keys=8192),
    Shape(1, 16384, 24, 8, 128, lengths=(6000, 300, 4084, 2000, 1500, 500, 1900, 100)),
]
TUNED = [*QUICK[1:], Shape(4, 4096, 24, 8, 128), Shape(2, 8192, 8, 4, 256), Shape(2, 8192, 16, 16, 128, causal=False)]


def draw(shape: Shape, dtype: torch.dtype = BF16) -> Inputs:
    """Q, k, v and the gradient of the output."""

    def normal(length: int, heads: int) -> Tensor:
        size = (length, heads, shape.dim) if shape.lengths else (shape.batch, length, heads, shape.dim)
        return torch.randn(*size, device="cuda", dtype=dtype)

    queries = sum(shape.lengths) or shape.queries
    keys = sum(shape.lengths) or shape.keys or shape.queries
    q, dout = normal(queries, shape.heads), normal(queries, shape.heads)
    return Inputs((q, normal(keys, shape.key_heads), normal(keys, shape.key_heads)), (dout,))


def _group(x: Tensor, shape: Shape, heads: int) -> Tensor:
    """The first sequence's heads that share a head of keys: these depend on nothing else."""
    part = x[..., :heads, :]
    return part[: shape.lengths[0]][None] if shape.lengths else part[:1]


def errors(operation: Operation, shape: Shape, inputs: Inputs) -> tuple[float | None, float | None]:
    """Of the output and of the gradients, against float64, of one group of heads."""
    group = shape.heads // shape.key_heads
    counts = (group, 1, 1, group)
    if shape.queries > LONGEST_EXACT and not shape.lengths:
        return None, None
    wide = [_group(x, shape, n).detach().double() for x, n in zip((*inputs.leaves, *inputs.grads), counts, strict=True)]
    leaves = [x.requires_grad_() for x in wide[:3]]
    exact = attention_reference(*leaves, causal=shape.causal, window=shape.window)
    exact_back = torch.autograd.grad(exact, leaves, wide[3])
    out = operation(*inputs.leaves)
    back = torch.autograd.grad(out, inputs.leaves, inputs.grads)
    pairs = zip(back, counts[:3], exact_back, strict=True)
    worst = max(relative_error(_group(one, shape, n), wanted) for one, n, wanted in pairs)
    return relative_error(_group(out, shape, group), exact), worst


def contenders(shape: Shape) -> dict[str, Callable[[], Operation]]:
    """Everyone who attends; imports happen when called, as peers may be absent."""
    options = shape.options

    def ours(backend: str | None) -> Operation:
        return functools.partial(attention, backend=backend, **options)

    found: dict[str, Callable[[], Operation]] = {"composer": functools.partial(ours, None)}
    found |= {f"composer {name}": functools.partial(ours, name) for name in BACKENDS}
    found |= {
        "flash4 itself": functools.partial(_package, "flash_attn.cute", shape, None),
        "flash3 itself": functools.partial(_package, "flash_attn_interface", shape, -1),
        "flash2 itself": functools.partial(_package, "flash_attn", shape, -1),
    }
    plain = not shape.lengths and shape.window is None and (shape.keys is None or not shape.causal)
    if plain:
        found["cudnn itself"] = lambda: functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION, shape.causal)
        found["torch flash itself"] = lambda: functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION, shape.causal)
        found["te"] = functools.partial(_transformer_engine, shape)
    return found


def _package(module: str, shape: Shape, unlimited: int | None) -> Operation:
    """FlashAttention 2, 3 or 4 as a user calls it."""
    package = importlib.import_module(module)
    options = shape.options
    left = unlimited if shape.window is None else shape.window
    given: dict[str, Any] = {"causal": shape.causal, "window_size": (left, 0 if shape.causal else unlimited)}
    function = package.flash_attn_func
    if shape.lengths:
        function, starts, longest = package.flash_attn_varlen_func, options["cu_seqlens_q"], options["max_seqlen_q"]
        given |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = function(q, k, v, **given)
        return result[0] if isinstance(result, tuple) else result

    return attend


def _sdpa(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _transformer_engine(shape: Shape) -> Operation:
    engine = importlib.import_module("transformer_engine.pytorch")
    module = engine.DotProductAttention(
        shape.heads,
        shape.dim,
        num_gqa_groups=shape.key_heads,
        attention_dropout=0.0,
        qkv_format="bshd",
        attn_mask_type="causal" if shape.causal else "no_mask",
    )
    return lambda q, k, v: module(q, k, v).unflatten(-1, (shape.heads, shape.dim))


def compare(shape: Shape, run: Session) -> Iterator[Row]:
    """Time all contenders, forward and backward: each alone, then in graphs in turns."""
    sets = [draw(shape) for _ in range(set_count(shape.bytes))]
    choice = choose_attention(*sets[0].leaves, **shape.options)
    print(f"{shape}: {choice.name}; cannot: {'; '.join(f'{name} {why}' for name, why in choice.rejected)}")
    limit = run.limits.gemm or 1.0
    timed: dict[str, Operation] = {}
    rows: dict[tuple[str, str], Row] = {}
    for name, load in run.chosen(contenders(shape)).items():
        try:
            timed[name] = load()
            found = errors(timed[name], shape, sets[0])
        except Exception as failure:  # an absent peer must not end the comparison
            timed.pop(name, None)
            yield Row(f"forward {shape}", name, shape.bytes, note=f"{type(failure).__name__}: {failure}"[:160])
            continue
        directions = (("forward", forward_call, 1.0, found[0]), ("backward", backward_call, 2.5, found[1]))
        for direction, make, factor, error in directions:
            calls = functools.partial(_call_on, make, timed[name], sets)
            work, moved = factor * shape.flops, factor * shape.bytes
            row = contend(f"{direction} {shape}", name, moved, limit, calls, work=work, error=error)
            if row.graph is None:
                timed.pop(name, None)
                yield row
            else:
                rows[direction, name] = row
    for direction, make, factor in (("forward", forward_call, 1.0), ("backward", backward_call, 2.5)):
        seconds = in_turns({name: [make(operation, each) for each in sets] for name, operation in timed.items()})
        for name, value in seconds.items():
            row = rows.pop((direction, name))
            row.graph, row.fraction = value, factor * shape.flops / limit / value
            yield row
        yield from _beside_itself(f"{direction} in turns {shape}", shape.bytes, choice.name, seconds)
    yield from rows.values()  # forward of who cannot go backward


def _beside_itself(case: str, moved: float, chosen: str, seconds: dict[str, float]) -> Iterator[Row]:
    """The choice through our call and by its own."""
    for name, timed in (("composer", "composer"), ("itself", f"{chosen} itself".replace("_", " "))):
        if {"composer", timed} <= seconds.keys():
            yield Row(case, name, moved, graph=seconds[timed], note=chosen)


def _call_on(
    make: Callable[[Operation, Inputs], Call], operation: Operation, sets: Sequence[Inputs], index: int
) -> Call:
    return make(operation, sets[index])


def launches(shape: Shape, walking: str) -> Iterator[Launch]:
    """Launches whose accumulators fit into registers and tiles into shared memory.

    Args:
        shape: The case.
        walking: Which tiles pass by, `rows` (of queries) or `columns` (of keys).
    """
    depths = (2, 3) if shape.dim <= 128 else (1, 2)
    for still, walk, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), depths):
        width = max(64, shape.dim)
        accumulators = still * (width + walk) / warps / 32
        memory = 2 * width * (still + 2 * walk * stages)
        if accumulators <= 200 and memory <= 224 * 1024 and still * 4 >= 64 * warps / 2:
            yield Launch(walk, still, warps, stages) if walking == "rows" else Launch(still, walk, warps, stages)


def tune_attention(shape: Shape, limit: float) -> list[Row]:
    """Time launches of each of the three kernels; the two backward ones together, one at its default."""
    inputs = [draw(shape) for _ in range(set_count(shape.bytes))]
    leaves = [[leaf.detach() for leaf in one.leaves] for one in inputs]
    problem = Problem(0, 0, shape.causal, shape.window, shape.dim**-0.5)
    kind = (shape.dim, 2, torch.cuda.current_device())
    defaults = dq_launch(*kind), dkdv_launch(*kind)
    kept = [launch_forward(*one, None, None, problem) for one in leaves]

    def forward(index: int, launch: Launch) -> Sequence[Tensor | None]:
        return launch_forward(*leaves[index], None, None, problem, launch)

    def backward(index: int, pair: tuple[Launch, Launch]) -> Sequence[Tensor | None]:
        given = (inputs[index].grads[0], None, *leaves[index], *kept[index], None, None, problem)
        return launch_backward(*given, pair)

    def by_dq(index: int, launch: Launch) -> Sequence[Tensor | None]:
        return backward(index, (launch, defaults[1]))

    def by_dkdv(index: int, launch: Launch) -> Sequence[Tensor | None]:
        return backward(index, (defaults[0], launch))

    work = shape.flops
    rows = tune(f"forward {shape}", work, limit, forward, forward_launch(*kind), launches(shape, "columns"))
    rows += tune(f"dq {shape}", 2.5 * work, limit, by_dq, defaults[0], launches(shape, "columns"))
    rows += tune(f"dkdv {shape}", 2.5 * work, limit, by_dkdv, defaults[1], launches(shape, "rows"))
    return [dataclasses.replace(row, bytes=shape.bytes) for row in rows]  # `tune` had FLOPs in their place


def host_contest(shape: Shape) -> Contest:
    """Of a tiny shape, for the host's time alone."""
    return Contest(str(shape), shape.bytes, shape.bytes, lambda: draw(shape), lambda inputs: ((), ()))


def main() -> None:
    """Run from the command line."""
    with session("attention", __doc__, gemm=True) as run:
        options, limit = run.options, run.limits.gemm or 0.0
        shapes = TUNED[: 2 if options.quick else None] if options.tune else QUICK if options.quick else SHAPES
        for shape in shapes:
            run.add(tune_attention(shape, limit) if options.tune else compare(shape, run))
            torch.cuda.empty_cache()
        if not options.tune:
            tiny = Shape(1, 128, 4, 2, 64)
            run.add_host_times(host_times(host_contest(tiny), run.chosen(contenders(tiny))))


if __name__ == "__main__":
    main()
