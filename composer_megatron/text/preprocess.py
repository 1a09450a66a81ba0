"""A corpus ready for training: documents to token files that Megatron reads, with exact counts.

A text folder holds ``tokenizer.json`` (Hugging Face tokenizers), ``train.bin/.idx`` and ``valid.bin/.idx`` (Megatron's
IndexedDataset, one sequence a document, each closed by the end-of-text token) and ``text.json``. The sources are read
three times and never held whole: to choose and split documents, to train the tokenizer, to encode.
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

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import naming, read_json, write_json
from composer_megatron.text import tokenizing
from composer_megatron.text.corpus import SPLITS, TRAIN, VALID, Corpus, Progress
from composer_megatron.text.documents import read_documents, source_files, standard_library_sources
from composer_megatron.text.folder import SplitInfo, TextInfo, load_text_folder

__all__ = ["SplitInfo", "TextInfo", "load_text_folder", "preprocess", "read_documents", "standard_library_sources"]

DEFAULT_VOCABULARY = 4096
TOKENIZER_BYTES = 32_000_000
"""A tokenizer is trained on about this much of the training side, drawn by hash; more changes little."""


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

    The folder appears whole or not at all; the files in it do not depend on `workers`.

    Args:
        paths: Files and folders (`composer_megatron.text.documents`); None is the Python standard library's sources.
        output: The folder to make.
        vocab_size: Tokens of the byte-level BPE to train, on the training side alone; 4096 by default.
        tokenizer: A tokenizer's JSON file to use instead.
        valid_fraction: Part of the documents to hold out, by the hash of their content (`Corpus.scan`).
        max_bytes: Use at most this much text; a sample drawn by hash.
        field: The field of a jsonl line that holds the text.
        seed: Changes which documents are held out and sampled.
        workers: Processes that encode; all cores by default.
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
    settings = {"valid_fraction": valid_fraction, "max_bytes": max_bytes, "field": field, "seed": seed}
    inputs = settings | _inputs(files, vocab_size, tokenizer)
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would replace a link instead of following it
    if existing := _existing(output, inputs):
        return existing
    megatron = _megatron_datasets()
    with _new_folder(output) as folder:
        corpus = Corpus.scan(
            files, field=field, valid_fraction=valid_fraction, seed=seed, max_bytes=max_bytes, progress=report
        )
        end_of_text, rows = _write_tokenizer(folder, corpus, vocab_size, tokenizer, report)
        writers = {name: _SplitWriter(folder / name, rows, end_of_text, megatron) for name in SPLITS}
        _encode(corpus, folder, writers, workers, report)
        nats, bits = _unigram(writers[TRAIN], writers[VALID])
        sources = [f"Python {platform.python_version()} standard library"] if paths is None else map(str, paths)
        splits = (writers[TRAIN].info, writers[VALID].info)
        info = TextInfo(folder, tuple(sources), rows, end_of_text, *splits, nats, bits)
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
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to fill, renamed to `output` at the end and removed on failure.

    What a killed process left there is cleared; a lock, which ends with its process, keeps two from filling it at once.
    """
    partial = output.with_name(f".{output.name}.partial")
    with naming(partial, "make"):
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is making {output}; wait for it, or choose another output") from None
        try:
            for left in partial.iterdir():
                left.unlink()
            yield partial
            with naming(output, "make"):
                partial.rename(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


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


def _write_tokenizer(
    folder: Path, corpus: Corpus, vocab_size: int | None, tokenizer: Path | None, report: Progress
) -> tuple[int, int]:
    """Write ``tokenizer.json``; the id of its end of text and its number of rows."""
    if tokenizer is None:
        report("tokenizer", 0, None)
        sample = corpus.training_sample(TOKENIZER_BYTES)
        chosen = tokenizing.train_tokenizer(sample, vocab_size or DEFAULT_VOCABULARY)
    else:
        chosen = tokenizing.load_tokenizer(tokenizer)
    path = folder / "tokenizer.json"
    end_of_text = tokenizing.end_of_text_id(chosen, tokenizer or path)
    with naming(path, "write"):
        path.write_text(chosen.to_str(pretty=True), encoding="utf-8")
    return end_of_text, tokenizing.vocabulary_size(chosen)


class _SplitWriter:
    """Writes one side's token files and counts what goes in."""

    def __init__(self, prefix: Path, rows: int, end_of_text: int, megatron: ModuleType) -> None:
        self.prefix, self.end_of_text = prefix, end_of_text
        self.documents = self.bytes = 0
        self.counts = np.zeros(rows, dtype=np.int64)
        with naming(prefix, "write"):
            dtype = megatron.DType.optimal_dtype(rows)
            self.builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)

    def add(self, size: int, ids: np.ndarray) -> None:
        """Write a document of `size` bytes from its tokens, int32 [tokens], and close it with the end of text."""
        import torch

        tokens = np.append(ids, np.int32(self.end_of_text))
        self.builder.add_item(torch.from_numpy(tokens))
        self.builder.end_document()
        np.add.at(self.counts, tokens, 1)
        self.documents += 1
        self.bytes += size

    def finish(self) -> None:
        """Write the index."""
        self.builder.finalize(f"{self.prefix}.idx")

    def abandon(self) -> None:
        """Close the file, whatever became of what it still held; after `finish` there is nothing left to do."""
        with contextlib.suppress(OSError):
            self.builder.data_file.close()

    @property
    def info(self) -> SplitInfo:
        return SplitInfo(self.documents, int(self.counts.sum()), self.bytes)


def _encode(corpus: Corpus, folder: Path, writers: dict[str, _SplitWriter], workers: int, report: Progress) -> None:
    total, done = corpus.bytes, 0
    report("encode", 0, total)
    tokenizer = folder / "tokenizer.json"
    documents = tokenizing.encode_documents(corpus.documents(), tokenizer, workers)
    try:
        with naming(folder, "write"), contextlib.closing(documents):
            for name, size, ids in documents:
                writers[name].add(size, ids)
                done += size
                report("encode", done, total)
            for writer in writers.values():
                writer.finish()
    finally:
        for writer in writers.values():
            writer.abandon()


def _unigram(train: _SplitWriter, valid: _SplitWriter) -> tuple[float, float]:
    """`TextInfo.unigram_nats_per_token` and `TextInfo.unigram_bits_per_byte`."""
    probabilities = (train.counts + 1) / (train.counts.sum() + len(train.counts))
    nats = -float(valid.counts @ np.log(probabilities))
    return nats / int(valid.counts.sum()), nats / math.log(2) / valid.bytes
