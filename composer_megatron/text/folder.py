"""The folder of a preprocessed corpus: what it holds, and reading it back. Light, so that any stage may look."""

from __future__ import annotations

import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from composer_megatron.errors import FileError
from composer_megatron.files import naming, read_json
from composer_megatron.text.corpus import TRAIN, VALID

_FORMAT = "composer-text"
_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")
"""How an index of Megatron's begins: magic, version, code of the tokens' type, sequences, documents and one more."""
_INDEX_MAGIC = b"MMIDIDX\0\0"
_TOKEN_TYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}  # by Megatron's codes


@dataclass(frozen=True)
class SplitInfo:
    """What one side of a text folder holds.

    Attributes:
        documents: Documents.
        tokens: Tokens, the end of text of each document included.
        bytes: UTF-8 bytes of the documents; an end of text has none.
        sha256: Of the token file, in hexadecimal; None in folders from before there were checksums.
    """

    documents: int
    tokens: int
    bytes: int
    sha256: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The values that there are, as JSON has them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class TextInfo:
    """A complete text folder.

    Attributes:
        folder: Where it is.
        sources: The files and folders that it was made from, as they were named.
        vocab_size: The tokenizer's tokens; at most what was asked for.
        end_of_text: Id of the token that closes each document.
        train: What there is to train on.
        valid: What is held out.
        unigram_nats_per_token: Cross-entropy of the held-out tokens under the frequencies of the training tokens,
            (count + 1) / (tokens + vocab_size): what a model without context reaches.
        unigram_bits_per_byte: The same, all held-out tokens together in bits, over the held-out bytes.
    """

    folder: Path
    sources: tuple[str, ...]
    vocab_size: int
    end_of_text: int
    train: SplitInfo
    valid: SplitInfo
    unigram_nats_per_token: float
    unigram_bits_per_byte: float

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file."""
        return self.folder / "tokenizer.json"

    @property
    def train_prefix(self) -> Path:
        """Path of the training tokens without ``.bin`` or ``.idx``, as Megatron wants it."""
        return self.folder / TRAIN

    @property
    def valid_prefix(self) -> Path:
        """Path of the held-out tokens without ``.bin`` or ``.idx``."""
        return self.folder / VALID

    def as_dict(self) -> dict[str, Any]:
        """The content of ``text.json``, without what it was made from."""
        unigram = {
            "unigram_nats_per_token": self.unigram_nats_per_token,
            "unigram_bits_per_byte": self.unigram_bits_per_byte,
        }
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "sources": list(self.sources),
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            TRAIN: self.train.as_dict(),
            VALID: self.valid.as_dict() | unigram,
        }


def load_text_folder(path: Path) -> TextInfo:
    """Read and check a text folder.

    Raises:
        FileError: If it is missing, incomplete or damaged: a file's size does not fit the counts in ``text.json``.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileError(f"{path} is no folder: expected a text folder made by tools/preprocess_text.py")
    where = path / "text.json"
    values = read_json(where, "a text folder's description")
    if values.get("format") != _FORMAT:
        raise FileError(f'{where} does not describe a text folder: expected "format": "{_FORMAT}"')
    if values.get("version") != _VERSION:
        raise FileError(f"{where} has version {values.get('version')!r}; this program reads version {_VERSION}")
    try:
        info = _from_dict(path, values)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{where}: a value is missing or of the wrong type: {error}; make the folder again") from None
    if not info.tokenizer.is_file():
        raise FileError(f"{info.tokenizer} is missing; make the folder again")
    _check_tokens(info.train_prefix, info.train)
    _check_tokens(info.valid_prefix, info.valid)
    return info


def _from_dict(folder: Path, values: dict[str, Any]) -> TextInfo:
    def whole(value: Any) -> int:
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"expected a whole number, found {value!r}")
        return value

    def split(name: str) -> SplitInfo:
        documents, tokens, size = (whole(values[name][key]) for key in ("documents", "tokens", "bytes"))
        checksum = values[name].get("sha256")
        return SplitInfo(documents, tokens, size, None if checksum is None else str(checksum))

    return TextInfo(
        folder=folder,
        sources=tuple(map(str, values["sources"])),
        vocab_size=whole(values["vocab_size"]),
        end_of_text=whole(values["end_of_text"]),
        train=split(TRAIN),
        valid=split(VALID),
        unigram_nats_per_token=float(values[VALID]["unigram_nats_per_token"]),
        unigram_bits_per_byte=float(values[VALID]["unigram_bits_per_byte"]),
    )


def token_type(prefix: Path) -> np.dtype[Any]:
    """The type of the tokens in ``prefix.bin``, as ``prefix.idx`` says.

    Raises:
        FileError: If there is no sound index.
    """
    return _TOKEN_TYPES[_read_header(_index_of(prefix))[0]]


def _index_of(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def _read_header(index: Path) -> tuple[int, int, int, int]:
    """The code of the type, sequences, documents and one more, and the file's size."""
    with naming(index, "read"), index.open("rb") as file:
        header = file.read(INDEX_HEADER.size)
        size = os.fstat(file.fileno()).st_size
    if len(header) < INDEX_HEADER.size:
        raise FileError(f"{index} is cut off; make the folder again")
    magic, version, code, sequences, documents = INDEX_HEADER.unpack(header)
    if magic != _INDEX_MAGIC or version != 1 or code not in _TOKEN_TYPES:
        raise FileError(f"{index} is no index of Megatron's token files; make the folder again")
    return code, sequences, documents, size


def _check_tokens(prefix: Path, split: SplitInfo) -> None:
    """Compare the sizes of .idx and .bin with the counts, without Megatron, so that it takes no time."""
    index, tokens = _index_of(prefix), prefix.with_name(prefix.name + ".bin")
    code, sequences, documents, index_size = _read_header(index)
    # Per sequence an int32 length and an int64 offset, per document an int64 end, with a 0 before the first.
    wanted_index = INDEX_HEADER.size + 12 * split.documents + 8 * (split.documents + 1)
    if (sequences, documents, index_size) != (split.documents, split.documents + 1, wanted_index):
        raise FileError(f"{index} does not hold the {split.documents} documents of text.json; make the folder again")
    with naming(tokens, "read"):
        found = tokens.stat().st_size
    wanted = split.tokens * _TOKEN_TYPES[code].itemsize
    if found != wanted:
        raise FileError(f"{tokens} has {found} bytes, text.json promises {wanted}; make the folder again")
