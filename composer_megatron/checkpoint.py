"""Load a training run into one process, whatever tensor- and pipeline-parallel layout saved it.

Megatron's ``torch_dist`` checkpoints hold each parameter as one global tensor under one name, so a model of one process
reads those of any layout. No torchrun, no network and no environment variables are needed::

    with load_run(Path("runs/composite")) as run:
        print(generate(run, ["def "], max_new_tokens=16))
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch.distributed.checkpoint.api import CheckpointException

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming
from composer_megatron.stored import StoredRun
from composer_megatron.text import tokenizing

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from tokenizers import Tokenizer

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron writes the newest checkpoint's iteration there, after all of its files."""
_COMPLETE = ("metadata.json", ".metadata")
"""Megatron writes these files into a checkpoint's folder last; saving in the background, the second much later."""
_EMBEDDING = "embedding.word_embeddings.weight"
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""Names of the model's tensors in a checkpoint begin so; the others are the optimizer's."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in this process. A context manager: leaving it ends the process group that loading started.

    Attributes:
        path: The run folder.
        iteration: The optimizer step at which the weights were saved.
        architecture: Sequence and shape.
        model: In evaluation mode, its parameters without gradients; usable until `close`.
        tokenizer: None where the run was trained without a text folder.
        sequence_length: Tokens of a training sequence; the model is not asked for longer ones.
    """

    path: Path
    iteration: int
    architecture: Architecture
    model: HybridModel
    tokenizer: Tokenizer | None
    sequence_length: int
    _started_group: bool = field(default=False, repr=False)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            FileError: If the run has none.
        """
        if self.tokenizer is None:
            problem = f"{self.path / 'tokenizer.json'} is missing, so this run cannot read text"
            raise FileError(f"{problem}; copy there the tokenizer of the text that it was trained on")
        return self.tokenizer

    @property
    def end_of_text(self) -> int:
        """Id of the token that ends a document, and that stands before the first."""
        return tokenizing.end_of_text_id(self.require_tokenizer(), self.path / "tokenizer.json")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def close(self) -> None:
        """End the process group, if loading started it; the model cannot run after that."""
        if self._started_group:
            _end_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_group() -> None:
    if torch.distributed.is_initialized():
        from composer_megatron.model import end_single_process

        end_single_process()


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """End the process group that building a model starts, unless there was one before."""
    cpu.skip_compilation()
    started_before = torch.distributed.is_initialized()
    try:
        yield
    finally:
        if not started_before:
            _end_group()


class Checkpoint(NamedTuple):
    """Where a checkpoint is: the run's folder, the iteration, and the iteration's folder."""

    run_dir: Path
    iteration: int
    folder: Path


def load_run(
    path: Path, iteration: int | None = None, *, sequence_length: int | None = None, dtype: torch.dtype | None = None
) -> LoadedRun:
    """Load a training run.

    Args:
        path: The run folder, its ``checkpoints`` folder, or a folder ``iter_…`` in that.
        iteration: Which checkpoint; None for the newest, as Megatron's tracker file names it.
        sequence_length: Longest sequence that the model is to take; None for the length that it was trained at.
        dtype: Type of the parameters; None for the type in which they were saved.

    Raises:
        FileError: If a file is missing or corrupt, there is no such iteration, or the checkpoint holds another model
            than the run's ``architecture.json``.
        UsageError: If the iteration is named twice, or a length is impossible.
        ComposerError: If Megatron-core is not installed, or this is one of several processes.
    """
    if sequence_length is not None and sequence_length < 1:
        raise UsageError(f"sequence_length={sequence_length}; expected at least 1")
    found = find_checkpoint(Path(path), iteration)
    architecture = Architecture.load(found.run_dir / "architecture.json")
    tokenizer = _load_tokenizer(found.run_dir, architecture)
    started_before = torch.distributed.is_initialized()
    if started_before and torch.distributed.get_world_size() > 1:
        raise ComposerError(f"a run is loaded by one process, not by {torch.distributed.get_world_size()} together")
    try:
        with _quietly():
            model, trained_length = _load_model(found, architecture, sequence_length, dtype)
    except BaseException:
        if not started_before:
            _end_group()
        raise
    return LoadedRun(
        path=found.run_dir,
        iteration=found.iteration,
        architecture=architecture,
        model=model,
        tokenizer=tokenizer,
        sequence_length=trained_length if sequence_length is None else sequence_length,
        _started_group=not started_before,
    )


def find_checkpoint(path: Path, iteration: int | None = None) -> Checkpoint:
    """Find a checkpoint, without reading it; arguments and errors as for `load_run`."""
    path = path.absolute()  # so that "." has a name and a parent
    if not path.is_dir():
        raise FileError(f"{path} is no folder: expected the folder of a training run")
    named = _iteration_of(path)
    if named is not None:
        if iteration not in (None, named):
            raise UsageError(f"iteration={iteration} beside {path}: give one of the two")
        checkpoints, iteration = path.parent, named
    else:
        checkpoints = path if (path / TRACKER).is_file() else path / "checkpoints"
    if not checkpoints.is_dir():
        raise FileError(f"{checkpoints} is missing: expected the checkpoints of a run; has it saved any yet?")
    if iteration is None:
        iteration = _newest(checkpoints)
    folder = checkpoints / f"iter_{iteration:07d}"
    if not _is_complete(folder):
        problem = "is incomplete, as a killed run leaves it" if folder.is_dir() else "is missing"
        raise FileError(f"{folder} {problem}; {_choices(checkpoints)}")
    return Checkpoint(checkpoints.parent, iteration, folder)


def complete_iterations(checkpoints: Path) -> list[int]:
    """The iterations that a ``checkpoints`` folder holds whole, oldest first."""
    found = ((_iteration_of(folder), folder) for folder in checkpoints.glob("iter_*"))
    return sorted(number for number, folder in found if number is not None and _is_complete(folder))


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _COMPLETE)


def _iteration_of(folder: Path) -> int | None:
    prefix, _, digits = folder.name.partition("_")
    return int(digits) if prefix == "iter" and digits.isdecimal() else None


def _newest(checkpoints: Path) -> int:
    tracker = checkpoints / TRACKER
    if not tracker.is_file():
        raise FileError(f"{tracker} is missing, which names the newest checkpoint; {_choices(checkpoints)}")
    with naming(tracker, "read"):
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise FileError(f"{tracker} says {text[:40]!r}; expected an iteration's number; {_choices(checkpoints)}")
    return int(text)


def _choices(checkpoints: Path) -> str:
    found = complete_iterations(checkpoints)
    if not found:
        return f"{checkpoints} holds no complete checkpoint"
    return f"name one of the complete iterations: {', '.join(map(str, found))}"


def _load_tokenizer(run_dir: Path, architecture: Architecture) -> Tokenizer | None:
    path = run_dir / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = tokenizing.load_tokenizer(path)
    ids, rows = tokenizing.vocabulary_size(tokenizer), architecture.shape.vocab_size
    if ids > rows:
        problem = f"{path} has {ids} token ids, the model only {rows} embeddings"
        raise FileError(f"{problem}; restore the run's own tokenizer")
    return tokenizer


def open_run(path: Path, iteration: int | None = None) -> StoredRun:
    """Look into a training run without loading it; arguments and errors as for `load_run`."""
    found = find_checkpoint(Path(path), iteration)
    architecture = Architecture.load(found.run_dir / "architecture.json")
    tokenizer = _load_tokenizer(found.run_dir, architecture)
    with _quietly(), group_of_one():
        contents = _look_into(found, architecture, None)
        model = _build(contents, architecture, contents.dtype, meta=True)
        _check_tensors(found, model, contents.sizes)
    return StoredRun(
        path=found.run_dir,
        iteration=found.iteration,
        architecture=architecture,
        tokenizer=tokenizer,
        sequence_length=contents.sequence_length,
        dtype=contents.dtype,
        folder=found.folder,
        sizes={name: contents.sizes[name] for name, _ in model.named_parameters()},
    )


class _Contents(NamedTuple):
    """What a checkpoint says about itself: shapes of all tensors, the parameters' type, and the longest sequence."""

    sizes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    sequence_length: int


def _look_into(found: Checkpoint, architecture: Architecture, sequence_length: int | None) -> _Contents:
    """Read a checkpoint's metadata, and see that it was trained with the architecture's settings."""
    cpu.skip_compilation()
    try:
        from megatron.core.dist_checkpointing import load_common_state_dict, load_tensors_metadata
    except ModuleNotFoundError as error:
        raise ComposerError(f'{error.name} is not installed: pip install "composer-megatron[train]"') from None
    with _reading(found):
        tensors = load_tensors_metadata(str(found.folder))
        common = load_common_state_dict(str(found.folder))
    training = vars(common["args"]) if "args" in common else {}
    _check_settings(found, architecture, training)
    length = training.get("seq_length") if sequence_length is None else sequence_length
    if length is None:
        raise UsageError(f"{found.folder} does not say for which sequence length it was trained; give sequence_length")
    dtype = tensors[_EMBEDDING].dtype if _EMBEDDING in tensors else torch.float32
    return _Contents({name: tuple(tensor.global_shape) for name, tensor in tensors.items()}, dtype, length)


def _build(contents: _Contents, architecture: Architecture, dtype: torch.dtype, *, meta: bool) -> HybridModel:
    from composer_megatron.model import build_model

    length = contents.sequence_length
    return build_model(architecture, max_sequence_length=length, dtype=dtype, meta=meta, draw_weights=False)


def _load_model(
    found: Checkpoint, architecture: Architecture, sequence_length: int | None, dtype: torch.dtype | None
) -> tuple[HybridModel, int]:
    """The model, and the length of the sequences that it was trained on (or the one asked for)."""
    contents = _look_into(found, architecture, sequence_length)
    model = _build(contents, architecture, dtype or contents.dtype, meta=False)
    _check_tensors(found, model, contents.sizes)
    from megatron.core.dist_checkpointing import load

    with _reading(found):
        model.load_state_dict(load({"model": model.sharded_state_dict()}, str(found.folder))["model"])
    return model.eval().requires_grad_(False), contents.sequence_length


def _check_settings(found: Checkpoint, architecture: Architecture, training: Mapping[str, Any]) -> None:
    """Compare what changes the model's numbers, but no tensor's shape, with the flags that the run was trained with."""
    from composer_megatron.pattern import STAGE_SEPARATOR, hybrid_pattern

    shape = architecture.shape
    expected = {
        "hybrid_layer_pattern": hybrid_pattern(architecture.sequence),
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "rotary_base": shape.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": shape.rope_scaling_factor != 1,
        "layernorm_epsilon": shape.norm_epsilon,
    } | ({} if shape.rope_scaling_factor == 1 else {"rope_scaling_factor": shape.rope_scaling_factor})
    flags = {name: training[name] for name in expected if name in training}
    if isinstance(flags.get("hybrid_layer_pattern"), str):
        flags["hybrid_layer_pattern"] = flags["hybrid_layer_pattern"].replace(STAGE_SEPARATOR, "")
    wrong = [f"{name}={value} (here {expected[name]})" for name, value in flags.items() if value != expected[name]]
    if wrong:
        raise _mismatch(found, f"it was trained with {', '.join(wrong)}")


def _check_tensors(found: Checkpoint, model: HybridModel, saved: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = [f"it lacks {name}" for name in wanted if name not in saved]
    for name, size in saved.items():
        if name in wanted and wanted[name] != size:
            problems.append(f"{name} is {size} there and {wanted[name]} here")
        elif name not in wanted and name.startswith(_MODEL_PREFIXES):
            problems.append(f"it has {name}, too")
    if problems:
        raise _mismatch(found, "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if problems[3:] else ""))


def _mismatch(found: Checkpoint, problem: str) -> FileError:
    file = found.run_dir / "architecture.json"
    return FileError(f"{found.folder} does not hold the model of {file}: {problem}; restore the run's own file")


@contextlib.contextmanager
def _reading(found: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:  # Megatron, PyTorch, pickle and zip each raise their own
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        first_line = (str(cause).splitlines() or [""])[0][:200]
        problem = f"cannot read the checkpoint {found.folder}: {type(cause).__name__}: {first_line}"
        raise FileError(f"{problem}; restore it, or {_choices(found.folder.parent)}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what Megatron and PyTorch remark on packages and GPUs that this machine does not have."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
