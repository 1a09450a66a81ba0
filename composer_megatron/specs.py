"""Architecture to Megatron-core: the hybrid layer pattern, and the ModuleSpec that says how each block is built.

`composite_stack_spec` is ready for Megatron's own scripts::

    pretrain_hybrid.py --spec composer_megatron.specs composite_stack_spec --hybrid-layer-pattern '**--|--**' …

It builds on the backend of the machine; `composite_stack_spec_composer`, `_local` and `_te` name one. A spec brings
norm, attention and projections, and with ``--use-te-activation-func --no-bias-swiglu-fusion`` the activation. The other
parts of a backend belong to the training program: `composer_megatron.train` sets them.

Our letters never reach Megatron: its ``M`` is a Mamba block. `hybrid_pattern` translates.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from composer_megatron.backend import Backend, get_backend
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.layers.block import CompositeLayer
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.stack import CompositeStack

STAGE_SEPARATOR = "|"
"""Stands between pipeline stages in a hybrid layer pattern."""


def hybrid_pattern(sequence: CompositeSequence, stages: Sequence[int] | None = None) -> str:
    """The sequence in Megatron-core's alphabet, cut into pipeline stages.

    >>> hybrid_pattern(CompositeSequence.parse("2A4M2A"), [4, 4])
    '**--|--**'

    Args:
        sequence: The blocks.
        stages: Blocks in each stage, in order; None for one stage. Interleaved schedules have more stages than ranks:
            stage i then belongs to rank i modulo the pipeline size.

    Raises:
        UsageError: If the stages' blocks are not those of the sequence.
    """
    letters = "".join(PRIMITIVES[letter].megatron_symbol for letter in sequence)
    counts = [len(letters)] if stages is None else list(stages)
    if any(count < 0 for count in counts) or sum(counts) != len(letters):
        raise UsageError(f"stages of {counts} blocks; expected whole numbers that sum to {len(letters)} for {sequence}")
    ends = list(itertools.accumulate(counts))
    return STAGE_SEPARATOR.join(letters[end - count : end] for count, end in zip(counts, ends, strict=True))


def attention_spec(backend: Backend) -> ModuleSpec:
    """One block of grouped-query attention: ``x + out(attention(qkv(norm(x))))``."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.linear.use.column_parallel,
            core_attention=backend.attention.use,
            linear_proj=backend.linear.use.row_parallel,
        ),
    )
    return ModuleSpec(
        module=CompositeLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm.use, self_attention=attention, self_attn_bda=get_bias_dropout_add
        ),
    )


def mlp_spec(backend: Backend) -> ModuleSpec:
    """One block of SwiGLU, gate and up in one matrix: ``x + down(silu(gate(norm(x))) · up(norm(x)))``."""
    mlp = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=backend.linear.use.column_parallel,
            linear_fc2=backend.linear.use.row_parallel,
            activation_func=backend.activation.use,
        ),
    )
    return ModuleSpec(
        module=CompositeLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=backend.norm.use, mlp=mlp, mlp_bda=get_bias_dropout_add
        ),
    )


class LayerRow(NamedTuple):
    """How Megatron-core builds one primitive: its place in `HybridStackSubmodules`, and the spec to put there."""

    place: str
    spec: Callable[[Backend], ModuleSpec]


LAYERS: Mapping[str, LayerRow] = MappingProxyType(
    {
        "A": LayerRow("attention_layer", attention_spec),
        "M": LayerRow("mlp_layer", mlp_spec),
    }
)
"""One layer spec for each primitive of `composer_megatron.primitives`, by its letter."""


def mtp_spec(backend: Backend) -> ModuleSpec:
    """Multi-token prediction: its norms and projection; its blocks are those of the stack."""
    norm = backend.norm.use
    layer = MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=backend.linear.use.column_parallel
    )
    layers = [ModuleSpec(module=MultiTokenPredictionLayer, submodules=layer)]
    block = MultiTokenPredictionBlockSubmodules(layer_specs=layers)
    return ModuleSpec(module=MultiTokenPredictionBlock, submodules=block)


def stack_spec(backend: Backend) -> ModuleSpec:
    """The spec of a whole stack on that backend; which blocks it holds, and in which order, the pattern says."""
    layers = {row.place: row.spec(backend) for row in LAYERS.values()}
    submodules = HybridStackSubmodules(**layers, mtp_block_spec=mtp_spec(backend))
    return ModuleSpec(module=CompositeStack, params={"final_norm": backend.norm.use}, submodules=submodules)


class _MissingStack(HybridStack):
    """Stands for the stack of a backend whose package is missing: says so when a model is built with it."""

    def __init__(self, *_: Any, missing: ComposerError, **__: Any) -> None:
        raise missing


def _spec_for_scripts(name: str | None) -> ModuleSpec:
    try:
        return stack_spec(get_backend(name))
    except ComposerError as missing:
        return ModuleSpec(module=_MissingStack, params={"missing": missing}, submodules=HybridStackSubmodules())


composite_stack_spec = _spec_for_scripts(None)
"""For ``--spec``: Megatron takes an instance out of a module, and calls nothing. On the backend of the machine."""

composite_stack_spec_composer = _spec_for_scripts("composer")
"""The same on backend composer."""

composite_stack_spec_local = _spec_for_scripts("local")
"""The same on backend local."""

composite_stack_spec_te = _spec_for_scripts("te")
"""The same on backend te."""
