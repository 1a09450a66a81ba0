"""Cross entropy of logits: whole, or with the vocabulary split over the processes of a group.

For one row of logits with label y, over all V columns of the vocabulary:

    s_j  = logits_j, or softcap · tanh(logits_j / softcap)
    lse  = log Σ_j exp s_j
    loss = (1 - ε) (lse - s_y) + ε (lse - mean_j s_j) + z lse²
    dloss/ds_j = exp(s_j - lse) (1 + 2 z lse) - (1 - ε) [j = y] - ε / V

Everything is computed in fp32 and the loss is fp32, whatever the dtype of the logits. Legend: R rows (tokens), V
columns of the whole vocabulary, of which a process of the group holds `width`.

Bytes a 16-bit logit, of which there are R · width:

    two passes   read 2 for the statistics, then read 2 and write 2 for the gradient: 6. Between the passes ONE
                 all_gather of 3 floats a row: maximum, Σ exp, label's logit (4 with label smoothing: Σ s).
    one pass     read 2, write 2: 4. Loss and gradient in one kernel: for `inplace` with reduction "mean" or "sum" and
                 no group. The kernel reads a row twice, the second time backwards, so that what it read last, and is
                 still in the caches, comes first.

About 20 FLOPs a logit, far below what those bytes cost. Allocated: 3 or 4 floats a row and process, 3 floats a row for
the loss and for backward, and the gradient unless it goes where the logits are; labels are copied only if permuted. No
host synchronisation. Every sum has a fixed order: equal calls give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from composer_kernels._cross_entropy import LossTerms, gradient_into, loss_and_gradient_into, losses, rescale_
from composer_kernels._launch import DTYPES, Function, describe, differentiable_once

REDUCTIONS = ("none", "mean", "sum")


@torch.library.custom_op("composer_kernels::cross_entropy_forward", mutates_args=())
def _forward(logits: Tensor, target: Tensor, group: str, terms: list[float]) -> tuple[Tensor, Tensor]:
    return losses(logits, target, LossTerms.unpack(terms), _resolve_process_group(GroupName(group)) if group else None)


@_forward.register_fake
def _(logits: Tensor, target: Tensor, group: str, terms: list[float]) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(target.shape, dtype=wide), logits.new_empty((*target.shape, 2), dtype=wide)


@torch.library.custom_op("composer_kernels::cross_entropy_gradient", mutates_args=())
def _gradient(logits: Tensor, target: Tensor, norm: Tensor, scale: Tensor, terms: list[float]) -> Tensor:
    out = torch.empty_like(logits)
    gradient_into(out, logits, target, norm, scale, LossTerms.unpack(terms))
    return out


@_gradient.register_fake
def _(logits: Tensor, target: Tensor, norm: Tensor, scale: Tensor, terms: list[float]) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("composer_kernels::cross_entropy_one_pass", mutates_args=())
def _one_pass(logits: Tensor, target: Tensor, scale: Tensor, terms: list[float]) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(logits)
    return loss_and_gradient_into(out, logits, target, scale, LossTerms.unpack(terms)), out


@_one_pass.register_fake
def _(logits: Tensor, target: Tensor, scale: Tensor, terms: list[float]) -> tuple[Tensor, Tensor]:
    return scale.new_empty(target.shape), torch.empty_like(logits)


class _TwoPasses(Function):
    """Losses (R,) of logits (outer, inner, width); the gradient is made in backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, terms: LossTerms, group: ProcessGroup | None, inplace: bool
    ) -> Tensor:
        # An operator's dispatch takes longer than a launch: only compiled code, which must not look inside, pays it.
        if torch.compiler.is_compiling():
            loss, norm = _forward(logits, target, group.group_name if group else "", terms.pack())
        else:
            loss, norm = losses(logits, target, terms, group)
        ctx.save_for_backward(logits, target, norm)
        ctx.terms, ctx.inplace, ctx.spent = terms, inplace, False
        return loss

    @staticmethod
    @differentiable_once("cross_entropy")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            logits, target, norm = ctx.saved_tensors
            return _gradient(logits, target, norm, dloss, ctx.terms.pack()), None, None, None, None
        _refuse_second_backward(ctx)
        logits, target, norm = ctx.saved_tensors
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        gradient_into(out, logits, target, norm, dloss, ctx.terms)
        if ctx.inplace:
            ctx.spent = True
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None


class _OnePass(Function):
    """Σ scale · loss; its gradient is made at once, in place of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, scale: Tensor, terms: LossTerms) -> Tensor:
        if torch.compiler.is_compiling():
            loss, gradient = _one_pass(logits, target, scale, terms.pack())
        else:
            gradient = logits.detach()
            loss = loss_and_gradient_into(gradient, logits, target, scale, terms)
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(gradient)
        ctx.spent = False
        return loss.sum() * scale[0]

    @staticmethod
    @differentiable_once("cross_entropy")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            return ctx.saved_tensors[0] * dloss, None, None, None
        _refuse_second_backward(ctx)
        ctx.spent = True
        return rescale_(ctx.saved_tensors[0], dloss), None, None, None


def _refuse_second_backward(ctx: Any) -> None:
    if ctx.spent:
        raise RuntimeError(
            "cross_entropy: backward a second time, but with inplace=True the first one left the gradient where the "
            "logits were; call backward once, or pass inplace=False"
        )


def check_loss(
    op: str, target: Tensor, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str
) -> None:
    """Refuse what `cross_entropy` and `linear_cross_entropy` both do not accept; `op` is the one to name.

    Raises:
        TypeError: If labels are no integers.
        ValueError: If a number or the reduction is not among the accepted.
    """
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: target is {describe(target)}; accepted are int64 and int32")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; accepted are numbers in [0, 1)")
    if not z_loss >= 0:
        raise ValueError(f"{op}: z_loss is {z_loss}; accepted are numbers from 0")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap is {softcap}; accepted are positive numbers, or None for no cap")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; accepted are {', '.join(map(repr, REDUCTIONS))}")


def place_in(op: str, group: ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in the group and the group's size: 0 and 1 without a group.

    Raises:
        ValueError: If this process is not in the group.
    """
    if group is None:
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: group does not contain this process (global rank {dist.get_rank()})")
    return rank, dist.get_world_size(group)


def mean_scale(target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """1 / number of labels that count, at least one, as a tensor (1,)."""
    return _counted(target, ignore_index).to(dtype).reciprocal_()


def _counted(target: Tensor, ignore_index: int) -> Tensor:
    """Number of labels that count, at least one, as a tensor (1,)."""
    return (target != ignore_index).sum(0, keepdim=True).clamp_(min=1)


def _view_rows(logits: Tensor) -> Tensor:
    """`logits` (…, width) as a view (outer, inner, width)."""
    if logits.dim() <= 3:
        return logits[(None,) * (3 - logits.dim())]
    try:
        return logits.view(-1, *logits.shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"cross_entropy: logits have shape {tuple(logits.shape)} and strides {logits.stride()}; accepted are at "
            "most two leading dimensions in permuted order: call .contiguous()"
        ) from None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    inplace: bool = False,
) -> Tensor:
    """Cross entropy of `logits` against `target`, like `torch.nn.functional.cross_entropy` with more to ask for.

    On a GPU Triton kernels do it, on a CPU and in float64 plain PyTorch.

    Args:
        logits: (…, width) in bfloat16, float16, float32 or float64, neighbouring columns side by side in memory; rows
            may lie anywhere. In a group, each process passes its own columns, all equally many, in the order of ranks.
        target: (…) labels in int64 or int32, columns of the whole vocabulary, equal on all processes of the group.
        group: The processes that share the vocabulary out, or None.
        ignore_index: Rows with this label have loss 0 and gradient 0, whatever their logits.
        label_smoothing: ε, as PyTorch defines it: that share of the target goes to all V columns equally.
        z_loss: Weight of lse², which keeps the logits' scale from drifting (PaLM, arXiv 2204.02311, section 5).
        softcap: Caps the logits, as Gemma 2 does, to (-softcap, softcap); None for no cap.
        reduction: "none" for the losses of all rows, "sum" for their sum, "mean" for the mean over rows that are not
            ignored (0 where all are).
        inplace: Let the gradient overwrite `logits`, in the forward where the reduction is "mean" or "sum" and there
            is no group, else in backward. `logits` must then not be used again, and only one backward is possible.

    Returns:
        The loss in fp32 (float64 for float64 logits): shape (…) for "none", else (). A label that is neither a column
        nor `ignore_index` makes its row's loss and gradient NaN: no error, since that would stall the host.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes, strides, devices or numbers that do not fit.
        RuntimeError: For a second backward with `inplace`, and where the gradient is differentiated.
    """
    _check(logits, target, group)
    check_loss("cross_entropy", target, label_smoothing, z_loss, softcap, reduction)
    rank, size = place_in("cross_entropy", group)
    group, width = (group if size > 1 else None), logits.shape[-1]
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap or 0.0, rank * width, size * width)
    rows, labels = _view_rows(logits), target if target.dim() == 1 else target.reshape(-1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    if inplace and group is None and reduction != "none" and torch.is_grad_enabled() and logits.requires_grad:
        scale = mean_scale(labels, ignore_index, wide) if reduction == "mean" else labels.new_ones(1, dtype=wide)
        return _OnePass.apply(rows, labels, scale, terms)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and logits.requires_grad):
        loss = _TwoPasses.apply(rows, labels, terms, group, inplace)
    else:
        loss, _ = losses(rows, labels, terms, group)
    if reduction == "none":
        return loss if target.dim() == 1 else loss.view(target.shape)
    return loss.sum() / _counted(labels, ignore_index)[0] if reduction == "mean" else loss.sum()


def _check(logits: Tensor, target: Tensor, group: ProcessGroup | None) -> None:
    if logits.dtype not in (*DTYPES, torch.float64):
        raise TypeError(
            f"cross_entropy: logits are {describe(logits)}; accepted are bfloat16, float16, float32, float64"
        )
    if logits.dim() < 1 or logits.shape[-1] < 1 or target.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: logits are {describe(logits)} and target is {describe(target)}; accepted are (…, width) "
            "with at least one column, and (…)"
        )
    if target.device != logits.device:
        raise ValueError(
            f"cross_entropy: logits are on {logits.device} and target is on {target.device}; accepted is one"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"cross_entropy: logits have strides {logits.stride()}; accepted are rows whose columns lie side by side: "
            "call .contiguous()"
        )


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy` of a whole vocabulary in plain PyTorch, which autograd differentiates as often as one likes."""
    s = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    kept = target != ignore_index
    lse = torch.logsumexp(s, -1)
    at_label = s.gather(-1, torch.where(kept, target, 0)[..., None].long())[..., 0]
    smooth = label_smoothing * s.mean(-1) if label_smoothing else 0.0
    loss = torch.where(kept, lse - (1 - label_smoothing) * at_label - smooth + z_loss * lse.square(), 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / kept.sum().clamp(min=1) if reduction == "mean" else loss.sum()
