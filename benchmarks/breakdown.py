"""Where the GPU's time of a training step goes, from the names and times of its kernels."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OPTIMIZER = "optimizer"
"""The `torch.profiler.record_function` around the optimizer."""

_MARKER = "spin_kernel"
"""Of `torch.cuda._sleep`, which stands at both ends of the loss head."""

_KINDS = (
    ("attention", r"flash|fmha|sdpa|attention|dot_do_o|convert_dq|mha_|_dq_kernel|_dkdv_kernel"),
    ("attention", r"transformer_engine::scaled_\w*softmax"),  # of its unfused one
    ("loss", r"cross_entropy|softmax|nll_loss|_statistics_kernel|_loss_and_gradient|_gradient_kernel|logsumexp"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|wgmma|splitk|cublas|^triton_tem|^triton_mm"),
    ("copies", r"^memcpy|^memset|^cuda_memcpy"),
    ("optimizer", r"adam|l2norm|_square_kernel|_prepare_kernel|_update_kernel"),
    ("communication", r"nccl"),
)


class Kernel(NamedTuple):
    """A kernel's run on the GPU; times in seconds."""

    name: str
    start: float
    end: float


def kernels_of(events: Iterable[Any]) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels that a profiler saw, in order, and the spans of the annotation `OPTIMIZER` on the GPU.

    Args:
        events: ``profiler.events()``.
    """
    kernels, spans = [], []
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kernel = Kernel(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        if event.name == OPTIMIZER:
            spans.append(kernel)
        elif not getattr(event, "is_user_annotation", False):
            kernels.append(kernel)
    return sorted(kernels, key=lambda kernel: kernel.start), spans


def breakdown(kernels: Sequence[Kernel], optimizer: Sequence[Kernel] = (), most: int = 25) -> dict[str, Any]:
    """Seconds of a step by kind, its longest kernels, and between which kernels none ran for longest.

    A kernel in a span of `optimizer` is the optimizer's; the profiler ends a span with the last kernel that PyTorch
    launched in it, so that names must tell what ours do after that. Between two markers lies the loss head, whose
    kernels are the loss's unless they are matrix products. What no name explains is element-wise. ``idle`` is the time
    in which no kernel ran, from the first one's start to the last one's end.

    Args:
        kernels: In order.
        optimizer: Spans.
        most: How many kernels to list, and how many pairs.
    """
    seconds: dict[str, float] = defaultdict(float)
    by_name: dict[tuple[str, str], float] = defaultdict(float)
    calls: Counter[str] = Counter()
    in_head = False
    for kernel in kernels:
        if _MARKER in kernel.name:
            in_head = not in_head
            continue
        kind = _kind(kernel, optimizer, in_head=in_head)
        seconds[kind] += kernel.end - kernel.start
        by_name[kind, kernel.name] += kernel.end - kernel.start
        calls[kernel.name] += 1
    longest = [
        {"kind": kind, "name": name[:120], "calls": calls[name], "seconds": took}
        for (kind, name), took in sorted(by_name.items(), key=lambda item: -item[1])[:most]
    ]
    waits = _waits(kernels)
    return {
        "breakdown": dict(seconds) | {"idle": sum(wait["seconds"] for wait in waits)},
        "kernels": longest,
        "waits": waits[:most],
        "launches": sum(calls.values()),
    }


def _waits(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """How long no kernel ran, after which and before which, the longest first."""
    waited: dict[tuple[str, str], list[float]] = defaultdict(list)
    until = itertools.accumulate(kernels, lambda one, other: max(one, other, key=lambda kernel: kernel.end))
    for last, kernel in zip(until, kernels[1:], strict=False):
        if kernel.start > last.end:
            waited[last.name, kernel.name].append(kernel.start - last.end)
    return [
        {"after": after[:120], "before": before[:120], "times": len(times), "seconds": sum(times)}
        for (after, before), times in sorted(waited.items(), key=lambda item: -sum(item[1]))
    ]


def _kind(kernel: Kernel, optimizer: Sequence[Kernel], *, in_head: bool) -> str:
    if any(span.start <= kernel.start < span.end for span in optimizer):
        return "optimizer"
    name = kernel.name.lower()
    found = next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "elementwise")
    return "loss" if in_head and found in ("elementwise", "copies") else found


@contextmanager
def mark_loss_head(model: nn.Module | None) -> Iterator[None]:
    """Put markers where the stack of blocks ends forward, and where its gradient begins backward.

    Args:
        model: With the stack as `decoder`; another, such as a compiled one, gets no markers: there names must tell.
    """
    decoder = getattr(model, "decoder", None)
    if decoder is None:
        yield
        return

    def after_stack(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        _mark()
        output.register_hook(_mark)

    handle = decoder.register_forward_hook(after_stack)
    try:
        yield
    finally:
        handle.remove()


def _mark(_gradient: Tensor | None = None) -> None:
    torch.cuda._sleep(1)
