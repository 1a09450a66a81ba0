"""Attention in plain PyTorch: the formula that the kernels are held to, and what runs where none of them does."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which query sees which key, (queries, keys), aligned to the bottom right."""
    return _sees(torch.arange(keys - queries, keys, device=device), torch.arange(keys, device=device), causal, window)


def _sees(positions: Tensor, keys: Tensor, causal: bool, window: int | None) -> Tensor:
    """Which query, at a key's position, sees which key."""
    ahead = keys - positions[:, None]
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen if window is None else seen & (ahead >= -window)


def _visible_packed(
    q_starts: Tensor, k_starts: Tensor, rows: int, cols: int, causal: bool, window: int | None
) -> Tensor:
    """Likewise for packed sequences; nothing is seen outside of them."""
    row, col = torch.arange(rows, device=q_starts.device), torch.arange(cols, device=q_starts.device)
    q_starts, k_starts = q_starts.long(), k_starts.long()
    of_row = torch.searchsorted(q_starts[1:], row, right=True)
    of_col = torch.searchsorted(k_starts[1:], col, right=True)
    sequences = q_starts.shape[0] - 1
    inside = of_row.clamp(max=sequences - 1)  # rows behind the last sequence, which see nothing
    positions = row - q_starts[inside + 1] + k_starts[inside + 1]
    together = (of_row[:, None] == of_col) & (of_row < sequences)[:, None]
    return together & _sees(positions, col, causal, window)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` in plain PyTorch on any device, which autograd differentiates as often as one likes.

    Computed in fp32 (or float64) and rounded once; its memory grows with queries times keys, of all packed sequences
    together. Arguments and results are those of `composer_kernels.attention.attention`.
    """
    packed = cu_seqlens_q is not None
    if cu_seqlens_q is not None:
        k_starts = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        seen = _visible_packed(cu_seqlens_q, k_starts, q.shape[0], k.shape[0], causal, window)
        q, k, v = (tensor.unsqueeze(0) for tensor in (q, k, v))
    else:
        seen = visible(q.shape[1], k.shape[1], causal, window, q.device)
    out, lse = _attend(q, k, v, seen, q.shape[-1] ** -0.5 if scale is None else scale)
    if packed:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of dense tensors, with a mask; h key heads of g query heads each."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k.shape[2], q.shape[2] // k.shape[2]))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k.to(wide)) * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    peak = scores.detach().amax(-1, keepdim=True) if k.shape[1] else scores.new_zeros((*scores.shape[:-1], 1))
    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # a query that sees no key
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    none = total == 0
    total = total.masked_fill(none, 1.0)
    lse = (total.log() + peak).masked_fill(none, -torch.inf).flatten(1, 2).squeeze(-1)
    out = torch.einsum("bhgqk,bkhd->bqhgd", weights / total, v.to(wide)).flatten(2, 3)
    return out.to(dtype), lse
