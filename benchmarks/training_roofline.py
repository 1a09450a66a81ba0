"""What a training step would take with each part at this GPU's measured ceilings: a bound to hold a breakdown against.

Bytes and FLOPs are the fewest of fused kernels, as `composer_kernels` states them: a norm with its residual addition
moves 8 bytes a feature each way (two read, two written), SwiGLU 6 forward and 10 backward, the loss 6 a logit, and the
optimizer 38 a parameter (gradient, master and moments read; master, moments and weight written; zeroing and norm).
"""

from __future__ import annotations

from typing import Any

from composer_megatron.architecture import Architecture
from composer_megatron.roofline import DEVICES

_OPTIMIZER_BYTES = 38
_LOSS_BYTES = 6
_NORM_BYTES = 2 * 8


def ideal_seconds(
    architecture: Architecture, seq_len: int, tokens: int, ceilings: dict[str, float]
) -> dict[str, float]:
    """Seconds of a step of so many tokens by part.

    The attention kernels' ceilings are not measured here: they are taken at the shares of the GEMM rate that
    `composer_megatron.roofline` assumes for an H100.

    Args:
        architecture: What is trained.
        seq_len: Tokens in a sequence.
        tokens: Tokens in a step.
        ceilings: ``copy`` in bytes/s and ``gemm`` in FLOP/s, as measured.
    """
    shape, gemm, copy = architecture.shape, ceilings["gemm"], ceilings["copy"]
    matrices = 6 * (architecture.matrix_parameters + shape.vocab_size * shape.hidden_size)
    forward = (architecture.flops_per_token(seq_len) - matrices) / 3
    known = DEVICES["h100"]
    slower = 1 / (known.attention_forward / known.gemm) + 2.5 / (known.attention_backward / known.gemm)
    attention, mlps = architecture.sequence.count("A"), architecture.sequence.count("M")
    turned = 2 * 4 * (shape.num_attention_heads + shape.num_query_groups) * shape.head_dim
    element_bytes = _NORM_BYTES * shape.hidden_size * (len(architecture.sequence) + 1)
    element_bytes += attention * turned + mlps * 16 * shape.ffn_hidden_size
    return {
        "gemm": matrices * tokens / gemm,
        "attention": forward * slower * tokens / gemm,
        "elementwise": element_bytes * tokens / copy,
        "loss": _LOSS_BYTES * shape.vocab_size * tokens / copy,
        "optimizer": _OPTIMIZER_BYTES * architecture.params_total / copy,
    }


def total(parts: dict[str, Any]) -> float:
    """Seconds of all parts."""
    return float(sum(parts.values()))
