"""The chunks of `linear_cross_entropy`: logits a part of the rows at a time, and what is made of them.

See there for the legend, bytes and FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from composer_kernels._cross_entropy import LossTerms, gradient_into, loss_and_gradient_into, losses

CHUNK_BYTES = 768 * 2**20
"""Most bytes of a chunk of logits: large GEMMs, and under 1 GB with what else is allocated beside `main_grad`."""

CHUNK_BYTES_WITH_DWEIGHT = 1152 * 2**20
"""The same where dweight is allocated anyway: fewer chunks, and 4096 rows x 131072 columns need no fp32 sum of it."""


def default_chunk_rows(rows: int, features: int, vocab: int, itemsize: int, budget: int = CHUNK_BYTES) -> int:
    """Rows of a chunk: as few chunks as `budget` bytes of logits allow, or of 128 rows, and about equally many in each.

    Each chunk adds to dweight once more. Where they fit, rows come in steps that make 2^22 elements of dhidden: 128
    tiles of 128 x 256, a full round for a GPU of 132 multiprocessors. A last round of fewer tiles takes as long.
    """
    most = max(128, budget // (vocab * itemsize) // 128 * 128)
    chunks = max(1, -(-rows // most))
    full = max(128, 2**22 // features // 128 * 128)
    in_rounds, even = (-(-rows // (step * chunks)) * step for step in (full, 128))
    return max(1, min(rows, in_rounds if in_rounds <= most else even))


@dataclass(frozen=True)
class Plan:
    """Which loss, who shares the vocabulary, whether they sum dhidden, how many rows of logits are made at a time."""

    terms: LossTerms
    group: ProcessGroup | None
    reduce: bool
    chunk_rows: int

    def pack(self) -> tuple[str, list[float]]:
        """As an operator takes it."""
        return self.group.group_name if self.group else "", [*self.terms.pack(), self.reduce, self.chunk_rows]

    @classmethod
    def unpack(cls, group: str, numbers: list[float]) -> Plan:
        """From what `pack` made."""
        *terms, reduce, chunk_rows = numbers
        in_group = _resolve_process_group(GroupName(group)) if group else None
        return cls(LossTerms.unpack(terms), in_group, bool(reduce), int(chunk_rows))


def _add_product(total: Tensor, slopes: Tensor, hidden: Tensor, accumulate: bool) -> None:
    """Total (V, H) = or += slopesᵀ @ hidden, summed and kept in the dtype of `total`, be it wider than the factors'."""
    if total.dtype == slopes.dtype:
        if accumulate:
            total.addmm_(slopes.t(), hidden)
        else:
            torch.mm(slopes.t(), hidden, out=total)
    elif not slopes.is_cuda:
        product = slopes.t().to(total.dtype) @ hidden.to(total.dtype)
        total.copy_(total + product if accumulate else product)
    elif accumulate:
        torch.addmm(total, slopes.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        torch.mm(slopes.t(), hidden, out_dtype=total.dtype, out=total)


def _walk(
    hidden: Tensor,
    weight: Tensor,
    plan: Plan,
    visit: Callable[[Tensor, slice], None],
    dhidden: Tensor | None = None,
    dweight: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """Make the logits chunk by chunk and hand each, (1, rows, V), to `visit` with the rows' place.

    Where gradients are asked for, `visit` must leave the gradient by the logits in place of these.

    Args:
        hidden: (R, H).
        weight: (V, H).
        plan: The chunks, and the group to sum `dhidden` in.
        visit: Called once a chunk.
        dhidden: (R, H) to write, or None.
        dweight: (V, H) to write or, with `accumulate`, to add to; or None.
        accumulate: See there.
    """
    rows, vocab = len(hidden), len(weight)
    # Rows begin at multiples of 16 elements for whatever V, which GEMMs and the loss kernel take at full width.
    buffer = hidden.new_empty(min(plan.chunk_rows, rows), -(-vocab // 16) * 16)[:, :vocab]
    pending = []
    if dweight is not None and not rows and not accumulate:
        dweight.zero_()
    for start in range(0, rows, plan.chunk_rows):
        here = slice(start, min(start + plan.chunk_rows, rows))
        logits = buffer[: here.stop - start]
        torch.mm(hidden[here], weight.t(), out=logits)
        visit(logits[None], here)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[here])
            if plan.group is not None and plan.reduce:
                pending.append(dist.all_reduce(dhidden[here], group=plan.group, async_op=True))
        if dweight is not None:
            _add_product(dweight, logits, hidden[here], accumulate or start > 0)
    for work in pending:
        work.wait()


def compute_losses(hidden: Tensor, weight: Tensor, target: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Losses (R,) and norms (R, 2), no gradient."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, norm = hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(len(hidden), 2, dtype=wide)

    def visit(logits: Tensor, here: slice) -> None:
        loss[here], norm[here] = losses(logits, target[here], plan.terms, plan.group)

    _walk(hidden, weight, plan, visit)
    return loss, norm


def compute_gradients(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    norm: Tensor | None,
    main_grad: Tensor | None,
    wanted: list[bool],
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of Σ scale · loss by hidden and weight, and unless the norms are known already the losses.

    Args:
        hidden: (R, H).
        weight: (V, H).
        target: (R,).
        scale: (1,), or with `norm` (R,).
        norm: (R, 2) from `compute_losses`, or None.
        main_grad: (V, H) to add the weight's gradient to, or None.
        wanted: Whether the gradients by hidden and by weight are wanted.
        plan: The loss and the chunks.

    Returns:
        Losses (R,), dhidden (R, H) and dweight (V, H), with no elements where not wanted or in `main_grad`.
    """
    loss = scale.new_empty(len(hidden) if norm is None else 0)

    def visit(logits: Tensor, here: slice) -> None:
        if norm is not None:
            gradient_into(logits, logits, target[here], norm[here], scale[here], plan.terms)
        elif plan.group is None:
            loss[here] = loss_and_gradient_into(logits, logits, target[here], scale, plan.terms)
        else:
            loss[here], known = losses(logits, target[here], plan.terms, plan.group)
            gradient_into(logits, logits, target[here], known, scale, plan.terms)

    dhidden = hidden.new_empty(hidden.shape) if wanted[0] else None
    dweight = main_grad if wanted[1] else None
    if wanted[1] and main_grad is None:
        several = len(hidden) > plan.chunk_rows
        dweight = weight.new_empty(weight.shape, dtype=scale.dtype if several else weight.dtype)
    _walk(hidden, weight, plan, visit, dhidden, dweight, main_grad is not None)
    dweight = weight.new_empty(0) if dweight is None or main_grad is not None else dweight.to(weight.dtype)
    return loss, hidden.new_empty(0) if dhidden is None else dhidden, dweight
