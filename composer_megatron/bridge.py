"""A Composite architecture as a model provider of Megatron-Bridge.

::

    provider = composite_provider(architecture, seq_length=4096, tensor_model_parallel_size=2)
    config = ConfigContainer(model=provider, …)  # megatron.bridge.training

Written for Megatron-Bridge 0.6.2, whose `HybridModelProvider` has no interleaved schedule.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.enums import AttnBackend

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.backend import get_backend
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.model import architecture_fields
from composer_megatron.pattern import hybrid_pattern
from composer_megatron.pipeline import cut_sequence
from composer_megatron.specs import stack_spec

if TYPE_CHECKING:
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.core.transformer.spec_utils import ModuleSpec


def composite_provider(
    architecture: Architecture, *, backend: str | None = None, **overrides: Any
) -> HybridModelProvider:
    """The provider of an architecture: every width, the pattern and the spec are set.

    With ``pipeline_model_parallel_size`` the pattern is cut into so many stages, by their cost.

    Args:
        architecture: Sequence and shape.
        backend: A name in `composer_megatron.backend.BACKENDS`; None for the backend of the machine.
        overrides: Further fields of `HybridModelProvider`, such as seq_length, parallel sizes or params_dtype.

    Returns:
        ``provider.provide_distributed_model(…)`` builds the model.

    Raises:
        UsageError: If a field is unknown, makes another model, or asks for the interleaved schedule.
        ComposerError: If Megatron-Bridge cannot be imported.
    """
    provider_class = _provider_class()
    fields = model_fields(architecture, backend)
    known = [field.name for field in dataclasses.fields(provider_class)]
    lacking = [name for name in fields if name not in known]
    if lacking:
        problem = f"{architecture.sequence.notation} needs {lacking[0]}, which HybridModelProvider does not have"
        raise UsageError(f"{problem}; use composer_megatron.train")
    _check_overrides(overrides, fields, known)
    stages = overrides.get("pipeline_model_parallel_size", 1)
    cut = cut_sequence(architecture, stages, seq_len=overrides.get("seq_length", 4096))
    return provider_class(
        hybrid_layer_pattern=hybrid_pattern(architecture.sequence, cut),
        **fields,
        **(_defaults(architecture, backend) | overrides),
    )


def composite_stack(provider: HybridModelProvider, *, backend: str | None = None) -> ModuleSpec:
    """The spec of the stack; a function with a name, which Bridge can write to a checkpoint's configuration."""
    return stack_spec(get_backend(backend))


def model_fields(architecture: Architecture, backend: str | None) -> dict[str, Any]:
    """The fields of `HybridModelProvider` that an architecture decides, but for the pattern."""
    shape = architecture.shape
    return {
        "hybrid_stack_spec": composite_stack
        if backend is None
        else functools.partial(composite_stack, backend=backend),
        "vocab_size": shape.vocab_size,
        "should_pad_vocab": False,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": shape.rope_theta,
        "rotary_percent": 1.0,
        **_rope_scaling(shape.rope_scaling_factor),
    } | architecture_fields(architecture)


def _rope_scaling(factor: float) -> dict[str, Any]:
    """In the words of `GPTModelProvider`; a provider without these fields is refused, for it cannot scale."""
    return {} if factor == 1 else {"rope_scaling": True, "rope_scaling_factor": factor}


def _defaults(architecture: Architecture, backend: str | None) -> dict[str, Any]:
    """What follows from the backend and the machine, unless the caller says otherwise."""
    parts = get_backend(backend)
    parts.install()
    return {
        "init_method_std": architecture.shape.init_std,
        "use_te_activation_func": parts.activation.use is not None,
        "apply_rope_fusion": parts.rope.use.on,
        "fused_single_qkv_rope": parts.rope.use.joined,
        "gradient_accumulation_fusion": parts.gradient_accumulation.use.on,
        "attention_backend": AttnBackend.auto,  # chooses among TransformerEngine's; other attention has no such choice
        "use_cpu_initialization": not cpu.has_gpu(),
    }


def _check_overrides(overrides: dict[str, Any], fields: dict[str, Any], known: list[str]) -> None:
    for name, value in overrides.items():
        if name == "hybrid_layer_pattern" or (name in fields and value != fields[name]):
            wanted = "its sequence" if name == "hybrid_layer_pattern" else fields[name]
            raise UsageError(
                f"{name}={value!r} is another model than the architecture's ({wanted}); change that instead"
            )
        if name == "virtual_pipeline_model_parallel_size" and value is not None:
            problem = f"{name}={value}: Megatron-Bridge's HybridModelProvider has no interleaved schedule"
            raise UsageError(f"{problem}; leave it out, or use composer_megatron.train")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"unknown field {name!r} of HybridModelProvider" + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _provider_class() -> type[HybridModelProvider]:
    try:
        from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("megatron.bridge"):
            raise ComposerError("Megatron-Bridge is not installed: pip install megatron-bridge") from None
        raise ComposerError(f"Megatron-Bridge cannot be imported without {error.name}: install that, too") from error
    return HybridModelProvider
