"""Mamba-2 on Megatron-core's own mixer: with the kernels of mamba-ssm on a GPU, and by PyTorch anywhere.

Megatron's `MambaMixer` cannot be built without mamba-ssm. `Mamba2Mixer` is that mixer, with the same parameters and
checkpoints; where it does not use the package, it computes by `composer_megatron.recurrences`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_context_parallel, mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from composer_megatron import cpu
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.layers.block import Inputs, Stream
from composer_megatron.layers.norm import RMSNorm
from composer_megatron.packages import check_kernels, missing_kernels
from composer_megatron.recurrences import causal_convolution, scan


class GroupedRMSNorm(nn.Module):
    """The parameters of mamba-ssm's gated norm, which Megatron's mixer builds; `Mamba2Mixer` computes it.

    Attributes:
        tp_group: Ranks among which `size` is split; the mixer sets it.
    """

    tp_group: Any

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: Any,
        dtype: torch.dtype,
    ) -> None:
        """Build the norm.

        Args:
            size: Of the last dimension.
            eps: Unused here, as are the next two.
            group_size: Elements of a group.
            norm_before_gate: Whether the gate follows the norm.
            device: Of the weight.
            dtype: Of the weight.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """As Megatron's: the weight is split as the inner width is."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class Mamba2Mixer(MambaMixer):
    """Megatron's Mamba-2 mixer, which computes by PyTorch where mamba-ssm is not to be used.

    Attributes:
        uses_kernels: Whether mamba-ssm computes.
    """

    def __init__(self, config: Any, *args: Any, kernels: bool = True, **kwargs: Any) -> None:
        """Build the mixer.

        Args:
            config: Megatron-core's configuration.
            args: As for `MambaMixer`.
            kernels: Whether mamba-ssm is to compute on a GPU.
            kwargs: As for `MambaMixer`.

        Raises:
            ComposerError: If it is to, and a package is missing.
        """
        self.uses_kernels = kernels and cpu.has_gpu()
        if self.uses_kernels:
            check_kernels("S")
        missing = missing_kernels("S")
        if "einops" in missing and config.context_parallel_size > 1:
            raise ComposerError(
                "Mamba-2 (S) under context parallelism needs einops, which is missing: pip install einops"
            )
        if missing:
            _stand_in()
        with nullcontext() if config.perform_initialization else _undrawn():
            super().__init__(config, *args, **kwargs)

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Tensor:
        if self.uses_kernels:
            return super()._ssm_training(zxBCdt, packed_seq_params)
        if packed_seq_params is not None:
            raise UsageError("Mamba-2 (S) by PyTorch knows no packed sequences; on a GPU mamba-ssm does")
        return self._mix(zxBCdt, None, None, packed_seq_params)

    def _ssm_prefill(
        self, zxBCdt: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, **kwargs: Any
    ) -> Tensor:
        if self.uses_kernels:
            return super()._ssm_prefill(zxBCdt, conv_state, ssm_state, **kwargs)
        return self._mix(zxBCdt, conv_state, ssm_state, None)

    def _ssm_decode(self, zxBCdt: Tensor, conv_state: Tensor, ssm_state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.uses_kernels:
            return super()._ssm_decode(zxBCdt, conv_state, ssm_state, *args, **kwargs)
        return self._mix(zxBCdt, conv_state, ssm_state, None)

    def _mix(
        self, projected: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, packed: PackedSeqParams | None
    ) -> Tensor:
        """From the projections (s, b, ·) to the normed output (s, b, inner).

        Args:
            projected: Gate, x, B, C and step sizes.
            conv_state: (b, channels, 4), the newest inputs of the convolution, brought up to date in place.
            ssm_state: (b, heads, head_dim, state_dim), brought up to date in place.
            packed: For Megatron's context parallelism.
        """
        cp = self.cp
        projected = projected.transpose(0, 1)
        kinds = (cp.d_inner_local_tpcp, cp.d_inner_local_tpcp, *2 * (cp.ngroups_local_tpcp * self.d_state,))
        gate, x, dt = projected.split((kinds[0], sum(kinds[1:]), cp.nheads_local_tpcp), -1)
        before = None if conv_state is None else conv_state[..., 1:].mT.to(x.dtype)
        mixed = F.silu(causal_convolution(x, cp.get_conv1d_weight().squeeze(1), cp.get_conv1d_bias(), before))
        if conv_state is not None:
            conv_state.copy_(torch.cat([conv_state, x.mT], -1)[..., -conv_state.shape[-1] :])
        y, state = self._recur(mixed.split(kinds[1:], -1), dt, ssm_state)
        if ssm_state is not None:
            ssm_state.copy_(state.mT)
        y = cp.post_conv_ssm((y * F.silu(gate)).transpose(0, 1).contiguous(), packed)
        return self._norm(y)

    def _norm(self, y: Tensor) -> Tensor:
        """RMSNorm over each group's share of the inner width (s, b, inner), in fp32 or wider."""
        size = self.d_inner_local_tp // self.ngroups_local_tp
        groups = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(-1, (-1, size))
        return F.rms_norm(groups, (size,), eps=1e-5).flatten(-2).to(y.dtype) * self.norm.weight

    def _recur(self, mixed: tuple[Tensor, ...], dt: Tensor, ssm_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The recurrence in fp32 or wider: outputs (b, s, inner) and the new state (b, heads, keys, values)."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        x, key, query = (
            part.to(wide).unflatten(-1, (-1, width))
            for part, width in zip(mixed, (self.headdim, self.d_state, self.d_state), strict=True)
        )
        share = x.shape[2] // key.shape[2]
        step = F.softplus(dt.to(wide) + self.cp.get_dt_bias().to(wide))
        y, state = scan(
            query.repeat_interleave(share, 2),
            key.repeat_interleave(share, 2),
            x * step[..., None],
            -step * self.cp.get_A_log().to(wide).exp(),
            state=None if ssm_state is None else ssm_state.mT.to(wide),
        )
        y = y + x * self.cp.get_D().to(wide)[:, None]
        return y.flatten(-2).to(dt.dtype), state


def _stand_in() -> None:
    """Let Megatron's mixer be built without its packages: what `Mamba2Mixer` does not override needs none of them."""
    mamba_mixer.HAVE_MAMBA_SSM = mamba_mixer.HAVE_EINOPS = mamba_context_parallel.HAVE_EINOPS = True
    mamba_mixer.ExtendedRMSNorm = GroupedRMSNorm


@contextmanager
def _undrawn() -> Iterator[None]:
    """Let Megatron's mixer be built where the ranks have no generators yet: all its weights are drawn afterwards."""
    found = mamba_mixer.get_cuda_rng_tracker
    mamba_mixer.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)
    try:
        yield
    finally:
        mamba_mixer.get_cuda_rng_tracker = found


class Mamba2Layer(MambaLayer):
    """Megatron's Mamba layer, which can leave its residual addition to the norm of the block after it.

    See `composer_megatron.layers.block.CompositeLayer`.
    """

    def is_block(self) -> bool:
        """Whether the layer's parts are of kinds that `forward` knows."""
        return isinstance(self.norm, RMSNorm) and isinstance(self.mixer, MambaMixer)

    def forward(self, *args: Any, stream: Stream | None = None, inputs: Inputs | None = None, **kwargs: Any) -> Any:
        """Run the block.

        Args:
            args: As for `MambaLayer`, where there is no stream.
            stream: The stream before this block.
            inputs: With the stream, the rest.
            kwargs: As for `MambaLayer`, where there is no stream.

        Returns:
            The stream after this block; without one what `MambaLayer` returns.
        """
        if stream is None or inputs is None:
            return super().forward(*args, **kwargs)
        context = inputs.inference_context
        if context is not None:
            _name_as_mamba(context)
        residual = stream.residual
        with TransformerLayer.get_inner_quantization_context(self):
            if stream.delta is None:
                x = self.norm(residual)
            else:
                x, residual = self.norm(stream.delta, residual)
            delta, bias = self.mixer(x, inference_context=context, packed_seq_params=inputs.packed_seq_params)
        delta = delta if bias is None else delta + bias
        return Stream(residual, F.dropout(delta, self.hidden_dropout, self.training))


def _name_as_mamba(context: BaseInferenceContext) -> None:
    """Give a static cache the names by which Megatron's mixer asks for its sizes, as Megatron's own stack does."""
    if context.is_static_batching():
        context.max_seqlen, context.seqlen_offset = context.max_sequence_length, context.sequence_len_offset
