"""A Composite architecture as a layer spec of Megatron-core's GPTModel, for pipelines built on that class.

::

    COMPOSER_ARCHITECTURE=architecture.json torchrun … pretrain_gpt.py --spec composer_megatron.gpt_spec gpt_spec …

``--spec`` names a function and passes it Megatron's configuration alone, so the sequence comes by an environment
variable, which torchrun hands to every process. From Python, `block_spec` takes the architecture itself::

    GPTModelProvider(transformer_layer_spec=functools.partial(block_spec, architecture), …)

`HybridModel` (`composer_megatron.specs`) is the main route: Megatron-core calls its GPTModel deprecated. Weights have
the same names in both, but for the final norm (``final_layernorm`` here, ``final_norm`` there).
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import scaled_init_method_normal

from composer_megatron.architecture import Architecture
from composer_megatron.backend import get_backend
from composer_megatron.block_config import SHARED_FIELDS, block_fields, flag_of_field
from composer_megatron.errors import UsageError
from composer_megatron.specs import LAYERS

ARCHITECTURE_VARIABLE = "COMPOSER_ARCHITECTURE"
"""Names the architecture file for `gpt_spec`."""


def gpt_spec(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """For ``pretrain_gpt.py --spec composer_megatron.gpt_spec gpt_spec``; Megatron calls it once a pipeline stage.

    Args:
        model_config: Megatron's `GPTModelConfig`.
        vp_stage: Virtual pipeline stage.

    Raises:
        UsageError: If the environment names no architecture file, or Megatron's flags make another model.
        FileError: If that file cannot be read.
    """
    path = os.environ.get(ARCHITECTURE_VARIABLE)
    if not path:
        problem = f"the environment variable {ARCHITECTURE_VARIABLE} is not set"
        raise UsageError(f"{problem}; set it to an architecture file: {ARCHITECTURE_VARIABLE}=architecture.json")
    architecture = Architecture.load(Path(path))
    if architecture.shape.rope_scaling_factor != 1:
        # Megatron's scripts hand --use-rope-scaling on to the model, and leave its factor at 8.
        model_config.rope_scaling_factor = architecture.shape.rope_scaling_factor
    return block_spec(architecture, model_config, vp_stage)


def block_spec(
    architecture: Architecture, model_config: Any, vp_stage: int | None = None, *, backend: str | None = None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, cut as Megatron's flags for GPTModel say, and the final norm.

    Changes the configuration in two places: checkpoints keep each layer under its own name, since Megatron's default
    stacks layers that are all alike; and the initial output projections are scaled for one residual addition in a
    layer, not two, unless the caller has set their initialiser.

    Args:
        architecture: Sequence and shape.
        model_config: `GPTModelConfig` of Megatron-core, `GPTModelProvider` of Megatron-Bridge, or anything else that
            is a `TransformerConfig` or has one as ``transformer``.
        vp_stage: Virtual pipeline stage.
        backend: A name in `composer_megatron.backend.BACKENDS`; None for the backend of the machine.

    Raises:
        UsageError: If the configuration is not that of the architecture, with the flags to change.
    """
    if "S" in architecture.sequence.letters:
        raise UsageError("Mamba-2 (S) has no place in Megatron's GPTModel; use pretrain_hybrid.py and its HybridModel")
    if "L" in architecture.sequence.letters and architecture.shape.rope_scaling_factor != 1:
        raise UsageError("latent attention (L) in Megatron's GPTModel has no rope scaling; use composer_megatron.train")
    config: TransformerConfig = getattr(model_config, "transformer", model_config)
    _check(architecture, model_config, config)
    parts = get_backend(backend)
    config.hetereogenous_dist_checkpoint = True  # Megatron's spelling; it has no flag for it
    config.use_te_activation_func = parts.activation.use is not None
    _scale_output_projections(config)
    start = get_transformer_layer_offset(config, vp_stage=vp_stage)
    letters = architecture.sequence.letters[start : start + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(
        layer_specs=[LAYERS[letter].spec(parts) for letter in letters], layer_norm=parts.norm.use
    )


def _scale_output_projections(config: TransformerConfig) -> None:
    layers, std = config.num_layers, config.init_method_std
    drawn = getattr(config.output_layer_init_method, "keywords", {}).get("std", math.nan)
    if math.isclose(drawn, std / math.sqrt(2 * layers)):
        config.output_layer_init_method = scaled_init_method_normal(std, layers, multiplier=1.0)


class _Setting(NamedTuple):
    """A field of Megatron's configuration, the flag that sets it, what it is and what the architecture asks for."""

    flag: str
    value: Any
    wanted: Any


def _check(architecture: Architecture, model_config: Any, config: TransformerConfig) -> None:
    settings = [
        *_widths(architecture, config),
        *_features(architecture, config),
        *_of_blocks(architecture, config),
        *_model_settings(architecture, model_config),
    ]
    wrong = [
        f"{flag}: is {_text(value)}, the architecture has {_text(wanted)}"
        for flag, value, wanted in settings
        if value != wanted
    ]
    if wrong:
        raise UsageError(f"Megatron's flags do not make {architecture.sequence.notation}: " + "; ".join(wrong))


def _text(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def _widths(architecture: Architecture, config: TransformerConfig) -> Iterator[_Setting]:
    shape = architecture.shape
    yield _Setting("--num-layers", config.num_layers, len(architecture.sequence))
    yield _Setting("--hidden-size", config.hidden_size, shape.hidden_size)
    yield _Setting("--ffn-hidden-size", config.ffn_hidden_size, shape.ffn_hidden_size)
    yield _Setting("--num-attention-heads", config.num_attention_heads, shape.num_attention_heads)
    if "L" not in architecture.sequence.letters:
        yield _Setting("--num-query-groups", config.num_query_groups, shape.num_query_groups)
    yield _Setting("--kv-channels", config.kv_channels, shape.head_dim)
    yield _Setting("--norm-epsilon", config.layernorm_epsilon, shape.norm_epsilon)


def _of_blocks(architecture: Architecture, config: TransformerConfig) -> Iterator[_Setting]:
    """What single primitives ask for."""
    for name, wanted in block_fields(architecture).items():
        if name not in SHARED_FIELDS:
            yield _Setting(flag_of_field(name), getattr(config, name, None), wanted)


def _features(architecture: Architecture, config: TransformerConfig) -> Iterator[_Setting]:
    """What a Composite block has, and what it has not."""
    yield _Setting("--normalization", config.normalization, "RMSNorm")
    yield _Setting("--swiglu (gate)", config.gated_linear_unit, True)
    yield _Setting("--swiglu (activation)", config.activation_func, F.silu)
    yield _Setting("--disable-bias-linear (bias)", config.add_bias_linear, False)
    yield _Setting("--add-qkv-bias", config.add_qkv_bias, False)
    yield _Setting("--qk-layernorm", config.qk_layernorm, False)
    letters = architecture.sequence.letters
    if "L" not in letters:
        yield _Setting("--multi-latent-attention", config.multi_latent_attention, False)
    if "E" not in letters:
        yield _Setting("--num-experts", config.num_moe_experts, None)
    if "W" not in letters:
        yield _Setting("--window-size", config.window_size, None)
    yield _Setting("--mtp-num-layers", config.mtp_num_layers or None, None)


def _model_settings(architecture: Architecture, model_config: Any) -> Iterator[_Setting]:
    """What Megatron keeps beside the `TransformerConfig`; left out where `model_config` is no more than that."""
    shape = architecture.shape
    if not hasattr(model_config, "position_embedding_type"):
        return
    tied = model_config.share_embeddings_and_output_weights
    yield _Setting("--position-embedding-type", model_config.position_embedding_type, "rope")
    yield _Setting("--rotary-base", model_config.rotary_base, shape.rope_theta)
    yield _Setting("--rotary-percent", model_config.rotary_percent, 1.0)
    yield _Setting("--use-rope-scaling", model_config.rope_scaling, shape.rope_scaling_factor != 1)
    if shape.rope_scaling_factor != 1:
        yield _Setting("--rope-scaling-factor", model_config.rope_scaling_factor, shape.rope_scaling_factor)
    yield _Setting("--rotary-seq-len-interpolation-factor", model_config.seq_len_interpolation_factor, None)
    yield _Setting("--untie-embeddings-and-output-weights (tied)", tied, shape.tied_embeddings)
    yield _Setting("--padded-vocab-size", _vocabulary_rows(model_config), shape.vocab_size)


def _vocabulary_rows(model_config: Any) -> int | None:
    """Rows that Megatron gives the embedding."""
    if not model_config.should_pad_vocab or model_config.vocab_size is None:
        return model_config.vocab_size
    multiple = model_config.make_vocab_size_divisible_by * model_config.tensor_model_parallel_size
    return math.ceil(model_config.vocab_size / multiple) * multiple
