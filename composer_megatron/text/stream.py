"""Raw text as an endless stream of documents in a fixed order, which goes on exactly at any document.

The records of all files (the lines of a jsonl, each other file whole) are dealt in turn to `shards` streams. A stream
shuffles its documents within blocks of some megabytes and comes back to the first file after the last one, with the
blocks in another order inside. Where it stands is a place of a few numbers: going on from there reads one block again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import naming
from composer_megatron.text.corpus import Version, content_hashes, is_held_out
from composer_megatron.text.documents import has_lines, is_document, parse_record, raw_records, source_files

_SAMPLED = 1 << 20
"""Bytes at the beginning, in the middle and at the end of a file that tell it from another."""


class Fingerprint(NamedTuple):
    """What tells a file from another one without reading it whole: its bytes, and the hash of three samples."""

    size: int
    hash: str

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """That of a file."""
        digest = hashlib.blake2b(digest_size=16)
        with naming(path, "read"), path.open("rb") as file:
            size = file.seek(0, 2)
            for start in (0, max(0, (size - _SAMPLED) // 2), max(0, size - _SAMPLED)):
                file.seek(start)
                digest.update(file.read(_SAMPLED))
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class Place:
    """Where a stream stands: at a token of a document of a block.

    Attributes:
        epoch: How often all files have been read.
        file: The file in which the block begins.
        byte: The byte of it, unpacked, at which the block begins.
        record: Records of the epoch before the block, of all streams.
        document: Documents of the block, in its order, that are behind us.
        token: Tokens of the next one that are.
        block: Hash of the block's documents, by which a changed file is noticed; empty before the first block.
    """

    epoch: int = 0
    file: int = 0
    byte: int = 0
    record: int = 0
    document: int = 0
    token: int = 0
    block: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The numbers by their names."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Place:
        """The place that `as_dict` described."""
        return cls(**values)


@dataclass(frozen=True)
class RawText:
    """Files to be read as they are.

    Attributes:
        path: The file or folder that was named.
        files: The files, in order.
        versions: Of each, when they were first seen: a file that is written to meanwhile is refused.
        field: The field of a jsonl line that holds the text.
        valid_fraction: Part of the documents to hold out, by the hash of their content, as `preprocess` does.
    """

    path: Path
    files: tuple[Path, ...]
    versions: tuple[Version, ...]
    field: str
    valid_fraction: float

    @classmethod
    def find(cls, path: Path, *, field: str = "text", valid_fraction: float = 0.05) -> RawText:
        """The text files that a path names.

        Raises:
            UsageError: If the fraction is impossible.
            FileError: If there is no text.
        """
        if not 0 < valid_fraction < 1:
            raise UsageError(f"--text-valid-fraction {valid_fraction}; expected a number between 0 and 1, such as 0.05")
        files = tuple(source_files([path]))
        return cls(path, files, tuple(map(Version.of, files)), field, valid_fraction)

    def training(
        self, place: Place, *, shard: int, shards: int, block_bytes: int, seed: int
    ) -> Iterator[tuple[Place, str]]:
        """The documents of one stream without those held out, from a place on, without end.

        Args:
            place: The first document to give, whatever of it is behind us.
            shard: Which stream, from 0.
            shards: How many there are.
            block_bytes: Text in a block; 0 for no shuffling.
            seed: Decides the order.

        Yields:
            The place of each document's first token, and its text.

        Raises:
            FileError: If a file cannot be read, has changed, or there is no document for this stream.
        """
        expected, skipped = place.block, place.document
        empty_epochs = 0
        while True:
            empty_epochs += 1
            for block in self._blocks(place, shard, shards, block_bytes, seed):
                if expected not in ("", block.place.block):
                    raise _changed(self.path, "the documents at which the run stopped are others now")
                for number in range(skipped, len(block.texts)):
                    yield _at(block.place, document=number), block.texts[number]
                expected, skipped = "", 0
                empty_epochs = 0
            if expected:
                raise _changed(self.path, "the documents at which the run stopped are gone")
            if empty_epochs > 1:
                problem = f"{self.path} has no document to train on for stream {shard} of {shards}"
                raise FileError(f"{problem}; give more text, or fewer --text-shards")
            place = Place(epoch=place.epoch + 1)

    def held_out(self) -> Iterator[str]:
        """The documents that are not trained on, once."""
        for record in self._records(Place(), 0, 1):
            if record.text is not None and self._is_held_out(record.text):
                yield record.text

    def _is_held_out(self, text: str) -> bool:
        return is_held_out(content_hashes(text.encode(), 0)[0], self.valid_fraction)

    def _blocks(self, place: Place, shard: int, shards: int, block_bytes: int, seed: int) -> Iterator[_Block]:
        """The rest of the epoch's blocks, each in its order."""
        texts: list[str] = []
        size, begin = 0, _at(place, document=0)
        for record in self._records(place, shard, shards):
            if record.text is None or self._is_held_out(record.text):
                continue
            if not texts:
                begin = Place(place.epoch, record.file, record.byte, record.number)
            texts.append(record.text)
            size += len(record.text.encode())
            if size >= block_bytes:
                yield _Block.of(begin, texts, seed, shuffled=block_bytes > 0)
                texts, size = [], 0
        if texts:
            yield _Block.of(begin, texts, seed, shuffled=block_bytes > 0)

    def _records(self, place: Place, shard: int, shards: int) -> Iterator[_Record]:
        """The rest of an epoch."""
        number = place.record
        for file in range(place.file, len(self.files)):
            path = self.files[file]
            if Version.of(path) != self.versions[file]:
                raise _changed(path, "it was written to")
            if not has_lines(path) and number % shards != shard:
                number += 1
                continue
            for byte, data in raw_records(path, start=place.byte if file == place.file else 0):
                text = parse_record(path, byte, data, field=self.field) if number % shards == shard else ""
                yield _Record(file, byte, number, text if is_document(text) else None)
                number += 1


class _Record(NamedTuple):
    """A record: its file, byte and number in the epoch, and its text where it is a document of the stream."""

    file: int
    byte: int
    number: int
    text: str | None


class _Block(NamedTuple):
    """Documents in the order in which they come, and the place of the first."""

    place: Place
    texts: Sequence[str]

    @classmethod
    def of(cls, begin: Place, texts: Sequence[str], seed: int, *, shuffled: bool) -> _Block:
        digest = hashlib.blake2b(digest_size=8)
        for text in texts:
            digest.update(len(text).to_bytes(8, "little") + text.encode())
        order = list(range(len(texts)))
        if shuffled:
            order = np.random.default_rng((seed, begin.epoch, begin.record)).permutation(len(texts)).tolist()
        place = Place(begin.epoch, begin.file, begin.byte, begin.record, 0, 0, digest.hexdigest())
        return cls(place, [texts[number] for number in order])


def _at(place: Place, *, document: int) -> Place:
    return Place(place.epoch, place.file, place.byte, place.record, document, 0, place.block)


def _changed(path: Path, how: str) -> FileError:
    advice = "restore it, or begin a new run"
    return FileError(
        f"{path} changed under way: {how}; the order of the text would no longer be that of the run: {advice}"
    )
