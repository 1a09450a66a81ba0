"""Where tokens lie under context parallelism, and the keys and values of all of them on each rank.

Megatron cuts a sequence of s tokens into 2n chunks for the n ranks of the context-parallel group, and gives rank r the
chunks r and 2n - 1 - r, so that all ranks have equally much to do under a causal mask. Packed sequences are cut one by
one; documents in a row are not, and may end anywhere (`document_chunk`). Every query chunk sees a prefix of its
sequence, of which it is the end: causal attention of fewer queries than keys, aligned at the end.

Keys and values are gathered, not passed round: with grouped-query attention they are small beside the queries. The
gradient goes back by the reverse, a reduce-scatter, so it is exact.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Packing:
    """Several sequences behind one another, for attention of each to itself.

    Attributes:
        queries: Boundaries of the queries' sequences, (n + 1,) in int32 from 0.
        keys: Boundaries of the keys' sequences, as many.
        most_queries: Length of the longest one, or more.
        most_keys: Length of the longest one, or more.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


def gather(key: Tensor, value: Tensor, group: ProcessGroup) -> Tensor:
    """Keys (s / n, …, d) and values (s / n, …, e) of all ranks, in turn, to (s, …, d + e), in one collective."""
    return gather_from_sequence_parallel_region(torch.cat((key, value), -1), group=group)


def in_order(gathered: Tensor, ranks: int) -> Tensor:
    """Put the chunks that `gather` found, rank after rank, into the order of the sequence; dimension 0 holds tokens."""
    chunks = gathered.chunk(2 * ranks)
    firsts, seconds = chunks[0::2], chunks[1::2]
    return torch.cat((*firsts, *reversed(seconds)))


def prefixes(rank: int, ranks: int) -> tuple[float, float]:
    """Which share of its sequence each of the rank's two query chunks sees."""
    return (rank + 1) / (2 * ranks), (2 * ranks - rank) / (2 * ranks)


def packed_prefixes(boundaries: Tensor, longest: int, tokens: int, rank: int, ranks: int) -> tuple[Packing, Tensor]:
    """Packed sequences under context parallelism, as twice as many sequences without.

    Args:
        boundaries: Of the whole sequences, (n + 1,) from 0 to `tokens` · `ranks`; each length a multiple of
            2 · `ranks`.
        longest: Length of the longest whole sequence, or more.
        tokens: How many of the packed tokens each rank holds.
        rank: This rank of the context-parallel group.
        ranks: Size of the group.

    Returns:
        For each sequence its first and its second query chunk, each with the prefix it sees; and where `gather` put the
        tokens of those prefixes, one index for each.
    """
    chunk = (boundaries.diff() // (2 * ranks)).long()
    seen = torch.stack((chunk * (rank + 1), chunk * (2 * ranks - rank)), 1).flatten()
    packing = Packing(
        _boundaries(chunk.repeat_interleave(2)),
        _boundaries(seen),
        longest // (2 * ranks),
        longest * (2 * ranks - rank) // (2 * ranks),
    )
    total = tokens * (2 * ranks + 1) // 2  # known here, so that nothing waits for the GPU

    def spread(of_sequences: Tensor) -> Tensor:
        return of_sequences.long().repeat_interleave(2).repeat_interleave(seen, output_size=total)

    starts = packing.keys[:-1].long().repeat_interleave(seen, output_size=total)
    position, length = torch.arange(total, device=seen.device) - starts, spread(chunk)
    piece, offset = position // length, position % length
    second = piece >= ranks
    owner = torch.where(second, 2 * ranks - 1 - piece, piece)
    return packing, owner * tokens + spread(boundaries[:-1] // ranks) + second * length + offset


def document_chunk(boundaries: Tensor, length: int, start: int, size: int) -> Packing:
    """One chunk of every row of a batch, and the prefix of the row that it sees, as packed sequences.

    Every document of every row is one: with those of its queries that lie in the chunk, perhaps none, and its keys up
    to the chunk's end. Where a document reaches into the chunk from before it, its queries are the last of its keys.

    Args:
        boundaries: Of the documents, (n + 1,), rows laid end to end; every row's end is one.
        length: Tokens of a row.
        start: Where the chunk begins in each row.
        size: Its tokens.
    """
    end = start + size
    begins = boundaries[:-1] % length
    ends = begins + boundaries.diff()
    queries = ends.clamp(start, end) - begins.clamp(start, end)
    keys = ends.clamp(max=end) - begins.clamp(max=end)
    return Packing(_boundaries(queries), _boundaries(keys), size, end)


def _boundaries(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
