"""The weights of a Hugging Face folder: found, compared with what its configuration promises, read one at a time.

Safetensors are read, in one file or several with an index; so are PyTorch's ``pytorch_model*.bin``, without running any
code that they may hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from composer_megatron.errors import ComposerError, FileError
from composer_megatron.files import read_json
from composer_megatron.huggingface.names import Part
from composer_megatron.shape import Shape

_DTYPES = MappingProxyType({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16})
_FORMATS = ("model.safetensors", "pytorch_model.bin")
"""What a folder's one file of weights may be called; with ``.index.json``, the index of several."""


class Stored(NamedTuple):
    """Where a tensor is, and what it looks like."""

    file: Path
    size: tuple[int, ...]
    dtype: torch.dtype


class Weights(NamedTuple):
    """The weights of a folder, as parameters of ours.

    Attributes:
        dtype: Type that holds all of them exactly.
        readers: For each parameter of ours, what reads it.
    """

    dtype: torch.dtype
    readers: Mapping[str, Callable[[], Tensor]]


def open_weights(folder: Path, parts: Iterable[Part], shape: Shape, *, what: str) -> Weights:
    """Find the weights of a folder by their headers; no values yet.

    Args:
        folder: With safetensors or ``.bin`` files.
        parts: Every parameter that it has to hold.
        shape: How heads make up matrices.
        what: The kind of model, for messages: "a Llama".

    Raises:
        FileError: If a file is missing or corrupt, or a tensor is missing, of another size or type, or no parameter's.
        ComposerError: If safetensors is not installed.
    """
    parts, stored = list(parts), dict(_stored_tensors(folder))
    wanted = {name: size for part in parts for name, size in zip(part.theirs, part.sizes, strict=True)}
    _check(folder, stored, wanted, tied=shape.tied_embeddings, what=what)
    dtype = functools.reduce(torch.promote_types, (stored[name].dtype for name in wanted))
    return Weights(dtype, {part.ours: functools.partial(_read_part, part, shape, stored) for part in parts})


def _read_part(part: Part, shape: Shape, stored: Mapping[str, Stored]) -> Tensor:
    return part.join((_read(stored[name].file, name) for name in part.theirs), shape)


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Stored]]:
    for path in _weight_files(folder):
        if not path.is_file():
            raise FileError(f"{path} is missing, a part of the model's weights; download it again")
        for name, size, dtype in _pickled(path) if path.suffix == ".bin" else _safetensors(path):
            if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES.values():
                expected = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES.values())
                shown = str(dtype).removeprefix("torch.")
                raise FileError(f"{path}: {name} is of type {shown}; expected one of {expected}")
            yield name, Stored(path, size, dtype)


def _weight_files(folder: Path) -> list[Path]:
    for name in _FORMATS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = read_json(index, "an index of weights").get("weight_map")
            if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
                raise FileError(f"{index} has no weight_map; restore it")
            return [folder / file for file in sorted(set(places.values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise FileError(f"{folder} has neither {' nor '.join(_FORMATS)}, and no index of several files")


def _safetensors(path: Path) -> list[tuple[str, tuple[int, ...], object]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ComposerError('safetensors is not installed: pip install "composer-megatron[train]"') from None
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return [
                (name, tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read {path}: {error}; restore it") from error


def _pickled(path: Path) -> list[tuple[str, tuple[int, ...], object]]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in _load_pickled(path).items()]


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.bin``, whose values stay on the disk until they are used."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and PyTorch each raise their own
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise FileError(f"cannot read {path}: {first_line}; restore it, or save the model as safetensors") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise FileError(f"{path} holds no table of tensors; expected the weights of a model")
    return found


def _read(path: Path, name: str) -> Tensor:
    if path.suffix == ".bin":
        return _load_pickled(path)[name].clone()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read {name} in {path}: {error}; restore it") from error


def _check(
    folder: Path, stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], *, tied: bool, what: str
) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    for name, tensor in stored.items():
        copy_or_constant = name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
        if name in wanted and tensor.size != wanted[name]:
            problems.append(f"{name} is {tensor.size}; config.json makes it {wanted[name]}")
        elif name not in wanted and not copy_or_constant:
            problems.append(f"{name} is no tensor of {what}")
    if problems:
        more = f"; and {len(problems) - 3} more" if problems[3:] else ""
        raise FileError(f"{folder} does not hold the model of its config.json: {'; '.join(problems[:3])}{more}")
