"""Which documents are trained on and which are held out, decided by the hash of each document's content alone.

So copies of one document never end up on both sides, and a document stays on its side whatever is renamed, added or
removed, but for corpora of a few documents, where the held-out side has to be filled up.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import naming
from composer_megatron.text.documents import has_lines, is_document, is_packed, read_at, read_records
from composer_megatron.text.pool import in_order

Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("read", "tokenizer", "encode"), the bytes done and the bytes in all, None when unknown."""

TRAIN, VALID = "train", "valid"
SPLITS = (TRAIN, VALID)
_LEFT_OUT = len(SPLITS)

_RANGE = 1 << 26
"""Bytes of the files that a process scans at once."""


class Version(NamedTuple):
    """What tells that a file was written to: its bytes, and when it last was, in nanoseconds."""

    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """That of a file now."""
        with naming(path, "read"):
            found = path.stat()
        return cls(found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Corpus:
    """The documents of some files, chosen and split; the texts stay in the files and are read again when asked for.

    Attributes:
        files: Where the documents come from, in order.
        versions: Of each file, when it was scanned.
        field: The field of a jsonl line that holds the text.
        valid_fraction: Part of the documents to hold out; of the characters, where there is one document only.
        places: The file of each document and the byte of it, unpacked, where the document begins, int64 [documents, 2].
        sizes: UTF-8 bytes of each document, int64 [documents].
        splits: Index into `SPLITS` of each document, or one past them for one that is left out, int8 [documents].
        order: A number that the content determines, by which samples are drawn, uint64 [documents].
        alone: Whether one document is all there is, to be cut in two.
    """

    files: tuple[Path, ...]
    versions: tuple[Version, ...]
    field: str
    valid_fraction: float
    places: np.ndarray
    sizes: np.ndarray
    splits: np.ndarray
    order: np.ndarray
    alone: bool

    @classmethod
    def scan(
        cls,
        files: Sequence[Path],
        *,
        field: str,
        valid_fraction: float,
        seed: int,
        max_bytes: int | None,
        progress: Progress,
        workers: int = 1,
    ) -> Corpus:
        """Read every document once, choose at most `max_bytes` of them and split those.

        A document is held out when its hash under `seed` falls into the lowest `valid_fraction`. Should those have
        less than half that fraction of the bytes, the next ones in hash follow until they have; the last one always
        stays for training, and one document alone is cut in two. `max_bytes` takes documents in the order of a second
        hash, passing over those that no longer fit. The processes that read change nothing of it.

        Raises:
            FileError: If a file is bad, there is no text, or all documents are copies of one.
            UsageError: If not even one document fits into `max_bytes`.
        """
        versions = tuple(map(Version.of, files))
        found, done = [], 0
        for _, part in in_order(_scan, _ranges(files, versions, field, seed), workers):
            found.append(part)
            done += int(part.sizes.sum())
            progress("read", done, None)
        places, sizes, hashes, order = map(np.concatenate, zip(*found, strict=True)) if found else [np.zeros(0)] * 4
        if not len(sizes):
            raise FileError(f"no text in {len(files)} file{'s' * (len(files) != 1)}: every document is empty")
        kept = _choose(sizes, order, max_bytes)
        splits = _split(hashes, sizes, kept, valid_fraction)
        alone = bool(np.count_nonzero(kept) == 1)
        return cls(tuple(files), versions, field, valid_fraction, places, sizes, splits, order, alone)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the chosen documents."""
        return int(self.sizes[self.splits != _LEFT_OUT].sum())

    def parts(self, size: int) -> Iterator[Corpus]:
        """Neighbouring documents together, in order, each part with about `size` bytes or one document."""
        ends = np.cumsum(self.sizes)
        start = 0
        while start < len(self.sizes):
            before = 0 if start == 0 else int(ends[start - 1])
            end = max(start + 1, int(np.searchsorted(ends, before + size, side="right")))
            yield self._of(slice(start, end))
            start = end

    def _of(self, chosen: slice | np.ndarray) -> Corpus:
        """The corpus of some of the documents, and of the files that hold them."""
        files, numbers = np.unique(self.places[chosen, 0], return_inverse=True)
        return replace(
            self,
            files=tuple(self.files[number] for number in files),
            versions=tuple(self.versions[number] for number in files),
            places=np.stack((numbers, self.places[chosen, 1]), 1),
            sizes=self.sizes[chosen],
            splits=self.splits[chosen],
            order=self.order[chosen],
        )

    def documents(self) -> Iterator[tuple[str, str]]:
        """The chosen documents in reading order, each as its split's name and its text.

        Raises:
            FileError: If the files no longer hold what `scan` found there.
        """
        chosen = self._of(np.flatnonzero(self.splits != _LEFT_OUT))
        for split, text in zip(chosen.splits, chosen._texts(), strict=True):
            if self.alone:
                yield from zip(SPLITS, _cut_in_two(text, self.valid_fraction), strict=True)
            else:
                yield SPLITS[split], text

    def training_sample(self, max_bytes: int) -> Iterator[str]:
        """About `max_bytes` of the training documents, drawn by hash, in reading order; all when there is no more."""
        training = np.flatnonzero(self.splits == SPLITS.index(TRAIN))
        ranked = training[np.argsort(self.order[training], kind="stable")]
        before = np.cumsum(self.sizes[ranked]) - self.sizes[ranked]
        left = max_bytes
        for split, text in self._of(np.sort(ranked[before < max_bytes])).documents():
            if split == TRAIN and left > 0:
                yield text[:left]
                left -= len(text.encode())

    def _texts(self) -> Iterator[str]:
        """The text of every document, all read again."""
        numbers = range(len(self.sizes))
        for file, group in itertools.groupby(numbers, key=lambda number: int(self.places[number, 0])):
            documents = list(group)
            path = self.files[file]
            if Version.of(path) != self.versions[file]:
                raise _changed(path)
            texts = read_at(path, map(int, self.places[documents, 1]), field=self.field)
            for number, text in zip(documents, texts, strict=True):
                if len(text.encode()) != self.sizes[number]:
                    raise _changed(path)
                yield text


def _changed(path: Path) -> FileError:
    return FileError(f"{path} changed while it was read; start again when nothing writes to the files")


def content_hashes(data: bytes, seed: int) -> tuple[int, int]:
    """Two numbers of 64 bits that the text and the seed determine: one decides the side, one draws samples."""
    digest = hashlib.blake2b(data, digest_size=16, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])


def is_held_out(number: int, valid_fraction: float) -> bool:
    """Whether a document with that first hash is held out, where no side has to be filled up."""
    return number < int(valid_fraction * 2**64)


class _Range(NamedTuple):
    """What one process scans: files, numbered from `first`, or some bytes of one."""

    first: int
    files: tuple[Path, ...]
    start: int
    stop: int | None
    field: str
    seed: int


class _Scanned(NamedTuple):
    """Places, sizes, first and second hashes of the documents in a range, as arrays."""

    places: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    order: np.ndarray


def _ranges(files: Sequence[Path], versions: Sequence[Version], field: str, seed: int) -> Iterator[_Range]:
    """All files in order, in pieces of about `_RANGE` bytes: of a large jsonl a part, of small files many."""
    first, size = 0, 0
    for number, (path, version) in enumerate(zip(files, versions, strict=True)):
        if has_lines(path) and not is_packed(path) and version.size > _RANGE:
            if first < number:
                yield _Range(first, tuple(files[first:number]), 0, None, field, seed)
            for start in range(0, version.size, _RANGE):
                yield _Range(number, (path,), start, start + _RANGE, field, seed)
            first, size = number + 1, 0
            continue
        size += version.size
        if size >= _RANGE:
            yield _Range(first, tuple(files[first : number + 1]), 0, None, field, seed)
            first, size = number + 1, 0
    if first < len(files):
        yield _Range(first, tuple(files[first:]), 0, None, field, seed)


def _scan(task: _Range) -> _Scanned:
    places, sizes, hashes, order = array("q"), array("q"), array("Q"), array("Q")
    for number, path in enumerate(task.files, start=task.first):
        for place, text in read_records(path, field=task.field, start=task.start, stop=task.stop):
            if is_document(text):
                data = text.encode()
                side, draw = content_hashes(data, task.seed)
                places.extend((number, place))
                sizes.append(len(data))
                hashes.append(side)
                order.append(draw)
    return _Scanned(np.array(places).reshape(-1, 2), np.array(sizes), np.array(hashes), np.array(order))


def _choose(sizes: np.ndarray, order: np.ndarray, max_bytes: int | None) -> np.ndarray:
    """Which documents to keep, bool [documents]."""
    if max_bytes is None or int(sizes.sum()) <= max_bytes:
        return np.ones(len(sizes), dtype=bool)
    kept = np.zeros(len(sizes), dtype=bool)
    left = max_bytes
    for index in np.argsort(order, kind="stable"):
        if sizes[index] <= left:
            kept[index] = True
            left -= int(sizes[index])
    if not kept.any():
        smallest = int(sizes.min())
        raise UsageError(f"max_bytes={max_bytes} has no room for a document; the smallest has {smallest} bytes")
    return kept


def _split(hashes: np.ndarray, sizes: np.ndarray, kept: np.ndarray, valid_fraction: float) -> np.ndarray:
    """`Corpus.splits` of all documents, from their hashes, uint64 [documents]."""
    chosen = hashes[kept]
    ranked = np.argsort(chosen)
    lowest, highest = chosen[ranked[0]], chosen[ranked[-1]]
    if len(chosen) > 1 and lowest == highest:
        raise FileError(f"all {len(chosen)} documents are the same text, so that none can be held out; give other text")
    bytes_up_to = np.cumsum(sizes[kept][ranked])
    enough = chosen[ranked[np.searchsorted(bytes_up_to, valid_fraction / 2 * bytes_up_to[-1])]]
    below = (chosen < np.uint64(int(valid_fraction * 2**64))) | (chosen <= enough)  # as `is_held_out`
    held_out = below & (chosen != highest)  # one alone is for training, until it is cut in two
    splits = np.full(len(hashes), _LEFT_OUT, dtype=np.int8)
    splits[kept] = np.where(held_out, SPLITS.index(VALID), SPLITS.index(TRAIN))
    return splits


def _cut_in_two(text: str, valid_fraction: float) -> tuple[str, str]:
    """The only document as training text and, from the start of a line on where there is one, held-out text."""
    if len(text) < 2:
        raise FileError("the only document has one character; give more text")
    wanted = min(max(1, round(len(text) * (1 - valid_fraction))), len(text) - 1)
    cut = text.rfind("\n", wanted // 2, wanted) + 1 or wanted
    return text[:cut], text[cut:]
