"""Tensors of a ``torch_dist`` checkpoint, read one at a time: memory holds one of them, whatever the checkpoint holds.

Such a checkpoint holds each parameter under one name, in pieces that the saving layout decided. Here a tensor is put
together from its pieces alone; optimizer states that lie beside it are not touched.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Place(NamedTuple):
    """A tensor in a checkpoint, or with `layer` one layer of a stack of them.

    Attributes:
        key: Its name there.
        size: Its shape, of the layer alone where it is one of a stack.
        dtype: Its type.
        layer: Index along a leading dimension of layers; None where there is no such dimension.
    """

    key: str
    size: tuple[int, ...]
    dtype: torch.dtype
    layer: int | None = None


@dataclass(frozen=True)
class StoredRun:
    """A checkpoint that was looked into but not loaded: its tensors are read one at a time.

    Attributes:
        path: The run folder.
        iteration: The optimizer step at which the weights were saved.
        architecture: Sequence and shape.
        tokenizer: None where the run was trained without a text folder.
        sequence_length: Tokens of a training sequence.
        dtype: Type in which the parameters were saved.
        folder: The checkpoint's own folder.
        sizes: Shape of each parameter, by its name in a model of one stage.
    """

    path: Path
    iteration: int
    architecture: Architecture
    tokenizer: Tokenizer | None
    sequence_length: int
    dtype: torch.dtype
    folder: Path
    sizes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """One parameter, whole, whichever layout saved it.

        Raises:
            FileError: If the checkpoint cannot be read.
        """
        return read_tensor(self.folder, Place(name, self.sizes[name], self.dtype))


def read_tensor(folder: Path, place: Place) -> Tensor:
    """Read one tensor, or one layer of a stack, without reading the others.

    Args:
        folder: The checkpoint of one iteration.
        place: Which tensor.

    Returns:
        On the CPU, of `Place.size`.

    Raises:
        FileError: If a file is missing or corrupt, or the pieces do not make the whole.
    """
    planner = _OnePlace(place)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")  # as asked for: no_dist
            torch_checkpoint.load(
                {place.key: planner.tensor},
                storage_reader=torch_checkpoint.FileSystemReader(folder),
                planner=planner,
                no_dist=True,
            )
    except (Exception, CheckpointException) as error:  # PyTorch, pickle and zip each raise their own
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise unreadable(folder, cause) from error
    return planner.tensor.view(place.size)


def unreadable(folder: Path, cause: BaseException) -> FileError:
    """The error for a checkpoint that cannot be read."""
    first_line = (str(cause).splitlines() or [""])[0][:200]
    return FileError(f"cannot read the checkpoint {folder}: {type(cause).__name__}: {first_line}; restore it")


class _OnePlace(LoadPlanner):
    """Reads one place of a checkpoint into `tensor`, whichever pieces it was saved in."""

    def __init__(self, place: Place) -> None:
        stacked = place.layer is not None
        self._key = place.key
        self._offsets = torch.Size([place.layer or 0] * stacked + [0] * len(place.size))
        self.tensor = torch.empty([1] * stacked + list(place.size), dtype=place.dtype)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        saved = self._metadata.state_dict_metadata[self._key]  # type: ignore[union-attr]
        wanted = ChunkStorageMetadata(offsets=self._offsets, sizes=self.tensor.size())
        items = create_read_items_for_chunk_list(self._key, saved, [wanted])  # type: ignore[arg-type]
        if sum(item.lengths.numel() for item in items) != self.tensor.numel():
            raise ValueError(f"pieces of {self._key} are missing")
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ValueError(f"{self._key} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        piece = self.tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            piece = piece.narrow(dim, start, length)
        return piece

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...
