"""Pretrain an architecture on Megatron-core, on GPUs or CPUs, by `megatron.training.pretrain` from the wheel.

::

    torchrun --standalone --nproc-per-node 2 -m composer_megatron.train
        --architecture architecture.json --text text --run-dir run
        --pipeline-model-parallel-size 2 --train-iters 1000 --lr 1e-3

The same command again goes on from the last checkpoint. Every flag of Megatron's may follow and wins over ours.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_megatron import arguments, cpu
from composer_megatron.architecture import Architecture
from composer_megatron.arguments import Flags, Options
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming, write_text
from composer_megatron.metrics import MetricsLog, tee
from composer_megatron.pipeline import Layout, cut_sequence, plan
from composer_megatron.quiet import hush_imports
from composer_megatron.text.folder import TextInfo, load_text_folder

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

_PATIENCE = 10.0
"""Seconds that the other ranks wait for the first one to say what was wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit status: 0, 1 for a failure, 2 for a wrong request.

    A mistake of the user's ends on every rank alike, and one message says what was wrong.

    Args:
        argv: The arguments; None for those of the process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        with contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext():
            options = arguments.parse_options(argv)
        run(options)
    except ComposerError as error:
        if "--debug" in argv:
            raise
        if rank:
            # torchrun ends all ranks when one ends: the first one has to have its say. Still here: it has no error.
            time.sleep(_PATIENCE)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def run(options: Options) -> None:
    """Train as the options say.

    Raises:
        ComposerError: For what a user can mend.
    """
    command_line = megatron_command_line(options)
    cpu.prepare_training()
    args = _parse_and_validate(command_line, debug=options.debug)
    resumed_at = _checkpointed_iteration(args)
    if options.run_dir is not None and args.rank == 0:
        _fill_run_dir(options.run_dir, Architecture.load(options.architecture), options.text)
    with _metrics(options.run_dir, resumed_at, args):
        _pretrain(args)


def megatron_command_line(options: Options) -> list[str]:
    """All flags for Megatron: those that stand for the architecture, the folders and the machine, then the user's.

    Starts nothing and writes nothing.

    Raises:
        ComposerError: If the run is impossible, for all that can be seen beforehand.
    """
    _prepare_process()
    architecture = Architecture.load(options.architecture)
    given = arguments.given_flags(options.megatron)
    text = None if options.text is None else load_text_folder(options.text)
    if options.run_dir is not None:
        _check_run_dir(options.run_dir, architecture, text)
    ours = _flags(architecture, text, options, given)
    return arguments.command_line(ours, given, options.megatron)


def _flags(architecture: Architecture, text: TextInfo | None, options: Options, given: Flags) -> Flags:
    """What the architecture, the folders and the machine stand for, whether or not the user gave some of it."""
    gpu, run_dir = cpu.has_gpu(), options.run_dir
    schedule = arguments.schedule_flags(given, gpu=gpu)
    seq_length = schedule["--seq-length"]
    stages = given.get("pipeline_model_parallel_size", 1) * options.virtual_stages
    layout = Layout(stages=stages, tensor_parallel=given.get("tensor_model_parallel_size", 1), seq_len=seq_length)
    plan(architecture, layout)  # refuses more stages than blocks, and ranks that do not divide the heads
    flags = arguments.architecture_flags(architecture, _pattern(architecture, stages, seq_length))
    contradictions = arguments.contradictions(flags, given)
    if contradictions and run_dir is not None:
        problem = "these flags make another model than the architecture's: " + "; ".join(contradictions)
        raise UsageError(f"{problem}; {run_dir}/architecture.json would be wrong: change the architecture file instead")
    if contradictions and os.environ["RANK"] == "0":
        print(f"note: training another model than the architecture's: {'; '.join(contradictions)}", file=sys.stderr)
    _check_optimizer(given, saves=run_dir is not None or "save" in given)
    if text is not None:
        arguments.check_text(text, architecture, seq_length)
    flags |= arguments.machine_flags(gpu=gpu, fp32=options.fp32) | schedule
    flags |= arguments.data_flags(text, given, architecture, run_dir)
    if run_dir is not None:
        flags |= arguments.run_dir_flags(run_dir, schedule["--train-iters"])
    if "spec" not in given:  # `_initialize_weights` does it; another spec may have other parameters
        flags["--no-initialization"] = None
    if not options.debug:
        flags["--logging-level"] = logging.WARNING
    return flags


def _check_optimizer(given: Flags, *, saves: bool) -> None:
    """Refuse what could be trained and saved but not loaded again: Megatron's sharding of PyTorch's own Adam."""
    fused = any(importlib.util.find_spec(name) is not None for name in ("transformer_engine", "apex"))
    if given.get("use_distributed_optimizer") and saves and not fused:
        problem = "without TransformerEngine or Apex, Megatron cannot load the checkpoints of such a run"
        raise UsageError(f"--use-distributed-optimizer: {problem}; leave it out, or install one of them")


def _pattern(architecture: Architecture, stages: int, seq_length: int) -> str:
    from composer_megatron.specs import hybrid_pattern

    return hybrid_pattern(architecture.sequence, cut_sequence(architecture, stages, seq_len=seq_length))


def _prepare_process() -> None:
    """See that Megatron-core is there, and set what must be set before it is imported."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ComposerError('Megatron-core is missing: pip install "composer-megatron[train]"') from None
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 18):
        raise ComposerError(f"Megatron-core {version} is too old: pip install 'megatron-core>=0.18'")
    # Tensor parallelism overlaps its communication by the order of launches, which a single queue keeps.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cpu.skip_compilation()
    # Without torchrun: a run of one process.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    hush_imports()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")  # a checkpoint's small part is read so


def _check_run_dir(run_dir: Path, architecture: Architecture, text: TextInfo | None) -> None:
    """See that the run found there, if any, is of the same model and tokenizer."""
    known = run_dir / "architecture.json"
    if known.exists() and Architecture.load(known) != architecture:
        raise UsageError(f"{run_dir} is a run of another architecture ({known}); choose another --run-dir")
    tokenizer = run_dir / "tokenizer.json"
    if text is not None and tokenizer.exists() and _read(tokenizer) != _read(text.tokenizer):
        raise UsageError(f"{run_dir} is a run with another tokenizer than {text.folder}; choose another --run-dir")


def _fill_run_dir(run_dir: Path, architecture: Architecture, text: Path | None) -> None:
    """Copy what later stages need beside the checkpoints."""
    if not (run_dir / "architecture.json").exists():
        architecture.save(run_dir / "architecture.json")
    if text is not None and not (run_dir / "tokenizer.json").exists():
        write_text(run_dir / "tokenizer.json", _read(text / "tokenizer.json"))


def _read(path: Path) -> str:
    with naming(path, "read"):
        return path.read_text(encoding="utf-8", errors="replace")


def _parse_and_validate(command_line: list[str], *, debug: bool) -> Namespace:
    """Let Megatron parse its flags; what it refuses becomes a `UsageError`."""
    from megatron.training import arguments as megatron_arguments

    sys.argv = [sys.argv[0], *command_line]
    if not debug:
        megatron_arguments._print_args = lambda *_: None  # hundreds of lines, nearly all of them defaults
    try:
        return megatron_arguments.parse_and_validate_args()
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(f"Megatron refuses these flags: {error or type(error).__name__}") from error


def _checkpointed_iteration(args: Namespace) -> int:
    """The iteration that the run will go on from; 0 for a new run.

    Raises:
        FileError: If the checkpoint folder does not say, or has no such checkpoint.
    """
    tracker = Path(args.load or "") / "latest_checkpointed_iteration.txt"
    if not args.load or not tracker.is_file():
        return 0
    found = _read(tracker).strip()
    if found != "release" and not found.isdecimal():
        raise FileError(f"{tracker} says {found[:40]!r}; expected the number of an iteration with a folder beside it")
    if found == "release":
        return 0
    iteration = args.ckpt_step or int(found)
    folder = tracker.parent / f"iter_{iteration:07d}"
    if not folder.is_dir():
        raise FileError(f"{folder} is missing: restore it, or put the number of another iteration into {tracker}")
    return iteration


@contextlib.contextmanager
def _metrics(run_dir: Path | None, resumed_at: int, args: Namespace) -> Iterator[None]:
    """Log to ``metrics.jsonl``, too, what Megatron gives to TensorBoard, on the one rank that does."""
    from megatron.training import global_vars

    writer = global_vars.get_tensorboard_writer()
    if run_dir is not None and args.rank == args.world_size - 1:
        writer = tee(MetricsLog(run_dir / "metrics.jsonl", resumed_at), writer)
        global_vars._GLOBAL_TENSORBOARD_WRITER = writer
    try:
        yield
    finally:
        if writer is not None:
            writer.close()


def _pretrain(args: Namespace) -> None:
    """Hand over to Megatron's training loop."""
    import torch.distributed
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.enums import ModelType
    from megatron.training import training
    from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args

    from composer_megatron.data import forward_step, train_valid_test_datasets
    from composer_megatron.specs import composite_stack_spec

    if args.spec is not None:
        _check_spec(args.spec)
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        # The wheel brings these compiled, and no Makefile: Megatron would fail to compile them again, and exit.
        dataset_utils.compile_helpers = lambda: None
    older = "restore it, or put the number of an older one into latest_checkpointed_iteration.txt"
    training.load_checkpoint = _with_clear_errors(
        training.load_checkpoint, f"load the checkpoint in {args.load}", older
    )
    again = "make room; the same command goes on from the checkpoint before it"
    training.save_checkpoint = _with_clear_errors(training.save_checkpoint, f"save a checkpoint in {args.save}", again)
    config = hybrid_config_from_args(args)
    if args.spec is None:
        config.hybrid_stack_spec = composite_stack_spec
        config.pre_wrap_hooks.append(_initialize_weights)
    training.pretrain(
        pretrain_cfg_container_from_args(args, config),
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    torch.distributed.destroy_process_group()


def _initialize_weights(stages: "list[HybridModel]") -> "list[HybridModel]":
    from megatron.training import get_args

    from composer_megatron.model import initialize_weights

    for stage in stages:
        initialize_weights(stage, get_args().seed)
    return stages


def _check_spec(spec: list[str]) -> None:
    """Megatron would only log that there is no such module, and train another model."""
    from megatron.core.transformer.spec_utils import import_module

    try:
        found = import_module(spec)
    except KeyError:
        found = None
    if found is None:
        raise UsageError(f"--spec {' '.join(spec)}: there is no such module, or no such name in it")


def _with_clear_errors(function: Callable[..., Any], doing: str, advice: str) -> Callable[..., Any]:
    from torch.distributed.checkpoint.api import CheckpointException  # no `Exception`; wraps the ranks' own ones

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (Exception, CheckpointException) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise FileError(f"cannot {doing}: {type(cause).__name__}: {cause}; {advice}") from error

    return call


if __name__ == "__main__":
    sys.exit(main())
