"""The embedding's gradient added straight to Megatron's gradient buffer, row by row.

Megatron's embedding makes a gradient of the whole matrix, nearly all zeros, in the type of the weight; where the output
layer shares the weight, it adds it to another one of zeros, and the sum to the buffer. For 128,256 tokens of width 2048
that moves about 5 GB a micro-batch. Only the rows of the tokens that occurred matter: here they alone are added, in
fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from composer_megatron.layers.wgrad import main_grad


class AccumulatingEmbedding(VocabParallelEmbedding):
    """Megatron's embedding, whose backward pass adds to the gradient buffer where there is one.

    Not with tensor parallelism, where tokens are masked, nor where equal bits are asked for: rows are added by atomics.
    """

    def forward(self, input_: Tensor) -> Tensor:
        """As `VocabParallelEmbedding.forward`: token ids (b, s) to (b, s, h), or (s, b, h) where it scatters."""
        buffer = self._buffer()
        if buffer is None:
            return super().forward(input_)
        shared = hasattr(self.weight, "zero_out_wgrad")
        if shared:  # the output layer's gradient is no addend any more, and need not be zeros
            self.weight.zero_out_wgrad = False
        return _Lookup.apply(input_, self.weight, buffer, shared)

    def _buffer(self) -> Tensor | None:
        plain = self.tp_group.size() == 1 and self.gtp_remat_size == 1 and not self.reduce_scatter_embeddings
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if not plain or not trains or self.deterministic_mode or torch.are_deterministic_algorithms_enabled():
            return None
        return main_grad(self.weight, self.accumulation_config)

    accumulation_config: TransformerConfig
    """Set by `accumulate`; the class of a layer is changed after it was built."""


def accumulate(embedding: VocabParallelEmbedding, config: TransformerConfig) -> None:
    """Have an embedding that was built add to the gradient buffer."""
    embedding.__class__ = AccumulatingEmbedding
    embedding.accumulation_config = config


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, buffer: Tensor, shared: bool) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.buffer, ctx.shared = buffer, shared
        # Megatron wants (s, b, h) next: looked up in that order, it need not be copied.
        return F.embedding(tokens.transpose(0, 1), weight).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        rows = gradients[0].transpose(0, 1).reshape(-1, weight.shape[1]).to(ctx.buffer.dtype)
        ctx.buffer.index_add_(0, tokens.transpose(0, 1).reshape(-1), rows)
        if hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            if not ctx.shared:  # Megatron's hooks want to see a gradient, and drop it
                return None, torch.empty_like(weight), None, None
        return None, None, None, None
