"""Byte-level BPE with Hugging Face `tokenizers`: train one, load one, and encode documents with several processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming
from composer_megatron.text.pool import in_order

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""What ends a document, by the names that published tokenizers use; ours writes the first."""

SMALLEST_VOCABULARY = 257
"""The 256 bytes and the end of text."""

_PIECE = 1 << 19
"""Characters encoded at once: the library needs about 120 bytes of memory for each."""


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting rule; id 0 is ``<|endoftext|>``, then come the 256 bytes.

    The same documents give the same tokenizer, whatever the number of threads. It has fewer than `vocab_size` tokens
    when the documents hold too few pairs that occur twice.

    Raises:
        UsageError: If `vocab_size` has no room for the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(f"vocab_size={vocab_size}; expected at least {SMALLEST_VOCABULARY}: all bytes and end of text")
    _check_installed()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for document in documents for piece, _ in _pieces(document)), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from its JSON file, set to encode whole texts: no truncation, no padding, no token from plain text.

    Raises:
        FileError: If the file is missing or no tokenizer.
    """
    _check_installed()
    from tokenizers import Tokenizer

    with naming(path, "read the tokenizer"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise FileError(f"{path} is no tokenizer (Hugging Face tokenizers JSON): {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Otherwise a document that mentions "<|endoftext|>" would end there.
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, path: Path) -> int:
    """The id of the token that ends a document; `path` names the tokenizer in the error.

    Raises:
        FileError: If the tokenizer has none of `END_OF_TEXT_NAMES`.
    """
    for name in END_OF_TEXT_NAMES:
        number = tokenizer.token_to_id(name)
        if number is not None:
            return number
    raise FileError(f"{path} has no end-of-text token; expected one of {', '.join(END_OF_TEXT_NAMES)}")


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: the largest id and one more, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _check_installed() -> None:
    try:
        import tokenizers  # noqa: F401
    except ModuleNotFoundError:
        raise ComposerError('tokenizers is not installed: pip install "composer-megatron[train]"') from None


@dataclass(frozen=True)
class _Piece[Key]:
    """A part of a document small enough to encode at once; `last` closes the document."""

    key: Key
    text: str
    last: bool


def encode_documents[Key](
    documents: Iterable[tuple[Key, str]], tokenizer_path: Path, workers: int
) -> Generator[tuple[Key, int, np.ndarray]]:
    """Encode documents in order; the result does not depend on `workers`.

    A document longer than half a million characters is cut before a space that follows a word. GPT-2's and Llama 3's
    splitting rules part tokens there anyway, so that the tokens are those of the whole.

    Args:
        documents: Pairs of anything and a text; read only a little ahead of what is asked for.
        tokenizer_path: A file that `load_tokenizer` reads.
        workers: Processes; 1 encodes in this one.

    Yields:
        The pair's key, the text's UTF-8 bytes, and its token ids, int32 of shape [tokens], without end of text.

    Raises:
        ComposerError: If a process dies, as for want of memory.
    """
    parts: list[np.ndarray] = []
    size = 0
    pieces = (_Piece(key, text, last) for key, whole in documents for text, last in _pieces(whole))
    batches = (_Batch(pieces, str(tokenizer_path)) for pieces in _batches(pieces))
    with contextlib.closing(in_order(_encode_batch, batches, workers)) as encoded:
        for batch, tokens in encoded:
            for piece, ids in zip(batch.pieces, tokens, strict=True):
                parts.append(ids)
                size += len(piece.text.encode())
                if piece.last:
                    yield piece.key, size, np.concatenate(parts)
                    parts, size = [], 0


def _pieces(text: str, limit: int = _PIECE) -> Iterator[tuple[str, bool]]:
    """`text` in parts of at most `limit` characters, each with whether it is the last."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind(" ", start + 1, start + limit + 1)
        while end > 0 and text[end - 1].isspace():
            end = text.rfind(" ", start + 1, end)
        end = end if end > start else start + limit  # one endless word: no place is better than another
        yield text[start:end], False
        start = end
    yield text[start:], True


def _batches[Key](pieces: Iterable[_Piece[Key]]) -> Iterator[list[_Piece[Key]]]:
    """Neighbours together until they are worth sending to a process."""
    batch: list[_Piece[Key]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class _Batch[Key]:
    """Neighbouring pieces, and what to encode them with; only texts and the path go to another process."""

    pieces: list[_Piece[Key]]
    tokenizer: str

    def __getstate__(self) -> dict[str, Any]:
        return {"pieces": [_Piece(None, piece.text, piece.last) for piece in self.pieces], "tokenizer": self.tokenizer}


def _encode_batch[Key](batch: _Batch[Key]) -> list[np.ndarray]:
    path = Path(batch.tokenizer)
    with naming(path, "read the tokenizer"):
        changed = path.stat().st_mtime_ns
    return _encode(_loaded(path, changed), [piece.text for piece in batch.pieces])


@functools.lru_cache(maxsize=4)
def _loaded(path: Path, changed: int) -> Tokenizer:
    """A tokenizer, loaded once a process for as long as its file stays as it is."""
    return load_tokenizer(path)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    # One text a call keeps the library from starting threads of its own beside the other processes.
    encodings = (tokenizer.encode_batch_fast([text], add_special_tokens=False)[0] for text in texts)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
