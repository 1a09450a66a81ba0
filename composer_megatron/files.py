"""Reading and writing files so that nothing is lost and every failure names the file.

A whole file or folder is written beside its place and renamed; a log is appended line by line and a torn last line,
left by a killed process, is cut off when the log is opened again.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer_megatron.errors import FileError, UsageError


@contextlib.contextmanager
def naming(path: Path, doing: str) -> Iterator[None]:
    """Turn an `OSError` raised inside into a `FileError` that says what was being done to `path`."""
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot {doing} {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill, renamed to `path` at the end and removed on failure.

    Raises:
        UsageError: If `path` exists.
        FileError: If it cannot be made.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would replace a link instead of following it
    if os.path.lexists(path):
        raise UsageError(f"{path} exists; nothing is overwritten: choose another folder, or remove it")
    with naming(path, "make"):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        with naming(path, "write"):
            yield partial
            partial.chmod(0o755)
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: readers see the old file or the new one, never a part."""
    with naming(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`; `what` ("a study", "an architecture file", …) names it in errors."""
    if not path.is_file():
        raise FileError(f"{path} is no file: expected {what} in JSON")
    with naming(path, "read"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise FileError(f"{path} is not {what}: {where}: {error.msg}; restore it or make it again") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} is not {what}: expected a JSON object, found {type(value).__name__}")
    return value


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append `value` as one line to the log `path` and wait until it is on the disk.

    A line that could not be written whole (a full disk) is taken back, so that the log stays readable.
    """
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    with naming(path, "append to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(line)
                if written != len(line):
                    raise OSError(28, f"only {written} of {len(line)} bytes fitted; is the disk full?")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def read_json_lines(path: Path, *, repair: bool = False) -> list[dict[str, Any]]:
    """The objects of a line log, oldest first; an absent log is an empty one.

    A last line that is no whole JSON object was torn by a kill: it is left out, and cut from the file when `repair` is
    set. A bad line before the last one means another program wrote there: a `FileError`.
    """
    if not path.exists():
        return []
    with naming(path, "read"):
        lines = path.read_bytes().splitlines(keepends=True)
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            values.append(value)
        elif number < len(lines):
            raise FileError(f"{path}, line {number}: not a JSON object; remove or mend that line")
    kept = b"".join(lines[: len(values)])
    if repair and lines and (len(values) < len(lines) or not kept.endswith(b"\n")):
        with naming(path, "repair"), path.open("r+b") as file:
            file.truncate(len(kept))
            if kept and not kept.endswith(b"\n"):
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
    return values
