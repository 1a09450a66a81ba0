"""AdamW's update and the norm, by kernels or PyTorch and as operators, and the refusal of what they cannot take."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from composer_kernels._adamw import Group, Update, launch_norm, prepare_update, tensors_of
from composer_kernels._launch import DTYPES, check_dtypes, describe, runs_kernel
from composer_kernels._multi_tensor import aligned, is_dense


class Memo:
    """What the last update of an optimizer launched, for the next one to launch again.

    That is where all tensors are the same or, as gradients may be, lie in the same places in the same way. To find that
    out takes the host a fifth of the time for preparing the launches anew. It keeps none of the tensors alive.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._lasting: list[weakref.ref[Tensor]] = []
        self._layout: tuple[object, ...] = ()
        self._updates: list[Update] = []

    def recall(self, groups: Sequence[Group]) -> list[Update] | None:
        """The launches of the last update, or None where the next one needs others."""
        lasting = _lasting(groups)
        if not self._updates or len(lasting) != len(self._lasting):
            return None
        same = all(map(operator.is_, lasting, map(operator.call, self._lasting)))
        return self._updates if same and self._layout == _layout(groups, lasting) else None

    def keep(self, groups: Sequence[Group], updates: list[Update]) -> None:
        """Remember these launches."""
        lasting = _lasting(groups)
        self._lasting = [weakref.ref(tensor) for tensor in lasting]
        self._layout, self._updates = _layout(groups, lasting), updates


def _lasting(groups: Sequence[Group]) -> list[Tensor]:
    """All tensors but the gradients, which are others in each step."""
    lasting: list[Tensor] = []
    for group in groups:
        copies = [copy for copy in group.copies if copy is not None]
        steps = [] if isinstance(group.steps, int) else group.steps
        for tensors in (group.params, group.exp_avgs, group.exp_avg_sqs, copies, steps):
            lasting.extend(tensors)
    return lasting


def _layout(groups: Sequence[Group], lasting: Sequence[Tensor]) -> tuple[object, ...]:
    """Where all tensors lie, what the gradients are like, and the stream whose work the tables wait for."""
    grads = list(itertools.chain.from_iterable(group.grads for group in groups))
    device = grads[0].device
    return (
        torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        [(isinstance(group.steps, int), [copy is None for copy in group.copies]) for group in groups],
        [tensor.data_ptr() for tensor in lasting],
        [grad.data_ptr() for grad in grads],
        [grad.dtype for grad in grads],
        [grad.is_contiguous() or grad.stride() for grad in grads],
    )


def update_groups(
    groups: Sequence[Group],
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    memo: Memo | None = None,
) -> None:
    """AdamW on several groups, unchecked; one launch updates all that have equal element types.

    Args:
        groups: What to update.
        scale: Scalar on the device that the gradients are multiplied with first.
        found_inf: Scalar on the device; unless it is 0, nothing is changed.
        memo: Of the one who calls this again and again with the same tensors.
    """
    groups = [group for group in groups if group.params]
    if not groups:
        return
    capturing = groups[0].params[0].is_cuda and torch.cuda.is_current_stream_capturing()
    memo = None if capturing else memo  # a graph has tables of its own
    updates = None if memo is None else memo.recall(groups)
    if updates is not None:
        for update in updates:
            update.run(groups, scale, found_inf)
        return
    alike: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    others: list[tuple[Group, list[int]]] = []
    for number, group in enumerate(groups):
        for index, param in enumerate(group.params):
            if runs_kernel(param):
                tensors = tensors_of(group, index)
                kind = (param.device, *[None if tensor is None else tensor.dtype for tensor in tensors])
                alike.setdefault((*kind, aligned(tensors)), []).append((number, index))
        others.append((group, [index for index, param in enumerate(group.params) if not runs_kernel(param)]))
    updates = [prepare_update(groups, members) for members in alike.values()]
    for update in updates:
        update.run(groups, scale, found_inf)
    for group, indices in others:
        update_by_torch(group, indices, scale, found_inf)
    if memo is not None and not any(indices for _, indices in others) and not any(u.copied for u in updates):
        memo.keep(groups, updates)


def update_by_torch(group: Group, indices: Sequence[int], scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Update some tensors of a group by PyTorch's own AdamW, in fp32 at least."""
    if not indices or (found_inf is not None and bool(found_inf != 0)):
        return
    counted = None if isinstance(group.steps, int) else [group.steps[i] for i in indices]
    steps = counted or [torch.tensor(float(group.steps - 1)) for _ in indices]  # type: ignore[operator]
    stored = [[s[i] for i in indices] for s in (group.params, group.exp_avgs, group.exp_avg_sqs)]
    params, exp_avgs, exp_avg_sqs = [
        [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors] for tensors in stored
    ]
    grads = [group.grads[i].to(param.dtype) for i, param in zip(indices, params, strict=True)]
    adamw(
        params,
        grads if scale is None else [grad * scale for grad in grads],
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        amsgrad=False,
        beta1=group.betas[0],
        beta2=group.betas[1],
        lr=group.lr,
        weight_decay=group.weight_decay,
        eps=group.eps,
        maximize=group.maximize,
    )
    for tensors, computed in zip(stored, (params, exp_avgs, exp_avg_sqs), strict=True):
        for tensor, result in zip(tensors, computed, strict=True):
            if result is not tensor:
                tensor.copy_(result)
    for i, param in zip(indices, params, strict=True):
        copy = group.copies[i]
        if copy is not None:
            copy.copy_(param)


def norm_by_torch(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements by PyTorch, each tensor's in fp32 at least; an fp32 scalar."""
    if not grads:
        return torch.zeros(())
    wide = [torch.promote_types(grad.dtype, torch.float32) for grad in grads]
    norms = [torch.linalg.vector_norm(grad, dtype=dtype) for grad, dtype in zip(grads, wide, strict=True)]
    return torch.stack([norm.double() for norm in norms]).norm().float()


@torch.no_grad()
def compute_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm by the kernel, or by PyTorch where no kernel runs."""
    full = [grad for grad in grads if grad.numel()]
    if full and runs_kernel(full[0]) and {grad.dtype for grad in full}.issubset(DTYPES):
        return launch_norm(full)
    return norm_by_torch(full) if full else torch.zeros((), device=grads[0].device if grads else None)


@torch.library.custom_op("composer_kernels::grad_norm", mutates_args=())
def norm_op(grads: list[Tensor]) -> Tensor:
    return compute_norm(grads)


@norm_op.register_fake
def _(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


@torch.library.custom_op(
    "composer_kernels::adamw_step", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "copies")
)
def _step_op(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    copied: list[int],
    step: int,
    lr: float,
    lr_tensor: Tensor | None,
    hyperparameters: list[float],
    maximize: bool,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    by_index = dict(zip(copied, copies, strict=True))
    beta1, beta2, eps, weight_decay = hyperparameters
    group = Group(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        steps=steps or step,
        copies=[by_index.get(index) for index in range(len(params))],
        lr=lr if lr_tensor is None else lr_tensor,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )
    update_groups([group], scale, found_inf)


def step_compiled(group: Group, scale: Tensor | None, found_inf: Tensor | None) -> None:
    """`update_groups` as an operator, which `torch.compile` does not look into."""
    copies = [(index, copy) for index, copy in enumerate(group.copies) if copy is not None]
    lr = group.lr
    _step_op(
        list(group.params),
        list(group.grads),
        list(group.exp_avgs),
        list(group.exp_avg_sqs),
        list(group.steps) if not isinstance(group.steps, int) else [],
        [copy for _, copy in copies],
        [index for index, _ in copies],
        group.steps if isinstance(group.steps, int) else 0,
        0.0 if isinstance(lr, Tensor) else lr,
        lr if isinstance(lr, Tensor) else None,
        [*group.betas, group.eps, group.weight_decay],
        group.maximize,
        scale,
        found_inf,
    )


def check_step(group: Group, scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Refuse what cannot be updated.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For numbers, shapes, devices or layouts that do not fit.
    """
    _check_numbers(group, scale, found_inf)
    _check_steps(group)
    lists: dict[str, Sequence[Tensor | None]] = {
        "grads": group.grads,
        "exp_avgs": group.exp_avgs,
        "exp_avg_sqs": group.exp_avg_sqs,
        "copies": group.copies,
    }
    for name, tensors in lists.items():
        _check_length(name, tensors, group)
    for index, param in enumerate(group.params):
        if not is_dense(param):
            raise ValueError(f"adamw_step: params must be dense; given strides {param.stride()} of {describe(param)}")
        given = {name: tensors[index] for name, tensors in lists.items()}
        dtypes = {name: tensor.dtype for name, tensor in given.items() if tensor is not None}
        check_dtypes("adamw_step", params=param.dtype, **dtypes)
        for name, tensor in given.items():
            if tensor is not None:
                _check_layout(name, tensor, param, strides=name != "grads")


def _check_numbers(group: Group, scale: Tensor | None, found_inf: Tensor | None) -> None:
    for name, number in {"lr": group.lr, "eps": group.eps, "weight_decay": group.weight_decay}.items():
        if not isinstance(number, Tensor) and not number >= 0:
            raise ValueError(f"adamw_step: {name} must be at least 0; given {number!r}")
    if not all(0 <= beta < 1 for beta in group.betas):
        raise ValueError(f"adamw_step: betas must be at least 0 and less than 1; given {group.betas!r}")
    for name, scalar in {"lr": group.lr, "scale": scale, "found_inf": found_inf}.items():
        if isinstance(scalar, Tensor) and (scalar.numel() != 1 or not scalar.is_floating_point()):
            raise ValueError(f"adamw_step: {name} must be a floating-point scalar; given {describe(scalar)}")


def _check_steps(group: Group) -> None:
    if isinstance(group.steps, int):
        if group.steps < 1:
            raise ValueError(f"adamw_step: steps must be at least 1, the number of this update; given {group.steps}")
        return
    _check_length("steps", group.steps, group)
    for param, step in zip(group.params, group.steps, strict=True):
        if step.dtype != torch.float32 or step.dim() or step.device != param.device:
            wanted = f"a float32 scalar on the device of its parameter, {param.device}"
            raise ValueError(f"adamw_step: a step must be {wanted}; given {describe(step)}")


def _check_length(name: str, tensors: Sequence[Tensor | None], group: Group) -> None:
    if len(tensors) != len(group.params):
        wanted = f"one entry for each of {len(group.params)} params"
        raise ValueError(f"adamw_step: {name} must have {wanted}; given {len(tensors)}")


def _check_layout(name: str, tensor: Tensor, param: Tensor, *, strides: bool) -> None:
    if tensor.shape != param.shape or tensor.device != param.device:
        raise ValueError(f"adamw_step: {name} must be like its parameter, {describe(param)}; given {describe(tensor)}")
    if strides and tensor.stride() != param.stride():
        given = f"{tensor.stride()} of {describe(tensor)}"
        raise ValueError(f"adamw_step: {name} must have its parameter's strides, {param.stride()}; given {given}")
