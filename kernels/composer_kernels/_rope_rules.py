"""What `rope` and its kin accept, and that arguments which look like accepted ones are not examined again."""

from __future__ import annotations

import torch
from torch import Tensor

from composer_kernels._launch import Kept, check_dtypes, describe, runs_kernel, traits
from composer_kernels._rope import Plan, Settled, Tables


def settle(
    op: str,
    tokens: Tensor,
    heads: tuple[int, int, int],
    cos: Tensor,
    sin: Tensor | None,
    interleaved: bool = False,
    position_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    restart_positions: bool = True,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> tuple[Tables, Plan]:
    """`check`, but once only for all kernels' arguments that agree in everything its rules read."""
    options = (interleaved, position_offset, cu_seqlens, restart_positions, cp_rank, cp_size)
    tables_want_gradient = torch.is_grad_enabled() and (cos.requires_grad or (sin is not None and sin.requires_grad))
    if torch.compiler.is_compiling() or not runs_kernel(tokens) or tables_want_gradient:
        return check(op, tokens, heads, cos, sin, *options)
    numbers = (heads, interleaved, restart_positions, cp_rank, cp_size)
    key = (op, numbers, traits(tokens), traits(cos), traits(sin), traits(cu_seqlens))
    plan = _settled.get(key)
    if plan is not None and 0 <= position_offset <= plan.most_offset:
        return Tables(cos, sin, cu_seqlens), plan.at(position_offset)
    tables, checked = check(op, tokens, heads, cos, sin, *options)
    if tables.cos is cos and tables.sin is sin:
        span = _span(tokens.shape[0], cu_seqlens, restart_positions, cp_size)
        _settled.keep(key, Settled.of(checked, cos.shape[0] - span if span else position_offset))
    return tables, checked


_settled: Kept[Settled] = Kept()


def _span(length: int, cu_seqlens: Tensor | None, restart_positions: bool, cp_size: int) -> int:
    """Positions that `length` tokens here take at least, as far as the host knows."""
    return length * cp_size if cu_seqlens is None or not restart_positions else min(length, 1)


def check(
    op: str,
    tokens: Tensor,
    heads: tuple[int, int, int],
    cos: Tensor,
    sin: Tensor | None,
    interleaved: bool = False,
    position_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    restart_positions: bool = True,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> tuple[Tables, Plan]:
    """Refuse what does not fit; else the tables and the plan of (s, …) or (t, …) tokens."""
    sin_dtype = cos.dtype if sin is None else sin.dtype
    if heads[1]:
        check_dtypes(op, qkv=tokens.dtype, cos=cos.dtype, sin=sin_dtype)
    else:
        check_dtypes(op, t=tokens.dtype, cos=cos.dtype, sin=sin_dtype)
    shape, device, length = cos.shape, tokens.device, tokens.shape[0]  # asking a tensor takes longer than all the rest
    if len(shape) != 2 or (sin is not None and sin.shape != shape) or not 2 <= 2 * shape[1] <= heads[2]:
        sines = "" if sin is None else f" and sin {describe(sin)}"
        raise ValueError(
            f"{op}: cos is {describe(cos)}{sines}; accepted is (positions, HALF), the same for both, with HALF from 1 "
            f"to half of a head's {heads[2]} elements"
        )
    wants_gradient = torch.is_grad_enabled() and (cos.requires_grad or (sin is not None and sin.requires_grad))
    if wants_gradient and not op.endswith("reference"):
        raise ValueError(f"{op}: cos and sin get no gradient, yet they require one; rope_reference differentiates them")
    if cos.device != device or (sin is not None and sin.device != device):
        raise ValueError(f"{op}: the tables must be on {device}, where the heads are; cos is {describe(cos)}")
    if not 0 <= cp_rank < cp_size or (cp_size > 1 and cu_seqlens is None and length % 2):
        raise ValueError(
            f"{op}: cp_rank is {cp_rank} and cp_size {cp_size} for {length} tokens here; accepted are ranks from 0 to "
            "cp_size - 1, and two chunks of equal length on each"
        )
    last = position_offset + _span(length, cu_seqlens, restart_positions, cp_size)
    if position_offset < 0 or (length and last > shape[0]):
        raise ValueError(
            f"{op}: position_offset is {position_offset} and positions go to {last - 1}; accepted are positions from 0 "
            f"to {shape[0] - 1}, which the tables have"
        )
    if cu_seqlens is not None:
        _check_boundaries(op, cu_seqlens, tokens)
    if sin is not None and sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return Tables(cos, sin, cu_seqlens), Plan(*heads, interleaved, position_offset, cp_rank, cp_size, restart_positions)


def _check_boundaries(op: str, cu_seqlens: Tensor, given: Tensor) -> None:
    integers = cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integers or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or not cu_seqlens.is_contiguous():
        raise ValueError(
            f"{op}: cu_seqlens must be (sequences + 1,) of int32 or int64, contiguous, for at least one sequence; "
            f"given {describe(cu_seqlens)}"
        )
    if cu_seqlens.device != given.device:
        raise ValueError(f"{op}: cu_seqlens must be on {given.device}; given {describe(cu_seqlens)}")
