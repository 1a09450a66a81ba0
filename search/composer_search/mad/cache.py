"""Generated data sets on disk, each under a key that holds everything it depends on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from composer_megatron.files import naming
from composer_search.mad.base import IGNORE, Pair
from composer_search.mad.data import Request
from composer_search.mad.tasks import Value


def cached_dataset(
    cache_dir: Path | str, task: str, n_train: int, n_test: int, seed: int, *, n_valid: int = 0, **settings: Value
) -> dict[str, Pair]:
    """The same as `composer_search.mad.dataset`, kept in `cache_dir`.

    The key holds the task, the numbers of sequences, the seed, every setting, given or not, and the generators'
    version. The file's name is a digest of it, and the file holds it in full. A file that is damaged or holds another
    key is generated again. Files are written beside their place and renamed, so that processes may share a folder.

    Raises:
        UsageError: As `dataset` does.
        FileError: If the folder cannot be written.
    """
    request = Request.of(task, n_train, n_test, seed, n_valid=n_valid, **settings)
    digest = hashlib.sha256(request.key.encode()).hexdigest()
    path = Path(cache_dir) / f"{task}-{digest[:20]}.npz"
    parts = _read(path, request)
    if parts is None:
        parts = request.generate()
        _write(path, request, parts)
    return parts


def _read(path: Path, request: Request) -> dict[str, Pair] | None:
    """The parts in `path`, or None if it does not hold them whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != request.key:
                return None
            parts = {
                part: (file[f"{part}_inputs"].astype(np.int64), file[f"{part}_targets"].astype(np.int64))
                for part in request.counts
            }
    except Exception:  # a damaged zip can raise nearly anything, and all of it means: generate again
        return None
    lengths = {"train": request.sampler.length, "valid": request.sampler.scored_length}
    lengths["test"] = lengths["valid"]
    shapes = {part: (number, lengths[part]) for part, number in request.counts.items()}
    whole = all(array.shape == shapes[part] for part, arrays in parts.items() for array in arrays)
    return parts if whole else None


def _write(path: Path, request: Request, parts: dict[str, Pair]) -> None:
    """Replace `path` in one step. Arrays are stored in the smallest type that holds every token and `IGNORE`."""
    kind = np.result_type(np.min_scalar_type(IGNORE), np.min_scalar_type(-request.sampler.vocab_size))
    arrays: dict[str, Any] = {"key": np.array(request.key)}
    for part, (inputs, targets) in parts.items():
        arrays |= {f"{part}_inputs": inputs.astype(kind), f"{part}_targets": targets.astype(kind)}
    with naming(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
