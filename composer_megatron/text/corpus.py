"""Which documents are trained on and which are held out, decided by the hash of each document's content alone.

So copies of one document never end up on both sides, and a document stays on its side whatever is renamed, added or
removed, but for corpora of a few documents, where the held-out side has to be filled up.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from composer_megatron.errors import FileError, UsageError
from composer_megatron.text.documents import read_documents

Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("read", "tokenizer", "encode"), the bytes done and the bytes in all, None when unknown."""

TRAIN, VALID = "train", "valid"
SPLITS = (TRAIN, VALID)
_LEFT_OUT = len(SPLITS)


@dataclass(frozen=True)
class Corpus:
    """The documents of some files, chosen and split; the texts stay in the files and are read again when asked for.

    Attributes:
        files: Where the documents come from, in order.
        field: The field of a jsonl line that holds the text.
        valid_fraction: Part of the documents to hold out; of the characters, where there is one document only.
        sizes: UTF-8 bytes of each document, int64 [documents].
        splits: Index into `SPLITS` of each document, or one past them for one that is left out, int8 [documents].
        order: A number that the content determines, by which samples are drawn, uint64 [documents].
    """

    files: tuple[Path, ...]
    field: str
    valid_fraction: float
    sizes: np.ndarray
    splits: np.ndarray
    order: np.ndarray

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
    ) -> Corpus:
        """Read every document once, choose at most `max_bytes` of them and split those.

        A document is held out when its hash under `seed` falls into the lowest `valid_fraction`. Should those have
        less than half that fraction of the bytes, the next ones in hash follow until they have; the last one always
        stays for training, and one document alone is cut in two. `max_bytes` takes documents in the order of a second
        hash, passing over those that no longer fit.

        Raises:
            FileError: If a file is bad, there is no text, or all documents are copies of one.
            UsageError: If not even one document fits into `max_bytes`.
        """
        sizes, hashes, order = array("q"), array("Q"), array("Q")
        done = 0
        key = seed.to_bytes(8, "little")
        for text in read_documents(files, field=field):
            data = text.encode()
            digest = hashlib.blake2b(data, digest_size=16, key=key).digest()
            hashes.append(int.from_bytes(digest[:8]))
            order.append(int.from_bytes(digest[8:]))
            sizes.append(len(data))
            done += len(data)
            progress("read", done, None)
        if not sizes:
            raise FileError(f"no text in {len(files)} file{'s' * (len(files) != 1)}: every document is empty")
        lengths, places = np.array(sizes), np.array(order)
        kept = _choose(lengths, places, max_bytes)
        splits = _split(np.array(hashes), lengths, kept, valid_fraction)
        return cls(tuple(files), field, valid_fraction, lengths, splits, places)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the chosen documents."""
        return int(self.sizes[self.splits != _LEFT_OUT].sum())

    def documents(self) -> Iterator[tuple[str, str]]:
        """The chosen documents in reading order, each as its split's name and its text.

        Raises:
            FileError: If the files no longer hold what `scan` found there.
        """
        alone = np.count_nonzero(self.splits != _LEFT_OUT) == 1
        for index, text in self._read():
            split = self.splits[index]
            if split == _LEFT_OUT:
                continue
            if alone:
                yield from zip(SPLITS, _cut_in_two(text, self.valid_fraction), strict=True)
            else:
                yield SPLITS[split], text

    def training_sample(self, max_bytes: int) -> Iterator[str]:
        """About `max_bytes` of the training documents, drawn by hash, in reading order; all when there is no more."""
        training = np.flatnonzero(self.splits == SPLITS.index(TRAIN))
        ranked = training[np.argsort(self.order[training], kind="stable")]
        before = np.cumsum(self.sizes[ranked]) - self.sizes[ranked]
        drawn = set(ranked[before < max_bytes].tolist())
        left = max_bytes
        position = -1
        for split, text in self.documents():
            position += split == TRAIN
            if split == TRAIN and int(training[position]) in drawn and left > 0:
                yield text[:left]
                left -= len(text.encode())

    def _read(self) -> Iterator[tuple[int, str]]:
        count = 0
        for count, text in enumerate(read_documents(self.files, field=self.field), start=1):
            if count > len(self.sizes) or len(text.encode()) != self.sizes[count - 1]:
                break
            yield count - 1, text
        else:
            if count == len(self.sizes):
                return
        raise FileError("a text file changed while it was read; start again when nothing writes to the files")


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
    below = (chosen < np.uint64(int(valid_fraction * 2**64))) | (chosen <= enough)
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
