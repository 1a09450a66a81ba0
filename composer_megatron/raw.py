"""What a run on raw text is trained on: files read as they are, and the tokenizer that the run brings for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_megatron.errors import FileError, UsageError
from composer_megatron.mixture import check_shares, check_vocabulary, distinct_names
from composer_megatron.text import tokenizing
from composer_megatron.text.stream import Fingerprint, RawText

if TYPE_CHECKING:
    from composer_megatron.architecture import Architecture


@dataclass(frozen=True)
class RawOptions:
    """How raw text is read.

    Attributes:
        tokenizer: The tokenizer's file; None where none was given.
        field: The field of a jsonl line that holds the text.
        valid_fraction: Part of the documents to hold out.
        shuffle_megabytes: Text within which documents are shuffled; 0 for none.
        shards: Streams to deal the text to; None for the number of data-parallel ranks.
    """

    tokenizer: Path | None = None
    field: str = "text"
    valid_fraction: float = 0.05
    shuffle_megabytes: float = 64.0
    shards: int | None = None


@dataclass(frozen=True)
class RawMixture:
    """Raw texts to draw training sequences from.

    Attributes:
        texts: Their files.
        weights: The share of the training sequences that each gives; together 1.
        tokenizer: The tokenizer's file.
        end_of_text: Id of the token that closes each document.
        vocab_size: Token ids.
        block_bytes: Text within which documents are shuffled; 0 for none.
        shards: Streams to deal the text to; None for the number of data-parallel ranks.
    """

    texts: tuple[RawText, ...]
    weights: tuple[float, ...]
    tokenizer: Path
    end_of_text: int
    vocab_size: int
    block_bytes: int
    shards: int | None

    @classmethod
    def load(cls, paths: Sequence[Path], weights: Sequence[float], options: RawOptions) -> RawMixture:
        """Find the files, and look at the tokenizer.

        Args:
            paths: Files or folders.
            weights: Of each; none for shares in proportion to the bytes of the files as they are.
            options: How to read them.

        Raises:
            UsageError: If there is no tokenizer, or a setting is impossible.
            FileError: If there is no text, or the tokenizer is none.
        """
        if options.tokenizer is None:
            problem = f"{paths[0]} is no text folder, so it is read as raw text, and that needs --text-tokenizer FILE"
            raise UsageError(f"{problem}; or make a text folder of it with tools/preprocess_text.py")
        if options.shuffle_megabytes < 0:
            raise UsageError(f"--text-shuffle-megabytes {options.shuffle_megabytes:g}; expected at least 0")
        if options.shards is not None and options.shards < 1:
            raise UsageError(f"--text-shards {options.shards}; expected at least 1")
        shares = check_shares(paths, weights)
        texts = tuple(RawText.find(path, field=options.field, valid_fraction=options.valid_fraction) for path in paths)
        sizes = [sum(version.size for version in text.versions) for text in texts]
        empty = next((text for text, size in zip(texts, sizes, strict=True) if not size), None)
        if empty is not None:
            raise FileError(f"{empty.path} holds no text: its files are empty")
        tokenizer = tokenizing.load_tokenizer(options.tokenizer)
        return cls(
            texts,
            shares or tuple(size / sum(sizes) for size in sizes),
            options.tokenizer,
            tokenizing.end_of_text_id(tokenizer, options.tokenizer),
            tokenizing.vocabulary_size(tokenizer),
            round(options.shuffle_megabytes * 1e6),
            options.shards,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The last parts of the paths that were named; for people."""
        return distinct_names([text.path for text in self.texts])

    @functools.cached_property
    def checksums(self) -> list[dict[str, Any]]:
        """What tells each text from another without reading it whole, as JSON has it."""
        return [
            {
                "path": str(text.path.resolve()),
                "weight": weight,
                "files": [[_relative(file, text.path), *Fingerprint.of(file)] for file in text.files],
                "field": text.field,
                "valid_fraction": text.valid_fraction,
                "shuffle_bytes": self.block_bytes,
            }
            for text, weight in zip(self.texts, self.weights, strict=True)
        ]

    def check_same(self, saved: Sequence[dict[str, Any]]) -> None:
        """See that this is the text of a checkpoint, wherever it lies now.

        Raises:
            FileError: With what differs.
        """
        now = self.checksums
        if len(now) != len(saved):
            raise FileError(f"the run was trained on {len(saved)} texts, and {len(now)} are given; give the same ones")
        for here, there in zip(now, saved, strict=True):
            files = dict(zip([file[0] for file in there["files"]], there["files"], strict=True))
            for file in here["files"]:
                if file != files.get(file[0], file):
                    raise FileError(
                        f"{here['path']}: {file[0]} changed since the checkpoint ({files[file[0]][1]} bytes then, "
                        f"{file[1]} now); restore it, or begin a new run"
                    )
            different = [name for name in here if name != "path" and here[name] != there[name]]
            if different:
                changes = ", ".join(
                    name if name == "files" else f"{name} {there[name]} -> {here[name]}" for name in different
                )
                raise FileError(
                    f"{here['path']}: {changes} changed since the checkpoint; restore it, or begin a new run"
                )

    def check(self, architecture: Architecture, seq_length: int) -> None:
        """See that a model of that architecture can be trained on this text; of any length of sequences.

        Raises:
            UsageError: If the vocabulary is too large.
        """
        check_vocabulary(self.tokenizer, self.vocab_size, architecture)

    def flags(self, run_dir: Path | None) -> dict[str, Any]:
        """Megatron's flags for it."""
        return {"--dataloader-type": "external"}


def _relative(file: Path, root: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()
