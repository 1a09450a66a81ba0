"""Flags of Megatron's and blocks that need a package which may be missing: an answer before anything starts."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, NamedTuple

from composer_megatron.arguments import Flags, flag_of
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.primitives import PRIMITIVES

if TYPE_CHECKING:
    from composer_megatron.backend import Backend


class _Foreign(NamedTuple):
    """A flag of Megatron's that needs a package.

    Attributes:
        name: Under which Megatron keeps it.
        values: Those that need it; empty for all but off.
        package: What is to be imported.
        instead: What to do without.
    """

    name: str
    values: tuple[str, ...]
    package: str
    instead: str


_TE, _FLASH = "transformer_engine", "flash_attn"
_FOREIGN = (
    _Foreign("transformer_impl", (_TE,), _TE, "leave it out; --backend chooses who computes"),
    _Foreign("fp8", (), _TE, "leave it out and train in bf16"),
    _Foreign("fp4", (), _TE, "leave it out and train in bf16"),
    _Foreign("fp8_param_gather", (), _TE, "leave it out and train in bf16"),
    _Foreign("tp_comm_overlap", (), _TE, "leave it out; --sequence-parallel overlaps what it can without"),
    _Foreign("use_transformer_engine_op_fuser", (), _TE, "leave it out; --backend composer fuses the same operations"),
    _Foreign("fused_residual_rmsnorm", (), _TE, "leave it out; residual additions are fused with norms both ways"),
    _Foreign("te_rng_tracker", (), _TE, "leave it out"),
    _Foreign("cuda_graph_impl", (_TE,), _TE, "use --cuda-graph-impl full_iteration"),
    _Foreign("use_flash_attn", (), _FLASH, "leave it out; attention is fused with every backend"),
    _Foreign("flash_decode", (), _FLASH, "leave it out"),
)
_ATTENTION_BACKENDS = ("flash", "fused", "unfused")
"""Values of --attention-backend that choose among TransformerEngine's."""


_KERNELS = {"S": ("mamba_ssm", "causal_conv1d", "einops"), "G": ("fla",)}
"""What a GPU's kernels for a recurrence import, by the primitive's letter."""
_INSTALL = {"S": "mamba-ssm causal-conv1d einops", "G": "flash-linear-attention"}


def missing_kernels(letter: str) -> list[str]:
    """Packages that the kernels of that primitive import, and that are not there."""
    return [name for name in _KERNELS.get(letter, ()) if importlib.util.find_spec(name) is None]


def check_kernels(letters: str) -> None:
    """See that a GPU has the kernels that these primitives are computed with.

    Raises:
        ComposerError: With what to install, and how to do without.
    """
    for letter in dict.fromkeys(letters):
        if missing := missing_kernels(letter):
            raise ComposerError(
                f"{PRIMITIVES[letter].name} ({letter}) on a GPU needs {', '.join(missing)}, which is missing: pip "
                f"install {_INSTALL[letter]}; or compute it by PyTorch, slowly: --backend-part recurrence=local"
            )


def check_packages(given: Flags, backend: Backend) -> None:
    """Refuse flags of Megatron's that nothing could obey: their package is missing, or another part plays.

    Raises:
        UsageError: With what to give instead.
    """
    for name, values, package, instead in _FOREIGN:
        value = given.get(name)
        asked = value in values if values else bool(value)
        if asked and importlib.util.find_spec(package) is None:
            raise UsageError(f"{flag_of(name)}: needs the package {package}, which is missing; {instead}")
    if (given.get("fp8") or given.get("fp4")) and not backend.quantises():
        raise UsageError(
            "--fp8-format, --fp4-format: TransformerEngine's linear layers do it; add --backend te, or give "
            "--backend-part linear=fp8 instead, which does fp8 without it"
        )
    if given.get("cross_entropy_fusion_impl") == "te":
        raise UsageError("--cross-entropy-fusion-impl te: Megatron refuses it; use --backend-part loss=composer")
    if given.get("cross_entropy_loss_fusion") and backend.loss.use != "megatron":
        advice = "leave it out, or add --backend-part loss=local"
        raise UsageError(f"--cross-entropy-loss-fusion is Megatron's, and this loss is not; {advice}")
    chosen = getattr(given.get("attention_backend"), "name", None)
    if chosen in _ATTENTION_BACKENDS and "TransformerEngine" not in backend.attention.says:
        raise UsageError(
            f"--attention-backend {chosen} chooses among TransformerEngine's; add --backend-part attention=te, or "
            "leave it out"
        )
