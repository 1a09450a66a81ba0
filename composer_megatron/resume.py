"""Where a training run goes on: at the newest checkpoint that is whole.

A kill may leave a folder half-written, a disk may lose what it had taken, and Megatron-core believes its tracker file,
``latest_checkpointed_iteration.txt``. Here every checkpoint is read first, each rank its share of the files, against
the sizes and checksums that it holds; a damaged one is passed over for the one before, and a message says so.
"""

from __future__ import annotations

import io
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from composer_megatron.checkpoint import TRACKER, complete_iterations
from composer_megatron.errors import FileError
from composer_megatron.files import naming, write_text


@dataclass
class Resumption:
    """Where a run goes on.

    Attributes:
        iteration: The checkpoint's, once it is loaded; 0 before, and for a run from the start.
    """

    iteration: int = 0

    def loading(self, load: Callable[..., Any], args: Namespace) -> Callable[..., Any]:
        """Megatron's ``load_checkpoint``, after a look at the checkpoints.

        Args:
            load: Megatron's function; its result begins with the iteration.
            args: Megatron's; a checkpoint that they name is taken as it is.
        """

        def call(*positional: Any, **named: Any) -> Any:
            if args.load and not args.ckpt_step:
                folder = Path(args.load)
                args.ckpt_step = choose(folder, ours=bool(args.save) and Path(args.save).resolve() == folder.resolve())
            result = load(*positional, **named)
            self.iteration = result[0]
            return result

        return call


def choose(folder: Path, *, ours: bool) -> int | None:
    """Pass over damaged checkpoints. To be called by all ranks together.

    Args:
        folder: A folder of checkpoints.
        ours: Whether the run saves there, too: then a tracker file that names no whole checkpoint is put right.

    Returns:
        The iteration to load instead of the one that the tracker file names; None if that one will do, or if there is
        none.

    Raises:
        FileError: If there are checkpoints, but no whole one.
    """
    seen: list[Any] = [(tracked_iteration(folder), complete_iterations(folder), _is_legacy(folder))]
    dist.broadcast_object_list(seen)  # file systems may show ranks different things
    named, candidates, legacy = seen[0]
    if legacy or named == "release" or (named is None and not candidates and not (folder / TRACKER).exists()):
        return None
    if isinstance(named, int):
        candidates = [number for number in candidates if number <= named]
    passed_over = [] if named in candidates else [_tracker_problem(folder, named)]
    for iteration in reversed(candidates):
        damage = _damage_on_any_rank(folder / _name(iteration))
        if not damage:
            break
        passed_over.append(f"{_name(iteration)} is damaged: {damage}")
    else:
        problem = "; ".join(passed_over)
        raise FileError(f"{folder} has no whole checkpoint: {problem}; restore one, or choose another folder")
    if not passed_over:
        return None
    if named is None and not ours:
        raise FileError(f"{folder}: {passed_over[0]}; put the number of a checkpoint there, such as {iteration}")
    if dist.get_rank() == 0:
        print(f"warning: {folder}: {'; '.join(passed_over)}; going on from iteration {iteration}", flush=True)
        if ours:
            write_text(folder / TRACKER, str(iteration))
    dist.barrier()
    return iteration


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _is_legacy(folder: Path) -> bool:
    """Whether the newest checkpoint is of Megatron's older format, a file for each rank, which is not looked into."""
    named = tracked_iteration(folder)
    return isinstance(named, int) and any((folder / _name(named)).glob("mp_rank_*"))


def _tracker_problem(folder: Path, named: int | str | None) -> str:
    if named is None:
        return f"{TRACKER} names no checkpoint"
    return f"{_name(int(named))} is {'incomplete' if (folder / _name(int(named))).is_dir() else 'missing'}"


def tracked_iteration(folder: Path) -> int | str | None:
    """What the tracker file of a folder of checkpoints says: an iteration, "release", or nothing readable."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    with naming(tracker, "read"):
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        return text
    return int(text) if text.isdecimal() else None


def find_damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str:
    """What is wrong with a checkpoint's files, in words; empty if nothing is.

    Reads the files of this share whole: PyTorch wrote a checksum beside each tensor, but loads without a look at it.

    Args:
        checkpoint: A folder ``iter_…``.
        share: Which share of the files, from 0.
        shares: How many there are.
    """
    try:
        index = FileSystemReader(checkpoint).read_metadata().storage_data
    except Exception as error:  # unpickling a torn file raises anything
        return f".metadata cannot be read ({type(error).__name__})"
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for entry in index.values():
        parts[entry.relative_path].append((entry.offset, entry.length))
    if (checkpoint / "common.pt").is_file():  # where Megatron-core kept the small part until 0.18
        parts["common.pt"] = [(0, (checkpoint / "common.pt").stat().st_size)]
    for name in sorted(parts)[share::shares]:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        needed = max(offset + length for offset, length in parts[name])
        if size < needed:
            return f"{name} is cut off at {size:,} of {needed:,} bytes"
        with file.open("rb") as stream:
            if any(_is_damaged(stream, offset, length) for offset, length in parts[name]):
                return f"{name} does not have its checksums"
    return ""


def _is_damaged(stream: BinaryIO, offset: int, length: int) -> bool:
    """Whether a zip archive of PyTorch's, `length` bytes from `offset`, lacks its checksums or is none."""
    stream.seek(offset)
    try:
        with zipfile.ZipFile(io.BytesIO(stream.read(length))) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError):
        return True


def _damage_on_any_rank(checkpoint: Path) -> str:
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, find_damage(checkpoint, dist.get_rank(), dist.get_world_size()))
    return next(filter(None, found), "")
