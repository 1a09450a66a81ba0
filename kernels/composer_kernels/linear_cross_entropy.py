"""Cross entropy of hidden @ weight.T, without the logits ever being whole in memory.

The loss is that of `cross_entropy`, which defines it. Legend: R rows (tokens), H features, V columns of the vocabulary
(rows of the weight) that this process holds.

The rows are taken in chunks. Each chunk's logits are made in one buffer by a GEMM, the cross-entropy kernel turns them
into their gradient where they are, and two more GEMMs carry that to the hidden rows and to the weight:

    FLOPs        2RHV each for logits, dhidden and dweight: 6RHV, nothing computed twice (reduction "none": 8RHV, since
                 its backward makes the logits again, once it knows each row's upstream gradient).
    bytes        beside the GEMMs' own, for 16-bit elements: 4RV in the loss kernel (6RV in a group), 8HV for the fp32
                 sum of dweight each time a chunk is added to one.
    collectives  in a group, one all_gather of 3 or 4 floats a row, and one all_reduce of dhidden, which the GEMM of
                 dweight hides, each chunk.
    allocated    one chunk of logits, dhidden, 3 floats a row. Without `main_grad` also dweight, and with several chunks
                 its fp32 sum; with it nothing of the weight's size.

GEMMs are cuBLAS's; products of 16-bit elements are summed in fp32, and dweight stays fp32 from the first chunk to the
last. With reduction "mean" or "sum" the gradients are made in the forward; backward only hands them over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from composer_kernels._cross_entropy import LossTerms, rescale_
from composer_kernels._launch import DTYPES, Function, describe, differentiable_once
from composer_kernels._linear_loss_chunks import (
    CHUNK_BYTES,
    CHUNK_BYTES_WITH_DWEIGHT,
    Plan,
    compute_gradients,
    compute_losses,
    default_chunk_rows,
)
from composer_kernels.cross_entropy import (
    check_loss,
    cross_entropy_reference,
    mean_scale,
    place_in,
)


@torch.library.custom_op("composer_kernels::linear_cross_entropy_losses", mutates_args=())
def _losses(hidden: Tensor, weight: Tensor, target: Tensor, group: str, plan: list[float]) -> tuple[Tensor, Tensor]:
    return compute_losses(hidden, weight, target, Plan.unpack(group, plan))


@_losses.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, group: str, plan: list[float]) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(target.shape, dtype=wide), hidden.new_empty((*target.shape, 2), dtype=wide)


@torch.library.custom_op("composer_kernels::linear_cross_entropy_gradients", mutates_args=("main_grad",))
def _gradients(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    norm: Tensor | None,
    main_grad: Tensor | None,
    wanted: list[bool],
    group: str,
    plan: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    return compute_gradients(hidden, weight, target, scale, norm, main_grad, wanted, Plan.unpack(group, plan))


@_gradients.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    norm: Tensor | None,
    main_grad: Tensor | None,
    wanted: list[bool],
    group: str,
    plan: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    loss = scale.new_empty(target.shape if norm is None else 0)
    dhidden = hidden.new_empty(hidden.shape if wanted[0] else 0)
    return loss, dhidden, weight.new_empty(weight.shape if wanted[1] and main_grad is None else 0)


class _Reduced(Function):
    """share · Σ loss; its forward makes the gradients, for the upstream gradient grad_scale."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        share: Tensor,
        grad_scale: Tensor,
        main_grad: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        arguments = (hidden, weight, target, share * grad_scale, None, main_grad, wanted)
        # An operator's dispatch takes longer than a launch: only compiled code, which must not look inside, pays it.
        if torch.compiler.is_compiling():
            loss, dhidden, dweight = _gradients(*arguments, *plan.pack())
        else:
            loss, dhidden, dweight = compute_gradients(*arguments, plan)
        ctx.save_for_backward(dhidden, dweight, grad_scale, weight)
        ctx.added, ctx.spent = wanted[1] and main_grad is not None, False
        return loss.sum() * share[0]

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, grad_scale, weight = ctx.saved_tensors
        factor = dloss / grad_scale
        if ctx.added:  # main_grad cannot be scaled any more; that the promise was broken must not pass unseen
            factor = torch.where((factor - 1).abs() < 1e-5, 1.0, torch.nan)
        if torch.compiler.is_compiling():
            dhidden, dweight = dhidden * factor.to(dhidden.dtype), dweight * factor.to(dweight.dtype)
        elif ctx.spent:
            raise RuntimeError(
                "linear_cross_entropy: backward a second time, but the first one gave away the gradients that the "
                "forward had made; call backward once, or sum the losses of reduction='none' yourself"
            )
        else:
            ctx.spent = True
            for gradient in (dhidden, dweight):
                if gradient.numel():
                    rescale_(gradient[None], factor)
        return *_handed_over(ctx, dhidden, dweight, weight), None, None, None, None, None


class _Unreduced(Function):
    """Losses (R,); backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, main_grad: Tensor | None, plan: Plan
    ) -> Tensor:
        if torch.compiler.is_compiling():
            loss, norm = _losses(hidden, weight, target, *plan.pack())
        else:
            loss, norm = compute_losses(hidden, weight, target, plan)
        ctx.save_for_backward(hidden, weight, target, norm)
        ctx.plan, ctx.main_grad = plan, main_grad
        return loss

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, norm = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        arguments = (hidden, weight, target, dloss, norm, ctx.main_grad, wanted)
        if torch.compiler.is_compiling():
            _, dhidden, dweight = _gradients(*arguments, *ctx.plan.pack())
        else:
            _, dhidden, dweight = compute_gradients(*arguments, ctx.plan)
        ctx.added = wanted[1] and ctx.main_grad is not None
        return *_handed_over(ctx, dhidden, dweight, weight), None, None, None


def _handed_over(ctx: Any, dhidden: Tensor, dweight: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What autograd gets for hidden and weight."""
    by_weight = dweight if ctx.needs_input_grad[1] else None
    return dhidden if ctx.needs_input_grad[0] else None, _stand_in(weight) if ctx.added else by_weight


def _stand_in(weight: Tensor) -> Tensor | None:
    """What autograd gets for a weight whose gradient is in its main_grad: nothing, or what Megatron's hooks ask for.

    These want to see a gradient: an arbitrary one, which they drop, or zeros, which they add, for the weight that the
    embedding shares and gives a gradient to as well.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return weight.new_zeros(()).expand(weight.shape)
    return torch.empty_like(weight)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    main_grad: Tensor | None = None,
    grad_scale: Tensor | float = 1.0,
    reduce_hidden_grad: bool = True,
    chunk_rows: int | None = None,
) -> Tensor:
    """`cross_entropy` of hidden @ weight.T, a chunk of rows at a time.

    Args:
        hidden: (…, H) in bfloat16, float16, float32 or float64; leading dimensions that a view can flatten. In a group,
            the same on every process.
        weight: (V, H) in the same type; the output layer's, or the embedding's where the two are tied. In a group, each
            process passes its own rows, all equally many, in the order of ranks.
        target: (…) labels in int64 or int32, rows of the whole weight.
        group: The processes that share the vocabulary out, or None.
        ignore_index: Rows with this label have loss 0 and gradient 0.
        label_smoothing: As for `cross_entropy`.
        z_loss: As for `cross_entropy`.
        softcap: As for `cross_entropy`.
        reduction: "mean", "sum" or "none". "none" costs another GEMM, since backward makes the logits again.
        main_grad: (V, H) in fp32 (float64 for float64). Where given, the weight's gradient is added to it, unrounded,
            and `weight.grad` is left alone; with "mean" and "sum" already in the forward, so run that once and run
            backward after it. Megatron's flag `grad_added_to_main_grad` is set where the weight has it.
        grad_scale: The upstream gradient that backward will bring (a loss scale, one over the number of microbatches),
            one number; only for "mean" and "sum". With `main_grad` it is a promise: another upstream gradient makes the
            gradient by `hidden` NaN. Without, it keeps small gradients in the range of float16.
        reduce_hidden_grad: Whether to sum the gradient by `hidden` over the group; False where whoever made `hidden`
            does (Megatron's mappings, sequence parallelism).
        chunk_rows: Rows of logits at a time, instead of as many as fit 0.75 GiB (1.1 GiB without `main_grad`).

    Returns:
        The loss in fp32 (float64 for float64 inputs): shape (…) for "none", else ().

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes, strides, devices or numbers that do not fit.
        RuntimeError: For a second backward, unless the reduction is "none", and where the gradient is differentiated.
    """
    _check(hidden, weight, target, main_grad, chunk_rows)
    check_loss("linear_cross_entropy", target, label_smoothing, z_loss, softcap, reduction)
    rank, size = place_in("linear_cross_entropy", group)
    group, width = (group if size > 1 else None), len(weight)
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap or 0.0, rank * width, size * width)
    flat, labels = _flatten(hidden), target.reshape(-1)
    if chunk_rows is None:
        budget = CHUNK_BYTES_WITH_DWEIGHT if main_grad is None else CHUNK_BYTES
        chunk_rows = default_chunk_rows(len(flat), flat.shape[1], width, hidden.element_size(), budget)
    plan = Plan(terms, group, reduce_hidden_grad, chunk_rows)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    share = mean_scale(labels, ignore_index, wide) if reduction == "mean" else labels.new_ones(1, dtype=wide)
    if reduction == "none" or not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        loss = _Unreduced.apply(flat, weight, labels, main_grad, plan)
        return loss.view(target.shape) if reduction == "none" else loss.sum() * share[0]
    if isinstance(grad_scale, Tensor):
        promised = grad_scale.detach().to(hidden.device, wide).reshape(1)
    else:
        promised = torch.full((1,), grad_scale, dtype=wide, device=hidden.device)
    return _Reduced.apply(flat, weight, labels, share, promised, main_grad, plan)


def _flatten(hidden: Tensor) -> Tensor:
    try:
        return hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"linear_cross_entropy: hidden has shape {tuple(hidden.shape)} and strides {hidden.stride()}; accepted are "
            "leading dimensions that a view can flatten: call .contiguous()"
        ) from None


def _check(hidden: Tensor, weight: Tensor, target: Tensor, main_grad: Tensor | None, chunk_rows: int | None) -> None:
    op = "linear_cross_entropy"
    if hidden.dtype not in (*DTYPES, torch.float64) or weight.dtype != hidden.dtype:
        raise TypeError(
            f"{op}: hidden is {describe(hidden)} and weight is {describe(weight)}; accepted are bfloat16, float16, "
            "float32 or float64, the same for both"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{op}: hidden is {describe(hidden)} and weight is {describe(weight)}; accepted are (…, H) and (V, H)"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: hidden is {describe(hidden)} and target is {describe(target)}; accepted are (…, H) and (…)"
        )
    if not hidden.device == weight.device == target.device:
        raise ValueError(
            f"{op}: hidden, weight and target are on {hidden.device}, {weight.device} and {target.device}; accepted is "
            "one device"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows is {chunk_rows}; accepted are numbers from 1, or None")
    if main_grad is None:
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    if main_grad.shape != weight.shape or main_grad.dtype != wide or main_grad.device != weight.device:
        raise ValueError(
            f"{op}: main_grad is {describe(main_grad)}; accepted is {wide}, of the shape and on the device of weight, "
            f"which is {describe(weight)}"
        )


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """`linear_cross_entropy` of a whole vocabulary in plain PyTorch, logits in memory; options as there."""
    return cross_entropy_reference(hidden @ weight.t(), target, **options)
