"""`composer_megatron.layers.attention.CoreAttention` by `composer_kernels`."""

from typing import cast

import torch
from torch import Tensor

from composer_kernels.attention import attention, choose_attention
from composer_megatron import cpu
from composer_megatron.layers.attention import CoreAttention, sdpa
from composer_megatron.layers.context_parallel import Packing
from composer_megatron.shape import Shape


class FusedCoreAttention(CoreAttention):
    """`CoreAttention` by the best kernel that is installed and fits: FlashAttention, cuDNN, PyTorch's or our own."""

    @staticmethod
    def kernel(shape: Shape, dtype: torch.dtype) -> str:
        """The name of the kernel that trains a model of that shape on this machine."""
        device = "cuda" if cpu.has_gpu() else "cpu"
        query, key = (
            torch.empty(1, 2, heads, shape.head_dim, dtype=dtype, device=device, requires_grad=True)
            for heads in (shape.num_attention_heads, shape.num_query_groups)
        )
        return choose_attention(query, key, key).name

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As `CoreAttention.attend`; a mask in memory is PyTorch's business, and so are values of another width.

        Megatron's tensors lie as (s, b, heads, d), kernels give (b, s, heads, d), and the output would be copied twice,
        forward and backward. One sequence with the heads of all lies alike in both, and a query head finds its group:
        sequence i's head j is head i · heads + j, and its group i · groups + j // (heads / groups).
        """
        if mask is not None or key.shape[-1] != value.shape[-1]:
            return sdpa(query, key, value, mask, self.window, self.scale)
        batch, length, *head = query.shape
        sequence_first = all(x.stride(0) == x.shape[2] * x.stride(2) for x in (query, key, value))
        if batch == 1 or not sequence_first:
            return cast(Tensor, attention(query, key, value, window=self.window, scale=self.scale))
        joined = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
        output = cast(Tensor, attention(*joined, window=self.window, scale=self.scale))
        return output.view(length, batch, *head).transpose(0, 1)

    def attend_to_packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        """As `CoreAttention.attend_to_packed`."""
        output = attention(
            query,
            key,
            value,
            window=self.window,
            scale=self.scale,
            cu_seqlens_q=packing.queries,
            cu_seqlens_k=packing.keys,
            max_seqlen_q=packing.most_queries,
            max_seqlen_k=packing.most_keys,
        )
        return cast(Tensor, output)
