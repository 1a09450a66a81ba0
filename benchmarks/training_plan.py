"""In which order the training benchmark measures what was asked for, and how much time each workload gets."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from training_models import Workload, architectures, workload
from training_worker import PLAIN

from composer_megatron.architecture import Architecture
from composer_megatron.backend import check_names
from composer_megatron.errors import ComposerError, UsageError

_MOST_ON_A_CPU = 100_000_000
"""Weights of a model whose steps one can wait for without a GPU."""

_LEAST = {"step_tokens": 1, "micro_tokens": 1, "rounds": 0, "warmup": 0, "steps": 1, "together": 1, "budget": 0}


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
    """Everything asked for, in order; the lengths of the same contenders follow on each other.

    Raises:
        UsageError: If an option asks for what there is not.
        ComposerError: If there is no GPU, and a model needs one.
    """
    check(options)
    found = []
    for shape in options.shapes:
        models = architectures(shape, options.models, options.stack, options.stretch)
        largest = max(each.params_total for each in models.values())
        if not torch.cuda.is_available() and largest > _MOST_ON_A_CPU:
            raise ComposerError(
                f"no GPU was found, and {shape} has {largest / 1e6:,.0f} M weights; --shapes tiny --lengths 64 tries "
                "the benchmark out without one"
            )
        asked = [each.partition(":") for each in options.backends]
        pairs = [(model, name) for name, _, only in asked for model in models if only in ("", model)]
        together = [tuple(pairs[start : start + options.together]) for start in range(0, len(pairs), options.together)]
        found += [Heat(models, some, seq_len) for some in together for seq_len in options.lengths]
    return found


def check(options: argparse.Namespace) -> None:
    """Refuse what no contender can be made of, before any is started.

    Raises:
        UsageError: Saying which option, and what it may be.
    """
    given = [("lengths", length, 1) for length in options.lengths]
    given += [(name, getattr(options, name), least) for name, least in _LEAST.items()]
    for name, value, least in given:
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    for asked in options.backends:
        backend, colon, model = asked.partition(":")
        if colon and model not in options.models:
            raise UsageError(f"--backends {asked}: after the colon expected one of {', '.join(options.models)}")
        if backend not in PLAIN:
            _check_backend(backend)


def _check_backend(backend: str) -> None:
    name, *parts = backend.split("+")
    if not all("=" in part for part in parts):
        raise UsageError(f"--backends {backend}: expected NAME or NAME+PART=PLAYER, as in composer+loss=linear")
    chosen = dict(part.split("=", 1) for part in parts)
    chosen.pop("fp8", None)  # Megatron's recipe for TransformerEngine
    try:
        check_names(name, chosen)
    except UsageError as error:
        plain = "" if parts else f"; plain PyTorch is {' or '.join(PLAIN)}"
        raise UsageError(f"--backends {backend}: {error}{plain}") from None


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
