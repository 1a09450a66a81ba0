"""AdamW (arXiv 1711.05101) over many tensors at once, and the norm of their gradients.

At step t, with gradient g, learning rate lr and weight decay λ:

    m = β1·m + (1 - β1)·g        v = β2·v + (1 - β2)·g²
    p = (1 - lr·λ)·p - lr / (1 - β1^t) · m / (√v / √(1 - β2^t) + ε)

A copy of p in 16 bits, such as the weights that a model computes with, is written in the same pass. The gradient is
multiplied by a scale that is read on the GPU, such as that of clipping, so that clipping costs no pass of its own.

Bytes for N parameters: fp32 p, m, v and g are read, p, m, v and a 16-bit copy written, 30N (28N without the copy); the
norm reads the gradients once, 4N. About 20 FLOPs an element: memory decides.

Launches: one for each set of hyperparameters computes what is the same for a whole tensor, one updates all tensors of
equal element types; for the norm one, and two of PyTorch's that add up. Nothing waits for the GPU. Tables of addresses
are written when addresses change, and kept; a CUDA graph writes those that were not there before it in each replay.

Memory: tables of 64 bytes a tensor and 4 for each 4096 elements, 32 bytes a tensor in each step; for the norm a number
for each 32768 elements. Gradients laid out otherwise than their parameters are copied first.

The sum of the norm is in the same order every time: repeated runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from composer_kernels._adamw import Group
from composer_kernels._adamw_op import (
    Memo,
    check_step,
    compute_norm,
    norm_by_torch,
    norm_op,
    step_compiled,
    update_by_torch,
    update_groups,
)
from composer_kernels._launch import check_dtypes, describe
from composer_kernels._multi_tensor import is_dense


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor] | int,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    copies: Sequence[Tensor | None] | None = None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update parameters by AdamW, in place, all of them in one launch.

    Computed in fp32 and rounded once. On GPUs Triton kernels do it, on a CPU and in float64 PyTorch's own AdamW.

    Args:
        params: bfloat16, float16, float32 or float64 of any shape, each dense (its elements fill a stretch of memory).
        grads: Likewise, perhaps of another type than the parameters.
        exp_avgs: Running means of the gradients, laid out as the parameters, updated in place.
        exp_avg_sqs: Running means of their squares, likewise.
        steps: How many updates each parameter has had, fp32 scalars on its device, which are counted on here; or the
            number of this update, from 1, for all of them, which the caller counts.
        lr: Learning rate. As a tensor on the GPU it can change between replays of a CUDA graph.
        betas: β1 and β2.
        eps: ε.
        weight_decay: λ.
        maximize: Go up the gradient.
        copies: For each parameter a tensor laid out as it that receives a rounded copy, or None.
        scale: Scalar on the device that the gradients are multiplied with first.
        found_inf: Scalar on the device; unless it is 0, nothing is changed.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For numbers, shapes or layouts that do not fit.
    """
    group = Group(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        copies or [None] * len(params),
        lr,
        betas,
        eps,
        weight_decay,
        maximize,
    )
    check_step(group, scale, found_inf)
    if torch.compiler.is_compiling():
        step_compiled(group, scale, found_inf)
    else:
        update_groups([group], scale, found_inf)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all these tensors together, computed in fp32 in one pass.

    Not finite if an element is not finite, so that it tells of that as well.

    Args:
        grads: bfloat16, float16, float32 or float64, of any shape, dense ones without a copy; all on one device.

    Returns:
        A float32 scalar on their device; 0 on the CPU for no tensors.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: If the tensors are on several devices.
    """
    for dtype in {grad.dtype for grad in grads}:
        check_dtypes("grad_norm", grads=dtype)
    devices = {grad.device for grad in grads}
    if len(devices) > 1:
        raise ValueError(f"grad_norm: grads must be on one device; given {sorted(map(str, devices))}")
    if torch.compiler.is_compiling():
        return norm_op(list(grads))
    return compute_norm(grads)


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """Of gradients, so that their norm is at most `max_norm`: min(1, max_norm / (norm + 1e-6)), as PyTorch clips."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def adamw_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor] | int,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    copies: Sequence[Tensor | None] | None = None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`adamw_step` by PyTorch's own AdamW on any device; it waits for `found_inf`."""
    copies = copies or [None] * len(params)
    group = Group(params, grads, exp_avgs, exp_avg_sqs, steps, copies, lr, betas, eps, weight_decay, maximize)
    update_by_torch(group, range(len(params)), scale, found_inf)


def grad_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """`grad_norm` by PyTorch's own norm on any device."""
    return norm_by_torch(grads)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW in one launch for all parameters, with state that PyTorch's loads and that it loads of PyTorch's.

    On a CPU it computes what `torch.optim.AdamW` computes. On GPUs the learning rate may be a tensor, and after a first
    step the next ones can be captured in a CUDA graph.

    A model with 16-bit weights is trained by fp32 parameters whose copies the weights are; their gradients are then
    the weights' own::

        masters = [weight.detach().float() for weight in model.parameters()]
        optimizer = AdamW(masters, copies=dict(zip(masters, model.parameters())))
        ...
        loss.backward()
        norm = optimizer.grad_norm()
        optimizer.step(scale=clip_scale(norm, 1.0))
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and skipping to `step`

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """Set the optimizer up; nothing is allocated before the first step.

        Args:
            params: Parameters, or groups of them, as PyTorch's optimizers take them.
            lr: Learning rate, a number or a scalar tensor.
            betas: β1 and β2.
            eps: ε.
            weight_decay: λ.
            amsgrad: Must be False.
            maximize: Go up the gradient.
            capturable: Kept for PyTorch's optimizer, which may load the state; here, steps on a GPU always are.
            copies: A tensor for some or all parameters that receives a rounded copy of it in each step.

        Raises:
            NotImplementedError: For `amsgrad`.
            ValueError: For numbers out of range, or copies that do not fit.
        """
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable)
        self._refuse_amsgrad()
        self.copies = dict(copies or {})
        self._memo = Memo()
        for param, copy in self.copies.items():
            if copy.stride() != param.stride() or copy.shape != param.shape or copy.device != param.device:
                wanted = f"the shape, layout and device of its parameter, {describe(param)}"
                raise ValueError(f"AdamW: a copy must have {wanted}; given {describe(copy)}")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> float | None:
        """Update all parameters that have a gradient, or whose copy has one.

        Args:
            closure: Computes the loss and the gradients anew.
            scale: Scalar on the device that the gradients are multiplied with (`clip_scale`).
            found_inf: Scalar on the device; unless it is 0, nothing is changed.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        loss_scale: Tensor | None = getattr(self, "grad_scale", None)
        if loss_scale is not None:
            scale = loss_scale.reciprocal() if scale is None else scale / loss_scale
        found: Tensor | None = getattr(self, "found_inf", None)
        groups = [group for group in map(self._ready, self.param_groups) if group.params]
        found_inf = found_inf if found is None else found
        if torch.compiler.is_compiling():
            for group in groups:
                step_compiled(group, scale, found_inf)
        else:
            update_groups(groups, scale, found_inf, self._memo)
        return loss

    def grad_norm(self) -> Tensor:
        """The norm (`composer_kernels.adamw.grad_norm`) of the gradients that the next step would use."""
        grads = [grad for group in self.param_groups for grad in self._given(group["params"])[1]]
        return grad_norm([grad for grad in grads if grad is not None])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters and of their copies, or zero them."""
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            if copy.grad is not None and set_to_none:
                copy.grad = None
            elif copy.grad is not None:
                copy.grad.detach().zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of PyTorch's AdamW returned.

        Each parameter gets a count of steps of its own, even where the state has one tensor for all.

        Raises:
            NotImplementedError: If the state is one of `amsgrad`.
            ValueError: If it is of other parameters.
        """
        super().load_state_dict(state_dict)
        self._refuse_amsgrad()
        for param, state in self.state.items():
            for name, value in state.items():
                if name == "step":
                    state[name] = torch.as_tensor(value, dtype=torch.float32).to(param.device, copy=True)
                elif value.shape == param.shape and value.stride() != param.stride():
                    state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

    def _refuse_amsgrad(self) -> None:
        if any(group["amsgrad"] for group in self.param_groups):
            raise NotImplementedError(
                "AdamW: amsgrad=True is not supported; accepted is False (torch.optim.AdamW has it)"
            )

    def _given(self, params: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The copies of these parameters, and the gradients: those of the copies where there are no others."""
        grads = [param.grad for param in params]
        if not self.copies:
            return [None] * len(grads), grads
        copies = [self.copies.get(param) for param in params]
        for index, grad in enumerate(grads):
            copy = copies[index]
            if grad is None and copy is not None:
                grads[index] = copy.grad
        return copies, grads

    def _ready(self, group: dict[str, Any]) -> Group:
        """The parameters of a group that have a gradient, with their state."""
        params = group["params"]
        copies, given = self._given(params)
        grads = [grad for grad in given if grad is not None]
        if len(grads) < len(params):
            having = [index for index, grad in enumerate(given) if grad is not None]
            params, copies = ([tensors[index] for index in having] for tensors in (params, copies))
        states = [self.state[param] for param in params]
        for index, state in enumerate(states):
            if grads[index].is_sparse:
                given_for = describe(params[index])
                raise NotImplementedError(f"AdamW: a gradient is sparse, of {given_for}; accepted are dense ones")
            if len(state) < 3:
                _start(params[index], state)
        return Group(
            params=params,
            grads=grads,
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            steps=[state["step"] for state in states],
            copies=copies,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )


def _start(param: Tensor, state: dict[str, Tensor]) -> None:
    """Add to a parameter's state what is not there yet."""
    if not state and not is_dense(param):
        strides = f"strides {param.stride()} of {describe(param)}"
        raise ValueError(f"AdamW: params must be dense (without gaps in memory); given {strides}")
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
