"""Stacking against stretching: the two ways to grow a sequence, side by side with exact counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape
from composer_search.evidence.exhibit import Cell, Exhibit
from composer_search.extrapolate import Match, Method, extrapolate


@dataclass(frozen=True)
class Growth:
    """A sequence's grown architectures and their baseline.

    Attributes:
        sequence: The small sequence.
        shape: The target's widths.
        seq_len: Tokens of a sequence, for the FLOPs.
        architectures: By name: stacked and stretched by the paper's rule and at matched parameters, and the baseline.
        losses: Held-out bits per byte of those that were trained, a list a name: one for each run.
    """

    sequence: CompositeSequence
    shape: Shape
    seq_len: int
    architectures: Mapping[str, Architecture]
    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        models = {
            name: each.summary(self.seq_len) | {"bits_per_byte": list(self.losses.get(name, ()))}
            for name, each in self.architectures.items()
        }
        return {"sequence": str(self.sequence), "shape": self.shape.name, "seq_len": self.seq_len, "models": models}

    def exhibit(self) -> Exhibit:
        """The architectures as a table."""
        columns: tuple[str, ...] = ("Model", "Sequence", "Blocks", "A", "M", "Parameters, no embeddings")
        columns += (f"Training FLOPs a token at {self.seq_len:,}", "KV bytes a token")
        columns += ("Bits per byte",) if self.losses else ()
        rows = tuple(self._row(name, each) for name, each in self.architectures.items())
        title = f"{self.sequence.notation} grown to shape {self.shape.name}"
        return Exhibit(title, columns, rows, tuple(self._findings()))

    def _row(self, name: str, architecture: Architecture) -> tuple[Cell, ...]:
        counts = architecture.summary(self.seq_len)
        keys = ("blocks", "attention", "mlp", "params_non_embedding", "flops_per_token", "kv_bytes_per_token")
        losses = self.losses.get(name)
        measured = (", ".join(f"{loss:.4f}" for loss in losses) if losses else None,) if self.losses else ()
        return name, architecture.sequence.notation, *(counts[key] for key in keys), *measured

    def _findings(self) -> list[str]:
        baseline = self.architectures["baseline"].params_non_embedding
        words = []
        for name, each in self.architectures.items():
            if name == "baseline":
                continue
            excess = 100 * (each.params_non_embedding / baseline - 1)
            shape = "in one run of each primitive" if _degenerate(each.sequence) else f"{len(each.sequence.runs)} runs"
            words.append(f"{name}: {excess:+.2f} % parameters against the baseline, {shape}.")
        if not self.losses:
            words.append("Counted, not measured: no training run was given, so nothing is said about quality.")
        elif max(map(len, self.losses.values())) == 1:
            words.append("One run a model: how much another seed would change the losses was not measured.")
        return words


def grow_both(
    sequence: CompositeSequence,
    shape: Shape,
    *,
    seq_len: int = 4096,
    runs: Sequence[tuple[Architecture, float]] = (),
) -> Growth:
    """Stack and stretch a sequence to a shape.

    Args:
        sequence: The small sequence.
        shape: The target.
        seq_len: Tokens of a sequence, for the FLOPs.
        runs: Trained architectures and their held-out bits per byte.

    Raises:
        UsageError: If the sequence is bigger than the target already, or a run is of none of the architectures.
    """
    architectures: dict[str, Architecture] = {}
    for match in get_args(Match):
        for method in get_args(Method):
            name = f"{_PAST[method]}{', parameters matched' if match == 'parameters' else ''}"
            architectures[name] = extrapolate(sequence, shape, method=method, match=match)
    architectures["baseline"] = architectures["stacked"].baseline()
    losses: dict[str, tuple[float, ...]] = {}
    for trained, loss in runs:
        names = [name for name, each in architectures.items() if each == trained]
        if not names:
            known = ", ".join(each.sequence.notation for each in architectures.values())
            problem = f"a run trained {trained.sequence.notation} at shape {trained.shape.name}"
            raise UsageError(f"{problem}; expected one of {known} at shape {shape.name}")
        for name in names:
            losses[name] = (*losses.get(name, ()), loss)
    return Growth(sequence, shape, seq_len, architectures, losses)


_PAST: Mapping[Method, str] = {"stack": "stacked", "stretch": "stretched"}


def _degenerate(sequence: CompositeSequence) -> bool:
    return len(sequence.runs) <= len(sequence.counts)
