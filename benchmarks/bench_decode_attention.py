"""Time `decode_attention` beside its peers: ``python benchmarks/bench_decode_attention.py --output results.json``.

A call is one step of one layer: one query token a request over its cache. The ceiling is the rate at which this GPU
reads memory, the bytes are those of the cached keys and values. "step" cases rotate query and key and append the new
token too: in one call of ours, in further calls of the peers, which have to be counted there.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from session import Session, session
from timing import Call, Row, contend, host_seconds, relative_error, set_count, tune
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from composer_kernels._decode import Launch, Rotation, default_launch, launch_decode
from composer_kernels.decode_attention import decode_attention, decode_attention_reference

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Requests, tokens of each, key-value heads, query heads of each of them, width; pages for the paged form."""

    batch: int
    tokens: int
    kv_heads: int = 8
    group: int = 4
    dim: int = 128
    page: int = 64

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens}, {self.kv_heads * self.group}/{self.kv_heads} heads of {self.dim}"

    @property
    def bytes(self) -> int:
        """Of the keys and values that are read."""
        return 4 * self.batch * self.tokens * self.kv_heads * self.dim


QUICK = [Shape(1, 32768, dim=64), Shape(8, 8192)]
SHAPES = [
    *QUICK,
    *(Shape(batch, tokens) for batch, tokens in ((1, 4096), (1, 32768), (1, 131072), (32, 4096), (64, 8192))),
    Shape(32, 4096, dim=64),
    Shape(8, 8192, kv_heads=32, group=1),
    Shape(1, 32768, kv_heads=1, group=16),
]


@dataclass
class Inputs:
    """What one call works on; the caches have room for one more token than the requests hold.

    `pages` holds the same keys and values once more, in pages in random order, and their table.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    new: tuple[Tensor, Tensor]
    rotation: Rotation
    pages: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def draw(cls, shape: Shape) -> Inputs:
        """Draw a request's tensors; all requests are as long."""

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", dtype=BF16)

        heads = (shape.batch, shape.kv_heads, shape.dim)
        k, v = (normal(shape.batch, shape.tokens + shape.page, *heads[1:]) for _ in range(2))
        angles = torch.randn(shape.tokens + 1, shape.dim // 2, device="cuda")
        return cls(
            normal(shape.batch, shape.kv_heads * shape.group, shape.dim),
            k,
            v,
            torch.full((shape.batch,), shape.tokens, device="cuda", dtype=torch.int32),
            (normal(*heads), normal(*heads)),
            Rotation(angles.cos(), angles.sin(), False),
            paged(k, v, shape.page),
        )


def paged(k: Tensor, v: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """Caches (batch, tokens, heads, width) as pages (pages, page, heads, width), and their table (batch, pages)."""
    count = k.shape[1] // page
    places = torch.randperm(len(k) * count, device="cuda")
    found = []
    for cache in (k, v):
        pages = cache[:, : count * page].reshape(-1, page, *cache.shape[2:])
        found.append(torch.empty_like(pages).index_copy_(0, places, pages))
    return found[0], found[1], places.int().view(len(k), count)


Attend = Callable[[Inputs], Tensor]


def contenders(shape: Shape) -> dict[str, Callable[[], Attend]]:
    """Everyone who attends to a cache; imports happen when called, as peers may be absent."""

    def in_pages() -> Attend:
        def attend(x: Inputs) -> Tensor:
            k, v, table = x.pages
            return decode_attention(x.q, k, v, x.lengths, page_table=table)

        return attend

    def fa4() -> Attend:
        function = importlib.import_module("flash_attn.cute").flash_attn_varlen_func

        def attend(x: Inputs) -> Tensor:
            k, v, table = x.pages
            result = function(x.q[:, None], k, v, seqused_k=x.lengths, page_table=table, num_splits=0)
            return (result[0] if isinstance(result, tuple) else result)[:, 0]

        return attend

    def with_cache(module: str) -> Attend:
        function = importlib.import_module(module).flash_attn_with_kvcache
        return lambda x: function(x.q[:, None], x.k, x.v, cache_seqlens=x.lengths)[:, 0]

    def torchs(backend: SDPBackend) -> Attend:
        def attend(x: Inputs) -> Tensor:
            k, v = (cache[:, : shape.tokens].transpose(1, 2) for cache in (x.k, x.v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(x.q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

        return attend

    return {
        "composer": lambda: lambda x: decode_attention(x.q, x.k, x.v, x.lengths),
        "composer paged": in_pages,
        "fa4 split-KV": fa4,
        "fa3": partial(with_cache, "flash_attn_interface"),
        "fa2": partial(with_cache, "flash_attn"),
        "cudnn": partial(torchs, SDPBackend.CUDNN_ATTENTION),
        "torch flash": partial(torchs, SDPBackend.FLASH_ATTENTION),
        "torch math": partial(torchs, SDPBackend.MATH),
    }


def steps() -> dict[str, Attend]:
    """Rotation, append and attention: fused, and as separate calls in plain PyTorch around the same attention."""

    def fused(x: Inputs) -> Tensor:
        table = {"cos": x.rotation.cos, "sin": x.rotation.sin}
        return decode_attention(x.q, x.k, x.v, x.lengths, new_k=x.new[0], new_v=x.new[1], **table)

    def rotate(t: Tensor, x: Inputs) -> Tensor:
        cos, sin = (table[x.lengths.long()][:, None] for table in (x.rotation.cos, x.rotation.sin))
        a, b = t.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(t.dtype)

    def apart(x: Inputs) -> Tensor:
        requests, places = torch.arange(len(x.q), device="cuda"), x.lengths.long()
        x.k[requests, places], x.v[requests, places] = rotate(x.new[0], x), x.new[1]
        return decode_attention(rotate(x.q, x), x.k, x.v, x.lengths + 1)

    return {"composer fused": fused, "composer + torch": apart}


def compare(shape: Shape, run: Session) -> Iterator[Row]:
    """Time all contenders on one shape."""
    sets = [Inputs.draw(shape) for _ in range(set_count(shape.bytes))]
    exact = _in_float64(sets[0])
    cases = {f"attend {shape}": contenders(shape), f"step {shape}": {k: (lambda f=f: f) for k, f in steps().items()}}
    for case, group in cases.items():
        for name, load in run.chosen(group).items():
            try:
                attend = load()
                error = relative_error(attend(sets[0]), exact) if case.startswith("attend") else None
            except Exception as failure:  # an absent peer must not end the comparison
                yield Row(case, name, shape.bytes, note=f"{type(failure).__name__}: {failure}"[:160])
                continue

            def make(index: int, attend: Attend = attend) -> Call:
                return partial(attend, sets[index])

            yield contend(case, name, shape.bytes, run.limits.read, make, error=error)


def _in_float64(x: Inputs) -> Tensor:
    """The exact result, one request at a time to spare memory."""
    requests = zip(*(tensor.split(1) for tensor in (x.q, x.k, x.v, x.lengths)), strict=True)
    exact = [decode_attention_reference(q.double(), k.double(), v.double(), n) for q, k, v, n in requests]
    return torch.cat(exact)


def launches(shape: Shape) -> Iterator[Launch]:
    """Launches worth timing: splits around the default, blocks and stages that fit."""
    default = _default(shape)
    for factor in (0.5, 1.0, 2.0, 4.0):
        splits = max(1, round(default.splits * factor))
        for block in (32, 64, 128):
            for warps, stages in ((4, 2), (4, 3), (4, 4), (8, 3)):
                yield Launch(splits, block, warps, stages)


def _default(shape: Shape) -> Launch:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return default_launch(shape.batch * shape.kv_heads, shape.tokens + shape.page, shape.dim, 2, processors)


def tune_decode(shape: Shape, run: Session) -> Iterator[Row]:
    """Time launches of both forms of a cache, best first."""
    sets = [Inputs.draw(shape) for _ in range(set_count(shape.bytes))]

    def decode(x: Inputs, k: Tensor, v: Tensor, table: Tensor | None, launch: Launch) -> Sequence[Tensor]:
        return [launch_decode(x.q, k, v, x.lengths, None, table, None, None, shape.dim**-0.5, launch)]

    def contiguous(index: int, launch: Launch) -> Sequence[Tensor]:
        return decode(sets[index], sets[index].k, sets[index].v, None, launch)

    def in_pages(index: int, launch: Launch) -> Sequence[Tensor]:
        return decode(sets[index], *sets[index].pages, launch)

    def near(best: Launch) -> Iterator[Launch]:
        return (dataclasses.replace(best, splits=max(1, round(best.splits * f))) for f in (0.75, 1.25, 1.5))

    for name, call in run.chosen({"attend": contiguous, "paged": in_pages}).items():
        case = f"{name} {shape}"
        yield from tune(case, shape.bytes, run.limits.read, call, _default(shape), launches(shape), near)


def host_times() -> dict[str, dict[str, float]]:
    """The host's microseconds for a call on a tiny cache."""
    x = Inputs.draw(Shape(1, 256, dim=64))
    calls = {
        "attend": partial(decode_attention, x.q, x.k, x.v, x.lengths),
        "step": partial(steps()["composer fused"], x),
    }
    return {"composer": {name: host_seconds(call) * 1e6 for name, call in calls.items()}}


def main() -> None:
    """Run from the command line."""
    with torch.no_grad(), session("decode_attention", __doc__) as run:
        for shape in QUICK if run.options.quick or run.options.tune else SHAPES:
            run.add(tune_decode(shape, run) if run.options.tune else compare(shape, run))
            torch.cuda.empty_cache()
        if not run.options.tune:
            run.add_host_times(host_times())


if __name__ == "__main__":
    main()
