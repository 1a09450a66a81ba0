"""Whether a text folder is sound: every token is read and compared with the index, the counts and the checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from composer_megatron.errors import FileError
from composer_megatron.files import naming
from composer_megatron.text.folder import INDEX_HEADER, SplitInfo, TextInfo, load_text_folder, token_type
from composer_megatron.text.tokenizing import end_of_text_id, load_tokenizer, vocabulary_size

_CHUNK = 1 << 23
"""Tokens read at once."""


def check_text_folder(path: Path, progress: Callable[[int, int], None] | None = None) -> TextInfo:
    """Read a text folder whole.

    Args:
        path: The folder.
        progress: Called with the tokens read, and all there are.

    Returns:
        What it holds. A side without a checksum, as older versions of this program wrote it, is checked otherwise.

    Raises:
        FileError: With the first thing that is wrong: the tokenizer has another vocabulary, the index is inconsistent,
            an id is none of the tokenizer's, a document does not end with the end of text, the checksum differs.
    """
    info = load_text_folder(path)
    tokenizer = load_tokenizer(info.tokenizer)
    found = vocabulary_size(tokenizer), end_of_text_id(tokenizer, info.tokenizer)
    if found != (info.vocab_size, info.end_of_text):
        problem = (
            f"{found[0]} tokens and end of text {found[1]}, text.json says {info.vocab_size} and {info.end_of_text}"
        )
        raise FileError(f"{info.tokenizer} has {problem}; make the folder again")
    total = info.train.tokens + info.valid.tokens
    done = 0
    for prefix, split in ((info.train_prefix, info.train), (info.valid_prefix, info.valid)):
        ends = _document_ends(prefix, split)
        report = None if progress is None else _after(progress, done, total)
        _check_tokens(prefix, split, ends, info, report)
        done += split.tokens
    return info


def _after(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def _document_ends(prefix: Path, split: SplitInfo) -> np.ndarray:
    """The place behind each document's last token, int64 [documents], from an index that is consistent."""
    index = prefix.with_name(prefix.name + ".idx")
    count = split.documents
    with naming(index, "read"), index.open("rb") as file:
        file.seek(INDEX_HEADER.size)
        lengths = np.fromfile(file, np.int32, count).astype(np.int64)
        offsets = np.fromfile(file, np.int64, count)
        documents = np.fromfile(file, np.int64, count + 1)
    ends = np.cumsum(lengths)
    width = token_type(prefix).itemsize
    if (lengths < 1).any():
        problem = f"document {int(np.argmax(lengths < 1))} has no tokens"
    elif count and ends[-1] != split.tokens:
        problem = f"its documents have {ends[-1]} tokens, text.json says {split.tokens}"
    elif not np.array_equal(offsets, (ends - lengths) * width):
        problem = (
            f"document {int(np.argmax(offsets != (ends - lengths) * width))} does not begin where the last one ends"
        )
    elif not np.array_equal(documents, np.arange(count + 1)):
        problem = "its documents are not one sequence each"
    else:
        return ends
    raise FileError(f"{index} is inconsistent: {problem}; make the folder again")


def _check_tokens(
    prefix: Path, split: SplitInfo, ends: np.ndarray, info: TextInfo, progress: Callable[[int], None] | None
) -> None:
    path = prefix.with_name(prefix.name + ".bin")
    digest = hashlib.sha256()
    done = 0
    with naming(path, "read"), path.open("rb") as file:
        while len(tokens := np.fromfile(file, token_type(prefix), _CHUNK)):
            digest.update(tokens)
            outside = (tokens >= info.vocab_size) | (tokens < 0)
            if outside.any():
                place = int(np.argmax(outside))
                problem = f"token {done + place} is {tokens[place]}, of a vocabulary of {info.vocab_size}"
                raise FileError(f"{path}: {problem}; make the folder again")
            here = ends[
                np.searchsorted(ends, done, side="right") : np.searchsorted(ends, done + len(tokens), side="right")
            ]
            closing = np.flatnonzero(tokens == info.end_of_text) + done + 1
            if not np.array_equal(closing, here):
                wrong = min(set(closing.tolist()) ^ set(here.tolist())) - 1
                problem = f"token {wrong} is {tokens[wrong - done]}: documents and ends of text do not fit"
                raise FileError(f"{path}: {problem}; make the folder again")
            done += len(tokens)
            if progress is not None:
                progress(done)
    if split.sha256 is not None and digest.hexdigest() != split.sha256:
        raise FileError(f"{path} does not have the checksum of text.json: its tokens changed; make the folder again")
