"""Where to cut a sequence into pipeline stages, and what each stage then holds and computes.

Blocks differ in cost (at 1B an MLP has five times the weights of an attention block), so equal counts make unequal
stages. The slowest stage sets the pace of a 1F1B schedule: `cut_sequence` minimises it, exactly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.primitives import PRIMITIVES

STATE_BYTES_PER_PARAMETER = 18
"""bf16 weight 2, fp32 gradient 4, fp32 master weight 4, two fp32 Adam moments 8; nothing sharded over data ranks."""


@dataclass(frozen=True)
class Layout:
    """How a training run is laid out over ranks and micro-batches.

    Attributes:
        stages: Pipeline stages.
        tensor_parallel: Ranks that share each stage's matrices.
        micro_batch_size: Sequences in one micro-batch.
        seq_len: Tokens in a sequence.
    """

    stages: int = 1
    tensor_parallel: int = 1
    micro_batch_size: int = 1
    seq_len: int = 4096

    def __post_init__(self) -> None:
        """Refuse sizes below one."""
        for name, value in vars(self).items():
            if value < 1:
                raise UsageError(f"{name}={value}; expected at least 1")


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of a plan, per tensor-parallel rank where it says so.

    Attributes:
        blocks: Its blocks as runs, such as ``2A1M``; empty for a stage without blocks.
        flops_per_token: Training FLOPs of its blocks and, on the last stage, of the output layer.
        params_per_rank: Parameters a rank holds, embedding and output layer included.
        state_bytes: Weights, gradients and optimizer state of a rank in bf16 training (18 bytes a parameter).
        activation_bytes: What a rank keeps for the backward passes of all its micro-batches in flight, in bf16.
    """

    blocks: str
    flops_per_token: int
    params_per_rank: int
    state_bytes: int
    activation_bytes: int


def cut_sequence(architecture: Architecture, stages: int, *, seq_len: int = 4096) -> list[int]:
    """Block counts of each pipeline stage, in order, so that the costliest stage costs least.

    The cost is training FLOPs a token; the last stage also bears the output layer, and may for that reason hold few
    blocks, though at least one. Exact, by dynamic programming; of equally good cuts the one with the earlier stages
    fuller is taken.

    Raises:
        UsageError: If there are more stages than blocks.
    """
    blocks = len(architecture.sequence)
    if stages < 1:
        raise UsageError(f"{stages} pipeline stages; expected at least 1")
    if stages > blocks:
        raise UsageError(
            f"{stages} pipeline stages for the {blocks} blocks of {architecture.sequence}: "
            f"a stage needs a block; use at most {blocks} stages"
        )
    sums = [0, *itertools.accumulate(_block_costs(architecture, seq_len))]
    sums[-1] += _output_cost(architecture)
    # worst[k][end]: the least possible cost of the costliest of k stages that hold the first `end` blocks.
    worst = [[0] + [sums[-1] + 1] * blocks]
    starts: list[list[int]] = [[]]
    for stage in range(1, stages + 1):
        row, start_row = [sums[-1] + 1] * (blocks + 1), [0] * (blocks + 1)
        for end in range(stage, blocks + 1):
            candidates = range(end - 1, stage - 2, -1)
            start = min(candidates, key=lambda s, end=end: max(worst[-1][s], sums[end] - sums[s]))  # type: ignore[misc]
            row[end], start_row[end] = max(worst[-1][start], sums[end] - sums[start]), start
        worst.append(row)
        starts.append(start_row)
    cut, end = [], blocks
    for stage in range(stages, 0, -1):
        start = starts[stage][end]
        cut.append(end - start)
        end = start
    return cut[::-1]


def equal_split(blocks: int, stages: int) -> list[int]:
    """Block counts as equal as can be, earlier stages first: the cut that ignores what blocks cost."""
    size, extra = divmod(blocks, stages)
    return [size + (stage < extra) for stage in range(stages)]


def plan(architecture: Architecture, layout: Layout) -> list[Stage]:
    """What each stage of the best cut holds and computes.

    Raises:
        UsageError: If the cut or the tensor-parallel split is impossible.
    """
    _check_tensor_parallel(architecture, layout.tensor_parallel)
    cut = cut_sequence(architecture, layout.stages, seq_len=layout.seq_len)
    ends = list(itertools.accumulate(cut))
    letters = architecture.sequence.letters
    return [
        _stage(architecture, layout, index, letters[end - size : end])
        for index, (size, end) in enumerate(zip(cut, ends, strict=True))
    ]


def balance(architecture: Architecture, cut: list[int], *, seq_len: int = 4096) -> float:
    """Mean over maximum of the stages' FLOPs: 1.0 where no stage waits for another."""
    costs = _block_costs(architecture, seq_len)
    ends = list(itertools.accumulate(cut))
    sums = [sum(costs[end - size : end]) for size, end in zip(cut, ends, strict=True)]
    sums[-1] += _output_cost(architecture)
    return sum(sums) / len(sums) / max(sums)


def summary(architecture: Architecture, layout: Layout) -> dict[str, Any]:
    """The plan as JSON values: counts, the cut with both balances, and each stage."""
    stages = plan(architecture, layout)
    cut = cut_sequence(architecture, layout.stages, seq_len=layout.seq_len)
    symbols = "".join(PRIMITIVES[letter].megatron_symbol for letter in architecture.sequence)
    ends = list(itertools.accumulate(cut))
    equal = equal_split(len(architecture.sequence), layout.stages)
    return {
        **architecture.summary(layout.seq_len),
        "shape": architecture.shape.name,
        "vocab_size": architecture.shape.vocab_size,
        "seq_len": layout.seq_len,
        "tensor_parallel": layout.tensor_parallel,
        "micro_batch_size": layout.micro_batch_size,
        "pattern": "|".join(symbols[end - size : end] for size, end in zip(cut, ends, strict=True)),
        "stages": [vars(stage) for stage in stages],
        "balance": balance(architecture, cut, seq_len=layout.seq_len),
        "balance_equal_split": balance(architecture, equal, seq_len=layout.seq_len),
        "params_per_rank": [stage.params_per_rank for stage in stages],
        "memory_bytes": [stage.state_bytes + stage.activation_bytes for stage in stages],
    }


def _stage(architecture: Architecture, layout: Layout, index: int, letters: str) -> Stage:
    shape, last = architecture.shape, index == layout.stages - 1
    rows = [PRIMITIVES[letter] for letter in letters]
    embedding = shape.vocab_size * shape.hidden_size
    # A tied output layer lives twice when first and last stage differ.
    embeddings = (index == 0) + (last and (layout.stages > 1 or not shape.tied_embeddings))
    matrices = sum(row.matrix_parameters(shape) for row in rows) + embeddings * embedding
    norms = sum(row.norm_parameters(shape) for row in rows) + (shape.hidden_size if last else 0)
    params = matrices // layout.tensor_parallel + norms
    flops = sum(_block_costs(architecture, layout.seq_len, letters)) + (_output_cost(architecture) if last else 0)
    tokens = layout.micro_batch_size * layout.seq_len
    in_flight = layout.stages - index
    saved = 2 * sum(row.saved_elements(shape) for row in rows) * in_flight
    logits = 6 * shape.vocab_size if last else 0  # bf16 logits and their fp32 copy in the loss, one micro-batch
    return Stage(
        blocks="".join(f"{len(list(group))}{letter}" for letter, group in itertools.groupby(letters)),
        flops_per_token=flops,
        params_per_rank=params,
        state_bytes=STATE_BYTES_PER_PARAMETER * params,
        activation_bytes=tokens * (saved + logits) // layout.tensor_parallel,
    )


def _check_tensor_parallel(architecture: Architecture, ranks: int) -> None:
    shape = architecture.shape
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        if getattr(shape, name) % ranks:
            raise UsageError(f"tensor_parallel={ranks} does not divide {name}={getattr(shape, name)}")


def _block_costs(architecture: Architecture, seq_len: int, letters: str | None = None) -> list[int]:
    shape = architecture.shape
    costs = {
        symbol: 6 * row.matrix_parameters(shape) + 3 * row.mixing_flops(shape, seq_len) // 2
        for symbol, row in PRIMITIVES.items()
    }
    return [costs[letter] for letter in (architecture.sequence.letters if letters is None else letters)]


def _output_cost(architecture: Architecture) -> int:
    return 6 * architecture.shape.vocab_size * architecture.shape.hidden_size
