"""Attention of one new token for each request over its KV cache: rotary embedding, append, split-KV, one call.

For request b with n cached tokens and, optionally, its new key and value, query head h of key-value head g:

    q, k_new ← rotated to position n          cache[n] ← k_new, v_new          out[h] = softmax(scale · q[h] · Kᵀ) · V

over the cached tokens and the new one, or the last `window` of them. The cache is contiguous or paged; lengths differ.

Bytes for B requests of S tokens, G key-value heads of D 16-bit elements: K and V are read once, 4BSGD, whatever the
number of query heads H: those that share a key-value head share a program. FLOPs are 4BSHD, that is H/G for each byte:
reading decides up to a ratio of about 200.

One request has too few heads to fill a GPU, so its tokens are split over programs (split-KV, as in FlashDecoding). Each
writes its part of the result and its log-sum-exp in fp32, 8·B·H·D bytes a split, written and read; a second kernel
joins them in a fixed order, so that runs are bit-equal. The number of splits follows from the cache's capacity, which
the host knows, and not from the lengths, which only the device knows: no synchronisation, and a CUDA graph stays right
while the requests grow.

Memory: the result, and with more than one split the parts, 4·B·H·splits·(D + 1) bytes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from composer_kernels._decode import Rotation, launch_decode
from composer_kernels._launch import check_dtypes, describe, runs_kernel


@torch.library.custom_op("composer_kernels::decode_attention", mutates_args=("k_cache", "v_cache"))
def _decode_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    page_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    new = None if new_k is None or new_v is None else (new_k, new_v)
    rotation = None if cos is None or sin is None else Rotation(cos, sin, interleaved)
    return _compute(q, k_cache, v_cache, lengths, new, page_table, rotation, window, scale)


@_decode_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _compute(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    new: tuple[Tensor, Tensor] | None,
    page_table: Tensor | None,
    rotation: Rotation | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """`launch_decode`, or the same in plain PyTorch where no kernel runs."""
    if runs_kernel(q):
        return launch_decode(q, k_cache, v_cache, lengths, new, page_table, rotation, window, scale)
    return _formula(q, k_cache, v_cache, lengths, new, page_table, rotation, window, scale)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    page_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend with one query token a request over its cache, after appending the token's key and value.

    Scores and sums are in fp32; rotated queries and keys are rounded to the cache's type, as a separate rotation would.
    On a GPU two Triton kernels do it, on a CPU and in float64 plain PyTorch. For inference: there is no gradient.

    Args:
        q: (B, H, D); heads g · H/G to (g + 1) · H/G - 1 share key-value head g. B and H may have any stride, so that a
            view of a fused projection's result will do.
        k_cache: Keys, (B, capacity, G, D), or in pages (pages, page size, G, D); any strides, elements of a head side
            by side. Rotated already.
        v_cache: Values, likewise.
        lengths: (B,), int32 or int64: how many tokens of each request are in the cache, the new one not counted. It
            stays as it is. What lies past a length is never read.
        new_k: (B, G, D): key of the new token, not rotated; written to the cache at `lengths` where that is below the
            capacity. The caller sees to it that it is: a token that does not fit takes part this once and is not kept.
        new_v: (B, G, D): its value. Both or neither; without them the cache has all that is attended to.
        page_table: (B, pages of a request), int32 or int64: which page holds tokens i · page size and on.
        cos: Cosines by position, (positions, R/2) with R at most D: the first R elements of q and new_k are rotated to
            position `lengths`; q alone to `lengths` - 1 where there is no new token, the last one cached being it.
        sin: Sines, likewise.
        interleaved: Whether elements (2i, 2i + 1) make a pair; otherwise (i, i + R/2).
        window: Attend to the last `window` tokens alone, the new one among them.
        scale: Of the scores; 1 / sqrt(D) by default.

    Returns:
        (B, H, D) in the type of q, contiguous; 0 for a request without tokens.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes or devices that do not fit.
        RuntimeError: Where a gradient is wanted.
    """
    _check(q, k_cache, v_cache, lengths, new_k, new_v, page_table, cos, sin, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        arguments = (new_k, new_v, page_table, cos, sin, interleaved, window, scale)
        return _decode_op(q, k_cache, v_cache, lengths, *arguments)
    new = None if new_k is None or new_v is None else (new_k, new_v)
    rotation = None if cos is None or sin is None else Rotation(cos, sin, interleaved)
    return _compute(q, k_cache, v_cache, lengths, new, page_table, rotation, window, scale)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    page_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    window: int | None,
) -> None:
    check_dtypes("decode_attention", q=q.dtype)
    if q.dim() != 3 or k_cache.dim() != 4 or q.shape[-1] == 0 or q.stride(-1) != 1:
        wanted = "q must be (B, H, D), k_cache (B, capacity, G, D), elements of a head side by side"
        raise ValueError(f"decode_attention: {wanted}; given {describe(q)}, {describe(k_cache)}")
    batch, heads, dim = q.shape
    rows, _, kv_heads, _ = k_cache.shape
    if kv_heads == 0 or heads % kv_heads or k_cache.shape[-1] != dim or (page_table is None and rows != batch):
        wanted = f"k_cache must be ({batch}, capacity, G, {dim}) with G a divisor of {heads}, for q {describe(q)}"
        raise ValueError(f"decode_attention: {wanted}; given {describe(k_cache)}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape != k_cache.shape or cache.dtype != q.dtype or cache.device != q.device or cache.stride(-1) != 1:
            wanted = f"{name} must be {tuple(k_cache.shape)} in the type and on the device of q, {describe(q)}"
            raise ValueError(f"decode_attention: {wanted}, elements of a head side by side; given {describe(cache)}")
    if (new_k is None) != (new_v is None):
        raise ValueError("decode_attention: new_k and new_v go together; given one of them")
    for name, new in (("new_k", new_k), ("new_v", new_v)):
        if new is not None and not _fits(new, (batch, kv_heads, dim), q):
            wanted = f"{name} must be {(batch, kv_heads, dim)}, like q, {describe(q)}"
            raise ValueError(f"decode_attention: {wanted}; given {describe(new)}")
    _check_integers("lengths", lengths, (batch,), q)
    if page_table is not None:
        _check_integers("page_table", page_table, (batch, page_table.shape[-1] if page_table.dim() else 0), q)
    _check_angles(cos, sin, dim, q)
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window must be at least 1, or None for all tokens; given {window!r}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, new_k, new_v)):
        raise RuntimeError("decode_attention: has no gradient; call it under torch.no_grad()")


def _fits(tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> bool:
    same = tensor.dtype == q.dtype and tensor.device == q.device
    return tensor.shape == shape and same and tensor.stride(-1) == 1


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    fits = tensor.shape == shape and tensor.device == q.device and tensor.dtype in (torch.int32, torch.int64)
    if not fits or tensor.stride(-1) != 1:
        wanted = "(B, pages of a request)" if len(shape) == 2 else str(shape)
        raise ValueError(
            f"decode_attention: {name} must be {wanted}, int32 or int64, contiguous, on {q.device}; "
            f"given {describe(tensor)}"
        )


def _check_angles(cos: Tensor | None, sin: Tensor | None, dim: int, q: Tensor) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("decode_attention: cos and sin go together; given one of them")
    check_dtypes("decode_attention", cos=cos.dtype, sin=sin.dtype)
    same = cos.shape == sin.shape and cos.stride() == sin.stride() and cos.device == sin.device == q.device
    if not same or cos.dim() != 2 or not 0 < 2 * cos.shape[1] <= dim or cos.stride(1) != 1:
        wanted = f"cos and sin must be (positions, R/2) with R at most {dim}, contiguous, on {q.device}"
        raise ValueError(f"decode_attention: {wanted}; given {describe(cos)}, {describe(sin)}")


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    page_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`decode_attention` in plain PyTorch on any device."""
    new = None if new_k is None or new_v is None else (new_k, new_v)
    rotation = None if cos is None or sin is None else Rotation(cos, sin, interleaved)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _formula(q, k_cache, v_cache, lengths, new, page_table, rotation, window, scale)


def _formula(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    new: tuple[Tensor, Tensor] | None,
    page_table: Tensor | None,
    rotation: Rotation | None,
    window: int | None,
    scale: float,
) -> Tensor:
    page = k_cache.shape[1]
    capacity = page if page_table is None else page * page_table.shape[1]
    given = lengths.long()
    q = _rotate(q, given + (new is not None) - 1, rotation)
    block = torch.arange(len(q), device=q.device)[:, None] if page_table is None else page_table.long()
    if new is not None:
        at = torch.arange(len(q), device=q.device)[given < capacity]
        place = given[at]
        rows = block[at, 0] if page_table is None else block[at, place // page]
        key = _rotate(new[0], given, rotation)
        k_cache[rows, place % page if page_table is not None else place] = key[at]
        v_cache[rows, place % page if page_table is not None else place] = new[1][at]
    keys, values = (cache[block].flatten(1, 2) for cache in (k_cache, v_cache))  # (B, capacity, G, D)
    position = torch.arange(capacity, device=q.device)
    ends = given.clamp(max=capacity)[:, None]
    total = ends + (new is not None)
    seen = position < ends
    if new is not None:  # last in line, whether it found room in the cache or not
        keys, values = (torch.cat((a, b[:, None]), 1) for a, b in ((keys, key), (values, new[1])))
        seen = torch.cat((seen, torch.ones_like(seen[:, :1])), 1)
        position = torch.cat((position.expand(len(q), -1), ends), 1)
    if window is not None:
        seen = seen & (position >= total - window)
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k_cache.shape[2], -1)).to(wide)
    scores = torch.einsum("bgrd,bsgd->bgrs", grouped, keys.to(wide)) * scale
    weights = scores.masked_fill(~seen[:, None, None], -math.inf).softmax(-1).nan_to_num(0.0)
    values = values.to(wide).masked_fill(~seen[..., None, None], 0.0)
    return torch.einsum("bgrs,bsgd->bgrd", weights, values).flatten(1, 2).to(q.dtype)


def _rotate(x: Tensor, positions: Tensor, rotation: Rotation | None) -> Tensor:
    """The first elements of x (B, heads, D), turned by the angles of their request's position."""
    if rotation is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions.clamp(min=0)][:, None].to(wide) for table in (rotation.cos, rotation.sin))
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width].to(wide), x[..., width:]
    if rotation.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
