"""Weights from elsewhere as a run folder: the architecture, the tokenizer and a Megatron checkpoint of iteration 0.

The checkpoint is written one tensor at a time, each read when its turn comes: memory holds two of them, not the model.
It is in Megatron's ``torch_dist`` format, so any parallel layout loads it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from composer_megatron.architecture import Architecture
from composer_megatron.checkpoint import group_of_one
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming, new_folder, write_json, write_text
from composer_megatron.text import tokenizing

type Progress = Callable[[int, int], None]
"""Told how many bytes are done, and how many there are."""


def silent(done: int, total: int) -> None:
    """The `Progress` that shows nothing."""


_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Special tokens and chat templates, in files of transformers'."""


@dataclass(frozen=True)
class Source:
    """A trained model that is to become a run.

    Attributes:
        path: Where it is, for messages.
        architecture: Sequence and shape.
        sequence_length: Tokens of a training sequence.
        dtype: Type of its weights.
        tensors: For each parameter of ours, by its name in a model of one stage, what reads it.
        tokenizer: Its ``tokenizer.json``; None where there is none.
    """

    path: Path
    architecture: Architecture
    sequence_length: int
    dtype: torch.dtype
    tensors: Mapping[str, Callable[[], Tensor]]
    tokenizer: Path | None


def write_run(source: Source, run_dir: Path, progress: Progress = silent) -> None:
    """Make the run folder of a source. It appears whole or not at all.

    Args:
        source: The model.
        run_dir: The folder to make.
        progress: Told after each parameter how many bytes were taken over, and how many there are.

    Raises:
        UsageError: If `run_dir` exists.
        FileError: If the source cannot be read, its tokenizer has more ids than the model has embeddings, or the
            folder cannot be written.
    """
    if source.tokenizer is not None:
        _check_tokenizer(source.tokenizer, source.architecture)
    with ended_by_sigterm(), new_folder(run_dir) as folder:
        source.architecture.save(folder / "architecture.json")
        if source.tokenizer is not None:
            copy_tokenizer(source.tokenizer.parent, folder)
        checkpoint = folder / "checkpoints" / "iter_0000000"
        checkpoint.mkdir(parents=True)
        check_space(folder, source.architecture.params_total * source.dtype.itemsize)
        _write_checkpoint(source, checkpoint, progress)
        write_text(folder / "checkpoints" / "latest_checkpointed_iteration.txt", "0")


def _check_tokenizer(path: Path, architecture: Architecture) -> None:
    ids, rows = tokenizing.vocabulary_size(tokenizing.load_tokenizer(path)), architecture.shape.vocab_size
    if ids > rows:
        raise FileError(f"{path} has {ids} token ids, the model only {rows} embeddings; put its own tokenizer there")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy ``tokenizer.json`` from one folder to another, and what transformers keeps beside it where it is there.

    Raises:
        FileError: If a file cannot be read or written.
    """
    for name in ("tokenizer.json", *_BESIDE_TOKENIZER):
        path = source / name
        if name == "tokenizer.json" or path.is_file():
            with naming(path, "read"):
                text = path.read_text(encoding="utf-8")
            write_text(target / name, text)


def _write_checkpoint(source: Source, folder: Path, progress: Progress) -> None:
    with group_of_one():
        tensors, objects = _checkpoint_layout(source)
        torch.save(_common_state(source), folder / "common.pt")
        told = _Told(progress, source.architecture.params_total * source.dtype.itemsize)
        read: dict[str, Callable[[], Any]] = {
            name: functools.partial(told.read, source.tensors[name], source.dtype) for name in tensors
        }
        read |= {name: functools.partial(_pickled, [value]) for name, value in objects.items()}
        _save({**tensors, **{name: io.BytesIO() for name in objects}}, read, folder)
    # Megatron writes this one last, too: it says that the checkpoint is whole.
    write_json(folder / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})


def _save(layout: dict[str, Any], read: Mapping[str, Callable[[], Any]], folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")  # as asked for: no_dist
            torch_checkpoint.save(
                layout,
                # The writer keeps what it has written until a file is done: so each tensor has its own.
                storage_writer=torch_checkpoint.FileSystemWriter(folder, single_file_per_rank=False, thread_count=1),
                planner=_OneByOne(read),
                no_dist=True,
            )
    except CheckpointException as error:  # no `Exception`; wraps the process's own one
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, ComposerError):
            raise cause from error
        raise FileError(f"cannot write the checkpoint: {type(cause).__name__}: {cause}") from error


def _checkpoint_layout(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint of the architecture holds: tensors without values by their names, and other objects."""
    try:
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        from composer_megatron.model import build_model
    except ModuleNotFoundError as error:
        raise ComposerError(f'{error.name} is not installed: pip install "composer-megatron[train]"') from None
    length = source.sequence_length
    model = build_model(source.architecture, max_sequence_length=length, dtype=source.dtype, meta=True)
    entries = model.sharded_state_dict().values()
    objects = {entry.unique_key: entry.data for entry in entries if isinstance(entry, ShardedObject)}
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, objects


def _common_state(source: Source) -> dict[str, Any]:
    """What Megatron keeps beside the tensors: above all the flags that the model would have been trained with."""
    from composer_megatron.arguments import architecture_flags, command_line, given_flags
    from composer_megatron.pattern import hybrid_pattern

    pattern = hybrid_pattern(source.architecture.sequence)
    flags = given_flags(command_line(architecture_flags(source.architecture, pattern), {}, ()))
    flags |= {
        "hybrid_layer_pattern": pattern,  # given again: argparse takes "--", two MLP blocks, for no value
        "num_layers": len(source.architecture.sequence),
        "seq_length": source.sequence_length,
        "max_position_embeddings": source.sequence_length,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return {"args": argparse.Namespace(**flags), "iteration": 0, "checkpoint_version": 3.0}


@dataclass
class _Told:
    """Reads tensors and tells how far it is."""

    progress: Progress
    total: int
    done: int = 0

    def read(self, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        tensor = read().to(dtype).contiguous()
        self.done += tensor.nbytes
        self.progress(self.done, self.total)
        return tensor


def _pickled(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer


class _OneByOne(DefaultSavePlanner):
    """Plans by the tensors' sizes, and reads each value when it is about to be written."""

    def __init__(self, read: Mapping[str, Callable[[], Any]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._read[index.fqn]()

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object


def check_absent(path: Path) -> None:
    """See that a folder that is to be made is not there, before any work goes into it.

    Raises:
        UsageError: If there is something already, were it a link that leads nowhere.
    """
    if os.path.lexists(path):
        raise UsageError(f"{path} exists; nothing is overwritten: choose another folder, or remove it")


def check_space(folder: Path, needed: int) -> None:
    """See that a folder's disk has room for so many bytes.

    Raises:
        FileError: If there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FileError(f"{folder.parent} has {free / 1e9:.1f} GB free; the weights need {needed / 1e9:.1f} GB")


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, so that what is half made is removed."""

    def end(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there may a signal's handler be set
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
