"""Measured times of each kind of block on this machine, to cut a pipeline from instead of a prediction.

Each kind of block runs as a pipeline stage of its own, forward and backward over one micro-batch, in one process. The
embedding and the loss head are what a stage takes longer with them than without.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_megatron.architecture import Architecture
from composer_megatron.env import device_name, environment
from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import read_json, write_json
from composer_megatron.layout import Layout
from composer_megatron.roofline import Passes, UnitTimes
from composer_megatron.shape import Shape

_FORMAT = "composer-profile"
_VERSION = 1
_WITHOUT_COST = ("name", "baseline_pairs", "rope_scaling_factor")
"""Fields of a shape that change no time of a block."""


@dataclass(frozen=True)
class Profile:
    """Measured seconds of passes over a micro-batch, on one rank that shares nothing.

    Attributes:
        device: Where they were measured.
        dtype: Type of weights and activations.
        shape: The widths.
        seq_len: Tokens in a sequence.
        micro_batch_size: Sequences in the micro-batch.
        blocks: Seconds of a block of each primitive, by its letter.
        embedding: Seconds of the embedding.
        head: Seconds of final norm, output layer and loss.
        environment: Versions and devices.
    """

    device: str
    dtype: str
    shape: Shape
    seq_len: int
    micro_batch_size: int
    blocks: dict[str, Passes]
    embedding: Passes
    head: Passes
    environment: dict[str, Any]

    def times(self, architecture: Architecture, layout: Layout) -> UnitTimes:
        """The times from which to cut that architecture for that layout.

        Raises:
            UsageError: If they were measured for something else.
        """
        own, asked = self.shape.as_dict(), architecture.shape.as_dict()
        differing = [name for name in own if name not in _WITHOUT_COST and own[name] != asked[name]]
        if differing:
            name = differing[0]
            raise UsageError(
                f"the profile is of shape {self.shape.name!r} with {name}={own[name]}, the plan's is "
                f"{architecture.shape.name!r} with {name}={asked[name]}: measure it with composer-megatron profile"
            )
        wanted = {
            "seq_len": (self.seq_len, layout.seq_len),
            "micro_batch_size": (self.micro_batch_size, layout.micro_batch_size),
            "tensor_parallel": (1, layout.tensor_parallel),
            "context_parallel": (1, layout.context_parallel),
        }
        for name, (measured, planned) in wanted.items():
            if measured != planned:
                raise UsageError(f"the profile was measured with {name}={measured}, the plan has {name}={planned}")
        missing = [letter for letter in architecture.sequence.counts if letter not in self.blocks]
        if missing:
            letters = "".join(architecture.sequence.counts)
            raise UsageError(f"the profile has no times of {', '.join(missing)}: profile with --primitives {letters}")
        again = layout.recompute == "full"
        if layout.recompute == "selective":
            raise UsageError("a profile has no times of core attention alone: plan for recompute none or full")
        blocks = {
            name: Passes(each.forward, each.backward + again * each.forward) for name, each in self.blocks.items()
        }
        return UnitTimes(blocks, self.embedding, self.head, f"measured on {self.device}", predicted=False)

    def as_dict(self) -> dict[str, Any]:
        """The profile as JSON values; `load` reads them back."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "device": self.device,
            "dtype": self.dtype,
            "shape": self.shape.as_dict(),
            "seq_len": self.seq_len,
            "micro_batch_size": self.micro_batch_size,
            "seconds": {
                "blocks": {letter: passes._asdict() for letter, passes in self.blocks.items()},
                "embedding": self.embedding._asdict(),
                "head": self.head._asdict(),
            },
            "environment": self.environment,
        }

    def save(self, path: Path) -> None:
        """Write the profile, in one step."""
        write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile.

        Raises:
            FileError: If it is missing, no profile, or incomplete.
        """
        values = read_json(path, "a profile")
        if values.get("format") != _FORMAT or values.get("version") != _VERSION:
            raise FileError(f'{path} is no profile: expected "format": "{_FORMAT}", "version": {_VERSION}')
        try:
            seconds = values["seconds"]
            return cls(
                device=str(values["device"]),
                dtype=str(values["dtype"]),
                shape=Shape.from_dict(values["shape"], where=str(path)),
                seq_len=int(values["seq_len"]),
                micro_batch_size=int(values["micro_batch_size"]),
                blocks={letter: _passes(each) for letter, each in seconds["blocks"].items()},
                embedding=_passes(seconds["embedding"]),
                head=_passes(seconds["head"]),
                environment=dict(values.get("environment", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise FileError(f"{path} is no whole profile: {problem}; measure again") from None


def measure(shape: Shape, letters: str = "AM", *, seq_len: int, micro_batch_size: int = 1, repeats: int = 5) -> Profile:
    """Time each kind of block, the embedding and the loss head on this machine.

    Args:
        shape: The widths.
        letters: The primitives to time.
        seq_len: Tokens in a sequence.
        micro_batch_size: Sequences in the micro-batch.
        repeats: Timed passes of each; the median counts, after two that do not.

    Raises:
        UsageError: If a number is below one.
        ComposerError: If Megatron-core is missing.
    """
    for name, value in (("seq_len", seq_len), ("micro_batch_size", micro_batch_size), ("repeats", repeats)):
        if value < 1:
            raise UsageError(f"{name}={value}; expected at least 1")
    from composer_megatron.checkpoint import group_of_one
    from composer_megatron.planner.profile_passes import PassTimer

    timer = PassTimer(shape, seq_len, micro_batch_size)
    with group_of_one():
        blocks = {letter: _median(timer.passes(letter), repeats) for letter in dict.fromkeys(letters)}
        quickest = min(blocks, key=lambda letter: sum(blocks[letter]))  # whose noise is least
        with_embedding = _median(timer.passes(quickest, embedding=True), repeats)
        with_head = _median(timer.passes(quickest, head=True), repeats)
    return Profile(
        device=device_name(),
        dtype=timer.dtype_name,
        shape=shape,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        blocks=blocks,
        embedding=_more(with_embedding, blocks[quickest]),
        head=_more(with_head, blocks[quickest]),
        environment=environment(),
    )


def _passes(values: dict[str, Any]) -> Passes:
    passes = Passes(float(values["forward"]), float(values["backward"]))
    if not all(0 <= seconds < float("inf") for seconds in passes):
        raise ValueError(f"seconds of {passes.forward} and {passes.backward}")
    return passes


def _more(longer: Passes, shorter: Passes) -> Passes:
    """The difference, not below nothing: short passes differ by noise."""
    return Passes(*(max(0.0, a - b) for a, b in zip(longer, shorter, strict=True)))


def _median(run: Callable[[], Passes], repeats: int) -> Passes:
    for _ in range(2):
        run()
    timed = [run() for _ in range(repeats)]
    return Passes(*(statistics.median(seconds) for seconds in zip(*timed, strict=True)))
