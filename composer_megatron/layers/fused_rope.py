"""Which functions Megatron-core applies the rotary embedding with where its configuration asks for fused ones.

Under ``apply_rope_fusion`` queries and keys are taken apart and turned one after the other; under
``fused_single_qkv_rope`` one function takes them with the values as the projection left them, so that nothing is split
forward and nothing concatenated backward.
"""

import importlib

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import attention
from torch import Tensor

from composer_kernels.rope import (
    apply_fused_qkv_rotary_pos_emb,
    fused_apply_rotary_pos_emb,
    fused_apply_rotary_pos_emb_thd,
)


def install() -> None:
    """Let it mean `composer_kernels.rope`, which needs no TransformerEngine."""
    rope_utils.fused_apply_rotary_pos_emb = _apply
    rope_utils.fused_apply_rotary_pos_emb_thd = _apply_to_packed
    attention.apply_fused_qkv_rotary_pos_emb = _apply_to_joined
    attention.HAVE_FUSED_QKV_ROPE = True


def install_transformer_engine() -> None:
    """Let it mean TransformerEngine's functions, as Megatron-core has it."""
    from megatron.core.extensions import transformer_engine

    rope_utils.fused_apply_rotary_pos_emb = transformer_engine.fused_apply_rotary_pos_emb
    rope_utils.fused_apply_rotary_pos_emb_thd = transformer_engine.fused_apply_rotary_pos_emb_thd
    rope = importlib.import_module("transformer_engine.pytorch.attention.rope")
    attention.apply_fused_qkv_rotary_pos_emb = getattr(rope, "apply_fused_qkv_rotary_pos_emb", None)
    attention.HAVE_FUSED_QKV_ROPE = attention.apply_fused_qkv_rotary_pos_emb is not None


def _apply(t: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    return fused_apply_rotary_pos_emb(t, _as_wide(angles, t), interleaved=interleaved)


def _apply_to_packed(
    t: Tensor, boundaries: Tensor, angles: Tensor, cp_size: int = 1, cp_rank: int = 0, interleaved: bool = False
) -> Tensor:
    angles = _as_wide(angles, t)
    return fused_apply_rotary_pos_emb_thd(t, boundaries, angles, cp_size, cp_rank, interleaved=interleaved)


def _apply_to_joined(
    qkv: Tensor, q_angles: Tensor, k_angles: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    angles = _as_wide(q_angles, qkv)
    same = angles if k_angles is q_angles else k_angles
    return apply_fused_qkv_rotary_pos_emb(qkv, angles, same, sizes)


def _as_wide(angles: Tensor, t: Tensor) -> Tensor:
    """Megatron's angles are in fp32, which the kernels take for all heads but those in float64."""
    return angles.to(torch.promote_types(angles.dtype, t.dtype))
