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
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming, write_json, write_text
from composer_megatron.text import tokenizing


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


def write_run(source: Source, run_dir: Path) -> None:
    """Make the run folder of a source. It appears whole or not at all.

    Args:
        source: The model.
        run_dir: The folder to make.

    Raises:
        UsageError: If `run_dir` exists.
        FileError: If the source cannot be read, its tokenizer has more ids than the model has embeddings, or the
            folder cannot be written.
    """
    tokenizer = None if source.tokenizer is None else _checked_tokenizer(source.tokenizer, source.architecture)
    with new_folder(run_dir) as folder:
        source.architecture.save(folder / "architecture.json")
        if tokenizer is not None:
            write_text(folder / "tokenizer.json", tokenizer)
        checkpoint = folder / "checkpoints" / "iter_0000000"
        checkpoint.mkdir(parents=True)
        _write_checkpoint(source, checkpoint)
        write_text(folder / "checkpoints" / "latest_checkpointed_iteration.txt", "0")


def _checked_tokenizer(path: Path, architecture: Architecture) -> str:
    ids, rows = tokenizing.vocabulary_size(tokenizing.load_tokenizer(path)), architecture.shape.vocab_size
    if ids > rows:
        raise FileError(f"{path} has {ids} token ids, the model only {rows} embeddings; put its own tokenizer there")
    with naming(path, "read"):
        return path.read_text(encoding="utf-8")


def _write_checkpoint(source: Source, folder: Path) -> None:
    with _group_of_one():
        tensors, objects = _checkpoint_layout(source)
        torch.save(_common_state(source), folder / "common.pt")
        read: dict[str, Callable[[], Any]] = {name: _as_type(source.tensors[name], source.dtype) for name in tensors}
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


@contextlib.contextmanager
def _group_of_one() -> Iterator[None]:
    """End the process group that building a model starts, unless there was one before."""
    cpu.skip_compilation()
    started_before = torch.distributed.is_initialized()
    try:
        yield
    finally:
        if not started_before and torch.distributed.is_initialized():
            from composer_megatron.model import end_single_process

            end_single_process()


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
    from composer_megatron.specs import hybrid_pattern

    pattern = hybrid_pattern(source.architecture.sequence)
    flags = given_flags(command_line(architecture_flags(source.architecture, pattern), {}, ()))
    flags |= {
        "num_layers": len(source.architecture.sequence),
        "seq_length": source.sequence_length,
        "max_position_embeddings": source.sequence_length,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return {"args": argparse.Namespace(**flags), "iteration": 0, "checkpoint_version": 3.0}


def _as_type(read: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: read().to(dtype).contiguous()


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


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill, renamed to `path` at the end and removed on failure.

    Raises:
        UsageError: If `path` exists.
        FileError: If it cannot be made.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would replace a link instead of following it
    if os.path.lexists(path):
        raise UsageError(f"{path} exists; nothing is overwritten: choose another folder, or remove it")
    with naming(path, "make"):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        with naming(path, "write"):
            yield partial
            partial.chmod(0o755)
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
