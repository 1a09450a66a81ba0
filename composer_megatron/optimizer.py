"""Adam in a Megatron run, whose checkpoints resume and load in any parallel layout: ours, PyTorch's, or one installed.

Megatron-core takes TransformerEngine's or Apex's Adam where one is installed, else PyTorch's. With PyTorch's, its
distributed optimizer trains but cannot go on from a checkpoint (0.19): it insists on a count of steps before there is
one, takes that count for a tensor of the parameter's shape, and gives all parameters one count, on which each counts.
Its code for the other two counts steps in ``param_groups``. `ComposerAdam` and `TorchAdam` do likewise, and
`prepare_optimizer` sends Megatron down that way. It also mends, whichever Adam is used, what corrupts the state of a
distributed optimizer with several buckets in a checkpoint for any layout (`_counting_padding`).

What is saved loads with every one of these Adams, and what they saved loads here: the count of steps is written both
in the groups, as TransformerEngine and Apex have it, and in each parameter's state, as PyTorch has it.
"""

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from composer_megatron.arguments import Flags
from composer_megatron.cpu import Replacement
from composer_megatron.errors import FileError, UsageError
from composer_megatron.optimizer_step import GradScale, replacements

Name = Literal["auto", "composer", "megatron", "torch"]
"""Which Adam: "auto" for TransformerEngine's or Apex's where installed, else ours; "composer" for ours; "megatron" for
TransformerEngine's or Apex's where installed, else PyTorch's; "torch" for PyTorch's."""


def prepare_optimizer(name: Name = "auto") -> str:
    """Have Megatron-core build its optimizers, plain and distributed, on that Adam from now on.

    Args:
        name: Which one.

    Returns:
        What is used: "te", "apex", "composer" or "torch".

    Raises:
        ComposerError: If it needs a package that is missing.
    """
    used, changes = _choose(name)
    for replacement in changes:
        replacement.install()
    return used


@contextlib.contextmanager
def using_optimizer(name: Name = "auto") -> Iterator[str]:
    """`prepare_optimizer` until the end of the ``with`` block, in which optimizers are built, saved and loaded.

    Args:
        name: Which one.

    Yields:
        What is used: "te", "apex", "composer" or "torch".

    Raises:
        ComposerError: If it needs a package that is missing.
    """
    used, changes = _choose(name)
    before = [(item.owner, item.name, getattr(item.owner, item.name)) for item in changes]
    try:
        for replacement in changes:
            replacement.install()
        yield used
    finally:
        for owner, attribute, value in before:
            setattr(owner, attribute, value)


def _choose(name: Name) -> tuple[str, tuple[Replacement, ...]]:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    mended = Replacement(
        distrib_optimizer.DistributedOptimizer,
        "sharded_param_state_fully_reshardable",
        _counting_padding(distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable),
        "looks for parameters at offsets that count padding in memory that has none (Megatron-LM's pull request 5077)",
    )
    packages = {"transformer_engine": "te", "apex": "apex"}
    installed = packages.get(distrib_optimizer.Adam.__module__.partition(".")[0])
    if installed is not None and name in ("auto", "megatron"):
        return installed, (mended,)
    used = "composer" if name in ("auto", "composer") else "torch"
    like_apex = "the count of steps is in param_groups; each tensor of a parameter's state has its shape"
    changes = [
        mended,
        Replacement(optimizer, "Adam", ComposerAdam if used == "composer" else TorchAdam, "the Adam that is built"),
        Replacement(optimizer, "USING_PYTORCH_OPTIMIZER", False, "or the name above is not looked at"),
        Replacement(distrib_optimizer, "HAVE_APEX_OR_TE", True, like_apex),
    ]
    if installed is None:
        changes.append(Replacement(distrib_optimizer, "USING_APEX_OPTIMIZER", True, like_apex))
    if used == "composer":
        changes += [*_clipping(), *replacements()]
    return used, tuple(changes)


def _counting_padding(sharded_state: Callable[..., Any]) -> Callable[..., Any]:
    """The method of `DistributedOptimizer` that saves for any layout, during which padding counts as data.

    It gathers all buckets into one stretch of memory, without the padding at their ends, but looks for a parameter at
    its offset in the buckets with it. What lies beyond the first padding is wrong. Padding is zeros and does no harm.
    """
    if hasattr(sharded_state, "__wrapped__"):
        return sharded_state

    @functools.wraps(sharded_state)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = [(bucket, bucket.grad_data.numel()) for buffer in self.buffers for bucket in buffer.buckets]
        whole += [(buffer, buffer.numel) for buffer in self.buffers]
        unpadded = [owner.numel_unpadded for owner, _ in whole]
        try:
            for owner, size in whole:
                owner.numel_unpadded = size
            return sharded_state(self, *args, **kwargs)
        finally:
            for (owner, _), size in zip(whole, unpadded, strict=True):
                owner.numel_unpadded = size

    return call


def _clipping() -> list[Replacement]:
    """Our norm, left on the GPU, and PyTorch's scaling of all gradients at once, where nobody else's kernels clip."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    from composer_megatron.backend import require

    require("triton", "our Adam", "pip install triton")
    if clip_grads.l2_norm_impl not in (_norm, utils.local_multi_tensor_l2_norm):
        return []
    return [
        Replacement(clip_grads, "l2_norm_impl", _norm, "else a launch for each tensor, whose result is waited for"),
        Replacement(clip_grads, "multi_tensor_scale_impl", _scale, "else two launches for each tensor"),
        Replacement(
            clip_grads,
            "multi_tensor_scale_tensor_impl",
            _scale,
            "else the norm is waited for, and the GPU then for the host",
        ),
    ]


def _norm(_chunk: int, _overflow: Tensor, tensors: Sequence[Sequence[Tensor]], _each: bool) -> tuple[Tensor, None]:
    from composer_kernels.adamw import grad_norm

    return grad_norm(tensors[0]).view(1), None


def _scale(_chunk: int, _overflow: Tensor, tensors: Sequence[Sequence[Tensor]], factor: float | Tensor) -> None:
    source, target = tensors
    if source is not target:
        torch._foreach_copy_(list(target), list(source))
    torch._foreach_mul_(list(target), factor.reshape(()) if isinstance(factor, Tensor) else factor)


class _Ready(NamedTuple):
    """The parameters of a group that have a gradient, with their gradients and states, and the group's numbers."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    group: dict[str, Any]


class MegatronAdam(torch.optim.Optimizer):
    """Adam as Megatron-core knows it from TransformerEngine and Apex.

    A group has the number of steps done; the state of a parameter has its two running means and nothing else.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
        **others: Any,
    ) -> None:
        """Set up, as Megatron-core does.

        Args:
            params: Parameters or groups of them.
            lr: Learning rate.
            betas: Coefficients of the running means of the gradients and of their squares.
            eps: Added to the denominator.
            weight_decay: As a fraction of the parameter, times the learning rate.
            adam_w_mode: Whether that is apart from the gradient (AdamW) or added to it.
            capturable: Must be False.
            others: What only TransformerEngine's Adam can do; must be empty.

        Raises:
            UsageError: For `capturable` and `others`.
        """
        if capturable:
            raise UsageError(
                "--optimizer-cuda-graph needs TransformerEngine's Adam and clipping, which never wait for the GPU; "
                "leave it out"
            )
        if others:
            raise UsageError(
                f"{', '.join(others)}: the precision-aware optimizer is TransformerEngine's; leave out "
                "--use-precision-aware-optimizer, or use --backend-part optimizer=te"
            )
        self.adam_w_mode = adam_w_mode
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, numbers | {"bias_correction": True})  # which TransformerEngine and Apex look up

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
        groups = [self._ready(group) for group in self.param_groups]
        self._update([ready for ready in groups if ready.params])
        return loss

    @abstractmethod
    def _update(self, groups: Sequence[_Ready]) -> None:
        """Update the parameters of these groups."""

    def _ready(self, group: dict[str, Any]) -> _Ready:
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in self.state[param]:
                    self.state[param][name] = torch.zeros_like(param)
        exp_avgs, exp_avg_sqs = ([self.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq"))
        return _Ready(params, [param.grad for param in params], exp_avgs, exp_avg_sqs, group)

    def state_dict(self) -> dict[str, Any]:
        """What PyTorch's AdamW returns, and the number of steps in each group besides."""
        result = super().state_dict()
        for group in result["param_groups"]:
            step = torch.tensor(float(group.get("step", 0)))
            for index in group["params"]:
                if index in result["state"]:
                    result["state"][index] = {"step": step.clone(), **result["state"][index]}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class, PyTorch's, TransformerEngine's or Apex's Adam returned.

        Where a group has no number of steps, its parameters' counts.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            counts = [self.state[param].pop("step", None) for param in group["params"] if param in self.state]
            steps = [int(count) for count in (group.get("step"), *counts) if count is not None]
            if steps:
                group["step"] = steps[0]
            group.setdefault("bias_correction", True)


class ComposerAdam(MegatronAdam):
    """Ours: a few launches for all parameters (`composer_kernels.adamw`).

    Attributes:
        copies: Weights in 16 bits that receive a rounded copy of a parameter in a step, by the parameter;
            `composer_megatron.optimizer_step` fills it for the time of a step.
    """

    def __init__(self, params: Any, *args: Any, adam_w_mode: bool = True, **options: Any) -> None:
        """As `MegatronAdam`.

        Raises:
            UsageError: Also if weight decay is to be added to the gradient.
        """
        if not adam_w_mode:
            raise UsageError("our Adam has decoupled weight decay only; use --backend-part optimizer=local")
        from composer_kernels.adamw import Memo

        super().__init__(params, *args, **options)
        self.copies: dict[Tensor, Tensor] = {}
        self._memo = Memo()

    def _update(self, groups: Sequence[_Ready]) -> None:
        from composer_kernels.adamw import Group, update_groups

        params, grads = ([each for ready in groups for each in getattr(ready, name)] for name in ("params", "grads"))
        scale = GradScale.take(params, grads) if params else None
        update_groups(
            [
                Group(
                    params=ready.params,
                    grads=ready.grads,
                    exp_avgs=ready.exp_avgs,
                    exp_avg_sqs=ready.exp_avg_sqs,
                    steps=ready.group["step"],
                    copies=[self.copies.get(param) for param in ready.params],
                    lr=ready.group["lr"],
                    betas=ready.group["betas"],
                    eps=ready.group["eps"],
                    weight_decay=ready.group["weight_decay"],
                    maximize=False,
                )
                for ready in groups
            ],
            scale,
            memo=self._memo,
        )


class TorchAdam(MegatronAdam):
    """PyTorch's own arithmetic."""

    def _update(self, groups: Sequence[_Ready]) -> None:
        from torch.optim.adam import adam

        for ready in groups:
            group = ready.group
            adam(
                ready.params,
                ready.grads,
                ready.exp_avgs,
                ready.exp_avg_sqs,
                [],
                [torch.tensor(group["step"] - 1.0) for _ in ready.params],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )


def checkpoint_flags(given: Flags) -> Flags:
    """The flag of Megatron's that lets a distributed optimizer's checkpoint load under any parallel sizes.

    Without it Megatron saves faster, gathering nothing, but what it saves can only be loaded under the same tensor-
    and pipeline-parallel sizes.

    Args:
        given: The flags of Megatron's that the user gave.

    Returns:
        The flag; none where no distributed optimizer is asked for, or other checkpoints than Megatron's usual ones.
    """
    usual = given.get("ckpt_format", "torch_dist") == "torch_dist" and given.get("non_persistent_ckpt_type") != "local"
    if given.get("use_distributed_optimizer") and usual:
        return {"--dist-ckpt-optim-fully-reshardable": None}
    return {}


def with_clear_resharding(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `load_checkpoint` that, for a checkpoint without `checkpoint_flags`, names the flag that was missing.

    Megatron's own message names one that does not help.
    """

    @functools.wraps(load_checkpoint)
    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return load_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            if "not supported for DistributedOptimizer" not in str(error):
                raise
            mismatch = str(error).partition(": not supported")[0]
            raise FileError(
                f"the checkpoint's optimizer state loads only under the sizes it was saved with: {mismatch}. Load it "
                "under those and save it with --dist-ckpt-optim-fully-reshardable, or go on without it: --no-load-optim"
            ) from error

    return load
