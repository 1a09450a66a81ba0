"""Documents from files: plain text is one document a file, jsonl one a line; either may be packed as .gz or .xz.

Everything is UTF-8. A file that cannot be read, unpacked or decoded is a `FileError` that names the file, and the line
of a jsonl; nothing is skipped in silence but documents of white space alone.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import naming

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
"""What is taken from a folder, also with .gz or .xz behind it. A file that is named itself may end in anything."""

_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}

# Tests are as large as the rest of the library and partly absent elsewhere; encodings and pydoc_data are generated
# tables and one huge page; the last ones are written by an installation and hold its paths.
_LIBRARY_FOLDERS_LEFT_OUT = ("test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages")
_LIBRARY_NAMES_LEFT_OUT = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "__pycache__")


def standard_library_sources() -> list[Path]:
    """The running Python's own library: its .py files in the order of their relative paths.

    Without tests, generated tables (``encodings``, ``pydoc_data``), installed packages and files that an installation
    writes: about 560 files and 9.4 MB in Python 3.12, text that every machine has.

    Raises:
        FileError: If this Python has no library sources, as when they are packed in a zip.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted(path.relative_to(root).parts for path in root.rglob("*.py") if path.is_file())
    kept = [root.joinpath(*parts) for parts in found if not any(map(_left_out, parts))]
    if not kept:
        raise FileError(f"this Python keeps no library sources under {root}; name text files instead")
    return kept


def _left_out(part: str) -> bool:
    return part in _LIBRARY_FOLDERS_LEFT_OUT or part.startswith(_LIBRARY_NAMES_LEFT_OUT)


def source_files(paths: Iterable[Path]) -> list[Path]:
    """The files that `paths` name, each once: files as they are, folders walked in sorted order.

    From a folder come the files that end in `TEXT_SUFFIXES`; hidden folders and files are passed over, symbolic links
    to folders are not followed.

    Raises:
        UsageError: If no path is given.
        FileError: If a path does not exist, a folder cannot be read or holds no text.
    """
    found: dict[Path, Path] = {}
    given = list(paths)
    if not given:
        raise UsageError("no text is named; give files or folders")
    for path in given:
        if not path.exists():
            raise FileError(f"no such file or folder: {path}")
        if path.is_dir():
            inside = _walk(path)
            if not inside:
                raise FileError(f"{path} holds no text: expected files ending in {', '.join(TEXT_SUFFIXES)} (.gz, .xz)")
        elif path.is_file():
            inside = [path]
        else:
            raise FileError(f"{path} is neither a file nor a folder")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _walk(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise FileError(f"cannot read {error.filename}: {error.strerror}") from error

    files: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(here, name) for name in sorted(names) if not name.startswith(".")]
    return [file for file in files if _kind(file) in TEXT_SUFFIXES]


def _kind(path: Path) -> str:
    """The suffix under any .gz or .xz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def read_documents(paths: Iterable[Path], *, field: str = "text") -> Iterator[str]:
    """The documents of files and folders, in order, read as they are asked for.

    Args:
        paths: Files and folders, as in `source_files`.
        field: The field of a jsonl line that holds the text.

    Yields:
        Documents with at least one character that is no white space; line ends stay as they are, a byte-order mark
        at the start of a file does not.

    Raises:
        FileError: If a file is missing, unreadable, cut off, binary, not UTF-8, or a line of a jsonl holds no text in
            `field`.
    """
    for path in source_files(paths):
        yield from (text for _, text in read_records(path, field=field) if is_document(text))


def is_document(text: str) -> bool:
    """Whether a text has anything but white space."""
    return bool(text) and not text.isspace()


def has_lines(path: Path) -> bool:
    """Whether each line of the file is a document: a jsonl, packed or not."""
    return _kind(path) == ".jsonl"


def is_packed(path: Path) -> bool:
    """Whether the file has to be unpacked, so that its middle is reached by reading what comes before."""
    return path.suffix.lower() in _PACKED


def read_records(
    path: Path, *, field: str = "text", start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, str]]:
    """The texts of one file, those of white space included, each with the byte of the unpacked file that it begins at.

    Args:
        path: A file.
        field: The field of a jsonl line that holds the text.
        start: Of a jsonl, only the lines that begin at this byte or later.
        stop: Of a jsonl, only the lines that begin before this byte; None for all.

    Raises:
        FileError: As `read_documents`.
    """
    for place, data in raw_records(path, start=start, stop=stop):
        yield place, parse_record(path, place, data, field=field)


def raw_records(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """What `read_records` reads, before it looks into the bytes; lines of white space are left out."""
    with _opened(path) as file:
        if not has_lines(path):
            if start == 0:
                yield 0, file.read()
            return
        if start:
            file.seek(start - 1)
            file.readline()
        place = file.tell()
        for line in file:
            if stop is not None and place >= stop:
                return
            if not line.isspace():
                yield place, line
            place += len(line)


def parse_record(path: Path, place: int, data: bytes, *, field: str = "text") -> str:
    """The text in the bytes that begin at `place` of a file, as `raw_records` tells them."""
    if has_lines(path):
        return _text_field(data, field, _line_at(path, place))
    return _decode(data, lambda: str(path))


def read_at(path: Path, places: Iterable[int], *, field: str = "text") -> Iterator[str]:
    """The texts of one file that begin at these bytes, in growing order, as `read_records` tells them."""
    with _opened(path) as file:
        if not has_lines(path):
            yield from (_decode(file.read(), lambda: str(path)) for _ in places)
            return
        here = 0
        for place in places:
            if place != here:
                file.seek(place)
            line = file.readline()
            here = place + len(line)
            yield _text_field(line, field, _line_at(path, place))


def _line_at(path: Path, place: int) -> Callable[[], str]:
    """Says which line of a file begins at that byte; lines are counted only where an error is to name one."""

    def where() -> str:
        with _opened(path) as file:
            lines = 0
            while place > file.tell() and file.readline():
                lines += 1
        return f"{path}, line {lines + 1}"

    return where


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """`path` for reading bytes, unpacked; what goes wrong inside becomes a `FileError` about `path`."""
    suffix = path.suffix.lower()
    try:
        with naming(path, "read"), _PACKED.get(suffix, open)(path, "rb") as file:
            yield file
    except EOFError:
        raise FileError(f"{path} is cut off: the {suffix} data ends too early; get the file again") from None
    except (lzma.LZMAError, zlib.error) as error:
        raise FileError(f"{path} is no sound {suffix} file: {error}; get the file again") from None


def _decode(data: bytes, where: Callable[[], str]) -> str:
    zero = data.find(b"\0")
    if zero >= 0:
        raise FileError(f"{where()}: binary data, not text: byte {zero} is zero; leave it out, or convert it to UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} (0x{error.object[error.start]:02x}) is no UTF-8"
        raise FileError(f"{where()}: not text in UTF-8: {problem}; leave it out, or convert it") from None


def _text_field(line: bytes, field: str, where: Callable[[], str]) -> str:
    try:
        value = json.loads(_decode(line, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{where()}: not JSON: {error}; mend or remove the line") from None
    if not isinstance(value, dict):
        raise FileError(f"{where()}: expected a JSON object, found {type(value).__name__}")
    if field not in value:
        raise FileError(f"{where()}: no field {field!r}; its fields: {', '.join(map(repr, value)) or 'none'}")
    text = value[field]
    if not isinstance(text, str):
        raise FileError(f"{where()}: field {field!r} holds {type(text).__name__}; expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{where()}: character {error.start} of {field!r} is half a surrogate pair, no text") from None
    return text
