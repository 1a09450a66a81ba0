"""What each implementation of attention can do: a rule says why it cannot do a case, None that it can.

Where an implementation means something else by its arguments, its rule refuses that case rather than have it compute
something else: PyTorch's `is_causal`, for one, is aligned to the top left, and the log-sum-exp of most has no gradient.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from composer_kernels._launch import DTYPES, INTERPRETING, dtype_name


@dataclass(frozen=True)
class Case:
    """What of a call decides which implementations can do it.

    Attributes:
        device: `cuda`, `cpu`, …
        capability: Compute capability of the GPU; (0, 0) where there is none.
        dtype: Of queries, keys and values.
        dim: Of a head.
        grouped: Whether several query heads share a head of keys and values.
        fewer: Whether there are fewer queries than keys; of dense tensors.
        more: Whether there are more.
        empty: Whether there is no query, no key or no sequence.
        single_key: Whether there is but one key; of dense tensors.
        packed: Whether sequences are packed.
        causal: Whether a query sees no key after its own position.
        windowed: Whether a query sees only some keys before it.
        lse: Whether the log-sum-exp is wanted.
        grad: Whether gradients are.
        aligned: Whether all rows begin at multiples of 16 bytes.
        deterministic: Whether `torch.use_deterministic_algorithms` asks for equal bits from equal inputs.
        compiling: Whether torch.compile looks on.
        allowed: PyTorch's switches `torch.backends.cuda.enable_{flash,mem_efficient,cudnn}_sdp`.
    """

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    dim: int
    grouped: bool = False
    fewer: bool = False
    more: bool = False
    empty: bool = False
    single_key: bool = False
    packed: bool = False
    causal: bool = True
    windowed: bool = False
    lse: bool = False
    grad: bool = True
    aligned: bool = True
    deterministic: bool = False
    compiling: bool = False
    allowed: tuple[bool, bool, bool] = (True, True, True)


Rule = Callable[[Case], str | None]


@functools.cache
def load(module: str, name: str) -> Callable[..., Any] | str:
    """A function of an optional package, or why there is none."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # a package built for another PyTorch or GPU fails in its own ways
        return f"fails on import ({type(error).__name__}: {error})"


def _installed(module: str) -> str | None:
    """Why a package with FlashAttention's two functions cannot be used, or None."""
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        found = load(module, name)
        if isinstance(found, str):
            return found
    return None


def _unfit_16_bit(case: Case) -> str | None:
    """What no kernel but our own takes: it is for CUDA, 16 bits and whole 16-byte accesses."""
    if case.device != "cuda":
        return f"runs on CUDA tensors, these are on {case.device}"
    if case.capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {case.capability[0]}.{case.capability[1]}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 and float16, not {dtype_name(case.dtype)}"
    if case.dim % 8 or case.dim > 256:
        return f"takes head dimensions that are multiples of 8 up to 256, not {case.dim}"
    return _unfit_gpu(case)


def _unfit_gpu(case: Case) -> str | None:
    """What differs or is undefined in the others' kernels."""
    if case.empty:
        return "does not take empty tensors"
    if not case.aligned:
        return "reads 16 bytes at a time, and rows begin elsewhere"
    if case.causal and case.more:
        return "queries before the first key see nothing, which it does not define"
    return None


def _unfit_lse(case: Case) -> str | None:
    if case.lse and case.grad:
        return "its log-sum-exp has no gradient"
    return None


def _unfit_flash4(case: Case) -> str | None:
    # flash-attn-4 4.0.0b36, flash_attn/cute/interface.py: head dimensions by architecture, dlse, what backward asserts
    reason = _unfit_16_bit(case)
    major = case.capability[0]
    if reason is None and major not in (9, 10, 11):
        reason = f"is for compute capabilities 9 to 11, this GPU has {major}.{case.capability[1]}"
    if reason is None and major > 9 and case.dim > 128 and case.dim != 256:
        reason = f"takes head dimensions up to 128, or 256, on this GPU, not {case.dim}"
    if reason is None and major > 9 and case.dim == 256 and case.lse and case.grad:
        reason = "its log-sum-exp has no gradient at head dimension 256 on this GPU"
    if reason is None and case.compiling:
        reason = "torch.compile cannot look into it"
    return reason or _installed("flash_attn.cute")


def _unfit_flash3(case: Case) -> str | None:
    reason = _unfit_16_bit(case) or _unfit_lse(case)
    if reason is None and case.capability[0] != 9:
        reason = f"is for compute capability 9, this GPU has {case.capability[0]}.{case.capability[1]}"
    if reason is None and case.compiling:
        reason = "torch.compile cannot look into it"
    return reason or _installed("flash_attn_interface")


def _unfit_flash2(case: Case) -> str | None:
    reason = _unfit_16_bit(case) or _unfit_lse(case)
    if reason is None and case.compiling:
        reason = "torch.compile cannot look into it"
    return reason or _installed("flash_attn")


def _unfit_cudnn(case: Case) -> str | None:
    # PyTorch 2.11, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, and sdp's is_causal
    reason = _unfit_16_bit(case) or _unfit_lse(case)
    widest = 256 if case.capability == (9, 0) and (torch.backends.cudnn.version() or 0) >= 91000 else 128
    for applies, why in (
        (not case.allowed[2], "is switched off (torch.backends.cuda.enable_cudnn_sdp)"),
        (case.packed, "PyTorch does not offer it for packed sequences"),
        (case.windowed, "PyTorch does not offer it with a window"),
        (case.causal and case.fewer, "PyTorch aligns its causality to the top left"),
        (case.dim > widest, f"takes head dimensions up to {widest} here, not {case.dim}"),
        (case.single_key, "does not take a single key"),
        (case.deterministic, "is not deterministic, which torch.use_deterministic_algorithms asks for"),
    ):
        if reason is None and applies:
            reason = why
    return reason


def _unfit_torch_flash(case: Case) -> str | None:
    if case.device == "cpu":
        return _unfit_cpu(case)
    if not case.allowed[0]:
        return "is switched off (torch.backends.cuda.enable_flash_sdp)"
    return _unfit_16_bit(case) or _unfit_lse(case)


def _unfit_cpu(case: Case) -> str | None:
    for applies, why in (
        (case.packed, "PyTorch does not offer it for packed sequences on a CPU"),
        (case.empty, "does not take empty tensors"),
        (case.causal and case.more, "queries before the first key see nothing, which it does not define"),
    ):
        if applies:
            return why
    return _unfit_lse(case)


def _unfit_torch_efficient(case: Case) -> str | None:
    aligned = case.dim * case.dtype.itemsize % 16 == 0
    for applies, why in (
        (case.device != "cuda", f"runs on CUDA tensors, these are on {case.device}"),
        (not case.allowed[1], "is switched off (torch.backends.cuda.enable_mem_efficient_sdp)"),
        (case.dtype not in DTYPES, f"computes in {', '.join(map(dtype_name, DTYPES))}, not {dtype_name(case.dtype)}"),
        (not aligned, f"takes heads of whole 16 bytes, not {case.dim} elements"),
        (case.grouped, "takes as many heads of keys as of queries"),
        (case.packed, "PyTorch does not offer it for packed sequences"),
        (case.windowed, "PyTorch does not offer it with a window"),
        (case.causal and case.fewer, "PyTorch aligns its causality to the top left"),
    ):
        if applies:
            return why
    return _unfit_gpu(case) or _unfit_lse(case)


def _unfit_triton(case: Case) -> str | None:
    if case.device != "cuda" and not INTERPRETING:
        return f"runs on CUDA tensors, these are on {case.device}"
    if case.device == "cuda" and case.capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {case.capability[0]}.{case.capability[1]}"
    if case.dtype not in DTYPES:
        return f"computes in {', '.join(map(dtype_name, DTYPES))}, not {dtype_name(case.dtype)}"
    if case.dim > 256:
        return f"takes head dimensions up to 256, not {case.dim}"
    return None


RULES: dict[str, Rule] = {
    "flash4": _unfit_flash4,
    "flash3": _unfit_flash3,
    "flash2": _unfit_flash2,
    "cudnn": _unfit_cudnn,
    "torch_flash": _unfit_torch_flash,
    "torch_efficient": _unfit_torch_efficient,
    "triton": _unfit_triton,
    "torch": lambda case: None,
}
