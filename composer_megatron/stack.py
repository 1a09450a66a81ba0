"""CompositeStack: Megatron-core's hybrid stack of blocks, each residual addition fused with the norm that follows it.

A block is ``residual + body(norm(residual))``. Megatron's layers add at their end, and the next one starts by reading
the sum again. Here a block hands on its output `delta` and its input `residual` unadded; the next norm, the final one
included, adds and normalises in one pass over memory:

    total = residual + delta          delta' = body(norm(total))          residual' = total

The numbers are those of the unfused stack, bit for bit in fp32, and so are parameters, their names and the checkpoint
layout, so checkpoints go both ways.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import WrappedTensor, deprecate_inference_params, log_single_rank, make_viewless_tensor
from torch import Tensor, nn

from composer_megatron.guards import check_schedule, check_tensor_parallelism, settle_joined_rope
from composer_megatron.layers.block import CompositeLayer, Inputs, Stream
from composer_megatron.layers.mamba import Mamba2Layer
from composer_megatron.layers.norm import RMSNorm

_LOGGER = logging.getLogger(__name__)


class CompositeStack(HybridStack):
    """The blocks of one pipeline stage and, on the last stage, the final norm.

    Attributes:
        unfused_because: Why residual additions are left to Megatron's own forward pass; None where they are fused.

    Differs from `HybridStack`, residual additions aside, where that one

    * builds TransformerEngine's norm as the final norm, whatever the spec says: here `final_norm` is a parameter;
    * hands on its very input when a stage has no blocks: Megatron's schedules free a stage's output after sending it,
      and with it the input that backward needs (gradients were silently wrong): here it is a copy;
    * draws the same dropout mask on all tensor-parallel ranks under sequence parallelism, where each rank holds another
      part of the sequence: here the ranks draw from their own generators;
    * cannot recompute norms without TransformerEngine.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *args: Any,
        final_norm: Callable[..., nn.Module],
        post_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        """Build the stage.

        Args:
            config: Megatron-core's configuration.
            submodules: The spec of each kind of block.
            args: As for `HybridStack`.
            final_norm: Builds the final norm, ``final_norm(config=, hidden_size=, eps=)``.
            post_layer_norm: Whether the last stage ends with the final norm.
            kwargs: As for `HybridStack`.
        """
        check_schedule(config)
        settle_joined_rope(config)
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        check_tensor_parallelism(self.layer_type_list, config)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.unfused_because = self._unfused_because()
        if self.unfused_because is not None:
            message = "residual additions are not fused with norms, because of %s"
            log_single_rank(_LOGGER, logging.WARNING, message, self.unfused_because)

    def _unfused_because(self) -> str | None:
        config = self.config
        quantised = bool(config.fp8 or config.fp4)
        reasons = {
            "CUDA graphs of single layers": config.cuda_graph_impl in ("local", "transformer_engine"),
            "activation offloading": config.fine_grained_activation_offloading,
            "flash decoding": config.flash_decode,
            "MLPs in chunks": config.mlp_chunks_for_prefill > 1 or config.mlp_chunks_for_training > 1,
            "Megatron's inference kernels": config.transformer_impl == "inference_optimized",
            "recomputation in fp8 or fp4": quantised and config.recompute_granularity is not None,
            "a layer or norm of another kind": not self._has_known_parts(),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _has_known_parts(self) -> bool:
        layers = all(isinstance(layer, CompositeLayer | Mamba2Layer) and layer.is_block() for layer in self.layers)
        return layers and isinstance(getattr(self, "final_norm", None), RMSNorm | None)

    def forward(
        self,
        hidden_states: Tensor | WrappedTensor,
        attention_mask: Tensor | None,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: Tensor | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks.

        Args:
            hidden_states: (s, b, h), with s the rank's share of the sequence under sequence and context parallelism;
                ignored on all stages but the first, which received theirs by `set_input_tensor`.
            attention_mask: As for `CoreAttention.forward`.
            inference_context: Caches and positions while generating.
            rotary_pos_emb: Angles.
            inference_params: Megatron's former name of `inference_context`.
            packed_seq_params: Where packed sequences end.
            padding_mask: True for padding, which mixtures of experts do not count; residual additions are then unfused.

        Returns:
            Hidden states of the same shape.
        """
        context = deprecate_inference_params(inference_context, inference_params)
        inputs = Inputs(attention_mask, context, rotary_pos_emb, packed_seq_params)
        with self._random_generator():
            if self.unfused_because is None and padding_mask is None:
                return self._forward_fused(hidden_states if self.pre_process else self.input_tensor, inputs)
            output = super().forward(
                hidden_states,
                attention_mask,
                context,
                rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                padding_mask=padding_mask,
            )
        return output if len(self.layers) else output.clone()

    def _random_generator(self) -> AbstractContextManager[None]:
        return get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext()

    def _forward_fused(self, hidden_states: Tensor | WrappedTensor, inputs: Inputs) -> Tensor:
        hidden_states = hidden_states.unwrap() if isinstance(hidden_states, WrappedTensor) else hidden_states
        stream = Stream(hidden_states.float() if self.config.fp32_residual_connection else hidden_states)
        delayed = self.config.fp8 and self.config.fp8_recipe == Fp8Recipe.delayed
        with get_fp8_context(self.config) if delayed else nullcontext():
            for layers, recompute in self._spans():
                run = self._recompute if recompute else _run
                stream = run(layers, stream, inputs)
        if not (self.post_process and self.post_layer_norm):
            output = stream.added()  # the next stage receives one tensor
            output = output if len(self.layers) else output.clone()
        elif stream.delta is None:
            output = self.final_norm(stream.residual)
        else:
            output, _ = self.final_norm(stream.delta, stream.residual)
        return make_viewless_tensor(inp=output, requires_grad=output.requires_grad, keep_graph=True)

    def _spans(self) -> Iterator[tuple[Sequence[nn.Module], bool]]:
        """Neighbouring layers, and whether backward recomputes them from their input, as Megatron's methods say."""
        layers, config = list(self.layers), self.config
        if config.recompute_granularity != "full" or not self.training:
            yield layers, False
        elif config.recompute_method == "uniform":
            size = config.recompute_num_layers
            yield from ((layers[start : start + size], True) for start in range(0, len(layers), size))
        else:
            yield from (([layer], True) for layer in layers[: config.recompute_num_layers])
            yield layers[config.recompute_num_layers :], False

    def _recompute(self, layers: Sequence[nn.Module], stream: Stream, inputs: Inputs) -> Stream:
        """Run layers of which only the input is kept: one tensor, so sums are made before and after."""

        def run(x: Tensor) -> Tensor:
            return _run(layers, Stream(x), inputs).added()

        return Stream(tensor_parallel.checkpoint(run, self.config.distribute_saved_activations, stream.added()))


def _run(layers: Sequence[nn.Module], stream: Stream, inputs: Inputs) -> Stream:
    for layer in layers:
        stream = layer(stream=stream, inputs=inputs)
    return stream
