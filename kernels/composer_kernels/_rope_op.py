"""Rotary embedding in plain PyTorch, as operators of torch.library and for autograd: what `rope` and others call.

Four operations on what `_rope` calls a plan and tables: turn one tensor, turn two, split a packed one into turned
query, turned key and value, and join such three. Each one's gradient is one of them with the angle negated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from composer_kernels._launch import Function, runs_kernel
from composer_kernels._rope import Plan, Tables, launch_join, launch_pair, launch_split, launch_turn, value_view


def turn(x: Tensor, tables: Tables, plan: Plan) -> Tensor:
    """`x`, plain or packed, with its heads turned: a new tensor."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Turn.apply(x, *tables, plan)
    return _turned(x, tables, plan)


def turn_(x: Tensor, tables: Tables, plan: Plan) -> Tensor:
    """`x` itself, its heads turned."""
    if torch.compiler.is_compiling():  # which decides itself what happens in place
        return x.copy_(turn(x, tables, plan))
    if torch.is_grad_enabled() and x.requires_grad:
        return _TurnInPlace.apply(x, *tables, plan)
    torch.autograd.graph.increment_version(x)
    return compute_turn(x, tables, plan, in_place=True)


def turn_pair(q: Tensor, k: Tensor, tables: Tables, plan: Plan) -> tuple[Tensor, Tensor]:
    """`q` and `k` with their heads turned: new tensors. The plan is that of `q`."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _TurnPair.apply(q, k, *tables, plan)
    return _both_turned(q, k, tables, plan)


def split(qkv: Tensor, tables: Tables, plan: Plan, copy_value: bool | None) -> tuple[Tensor, Tensor, Tensor]:
    """Turned query and key, and value, of packed `qkv`; the value copied where a gradient is wanted, if not said."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _Split.apply(qkv, *tables, plan, copy_value is not False)
    return _parts(qkv, tables, plan, copy_value is True)


def join(q: Tensor, k: Tensor, v: Tensor, tables: Tables, plan: Plan) -> Tensor:
    """Query and key turned, and value, packed."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Join.apply(q, k, v, *tables, plan)
    return _joined(q, k, v, tables, plan)


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: Plan) -> Tensor:
        _remember(ctx, cos, sin, cu_seqlens, plan)
        return _turned(x, Tables(cos, sin, cu_seqlens), plan)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return turn(dy, Tables(*ctx.saved_tensors), ctx.plan.back()), None, None, None, None


class _TurnInPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: Plan) -> Tensor:
        _remember(ctx, cos, sin, cu_seqlens, plan)
        ctx.mark_dirty(x)
        return compute_turn(x, Tables(cos, sin, cu_seqlens), plan, in_place=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return turn(dy, Tables(*ctx.saved_tensors), ctx.plan.back()), None, None, None, None


class _TurnPair(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        _remember(ctx, cos, sin, cu_seqlens, plan)
        return _both_turned(q, k, Tables(cos, sin, cu_seqlens), plan)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *turn_pair(dq, dk, Tables(*ctx.saved_tensors), ctx.plan.back()), None, None, None, None


class _Split(Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        plan: Plan,
        copy_value: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _remember(ctx, cos, sin, cu_seqlens, plan)
        return _parts(qkv, Tables(cos, sin, cu_seqlens), plan, copy_value)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return join(dq, dk, dv, Tables(*ctx.saved_tensors), ctx.plan.back()), None, None, None, None, None


class _Join(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        _remember(ctx, cos, sin, cu_seqlens, plan)
        return _joined(q, k, v, Tables(cos, sin, cu_seqlens), plan)

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> tuple[Tensor | None, ...]:
        return *split(dqkv, Tables(*ctx.saved_tensors), ctx.plan.back(), True), None, None, None, None


def _remember(ctx: Any, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: Plan) -> None:
    ctx.save_for_backward(cos, sin, cu_seqlens)
    ctx.plan = plan


# Only compiled code, which must not look inside, pays for an operator: its dispatch takes longer than a launch.


def _turned(x: Tensor, tables: Tables, plan: Plan) -> Tensor:
    if torch.compiler.is_compiling():
        return _turn_op(x, *tables, list(plan))
    return compute_turn(x, tables, plan)


def _both_turned(q: Tensor, k: Tensor, tables: Tables, plan: Plan) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return _pair_op(q, k, *tables, list(plan))
    return compute_pair(q, k, tables, plan)


def _parts(qkv: Tensor, tables: Tables, plan: Plan, copy_value: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        return compute_split(qkv, tables, plan, copy_value)
    q, k, v = _split_op(qkv, *tables, list(plan), copy_value)
    return q, k, v if copy_value else value_view(qkv, plan)


def _joined(q: Tensor, k: Tensor, v: Tensor, tables: Tables, plan: Plan) -> Tensor:
    if torch.compiler.is_compiling():
        return _join_op(q, k, v, *tables, list(plan))
    return compute_join(q, k, v, tables, plan)


def compute_turn(x: Tensor, tables: Tables, plan: Plan, in_place: bool = False) -> Tensor:
    """`launch_turn`, or the same in plain PyTorch where no kernel runs."""
    if runs_kernel(x):
        return launch_turn(x, tables, plan, in_place)
    if plan.kv_heads:
        q, k, v = split_reference(x, tables, plan)
        y = _pack(q, k, v, plan)
    else:
        y = turn_reference(x, tables, plan)
    return x.copy_(y) if in_place else y


def compute_pair(q: Tensor, k: Tensor, tables: Tables, plan: Plan) -> tuple[Tensor, Tensor]:
    """`launch_pair`, or the same in plain PyTorch where no kernel runs."""
    if runs_kernel(q):
        return launch_pair(q, k, tables, plan)
    return turn_reference(q, tables, plan), turn_reference(k, tables, plan)


def compute_split(qkv: Tensor, tables: Tables, plan: Plan, copy_value: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`launch_split`, or the same in plain PyTorch where no kernel runs."""
    if runs_kernel(qkv):
        return launch_split(qkv, tables, plan, copy_value)
    q, k, v = split_reference(qkv, tables, plan)
    return q, k, v.contiguous() if copy_value else v


def compute_join(q: Tensor, k: Tensor, v: Tensor, tables: Tables, plan: Plan) -> Tensor:
    """`launch_join`, or the same in plain PyTorch where no kernel runs."""
    if runs_kernel(q):
        return launch_join(q, k, v, tables, plan)
    return _pack(turn_reference(q, tables, plan), turn_reference(k, tables, plan), v, plan)


@torch.library.custom_op("composer_kernels::rope_turn", mutates_args=())
def _turn_op(x: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: list[int]) -> Tensor:
    return compute_turn(x, Tables(cos, sin, cu_seqlens), Plan(*plan))  # type: ignore[arg-type]


@_turn_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: list[int]) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("composer_kernels::rope_pair", mutates_args=())
def _pair_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: list[int]
) -> tuple[Tensor, Tensor]:
    return compute_pair(q, k, Tables(cos, sin, cu_seqlens), Plan(*plan))  # type: ignore[arg-type]


@_pair_op.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: list[int]
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("composer_kernels::rope_split", mutates_args=())
def _split_op(
    qkv: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: list[int], copy_value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = compute_split(qkv, Tables(cos, sin, cu_seqlens), Plan(*plan), copy_value)  # type: ignore[arg-type]
    return q, k, v if copy_value else qkv.new_empty(0)  # an operator returns no view


@_split_op.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: list[int], copy_value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q_heads, kv_heads, head_dim = plan[:3]
    q, k = (qkv.new_empty((*qkv.shape[:-1], heads, head_dim)) for heads in (q_heads, kv_heads))
    return q, k, qkv.new_empty(k.shape if copy_value else 0)


@torch.library.custom_op("composer_kernels::rope_join", mutates_args=())
def _join_op(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: list[int]
) -> Tensor:
    return compute_join(q, k, v, Tables(cos, sin, cu_seqlens), Plan(*plan))  # type: ignore[arg-type]


@_join_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor | None, cu_seqlens: Tensor | None, plan: list[int]
) -> Tensor:
    q_heads, kv_heads, head_dim = plan[:3]
    return q.new_empty((*q.shape[:-2], (q_heads + 2 * kv_heads) * head_dim))


def turn_reference(x: Tensor, tables: Tables, plan: Plan) -> Tensor:
    """Turn a plain tensor (…, heads, d)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = tables.cos.to(wide), None if tables.sin is None else tables.sin.to(wide)
    if sin is None:
        cos, sin = cos.cos(), cos.sin()
    position, inside = _positions(x.shape[0], tables, plan, x.device)
    in_table = (position < len(cos))[:, None]
    position = position.clamp(max=len(cos) - 1)
    over_heads = (slice(None), *[None] * (x.dim() - 2))
    cos, sin = (torch.where(in_table, table[position], torch.nan)[over_heads] for table in (cos, sin * plan.sign))
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    dim, sizes = (-1, (-1, 2)) if plan.interleaved else (-2, (2, -1))
    one, two = turned.to(wide).unflatten(-1, sizes).unbind(dim)
    pairs = torch.stack((one * cos - two * sin, two * cos + one * sin), dim)
    turned = torch.where(inside[over_heads][..., None], pairs.flatten(-2).to(x.dtype), turned)
    return torch.cat((turned, rest), -1)


def _positions(length: int, tables: Tables, plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position of each place, and whether it belongs to a sequence."""
    place = torch.arange(length, device=device)
    inside, start = torch.ones_like(place, dtype=torch.bool), torch.zeros_like(place)
    here: Tensor | int = length
    if tables.cu_seqlens is not None:
        bounds = tables.cu_seqlens.long()
        local = bounds // plan.cp_size
        index = torch.searchsorted(local, place, right=True) - 1
        inside = (index >= 0) & (index < len(bounds) - 1)
        index = index.clamp(0, len(bounds) - 2)
        start, here, place = bounds[index], local[index + 1] - local[index], place - local[index]
    if plan.cp_size > 1:
        chunk = here // 2
        place = place + torch.where(place < chunk, plan.cp_rank, 2 * plan.cp_size - 2 - plan.cp_rank) * chunk
    position = place + plan.offset + (0 if plan.restart else start)
    return torch.where(inside, position, 0), inside


def split_reference(qkv: Tensor, tables: Tables, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Turned query and key, and the value's view, of packed `qkv`."""
    grouped = qkv.unflatten(-1, (plan.kv_heads, -1))
    q, k = grouped[..., : -2 * plan.head_dim], grouped[..., -2 * plan.head_dim : -plan.head_dim]
    q = q.reshape(*qkv.shape[:-1], plan.q_heads, plan.head_dim)
    return turn_reference(q, tables, plan), turn_reference(k, tables, plan), value_view(qkv, plan)


def _pack(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    return torch.cat((q.unflatten(-2, (plan.kv_heads, -1)).flatten(-2), k, v), -1).flatten(-2)
