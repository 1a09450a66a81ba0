"""Gradients scaled and 16-bit weights written in the pass over memory in which our Adam updates.

Megatron-core scales all gradients so that their norm is at most what was asked for, updates fp32 parameters, and copies
them to the weights: passes of 8, 28 and 6 bytes a parameter. `ComposerAdam` can do the first and the last on its way.
The functions here leave them to it: the factor waits at the parameters (`GradScale`) until the step, and the copies are
named for its time. Any other optimizer gets what Megatron-core does.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from composer_megatron.cpu import Replacement

_NAME = "composer_adam_grad_scale"


class GradScale:
    """What a parameter's gradient is yet to be multiplied with; it is noted at the parameters that our Adam updates."""

    @staticmethod
    def reset(params: Iterable[Tensor]) -> None:
        """Nothing; from now on `left_to_adam` knows these parameters."""
        for param in params:
            setattr(param, _NAME, 1.0)

    @staticmethod
    def put(params: Iterable[Tensor], factor: float | Tensor) -> None:
        """This factor, for the next step."""
        for param in params:
            setattr(param, _NAME, factor)

    @staticmethod
    def left_to_adam(params: Iterable[Tensor]) -> bool:
        """Whether our Adam has updated all of these."""
        return all(hasattr(param, _NAME) for param in params)

    @staticmethod
    def take(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor | None:
        """The factor of all these gradients, on their device; None for 1. Where there are several, they are applied."""
        found = [getattr(param, _NAME, 1.0) for param in params]
        GradScale.reset(params)
        if all(factor is found[0] for factor in found):
            one = found[0]
            plain = isinstance(one, float) and one == 1.0
            return None if plain else torch.as_tensor(one, dtype=torch.float32, device=grads[0].device).reshape(())
        for factor, grad in zip(found, grads, strict=True):
            grad.mul_(factor)
        return None


def _clipping_later(clip: Callable[..., None]) -> Callable[..., None]:
    """`clip_grad_by_total_norm_fp32` that leaves the multiplication to our Adam where it is our Adam's parameters."""

    @functools.wraps(clip)
    def call(parameters: Any, max_norm: float, total_norm: Any, use_decoupled_grad: bool = False) -> None:
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if use_decoupled_grad or not GradScale.left_to_adam(params):
            clip(params, max_norm, total_norm, use_decoupled_grad)
            return
        factor = max_norm / (total_norm + 1.0e-6)
        GradScale.put(params, factor.clamp(max=1.0) if isinstance(factor, Tensor) else min(1.0, factor))

    return call


def _naming_copies(step: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """`step_with_ready_grads` during which our Adam knows which weights are copies of its parameters."""

    @functools.wraps(step)
    def call(self: Any) -> bool:
        copies = getattr(self.optimizer, "copies", None)
        if copies is None or self.is_stub_optimizer:
            return step(self)
        groups = zip(self.fp32_from_float16_groups, self.float16_groups, strict=True)
        pairs = [pair for mains, weights in groups for pair in zip(mains, weights, strict=True)]
        # A quantised weight is no tensor of the parameter's layout: Megatron-core copies to it in its own way.
        if all(type(weight.data) is Tensor and weight.stride() == main.stride() for main, weight in pairs):
            copies.update((main, weight.data) for main, weight in pairs)
        try:
            return step(self)
        finally:
            copies.clear()

    return call


def _copying_once(copy: Callable[[Any], None]) -> Callable[[Any], None]:
    """`_copy_main_params_to_model_params` that has nothing to do after our Adam wrote the copies."""

    @functools.wraps(copy)
    def call(self: Any) -> None:
        if not getattr(self.optimizer, "copies", None):
            copy(self)

    return call


def replacements() -> list[Replacement]:
    """What is put in the place of Megatron-core's functions; twice does no harm."""
    from megatron.core.optimizer import optimizer

    kind = optimizer.Float16OptimizerWithFloat16Params
    mended = (
        (optimizer, "clip_grad_by_total_norm_fp32", _clipping_later, "8 bytes a parameter to and from memory"),
        (kind, "step_with_ready_grads", _naming_copies, "6 bytes a parameter"),
        (kind, "_copy_main_params_to_model_params", _copying_once, "likewise"),
    )
    found = ((owner, name, getattr(owner, name), make, why) for owner, name, make, why in mended)
    return [
        Replacement(owner, name, make(function), why)
        for owner, name, function, make, why in found
        if not hasattr(function, "__wrapped__") or function.__globals__ is not globals()
    ]
