"""How fast rotary embeddings turn, with and without the scaling of Llama 3.1 and 3.2 for long texts.

All checkpoints of Llama 3.1 (arXiv 2407.21783) and 3.2 share three of the rule's four numbers; their factors differ.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from torch import Tensor

LLAMA3 = MappingProxyType(
    {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
)
"""What the rule has beside its factor, in the words of ``config.json``, where ``rope_type`` is ``llama3``."""


def inverse_frequencies(head_dim: int, theta: float, scaling_factor: float = 1.0) -> Tensor:
    """Radians by which each pair of a head's elements turns from one position to the next.

    theta^(-2i / head_dim) for pair i. Scaled as transformers' ``llama3``: a pair that makes at least 4 turns in 8,192
    positions stays as it is, one that makes at most one is slowed down by the whole factor, and those between by a mean
    of both, weighted by their turns.

    In fp32 throughout, in the order of transformers and Megatron-core, and on the CPU: the weights were trained with
    these very numbers, and exact ones would turn pairs at position 8,192 by up to 3e-4 otherwise.

    Args:
        head_dim: Elements of a head that are turned; even.
        theta: Base of the rotary embedding.
        scaling_factor: 1 for none.

    Returns:
        (head_dim / 2,), fp32.
    """
    with torch.device("cpu"):
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    low, high, length = LLAMA3.values()
    turns = length / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling_factor + kept * frequencies
