"""Rotary position embedding (arXiv 2104.09864) of query and key heads, forward and backward.

Pairs (a, b) of a head's elements turn by an angle that grows with the token's position:

    a' = a · cos - b · sin          b' = b · cos + a · sin

Half rotation pairs element i with i + HALF, interleaved rotation 2i with 2i + 1. Elements past the first 2 · HALF pass
through (partial rotation). Backward turns gradients by the negative angle and needs none of the activations.

Bytes for R tokens of nq query and nk key heads of D 16-bit elements:

    rope        one tensor of n heads to a new one, or `rope_` in place                              4RnD
    rope_qk     query and key to new ones, in one launch                                      4R(nq + nk)D
    rope_qkv    packed to query, key and, where copied, value      4R(nq + nk)D, and with the value  4R(nq + 2nk)D
    rope_qkv_   packed, in place, the value left alone: forward 4R(nq + nk)D; backward               4R(nq + 2nk)D

The backward pass of `rope_qkv` writes one packed gradient, 4R(nq + 2nk)D. Cosines and sines add 4 bytes a pair of each
position. 6 FLOPs a pair: memory decides.

Layout: tokens are (s, b) or, as packed sequences are, (t). Heads lie as (…, n, D) or packed, as Megatron's `linear_qkv`
writes them: (…, W) of nk groups [query head × nq / nk | key head | value head]. Gradients lie without gaps.

Memory: results are allocated forward and gradients backward; in place, gradients alone. Tensors in which the elements
of a head do not lie side by side are copied first.

Positions: the first token of the tensor has position `position_offset`. With `cu_seqlens` the tokens belong to packed
sequences and positions begin anew in each; tokens outside all of them pass through. In a context-parallel group of C
processes a sequence (the tensor, or each packed one) is cut into 2C chunks, of which process r holds chunks r and
2C - 1 - r, as Megatron cuts it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from composer_kernels._launch import check_dtypes, describe
from composer_kernels._rope_op import split, split_reference, turn, turn_, turn_pair, turn_reference
from composer_kernels._rope_rules import check, settle


def rope(
    t: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    restart_positions: bool = True,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> Tensor:
    """Turn the heads of one tensor by their positions.

    Computed in fp32 and rounded once. On a GPU a Triton kernel does it, on a CPU and in float64 plain PyTorch. `t` gets
    a gradient, which may be differentiated in turn; the tables get none.

    Args:
        t: (s, b, n, D), or (t, n, D) for packed sequences or a single one; bfloat16, float16, float32 or float64.
        cos: Cosines of the angles, (positions, HALF) with 2 · HALF <= D, best in fp32 (float64 for a float64 `t`).
        sin: Sines, likewise.
        interleaved: Whether pairs are neighbours (2i, 2i + 1) and not (i, i + HALF).
        position_offset: Position of the first token.
        cu_seqlens: (sequences + 1,) int32 or int64 boundaries of packed sequences, counted in tokens of the whole
            group's batch, not of this process's part; in a group, lengths are multiples of 2 · cp_size.
        restart_positions: Whether each packed sequence begins at `position_offset`; else its boundary is added, so that
            the tables have a row for each token of the batch.
        cp_rank: This process in its context-parallel group.
        cp_size: Processes of that group, which share each sequence out.

    Returns:
        The turned tensor, shaped like `t`, contiguous.

    Raises:
        TypeError: For an element type that is not accepted.
        ValueError: For shapes, devices or numbers that do not fit, such as tables with too few positions. How long
            packed sequences are is not known without waiting for the GPU: their tokens past the tables become NaN.
    """
    options = (interleaved, position_offset, cu_seqlens, restart_positions, cp_rank, cp_size)
    return turn(t, *settle("rope", t, _heads("rope", t), cos, sin, *options))


def rope_(t: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
    """`rope` in place, with its options: writes over `t` and returns it.

    Raises:
        TypeError: As `rope`.
        ValueError: As `rope`, and for a leaf that wants a gradient or memory that cannot be written so.
    """
    _check_writable("rope_", "t", t)
    return turn_(t, *settle("rope_", t, _heads("rope_", t), cos, sin, **options))


def rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`rope` of query and key in one launch, which ends once and not twice.

    Args:
        q: (s, b, n, D) or (t, n, D), as for `rope`.
        k: The same but for the number of heads.
        cos: As for `rope`.
        sin: As for `rope`.
        **options: Those of `rope`.

    Returns:
        Both turned, shaped like `q` and `k`, contiguous.

    Raises:
        TypeError: As `rope`.
        ValueError: As `rope`, and for a key that does not belong to the query.
    """
    check_dtypes("rope_qk", q=q.dtype, k=k.dtype, cos=cos.dtype, sin=sin.dtype)
    heads = _heads("rope_qk", q, "q")
    shape = k.shape
    fits = len(shape) == q.dim() and shape[:-2] == q.shape[:-2] and shape[-1] == heads[2] and shape[-2] > 0
    if not fits or k.dtype != q.dtype or k.device != q.device:
        raise ValueError(
            f"rope_qk: k must be as q is, {describe(q)}, but for the number of heads, from 1; given {describe(k)}"
        )
    return turn_pair(q, k, *settle("rope_qk", q, heads, cos, sin, **options))


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_query_groups: int,
    head_dim: int,
    copy_value: bool | None = None,
    interleaved: bool = False,
    position_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    restart_positions: bool = True,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split what Megatron's `linear_qkv` writes into query, key and value, query and key turned by their positions.

    Args:
        qkv: (s, b, W) or (t, W), W = (num_heads + 2 · num_query_groups) · head_dim; or the same with the last dimension
            divided into (num_query_groups, W / num_query_groups).
        cos: As for `rope`, like all arguments not described here.
        sin: See `rope`.
        num_heads: Query heads on this process.
        num_query_groups: Key heads on this process, and value heads; divides `num_heads`.
        head_dim: Elements of a head, D.
        copy_value: Whether the value is copied and no view of `qkv`. By default it is where `qkv` wants a gradient:
            there attention keeps the value until its backward pass, and a view would keep all of `qkv`, which repeats
            query and key.
        interleaved: See `rope`.
        position_offset: See `rope`.
        cu_seqlens: See `rope`.
        restart_positions: See `rope`.
        cp_rank: See `rope`.
        cp_size: See `rope`.

    Returns:
        Query (…, num_heads, D) and key (…, num_query_groups, D), both contiguous, and value, shaped like the key.

    Raises:
        TypeError: As `rope`.
        ValueError: As `rope`.
    """
    heads = (num_heads, num_query_groups, head_dim)
    packed = _packed("rope_qkv", qkv, *heads)
    options = (interleaved, position_offset, cu_seqlens, restart_positions, cp_rank, cp_size)
    return split(packed, *settle("rope_qkv", packed, heads, cos, sin, *options), copy_value)


def rope_qkv_(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_query_groups: int, head_dim: int, **options: Any
) -> Tensor:
    """Turn query and key within the packed `qkv` of `rope_qkv` and return it, for attention that reads that layout.

    The other options are those of `rope`. Query heads of several groups have no common view (…, num_heads, D) in there;
    whoever needs one moves fewer bytes with `rope_qkv`.

    Raises:
        TypeError: As `rope`.
        ValueError: As `rope_`.
    """
    _check_writable("rope_qkv_", "qkv", qkv)
    heads = (num_heads, num_query_groups, head_dim)
    packed = _packed("rope_qkv_", qkv, *heads)
    if packed.dim() < qkv.dim() and qkv.stride(-2) != qkv.shape[-1]:
        raise ValueError(f"rope_qkv_: groups must lie side by side in qkv; its strides are {qkv.stride()}")
    turn_(packed, *settle("rope_qkv_", packed, heads, cos, sin, **options))
    return qkv


def rope_reference(t: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
    """`rope` in plain PyTorch, options as there; autograd differentiates it by `t`, `cos` and `sin`, and twice."""
    op = "rope_reference"
    return turn_reference(t, *check(op, t, _heads(op, t), cos, sin, **options))


def rope_qkv_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_query_groups: int, head_dim: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_qkv` in plain PyTorch, likewise; the value is a view."""
    op, heads = "rope_qkv_reference", (num_heads, num_query_groups, head_dim)
    packed = _packed(op, qkv, *heads)
    return split_reference(packed, *check(op, packed, heads, cos, sin, **options))


def fused_apply_rotary_pos_emb(t: Tensor, freqs: Tensor, *, interleaved: bool = False) -> Tensor:
    """What Megatron-core calls under that name where `apply_rope_fusion` is set and sequences are not packed.

    Its place is `megatron.core.models.common.embeddings.rope_utils`. Cosines and sines are computed in the kernel.

    Args:
        t: (s, b, n, D), or (t, n, D), as for `rope`.
        freqs: Angles (positions, 1, 1, 2 · HALF) in fp32, one for each element, the same for both of a pair; in a
            context-parallel group already those of this process's tokens.
        interleaved: Whether pairs are neighbours.

    Returns:
        The turned tensor, shaped like `t`, contiguous.

    Raises:
        TypeError: As `rope`.
        ValueError: As `rope`.
    """
    op = "fused_apply_rotary_pos_emb"
    return turn(t, *settle(op, t, _heads(op, t), _angles(op, freqs, interleaved), None, interleaved))


def fused_apply_rotary_pos_emb_thd(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """What Megatron-core calls under that name, beside `fused_apply_rotary_pos_emb`, where sequences are packed.

    As in Megatron's own unfused code, angles that are as many as the tokens of the whole batch belong to these tokens;
    otherwise they belong to positions, which begin anew in each sequence.

    Args:
        t: (t, n, D), this process's part.
        cu_seqlens: (sequences + 1,) boundaries in the whole batch, padding between sequences included.
        freqs: Angles (positions, 1, 1, 2 · HALF), not cut for context parallelism.
        cp_size: Processes of the context-parallel group.
        cp_rank: This process in it.
        interleaved: Whether pairs are neighbours.

    Returns:
        The turned tensor, shaped like `t`, contiguous.

    Raises:
        TypeError: As `rope`.
        ValueError: As `rope`.
    """
    op = "fused_apply_rotary_pos_emb_thd"
    angles = _angles(op, freqs, interleaved)
    restart = freqs.shape[0] != t.shape[0] * cp_size
    options = (interleaved, 0, cu_seqlens, restart, cp_rank, cp_size)
    return turn(t, *settle(op, t, _heads(op, t), angles, None, *options))


def apply_fused_qkv_rotary_pos_emb(
    qkv: Tensor, q_freqs: Tensor, k_freqs: Tensor, qkv_split_arg_list: list[int], *, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron-core calls under that name where `fused_single_qkv_rope` is set: `rope_qkv` on angles.

    Its place is `megatron.core.transformer.attention`, beside the flag `HAVE_FUSED_QKV_ROPE`. Megatron does not pass
    `interleaved`; bind it where the model wants it.

    Args:
        qkv: (s, b, groups, W / groups).
        q_freqs: Angles as for `fused_apply_rotary_pos_emb`.
        k_freqs: The same tensor.
        qkv_split_arg_list: Elements of query, key and value in a group.
        interleaved: Whether pairs are neighbours.

    Returns:
        Query, key and value, as `rope_qkv`.

    Raises:
        TypeError: As `rope`.
        ValueError: As `rope`, and where keys have other angles than queries.
    """
    op = "apply_fused_qkv_rotary_pos_emb"
    if k_freqs is not q_freqs:
        raise ValueError(f"{op}: k_freqs must be the tensor that q_freqs is; for other angles call rope on each part")
    in_group, head_dim, value_dim = qkv_split_arg_list
    if qkv.dim() < 2 or head_dim < 1 or head_dim != value_dim or in_group % head_dim:
        raise ValueError(
            f"{op}: qkv_split_arg_list is {qkv_split_arg_list} for qkv {describe(qkv)}; accepted are the elements of "
            "one or more query heads, a key head and a value head, all of one size"
        )
    heads = (qkv.shape[-2] * in_group // head_dim, qkv.shape[-2], head_dim)
    packed = _packed(op, qkv, *heads)
    angles = _angles(op, q_freqs, interleaved)
    return split(packed, *settle(op, packed, heads, angles, None, interleaved), None)


def _heads(op: str, t: Tensor, name: str = "t") -> tuple[int, int, int]:
    if t.dim() not in (3, 4):
        raise ValueError(f"{op}: {name} must be (s, b, n, D) or (t, n, D); given {describe(t)}")
    return t.shape[-2], 0, t.shape[-1]


def _packed(op: str, qkv: Tensor, num_heads: int, num_query_groups: int, head_dim: int) -> Tensor:
    """`qkv` as (s, b, W) or (t, W)."""
    if min(num_heads, num_query_groups, head_dim) < 1 or num_heads % num_query_groups:
        raise ValueError(
            f"{op}: num_heads is {num_heads}, num_query_groups {num_query_groups} and head_dim {head_dim}; accepted "
            "are numbers from 1, num_heads a multiple of num_query_groups"
        )
    width = (num_heads + 2 * num_query_groups) * head_dim
    if qkv.dim() in (2, 3) and qkv.shape[-1] == width:
        return qkv
    if qkv.dim() in (3, 4) and qkv.shape[-2:] == (num_query_groups, width // num_query_groups):
        return qkv.flatten(-2)
    raise ValueError(
        f"{op}: qkv must be (s, b, {width}) or (t, {width}), or so with the last dimension divided into "
        f"({num_query_groups}, {width // num_query_groups}), for {num_heads} heads in {num_query_groups} groups and "
        f"head_dim {head_dim}; given {describe(qkv)}"
    )


def _angles(op: str, freqs: Tensor, interleaved: bool) -> Tensor:
    """One angle a pair, (positions, HALF), of Megatron's (positions, 1, 1, 2 · HALF), without a copy."""
    if freqs.dim() != 4 or freqs.shape[1:3] != (1, 1) or freqs.shape[3] % 2:
        raise ValueError(f"{op}: freqs must be (positions, 1, 1, 2 · HALF); given {describe(freqs)}")
    place, _, _, element = freqs.stride()
    step = 2 * element if interleaved else element
    return freqs.as_strided((freqs.shape[0], freqs.shape[3] // 2), (place, step))


def _check_writable(op: str, name: str, x: Tensor) -> None:
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} is a leaf that requires a gradient, which cannot be written in place")
    smallest, dense = 1, sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    for stride, size in dense:
        if stride < smallest:
            raise ValueError(f"{op}: elements of {name} share memory (strides {x.stride()}); call .contiguous() first")
        smallest = stride * size
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{op}: elements of a head must lie side by side in {name}; its strides are {x.stride()}")
