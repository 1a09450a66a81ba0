"""Architecture to Megatron-core: the hybrid layer pattern, and the ModuleSpec that says how each block is built.

`composite_stack_spec` is ready for Megatron's own scripts::

    pretrain_hybrid.py --spec composer_megatron.specs composite_stack_spec --hybrid-layer-pattern '**--|--**' …

It builds on the backend of the machine; `composite_stack_spec_composer`, `_local` and `_te` name one. A spec brings
norm, attention and projections, and with ``--use-te-activation-func --no-bias-swiglu-fusion`` the activation. The other
parts of a backend belong to the training program: `composer_megatron.train` sets them.

Our letters never reach Megatron: its ``M`` is a Mamba block. `composer_megatron.pattern` translates.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from composer_megatron.backend import Backend, get_backend
from composer_megatron.errors import ComposerError
from composer_megatron.layers.block import CompositeLayer
from composer_megatron.layers.delta_net import DeltaNet
from composer_megatron.layers.latent_attention import LatentAttention
from composer_megatron.layers.mamba import Mamba2Layer, Mamba2Mixer
from composer_megatron.stack import CompositeStack


def attention_spec(backend: Backend) -> ModuleSpec:
    """One block of grouped-query attention, ``x + out(attention(qkv(norm(x))))``; its window the configuration has."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.linear.use.column_parallel,
            core_attention=backend.attention.use,
            linear_proj=backend.linear.use.row_parallel,
        ),
    )
    return _mixing_block(backend, attention)


def mlp_spec(backend: Backend) -> ModuleSpec:
    """One block of SwiGLU, gate and up in one matrix: ``x + down(silu(gate(norm(x))) · up(norm(x)))``."""
    # Projections may come with what lies between them, and an activation with its products.
    whole: type[MLP] = backend.linear.use.mlp or getattr(backend.activation.use, "mlp", MLP)
    mlp = functools.partial(whole.as_mlp_submodule, submodules=_swiglu(backend))
    return ModuleSpec(
        module=CompositeLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=backend.norm.use, mlp=mlp, mlp_bda=get_bias_dropout_add
        ),
    )


def _swiglu(backend: Backend) -> MLPSubmodules:
    return MLPSubmodules(
        linear_fc1=backend.linear.use.column_parallel,
        linear_fc2=backend.linear.use.row_parallel,
        activation_func=backend.activation.use,
    )


def experts_spec(backend: Backend) -> ModuleSpec:
    """One mixture of experts: a router, SwiGLU MLPs one after the other, and one for all tokens where there is one."""
    mlp = _swiglu(backend)
    experts = functools.partial(
        MoELayer,
        submodules=MoESubmodules(
            experts=functools.partial(SequentialMLP, submodules=mlp),
            shared_experts=functools.partial(SharedExpertMLP, submodules=mlp),
        ),
    )
    return ModuleSpec(
        module=CompositeLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=backend.norm.use, mlp=experts, mlp_bda=get_bias_dropout_add
        ),
    )


def mamba_spec(backend: Backend) -> ModuleSpec:
    """One block of Mamba-2."""
    mixer = ModuleSpec(
        module=Mamba2Mixer,
        params={"kernels": backend.recurrence.use},
        submodules=MambaMixerSubmodules(
            in_proj=backend.linear.use.column_parallel, out_proj=backend.linear.use.row_parallel
        ),
    )
    return ModuleSpec(
        module=Mamba2Layer,
        submodules=MambaLayerSubmodules(norm=backend.norm.use, mixer=mixer, mamba_bda=get_bias_dropout_add),
    )


def delta_net_spec(backend: Backend) -> ModuleSpec:
    """One block of Gated DeltaNet."""
    mixer = ModuleSpec(
        module=DeltaNet,
        params={"kernels": backend.recurrence.use},
        submodules=GatedDeltaNetSubmodules(
            in_proj=backend.linear.use.column_parallel,
            out_norm=backend.norm.use,
            out_proj=backend.linear.use.row_parallel,
        ),
    )
    return _mixing_block(backend, mixer)


def latent_attention_spec(backend: Backend) -> ModuleSpec:
    """One block of latent attention."""
    column, norm = backend.linear.use.column_parallel, backend.norm.use
    attention = ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=backend.attention.use,
            linear_proj=backend.linear.use.row_parallel,
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )
    return _mixing_block(backend, attention)


def _mixing_block(backend: Backend, mixer: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=CompositeLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm.use, self_attention=mixer, self_attn_bda=get_bias_dropout_add
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
        "W": LayerRow("attention_layer", attention_spec),
        "E": LayerRow("moe_layer", experts_spec),
        "S": LayerRow("mamba_layer", mamba_spec),
        "G": LayerRow("gdn_layer", delta_net_spec),
        "L": LayerRow("mla_layer", latent_attention_spec),
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
