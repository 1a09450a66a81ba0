"""Time `AdamW` and `grad_norm` beside their peers: ``python benchmarks/bench_adamw.py --output results.json``.

Every contender updates fp32 masters with fp32 gradients and refreshes a bf16 copy of each, as mixed-precision training
does. Bytes a parameter: 30 for the update; 4 for the norm; 34 for both, with clipping that writes no gradient.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from session import Session, session
from timing import Call, Row, contend, host_seconds, relative_error, tune
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from composer_kernels import _adamw
from composer_kernels.adamw import AdamW, clip_scale, grad_norm

LR, BETAS, EPS, DECAY = 0.1, (0.9, 0.95), 1e-8, 0.1
NUMBERS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
MAX_NORM = 1.0
Shapes = list[tuple[int, ...]]


def layers(count: int, hidden: int = 2048, ffn: int = 8192, kv: int = 512) -> Shapes:
    """The weights of so many pairs of an attention and an MLP block, those of a Llama of 1B by default."""
    pair = [(hidden,), (hidden + 2 * kv, hidden), (hidden, hidden), (hidden,), (2 * ffn, hidden), (hidden, ffn)]
    return pair * count


QUICK: dict[str, Shapes] = {"4 pairs of 1b": layers(4)}
CASES = QUICK | {
    "1 pair of 1b": layers(1),
    "8 pairs of 1b": layers(8),
    "4 pairs of 3b": layers(4, 3072, 8192, 1024),
    "400 of 65536": [(65536,)] * 400,
}


class Weights:
    """Masters with gradients, and their bf16 copies."""

    def __init__(self, shapes: Shapes) -> None:
        """Draw them."""
        self.masters = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
        for master in self.masters:
            master.grad = torch.randn_like(master)
        self.copies = [master.detach().bfloat16() for master in self.masters]
        self.grads = [master.grad for master in self.masters if master.grad is not None]


Make = Callable[[Weights], Call]
"""Makes the call that does one step on these weights."""


def composer(weights: Weights, *, clip: bool) -> Call:
    """Ours."""
    optimizer = AdamW(weights.masters, copies=dict(zip(weights.masters, weights.copies, strict=True)), **NUMBERS)
    if not clip:
        return optimizer.step
    return lambda: optimizer.step(scale=clip_scale(optimizer.grad_norm(), MAX_NORM))


def torchs(weights: Weights, *, clip: bool, **how: bool) -> Call:
    """PyTorch's, and a copy of all masters by one more launch."""
    optimizer = torch.optim.AdamW(weights.masters, **NUMBERS, **how, capturable=True)

    def step() -> None:
        if clip:
            clip_grad_norm_(weights.masters, MAX_NORM, foreach=True)
        optimizer.step()
        torch._foreach_copy_(weights.copies, [master.detach() for master in weights.masters])

    return step


def transformer_engine(weights: Weights, *, clip: bool) -> Call:
    """TransformerEngine's on the bf16 weights, with its own masters and its own clipping, as Megatron does it."""
    optimizers = importlib.import_module("transformer_engine.pytorch.optimizers")
    params = [torch.nn.Parameter(copy) for copy in weights.copies]
    for param, grad in zip(params, weights.grads, strict=True):
        param.decoupled_grad = grad
    optimizer = optimizers.FusedAdam(params, **NUMBERS, master_weights=True, use_decoupled_grad=True, capturable=True)
    overflow = torch.zeros(1, dtype=torch.int, device="cuda")

    def step() -> None:
        if clip:
            apply = optimizers.multi_tensor_applier
            norm, _ = apply(optimizers.multi_tensor_l2norm, overflow, [weights.grads], False)
            scale = clip_scale(norm, MAX_NORM)
            apply(optimizers.multi_tensor_scale_tensor, overflow, [weights.grads, weights.grads], scale)
        optimizer.step()

    return step


def apex(weights: Weights, *, clip: bool) -> Call:
    """Apex's, and a copy of all masters by one more launch."""
    optimizer = importlib.import_module("apex.optimizers").FusedAdam(weights.masters, **NUMBERS, capturable=True)

    def step() -> None:
        if clip:
            clip_grad_norm_(weights.masters, MAX_NORM, foreach=True)
        optimizer.step()
        torch._foreach_copy_(weights.copies, [master.detach() for master in weights.masters])

    return step


STEPS: dict[str, Callable[..., Call]] = {
    "composer": composer,
    "te": transformer_engine,
    "apex": apex,
    "torch fused": functools.partial(torchs, fused=True),
    "torch foreach": functools.partial(torchs, foreach=True),
}


def transformer_engines_norm(weights: Weights) -> Call:
    """TransformerEngine's, which Megatron takes."""
    optimizers = importlib.import_module("transformer_engine.pytorch.optimizers")
    overflow = torch.zeros(1, dtype=torch.int, device="cuda")
    apply, norm = optimizers.multi_tensor_applier, optimizers.multi_tensor_l2norm
    return lambda: apply(norm, overflow, [weights.grads], False)[0]


NORMS: dict[str, Make] = {
    "composer": lambda weights: functools.partial(grad_norm, weights.grads),
    "te": transformer_engines_norm,
    "torch": lambda weights: functools.partial(get_total_norm, weights.grads, foreach=True),
}


def step_error(step: Callable[..., Call], *, clip: bool) -> float:
    """Of the bf16 copies after two steps on small weights, against float64; rounding makes 2e-3.

    Clipping, if wanted, cuts the first gradients and not the second: Adam does not see a factor common to both.
    """
    weights = Weights([(300, 70), (1000,)])
    exact = [master.detach().double() for master in weights.masters]
    means, squares = ([torch.zeros_like(start) for start in exact] for _ in range(2))
    call = step(weights, clip=clip)
    for count, spread in enumerate((1.0, 0.005), 1):
        grads = [grad.normal_(std=spread).double() for grad in weights.grads]
        scale = min(1.0, MAX_NORM / float(get_total_norm(grads))) if clip else 1.0
        call()
        for at, mean, square, grad in zip(exact, means, squares, grads, strict=True):
            mean.lerp_(scale * grad, 1 - BETAS[0])
            square.lerp_((scale * grad).square(), 1 - BETAS[1])
            root = (square / (1 - BETAS[1] ** count)).sqrt() + EPS
            at.mul_(1 - LR * DECAY).sub_(LR * mean / (1 - BETAS[0] ** count) / root)
    return max(relative_error(copy, wanted) for copy, wanted in zip(weights.copies, exact, strict=True))


def norm_error(make: Make) -> float:
    """Of the norm of the gradients of small weights, against float64."""
    weights = Weights([(300, 70), (1000,)])
    norm = make(weights)()
    assert isinstance(norm, Tensor)
    return relative_error(norm.view(()), torch.cat([grad.double().flatten() for grad in weights.grads]).norm())


def compare(name: str, shapes: Shapes, run: Session) -> Iterator[Row]:
    """Time everyone: the update, the norm, and the update with clipping."""
    count = sum(torch.Size(shape).numel() for shape in shapes)
    for clip, moved in ((False, 30), (True, 34)):
        for who, step in run.chosen(STEPS).items():
            make = functools.partial(step, clip=clip)
            case = f"{'clip and update' if clip else 'update'} {name}"
            try:
                error = step_error(step, clip=clip)
            except Exception as failure:  # an absent peer must not end the comparison
                yield Row(case, who, moved * count, note=f"{type(failure).__name__}: {failure}"[:160])
                continue
            yield contend(
                case, who, moved * count, run.limits.copy, functools.partial(_on_fresh, make, shapes), error=error
            )
    for who, norm in run.chosen(NORMS).items():
        try:
            error = norm_error(norm)
        except Exception as failure:  # an absent peer must not end the comparison
            yield Row(f"norm {name}", who, 4 * count, note=f"{type(failure).__name__}: {failure}"[:160])
            continue
        make = functools.partial(_on_fresh, norm, shapes)
        yield contend(f"norm {name}", who, 4 * count, run.limits.read, make, error=error)


def _on_fresh(make: Make, shapes: Shapes, _index: int) -> Call:
    return make(Weights(shapes))


def host_times(run: Session) -> dict[str, dict[str, float]]:
    """The host's microseconds a step of 300 tensors too small to keep the GPU busy."""
    times: dict[str, dict[str, float]] = {}
    for who, step in run.chosen(STEPS).items():
        try:
            calls = {clip: step(Weights([(16,)] * 300), clip=clip) for clip in (False, True)}
            times[who] = {("clip and " if clip else "") + "update": 1e6 * host_seconds(calls[clip]) for clip in calls}
        except Exception as failure:
            print(f"no host time of {who}: {type(failure).__name__}: {failure}"[:160])
    return times


def launches() -> Iterator[_adamw.Launch]:
    """Launches worth timing: 4 to 16 elements a thread."""
    for block, tiles, warps in itertools.product((512, 1024, 2048, 4096), (1, 2, 4, 8, 16), (4, 8, 16)):
        if 4 <= block / warps / 32 <= 16:
            yield _adamw.Launch(block, tiles, warps)


def tune_all(name: str, shapes: Shapes, limits: tuple[float, float]) -> list[Row]:
    """Time launches of the update and of the norm, best first."""
    count = sum(torch.Size(shape).numel() for shape in shapes)
    groups: dict[int, _adamw.Group] = {}

    def group_of(index: int) -> _adamw.Group:
        """With β1 = β2 = 0 and no learning rate a step leaves nothing behind that the next one depends on."""
        if index not in groups:
            weights = Weights(shapes)
            params = [master.detach() for master in weights.masters]
            means, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
            groups[index] = _adamw.Group(
                params, weights.grads, means, squares, 1, weights.copies, 0.0, (0.0, 0.0), 1e-8, 0.0, maximize=False
            )
        return groups[index]

    def update(index: int, launch: _adamw.Launch) -> Sequence[Tensor | None]:
        group = group_of(index)
        _adamw.launch_update([group], [(0, i) for i in range(len(shapes))], None, None, launch)
        return [*group.exp_avg_sqs, *group.copies]

    def norm(index: int, launch: _adamw.Launch) -> Sequence[Tensor | None]:
        return [_adamw.launch_norm(group_of(index).grads, launch)]

    default = _adamw.UPDATE_LAUNCH
    rows = tune(f"update {name}", 30 * count, limits[0], update, default, launches())
    return rows + tune(f"norm {name}", 4 * count, limits[1], norm, _adamw.NORM_LAUNCH, launches())


def main() -> None:
    """Run from the command line."""
    with session("adamw", __doc__) as run:
        limits = run.limits.copy, run.limits.read
        for name, shapes in (QUICK if run.options.quick or run.options.tune else CASES).items():
            run.add(tune_all(name, shapes, limits) if run.options.tune else compare(name, shapes, run))
        if not run.options.tune:
            run.add_host_times(host_times(run))


if __name__ == "__main__":
    main()
