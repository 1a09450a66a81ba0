"""Training attention: one call for the best implementation that is installed and fits, and says which and why.

    out = softmax(q kᵀ · scale) v        lse = log of each row's sum of exp(q kᵀ · scale)

FlashAttention 2, 3 and 4 (`flash_attn`, `flash_attn_interface`, `flash_attn.cute`), PyTorch's cuDNN, flash and
memory-efficient kernels, and a Triton implementation of our own (`_flash`, `_flash_backward`), which takes every case.
`choose_attention` says which one a call gets, why, and what kept the others out; the choice is kept by the call's
shapes, strides and types, so that a call costs a few microseconds over the implementation itself.

FLOPs: 4 · d for each visible pair of query and key forward, 10 · d backward; half of all pairs where causal.

Layout: (b, s, h, d), with any strides whose last is 1: Megatron's (s, b, h, d) is `x.transpose(0, 1)`, a view, and so
are the slices of a fused projection. The output has the strides of q where these leave no gaps, so that
`out.transpose(0, 1).flatten(2)` is a view as well (FlashAttention 4 alone writes (b, s, h, d)). Packed sequences are
(t, h, d), with the first row of each in `cu_seqlens`.

Causality is aligned to the bottom right: the last query stands at the last key, as a chunk of queries does that sees
all earlier keys, when decoding, in chunked prefill, and under context parallelism.

Memory: the output and 4 bytes a query and head are allocated forward; q, k, v and these are kept for backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from composer_kernels._attention_backends import (
    RUNS,
    AttentionChoice,
    Packing,
    Settings,
    choose,
)
from composer_kernels._attention_reference import attention_reference
from composer_kernels._attention_rules import Case
from composer_kernels._launch import check_dtypes, describe

__all__ = ["AttentionChoice", "attention", "attention_reference", "choose_attention"]

_choices: dict[tuple[Any, ...], AttentionChoice] = {}
_MOST_CHOICES = 4096
"""Kept at a time; packed training makes new shapes all the time."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend: softmax(q kᵀ · scale) v, each head for itself.

    A query that sees no key (there are more queries than keys, or a sequence has none) gives 0, a log-sum-exp of minus
    infinity, and gradients of 0. The gradient cannot be differentiated again, except in plain PyTorch
    (`backend="torch"`). The Triton implementation gives equal bits for equal inputs; others do where
    `torch.use_deterministic_algorithms` asks for it.

    Args:
        q: Queries (b, sq, h, d) in bfloat16, float16, float32 or float64, or (t, h, d) packed. A tensor whose last
            stride is not 1 is copied first.
        k: Keys (b, sk, hk, d) or (t, hk, d), where hk divides h: query head i reads head i // (h / hk).
        v: Values, like `k`.
        causal: Whether query i of sq sees only the first i + 1 + sk - sq keys.
        window: How many keys before its own position a query sees: the key at its position and `window` before it,
            and, unless `causal`, all after it. None for all.
        scale: Of the scores, positive; 1/√d by default.
        cu_seqlens_q: First rows of packed sequences and the end of the last, (sequences + 1,), int32, on the device of
            `q`: 0, ascending, t. They are not looked at here (that would wait for the GPU); rows beyond the last end
            are left undefined.
        cu_seqlens_k: Likewise of keys; those of the queries by default.
        max_seqlen_q: Queries of the longest packed sequence, or more; t by default, which is right but launches idle
            programs.
        max_seqlen_k: Likewise keys.
        backend: Take this implementation: flash4, flash3, flash2, cudnn, torch_flash, torch_efficient, triton, torch.
        return_lse: Whether to return the log-sum-exp as well, with a gradient.

    Returns:
        The output, like `q`; with `return_lse` also the log-sum-exp in fp32 (or float64), (b, h, sq) or (h, t).

    Raises:
        TypeError: For element types that are not accepted.
        ValueError: For shapes, devices or numbers that do not fit, or a backend that cannot do this call.
    """
    packing = _packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_compiling():
        _check(q, k, v, window, scale, packing)
        name = _constant_choice(backend, *_facts(q, k, v, causal, window, packing, return_lse, deterministic))
    else:
        name = _choice(q, k, v, causal, window, scale, packing, return_lse, deterministic, backend).name
    settings = Settings(causal, window, q.shape[-1] ** -0.5 if scale is None else scale, return_lse, deterministic)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = RUNS[name](q, k, v, packing, settings)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def choose_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> AttentionChoice:
    """Say which implementation `attention` takes for these arguments, and why; same arguments, same errors."""
    packing = _packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _choice(q, k, v, causal, window, scale, packing, return_lse, deterministic, backend)


def _packing(
    q: Tensor,
    k: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    q_longest: int | None,
    k_longest: int | None,
) -> Packing | None:
    """The packed sequences, those of the keys like those of the queries where they are not given."""
    if q_starts is None:
        if k_starts is not None or q_longest is not None or k_longest is not None:
            raise ValueError("attention: packed sequences need cu_seqlens_q; without it leave the others out")
        return None
    if k_starts is None:
        k_starts, k_longest = q_starts, q_longest if k_longest is None else k_longest
    return Packing(
        q_starts,
        k_starts,
        q.shape[0] if q_longest is None else q_longest,
        k.shape[0] if k_longest is None else k_longest,
    )


def _choice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    packing: Packing | None,
    lse: bool,
    deterministic: bool,
    backend: str | None,
) -> AttentionChoice:
    """Checks the arguments and chooses; remembers both by everything they depend on."""
    key = (
        *(q.shape, q.stride(), q.dtype, q.device, q.requires_grad),
        *(k.shape, k.stride(), k.dtype, k.device, k.requires_grad),
        *(v.shape, v.stride(), v.dtype, v.device, v.requires_grad),
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16,
        *(causal, window, scale, lse, deterministic, backend, torch.is_grad_enabled(), *_allowed()),
        *(() if packing is None else [(x.shape, x.dtype, x.device) for x in packing[:2]]),
    )
    choice = _choices.get(key)
    if choice is None:
        _check(q, k, v, window, scale, packing)
        case = _case(*_facts(q, k, v, causal, window, packing, lse, deterministic))
        if len(_choices) >= _MOST_CHOICES:
            _choices.clear()
        choice = _choices[key] = choose(case, backend)
    return choice


def _facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    packing: Packing | None,
    lse: bool,
    deterministic: bool,
) -> tuple[Any, ...]:
    """What `_case` takes; plain values, which torch.compile knows when it traces."""
    compiling = torch.compiler.is_compiling()
    dense = packing is None
    sequences = q.shape[0] if packing is None else packing.q_starts.shape[0] - 1
    rows, cols = (q.shape[1], k.shape[1]) if dense else (q.shape[0], k.shape[0])
    return (
        q.device.type,
        q.device.index,
        q.dtype,
        len((None,) * q.shape[-1]) if compiling else q.shape[-1],  # repeating a tuple fixes the size
        _decided(q.shape[-2] != k.shape[-2]),
        _decided(dense and rows < cols),
        _decided(dense and rows > cols),
        _decided(sequences == 0 or rows == 0 or cols == 0),
        _decided(dense and cols == 1),
        not dense,
        causal,
        window is not None,
        lse,
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        _aligned(q, compiling) and _aligned(k, compiling) and _aligned(v, compiling),
        deterministic,
        compiling,
    )


def _decided(condition: bool) -> bool:
    """The condition; of sizes that torch.compile leaves open it decides only what a branch asks for."""
    if condition:  # noqa: SIM103
        return True
    return False


def _aligned(x: Tensor, compiling: bool) -> bool:
    """Whether all rows begin at multiples of 16 bytes; torch.compile knows no address and is trusted with the first."""
    size = x.element_size()
    first = 0 if compiling else x.data_ptr()
    if first % 16 != 0:
        return False
    for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if length > 1 and stride * size % 16 != 0:
            return False
    return True


def _case(device: str, index: int | None, *facts: Any) -> Case:
    capability = torch.cuda.get_device_capability(index) if device == "cuda" else (0, 0)
    values: tuple[Any, ...] = (device, capability, *facts, _allowed())
    return Case(*values)


def _allowed() -> tuple[bool, bool, bool]:
    switches = torch.backends.cuda
    return switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled(), switches.cudnn_sdp_enabled()


@torch.compiler.assume_constant_result
def _constant_choice(backend: str | None, *facts: Any) -> str:
    """The name of the choice, made while torch.compile traces."""
    return choose(_case(*facts), backend).name


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, packing: Packing | None) -> None:
    check_dtypes("attention", q=q.dtype, k=k.dtype, v=v.dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q, k and v must have one type; given {', '.join(map(describe, (q, k, v)))}")
    wanted = (
        "(b, s, h, d), or (t, h, d) with cu_seqlens_q" if packing is None else "(t, h, d), as cu_seqlens_q is given"
    )
    dims = 4 if packing is None else 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims or 0 in x.shape[-2:]:
            raise ValueError(f"attention: {name} must be {wanted}, with h and d at least 1; given {describe(x)}")
    if k.shape != v.shape or k.device != q.device or v.device != q.device:
        given = f"{describe(k)} and {describe(v)}"
        raise ValueError(f"attention: k and v must have one shape and the device of q, {q.device}; given {given}")
    if q.shape[-1] != k.shape[-1] or q.shape[-2] % k.shape[-2] or (packing is None and q.shape[0] != k.shape[0]):
        wanted = "the batch and head dimension of q, and a number of heads that divides its own"
        raise ValueError(f"attention: k must have {wanted}; given q {describe(q)}, k {describe(k)}")
    if window is not None and window < 0:
        raise ValueError(f"attention: window must be at least 0, or None for all keys; given {window!r}")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"attention: scale must be positive and finite, or None for 1/√d; given {scale!r}")
    if packing is not None:
        _check_packing(q, packing)


def _check_packing(q: Tensor, packing: Packing) -> None:
    for name, starts in (("cu_seqlens_q", packing.q_starts), ("cu_seqlens_k", packing.k_starts)):
        fits = (
            starts.dim() == 1 and starts.dtype == torch.int32 and starts.device == q.device and starts.is_contiguous()
        )
        if not fits or len(starts) == 0 or starts.shape != packing.q_starts.shape:
            wanted = f"int32 (sequences + 1,) on {q.device}, contiguous, and as long as cu_seqlens_q"
            raise ValueError(f"attention: {name} must be {wanted}; given {describe(starts)}")
