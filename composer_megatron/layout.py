"""How a training run is laid out over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.planner.schedule import Schedule
from composer_megatron.primitives import PRIMITIVES

type Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallel sizes of a run, its batch, and what each rank keeps.

    Attributes:
        tensor_parallel: Ranks that share each stage's matrices.
        pipeline_parallel: Ranks among which the stages are dealt out.
        virtual_stages: Stages on each of them; more than one is the interleaved schedule.
        context_parallel: Ranks that share each sequence.
        data_parallel: Ranks that share each batch.
        micro_batch_size: Sequences in one micro-batch of a rank.
        micro_batches: Micro-batches of a rank in a step; by default 4 for each pipeline rank.
        seq_len: Tokens in a sequence.
        sequence_parallel: Whether tensor-parallel ranks also share what lies between the matrices.
        distributed_optimizer: Whether data- and context-parallel ranks share the optimizer's state.
        recompute: What is computed again in the backward pass: nothing, the core attention (Megatron's ``selective``),
            or each block from its input.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_stages: int = 1
    context_parallel: int = 1
    data_parallel: int = 1
    micro_batch_size: int = 1
    micro_batches: int | None = None
    seq_len: int = 4096
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        """Refuse sizes below one, and what cannot be together."""
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UsageError(f"{name}={value}; expected at least 1")
        cut = 2 * self.context_parallel
        if self.context_parallel > 1 and self.seq_len % cut:
            problem = f"seq_len={self.seq_len} is no multiple of {cut}"
            raise UsageError(
                f"{problem}: with context_parallel={self.context_parallel} each rank takes two equal parts"
            )
        tokens = self.micro_batch_size * self.seq_len // self.context_parallel
        if self.sequence_parallel and tokens % self.tensor_parallel:
            raise UsageError(f"tensor_parallel={self.tensor_parallel} does not divide {tokens} tokens of a micro-batch")
        _ = self.schedule  # refuses what the schedule refuses

    @property
    def schedule(self) -> Schedule:
        """What the pipeline runs in a step."""
        return Schedule(self.pipeline_parallel, self.virtual_stages, self.micro_batches or 4 * self.pipeline_parallel)

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights."""
        return self.context_parallel * self.data_parallel

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a rank works on."""
        return self.micro_batch_size * self.seq_len // self.context_parallel

    @property
    def global_batch_size(self) -> int:
        """Sequences in a step."""
        return self.micro_batch_size * self.schedule.micro_batches * self.data_parallel

    def __str__(self) -> str:
        """The parallel sizes above one, the micro-batch, and recomputation where there is some."""
        sizes = {
            "tp": self.tensor_parallel,
            "cp": self.context_parallel,
            "pp": self.pipeline_parallel,
            "vpp": self.virtual_stages,
            "dp": self.data_parallel,
        }
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        recompute = [] if self.recompute == "none" else [f"{self.recompute} recompute"]
        return ", ".join([*parts, f"micro-batch {self.micro_batch_size}", *recompute])

    @property
    def hidden_split(self) -> int:
        """Among how many ranks the tensors between the matrices are split."""
        return self.tensor_parallel if self.sequence_parallel else 1

    def check(self, architecture: Architecture) -> None:
        """Refuse what does not fit the architecture.

        Raises:
            UsageError: If the ranks do not divide its widths, or there are more stages than blocks.
        """
        shape, ranks = architecture.shape, self.tensor_parallel
        names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
        widths = {name: getattr(shape, name) for name in names}
        for letter in architecture.sequence.counts:
            widths |= PRIMITIVES[letter].split(shape)
        for name, width in widths.items():
            if width % ranks:
                raise UsageError(f"tensor_parallel={ranks} does not divide {name}={width}")
        stages, blocks = self.schedule.stages, len(architecture.sequence)
        if stages > blocks:
            raise UsageError(
                f"{stages} pipeline stages for the {blocks} blocks of {architecture.sequence.notation}: some would "
                f"hold nothing; use at most {blocks} stages in all"
            )


def micro_batches_in(global_batch_size: int, micro_batch_size: int, data_parallel: int) -> int:
    """Micro-batches of a rank in a step.

    Raises:
        UsageError: If the batch does not divide.
    """
    together = micro_batch_size * data_parallel
    if global_batch_size < 1 or global_batch_size % together:
        problem = f"global_batch_size={global_batch_size} is no multiple of {together}"
        raise UsageError(f"{problem} (micro_batch_size x data_parallel)")
    return global_batch_size // together
