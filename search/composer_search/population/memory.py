"""The memory that a row of a population takes, in bytes.

Weights, best weights and two moments stay. A step adds gradients, what the forward pass keeps for the backward pass,
and the largest intermediates of the backward pass; judging adds those of the forward pass alone. What is kept depends
on how it is computed: PyTorch's operations keep much that `Fused` computes again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from composer_search.candidate import Widths
from composer_search.population.feed import Row
from composer_search.population.model import ONE_HOT_VOCABULARY
from composer_search.trainer import TrainSettings


def row_bytes(row: Row, settings: TrainSettings, *, recorded: bool = False, fused: bool = False) -> int:
    """The memory that a row takes at most while it trains and is judged: an upper estimate of what is allocated.

    PyTorch's allocator keeps more, on an H100 up to 10 % above this where it came to tens of gigabytes. The data, which
    rows share, do not count.

    Args:
        row: The row.
        settings: Its widths, batch and precision.
        recorded: Whether steps are replayed as a CUDA graph, which keeps its memory while rows are judged.
        fused: Whether `composer_search.population.operations.Fused` computes it.
    """
    token = (_Fused if fused else _Plain).of(row, settings)
    trained = min(settings.batch_size, len(row.data.train[0])) * row.data.train[0].shape[1]
    judged = judged_at_once(settings) * max(split[0].shape[1] for split in (row.data.validation, row.data.test))
    step, judging = trained * (token.kept() + token.passing()), judged * token.judging()
    weights = 8 * row_parameters(row, settings.widths) * settings.weight_dtype.itemsize
    return int(weights + (step + judging if recorded else max(step, judging)))


def row_parameters(row: Row, widths: Widths) -> int:
    """The weights of a row, embedding and head included."""
    hidden, vocab_size = widths.hidden_size, row.data.vocab_size
    attention = hidden * (3 * hidden + 3) + hidden * (hidden + 1) + hidden
    mlp = 3 * hidden * widths.ffn_hidden_size + hidden
    head = 2 * vocab_size * hidden + vocab_size + hidden
    decoder = 2 * (hidden * hidden + 2 * hidden) if row.data.autoencoder else 0
    return row.sequence.count("A") * attention + row.sequence.count("M") * mlp + head + decoder


def judged_at_once(settings: TrainSettings) -> int:
    """Sequences of a row that are judged in one pass, which keeps nothing for a backward pass."""
    return max(settings.batch_size, 64)


@dataclass(frozen=True)
class _Plain:
    """Bytes of one token, as PyTorch's operations take them.

    Attributes:
        blocks: Blocks of each kind, A and M.
        hidden: Channels of the stream.
        inner: Channels within an MLP.
        heads: Attention heads.
        length: Of the sequences.
        vocab_size: Of the tokens.
        decoders: Layers of the auto-encoder's head.
        wide: Bytes of a number of the stream.
        dtype: Of numbers between matrix products.
    """

    blocks: tuple[int, int]
    hidden: int
    inner: int
    heads: int
    length: int
    vocab_size: int
    decoders: int
    wide: int
    dtype: torch.dtype

    @classmethod
    def of(cls, row: Row, settings: TrainSettings) -> _Plain:
        """Of a row's training tokens."""
        widths = settings.widths
        return cls(
            (row.sequence.count("A"), row.sequence.count("M")),
            widths.hidden_size,
            widths.ffn_hidden_size,
            widths.num_heads,
            row.data.train[0].shape[1],
            row.data.vocab_size,
            2 if row.data.autoencoder else 0,
            settings.weight_dtype.itemsize,
            torch.bfloat16 if settings.precision == "bfloat16" else settings.weight_dtype,
        )

    @property
    def narrow(self) -> int:
        """Bytes of a number between matrix products."""
        return self.dtype.itemsize

    @property
    def stream(self) -> int:
        """The stream and its norm."""
        return self.hidden * (self.wide + self.narrow)

    @property
    def one_hot(self) -> int:
        """The inputs of the embedding and of its norm, where those are matrix products."""
        return (self.wide + self.narrow) * self.vocab_size if self.vocab_size <= ONE_HOT_VOCABULARY else 0

    def kept(self) -> float:
        """What stays until the backward pass: what the norm before each block keeps, the blocks and the head."""
        attention, mlp = self.blocks
        blocks = attention * (self.norm() + self.attention()) + mlp * (self.norm() + self.mlp())
        decoder = self.decoders * (self.stream + self.narrow * self.hidden)
        return blocks + self.norm() + self.logits() + self.one_hot + decoder + 4 * 8  # tokens and targets are int64

    def norm(self) -> float:
        """The stream and its norm."""
        return self.stream

    def attention(self) -> float:
        """Queries, keys and values before and after the rotation, the mixture and the sums of its weights."""
        return self.narrow * 7 * self.hidden + 4 * self.heads

    def mlp(self) -> float:
        """Both halves, the activation and the product."""
        return self.narrow * 4 * self.inner

    def logits(self) -> float:
        """The log-probabilities."""
        return self.wide * self.vocab_size

    def passing(self) -> float:
        """The largest intermediates of the backward pass: gradients within one block, or of the logits."""
        attention, mlp = self.blocks
        block = max(7 * self.hidden if attention else 0, 4 * self.inner if mlp else 0)
        head = self.vocab_size * (2 * self.wide + self.narrow)
        return 4 * self.hidden * self.wide + max(block * self.narrow, head)

    def judging(self) -> float:
        """The largest intermediates of a forward pass alone."""
        return self.passing()


class _Fused(_Plain):
    """Bytes of one token, as the kernels take them; PyTorch's where a kernel does not fit."""

    def norm(self) -> float:
        """The normalised stream and its root."""
        return self.narrow * self.hidden + 4

    def attention(self) -> float:
        """What the kernel keeps of its input, and the mixture."""
        return self._of_heads[0] + self.narrow * self.hidden if self._of_heads else super().attention()

    def mlp(self) -> float:
        """Nothing of the inner width in one kernel; otherwise both halves and the product."""
        return 0.0 if self._whole_mlp else self.narrow * 3 * self.inner

    def logits(self) -> float:
        """Themselves, and their sum."""
        from composer_search.population.kernels.cross_entropy import LARGEST

        own = self.narrow * self.vocab_size + 4
        return own if self.vocab_size <= LARGEST else own + super().logits()

    def passing(self) -> float:
        """The stream's gradient before and after a block, and the block's own or the logits'; or two streams."""
        attention, mlp = self.blocks
        within = self._of_heads[1] if self._of_heads else self.narrow * 3 * self.hidden
        block = max(
            self.narrow * 4 * self.hidden + within if attention else 0,
            self.narrow * (self.hidden + (3 if self._whole_mlp else 6) * self.inner) if mlp else 0,
        )
        return max(2 * self.narrow * self.hidden + max(block, self._head), 2 * self.stream)

    def judging(self) -> float:
        """The stream before and after a block, and what the block computes; or the logits, and counts of tokens."""
        attention, mlp = self.blocks
        turned = self._of_heads[0] if self._of_heads else self.narrow * 6 * self.hidden
        block = max(
            self.narrow * 4 * self.hidden + turned if attention else 0,
            self.narrow * (self.hidden + (0 if self._whole_mlp else 3 * self.inner)) if mlp else 0,
        )
        return 2 * self.stream + max(block, self._head) + 8 * 8

    @property
    def _head(self) -> float:
        """Logits without and with their bias, or with their gradient."""
        return 2 * self.narrow * self.vocab_size + self.logits()

    @property
    def _of_heads(self) -> tuple[float, float] | None:
        """What the attention kernels keep, and what their backward pass takes; None where PyTorch's own run."""
        from composer_search.population.kernels.attention import form, takes

        width = self.hidden // self.heads
        if not takes(self.length, width):
            return None
        kept, within = form(self.length, self.dtype).head_bytes(self.length, width, self.dtype)
        return self.heads * kept, self.heads * within

    @property
    def _whole_mlp(self) -> bool:
        from composer_search.population.kernels.mlp import fits
        from composer_search.population.operations import WHOLE_MLP

        return WHOLE_MLP and fits(self.dtype, self.hidden, self.inner)
