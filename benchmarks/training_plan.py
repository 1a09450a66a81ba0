"""In which order the training benchmark measures what was asked for, and how much time each workload gets."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from training_models import Workload, architectures, workload

from composer_megatron.architecture import Architecture


@dataclass(frozen=True)
class Heat:
    """Contenders that take turns on one workload.

    Attributes:
        models: Of their shape, by name, all that are compared there.
        pairs: Model and backend of each.
        seq_len: Tokens in a sequence.
    """

    models: dict[str, Architecture]
    pairs: tuple[tuple[str, str], ...]
    seq_len: int

    def workload(self, options: argparse.Namespace) -> Workload:
        """The step of all contenders, by the largest of the models."""
        largest = max(self.models.values(), key=lambda architecture: architecture.params_total)
        return workload(largest, self.seq_len, options.step_tokens, options.micro_tokens)


def heats(options: argparse.Namespace) -> list[Heat]:
    """Everything asked for, in order; the lengths of the same contenders follow on each other."""
    found = []
    for shape in options.shapes:
        models = architectures(shape, options.models, options.stack, options.stretch)
        pairs = [(model, backend) for backend in options.backends for model in models]
        together = [tuple(pairs[start : start + options.together]) for start in range(0, len(pairs), options.together)]
        found += [Heat(models, some, seq_len) for some in together for seq_len in options.lengths]
    return found


class Budget:
    """Seconds for everything, of which each workload gets an equal share of what is left when it begins."""

    def __init__(self, seconds: float, workloads: int) -> None:
        """Begin now."""
        self.seconds, self._left = seconds, workloads
        self._began = time.monotonic()
        self._share_ends = seconds

    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def next(self) -> None:
        """A workload begins."""
        self._share_ends = self.spent() + max(0.0, self.seconds - self.spent()) / self._left
        self._left -= 1

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether the workload's share lasts for that long."""
        return self.spent() + seconds <= self._share_ends
