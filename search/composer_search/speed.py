"""How fast a grown architecture is predicted to run: from measured times of its blocks, or from a GPU's roofline.

A profile is what ``composer-megatron profile`` measures on a machine: the seconds of a block of each primitive, of the
embedding and of the loss head, forward and backward. Training throughput and prefill latency are sums of those.
Decoding reads every weight and all that a sequence has cached once a token, at batch 1: its latency is those bytes over
the memory's speed, which no profile holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_megatron.architecture import Architecture
from composer_megatron.layout import Layout
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.roofline import Passes, UnitTimes, get_device, predict
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

if TYPE_CHECKING:
    from composer_search.objectives import Target

_BYTES = 2
"""Of a weight and of a cached number, in 16-bit types."""


@dataclass(frozen=True)
class Measured:
    """Times measured on one machine, as far as a search needs them.

    Attributes:
        source: Where they were measured.
        micro_batch_size: Sequences in the passes that were timed.
        blocks: Seconds of a block of each primitive, by its letter.
        embedding: Seconds of the embedding.
        head: Seconds of final norm, output layer and loss.
    """

    source: str
    micro_batch_size: int
    blocks: Mapping[str, Passes]
    embedding: Passes
    head: Passes

    @classmethod
    def load(cls, path: Path | str, shape: Shape, seq_len: int, primitives: str) -> Measured:
        """Read a file of ``composer-megatron profile`` for targets of that shape and length.

        Raises:
            FileError: If it is missing, no profile, or incomplete.
            UsageError: If it was measured for something else, or lacks one of the primitives.
        """
        from composer_megatron.planner.profile import Profile

        profile = Profile.load(Path(path))
        layout = Layout(seq_len=seq_len, micro_batch_size=profile.micro_batch_size)
        letters = "".join(dict.fromkeys(f"AM{primitives}"))  # the Llama-style baseline is of A and M
        times = profile.times(Architecture(CompositeSequence(letters), shape), layout)
        return cls(times.source, profile.micro_batch_size, dict(times.blocks), times.embedding, times.head)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `from_dict` reads them back."""
        return {
            "source": self.source,
            "micro_batch_size": self.micro_batch_size,
            "blocks": {letter: list(passes) for letter, passes in self.blocks.items()},
            "embedding": list(self.embedding),
            "head": list(self.head),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measured:
        """The inverse of `as_dict`."""
        blocks = {letter: Passes(*passes) for letter, passes in values["blocks"].items()}
        ends = Passes(*values["embedding"]), Passes(*values["head"])
        return cls(values["source"], values["micro_batch_size"], blocks, *ends)


def throughput(architecture: Architecture, target: Target) -> float:
    """Tokens a second of training on one GPU: forward and backward, without the optimizer."""
    layout, passes = _passes(architecture, target)
    return layout.tokens / sum(each.forward + each.backward for each in passes)


def prefill(architecture: Architecture, target: Target) -> float:
    """Seconds of a forward pass over one sequence of the target's length."""
    layout, passes = _passes(architecture, target)
    return sum(each.forward for each in passes) / layout.micro_batch_size


def latency(architecture: Architecture, target: Target) -> float:
    """Seconds of a decoded token at batch 1, `target.seq_len` tokens being cached: bytes over the memory's speed.

    What is read once a token: the weights that it is multiplied with, the output layer, and the cache or state.
    """
    shape = architecture.shape
    elements = shape.vocab_size * shape.hidden_size
    for letter, number in architecture.sequence.counts.items():
        row = PRIMITIVES[letter]
        own = row.active_parameters(shape) + row.vector_parameters(shape) + row.state_elements(shape, target.seq_len)
        elements += number * own
    return _BYTES * elements / get_device(target.device).copy


def _passes(architecture: Architecture, target: Target) -> tuple[Layout, list[Passes]]:
    """The embedding, every block and the head, over a micro-batch of the layout."""
    measured = target.profile
    layout = Layout(seq_len=target.seq_len, micro_batch_size=measured.micro_batch_size if measured else 1)
    times: Measured | UnitTimes = measured or predict(architecture, layout, get_device(target.device))
    return layout, [times.embedding, times.head, *(times.blocks[letter] for letter in architecture.sequence)]
