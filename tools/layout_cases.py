"""What `compare_layouts` compares: parallel layouts as text, one comparison, and its result."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, Self

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.planner.cut import equal_counts
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

SHAPE = Shape(
    name="compare",
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=64,
    tied_embeddings=True,
    baseline_pairs=1,
    init_std=0.2,  # large: attention must matter to the loss
    window=5,  # shorter than the sequences
)


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of a run, and how its pipeline is cut; experts are spread over the data-parallel ranks."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    cut: str = "equal"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read a layout such as ``TP2+SPxPP2@uneven``.

        Raises:
            UsageError: If the text is none.
        """
        sizes, _, cut = text.partition("@")
        found: dict[str, Any] = {"cut": cut or "equal"}
        for part in sizes.split("x"):
            match = re.fullmatch(r"(TP|PP|VPP|CP|DP|EP)([1-9]\d*)(\+SP|\+DO)?", part)
            if match is None:
                raise UsageError(
                    f"layout {text!r}: {part!r} is none of TP2, TP2+SP, PP4, VPP2, CP2, DP2+DO and the like"
                )
            found[match[1].lower()] = int(match[2])
            found |= {"+SP": {"sequence_parallel": True}, "+DO": {"distributed_optimizer": True}}.get(match[3], {})
        return cls(**found)

    @property
    def world_size(self) -> int:
        """Processes that it takes."""
        return self.tp * self.pp * self.cp * self.dp

    def stages(self, blocks: int) -> list[int]:
        """Block counts of the stages, in order; the uneven cut leaves stages in the middle (or the first) empty."""
        count = self.pp * self.vpp
        if self.cut == "equal":
            return equal_counts(blocks, count)
        if self.cut == "uneven":
            last = max(1, blocks // 3)
            return [blocks - last, *[0] * (count - 2), last]
        return [int(number) for number in self.cut.split(",")]


@dataclass(frozen=True)
class Case:
    """One comparison to make."""

    sequence: str
    layout: str
    tied: bool = True
    backend: str = "local"
    dtype: str = "float64"

    @property
    def architecture(self) -> Architecture:
        """What is computed."""
        return Architecture(CompositeSequence.parse(self.sequence), replace(SHAPE, tied_embeddings=self.tied))

    @property
    def backend_parts(self) -> tuple[str, dict[str, str]]:
        """The backend's name and the parts that others play: ``composer,loss=linear`` names one such part."""
        name, *parts = self.backend.split(",")
        return name, dict(part.split("=") for part in parts)

    @property
    def reference(self) -> Case:
        """The same in one process."""
        return replace(self, layout="TP1")

    @property
    def reference_name(self) -> str:
        """A file name for the reference."""
        return f"{self.sequence}-{'tied' if self.tied else 'untied'}-{self.backend}-{self.dtype}"


@dataclass(frozen=True)
class Result:
    """How far a layout is from one process.

    Attributes:
        case: What was compared.
        gradient: Largest over all tensors of max|difference| / max|reference|.
        tensor: Which tensor that was.
        loss: Largest relative difference of a micro-batch's loss.
        checkpoint: Whether the saved checkpoint holds the reference's tensors, each whole and with equal bits.
    """

    case: Case
    gradient: float = 0.0
    tensor: str = ""
    loss: float = 0.0
    checkpoint: bool = True

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read what `asdict` and JSON made of a result."""
        values = json.loads(line)
        return cls(**(values | {"case": Case(**values["case"])}))

    def within(self, tolerance: float) -> bool:
        """Whether all that the layout gave is the reference's, to a relative tolerance."""
        return self.checkpoint and max(self.gradient, self.loss) <= tolerance
