"""Which functions Megatron-core applies the rotary embedding with where ``apply_rope_fusion`` is set."""

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from composer_kernels.rope import fused_apply_rotary_pos_emb, fused_apply_rotary_pos_emb_thd


def install() -> None:
    """Let it mean `composer_kernels.rope`, which needs no TransformerEngine."""
    rope_utils.fused_apply_rotary_pos_emb = _apply
    rope_utils.fused_apply_rotary_pos_emb_thd = _apply_to_packed


def install_transformer_engine() -> None:
    """Let it mean TransformerEngine's functions, as Megatron-core has it."""
    from megatron.core.extensions import transformer_engine

    rope_utils.fused_apply_rotary_pos_emb = transformer_engine.fused_apply_rotary_pos_emb
    rope_utils.fused_apply_rotary_pos_emb_thd = transformer_engine.fused_apply_rotary_pos_emb_thd


def _apply(t: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    return fused_apply_rotary_pos_emb(t, _as_wide(angles, t), interleaved=interleaved)


def _apply_to_packed(
    t: Tensor, boundaries: Tensor, angles: Tensor, cp_size: int = 1, cp_rank: int = 0, interleaved: bool = False
) -> Tensor:
    angles = _as_wide(angles, t)
    return fused_apply_rotary_pos_emb_thd(t, boundaries, angles, cp_size, cp_rank, interleaved=interleaved)


def _as_wide(angles: Tensor, t: Tensor) -> Tensor:
    """Megatron's angles are in fp32, which the kernels take for all heads but those in float64."""
    return angles.to(torch.promote_types(angles.dtype, t.dtype))
