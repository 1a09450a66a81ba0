"""The model: Megatron-core's hybrid model with the loss of a backend, in a training run and outside.

`build_model` builds one outside a training run: to generate, to evaluate, to export, to count.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.backend import Backend, Loss, get_backend
from composer_megatron.block_config import block_fields
from composer_megatron.errors import UsageError
from composer_megatron.initialization import initialize_weights
from composer_megatron.pattern import STAGE_SEPARATOR, hybrid_pattern
from composer_megatron.rotary import inverse_frequencies
from composer_megatron.specs import stack_spec

__all__ = [
    "CompositeModel",
    "architecture_fields",
    "build_model",
    "end_single_process",
    "initialize_single_process",
    "initialize_weights",
    "transformer_config",
]


class CompositeModel(HybridModel):
    """Megatron-core's hybrid model, whose loss a backend computes and whose rotary embeddings can be scaled.

    Parameters and their names stay as they are.
    """

    def __init__(
        self,
        *args: Any,
        loss: Loss = "megatron",
        embedding_rows: bool = False,
        rope_scaling_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Build one stage.

        Args:
            args: As for `HybridModel`.
            loss: How labels become losses: as Megatron does it, or with `composer_kernels` from logits, or straight
                from hidden states without logits in memory.
            embedding_rows: Whether the embedding adds its gradient to Megatron's buffer row by row
                (`composer_megatron.layers.embedding`).
            rope_scaling_factor: As in `Shape`; `HybridModel` has no scaling, though Megatron-core's GPTModel has.
            kwargs: As for `HybridModel`, with a ``rotary_base``.
        """
        super().__init__(*args, **kwargs)
        self.loss = loss
        if rope_scaling_factor != 1:
            self._scale_rotary_embeddings(kwargs["rotary_base"], rope_scaling_factor)
        if embedding_rows and self.pre_process:
            from composer_megatron.layers.embedding import accumulate

            accumulate(self.embedding.word_embeddings, self.config)
        if loss == "linear_cross_entropy" and self._loss_skips_logits():
            from composer_megatron.layers.loss import LossOutputLayer

            # `HybridModel` names the class of its output layer; this one has the same parameters and can do more.
            self.output_layer.__class__ = LossOutputLayer

    def _scale_rotary_embeddings(self, theta: float, factor: float) -> None:
        """Scale that of the model, or those of latent attention's layers, which have their own."""
        for module in self.modules():
            if isinstance(module, RotaryEmbedding):
                plain = module.inv_freq
                module.inv_freq = inverse_frequencies(2 * len(plain), theta, factor).to(plain.device)

    def _loss_skips_logits(self) -> bool:
        """Whether hidden states can become losses: not where something else wants the logits."""
        config = self.config
        wanted = self.mtp_process or config.use_mup or config.defer_embedding_wgrad_compute
        return self.post_process and not wanted and not config.fine_grained_activation_offloading

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run the stage.

        Args:
            args: As for `HybridModel`: tokens and positions (b, s), attention mask.
            labels: (b, s), for losses; None for logits.
            kwargs: As for `HybridModel`.

        Returns:
            Hidden states (s, b, h) from all stages but the last; there logits (b, s, v), or each token's loss (b, s).
        """
        if labels is None or self.loss != "linear_cross_entropy" or not self._loss_skips_logits():
            return super().forward(*args, labels=labels, **kwargs)
        self.post_process = False  # so that `HybridModel.forward` ends with the hidden states
        try:
            hidden_states = super().forward(*args, **kwargs)
        finally:
            self.post_process = True
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        losses, _ = self.output_layer(hidden_states, weight=weight, labels=labels)
        return losses

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The loss of each token.

        Args:
            labels: (b, s).
            logits: (s, b, v), the rank's part of the vocabulary; with `composer_kernels` backward overwrites them.

        Returns:
            (b, s).
        """
        if self.loss == "megatron":
            return super().compute_language_model_loss(labels, logits)
        from composer_megatron.layers.loss import loss_of_logits

        return loss_of_logits(logits, labels, self.output_layer)


def build_model(
    architecture: Architecture,
    *,
    max_sequence_length: int,
    dtype: torch.dtype = torch.float32,
    pattern: str | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    backend: str | None = None,
    parts: Mapping[str, str] = MappingProxyType({}),
    seed: int = 1234,
    meta: bool = False,
    draw_weights: bool = True,
) -> CompositeModel:
    """Build the model of an architecture, on the GPU where there is one, with freshly drawn weights.

    Starts a group of this one process where `torch.distributed` has not been started. The vocabulary is not padded:
    the model has exactly `Architecture.params_total` parameters.

    Args:
        architecture: Sequence and shape.
        max_sequence_length: Longest sequence that the model is to take.
        dtype: Type of the parameters.
        pattern: Hybrid layer pattern, where it is to be cut into pipeline stages; None for one stage.
        pre_process: Whether this stage has the embedding.
        post_process: Whether this stage has the final norm and the output layer.
        backend: A name in `composer_megatron.backend.BACKENDS`; None for that of the machine.
        parts: Parts that other backends play; see `get_backend`.
        seed: Decides the weights; see `initialize_weights`.
        meta: Build on the meta device: no memory, no values, right shapes and counts.
        draw_weights: Whether to draw them; where not, they hold anything, until the caller loads some.

    Returns:
        ``model(tokens, position_ids, attention_mask)`` gives logits (batch, sequence, vocabulary), and with
        ``labels=`` the loss of each token (batch, sequence); the mask may be None.

    Raises:
        UsageError: If the pattern's blocks are not the architecture's, the tensor-parallel size does not fit, or
            TransformerEngine is to build on the meta device.
        ComposerError: If the backend needs a package that is missing.
    """
    initialize_single_process()
    whole = hybrid_pattern(architecture.sequence)
    if pattern is not None and pattern.replace(STAGE_SEPARATOR, "") != whole:
        raise UsageError(
            f"pattern {pattern!r} is not {architecture.sequence}; expected {whole!r} with {STAGE_SEPARATOR!r}"
        )
    players = get_backend(backend, parts)
    if meta and players.quantises():
        raise UsageError(
            f"backend {players.name} cannot build on the meta device, which TransformerEngine's projections do not "
            "support; backend local has the same parameters"
        )
    shape = architecture.shape
    with torch.device("meta") if meta else nullcontext():
        model = CompositeModel(
            loss=players.loss.use,
            embedding_rows=players.embedding.use,
            config=transformer_config(architecture, dtype=dtype, backend=players, on_cpu=meta or not cpu.has_gpu()),
            hybrid_stack_spec=stack_spec(players),
            vocab_size=shape.vocab_size,
            max_sequence_length=max_sequence_length,
            hybrid_layer_pattern=whole if pattern is None else pattern,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            rope_scaling_factor=shape.rope_scaling_factor,
        )
    if meta:
        return model
    if cpu.has_gpu():
        model.cuda()  # Megatron makes its matrices there; the norms are made on the CPU
    if draw_weights:
        initialize_weights(model, seed)
    return model


def architecture_fields(architecture: Architecture) -> dict[str, Any]:
    """The fields of Megatron-core's configuration that an architecture decides, in any pipeline."""
    shape = architecture.shape
    return {
        "num_layers": len(architecture.sequence),
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "is_hybrid_model": True,  # one residual addition in a layer, not two: scales the initial output projections
    } | block_fields(architecture)


def transformer_config(
    architecture: Architecture, *, dtype: torch.dtype, backend: Backend, on_cpu: bool, **changes: Any
) -> TransformerConfig:
    """Megatron-core's configuration of an architecture, for the parallel sizes that this process runs under.

    Gradient accumulation fusion stays off: it needs the buffers of Megatron's distributed data parallelism.

    Args:
        architecture: Sequence and shape.
        dtype: Type of the parameters.
        backend: Plays the parts; puts functions where Megatron looks for what the configuration asks for.
        on_cpu: Whether to make parameters on the CPU.
        changes: Further fields of the configuration, or others than those made here.
    """
    fields = {
        "gradient_accumulation_fusion": False,
        "use_te_activation_func": backend.activation.use is not None,
        "apply_rope_fusion": backend.rope.use.on,
        "fused_single_qkv_rope": backend.rope.use.joined,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": architecture.shape.init_std,
        "perform_initialization": False,  # `initialize_weights` does it
        "use_cpu_initialization": on_cpu,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }
    fields |= architecture_fields(architecture)
    latent = "multi_latent_attention" in fields
    if latent:
        # Megatron fuses it for another rotary embedding alone
        fields["apply_rope_fusion"] = fields["fused_single_qkv_rope"] = False
    fields |= changes
    if fields["apply_rope_fusion"]:
        backend.rope.use.install()
    if fields["gradient_accumulation_fusion"]:
        backend.gradient_accumulation.use.install()
    return (MLATransformerConfig if latent else TransformerConfig)(**fields)


def initialize_single_process() -> None:
    """Make this process a group of one, where no group was started; needs no network and no environment variables."""
    cpu.prepare_model()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="cpu:gloo,cuda:nccl" if cpu.has_gpu() else "gloo",
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
        )
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()


def end_single_process() -> None:
    """End the group of one that `initialize_single_process` started."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
