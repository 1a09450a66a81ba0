"""What primitives beyond A and M ask of Megatron-core's configuration, as its fields and as its flags.

One configuration holds for all layers of a model. Layer by layer it says only which attention has a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError

SHARED_FIELDS = ("rotary_base", "rotary_percent", "num_query_groups")
"""Fields of `block_fields` that every model has a flag for."""

AUXILIARY_LOSS = 0.01
"""Weight of the loss that spreads tokens over experts; that of Switch Transformers (arXiv 2101.03961)."""


def check_together(letters: str) -> None:
    """Refuse primitives that Megatron-core cannot build in one model.

    Raises:
        UsageError: For latent attention beside another attention.
    """
    others = sorted(set(letters) & set("AW"))
    if "L" in letters and others:
        raise UsageError(
            f"L (latent attention) and {others[0]} do not go into one model: Megatron-core has one attention "
            f"configuration a model and refuses both; use L in all places, or none"
        )


def block_fields(architecture: Architecture) -> dict[str, Any]:
    """Fields of Megatron-core's `TransformerConfig`, or with latent attention of its `MLATransformerConfig`.

    Raises:
        UsageError: As `check_together`.
    """
    letters = architecture.sequence.letters
    check_together(letters)
    fields: dict[str, Any] = {}
    for letter, make in _FIELDS.items():
        if letter in letters:
            fields |= make(architecture)
    return fields


def block_flags(architecture: Architecture) -> dict[str, Any]:
    """The same as flags of Megatron's command line."""
    flags: dict[str, Any] = {}
    for name, value in block_fields(architecture).items():
        flag = flag_of_field(name)
        if value is True:
            flags[flag] = None
        elif isinstance(value, tuple):
            flags[flag] = ",".join(map(str, value))
        elif value is not None and name not in SHARED_FIELDS:
            flags[flag] = str(value).replace(" ", "") if isinstance(value, list) else value
    return flags


def flag_of_field(name: str) -> str:
    """Megatron's flag for a field of its configuration."""
    return "--" + {"num_moe_experts": "num_experts"}.get(name, name).replace("_", "-")


def _window(architecture: Architecture) -> dict[str, Any]:
    return {
        "window_size": (architecture.shape.window - 1, 0),  # Megatron counts the keys before a query's own
        "window_attn_skip_freq": [int(letter == "W") for letter in architecture.sequence],
    }


def _experts(architecture: Architecture) -> dict[str, Any]:
    widths = architecture.shape.expert_widths
    return {
        "num_moe_experts": widths.num_experts,
        "moe_router_topk": widths.top_k,
        "moe_ffn_hidden_size": widths.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": widths.shared_ffn_hidden_size or None,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": AUXILIARY_LOSS,
        "moe_router_dtype": "fp32",
    }


def _mamba(architecture: Architecture) -> dict[str, Any]:
    widths = architecture.shape.mamba_widths
    return {
        "mamba_num_heads": widths.num_heads,
        "mamba_head_dim": widths.head_dim,
        "mamba_num_groups": widths.num_groups,
        "mamba_state_dim": widths.state_dim,
    }


def _delta_net(architecture: Architecture) -> dict[str, Any]:
    widths = architecture.shape.delta_net_widths
    return {
        "linear_num_key_heads": widths.num_key_heads,
        "linear_num_value_heads": widths.num_value_heads,
        "linear_key_head_dim": widths.key_head_dim,
        "linear_value_head_dim": widths.value_head_dim,
        "linear_conv_kernel_dim": widths.conv_width,
    }


def _latent(architecture: Architecture) -> dict[str, Any]:
    shape, widths = architecture.shape, architecture.shape.latent_widths
    return {
        "multi_latent_attention": True,
        "q_lora_rank": widths.q_rank or None,
        "kv_lora_rank": widths.kv_rank,
        "qk_head_dim": widths.key_dim,
        "qk_pos_emb_head_dim": widths.rope_dim,
        "v_head_dim": widths.value_dim,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
        "rotary_base": shape.rope_theta,
        "rotary_percent": 1.0,
        "num_query_groups": None,
    }


_FIELDS: Mapping[str, Any] = MappingProxyType({"W": _window, "E": _experts, "S": _mamba, "G": _delta_net, "L": _latent})
"""What each primitive asks for; A and M ask for no more than the widths that every model has."""
