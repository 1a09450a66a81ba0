"""The parts of a text folder in the making: neighbouring documents, encoded by one process into one file.

A part's file appears whole or not at all, and its checksums are read with it; so what a killed process has finished is
used again, and nothing else is.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from composer_megatron.files import naming
from composer_megatron.text.corpus import SPLITS, Corpus, Progress
from composer_megatron.text.pool import in_order
from composer_megatron.text.tokenizing import encode_documents

PART_BYTES = 1 << 24
"""Text in a part: some seconds of work for a process, and 100 to 200 MB of its memory."""


class Encoded(NamedTuple):
    """What a part holds of one side.

    Attributes:
        tokens: Of all documents, each closed by the end of text, in the type of the token files [tokens].
        lengths: Tokens of each document, int32 [documents].
        counts: How often each id occurs, int64 [rows].
        bytes: UTF-8 bytes of the documents.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    bytes: int


@dataclass(frozen=True)
class Encoder:
    """How documents become tokens.

    Attributes:
        tokenizer: The tokenizer's file.
        rows: Ids that there are.
        end_of_text: The id that closes a document.
        dtype: The type of the token files.
    """

    tokenizer: Path
    rows: int
    end_of_text: int
    dtype: str


class _Task(NamedTuple):
    documents: Corpus
    encoder: Encoder
    file: Path
    workers: int


def encode_parts(corpus: Corpus, encoder: Encoder, folder: Path, workers: int, report: Progress) -> list[Path]:
    """Encode all chosen documents, but for those in parts that `folder` has whole already.

    Args:
        corpus: The documents.
        encoder: How.
        folder: Where the parts are, made by the same call before.
        workers: Processes; the parts do not depend on them.
        report: Called after each part.

    Returns:
        The files of all parts, in order.
    """
    total, done = corpus.bytes, 0
    report("encode", 0, total)
    files: list[Path] = []
    left: list[tuple[Corpus, Path]] = []
    for number, documents in enumerate(corpus.parts(PART_BYTES)):
        files.append(folder / f"part-{number:06d}.npz")
        if read_part(files[-1]) is None:
            left.append((documents, files[-1]))
        else:
            done += documents.bytes
            report("encode", done, total)
    # A few huge documents are parts of their own: then the processes share each of these.
    inside = workers if len(left) < workers else 1
    tasks = (_Task(documents, encoder, file, inside) for documents, file in left)
    with contextlib.closing(in_order(_encode_part, tasks, 1 if inside > 1 else workers)) as finished:
        for task, _ in finished:
            done += task.documents.bytes
            report("encode", done, total)
    return files


def read_part(file: Path) -> dict[str, Encoded] | None:
    """What a part holds of each side; None if there is no such part, or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            parts = {name: {field: arrays[f"{name}.{field}"] for field in Encoded._fields} for name in SPLITS}
            return {
                name: Encoded(part["tokens"], part["lengths"], part["counts"], int(part["bytes"]))
                for name, part in parts.items()
            }
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _encode_part(task: _Task) -> None:
    encoder = task.encoder
    tokens: dict[str, list[np.ndarray]] = {name: [np.zeros(0, encoder.dtype)] for name in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    documents = encode_documents(task.documents.documents(), encoder.tokenizer, task.workers)
    with contextlib.closing(documents):
        for name, size, ids in documents:
            tokens[name].append(np.append(ids, np.int32(encoder.end_of_text)).astype(encoder.dtype))
            sizes[name] += size
    arrays: dict[str, np.ndarray] = {}
    for name in SPLITS:
        joined = np.concatenate(tokens[name])
        lengths = np.array([len(document) for document in tokens[name][1:]], dtype=np.int32)
        encoded = Encoded(joined, lengths, np.bincount(joined, minlength=encoder.rows), sizes[name])
        arrays |= {f"{name}.{field}": np.asarray(value) for field, value in encoded._asdict().items()}
    with _whole(task.file) as beside:
        np.savez(beside, allow_pickle=False, **arrays)


@contextlib.contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to, renamed to it at the end and removed on failure."""
    beside = file.with_name(f".{file.name}")
    try:
        with naming(file, "write"):
            yield beside
            with beside.open("rb") as stream:
                os.fsync(stream.fileno())
            beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
