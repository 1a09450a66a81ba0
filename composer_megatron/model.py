"""The model: Megatron-core's hybrid model with the loss of a backend, in a training run and outside.

`build_model` builds one outside a training run: to generate, to evaluate, to export, to count. Here, too, is how
weights are first drawn, in a training run as well: each from the seed and the parameter's name alone, so that every
parallel layout starts from the same numbers.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.backend import Backend, Loss, get_backend
from composer_megatron.errors import UsageError
from composer_megatron.specs import STAGE_SEPARATOR, hybrid_pattern, stack_spec


class CompositeModel(HybridModel):
    """Megatron-core's hybrid model, whose loss a backend computes; parameters and their names stay as they are."""

    def __init__(self, *args: Any, loss: Loss = "megatron", **kwargs: Any) -> None:
        """Build one stage.

        Args:
            args: As for `HybridModel`.
            loss: How labels become losses: as Megatron does it, or with `composer_kernels` from logits, or straight
                from hidden states without logits in memory.
            kwargs: As for `HybridModel`.
        """
        super().__init__(*args, **kwargs)
        self.loss = loss
        if loss == "linear_cross_entropy" and self._loss_skips_logits():
            from composer_megatron.layers.loss import LossOutputLayer

            # `HybridModel` names the class of its output layer; this one has the same parameters and can do more.
            self.output_layer.__class__ = LossOutputLayer

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
        )
    if meta:
        return model
    if cpu.has_gpu():
        model.cuda()  # Megatron makes its matrices there; the norms are made on the CPU
    if draw_weights:
        initialize_weights(model, seed)
    return model


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
    shape = architecture.shape
    fields = {
        "num_layers": len(architecture.sequence),
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "gradient_accumulation_fusion": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "use_te_activation_func": backend.activation.use is not None,
        "apply_rope_fusion": backend.rope.use.on,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": shape.init_std,
        "is_hybrid_model": True,  # one residual addition in a layer, not two: scales the initial output projections
        "perform_initialization": False,  # `initialize_weights` does it
        "use_cpu_initialization": on_cpu,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
    }
    fields |= changes
    if fields["apply_rope_fusion"]:
        backend.rope.use.install()
    if fields["gradient_accumulation_fusion"]:
        backend.gradient_accumulation.use.install()
    return TransformerConfig(**fields)


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


def initialize_weights(model: HybridModel, seed: int) -> None:
    """Draw the weights of a model, or of one rank's part of it, by the configuration's initialisers.

    Each whole matrix is drawn from its own generator, seeded with `seed` and the parameter's name in the whole model,
    and cut to the rank's part. So the tensor- and pipeline-parallel layout changes no weight; the kind of device does.

    Raises:
        UsageError: If the model has a parameter for which there is no rule.
    """
    group = model.pg_collection.tp
    for local_name, parameter in model.named_parameters():
        name = _global_name(model, local_name)
        draw = _initializer(name, model.config)
        with torch.random.fork_rng(devices=[parameter.device] if parameter.is_cuda else []), torch.no_grad():
            torch.manual_seed(_seed(seed, name))
            parameter.copy_(_draw_part(parameter, draw, group.rank(), group.size()))


def _draw_part(parameter: nn.Parameter, draw: Callable[[Tensor], object], rank: int, ranks: int) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        ranks = 1
    dim = max(0, getattr(parameter, "partition_dim", 0))  # -1 where the matrix is not split
    stride = getattr(parameter, "partition_stride", 1)
    size = list(parameter.shape)
    size[dim] *= ranks
    whole = torch.empty(size, dtype=torch.float32, device=parameter.device)
    draw(whole)
    # With stride 2 (gate and up in one matrix) a rank holds a slice of each half.
    pieces = whole.split(parameter.shape[dim] // stride, dim)
    return torch.cat(pieces[rank % ranks :: ranks], dim)


def _initializer(name: str, config: TransformerConfig) -> Callable[[Tensor], object]:
    rules: tuple[tuple[str, Callable[[Tensor], object]], ...] = (
        ("norm.weight", nn.init.ones_),
        (".bias", nn.init.zeros_),
        ("embeddings.weight", config.embedding_init_method),
        ("output_layer.weight", config.init_method),
        ("linear_qkv.weight", config.init_method),
        ("linear_fc1.weight", config.init_method),
        ("eh_proj.weight", config.init_method),
        ("linear_proj.weight", config.output_layer_init_method),
        ("linear_fc2.weight", config.output_layer_init_method),
    )
    for ending, draw in rules:
        if name.endswith(ending):
            return draw
    raise UsageError(f"no initialiser for parameter {name!r}; known endings: {', '.join(e for e, _ in rules)}")


def _global_name(model: HybridModel, name: str) -> str:
    """The parameter's name in a model of one stage: blocks counted from the first one, a tied copy as its original."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    index, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{model.decoder.layers[int(index)].layer_number - 1}.{rest}"


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
