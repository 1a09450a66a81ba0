"""Implementations of attention: how each is called, which to prefer, and which one a case gets (`_attention_rules`).

All take tensors in (b, s, h, d), or (t, h, d) packed, and align causality to the bottom right.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from composer_kernels._attention_reference import attention_reference, visible
from composer_kernels._attention_rules import RULES, Case, load
from composer_kernels._flash_op import flash_attention
from composer_kernels._launch import INTERPRETING


@dataclass(frozen=True)
class AttentionChoice:
    """Which implementation computes a call of `attention`, and why.

    Attributes:
        name: Of the implementation, as `backend=` takes it.
        reason: Why it was taken.
        rejected: Names and reasons of those that cannot do the call here.
        alternatives: Those that can as well, best first.
    """

    name: str
    reason: str
    rejected: tuple[tuple[str, str], ...]
    alternatives: tuple[str, ...]


class Packing(NamedTuple):
    """First rows of packed sequences, (sequences + 1,) in int32, and the greatest lengths, or more."""

    q_starts: Tensor
    k_starts: Tensor
    q_longest: int
    k_longest: int


class Settings(NamedTuple):
    """What to compute; see `Case` and `composer_kernels.attention.attention`."""

    causal: bool
    window: int | None
    scale: float
    lse: bool
    deterministic: bool


Result = tuple[Tensor, Tensor | None]
Run = Callable[[Tensor, Tensor, Tensor, Packing | None, Settings], Result]


def _flash_package(
    module: str, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, settings: Settings, window: tuple[Any, Any]
) -> Result:
    """Call FlashAttention 2, 3 or 4, whose arguments have the same names but for that of the log-sum-exp."""
    function: Any = load(module, "flash_attn_func" if packing is None else "flash_attn_varlen_func")
    options: dict[str, Any] = {} if packing is None else _packing_options(packing)
    if settings.lse:
        options |= dict.fromkeys(_lse_option(function), True)
    result = function(
        q,
        k,
        v,
        softmax_scale=settings.scale,
        causal=settings.causal,
        window_size=window,
        deterministic=settings.deterministic,
        **options,
    )
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    return out, _without_keys(lse) if settings.lse and packing is not None else lse


def _packing_options(packing: Packing) -> dict[str, Any]:
    return {
        "cu_seqlens_q": packing.q_starts,
        "cu_seqlens_k": packing.k_starts,
        "max_seqlen_q": packing.q_longest,
        "max_seqlen_k": packing.k_longest,
    }


@functools.cache
def _lse_option(function: Callable[..., Any]) -> tuple[str, ...]:
    """What asks for the log-sum-exp; early versions of FlashAttention 3 always return it."""
    known = inspect.signature(function).parameters
    return tuple(name for name in ("return_lse", "return_attn_probs") if name in known)[:1]


def _without_keys(lse: Tensor) -> Tensor:
    """Minus infinity for queries that see no key; some kernels write plus infinity there."""
    return torch.where(lse.isinf(), -torch.inf, lse)


def _bounds(settings: Settings) -> tuple[int, int]:
    """How far a query sees to the left and right, -1 for all."""
    return -1 if settings.window is None else settings.window, 0 if settings.causal else -1


def _run_flash4(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, settings: Settings) -> Result:
    window = settings.window, 0 if settings.causal else None
    return _flash_package("flash_attn.cute", q, k, v, packing, settings, window)


def _run_flash3(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, settings: Settings) -> Result:
    return _flash_package("flash_attn_interface", q, k, v, packing, settings, _bounds(settings))


def _run_flash2(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, settings: Settings) -> Result:
    return _flash_package("flash_attn", q, k, v, packing, settings, _bounds(settings))


# PyTorch's kernels by their own operators: `sdpa_kernel` and the choice behind `scaled_dot_product_attention` cost more
# host time than the rest of a call (16 µs for `sdpa_kernel` alone on a Xeon), and hide windows, packing and the
# log-sum-exp.


def _run_cudnn(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, settings: Settings) -> Result:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), None, True, 0.0, settings.causal, False, scale=settings.scale
    )
    return out.transpose(1, 2), lse.reshape(out.shape[:3])


def _run_torch_flash(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, settings: Settings) -> Result:
    if q.device.type == "cpu":
        return _run_cpu(q, k, v, settings)
    left, right = _bounds(settings)
    longest = (q.shape[1], k.shape[1]) if packing is None else packing[2:]
    starts = (None, None) if packing is None else packing[:2]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *starts,
        *longest,
        0.0,
        settings.causal,
        False,
        scale=settings.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out, lse if packing is None else _without_keys(lse)


def _run_cpu(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Result:
    """PyTorch's blocked kernel for CPUs; it has no window and aligns causality to the top left: a mask says these."""
    mask = None
    queries, keys = q.shape[1], k.shape[1]
    if settings.window is not None or (settings.causal and queries != keys):
        mask = torch.where(visible(queries, keys, settings.causal, settings.window, q.device), 0.0, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)),
        0.0,
        settings.causal and mask is None,
        attn_mask=None if mask is None else mask.to(q.dtype),
        scale=settings.scale,
    )
    return out.transpose(1, 2), lse


def _run_torch_efficient(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, settings: Settings) -> Result:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), None, True, 0.0, settings.causal, scale=settings.scale
    )
    return out.transpose(1, 2), lse[:, :, : q.shape[1]]  # it pads the rows


def _run_triton(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, settings: Settings) -> Result:
    causal, window, scale, *_ = settings
    if packing is None:
        return flash_attention(q, k, v, None, None, 0, 0, causal, window, scale)
    return flash_attention(q, k, v, *packing, causal, window, scale)


def _run_torch(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, settings: Settings) -> Result:
    starts = (None, None) if packing is None else packing[:2]
    causal, window, scale, *_ = settings
    out, lse = attention_reference(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        cu_seqlens_q=starts[0],
        cu_seqlens_k=starts[1],
        return_lse=True,
    )
    return out, lse


RUNS: dict[str, Run] = {
    "flash4": _run_flash4,
    "flash3": _run_flash3,
    "flash2": _run_flash2,
    "cudnn": _run_cudnn,
    "torch_flash": _run_torch_flash,
    "torch_efficient": _run_torch_efficient,
    "triton": _run_triton,
    "torch": _run_torch,
}


@dataclass(frozen=True)
class Preference:
    """An order of implementations, best first, and what it rests on."""

    order: tuple[str, ...]
    source: str


PREFERENCES = {
    9: Preference(
        ("flash3", "flash4", "cudnn", "flash2", "torch_flash", "torch_efficient", "triton", "torch"),
        "H100, bf16 forward, 8192 tokens, not causal, TFLOP/s at head dimension 64 / 128 / 256: FlashAttention 3 "
        "496 / 646 / 628, cuDNN 412 / 600 / 497, FlashAttention 2 322 / 370 / 297 (arXiv 2407.08608, figures); "
        "FlashAttention 4 611 at head dimensions (192, 128) (pith-train, pull request 2)",
    ),
    10: Preference(
        ("flash4", "cudnn", "flash2", "torch_flash", "torch_efficient", "triton", "torch", "flash3"),
        "FlashAttention 4 is written for this GPU; the order of the others is that of compute capability 9",
    ),
    8: Preference(
        ("flash2", "torch_flash", "cudnn", "torch_efficient", "triton", "torch", "flash4", "flash3"),
        "FlashAttention 2 is written for this GPU (arXiv 2307.08691)",
    ),
}
"""By major compute capability; others take the nearest below."""
CPU = Preference(("torch_flash", "torch", "triton", "flash4", "flash3", "flash2", "cudnn", "torch_efficient"), "a CPU")
INTERPRETER = Preference(
    ("triton", *(name for name in CPU.order if name != "triton")), "Triton's interpreter is switched on"
)


def _preference(case: Case) -> Preference:
    if case.device != "cuda":
        return INTERPRETER if INTERPRETING else CPU
    return PREFERENCES[max((major for major in PREFERENCES if major <= case.capability[0]), default=8)]


@functools.lru_cache(maxsize=4096)
def choose(case: Case, backend: str | None) -> AttentionChoice:
    """Choose an implementation.

    Args:
        case: The call.
        backend: The one that must be taken, or None.

    Raises:
        ValueError: If there is no such one, or it cannot do the call here.
    """
    if backend is not None and backend not in RULES:
        raise ValueError(f"attention: backend must be one of {', '.join(RULES)}, or None; given {backend!r}")
    preference = _preference(case)
    reasons = {name: RULES[name](case) for name in preference.order}
    rejected = tuple((name, why) for name, why in reasons.items() if why is not None)
    fit = [name for name, why in reasons.items() if why is None]
    if backend is None:
        reason = f"best of those that can do it here; the order: {preference.source}"
        return AttentionChoice(fit[0], reason, rejected, tuple(fit[1:]))
    if backend not in fit:
        why = reasons[backend]
        raise ValueError(f"attention: backend={backend!r} cannot do this call: {why}; these can: {', '.join(fit)}")
    others = tuple(name for name in fit if name != backend)
    return AttentionChoice(backend, f"asked for by backend={backend!r}", rejected, others)
