"""What the training benchmark compares: the models of a shape, and the step at a sequence length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout
from composer_megatron.planner import memory
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape
from composer_search.extrapolate import extrapolate

MODELS = ("llama", "stacked", "stretched", "matched")
STACKED, STRETCHED = "2A4M", "2A5M2A3M1A3M"
"""The sequences that arXiv 2510.00379 stacks and stretches: 9A18M and 10A19M at 1b, 16A32M and 15A33M at 3b."""


@dataclass(frozen=True)
class Workload:
    """What a step is: `micro_batches` times `micro_batch` sequences of `seq_len` tokens."""

    seq_len: int
    micro_batch: int
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.seq_len * self.micro_batch * self.micro_batches

    def halved(self) -> Workload:
        """The same tokens in micro-batches of half as many sequences, or a few less where there was an odd number."""
        return Workload(self.seq_len, self.micro_batch // 2, 2 * self.micro_batches)


def architectures(
    shape_name: str, models: Sequence[str], stack: str = STACKED, stretch: str = STRETCHED
) -> dict[str, Architecture]:
    """The models of a shape by name; one that is the same as another is left out.

    ``matched`` is the stacked Composite with MLPs of such a width that it has as many weights as the Llama model.

    Args:
        shape_name: A preset or a JSON file.
        models: Names in `MODELS`.
        stack: The sequence that is stacked.
        stretch: The sequence that is stretched.
    """
    shape = load_shape(shape_name)

    def stacked() -> Architecture:
        return extrapolate(CompositeSequence.parse(stack), shape, method="stack")

    makers = {
        "llama": lambda: Architecture(CompositeSequence("AM" * shape.baseline_pairs), shape),
        "stacked": stacked,
        "stretched": lambda: extrapolate(CompositeSequence.parse(stretch), shape, method="stretch"),
        "matched": lambda: _matched(stacked()),
    }
    chosen: dict[str, Architecture] = {}
    for name in models:
        if name not in makers:
            raise UsageError(f"--models {name!r}: expected {', '.join(makers)}")
        made = makers[name]()
        if made not in chosen.values():
            chosen[name] = made
    return chosen


def _matched(composite: Architecture, step: int = 128) -> Architecture:
    shape, target = composite.shape, composite.baseline().matrix_parameters
    attention = (
        composite.matrix_parameters - composite.sequence.count("M") * 3 * shape.hidden_size * shape.ffn_hidden_size
    )
    exact = (target - attention) / (3 * shape.hidden_size * composite.sequence.count("M"))
    width = max(step, step * round(exact / step))
    if width == shape.ffn_hidden_size:
        return composite
    # The baseline of the changed shape is another: what it is compared with stays that of the original.
    changed = dataclasses.replace(shape, name=f"{shape.name}-ffn{width}", ffn_hidden_size=width)
    return Architecture(composite.sequence, changed, {"method": "stacked, MLP width matched", "of": shape.name})


def workload(architecture: Architecture, seq_len: int, step_tokens: int, micro_tokens: int | None) -> Workload:
    """The step at a sequence length: micro-batches of 16,384 tokens or what fits the GPU, one sequence at least."""
    fits = micro_tokens or _fitting_tokens(architecture, seq_len)
    micro_batch = max(1, fits // seq_len)
    return Workload(seq_len, micro_batch, max(1, round(step_tokens / (micro_batch * seq_len))))


def _fitting_tokens(architecture: Architecture, seq_len: int, most: int = 16_384) -> int:
    if not torch.cuda.is_available():
        return min(most, 2 * seq_len)
    total = torch.cuda.mem_get_info()[1]
    states = memory.state_bytes(architecture.params_total, Layout(seq_len=seq_len))
    kept = 2 * sum(PRIMITIVES[letter].saved_elements(architecture.shape) for letter in architecture.sequence)
    a_token = kept + 8 * architecture.shape.vocab_size
    while most > seq_len and 1.1 * states + most * a_token + 5e9 > total:
        most //= 2
    return most
