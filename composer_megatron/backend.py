"""Backends: what plays each part of a model and of its training. One row each; a new backend is a new row.

* ``composer``: our kernels, everything from pip; on a CPU the same modules compute by PyTorch.
* ``local``: PyTorch and Megatron-core alone.
* ``te``: TransformerEngine.

`composer_megatron.specs` builds the same blocks from any row, so that a backend changes how a model is computed but
neither its parameters nor the names in its checkpoints. Parts of other rows can be mixed in (`get_backend`).
"""

import dataclasses
import difflib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from composer_megatron import cpu
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.shape import Shape

Builder = Callable[..., nn.Module]
Loss = Literal["megatron", "cross_entropy", "linear_cross_entropy"]
Optimizer = Literal["composer", "megatron"]


UNFUSED = "unfused"
"""What `transformer_engine_attention` calls the kind that holds every score in memory."""

_TE = "TransformerEngine"
_AT_ONCE = ", on query, key and value at once"


def _nothing() -> None: ...


class Linears(NamedTuple):
    """The projections: into a block, split over tensor-parallel ranks by outputs, and out of it, split by inputs.

    An MLP has a class of its own where the two work together in it; None for Megatron-core's.
    """

    column_parallel: Builder
    row_parallel: Builder
    mlp: type[Any] | None = None


class Fusion(NamedTuple):
    """A function that Megatron-core looks up by name when its configuration says so.

    Attributes:
        on: Whether the configuration is to say so.
        install: Puts our function where Megatron looks, for the whole process; does nothing the second time.
        joined: Whether the rotary embedding takes queries, keys and values as the projection left them, in one tensor,
            wherever that can be (`composer_megatron.guards.settle_joined_rope`).
    """

    on: bool
    install: Callable[[], None] = _nothing
    joined: bool = False


@dataclass(frozen=True)
class Part[T]:
    """One way to play a part.

    Attributes:
        says: What it is, in a few words for people.
        use: What Megatron-core gets.
    """

    says: str
    use: T


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Who plays each part, in Megatron-core's interface for that part.

    Attributes:
        name: For people, and in `BACKENDS`.
        norm: Before each block and after the last one: ``norm(config=, hidden_size=, eps=)``.
        attention: Between the projections: Megatron's core attention.
        linear: The projections of the blocks.
        activation: SwiGLU on the joined gate and up halves, ``activation(config=)``; None for Megatron-core's own.
        rope: The function that applies the rotary embedding.
        embedding: Whether the embedding adds its gradient to Megatron's buffer itself, the rows of the tokens alone.
        loss: What `composer_megatron.model.CompositeModel` computes the loss with.
        optimizer: Which Adam `composer_megatron.optimizer.prepare_optimizer` is to take.
        gradient_accumulation: What adds a weight's gradient to Megatron's buffer within its matrix multiplication.
        recurrence: Whether packages with kernels compute Mamba-2 and Gated DeltaNet on a GPU; PyTorch does elsewhere.
    """

    name: str
    norm: Part[Builder]
    attention: Part[Builder]
    linear: Part[Linears]
    activation: Part[Builder | None]
    rope: Part[Fusion]
    embedding: Part[bool]
    loss: Part[Loss]
    optimizer: Part[Optimizer]
    gradient_accumulation: Part[Fusion]
    recurrence: Part[bool]

    def install(self) -> None:
        """Put functions where Megatron-core looks for them; before any configuration is made that asks for them."""
        for fusion in (self.rope.use, self.gradient_accumulation.use):
            if fusion.on:
                fusion.install()

    def quantises(self) -> bool:
        """Whether the projections obey Megatron's fp8 and fp4 flags, as TransformerEngine's do."""
        return self.linear.says == _TE

    def attends_by_itself(self) -> bool:
        """Whether attention is ours (`composer_megatron.layers.attention`), not TransformerEngine's."""
        return self.attention.says != _TE

    def report(self, shape: Shape, dtype: torch.dtype) -> str:
        """Who plays what in training a model of that shape, in one line.

        TransformerEngine chooses its attention at the first step: only from then on the line says which.

        Args:
            shape: Decides which attention kernel fits.
            dtype: Of the parameters, likewise.
        """
        says = {name: getattr(self, name).says for name in PARTS}
        if hasattr(self.attention.use, "kernel"):
            says["attention"] = self.attention.use.kernel(shape, dtype)
        elif not self.attends_by_itself() and (chosen := transformer_engine_attention()) is not None:
            says["attention"] = f"{_TE}: {chosen}"
        parts = " | ".join(f"{name.replace('_', ' ')}: {text}" for name, text in says.items())
        return f"backend {self.name} | {parts}"


PARTS = tuple(field.name for field in dataclasses.fields(Backend) if field.name != "name")
"""The names of all parts."""


def _local() -> Backend:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from composer_megatron.layers.attention import SDPACoreAttention
    from composer_megatron.layers.norm import RMSNorm

    return Backend(
        name="local",
        norm=Part("PyTorch", RMSNorm),
        attention=Part("PyTorch SDPA", SDPACoreAttention),
        linear=Part("Megatron", Linears(ColumnParallelLinear, RowParallelLinear)),
        activation=Part("Megatron", None),
        rope=Part("Megatron", Fusion(on=False)),
        embedding=Part("Megatron", use=False),
        loss=Part("Megatron", "megatron"),
        optimizer=Part("Megatron's", "megatron"),
        gradient_accumulation=Part("autograd", Fusion(on=False)),
        recurrence=Part("PyTorch", use=False),
    )


def _recurrence_kernels() -> Part[bool]:
    return Part("mamba-ssm and flash-linear-attention" if cpu.has_gpu() else "PyTorch", use=True)


def _composer() -> Backend:
    require("triton", "backend composer", "pip install triton")
    from composer_megatron.layers import fused_rope, wgrad
    from composer_megatron.layers.activation import SwiGLU
    from composer_megatron.layers.fused_attention import FusedCoreAttention
    from composer_megatron.layers.fused_norm import FusedRMSNorm

    ours = "Triton" if cpu.has_gpu() else "composer on a CPU"
    accumulation = "Apex" if wgrad.apex_is_there() else "cuBLAS" if cpu.has_gpu() else ours
    return dataclasses.replace(
        _local(),
        name="composer",
        norm=Part(f"{ours}, with residual additions", FusedRMSNorm),
        attention=Part("the best kernel that fits", FusedCoreAttention),
        activation=Part(ours, SwiGLU),
        rope=Part(f"{ours}{_AT_ONCE}", Fusion(on=True, install=fused_rope.install, joined=True)),
        embedding=Part("gradient of the tokens' rows", use=True),
        loss=Part(ours, "cross_entropy"),
        optimizer=Part(ours, "composer"),
        gradient_accumulation=Part(accumulation, Fusion(on=True, install=wgrad.install)),
        recurrence=_recurrence_kernels(),
    )


def _te() -> Backend:
    advice = 'pip install --no-build-isolation "transformer-engine[pytorch]"; backend composer needs nothing of it'
    require("transformer_engine", "backend te", advice)
    from megatron.core.extensions import transformer_engine as te

    from composer_megatron.layers import fused_rope, wgrad

    # TransformerEngine 2.20 gives FlashAttention 4 the window (-1, 0) for causal attention, and FlashAttention 4.0.0b36
    # takes it for a window without keys; cuDNN or another FlashAttention plays instead, unless the user has set it.
    os.environ.setdefault("NVTE_FLASH_ATTN_V4", "0")
    apex = wgrad.apex_is_there()
    return dataclasses.replace(
        _local(),
        name="te",
        norm=Part(_TE, te.TENorm),
        attention=Part(_TE, te.TEDotProductAttention),
        linear=Part(_TE, Linears(te.TEColumnParallelLinear, te.TERowParallelLinear)),
        activation=Part(_TE, te.TEActivationOp),
        rope=Part(_TE, Fusion(on=True, install=fused_rope.install_transformer_engine)),
        optimizer=Part(_TE, "megatron"),
        # TransformerEngine's own layers accumulate; the output layer is Megatron's, and asks Apex or us.
        gradient_accumulation=Part(
            f"{_TE} and {'Apex' if apex else 'composer'}", Fusion(on=True, install=wgrad.install)
        ),
        recurrence=_recurrence_kernels(),
    )


def transformer_engine_attention() -> str | None:
    """What TransformerEngine computed attention with, the last time that it did; None before the first.

    It falls back on `UNFUSED` without a word where it takes its fused attention, cuDNN's, for impossible and finds no
    FlashAttention: several times the time and the memory.
    """
    module = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention")
    chosen: Mapping[str, Any] = getattr(module, "_attention_backends", {})
    if chosen.get("use_flash_attention"):
        return f"FlashAttention {chosen['flash_attention_backend']}"
    if chosen.get("use_fused_attention"):
        return "fused, by cuDNN"
    return UNFUSED if chosen.get("use_unfused_attention") else None


BACKENDS: Mapping[str, Callable[[], Backend]] = MappingProxyType(
    {"composer": functools.cache(_composer), "local": functools.cache(_local), "te": functools.cache(_te)}
)
"""Every backend by its name: a function that makes the row, or raises `ComposerError` where its package is missing."""

LINEAR_LOSS = Part[Loss]("fused with the output layer", "linear_cross_entropy")
"""The loss without logits in memory, which any backend can have: ``loss=linear``."""

_SPECIAL = (
    ("loss", "linear"),
    ("rope", "qkv"),
    ("rope", "apart"),
    ("activation", "quack"),
    ("linear", "fp8"),
    ("linear", "fp8-wgrad"),
)


def default_backend() -> str:
    """The name of the backend for this machine: composer on a GPU, local without one."""
    return "composer" if cpu.has_gpu() and importlib.util.find_spec("triton") is not None else "local"


def get_backend(name: str | None = None, parts: Mapping[str, str] = MappingProxyType({})) -> Backend:
    """The backend of that name, with some of its parts played by others.

    Args:
        name: A name in `BACKENDS`; None for that of the machine.
        parts: From names in `PARTS` to names in `BACKENDS`, or for the loss to "linear", for rope to "qkv" or "apart",
            for activation to "quack", for linear to "fp8" or "fp8-wgrad".

    Raises:
        UsageError: If there is no such backend or part, with those that there are.
        ComposerError: If a backend needs a package that is missing.
    """
    name = default_backend() if name is None else name
    check_names(name, parts)
    backend = BACKENDS[name]()
    if not parts:
        return backend
    changes: dict[str, Any] = {}
    for part, player in parts.items():
        special = (part, player) in _SPECIAL
        changes[part] = _special(part, player) if special else getattr(BACKENDS[player](), part)
    mixed = "+".join((backend.name, *(f"{part}={player}" for part, player in parts.items())))
    return dataclasses.replace(backend, name=mixed, **changes)


def check_names(name: str, parts: Mapping[str, str]) -> None:
    """Check what `get_backend` is asked for, before anything is imported for it.

    Raises:
        UsageError: As `get_backend`.
    """
    _known("backend", name, tuple(BACKENDS))
    for part, player in parts.items():
        _known("backend part", part, PARTS)
        _known(f"player of {part}", player, (*BACKENDS, *(each for of, each in _SPECIAL if of == part)))


def _special(part: str, player: str) -> Part[Any]:
    """The player of that name, which belongs to no backend."""
    if part == "loss":
        return LINEAR_LOSS
    if part == "activation":
        return _within_products()
    if part == "linear":
        return _eight_bits(wgrad=player == "fp8-wgrad")
    rope = BACKENDS["composer"]().rope
    return rope if player == "qkv" else Part(rope.says.removesuffix(_AT_ONCE), rope.use._replace(joined=False))


def _within_products() -> Part[Builder | None]:
    require("quack.gemm_interface", "activation=quack", "pip install quack-kernels")
    require("triton", "activation=quack", "pip install triton")
    from composer_megatron.layers.gated_mlp import GatedSwiGLU

    return Part("quack, within the matrix products", GatedSwiGLU)


def _eight_bits(*, wgrad: bool) -> Part[Linears]:
    require("triton", "linear=fp8", "pip install triton")
    from composer_megatron.layers import fp8, fp8_mlp

    if wgrad:
        pair = fp8.EightBitGradients
        return Part("fp8, weight gradients too", Linears(pair.Column, pair.Row, fp8_mlp.Fp8MLP))
    plain = Linears(fp8.Fp8ColumnParallelLinear, fp8.Fp8RowParallelLinear, fp8_mlp.Fp8MLP)
    return Part("fp8, weight gradients not", plain)


def _known(what: str, name: str, known: tuple[str, ...]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown {what} {name!r}: {hint}known: {', '.join(known)}")


def require(module: str, who: str, advice: str) -> None:
    """See that a package, or a module of it, is there; nothing is imported.

    Raises:
        ComposerError: If it is missing. Where a package of that name lacks the module, its place is named.
    """
    package = module.partition(".")[0]
    found = importlib.util.find_spec(package)
    places = [] if found is None else list(found.submodule_search_locations or [str(found.origin)])
    if found is None:
        raise ComposerError(f"{who} needs the package {package}, which is missing: {advice}")
    if module != package and PathFinder.find_spec(module, places) is None:
        where = ", ".join(places)
        raise ComposerError(f"{who} needs {module}, and the package {package} in {where} has no such module: {advice}")
