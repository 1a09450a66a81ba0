"""Text as a task: sequences of tokens drawn from any text, split by document.

Plain text is encoded by a tokenizer that is trained on its training documents. A folder of
``tools/preprocess_text.py`` has its tokens already: its ``.bin`` files are the tokens of all documents one after the
other, so that they can be mapped into memory as they are, without Megatron.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from composer_megatron.errors import UsageError
from composer_megatron.text.corpus import TRAIN, VALID, Corpus
from composer_megatron.text.documents import source_files
from composer_megatron.text.folder import TextInfo, load_text_folder
from composer_megatron.text.tokenizing import (
    SMALLEST_VOCABULARY,
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from composer_search.trainer import Split, TaskData

Tokens = NDArray[np.integer]

_TOKENIZER_SAMPLE = 4 << 20
"""Bytes of training text that the tokenizer is trained on."""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Which text, and how much of it.

    Attributes:
        text: Files and folders of text; or one folder of ``tools/preprocess_text.py``.
        vocab_size: Tokens of the tokenizer, at most; a preprocessed folder has its own.
        seq_len: Tokens of a sequence.
        n_train: Training sequences.
        n_valid: Validation sequences, from documents that are not trained on.
        n_test: Test sequences, from the other half of those documents.
        max_bytes: Bytes of text that are read at most, as whole documents drawn by hash.
    """

    text: tuple[str, ...]
    vocab_size: int
    seq_len: int
    n_train: int
    n_valid: int
    n_test: int
    max_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the setting."""
        smallest = {"vocab_size": SMALLEST_VOCABULARY}
        for name in ("vocab_size", "seq_len", "n_train", "n_valid", "n_test", "max_bytes"):
            if getattr(self, name) < smallest.get(name, 1):
                raise UsageError(f"{name}={getattr(self, name)}; expected at least {smallest.get(name, 1)}")


@dataclass(frozen=True, eq=False)
class TextSample:
    """The sequences that a source gave.

    Attributes:
        data: The three splits; each target is the next token.
        unigram_nats: Cross-entropy a token of the validation targets under the frequencies of the training tokens,
            (count + 1) / (tokens + vocabulary).
        unigram_nats_of_test: The same of the test targets.
        fingerprint: Hash of all tokens.
    """

    data: TaskData
    unigram_nats: float
    unigram_nats_of_test: float
    fingerprint: str


def sample_text(source: TextSource, seed: int) -> TextSample:
    """Draw the sequences of a source; the same text and settings give the same ones.

    Raises:
        UsageError: If there is less text than asked for.
        FileError: If the text cannot be read.
        ComposerError: If plain text is given and the package tokenizers is not installed.
    """
    first = Path(source.text[0])
    if len(source.text) == 1 and (first / "text.json").is_file():
        folder = load_text_folder(first)
        streams: Mapping[str, Tokens] = _mapped(folder)
        vocab_size = folder.vocab_size
    else:
        streams, vocab_size = _encoded(source, seed)
    rng = np.random.default_rng(seed)
    held_out = streams[VALID]
    middle = len(held_out) // 2
    parts = (
        ("n_train", "training", streams[TRAIN]),
        ("n_valid", "validation", held_out[:middle]),
        ("n_test", "test", held_out[middle:]),
    )
    train, validation, test = (_windows(stream, name, what, source, rng) for name, what, stream in parts)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part[0]).tobytes() for part in (train, validation, test)))
    counts = np.bincount(train[1].ravel(), minlength=vocab_size) + 1
    nats = -np.log(counts / counts.sum())
    return TextSample(
        TaskData(vocab_size, train, validation, test),
        float(nats[validation[1]].mean()),
        float(nats[test[1]].mean()),
        digest.hexdigest()[:16],
    )


def _mapped(folder: TextInfo) -> dict[str, Tokens]:
    """The token files of a preprocessed folder; how wide a token is follows from their size."""
    streams: dict[str, Tokens] = {}
    for name, prefix, split in ((TRAIN, folder.train_prefix, folder.train), (VALID, folder.valid_prefix, folder.valid)):
        path = prefix.with_name(prefix.name + ".bin")
        width = path.stat().st_size // max(1, split.tokens)
        streams[name] = np.memmap(path, dtype="<u2" if width == 2 else "<i4", mode="r")
    return streams


def _encoded(source: TextSource, seed: int) -> tuple[Mapping[str, Tokens], int]:
    """The tokens of plain text, end of text after each document, and the vocabulary's size."""
    held_out = source.n_valid + source.n_test
    share = min(0.5, max(0.02, 1.25 * held_out / (held_out + source.n_train)))
    corpus = Corpus.scan(
        source_files(map(Path, source.text)),
        field="text",
        valid_fraction=share,
        seed=seed,
        max_bytes=source.max_bytes,
        progress=_unheard,
    )
    tokenizer = train_tokenizer(corpus.training_sample(_TOKENIZER_SAMPLE), source.vocab_size)
    parts: dict[str, list[Tokens]] = {TRAIN: [], VALID: []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        tokenizer.save(str(path))
        end = np.array([end_of_text_id(load_tokenizer(path), path)], dtype=np.int32)
        for split, _, tokens in encode_documents(corpus.documents(), path, workers=1):
            parts[split] += [tokens, end]
    return {split: np.concatenate(pieces) for split, pieces in parts.items()}, vocabulary_size(tokenizer)


def _unheard(stage: str, done: int, total: int | None) -> None:
    """No one watches: a sample is read in seconds."""


def _windows(stream: Tokens, name: str, what: str, source: TextSource, rng: Generator) -> Split:
    """Sequences that do not overlap, drawn at random: inputs, and targets one token later, int64 [n, seq_len]."""
    wanted, length = getattr(source, name), source.seq_len
    there = max(0, len(stream) - 1) // length
    if there < wanted:
        problem = f"the text has {len(stream):,} {what} tokens, {there:,} sequences of seq_len={length}"
        raise UsageError(f"{problem}; {name}={wanted} needs {wanted * length + 1:,}: give more text, or lower either")
    starts = rng.permutation(there)[:wanted] * length
    tokens = np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64)
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()
