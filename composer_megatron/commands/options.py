"""What several commands take: options given often, and sources that are a text or a file."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from tyro.conf import UseAppendAction

from composer_megatron.architecture import Architecture
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import read_json
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape

type Several = UseAppendAction[tuple[str, ...]]
"""An option that may be given several times."""


def multiply_on_one_thread() -> None:
    """Have NumPy, unless it is loaded already, multiply on one thread: the matrices of a pipeline's cut are too small.

    On two cores the search for a cut then takes less than half the processor time. What the user has set stands.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def shell_words(flags: str) -> tuple[str, ...]:
    """The flags in a text that is quoted as for a shell.

    Raises:
        UsageError: If its quotes do not match.
    """
    try:
        return tuple(shlex.split(flags))
    except ValueError as error:
        raise UsageError(f"--megatron-flags {flags!r}: {error}; quote it as for a shell") from None


def read_sequence(source: str) -> CompositeSequence:
    """A sequence, from text or from the ``sequence`` of a JSON file."""
    path = Path(source)
    if path.suffix != ".json":
        return CompositeSequence.parse(source)
    text = read_json(path, "an aggregate or an architecture").get("sequence")
    if not isinstance(text, str):
        raise ComposerError(f"{path} holds no sequence; expected an aggregate.json or an architecture file")
    return CompositeSequence.parse(text)


def read_architecture(source: str, shape: str | None) -> Architecture:
    """An architecture file, or a sequence with a shape."""
    if Path(source).suffix == ".json":
        if shape is not None:
            raise UsageError(f"--shape {shape} beside {source}: an architecture file has its own shape")
        return Architecture.load(Path(source))
    if shape is None:
        raise UsageError(f"{source!r} is a sequence: add --shape, or give an architecture file (*.json)")
    return Architecture(CompositeSequence.parse(source), load_shape(shape))


def read_overrides(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE options as a table: numbers and yes or no as such, several values between commas as a list."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise UsageError(f"--override {pair!r}; expected NAME=VALUE, such as epochs=50")

    def read(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:  # a word
            return text

    split = ((name, value.split(",")) for name, _, value in (pair.partition("=") for pair in pairs))
    return {name: read(values[0]) if len(values) == 1 else [read(value) for value in values] for name, values in split}


def read_named(pairs: tuple[str, ...], option: str) -> dict[str, Path]:
    """NAME=PATH options as a table."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise UsageError(f"{option} {pair!r}; expected NAME=PATH, such as composite=runs/composite")
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}
