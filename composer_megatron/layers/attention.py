"""Causal grouped-query attention in Megatron-core's core-attention interface, by PyTorch's SDPA.

SDPA picks flash attention on a GPU and a blocked kernel on a CPU; neither repeats the key and value heads in memory.
"""

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from composer_megatron.errors import UsageError


class SDPACoreAttention(MegatronModule):
    """softmax(q kᵀ · scale) v, where each query sees the keys up to its own position.

    Queries are the last ones of the keys' sequence: with a decoding cache there are fewer queries than keys, and query
    i of sq sees the first sk - sq + i + 1 keys.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Build the layer; `layer_number`, `cp_comm_type` and `pg_collection` are Megatron's and not needed here.

        Raises:
            UsageError: If the configuration asks for what SDPA cannot do.
        """
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise UsageError(f"attention_dropout={dropout} is not supported by this attention; set it to 0")
        if config.context_parallel_size > 1:
            size = config.context_parallel_size
            raise UsageError(f"context_parallel_size={size} is not supported by this attention; set it to 1")
        if attention_type != "self" or attn_mask_type is not AttnMaskType.causal:
            asked = f"attention_type={attention_type!r}, attn_mask_type={attn_mask_type.name}"
            raise UsageError(f"{asked}: this attention is causal self-attention")
        if config.window_size is not None:
            raise UsageError(f"window_size={config.window_size} is not supported by this attention")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (sq, b, heads, d), rotary embedding applied.
            key: (sk, b, groups, d), rotary embedding applied; `groups` divides `heads`, sk is at least sq.
            value: (sk, b, groups, d).
            attention_mask: True where a query must *not* see a key, broadcastable to (b, heads, sq, sk), on top of
                causality; None for causality alone.
            attn_mask_type: Ignored: Megatron says `no_mask` while decoding, where the newest query sees every key
                anyway, and `causal` otherwise.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Returns:
            (sq, b, heads · d).

        Raises:
            UsageError: For a bias or packed sequences.
        """
        if packed_seq_params is not None:
            raise UsageError("packed sequences (packed_seq_params) are not supported by this attention; leave them out")
        if attention_bias is not None:
            raise UsageError("attention_bias is not supported by this attention; leave it out")
        queries, batch, heads, _ = query.shape
        keys, groups = key.shape[0], key.shape[2]
        # One query sees all keys: no mask. A mask in memory keeps flash attention out, so none is made where
        # `is_causal` says it all.
        mask = None if attention_mask is None else ~attention_mask
        if queries > 1 and (mask is not None or queries != keys):
            past = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
            mask = past if mask is None else mask & past
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and queries > 1,
            scale=self.softmax_scale,
            enable_gqa=heads != groups,
        )
        return output.permute(2, 0, 1, 3).reshape(queries, batch, -1)
