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
import re
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_megatron import arguments, cpu, data_flags, guards, runfile
from composer_megatron.architecture import Architecture
from composer_megatron.arguments import Flags, Options
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming, write_text
from composer_megatron.layout import Layout
from composer_megatron.metrics import MetricsLog, tee
from composer_megatron.mixture import Mixture
from composer_megatron.optimizer import checkpoint_flags
from composer_megatron.packages import check_kernels, check_packages
from composer_megatron.pipeline import cut_sequence
from composer_megatron.quiet import hush_imports
from composer_megatron.raw import RawMixture
from composer_megatron.resume import Resumption

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from composer_megatron.backend import Backend

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
        _run_and_name_missing_packages(options)
    except ComposerError as error:
        if "--debug" in argv:
            raise
        if rank:
            # torchrun ends all ranks when one ends: the first one has to have its say. Still here: it has no error.
            time.sleep(_PATIENCE)
        message = re.sub(r"( when instantiating \w+)+$", "", str(error))  # Megatron's, on its way through
        print(f"error: {message}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _run_and_name_missing_packages(options: Options) -> None:
    try:
        run(options)
    except ImportError as error:
        raise ComposerError(f"{error}; install it, or leave out the flag that asks for it") from error


def run(options: Options) -> None:
    """Train as the options say.

    Raises:
        ComposerError: For what a user can mend.
    """
    command_line = megatron_command_line(options)
    cpu.prepare_training()
    args = _parse_and_validate(command_line, debug=options.debug)
    text = data_flags.load_text(options)
    args.text_names = text.names if text is not None and len(text.names) > 1 else ()
    if options.run_dir is not None and args.rank == 0:
        _fill_run_dir(options.run_dir, Architecture.load(options.architecture), text.tokenizer if text else None)
        checksums = text.checksums if text else ()
        runfile.record(options.run_dir, runfile.start_of(options.argv, args.world_size, command_line, checksums))
        for line in runfile.differences(options.repeat, args.world_size) if options.repeat else ():
            print(f"note: unlike {options.repeat}: {line}", file=sys.stderr, flush=True)
    backend = _backend(options)
    if args.rank == 0:
        print(backend.report(Architecture.load(options.architecture).shape, args.params_dtype), flush=True)
        if args.dist_ckpt_optim_fully_reshardable:
            print("checkpoints of the optimizer load under any parallel sizes (--dist-ckpt-optim-fully-reshardable)")
    resumption = Resumption()
    with _metrics(options.run_dir, resumption, args):
        _pretrain(args, backend, resumption, text)


def megatron_command_line(options: Options, processes: int | None = None) -> list[str]:
    """All flags for Megatron: those that stand for the architecture, the folders and the machine, then the user's.

    Starts nothing and writes nothing.

    Args:
        options: What was asked for.
        processes: How many are to run; None for as many as the environment says that this one is of.

    Raises:
        ComposerError: If the run is impossible, for all that can be seen beforehand.
    """
    _prepare_process()
    architecture = Architecture.load(options.architecture)
    given = arguments.given_flags(options.megatron)
    text = data_flags.load_text(options)
    if options.repeat is not None:
        runfile.check_text(options.repeat, text.checksums if text else ())
    if options.run_dir is not None:
        _check_run_dir(options.run_dir, architecture, text.tokenizer if text else None)
    world_size = int(os.environ["WORLD_SIZE"]) if processes is None else processes
    ours = _flags(architecture, text, options, given, world_size)
    model = arguments.architecture_flags(architecture, _pattern(architecture, None))
    if "spec" not in given and not arguments.contradictions(model, given):
        folders = (given.get(name, ours.get(f"--{name}")) for name in ("load", "save"))
        for folder in dict.fromkeys(folder for folder in folders if folder is not None):
            guards.check_checkpoints(Path(folder), architecture)
    loaded = given.get("load", ours.get("--load"))
    if loaded is not None and not any(given.get(name) for name in ("no_load_optim", "finetune")):
        guards.check_optimizer(Path(loaded), distributed=bool(given.get("use_distributed_optimizer")))
    return arguments.command_line(ours, given, options.megatron)


def _flags(
    architecture: Architecture, text: Mixture | RawMixture | None, options: Options, given: Flags, world_size: int
) -> Flags:
    """What the architecture, the folders and the machine stand for, whether or not the user gave some of it."""
    gpu, run_dir = cpu.has_gpu(), options.run_dir
    schedule = arguments.schedule_flags(given, gpu=gpu)
    seq_length = schedule["--seq-length"]
    if "spec" not in given:  # whose blocks those flags may be for
        guards.check_flags(given, architecture)
    layout = guards.check_layout(
        architecture,
        {"micro_batch_size": schedule["--micro-batch-size"]} | given,
        virtual_stages=options.virtual_stages,
        seq_len=seq_length,
        world_size=world_size,
    )
    by_hand = "hybrid_layer_pattern" in given
    flags = arguments.architecture_flags(architecture, _pattern(architecture, None if by_hand else layout))
    contradictions = arguments.contradictions(flags, given)
    if contradictions and run_dir is not None:
        problem = "these flags make another model than the architecture's: " + "; ".join(contradictions)
        raise UsageError(f"{problem}; {run_dir}/architecture.json would be wrong: change the architecture file instead")
    if contradictions and os.environ["RANK"] == "0":
        print(f"note: training another model than the architecture's: {'; '.join(contradictions)}", file=sys.stderr)
    if text is not None:
        text.check(architecture, seq_length)
    backend = _backend(options)
    check_packages(given, backend)
    if gpu and backend.recurrence.use and "spec" not in given:
        check_kernels(architecture.sequence.letters)
    flags |= arguments.machine_flags(gpu=gpu, fp32=options.fp32) | arguments.backend_flags(backend) | schedule
    flags |= data_flags.data_flags(text, given, architecture, run_dir) | checkpoint_flags(given)
    flags |= data_flags.document_flags(
        given,
        architecture,
        document_masks=options.document_masks,
        own_attention=backend.attends_by_itself(),
    )
    if run_dir is not None:
        flags |= arguments.run_dir_flags(run_dir, schedule["--train-iters"])
    elif "save" in given:
        flags["--save-interval"] = max(10, schedule["--train-iters"] // 5)
    if given.get("async_save"):
        flags |= _asynchronous_saving()
    if "spec" not in given:  # `_initialize_weights` does it; another spec may have other parameters
        flags["--no-initialization"] = None
    if not options.debug:
        flags["--logging-level"] = logging.WARNING
    return flags


def _backend(options: Options) -> "Backend":
    """The backend asked for; a spec of the user's brings its own modules, and wants none of ours by default."""
    from composer_megatron.backend import get_backend

    own_spec = "spec" in arguments.given_flags(options.megatron)
    return get_backend("local" if own_spec and options.backend is None else options.backend, options.parts)


def _asynchronous_saving() -> Flags:
    """What else ``--async-save`` needs; without it, Megatron saves synchronously after all."""
    ours: Flags = {"--use-persistent-ckpt-worker": None}
    return ours if importlib.util.find_spec("nvidia_resiliency_ext") else ours | {"--async-strategy": "mcore"}


def _pattern(architecture: Architecture, layout: Layout | None) -> str:
    """The sequence in Megatron's letters, cut for the layout; whole where there is none."""
    from composer_megatron.pattern import hybrid_pattern

    if layout is None:
        return hybrid_pattern(architecture.sequence)
    ranks, virtual = layout.pipeline_parallel, layout.virtual_stages
    stages = cut_sequence(architecture, ranks, virtual_stages=virtual, seq_len=layout.seq_len)
    return hybrid_pattern(architecture.sequence, stages)


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


def _check_run_dir(run_dir: Path, architecture: Architecture, tokenizer: Path | None) -> None:
    """See that the run found there, if any, is of the same model and tokenizer."""
    known = run_dir / "architecture.json"
    if known.exists():
        guards.check_same(Architecture.load(known), architecture, known)
    own = run_dir / "tokenizer.json"
    if tokenizer is not None and own.exists() and _read(own) != _read(tokenizer):
        raise UsageError(f"{run_dir} is a run with another tokenizer than {tokenizer}; choose another --run-dir")


def _fill_run_dir(run_dir: Path, architecture: Architecture, tokenizer: Path | None) -> None:
    """Copy what later stages need beside the checkpoints."""
    if not (run_dir / "architecture.json").exists():
        architecture.save(run_dir / "architecture.json")
    if tokenizer is not None and not (run_dir / "tokenizer.json").exists():
        write_text(run_dir / "tokenizer.json", _read(tokenizer))


def _read(path: Path) -> str:
    with naming(path, "read"):
        return path.read_text(encoding="utf-8", errors="replace")


def _parse_and_validate(command_line: list[str], *, debug: bool) -> Namespace:
    """Let Megatron parse its flags; what it refuses becomes a `UsageError`."""
    from megatron.training import arguments as megatron_arguments

    sys.argv = [sys.argv[0], *command_line]
    if not debug:
        megatron_arguments._print_args = lambda *_: None  # hundreds of lines, nearly all of them defaults
    with _refusing_flags():
        return megatron_arguments.parse_and_validate_args()


@contextlib.contextmanager
def _refusing_flags() -> Iterator[None]:
    """Turn Megatron's refusal of flags into an error for people; an assertion without words says what it asserts."""
    try:
        yield
    except ComposerError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        asserted = traceback.extract_tb(error.__traceback__)[-1].line
        raise UsageError(f"Megatron refuses these flags: {str(error) or asserted}") from error


class _Metrics(MetricsLog):
    """The metrics log, opened at the first scalar: only then is it known where the run went on."""

    def __init__(self, path: Path, resumption: Resumption) -> None:
        self.path, self._resumption = path, resumption
        self._is_open = False

    def add_scalar(self, name: str, value: Any, iteration: int, *_: Any, **__: Any) -> None:
        if not self._is_open:
            super().__init__(self.path, self._resumption.iteration)
            self._is_open = True
        super().add_scalar(name, value, iteration)


@contextlib.contextmanager
def _metrics(run_dir: Path | None, resumption: Resumption, args: Namespace) -> Iterator[None]:
    """Log to ``metrics.jsonl``, too, what Megatron gives to TensorBoard, on the one rank that does."""
    from megatron.training import global_vars

    writer = global_vars.get_tensorboard_writer()
    if run_dir is not None and args.rank == args.world_size - 1:
        writer = tee(_Metrics(run_dir / "metrics.jsonl", resumption), writer)
        global_vars._GLOBAL_TENSORBOARD_WRITER = writer
    try:
        yield
    finally:
        if writer is not None:
            writer.close()


def _pretrain(args: Namespace, backend: "Backend", resumption: Resumption, text: Mixture | RawMixture | None) -> None:
    """Hand over to Megatron's training loop."""
    import torch.distributed
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.enums import ModelType
    from megatron.training import training
    from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args

    from composer_megatron.builder import CompositeModelConfig
    from composer_megatron.data import forward_step, train_valid_test_datasets
    from composer_megatron.optimizer import prepare_optimizer, with_clear_resharding
    from composer_megatron.specs import stack_spec

    if args.spec is not None:
        _check_spec(args.spec)
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        # The wheel brings these compiled, and no Makefile: Megatron would fail to compile them again, and exit.
        dataset_utils.compile_helpers = lambda: None
    datasets, load, save = train_valid_test_datasets, training.load_checkpoint, training.save_checkpoint
    if isinstance(text, RawMixture):
        from composer_megatron.streaming import StreamedText

        stream = StreamedText(text)
        datasets, load, save = stream.datasets, stream.loading(load), stream.saving(save)
    older = "restore it, or put the number of an older one into latest_checkpointed_iteration.txt"
    training.load_checkpoint = _with_clear_errors(
        resumption.loading(with_clear_resharding(load), args),
        f"load the checkpoint in {args.load}",
        older,
    )
    again = "make room; the same command goes on from the checkpoint before it"
    training.save_checkpoint = _with_clear_errors(save, f"save a checkpoint in {args.save}", again)
    prepare_optimizer(backend.optimizer.use)
    backend.install()  # before the configuration, which is refused where it asks for what is not there
    with _refusing_flags():
        config = hybrid_config_from_args(args, model_config_cls=CompositeModelConfig)
        config.loss = backend.loss.use
        config.embedding_rows = backend.embedding.use
        config.rope_scaling_factor = args.rope_scaling_factor if args.use_rope_scaling else 1.0
        if args.spec is None:  # whose layers need not know when it cannot be
            config.transformer.fused_single_qkv_rope = args.apply_rope_fusion and backend.rope.use.joined
            config.hybrid_stack_spec = stack_spec(backend)
            config.pre_wrap_hooks.append(_initialize_weights)
        container = pretrain_cfg_container_from_args(args, config)
    training.pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
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
        except ComposerError:
            raise
        except (Exception, CheckpointException) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise FileError(f"cannot {doing}: {type(cause).__name__}: {cause}; {advice}") from error

    return call


if __name__ == "__main__":
    sys.exit(main())
