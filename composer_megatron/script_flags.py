"""The flags that make Megatron's own ``pretrain_hybrid.py`` and ``pretrain_gpt.py`` build an architecture.

``composer-megatron flags`` prints them; what a run needs beyond the model (data, batches, learning rate) is the user's.
Nothing here needs Megatron.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from types import MappingProxyType
from typing import Literal

from composer_megatron.architecture import Architecture
from composer_megatron.arguments import Flags, architecture_flags
from composer_megatron.errors import UsageError
from composer_megatron.pattern import hybrid_pattern
from composer_megatron.pipeline import cut_sequence

Script = Literal["hybrid", "gpt"]
"""Which of Megatron's scripts: ``pretrain_hybrid.py`` or ``pretrain_gpt.py``."""

SPECS = MappingProxyType(
    {
        "hybrid": ("composer_megatron.specs", "composite_stack_spec"),
        "gpt": ("composer_megatron.gpt_spec", "gpt_spec"),
    }
)
"""What ``--spec`` takes in each script: a module, and a name in it."""

_BLOCKS: MappingProxyType[str, float | None] = MappingProxyType(
    {
        "--attention-dropout": 0.0,  # Megatron's default is 0.1
        "--hidden-dropout": 0.0,
        "--no-create-attention-mask-in-dataloader": None,  # our attention is causal; a mask in memory slows it down
    }
)
"""What our blocks want of Megatron, whatever the architecture."""


def script_flags(
    architecture: Architecture, script: Script, *, pipeline: int = 1, virtual_stages: int = 1, seq_len: int = 4096
) -> Flags:
    """The flags of the model and of its cut into pipeline stages.

    Args:
        architecture: Sequence and shape.
        script: Which script they are for.
        pipeline: Pipeline-parallel ranks.
        virtual_stages: Pipeline stages on each rank.
        seq_len: Tokens in a sequence, which the cost of attention depends on.

    Raises:
        UsageError: If there are more stages than blocks, several stages for a single rank, or blocks that the
            script's model has not, or rotary embeddings scaled as it cannot.
    """
    if virtual_stages > 1 and pipeline == 1:
        raise UsageError(f"{virtual_stages} virtual stages on one pipeline rank; use at least 2 ranks, or 1 stage")
    if script == "gpt" and "S" in architecture.sequence.letters:
        raise UsageError("Mamba-2 (S) has no place in Megatron's GPTModel; use the flags of its hybrid model")
    if architecture.shape.rope_scaling_factor != 1:
        _check_rope_scaling(architecture, script)
    cut = cut_sequence(architecture, pipeline, virtual_stages=virtual_stages, seq_len=seq_len)
    flags: Flags = (
        {"--spec": SPECS[script]}
        | architecture_flags(architecture, hybrid_pattern(architecture.sequence, cut))
        | _BLOCKS
    )
    if pipeline > 1:
        flags["--pipeline-model-parallel-size"] = pipeline
    if script == "gpt":
        del flags["--hybrid-layer-pattern"]
        flags["--num-layers"] = len(architecture.sequence)
        if pipeline > 1:
            flags["--pipeline-model-parallel-layout"] = gpt_layout(cut)
    return flags


def _check_rope_scaling(architecture: Architecture, script: Script) -> None:
    asked = f"rotary embeddings scaled by {architecture.shape.rope_scaling_factor:g}"
    if script == "hybrid":
        raise UsageError(f"{asked}: Megatron's HybridModel cannot; use composer_megatron.train, or --script gpt")
    if "L" in architecture.sequence.letters:
        raise UsageError(f"{asked}: Megatron's latent attention (L) cannot; use composer_megatron.train")


def gpt_layout(cut: Sequence[int]) -> str:
    """Megatron's ``--pipeline-model-parallel-layout`` for GPTModel: ``Et*5|t*3L`` for stages of 5 and 3 blocks.

    Every layer is a ``t`` there, whatever is in it; E is the embedding and L the loss.
    """
    return "E" + "|".join(f"t*{size}" if size else "" for size in cut) + "L"


def as_arguments(flags: Flags) -> list[str]:
    """The flags as the arguments of a program; a value starts no word of its own, so that it may start with a dash."""
    words: list[str] = []
    for flag, value in flags.items():
        if isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words.append(flag if value is None else f"{flag}={value}")
    return words


def as_shell_text(flags: Flags) -> str:
    """The flags as one line for a shell."""
    return shlex.join(as_arguments(flags))
