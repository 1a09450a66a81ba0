"""What a run is trained on: one text folder, or several in given shares, all of one tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import naming
from composer_megatron.text.folder import TextInfo, load_text_folder

if TYPE_CHECKING:
    from composer_megatron.architecture import Architecture


@dataclass(frozen=True)
class Mixture:
    """Text folders to draw training sequences from.

    Attributes:
        folders: What each holds.
        weights: The share of the training sequences that each gives, whatever its size; together 1.
    """

    folders: tuple[TextInfo, ...]
    weights: tuple[float, ...]

    @classmethod
    def load(cls, paths: Sequence[Path], weights: Sequence[float]) -> Mixture:
        """Read the folders.

        Args:
            paths: Text folders.
            weights: Of each; none for shares in proportion to their tokens, so that all are seen equally often.

        Raises:
            FileError: If a folder is damaged.
            UsageError: If a folder comes twice, the weights are impossible or the tokenizers differ.
        """
        folders = tuple(load_text_folder(path) for path in paths)
        shares = check_shares(paths, weights)
        for folder in folders[1:]:
            if _content(folder.tokenizer) != _content(folders[0].tokenizer):
                problem = f"{folder.folder} was made with another tokenizer than {folders[0].folder}"
                advice = f"make it again with --tokenizer {folders[0].tokenizer}"
                raise UsageError(f"{problem}: their tokens mean different things; {advice}")
        tokens = [folder.train.tokens for folder in folders]
        return cls(folders, shares or tuple(count / max(1, sum(tokens)) for count in tokens))

    @property
    def tokenizer(self) -> Path:
        """The file of the tokenizer that all have."""
        return self.folders[0].tokenizer

    @property
    def end_of_text(self) -> int:
        """Id of the token that closes each document."""
        return self.folders[0].end_of_text

    @property
    def names(self) -> tuple[str, ...]:
        """The folders' names, each another; for people."""
        return distinct_names([folder.folder for folder in self.folders])

    @property
    def checksums(self) -> list[dict[str, Any]]:
        """What identifies each folder's text, as JSON has it."""
        return [
            {
                "path": str(folder.folder.resolve()),
                "weight": weight,
                "train_sha256": folder.train.sha256,
                "valid_sha256": folder.valid.sha256,
                "train_tokens": folder.train.tokens,
                "valid_tokens": folder.valid.tokens,
            }
            for folder, weight in zip(self.folders, self.weights, strict=True)
        ]

    def check(self, architecture: Architecture, seq_length: int) -> None:
        """See that a model of that architecture can be trained on this text, in sequences of that length.

        Raises:
            UsageError: If the vocabulary is too large or the text too short.
        """
        for text in self.folders:
            check_vocabulary(text.folder, text.vocab_size, architecture)
            shortest = min(text.train.tokens, text.valid.tokens)
            for part, split in {"train": text.train, "valid": text.valid}.items():
                if split.tokens < seq_length + 1:
                    few = f"{part} has {split.tokens} tokens, fewer than a sequence of {seq_length} and its next"
                    advice = f"use more text, or --seq-length {max(1, shortest - 1)} or less"
                    raise UsageError(f"{text.folder}: {few}; {advice}")

    def flags(self, run_dir: Path | None) -> dict[str, Any]:
        """Megatron's flags for it."""
        blends: dict[str, Any] = {}
        for flag, prefixes in {
            "--train-data-path": [folder.train_prefix for folder in self.folders],
            "--valid-data-path": [folder.valid_prefix for folder in self.folders],
        }.items():
            pairs = tuple(part for pair in zip(self.weights, prefixes, strict=True) for part in pair)
            blends[flag] = prefixes[0] if len(prefixes) == 1 else pairs
        return blends | {"--data-cache-path": (run_dir or self.folders[0].folder) / "cache"}


def check_vocabulary(where: Path, ids: int, architecture: Architecture) -> None:
    """Refuse text with more token ids than the architecture has embeddings.

    Raises:
        UsageError: With both numbers.
    """
    shape = architecture.shape
    if ids > shape.vocab_size:
        problem = f"{where} has {ids} token ids, shape {shape.name!r} has vocab_size={shape.vocab_size}"
        raise UsageError(f"{problem}; tokenize with a smaller vocabulary, or use a shape with a larger one")


def check_shares(paths: Sequence[Path], weights: Sequence[float]) -> tuple[float, ...]:
    """The weights of the sources, if they are possible; none for none.

    Raises:
        UsageError: If there is not one for each source, one is not above 0, they do not sum to 1, or a source comes
            twice.
    """
    twice = next((path for path in paths if sum(path.resolve() == other.resolve() for other in paths) > 1), None)
    if twice is not None:
        raise UsageError(f"--text {twice} comes twice; give it once, with the sum of both weights")
    if not weights:
        return ()
    given = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(paths):
        counts = f"{len(weights)} of --text-weight ({given}) for {len(paths)} of --text"
        raise UsageError(f"{counts}; give each source its weight, or none of them one")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UsageError(f"--text-weight {given}: each has to be above 0; leave out the source that is not wanted")
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise UsageError(f"--text-weight {given}: they sum to {math.fsum(weights):g}; expected 1")
    return tuple(weights)


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """The last part of each path, with as much before it as tells them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = tuple("/".join(path.parts[-parts:]) for path in paths)
        if len(set(names)) == len(names):
            return names
    return tuple(map(str, paths))


def _content(tokenizer: Path) -> object:
    with naming(tokenizer, "read"):
        text = tokenizer.read_text(encoding="utf-8", errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        raise FileError(f"{tokenizer} is no tokenizer: not JSON; make the folder again") from None
