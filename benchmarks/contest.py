"""One operation, many implementations: forward and backward through autograd, checked against float64 and timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from timing import Call, Row, contend, host_seconds, relative_error, seconds_to_copy, set_count
from torch import Tensor

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    """What one call works on.

    Attributes:
        leaves: Arguments, which want gradients.
        grads: Gradients of the results.
    """

    leaves: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        """Let the leaves want gradients."""
        for leaf in self.leaves:
            leaf.requires_grad_()


@dataclass(frozen=True)
class Contest:
    """An operation on one shape.

    Attributes:
        shape: For people.
        forward_bytes: The fewest bytes that the forward pass can move.
        backward_bytes: Likewise the backward pass.
        draw: Makes random inputs.
        exact: Results and gradients of the leaves in float64.
        spared: Bytes that a contender of that name need not move forward, as it gives less than the others.
    """

    shape: str
    forward_bytes: float
    backward_bytes: float
    draw: Callable[[], Inputs]
    exact: Callable[[Inputs], tuple[Sequence[Tensor], Sequence[Tensor]]]
    spared: Mapping[str, float] = field(default_factory=dict)


def compare(contest: Contest, contenders: dict[str, Callable[[], Operation]], limit: float) -> Iterator[Row]:
    """Time all contenders forward and backward.

    Args:
        contest: What to do.
        contenders: Each imports what it needs when called; where that fails the row says why.
        limit: Ceiling in bytes/s.
    """
    fewest = min(contest.forward_bytes - max(contest.spared.values(), default=0), contest.backward_bytes)
    sets = [contest.draw() for _ in range(set_count(fewest))]
    results, gradients = contest.exact(sets[0])
    for name, load in contenders.items():
        try:
            operation = load()
            errors = _errors(operation, sets[0], results, gradients)
        except Exception as failure:  # an absent peer must not end the comparison
            yield Row(contest.shape, name, contest.forward_bytes, note=f"{type(failure).__name__}: {failure}"[:160])
            continue
        for direction, make, moved, error in (
            ("forward", forward_call, contest.forward_bytes - contest.spared.get(name, 0), errors[0]),
            ("backward", backward_call, contest.backward_bytes, errors[1]),
        ):
            calls = functools.partial(_call_on, make, operation, sets)
            row = contend(f"{direction} {contest.shape}", name, moved, limit, calls, error=error)
            if row.graph is not None:
                row.of_copy = seconds_to_copy(moved) / row.graph
            yield row


def host_times(contest: Contest, contenders: dict[str, Callable[[], Operation]]) -> dict[str, dict[str, float]]:
    """The host's microseconds a call by contender and direction; the contest should be a tiny one."""
    inputs = contest.draw()
    times: dict[str, dict[str, float]] = {}
    for name, load in contenders.items():
        try:
            operation = load()
            forward, backward = forward_call(operation, inputs), backward_call(operation, inputs)
            with torch.no_grad():
                inference = host_seconds(forward)
            seconds = {"inference": inference, "forward": host_seconds(forward), "backward": host_seconds(backward)}
            times[name] = {what: 1e6 * value for what, value in seconds.items()}
        except Exception as failure:
            print(f"no host time of {name}: {type(failure).__name__}: {failure}"[:160])
    return times


def forward_call(operation: Operation, inputs: Inputs) -> Call:
    """The forward pass, as in training."""
    return lambda: operation(*inputs.leaves)


def backward_call(operation: Operation, inputs: Inputs) -> Call:
    """The backward pass of a forward pass done here, on gradients of its own: a peer may write over them."""
    results, grads = operation(*inputs.leaves), tuple(grad.clone() for grad in inputs.grads)
    return lambda: torch.autograd.grad(results, inputs.leaves, grads, retain_graph=True, allow_unused=True)


def compiled(function: Operation) -> Operation:
    """By torch.compile, and so that its backward pass can be called again and again."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def _call_on(
    make: Callable[[Operation, Inputs], Call], operation: Operation, sets: Sequence[Inputs], index: int
) -> Call:
    return make(operation, sets[index])


def _errors(
    operation: Operation, inputs: Inputs, results: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[float, float]:
    """The largest of the results and of the gradients; a gradient that went elsewhere does not count."""
    got = operation(*inputs.leaves)
    got = got if isinstance(got, tuple) else (got,)
    back = torch.autograd.grad(got, inputs.leaves, tuple(grad.clone() for grad in inputs.grads), allow_unused=True)
    forward_error = max(relative_error(one, exact) for one, exact in zip(got, results, strict=True))
    pairs = zip(back, gradients, strict=True)
    return forward_error, max(relative_error(one, exact) for one, exact in pairs if one is not None)
