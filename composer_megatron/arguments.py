"""The command line of a training run: our few options, and every flag of Megatron's.

An architecture, a text folder, a run folder and the machine each stand for flags of Megatron's; a flag that the user
gives wins over ours. Nothing here starts Megatron.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from composer_megatron import runfile
from composer_megatron.architecture import Architecture
from composer_megatron.block_config import block_flags
from composer_megatron.data_flags import add_text_options
from composer_megatron.errors import UsageError
from composer_megatron.raw import RawOptions

if TYPE_CHECKING:
    from composer_megatron.backend import Backend

Flags = dict[str, Any]
"""Flag to value: None for a flag without one, a tuple for several."""

_GIVEN_WITH = {
    "--bf16": ("fp16",),
    "--train-iters": ("train_samples",),
    "--lr-warmup-fraction": ("lr_warmup_iters", "lr_warmup_samples"),
    "--swiglu": ("squared_relu", "quick_geglu"),
    "--no-create-attention-mask-in-dataloader": ("reset_attention_mask",),
}
"""Flags of Megatron's that exclude one of ours: where the user gives one, ours is left out."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@dataclass(frozen=True)
class Options:
    """What is ours on the command line.

    Attributes:
        architecture: The architecture file.
        text: Text folders, or files and folders of raw text; none where the data comes by flags of Megatron's.
        text_weights: The share of the training sequences that each text gives; none for shares by size.
        raw: How raw text is read.
        document_masks: Keep attention and loss within documents.
        run_dir: The run folder; None for no checkpoints and no metrics, or where they come by flags of Megatron's.
        fp32: Train in fp32 on a GPU, too.
        virtual_stages: Pipeline stages on each rank.
        backend: Name of the backend; None for that of the machine, or with ``--spec`` for Megatron's own parts.
        parts: Parts that other backends play, and which ones.
        debug: Show tracebacks, and the value of every flag.
        repeat: The file of the run whose arguments these are; None for a run of its own.
        argv: All arguments, those of a repeated run in their place.
        megatron: All other arguments, as they are.
    """

    architecture: Path
    text: tuple[Path, ...]
    text_weights: tuple[float, ...]
    raw: RawOptions
    document_masks: bool
    run_dir: Path | None
    fp32: bool
    virtual_stages: int
    backend: str | None
    parts: Mapping[str, str]
    debug: bool
    repeat: Path | None
    argv: tuple[str, ...]
    megatron: tuple[str, ...]


def parse_options(argv: Sequence[str]) -> Options:
    """Split the command line into ours and Megatron's.

    Raises:
        UsageError: If ours are wrong.
        SystemExit: After ``--help``.
    """
    parser = _Parser(
        prog="torchrun … -m composer_megatron.train",
        allow_abbrev=False,
        description="Pretrain an architecture on Megatron-core. Runs on GPUs (nccl, bf16) or, without one, on CPUs "
        "(gloo, fp32).",
        epilog="All other flags go to Megatron and win over the values that we derive from the architecture, the "
        "folders and the machine, for example --train-iters, --lr, --micro-batch-size, --global-batch-size, "
        "--seq-length, --tensor-model-parallel-size, --pipeline-model-parallel-size, --sequence-parallel, --seed.",
    )
    parser.add_argument("--architecture", type=Path, required=True, metavar="FILE", help="an architecture file")
    add_text_options(parser)
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="a run folder: checkpoints, TensorBoard, metrics.jsonl; a run found there goes on",
    )
    parser.add_argument("--fp32", action="store_true", help="train in fp32 on a GPU, too")
    parser.add_argument(
        "--num-virtual-stages-per-pipeline-rank",
        dest="virtual_stages",
        type=int,
        default=1,
        metavar="N",
        help="pipeline stages on each rank, for the interleaved schedule",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="who computes: composer (our kernels; default on a GPU), local (PyTorch; default without one) or te "
        "(TransformerEngine)",
    )
    parser.add_argument(
        "--backend-part",
        dest="parts",
        action="append",
        default=[],
        metavar="PART=NAME",
        help="one part by another backend, such as attention=te; or loss=linear for the loss without logits in memory, "
        "linear=fp8 for projections in 8 bits, activation=quack for SwiGLU within the matrix products; may be given "
        "several times",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and the value of every flag")
    parser.add_argument(
        "--repeat",
        type=Path,
        metavar="FILE",
        help="the run.json of a run folder: the same run again, in a --run-dir of its own; further flags win",
    )
    argv, repeated = runfile.expand(argv)
    ours, megatron = parser.parse_known_args(argv)
    if ours.virtual_stages < 1:
        raise UsageError(f"--num-virtual-stages-per-pipeline-rank {ours.virtual_stages}; expected at least 1")
    values = vars(ours)
    raw = RawOptions(**{field.name: values.pop(f"text_{field.name}") for field in dataclasses.fields(RawOptions)})
    lists = {"text": tuple(ours.text), "text_weights": tuple(ours.text_weights), "parts": _parse_parts(ours.parts)}
    origin = {"repeat": repeated, "argv": tuple(argv)}
    return Options(**(values | lists | origin), raw=raw, megatron=tuple(megatron))


def _parse_parts(texts: Sequence[str]) -> dict[str, str]:
    parts = {}
    for text in texts:
        part, equals, name = text.partition("=")
        if not (part and equals and name):
            raise UsageError(f"--backend-part {text!r}; expected PART=NAME, such as attention=te")
        parts[part.replace("-", "_")] = name
    return parts


def given_flags(argv: Sequence[str]) -> Flags:
    """The Megatron flags in `argv`, by the name under which Megatron keeps them, with their parsed values.

    Raises:
        UsageError: For a flag that Megatron does not know, or a value that is none.
    """
    parser, names = _megatron_parser()
    absent = object()
    parsed, unknown = parser.parse_known_args(list(argv), argparse.Namespace(**dict.fromkeys(names, absent)))
    if unknown:
        known = re.findall(r"--[\w-]+", parser.format_usage())
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "neither we nor Megatron know it"
        raise UsageError(f"unknown argument {unknown[0]!r}: {hint}")
    return {name: value for name, value in vars(parsed).items() if value is not absent}


@functools.cache
def _megatron_parser() -> tuple[argparse.ArgumentParser, tuple[str, ...]]:
    from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(prog="composer_megatron.train", allow_abbrev=False, add_help=False)
    add_megatron_arguments(parser)
    return parser, tuple(vars(parser.parse_args([])))


def flag_of(name: str) -> str:
    """How the user writes the flag that Megatron keeps under that name."""
    parser, _ = _megatron_parser()
    return next(action.option_strings[0] for action in parser._actions if action.dest == name)


def architecture_flags(architecture: Architecture, pattern: str) -> Flags:
    """The flags that make Megatron build this architecture and no other."""
    shape, own = architecture.shape, block_flags(architecture)
    flags = {
        "--hybrid-layer-pattern": pattern,
        "--hidden-size": shape.hidden_size,
        "--ffn-hidden-size": shape.ffn_hidden_size,
        "--num-attention-heads": shape.num_attention_heads,
        "--group-query-attention": None,
        "--num-query-groups": shape.num_query_groups,
        "--kv-channels": shape.head_dim,
        "--padded-vocab-size": shape.vocab_size,  # rows of the embedding, exactly
        "--swiglu": None,
        "--disable-bias-linear": None,
        "--normalization": "RMSNorm",
        "--norm-epsilon": shape.norm_epsilon,
        "--position-embedding-type": "rope",
        "--rotary-percent": 1.0,
        "--rotary-base": shape.rope_theta,
        "--init-method-std": shape.init_std,
    } | ({} if shape.tied_embeddings else {"--untie-embeddings-and-output-weights": None})
    if shape.rope_scaling_factor != 1:
        flags |= {"--use-rope-scaling": None, "--rope-scaling-factor": shape.rope_scaling_factor}
    if "--multi-latent-attention" in own:
        own["--no-rope-fusion"] = None  # Megatron fuses it for another rotary embedding alone
        for name in ("--group-query-attention", "--num-query-groups"):
            del flags[name]
    return flags | own


def machine_flags(*, gpu: bool, fp32: bool) -> Flags:
    """The flags for this machine, whatever the backend."""
    everywhere: Flags = {
        "--no-persist-layer-norm": None,
        "--no-create-attention-mask-in-dataloader": None,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
        "--no-one-logger": None,
    }
    if gpu:
        return everywhere | {"--distributed-backend": "nccl"} | ({} if fp32 else {"--bf16": None})
    return everywhere | {"--distributed-backend": "gloo", "--use-cpu-initialization": None, "--num-workers": 0}


def backend_flags(backend: Backend) -> Flags:
    """The flags that make Megatron use the parts of a backend that the model's spec cannot bring."""
    flags: Flags = {"--transformer-impl": "transformer_engine" if backend.quantises() else "local"}
    if backend.activation.use is not None:
        flags |= {"--use-te-activation-func": None, "--no-bias-swiglu-fusion": None}
    if not backend.rope.use.on:
        flags["--no-rope-fusion"] = None
    if not backend.gradient_accumulation.use.on:
        flags["--no-gradient-accumulation-fusion"] = None
    return flags


def schedule_flags(given: Flags, *, gpu: bool) -> Flags:
    """Lengths, batches, learning rate and intervals, for those that the user leaves out."""
    seq_length = given.get("seq_length", 4096 if gpu else 256)
    iterations = given.get("train_iters", 1000)
    lr = given.get("lr", 3e-4)
    log_interval = given.get("log_interval", max(1, min(100, iterations // 100)))
    return {
        "--seq-length": seq_length,
        "--max-position-embeddings": seq_length,
        "--micro-batch-size": 1 if gpu else 4,
        "--train-iters": iterations,
        "--lr": lr,
        "--min-lr": lr / 10,
        "--lr-decay-style": "cosine",
        "--lr-warmup-fraction": 0.05,
        "--weight-decay": 0.1,
        "--adam-beta2": 0.95,
        "--eval-iters": 10,
        "--eval-interval": max(10, iterations // 10),
        "--log-interval": log_interval,
        "--tensorboard-log-interval": log_interval,
    }


def run_dir_flags(run_dir: Path, iterations: int) -> Flags:
    """Where checkpoints and TensorBoard files go; a checkpoint found there is loaded.

    A run that goes on may go on for longer, so the learning-rate schedule is that of the flags, not the checkpoint's.
    """
    checkpoints = run_dir / "checkpoints"
    return {
        "--save": checkpoints,
        "--load": checkpoints,
        "--save-interval": max(10, iterations // 5),
        "--override-opt-param-scheduler": None,
        "--tensorboard-dir": run_dir / "tensorboard",
    }


def contradictions(ours: Flags, given: Flags) -> list[str]:
    """Where flags that the user gave make another model than the architecture's, one line for each."""
    lines = []
    for flag, value in ours.items():
        (name, parsed), *_ = given_flags(_tokens({flag: value})).items()
        rival = next((other for other in _GIVEN_WITH.get(flag, ()) if other in given), None)
        if name in given and _comparable(given[name]) != _comparable(parsed):
            lines.append(f"{flag} {given[name]} (the architecture has {value})")
        elif rival:
            lines.append(f"--{rival.replace('_', '-')} (the architecture has {flag})")
    return lines


def _comparable(value: Any) -> Any:
    """Another cut into pipeline stages is no other model."""
    return value.replace("|", "") if isinstance(value, str) else value


def command_line(ours: Flags, given: Flags, argv: Iterable[str]) -> list[str]:
    """What Megatron is to parse: our flags, but for those that the user gave or excludes, and then the user's."""
    kept = {
        flag: value
        for flag, value in ours.items()
        if not set(_GIVEN_WITH.get(flag, ())) & set(given) and not set(given_flags(_tokens({flag: value}))) & set(given)
    }
    return [*_tokens(kept), *argv]


def _tokens(flags: Flags) -> list[str]:
    # Joined by "=", since a pattern that starts with MLP blocks ("--**") would read as a flag of its own.
    return [token for flag, value in flags.items() for token in _tokens_of(flag, value)]


def _tokens_of(flag: str, value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    return [flag if value is None else f"{flag}={value}"]
