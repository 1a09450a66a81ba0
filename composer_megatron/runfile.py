"""``run.json``: the file in a run folder from which the run can be repeated, and which says on what it ran.

A start of the run is one entry: the arguments, the flags that Megatron got, the text by its checksums, versions and
machine. A run that goes on with the same of all that adds none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from composer_megatron.env import environment
from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import read_json, write_json

NAME = "run.json"
_FORMAT, _VERSION = "composer-run", 1
_FROM_THE_FOLDER = {"--architecture": "architecture.json", "--text-tokenizer": "tokenizer.json"}
"""Files that a run folder has copies of."""
_VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
)
"""Environment variables that numbers may depend on."""


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        arguments: Those of `composer_megatron.train` but for the files that the run folder has, paths in full.
        processes: How many ran.
        megatron: All flags that Megatron got; to look at.
        text: What tells the text from another, as `Mixture.checksums` or `RawMixture.checksums` say.
        environment: Versions and devices, and variables that numbers may depend on.
    """

    arguments: tuple[str, ...]
    processes: int
    megatron: tuple[str, ...]
    text: tuple[dict[str, Any], ...]
    environment: dict[str, Any]


def current_environment() -> dict[str, Any]:
    """What a start says about where it runs."""
    return environment() | {"variables": {name: os.environ.get(name) for name in _VARIABLES}}


def portable_arguments(argv: Sequence[str]) -> tuple[str, ...]:
    """A training run's arguments without its folder and what that has copies of; the others' paths in full."""
    kept: list[str] = []
    for flag, value in _pairs(argv):
        if flag in ("--run-dir", "--debug", *_FROM_THE_FOLDER):
            continue
        kept += [flag] if value is None else [flag, str(Path(value).resolve()) if flag == "--text" else value]
    return tuple(kept)


def _pairs(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Our flags of one value with that value, in whichever form they were given; all else word by word."""
    ours = ("--run-dir", "--text", *_FROM_THE_FOLDER)
    words = list(argv)
    pairs: list[tuple[str, str | None]] = []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ours and equals:
            pairs.append((flag, value))
        elif word in ours and words:
            pairs.append((word, words.pop(0)))
        else:
            pairs.append((word, None))
    return pairs


def start_of(argv: Sequence[str], processes: int, megatron: Sequence[str], text: Sequence[dict[str, Any]]) -> Start:
    """A start here and now.

    Args:
        argv: The arguments of `composer_megatron.train`.
        processes: How many run.
        megatron: All flags that Megatron gets.
        text: The checksums of the text.
    """
    return Start(portable_arguments(argv), processes, tuple(megatron), tuple(text), current_environment())


def record(run_dir: Path, start: Start) -> None:
    """Add a start to the run's file, unless it is the last one again."""
    path = run_dir / NAME
    starts = load_starts(path) if path.exists() else []
    if not starts or starts[-1] != start:
        entries = [asdict(each) for each in (*starts, start)]
        write_json(path, {"format": _FORMAT, "version": _VERSION, "starts": entries})


def load_starts(path: Path) -> list[Start]:
    """All starts of a run, the first one first; at least one.

    Raises:
        FileError: If there is no such file, or it is none of a run.
    """
    values = read_json(path, "a run file")
    if values.get("format") != _FORMAT or values.get("version") != _VERSION:
        wanted = f'"format": "{_FORMAT}", "version": {_VERSION}'
        raise FileError(f"{path} is no run file of this program: expected {wanted}; give the run.json of a run folder")
    try:
        starts = [
            Start(
                tuple(map(str, entry["arguments"])),
                int(entry["processes"]),
                tuple(map(str, entry["megatron"])),
                tuple(entry["text"]),
                dict(entry["environment"]),
            )
            for entry in values["starts"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path}: a value is missing or of the wrong type: {error}; restore it") from None
    if not starts:
        raise FileError(f"{path} has no start to repeat; restore it")
    return starts


def repeated_arguments(path: Path) -> list[str]:
    """The arguments by which the first start of a run is made again; a run folder is to be added.

    Raises:
        FileError: If the file is bad, or lies in no run folder.
    """
    start = load_starts(path)[0]
    arguments = []
    for flag, name in _FROM_THE_FOLDER.items():
        file = path.absolute().parent / name
        needed = flag == "--architecture" or any("files" in text for text in start.text)
        if needed and not file.is_file():
            raise FileError(f"{file} is missing, which a run folder has beside its {NAME}; restore it")
        arguments += [flag, str(file)] if needed else []
    return [*arguments, *start.arguments]


def check_text(path: Path, text: Sequence[dict[str, Any]]) -> None:
    """See that the text is that of a run's first start.

    Raises:
        FileError: With what differs: a repetition on it would be another run.
    """
    then = load_starts(path)[0].text
    if len(then) != len(text):
        raise FileError(f"the run of {path} was trained on {len(then)} texts, and {len(text)} are given")
    for before, now in zip(then, text, strict=True):
        different = [name for name in before if name != "path" and before[name] != now.get(name)]
        if different:
            changes = ", ".join(different)
            problem = f"{now['path']} is not the text that the run of {path} was trained on: {changes} changed"
            raise FileError(f"{problem}; restore it, or start a run of its own without --repeat")


def differences(path: Path, processes: int) -> list[str]:
    """How a repetition here and now would differ from a run's first start, a line each; numbers may, too.

    Args:
        path: The run's file.
        processes: How many are to run.
    """
    starts = load_starts(path)
    lines = [] if starts[0].processes == processes else [f"{starts[0].processes} processes then, {processes} now"]
    before, now = _flat(starts[0].environment), _flat(current_environment())
    lines += [
        f"{name}: {before.get(name)} then, {now.get(name)} now"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]
    others = sum(start.arguments != starts[0].arguments for start in starts)
    if others:
        lines.append(f"the run was continued {others} times with other arguments; only the first ones are repeated")
    return lines


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name} ") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def expand(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """Put the arguments of a run in the place of ``--repeat FILE``; others that are given come after them and win.

    Returns:
        The arguments, and the run's file; None where nothing is to be repeated.

    Raises:
        UsageError: If it is to be repeated in its own folder, or in none.
        FileError: If the file is bad.
    """
    words = [
        word
        for argument in argv
        for word in (argument.split("=", 1) if argument.startswith("--repeat=") else [argument])
    ]
    if "--repeat" not in words:
        return list(argv), None
    place = words.index("--repeat")
    if place + 1 == len(words):
        raise UsageError(f"--repeat: expected a file: the {NAME} of a run folder")
    path, rest = Path(words[place + 1]), words[:place] + words[place + 2 :]
    if path.is_dir():
        path /= NAME
    run_dir = next((value for flag, value in _pairs(rest) if flag == "--run-dir"), None)
    if run_dir is None:
        raise UsageError(f"--repeat {path}: give --run-dir, too: the folder of the new run")
    if Path(run_dir).resolve() == path.resolve().parent:
        raise UsageError(f"--repeat {path}: --run-dir is that run's own folder; choose another one")
    return [*repeated_arguments(path), *rest], path
