"""A corpus ready for training: documents to token files that Megatron reads, with exact counts.

A text folder holds ``tokenizer.json`` (Hugging Face tokenizers), ``train.bin/.idx`` and ``valid.bin/.idx`` (Megatron's
IndexedDataset, one sequence a document, each closed by the end-of-text token) and ``text.json``. The sources are read
three times and never held whole: to choose and split documents, to train the tokenizer, to encode. Each process reads
its own parts of the files. Until the folder is whole it lies beside its place, as ``.NAME.partial``, and keeps the
parts that are finished: the same call goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming, read_json, write_json, write_text
from composer_megatron.text import tokenizing
from composer_megatron.text.corpus import SPLITS, TRAIN, VALID, Corpus, Progress
from composer_megatron.text.documents import read_documents, source_files, standard_library_sources
from composer_megatron.text.folder import SplitInfo, TextInfo, load_text_folder
from composer_megatron.text.parts import Encoded, Encoder, encode_parts, read_part

__all__ = ["SplitInfo", "TextInfo", "load_text_folder", "preprocess", "read_documents", "standard_library_sources"]

DEFAULT_VOCABULARY = 4096
TOKENIZER_BYTES = 32_000_000
"""A tokenizer is trained on about this much of the training side, drawn by hash; more changes little."""

_PARTS, _INPUTS = "parts", "inputs.json"


def preprocess(
    paths: Sequence[Path] | None,
    output: Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    valid_fraction: float = 0.05,
    max_bytes: int | None = None,
    field: str = "text",
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> TextInfo:
    """Make a text folder, or return it if it is there already, made from the same files with the same settings.

    The folder appears whole or not at all; the files in it do not depend on `workers`. What an interruption leaves
    finished is used by the next call with the same files and settings.

    Args:
        paths: Files and folders (`composer_megatron.text.documents`); None is the Python standard library's sources.
        output: The folder to make.
        vocab_size: Tokens of the byte-level BPE to train, on the training side alone; 4096 by default.
        tokenizer: A tokenizer's JSON file to use instead.
        valid_fraction: Part of the documents to hold out, by the hash of their content (`Corpus.scan`).
        max_bytes: Use at most this much text; a sample drawn by hash.
        field: The field of a jsonl line that holds the text.
        seed: Changes which documents are held out and sampled.
        workers: Processes that read and encode; all cores by default.
        progress: Called as the work goes on.

    Raises:
        UsageError: If a setting is impossible, or `output` holds anything else.
        FileError: If a source is missing or cannot be read, or the folder cannot be written.
        ComposerError: If Megatron-core or tokenizers is not installed, or a process dies.
    """
    cores = len(os.sched_getaffinity(0))
    workers = cores if workers is None else workers
    _check_vocabulary(vocab_size, tokenizer)
    _check_numbers(valid_fraction, max_bytes, seed, workers)
    report = progress or (lambda stage, done, total: None)
    files = standard_library_sources() if paths is None else source_files(paths)
    settings: dict[str, Any] = {"valid_fraction": valid_fraction, "max_bytes": max_bytes, "field": field, "seed": seed}
    inputs = settings | _inputs(files, vocab_size, tokenizer)
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would replace a link instead of following it
    if existing := _existing(output, inputs):
        return existing
    megatron = _megatron_datasets()
    with _new_folder(output, inputs) as folder:
        if not (folder / "text.json").is_file():
            corpus = Corpus.scan(files, **settings, progress=report, workers=workers)
            encoder = _encoder(folder, corpus, vocab_size, tokenizer, megatron, report)
            parts = encode_parts(corpus, encoder, folder / _PARTS, workers, report)
            sources = [f"Python {platform.python_version()} standard library"] if paths is None else map(str, paths)
            info = _join(folder, parts, encoder, tuple(sources), megatron)
            write_json(folder / "text.json", info.as_dict() | {"inputs": inputs})
    return load_text_folder(output)


def _check_vocabulary(vocab_size: int | None, tokenizer: Path | None) -> None:
    if vocab_size is not None and tokenizer is not None:
        raise UsageError(f"vocab_size={vocab_size} beside tokenizer {tokenizer}: give one of the two")
    if vocab_size is not None and vocab_size < tokenizing.SMALLEST_VOCABULARY:
        raise UsageError(f"vocab_size={vocab_size}; expected at least {tokenizing.SMALLEST_VOCABULARY}")


def _check_numbers(valid_fraction: float, max_bytes: int | None, seed: int, workers: int) -> None:
    if not 0 < valid_fraction < 1:
        raise UsageError(f"valid_fraction={valid_fraction}; expected a number between 0 and 1, such as 0.05")
    if max_bytes is not None and max_bytes < 1:
        raise UsageError(f"max_bytes={max_bytes}; expected at least 1")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed={seed}; expected a whole number from 0 to 2^63 - 1")
    if workers < 1:
        raise UsageError(f"workers={workers}; expected at least 1")


def _inputs(files: Sequence[Path], vocab_size: int | None, tokenizer: Path | None) -> dict[str, Any]:
    """What a text folder is made from, as JSON values; equal values mean that the folder need not be made again."""
    listing = []
    for file in files:
        with naming(file, "read"):
            found = file.stat()
        listing.append([str(file.resolve()), found.st_size, found.st_mtime_ns])
    if tokenizer is None:
        vocabulary: dict[str, Any] = {"vocab_size": vocab_size or DEFAULT_VOCABULARY, "tokenizer": None}
    else:
        with naming(tokenizer, "read the tokenizer"):
            digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        vocabulary = {"vocab_size": None, "tokenizer": digest}
    return vocabulary | {"source_files": hashlib.sha256(json.dumps(listing).encode()).hexdigest()}


def _existing(output: Path, inputs: dict[str, Any]) -> TextInfo | None:
    """The folder at `output` if it was made from `inputs`; None if nothing is there."""
    if not os.path.lexists(output):
        return None
    if not output.is_dir():
        raise UsageError(f"{output} exists and is no folder; choose another output")
    if not any(output.iterdir()):
        return None
    if not (output / "text.json").is_file():
        raise UsageError(f"{output} exists and holds something else than text; choose another output")
    found = load_text_folder(output)
    before = read_json(output / "text.json", "a text folder's description").get("inputs", {})
    changed = [key for key in inputs if key not in before or before[key] != inputs[key]]
    if changed:
        values = (key if key == "source_files" else f"{key} {before.get(key)} -> {inputs[key]}" for key in changed)
        advice = "choose another output, or remove that folder"
        raise UsageError(f"{output} was made otherwise ({', '.join(values)} changed) and is left as it is; {advice}")
    return found


@contextlib.contextmanager
def _new_folder(output: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """A folder beside `output` to fill, renamed to `output` at the end.

    What an interrupted process left there is kept if it was made from the same `inputs`, and cleared otherwise. On
    failure the folder is removed, unless it has finished parts. A lock, which ends with its process, keeps two from
    filling it at once.
    """
    partial = output.with_name(f".{output.name}.partial")
    parts = partial / _PARTS
    with naming(partial, "make"):
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is making {output}; wait for it, or choose another output") from None
        try:
            with naming(partial, "make"):
                _clear_unless_made_from(inputs, partial)
                parts.mkdir(exist_ok=True)
            yield partial
            with naming(output, "make"):
                shutil.rmtree(parts)
                (partial / _INPUTS).unlink()
                partial.rename(output)
        except BaseException:
            if not any(parts.glob("part-*")):
                shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _clear_unless_made_from(inputs: dict[str, Any], partial: Path) -> None:
    try:
        if read_json(partial / _INPUTS, "the inputs of a text folder") == inputs:
            return
    except FileError:
        pass  # there is none, or a torn one
    for left in partial.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    write_json(partial / _INPUTS, inputs)


def _megatron_datasets() -> ModuleType:
    """Megatron-core's module of token files, without its remarks on what else could be installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = logging.root.manager.disable
            logging.disable(logging.WARNING)
            try:
                from megatron.core.datasets import indexed_dataset
            finally:
                logging.disable(before)
    except ModuleNotFoundError as error:
        raise ComposerError(f'{error.name} is not installed: pip install "composer-megatron[train]"') from None
    return indexed_dataset


def _encoder(
    folder: Path,
    corpus: Corpus,
    vocab_size: int | None,
    tokenizer: Path | None,
    megatron: ModuleType,
    report: Progress,
) -> Encoder:
    """Write ``tokenizer.json``, unless it is there."""
    path = folder / "tokenizer.json"
    if path.is_file():
        chosen = tokenizing.load_tokenizer(path)
    elif tokenizer is None:
        report("tokenizer", 0, None)
        sample = corpus.training_sample(TOKENIZER_BYTES)
        chosen = tokenizing.train_tokenizer(sample, vocab_size or DEFAULT_VOCABULARY)
    else:
        chosen = tokenizing.load_tokenizer(tokenizer)
    end_of_text, rows = tokenizing.end_of_text_id(chosen, tokenizer or path), tokenizing.vocabulary_size(chosen)
    if not path.is_file():
        write_text(path, chosen.to_str(pretty=True))
    return Encoder(path, rows, end_of_text, np.dtype(megatron.DType.optimal_dtype(rows)).str)


def _join(
    folder: Path, parts: Sequence[Path], encoder: Encoder, sources: tuple[str, ...], megatron: ModuleType
) -> TextInfo:
    """Make the token files of all parts, in order."""
    writers = {name: _SplitWriter(folder / name, encoder, megatron) for name in SPLITS}
    try:
        with naming(folder, "write"):
            for part in parts:
                encoded = read_part(part)
                if encoded is None:
                    raise FileError(f"{part} is damaged; start again: the other parts are kept")
                for name, writer in writers.items():
                    writer.add(encoded[name])
            for writer in writers.values():
                writer.finish()
    finally:
        for writer in writers.values():
            writer.abandon()
    train, valid = writers[TRAIN], writers[VALID]
    return TextInfo(folder, sources, encoder.rows, encoder.end_of_text, train.info, valid.info, *_unigram(train, valid))


class _SplitWriter:
    """Writes one side's token files and counts what goes in."""

    def __init__(self, prefix: Path, encoder: Encoder, megatron: ModuleType) -> None:
        self.prefix = prefix
        self.bytes = 0
        self.counts = np.zeros(encoder.rows, dtype=np.int64)
        self.digest = hashlib.sha256()
        with naming(prefix, "write"):
            self.builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(encoder.dtype).type)

    def add(self, encoded: Encoded) -> None:
        """Write a part's documents."""
        data = encoded.tokens.tobytes()
        self.builder.data_file.write(data)
        self.digest.update(data)
        # One sequence a document, as `add_item` and `end_document` would have it, for all documents at once.
        self.builder.sequence_lengths.extend(encoded.lengths.tolist())
        first = len(self.builder.document_indices)
        self.builder.document_indices.extend(range(first, first + len(encoded.lengths)))
        self.counts += encoded.counts
        self.bytes += encoded.bytes

    def finish(self) -> None:
        """Write the index."""
        self.builder.finalize(f"{self.prefix}.idx")

    def abandon(self) -> None:
        """Close the file, whatever became of what it still held; after `finish` there is nothing left to do."""
        with contextlib.suppress(OSError):
            self.builder.data_file.close()

    @property
    def info(self) -> SplitInfo:
        documents = len(self.builder.sequence_lengths)
        return SplitInfo(documents, int(self.counts.sum()), self.bytes, self.digest.hexdigest())


def _unigram(train: _SplitWriter, valid: _SplitWriter) -> tuple[float, float]:
    """`TextInfo.unigram_nats_per_token` and `TextInfo.unigram_bits_per_byte`."""
    probabilities = (train.counts + 1) / (train.counts.sum() + len(train.counts))
    nats = -float(valid.counts @ np.log(probabilities))
    return nats / int(valid.counts.sum()), nats / math.log(2) / valid.bytes
