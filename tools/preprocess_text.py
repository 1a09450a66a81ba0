"""Make a text folder for training: a tokenizer and Megatron's token files, from text in files and folders.

    python tools/preprocess_text.py --text books/ notes.md news.jsonl.xz --output runs/text

Takes txt, md, rst, py (a document a file) and jsonl (a document a line), also as .gz or .xz. Without --text it takes
the Python standard library's own sources. Started again with the same settings it returns at once.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from tyro.conf import arg

from composer_megatron.errors import ComposerError
from composer_megatron.text.preprocess import TextInfo, preprocess

NAME = Path(__file__).name


@dataclass(frozen=True)
class Arguments:
    """What to read and where to write.

    Attributes:
        output: Folder to make.
        text: Files and folders to read; by default the Python standard library's sources.
        vocab_size: Tokens of the byte-level BPE to train; 4096 by default.
        tokenizer: A tokenizer to use instead (Hugging Face tokenizers JSON).
        valid_fraction: Part of the documents to hold out, chosen by the hash of their content.
        max_bytes: Use at most this much text, a sample drawn by hash.
        field: Field of a jsonl line that holds the text.
        seed: Changes which documents are held out and sampled.
        workers: Processes that encode; all cores by default.
        json_output: Print one JSON object for programs instead of text.
        debug: Show the traceback of an error.
    """

    output: Path
    text: tuple[Path, ...] | None = None
    vocab_size: int | None = None
    tokenizer: Path | None = None
    valid_fraction: float = 0.05
    max_bytes: int | None = None
    field: str = "text"
    seed: int = 0
    workers: int | None = None
    json_output: Annotated[bool, arg(name="json")] = False
    debug: bool = False


class Display:
    """Shows how far the work is: a bar on a terminal, otherwise a line a stage and one every ten seconds."""

    LABELS = {"read": "reading", "tokenizer": "training a tokenizer", "encode": "encoding"}  # noqa: RUF012

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description:22}"), BarColumn(), TextColumn("{task.fields[shown]}")
        self.bars = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self.console = console
        self.tasks: dict[str, TaskID] = {}
        self.printed = 0.0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Note that `done` of `total` bytes of `stage` are behind us."""
        first = stage not in self.tasks
        if first:
            for task in self.tasks.values():
                self.bars.stop_task(task)
            self.tasks[stage] = self.bars.add_task(self.LABELS.get(stage, stage), total=total, shown="")
        shown = f"{done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else "") if done or total else ""
        self.bars.update(self.tasks[stage], completed=done, total=total, shown=shown)
        now = time.monotonic()
        if not self.console.is_terminal and (first or now - self.printed > 10):
            self.printed = now
            self.console.print(f"{self.LABELS.get(stage, stage)} {shown}".rstrip())


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit: 0 done, 1 failed, 2 wrong usage. Errors are one message on standard error."""
    given = tyro.cli(Arguments, prog=NAME, description=__doc__, args=arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    display = Display(Console(stderr=True, highlight=False, soft_wrap=True))
    try:
        with display.bars:
            info = preprocess(
                given.text,
                given.output,
                vocab_size=given.vocab_size,
                tokenizer=given.tokenizer,
                valid_fraction=given.valid_fraction,
                max_bytes=given.max_bytes,
                field=given.field,
                seed=given.seed,
                workers=given.workers,
                progress=display,
            )
    except ComposerError as error:
        if given.debug:
            traceback.print_exc()
        print(f"{NAME}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted; the same command goes on with what is finished", file=sys.stderr)
        sys.exit(130)
    if given.json_output:
        print(json.dumps({"folder": str(info.folder)} | info.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print(info, reused=not display.tasks)


def _print(info: TextInfo, *, reused: bool) -> None:
    print(f"{info.folder}{' is there already' if reused else ''}: {info.vocab_size} tokens in the vocabulary")
    for name, split in (("train", info.train), ("valid", info.valid)):
        per_token = split.bytes / split.tokens
        counts = f"{split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens"
        print(f"  {name}: {counts} ({per_token:.2f} bytes a token)")
    nats, bits = info.unigram_nats_per_token, info.unigram_bits_per_byte
    print(f"  a unigram model: {nats:.4f} nats a token, {bits:.4f} bits a byte on valid")


if __name__ == "__main__":
    main()
