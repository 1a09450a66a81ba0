"""Latent attention as Megatron-core computes it, with a norm on each latent vector, as in DeepSeek-V2."""

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention, with two differences.

    * Its projections and norms are those of the spec. Megatron's own choice depends on its configuration, and puts a
      norm before queries that are made of the hidden states, which the block has normed already.
    * Under tensor parallelism the rotary key, which the heads of all ranks share, gets all of their gradients.
      Megatron, where the projection to it is split over the ranks, leaves each with that of its own: wrong, in silence.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, object]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What queries are made of, and the latent vector of keys and values beside the rotary key, both whole.

        Args:
            hidden_states: (s, b, h), the rank's share of the sequence under sequence parallelism.

        Returns:
            (s, b, h) or (s, b, q_rank), and (s, b, kv_rank + rope_dim), shares likewise.
        """
        queries, latent = super()._qkv_down_projection(hidden_states)
        widths = (self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim)
        if latent.shape[-1] == sum(widths):
            return queries, latent
        latent = gather_from_tensor_model_parallel_region(latent)
        if self.config.sequence_parallel:
            # Megatron gathers the rotary key along the sequence again, and backward that sums over the ranks.
            return queries, scatter_to_sequence_parallel_region(latent)
        compressed, rotary = latent.split(widths, -1)
        return queries, torch.cat([compressed, copy_to_tensor_model_parallel_region(rotary)], -1)
