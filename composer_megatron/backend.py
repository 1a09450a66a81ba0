"""Backends: which module plays each part of a block. One row each; a new backend is a new row.

`composer_megatron.specs` builds the same blocks from any row, so that a backend changes how a model is computed but
neither its parameters nor the names in its checkpoints.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from composer_megatron.errors import UsageError
from composer_megatron.layers.attention import SDPACoreAttention
from composer_megatron.layers.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The modules that play the parts, each in Megatron-core's interface for that part.

    Attributes:
        name: For people, and the key in `BACKENDS`.
        norm: Before each block: ``norm(config=, hidden_size=, eps=)``.
        final_norm: After the last block, in the same interface.
        core_attention: Attention proper, between the projections, which the heads share (`CoreAttentionBuilder`).
        column_parallel_linear: The projection into a block, split over tensor-parallel ranks by its outputs.
        row_parallel_linear: The projection out of a block, split by its inputs.
        activation: SwiGLU on the joined gate and up halves, ``activation(config=)``; None for Megatron-core's own.
    """

    name: str
    norm: Callable[..., nn.Module]
    final_norm: Callable[..., nn.Module]
    core_attention: Callable[..., nn.Module]
    column_parallel_linear: Callable[..., nn.Module]
    row_parallel_linear: Callable[..., nn.Module]
    activation: Callable[..., nn.Module] | None = None


_ROWS = (
    Backend(
        name="local",  # PyTorch alone: any machine, CPU or GPU
        norm=RMSNorm,
        final_norm=RMSNorm,
        core_attention=SDPACoreAttention,
        column_parallel_linear=ColumnParallelLinear,
        row_parallel_linear=RowParallelLinear,
    ),
)

BACKENDS = MappingProxyType({row.name: row for row in _ROWS})
"""Every backend by its name."""


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UsageError: If there is none, with the names that there are.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown backend {name!r}: {hint}known: {', '.join(BACKENDS)}")
    return BACKENDS[name]
