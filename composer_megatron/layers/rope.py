"""The rotary embedding's angles under context parallelism, without a GPU."""

import torch
from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
from torch import Tensor
from torch.distributed import ProcessGroup

from composer_megatron import cpu


def prepare_context_parallelism() -> None:
    """Without a GPU, replace Megatron's slicing of the angles, which pins memory and copies it to a GPU."""
    if not cpu.has_gpu():
        for module in (rope_utils, rotary_pos_embedding):
            module.get_pos_emb_on_this_cp_rank = angles_on_this_rank


def angles_on_this_rank(angles: Tensor, seq_dim: int, cp_group: ProcessGroup) -> Tensor:
    """The two chunks of the positions that this rank of the context-parallel group holds.

    Args:
        angles: With all s positions in dimension `seq_dim`.
        seq_dim: That dimension.
        cp_group: The group; its size n cuts the positions into 2n chunks, of which rank r holds r and 2n - 1 - r.

    Returns:
        The angles of s / n positions.
    """
    chunks = angles.chunk(2 * cp_group.size(), seq_dim)
    return torch.cat((chunks[cp_group.rank()], chunks[-1 - cp_group.rank()]), seq_dim)
