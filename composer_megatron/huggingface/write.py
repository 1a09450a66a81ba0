"""Safetensors written one tensor at a time: memory holds one of them, not a file of them.

The format is a header of JSON behind its length in 8 bytes, then the tensors' bytes in the header's order
(https://huggingface.co/docs/safetensors). The safetensors package writes a file from all of its tensors at once; models
of tens of gigabytes on small machines are why this does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from composer_megatron.errors import FileError
from composer_megatron.files import naming, write_json

_NAMES = MappingProxyType({torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"})


class Piece(NamedTuple):
    """Tensors that are made together, and so written one after the other into the same file.

    Attributes:
        sizes: Shape of each by its name, in order.
        make: Makes them, in that order.
    """

    sizes: dict[str, tuple[int, ...]]
    make: Callable[[], Sequence[Tensor]]

    def elements(self) -> int:
        """Numbers in all of them."""
        return sum(torch.Size(size).numel() for size in self.sizes.values())


def write_safetensors(
    folder: Path,
    pieces: Iterable[Piece],
    dtype: torch.dtype,
    *,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write a model's weights, in one file, or in several with an index.

    Args:
        folder: Where.
        pieces: All weights, in order.
        dtype: The type in which they are written.
        shard_bytes: Size of a file, unless a single piece is larger.
        progress: Told after each piece how many bytes are written, and how many there are.

    Raises:
        FileError: If a tensor cannot be read or written, or has a number that `dtype` cannot hold.
    """
    shards = list(_shards(pieces, shard_bytes // dtype.itemsize))
    total = sum(piece.elements() for shard in shards for piece in shard) * dtype.itemsize
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    written = 0
    for name, shard in zip(names, shards, strict=True):
        for count in _write_file(folder / name, shard, dtype):
            written += count
            progress(written, total)
    if len(shards) > 1:
        places = {
            tensor: name for name, shard in zip(names, shards, strict=True) for piece in shard for tensor in piece.sizes
        }
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _shards(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    """Neighbouring pieces together, as many as have at most so many elements."""
    shard: list[Piece] = []
    elements = 0
    for piece in pieces:
        if shard and elements + piece.elements() > most:
            yield shard
            shard, elements = [], 0
        shard.append(piece)
        elements += piece.elements()
    yield shard


def _write_file(path: Path, pieces: list[Piece], dtype: torch.dtype) -> Iterator[int]:
    """Write one file; yields the bytes of each piece when they are written."""
    with naming(path, "write"), path.open("wb") as file:
        file.write(_header(pieces, dtype))
        for piece in pieces:
            count = 0
            for (name, size), tensor in zip(piece.sizes.items(), piece.make(), strict=True):
                if tensor.shape != size:
                    raise FileError(f"{name} is {tuple(tensor.shape)} where {size} was expected")
                count += file.write(_bytes(_as_type(tensor, dtype, name)))
            yield count
        file.flush()
        os.fsync(file.fileno())


def _header(pieces: list[Piece], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        for name, size in piece.sizes.items():
            start, end = end, end + torch.Size(size).numel() * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes are aligned
    return len(text).to_bytes(8, "little") + text


def _as_type(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not cast.isfinite().all() and tensor.isfinite().all():
        most, limit = float(tensor.abs().max()), torch.finfo(dtype).max
        raise FileError(f"{name} holds {most:.3g}, more than {dtype} can ({limit:.3g}); choose another type")
    return cast


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
