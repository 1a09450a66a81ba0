"""CompositeLayer: one block, which can leave its residual addition to the norm of the block after it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from composer_megatron.layers.norm import RMSNorm


class Stream(NamedTuple):
    """The residual stream between two blocks.

    Attributes:
        residual: The stream before the last block, (s, b, h).
        delta: What the last block adds to it; None before the first block and where it has been added.
    """

    residual: Tensor
    delta: Tensor | None = None

    def added(self) -> Tensor:
        """The stream after the last block, in the type of the stream."""
        return self.residual if self.delta is None else self.residual + self.delta.to(self.residual.dtype)


@dataclass(frozen=True)
class Inputs:
    """What every block of a pass sees beside the stream; see `CompositeStack.forward`."""

    attention_mask: Tensor | None
    inference_context: BaseInferenceContext | None
    rotary_pos_emb: Tensor | None
    packed_seq_params: PackedSeqParams | None


@contextmanager
def _apart(config: TransformerConfig) -> Iterator[None]:
    """Have query, key and value turned one after the other, as generation and packed sequences want it."""
    joined = config.fused_single_qkv_rope
    config.fused_single_qkv_rope = False
    try:
        yield
    finally:
        config.fused_single_qkv_rope = joined


class CompositeLayer(TransformerLayer):
    """Megatron's layer with one norm and one body, attention or an MLP.

    Called as Megatron calls it, with hidden states, it is that. Called with a stream, as `CompositeStack` does, it
    returns one: its output not yet added. Either way it is a call of this module, so that hooks on it run.
    """

    def is_block(self) -> bool:
        """Whether the layer is a norm, a body and an addition, all of kinds that `forward` knows."""
        attention = (self.input_layernorm, self.self_attention, self.self_attn_bda)
        mlp = (self.pre_mlp_layernorm, self.mlp, self.mlp_bda)
        (norm, body, add), (_, other, _) = (attention, mlp) if self._is_attention() else (mlp, attention)
        lone_body = isinstance(other, IdentityOp) and isinstance(self.cross_attention, IdentityOp)
        known = isinstance(norm, RMSNorm) and not isinstance(body, IdentityOp)
        return lone_body and known and add is get_bias_dropout_add

    def _is_attention(self) -> bool:
        return isinstance(self.mlp, IdentityOp)

    def forward(self, *args: Any, stream: Stream | None = None, inputs: Inputs | None = None, **kwargs: Any) -> Any:
        """Run the block.

        Args:
            args: As for `TransformerLayer`, where there is no stream.
            stream: The stream before this block.
            inputs: With the stream, the rest.
            kwargs: As for `TransformerLayer`, where there is no stream.

        Returns:
            The stream after this block; without one what `TransformerLayer` returns.
        """
        if stream is None or inputs is None:
            names = ("inference_context", "inference_params", "packed_seq_params")
            apart = kwargs.get("rotary_pos_emb") is None or any(kwargs.get(name) is not None for name in names)
            with _apart(self.config) if apart else nullcontext():
                return super().forward(*args, **kwargs)
        apart = inputs.rotary_pos_emb is None or inputs.inference_context is not None
        with (
            self.get_inner_quantization_context(),
            _apart(self.config) if apart or inputs.packed_seq_params is not None else nullcontext(),
        ):
            return self._extend(stream, inputs)

    def _extend(self, stream: Stream, inputs: Inputs) -> Stream:
        norm, checkpoint = (self.input_layernorm if self._is_attention() else self.pre_mlp_layernorm), None
        residual = stream.residual
        if self.recompute_input_layernorm or self.recompute_pre_mlp_layernorm:
            # The norm's output is freed after the body and made again in backward, from the sum, which stays.
            residual = stream.added()
            checkpoint = tensor_parallel.CheckpointWithoutOutput()
            checkpoint.fp8 = False  # Megatron's default means "with TransformerEngine's fp8"
            x = checkpoint.checkpoint(norm, residual)
        elif stream.delta is None:
            x = norm(residual)
        else:
            x, residual = norm(stream.delta, residual)
        delta, bias = self._attend(x, inputs) if self._is_attention() else self._transform(x)
        if checkpoint is not None:
            checkpoint.discard_output_and_register_recompute(delta)
        if bias is not None:
            delta = delta + bias
        return Stream(residual, F.dropout(delta, self.hidden_dropout, self.training))

    def _attend(self, x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        return self.self_attention(
            x,
            attention_mask=inputs.attention_mask,
            inference_context=inputs.inference_context,
            rotary_pos_emb=inputs.rotary_pos_emb,
            packed_seq_params=inputs.packed_seq_params,
        )

    def _transform(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return tensor_parallel.checkpoint(self.mlp, False, x) if self.recompute_mlp else self.mlp(x)
