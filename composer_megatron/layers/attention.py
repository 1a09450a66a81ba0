"""Causal grouped-query attention in Megatron-core's core-attention interface.

`CoreAttention` knows Megatron's layouts, packed sequences and context parallelism; how attention proper is computed,
its two heirs say: `SDPACoreAttention` by PyTorch, `FusedCoreAttention` by `composer_kernels`.
"""

import itertools
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from composer_megatron.errors import UsageError
from composer_megatron.layers.context_parallel import (
    Packing,
    document_chunk,
    gather,
    in_order,
    packed_prefixes,
    prefixes,
)
from composer_megatron.layers.rope import prepare_context_parallelism


class CoreAttention(MegatronModule, ABC):
    """softmax(q kᵀ · scale) v, where each query sees the keys up to its own position.

    Queries are the last ones of the keys' sequence: with a decoding cache there are fewer queries than keys, and query
    i of sq sees the first sk - sq + i + 1 keys, or of those its own and the `window` ones before it.

    Attributes:
        scale: Of the scores; None for 1 / sqrt(d).
        window: How many keys before its own a query sees; None for all.
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
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        """Build the layer.

        Args:
            config: Megatron-core's configuration.
            layer_number: Counted from 1; decides with ``config.window_attn_skip_freq`` whether there is a window.
            attn_mask_type: Must be causal.
            attention_type: Must be "self".
            attention_dropout: Must be 0, here or in the configuration.
            softmax_scale: See `scale`.
            cp_comm_type: How ranks of the context-parallel group exchange keys and values: "all_gather", or "p2p",
                which is Megatron's default and gives the same result.
            pg_collection: Has the context-parallel group; None for Megatron's own.
            k_channels: Width of a key's head, which latent attention gives; unused, as is the next.
            v_channels: Width of a value's head.

        Raises:
            UsageError: If the configuration asks for what this attention cannot do.
        """
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise UsageError(f"attention_dropout={dropout} is not supported by this attention; set it to 0")
        if attention_type != "self" or attn_mask_type is not AttnMaskType.causal:
            asked = f"attention_type={attention_type!r}, attn_mask_type={attn_mask_type.name}"
            raise UsageError(f"{asked}: this attention is causal self-attention")
        if config.context_parallel_size > 1:
            if cp_comm_type not in (None, "p2p", "all_gather"):
                raise UsageError(f"cp_comm_type={cp_comm_type!r} is not supported by this attention; use 'all_gather'")
            prepare_context_parallelism()
        self.scale = softmax_scale
        self.window = _window(config, layer_number)
        self.cp_group = None
        if config.context_parallel_size > 1:
            self.cp_group = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp

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
            query: (sq, b, heads, d), rotary embedding applied; packed sequences (t, heads, d). Under context
                parallelism the rank's share of the tokens.
            key: (sk, b, groups, d), rotary embedding applied; `groups` divides `heads`, sk is at least sq.
            value: (sk, b, groups, d).
            attention_mask: True where a query must *not* see a key, broadcastable to (b, heads, sq, sk), on top of
                causality; None for causality alone. With packed sequences or context parallelism it must be None.
            attn_mask_type: Ignored: Megatron says `no_mask` while decoding, where the newest query sees every key
                anyway, and `causal` otherwise.
            attention_bias: Must be None.
            packed_seq_params: Where each packed sequence ends in the whole batch; with its padding, if any, every token
                belongs to one. Under context parallelism also in the format "bshd": where documents end in the rows
                of the batch, laid end to end.

        Returns:
            (sq, b, heads · d); for packed sequences (t, heads · d).

        Raises:
            UsageError: For what this attention cannot do.
        """
        if attention_bias is not None:
            raise UsageError("attention_bias is not supported by this attention; leave it out")
        if attention_mask is not None and (self.cp_group is not None or packed_seq_params is not None):
            raise UsageError(
                "an attention mask in memory goes with neither packed sequences nor context parallelism; pass "
                "--no-create-attention-mask-in-dataloader"
            )
        if packed_seq_params is not None and packed_seq_params.qkv_format == "bshd" and self.cp_group is not None:
            return self._attend_to_documents(query, key, value, packed_seq_params.cu_seqlens_q).flatten(-2)
        if packed_seq_params is not None:
            return self._attend_to_packed(query, key, value, packed_seq_params).flatten(-2)
        if self.cp_group is None:
            return self._batch_first(query, key, value, attention_mask).flatten(-2)
        rank, ranks = self.cp_group.rank(), self.cp_group.size()
        widths = key.shape[-1], value.shape[-1]
        keys, values = in_order(gather(key, value, self.cp_group), ranks).split(widths, -1)
        outputs = []
        for chunk, share in zip(query.chunk(2), prefixes(rank, ranks), strict=True):
            seen = round(share * len(keys))
            outputs.append(self._batch_first(chunk, keys[:seen], values[:seen], None))
        return torch.cat(outputs).flatten(-2)

    def _attend_to_documents(self, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor) -> Tensor:
        """Attend within documents that end anywhere in the rows, under context parallelism."""
        assert self.cp_group is not None
        rank, ranks, widths = self.cp_group.rank(), self.cp_group.size(), (key.shape[-1], value.shape[-1])
        keys, values = in_order(gather(key, value, self.cp_group), ranks).split(widths, -1)
        outputs = []
        for chunk, place in zip(query.chunk(2), (rank, 2 * ranks - 1 - rank), strict=True):
            size, seen = len(chunk), len(chunk) * (place + 1)
            packing = document_chunk(boundaries, len(keys), size * place, size)
            q, k, v = (rows.transpose(0, 1).flatten(0, 1) for rows in (chunk, keys[:seen], values[:seen]))
            outputs.append(self.attend_to_packed(q, k, v, packing).unflatten(0, (-1, size)).transpose(0, 1))
        return torch.cat(outputs)

    def _batch_first(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = self.attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), mask)
        return output.transpose(0, 1)

    def _attend_to_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        ranks = 1 if self.cp_group is None else self.cp_group.size()
        if packed.qkv_format != "thd" or packed.local_cp_size not in (None, ranks):
            asked = f"qkv_format={packed.qkv_format!r}, local_cp_size={packed.local_cp_size}"
            raise UsageError(f"packed sequences with {asked}: expected 'thd' and {ranks}")
        # Padding stands behind each sequence, where no query of the sequence sees it.
        queries = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        keys = packed.cu_seqlens_kv if packed.cu_seqlens_kv_padded is None else packed.cu_seqlens_kv_padded
        if self.cp_group is None:
            packing = Packing(queries, keys, packed.max_seqlen_q, packed.max_seqlen_kv)
            return self.attend_to_packed(query, key, value, packing)
        packing, places = packed_prefixes(queries, packed.max_seqlen_q, len(query), self.cp_group.rank(), ranks)
        seen = gather(key, value, self.cp_group).index_select(0, places)
        keys_seen, values_seen = seen.split((key.shape[-1], value.shape[-1]), -1)
        return self.attend_to_packed(query, keys_seen, values_seen, packing)

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend in a batch of equally long sequences.

        Args:
            query: (b, sq, heads, d), of any strides.
            key: (b, sk, groups, d).
            value: (b, sk, groups, d).
            mask: As for `forward`.

        Returns:
            (b, sq, heads, d).
        """

    @abstractmethod
    def attend_to_packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        """Attend within each packed sequence.

        Args:
            query: (tq, heads, d).
            key: (tk, groups, d).
            value: (tk, groups, d).
            packing: Where the sequences end.

        Returns:
            (tq, heads, d).
        """


def _window(config: TransformerConfig, layer_number: int) -> int | None:
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    left, right = config.window_size
    if left < 0 or right > 0:
        raise UsageError(f"window_size={config.window_size}: expected (keys before a query's own, 0)")
    return int(left)


class SDPACoreAttention(CoreAttention):
    """`CoreAttention` by PyTorch's scaled dot-product attention.

    It picks flash attention on a GPU and a blocked kernel on a CPU; neither repeats the key and value heads in memory.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As `CoreAttention.attend`."""
        return sdpa(query, key, value, mask, self.window, self.scale)

    def attend_to_packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        """As `CoreAttention.attend_to_packed`, one sequence after the other."""
        outputs = []
        queries, keys = packing.queries.tolist(), packing.keys.tolist()
        if (queries[-1], keys[-1]) != (len(query), len(key)):
            ends, tokens = f"{queries[-1]} and {keys[-1]}", f"{len(query)} queries and {len(key)} keys"
            raise UsageError(f"packed sequences end at {ends}, of {tokens}: give the rest to one as its padding")
        for (start, end), (first, last) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
            if start == end:
                continue
            outputs.append(self.attend(query[None, start:end], key[None, first:last], value[None, first:last], None)[0])
        return torch.cat(outputs)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None, scale: float | None
) -> Tensor:
    """`CoreAttention.attend` by `torch.nn.functional.scaled_dot_product_attention`."""
    queries, keys = query.shape[1], key.shape[1]
    # One query sees all keys: no mask. A mask in memory keeps flash attention out, so none is made where
    # `is_causal` says it all.
    windowed = window is not None and window + 1 < keys
    seen = None if mask is None else ~mask
    if windowed or (queries > 1 and (mask is not None or queries != keys)):
        past = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if window is not None:
            past = past.triu(keys - queries - window)
        seen = past if seen is None else seen & past
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=seen,
        is_causal=seen is None and queries > 1,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)
