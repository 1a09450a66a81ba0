"""Held-out loss of a trained run, over every token of a text exactly once, in nats a token and bits a byte.

The windowing rule: each document stands alone and is closed by the end of text, which is scored like any other token.
Its tokens are cut into windows of the run's sequence length. A window's first token is predicted from the token before
it alone (the end of text at the document's start), the second from two tokens, and so on. No token is scored twice or
left out, and no window looks into another. Bits a byte divide by the UTF-8 bytes of the documents' text; an end of text
has none.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from composer_megatron.checkpoint import LoadedRun
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming, write_json
from composer_megatron.text.documents import read_documents
from composer_megatron.text.folder import TextInfo, load_text_folder
from composer_megatron.text.tokenizing import encode_documents

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

_POOL = 1024
"""Windows held at once, to be batched with others of about their length."""


@dataclass(frozen=True)
class Evaluation:
    """How well a run predicts a text.

    Attributes:
        nats_per_token: Mean cross-entropy over the tokens, ends of text included.
        bits_per_byte: The same cross-entropy in bits, all tokens together, over the bytes: comparable between
            tokenizers.
        perplexity: exp(`nats_per_token`).
        tokens: Tokens scored.
        bytes: UTF-8 bytes of the text.
        iteration: The checkpoint's.
    """

    nats_per_token: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    iteration: int

    def save(self, run_dir: Path) -> Path:
        """Write ``eval.json`` into a run folder, in one step; returns its path."""
        path = run_dir / "eval.json"
        write_json(path, asdict(self))
        return path


class Document(NamedTuple):
    """A text to score.

    Attributes:
        tokens: Its ids, int64 [tokens], the closing end of text included.
        bytes: Its UTF-8 bytes.
    """

    tokens: np.ndarray
    bytes: int


class Window(NamedTuple):
    """A stretch of a document: `inputs` [length] predict `targets` [length], each the token after its input."""

    inputs: np.ndarray
    targets: np.ndarray


def evaluate_text(
    run: LoadedRun,
    text: Path | Sequence[Path],
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score a text folder's held-out side, or text files, by the rule above.

    Args:
        run: A trained run.
        text: A text folder, or one or several files or folders of raw text (`composer_megatron.text.documents`).
        batch_tokens: Tokens in one pass; by default 2048 on a CPU, 16384 on a GPU.
        progress: Called with the number of tokens done so far.

    Raises:
        FileError: If the text cannot be read, is empty, or the folder has another tokenizer than the run.
        UsageError: If `batch_tokens` is impossible, or no path is given.
        ComposerError: If the loss is not finite.
    """
    if batch_tokens is None:
        batch_tokens = 2048 if run.device.type == "cpu" else 16384
    if batch_tokens < 1:
        raise UsageError(f"batch_tokens={batch_tokens}; expected at least 1")
    paths = [text] if isinstance(text, Path) else list(text)
    folder = load_text_folder(paths[0]) if len(paths) == 1 and (paths[0] / "text.json").is_file() else None
    documents = _held_out(run, folder) if folder else _raw(run, paths)
    nats, tokens, size = _score(run, documents, batch_tokens, progress)
    if folder:
        size = folder.valid.bytes
    if not tokens or not size:
        raise FileError(f"{', '.join(map(str, paths))}: no text to evaluate on")
    if not math.isfinite(nats):
        raise ComposerError(f"the loss of {run.path} at iteration {run.iteration} is {nats}: its training diverged")
    return Evaluation(
        nats_per_token=nats / tokens,
        bits_per_byte=nats / math.log(2) / size,
        perplexity=math.exp(min(nats / tokens, 700.0)),  # a larger one is no number
        tokens=tokens,
        bytes=size,
        iteration=run.iteration,
    )


def _held_out(run: LoadedRun, folder: TextInfo) -> Iterator[Document]:
    """The documents of the valid side; their bytes are known together only, from ``text.json``."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    own = run.path / "tokenizer.json"
    run.require_tokenizer()
    if _content(own) != _content(folder.tokenizer):
        raise FileError(f"{folder.tokenizer} is another tokenizer than {own}; evaluate on text made with the run's own")
    dataset = IndexedDataset(str(folder.valid_prefix))
    # A copy: what the data set returns points into its file's memory, which goes away with it.
    return (Document(dataset[number].astype(np.int64), 0) for number in range(len(dataset)))


def _content(path: Path) -> object:
    with naming(path, "read"):
        return json.loads(path.read_text(encoding="utf-8"))


def _raw(run: LoadedRun, paths: Sequence[Path]) -> Iterator[Document]:
    run.require_tokenizer()
    texts = ((None, text) for text in read_documents(paths))
    for _, size, ids in encode_documents(texts, run.path / "tokenizer.json", workers=1):
        yield Document(np.append(ids, run.end_of_text).astype(np.int64), size)


def _score(
    run: LoadedRun, documents: Iterable[Document], batch_tokens: int, progress: Callable[[int], None] | None
) -> tuple[float, int, int]:
    """Summed cross-entropy in nats, tokens, and bytes."""
    nats, tokens, size = 0.0, 0, 0

    def windows() -> Iterator[Window]:
        nonlocal size
        for document in documents:
            size += document.bytes
            yield from cut(document.tokens, run.end_of_text, run.sequence_length)

    for batch in batches(windows(), batch_tokens):
        nats += _batch_nats(run.model, batch, run.device)
        tokens += sum(len(window.targets) for window in batch)
        if progress:
            progress(tokens)
    return nats, tokens, size


def cut(tokens: np.ndarray, end_of_text: int, length: int) -> Iterator[Window]:
    """A document's windows: every token is a target once, and the input of the target after it."""
    inputs = np.concatenate(([end_of_text], tokens[:-1]))
    for start in range(0, len(tokens), length):
        yield Window(inputs[start : start + length], tokens[start : start + length])


def batches(windows: Iterable[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Group windows of about the same length; a padded batch has at most `batch_tokens` tokens, or one window."""
    for pool in itertools.batched(windows, _POOL):
        batch: list[Window] = []
        for window in sorted(pool, key=lambda window: len(window.targets), reverse=True):
            if batch and (len(batch) + 1) * len(batch[0].targets) > batch_tokens:
                yield batch
                batch = []
            batch.append(window)
        yield batch


@torch.no_grad()
def _batch_nats(model: HybridModel, batch: Sequence[Window], device: torch.device) -> float:
    # Padding stands on the right, where causal attention does not see it, and is not counted.
    rows, longest = len(batch), max(len(window.targets) for window in batch)
    inputs, targets = (torch.zeros(rows, longest, dtype=torch.long) for _ in range(2))
    counts = torch.zeros(rows, longest, dtype=torch.bool)
    for row, window in enumerate(batch):
        end = len(window.targets)
        inputs[row, :end] = torch.from_numpy(window.inputs)
        targets[row, :end] = torch.from_numpy(window.targets)
        counts[row, :end] = True
    positions = torch.arange(longest, device=device).expand(rows, -1)
    losses = model(inputs.to(device), positions, None, labels=targets.to(device))
    return float(losses[counts.to(device)].double().sum())
