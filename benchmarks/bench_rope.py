"""Time rotary embedding beside its peers: ``python benchmarks/bench_rope.py --output results.json``.

Three cases: Megatron's packed projection to turned query and key, and value; query and key that lie apart already, as
Megatron's own hook gets them; and packed sequences. Bytes a case must move: each of these read once and written once,
forward and backward alike; forward the value does not count for those who hand out a view of it. Contenders with
"angles" compute cosines and sines anew in each call, as TransformerEngine does; the others read tables of them.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from contest import Contest, Inputs, Operation, compare, compiled, host_times
from session import session
from timing import Row, set_count, tune
from torch import Tensor

from composer_kernels import _rope, rope

BF16 = torch.bfloat16
Contenders = dict[str, Callable[[], Operation]]


@dataclass(frozen=True)
class Shape:
    """Tokens (length, batch), query heads, key heads, width of a head."""

    length: int
    batch: int
    heads: int
    groups: int
    dim: int

    def __str__(self) -> str:
        return f"{self.length} x {self.batch}, {self.heads}/{self.groups} of {self.dim}"

    @property
    def tokens(self) -> int:
        """In the batch."""
        return self.length * self.batch

    @property
    def names(self) -> dict[str, int]:
        """As `rope_qkv` takes them."""
        return {"num_heads": self.heads, "num_query_groups": self.groups, "head_dim": self.dim}

    def bytes(self, heads: int) -> int:
        """Of so many heads of every token, read and written."""
        return 4 * self.tokens * heads * self.dim


QUICK = [Shape(8192, 1, 32, 8, 128), Shape(4096, 2, 32, 8, 64)]
SHAPES = [
    *QUICK,
    Shape(8192, 1, 28, 4, 128),
    Shape(8192, 1, 32, 32, 128),
    Shape(8192, 1, 64, 8, 128),
    Shape(4096, 4, 16, 1, 256),
    Shape(32768, 1, 32, 8, 128),
]


def angles(length: int, dim: int) -> Tensor:
    """(length, dim / 2) in fp32."""
    frequencies = 500_000 ** -(torch.arange(0, dim, 2, device="cuda").double() / dim)
    return torch.outer(torch.arange(length, device="cuda").double(), frequencies).float()


def tables(length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (length, dim / 2) in fp32."""
    turns = angles(length, dim)
    return turns.cos(), turns.sin()


def freqs(length: int, dim: int) -> Tensor:
    """As Megatron and TransformerEngine take them, (length, 1, 1, dim) in fp32."""
    turns = angles(length, dim)
    return torch.cat((turns, turns), -1)[:, None, None]


def turned(t: Tensor, turns: Tensor, sign: int = 1) -> Tensor:
    """T (s, …, n, d) turned by angles (s, d / 2) in float64."""
    a, b = t.double().chunk(2, -1)
    turns = turns.double().view(len(turns), *[1] * (t.dim() - 2), -1)
    cos, sin = turns.cos(), sign * turns.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def parts(packed: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as Megatron cuts them out; the query is copied."""
    per_group = shape.heads // shape.groups * shape.dim
    grouped = packed.view(*packed.shape[:2], shape.groups, -1)
    q, k, v = grouped.split((per_group, shape.dim, shape.dim), -1)
    return q.reshape(*packed.shape[:2], -1, shape.dim), k, v


def random(*shape: int) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(*shape, device="cuda", dtype=BF16)


def packed_contest(shape: Shape) -> Contest:
    """Packed to query, key and value."""
    turns = angles(shape.length, shape.dim)
    heads = shape.heads + 2 * shape.groups

    def draw() -> Inputs:
        grads = tuple(
            random(shape.length, shape.batch, n, shape.dim) for n in (shape.heads, shape.groups, shape.groups)
        )
        return Inputs((random(shape.length, shape.batch, heads * shape.dim),), grads)

    def exact(inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        q, k, v = parts(inputs.leaves[0].detach(), shape)
        dq, dk, dv = inputs.grads
        dq, dk = (turned(x, turns, -1).unflatten(2, (shape.groups, -1)) for x in (dq, dk))
        gradient = torch.cat((dq, dk, dv.double()[:, :, :, None]), 3).flatten(2)
        return (turned(q, turns), turned(k, turns), v), (gradient,)

    spared = dict.fromkeys(("composer, v a view", "megatron", "torch.compile", "torch"), shape.bytes(shape.groups))
    return Contest(f"packed {shape}", shape.bytes(heads), shape.bytes(heads), draw, exact, spared)


def packed_contenders(shape: Shape) -> Contenders:
    """Everyone who can start from Megatron's packed projection."""
    cos_sin, frequencies = tables(shape.length, shape.dim), freqs(shape.length, shape.dim)
    sizes = [shape.heads // shape.groups * shape.dim, shape.dim, shape.dim]

    def in_groups(packed: Tensor) -> Tensor:
        return packed.view(*packed.shape[:2], shape.groups, -1)

    def megatron() -> Operation:
        turn = megatron_rotation()

        def split(packed: Tensor) -> tuple[Tensor, ...]:
            q, k, v = parts(packed, shape)
            return turn(q, frequencies), turn(k, frequencies), v

        return split

    def transformer_engine() -> Operation:
        function = importlib.import_module("transformer_engine.pytorch.attention.rope").apply_fused_qkv_rotary_pos_emb
        return lambda packed: function(in_groups(packed), frequencies, frequencies, sizes)

    def in_torch(packed: Tensor) -> tuple[Tensor, ...]:
        q, k, v = parts(packed, shape)
        return formula(q, *cos_sin), formula(k, *cos_sin), v

    return {
        "composer": lambda: lambda packed: rope.rope_qkv(packed, *cos_sin, **shape.names),
        "composer, v a view": lambda: lambda packed: rope.rope_qkv(packed, *cos_sin, **shape.names, copy_value=False),
        "composer, angles": lambda: (
            lambda packed: rope.apply_fused_qkv_rotary_pos_emb(in_groups(packed), frequencies, frequencies, sizes)
        ),
        "te, angles": transformer_engine,
        "megatron": megatron,
        "torch.compile": lambda: compiled(in_torch),
        "torch": lambda: in_torch,
    }


def apart_contest(shape: Shape) -> Contest:
    """Query and key that lie apart."""
    turns = angles(shape.length, shape.dim)
    moved = shape.bytes(shape.heads + shape.groups)

    def draw() -> Inputs:
        q, dq, k, dk = (
            random(shape.length, shape.batch, n, shape.dim) for n in (shape.heads, shape.groups) for _ in range(2)
        )
        return Inputs((q, k), (dq, dk))

    def exact(inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        results = [turned(x.detach(), turns) for x in inputs.leaves]
        return results, [turned(x, turns, -1) for x in inputs.grads]

    return Contest(f"q, k {shape}", moved, moved, draw, exact)


def apart_contenders(shape: Shape) -> Contenders:
    """Everyone who turns a query and a key. Liger turns its inputs in place, so that it has to come last."""
    cos_sin, frequencies = tables(shape.length, shape.dim), freqs(shape.length, shape.dim)

    def on_both(turn: Callable[[Tensor], Tensor]) -> Operation:
        return lambda q, k: (turn(q), turn(k))

    def megatron() -> Operation:
        turn = megatron_rotation()
        return on_both(lambda x: turn(x, frequencies))

    def transformer_engine() -> Operation:
        function = importlib.import_module("transformer_engine.pytorch.attention.rope").apply_rotary_pos_emb
        return on_both(lambda x: function(x, frequencies, tensor_format="sbhd", fused=True))

    def quack() -> Operation:
        function = importlib.import_module("quack.rotary").apply_rotary_emb
        return on_both(lambda x: function(x.transpose(0, 1), *cos_sin).transpose(0, 1))

    def liger() -> Operation:
        function = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction
        wide = [torch.cat((table, table), -1)[None] for table in cos_sin]

        def turn(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            q, k = function.apply(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), *wide)
            return q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3)

        return turn

    return {
        "composer": lambda: lambda q, k: rope.rope_qk(q, k, *cos_sin),
        "composer, one by one": lambda: on_both(lambda x: rope.rope(x, *cos_sin)),
        "composer, angles": lambda: on_both(lambda x: rope.fused_apply_rotary_pos_emb(x, frequencies)),
        "te, angles": transformer_engine,
        "quack": quack,
        "megatron": megatron,
        "torch.compile": lambda: compiled(on_both(lambda x: formula(x, *cos_sin))),
        "liger": liger,
    }


def sequences_contest(shape: Shape, boundaries: Tensor) -> Contest:
    """One tensor of heads (t, n, d), its tokens in packed sequences."""
    place = torch.cat([torch.arange(length, device="cuda") for length in boundaries.diff().tolist()])
    turns = angles(shape.length, shape.dim)[place]
    size = (shape.length, shape.heads, shape.dim)
    moved = shape.bytes(shape.heads)

    def exact(inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return (turned(inputs.leaves[0].detach(), turns),), (turned(inputs.grads[0], turns, -1),)

    name = f"{len(boundaries) - 1} sequences {shape}"
    return Contest(name, moved, moved, lambda: Inputs((random(*size),), (random(*size),)), exact)


def sequences_contenders(shape: Shape, boundaries: Tensor) -> Contenders:
    """Everyone who knows packed sequences. Megatron waits for the GPU in between, which no CUDA graph can."""
    longest = int(boundaries.diff().max())
    cos_sin, frequencies = tables(longest, shape.dim), freqs(longest, shape.dim)

    def transformer_engine() -> Operation:
        function = importlib.import_module("transformer_engine.pytorch.attention.rope").apply_rotary_pos_emb
        return lambda t: function(t, frequencies, tensor_format="thd", fused=True, cu_seqlens=boundaries)

    def quack() -> Operation:
        function = importlib.import_module("quack.rotary").apply_rotary_emb
        return lambda t: function(t, *cos_sin, cu_seqlens=boundaries, max_seqlen=longest)

    return {
        "composer": lambda: lambda t: rope.rope(t, *cos_sin, cu_seqlens=boundaries),
        "composer, angles": lambda: lambda t: rope.fused_apply_rotary_pos_emb_thd(t, boundaries, frequencies),
        "te, angles": transformer_engine,
        "quack": quack,
    }


def megatron_rotation() -> Callable[[Tensor, Tensor], Tensor]:
    """Megatron-core's own, of tokens (s, b)."""
    return importlib.import_module("megatron.core.models.common.embeddings.rope_utils")._apply_rotary_pos_emb_bshd


def formula(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """PyTorch's own operations on tokens (s, b), in fp32 as the kernels compute."""
    a, b = t.float().chunk(2, -1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(t.dtype)


def launches(half: int) -> Iterator[_rope.Launch]:
    """Launches worth timing: 8 to 64 pairs a thread."""
    for tokens, heads, warps in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        if 8 <= tokens * heads * half / warps / 32 <= 64:
            yield _rope.Launch(tokens, heads, warps)


def tune_rope(shape: Shape, limit: float) -> list[Row]:
    """Time launches of the three operations on tables, and of the first on angles, best first."""
    heads = shape.heads + 2 * shape.groups
    plan = _rope.Plan(shape.heads, shape.groups, shape.dim, False, 0, 0, 1, True)
    plain = plan._replace(kv_heads=0)
    read = _rope.Tables(*tables(shape.length, shape.dim), None)
    computed = _rope.Tables(angles(shape.length, shape.dim), None, None)
    sets = [packed_contest(shape).draw() for _ in range(set_count(shape.bytes(heads)))]
    packed = [inputs.leaves[0].detach() for inputs in sets]
    q, k, v = zip(*(inputs.grads for inputs in sets), strict=True)
    half = shape.dim // 2
    whole = _rope.default_launch(shape.heads, shape.groups, True, half)
    cases = {
        "split": (heads, whole, lambda i, launch: _rope.launch_split(packed[i], read, plan, True, launch)),
        "split, angles": (heads, whole, lambda i, launch: _rope.launch_split(packed[i], computed, plan, True, launch)),
        "join": (heads, whole, lambda i, launch: [_rope.launch_join(q[i], k[i], v[i], read, plan, launch)]),
        "one tensor": (
            shape.heads,
            _rope.default_launch(shape.heads, 0, False, half),
            lambda i, launch: [_rope.launch_turn(q[i], read, plain, False, launch)],
        ),
    }
    rows = []
    for name, (count, default, call) in cases.items():
        rows += tune(f"{name} {shape}", shape.bytes(count), limit, call, default, launches(half))
    return rows


def main() -> None:
    """Run from the command line."""
    with session("rope", __doc__) as run:
        if run.options.tune:
            for shape in QUICK:
                run.add(tune_rope(shape, run.limits.copy))
            return
        for shape in QUICK if run.options.quick else SHAPES:
            run.add(compare(packed_contest(shape), run.chosen(packed_contenders(shape)), run.limits.copy))
            run.add(compare(apart_contest(shape), run.chosen(apart_contenders(shape)), run.limits.copy))
            if shape.batch == 1:
                steps = torch.linspace(0, 1, 17, device="cuda").square() * shape.length
                boundaries = steps.to(torch.int32)
                contenders = run.chosen(sequences_contenders(shape, boundaries))
                run.add(compare(sequences_contest(shape, boundaries), contenders, run.limits.copy))
        tiny = Shape(16, 1, 32, 8, 64)
        run.add_host_times(host_times(packed_contest(tiny), run.chosen(packed_contenders(tiny))))
        apart = host_times(apart_contest(tiny), run.chosen(apart_contenders(tiny)))
        run.add_host_times({f"{name}, q and k": times for name, times in apart.items()})


if __name__ == "__main__":
    main()
