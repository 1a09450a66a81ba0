"""Gated DeltaNet on Megatron-core's own module: with the kernels of flash-linear-attention on a GPU, else by PyTorch.

Megatron's `GatedDeltaNet` cannot be built without flash-linear-attention, and does not decode. `DeltaNet` is that
module, with the same parameters and checkpoints, which does both by `composer_megatron.recurrences`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, common
from torch import Tensor

from composer_megatron import cpu
from composer_megatron.errors import UsageError
from composer_megatron.packages import check_kernels, missing_kernels
from composer_megatron.recurrences import causal_convolution, scan, unit


class DeltaNet(GatedDeltaNet):
    """Megatron's Gated DeltaNet, which computes by PyTorch where flash-linear-attention is not to be used.

    Attributes:
        uses_kernels: Whether flash-linear-attention computes.
        widths: Of queries, keys and values on a tensor-parallel rank.
    """

    def __init__(self, config: Any, *args: Any, kernels: bool = True, **kwargs: Any) -> None:
        """Build the module.

        Args:
            config: Megatron-core's configuration.
            args: As for `GatedDeltaNet`.
            kernels: Whether flash-linear-attention is to compute on a GPU.
            kwargs: As for `GatedDeltaNet`.

        Raises:
            ComposerError: If it is to, and is missing.
        """
        self.uses_kernels = kernels and cpu.has_gpu()
        if self.uses_kernels:
            check_kernels("G")
        if missing_kernels("G"):
            common.HAVE_FLA = True  # what this class does not override needs none of it
        super().__init__(config, *args, **kwargs)
        self.widths = [self.qk_dim_local_tp, self.qk_dim_local_tp, self.v_dim_local_tp]
        # How a tensor-parallel rank's rows are made up, as Megatron marks them on its Mamba mixer.
        self.in_proj.weight.partition_sizes = list(self.in_proj_split_sections)
        self.conv1d.weight.partition_sizes = self.widths

    def _setup_variant_attrs(self) -> None:
        super()._setup_variant_attrs()
        if common.chunk_gated_delta_rule is None:
            self.gated_delta_rule = scan  # Megatron asks that there be one

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens.

        Args:
            hidden_states: (s, b, h).
            attention_mask: Ignored; each token sees the earlier ones.
            inference_context: A static cache while generating.
            packed_seq_params: Where packed sequences end.
            kwargs: Ignored.

        Returns:
            (s, b, h), and no bias.

        Raises:
            UsageError: For packed sequences by PyTorch.
        """
        if inference_context is None and self.uses_kernels:
            return super().forward(hidden_states, attention_mask, packed_seq_params=packed_seq_params)
        if packed_seq_params is not None:
            raise UsageError("Gated DeltaNet (G) by PyTorch knows no packed sequences; flash-linear-attention does")
        projected, _ = self.in_proj(hidden_states)
        # Under context parallelism a rank then has all tokens of its share of the heads, and later gives them back.
        sections = list(self.in_proj_split_sections)
        projected = common.tensor_a2a_cp2hp(projected, 0, -1, self.pg_collection.cp, sections)
        output, gate = self._mix(projected.transpose(0, 1), *self._states(inference_context, projected))
        mixed = self._gated_norm_and_a2a(output, gate, None, *output.shape[:2])
        return self.out_proj(mixed)

    def _states(self, context: BaseInferenceContext | None, projected: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What decoding keeps: the convolution's newest inputs (b, width, channels), and the state in fp32 or wider."""
        if context is None:
            return None, None
        kept = context.key_value_memory_dict
        if context.sequence_len_offset == 0 or self.layer_number not in kept:
            batch, wide = projected.shape[1], torch.promote_types(projected.dtype, torch.float32)
            heads, sizes = self.num_v_heads_local_tp, (self.key_head_dim, self.value_head_dim)
            kept[self.layer_number] = (
                projected.new_zeros(batch, self.conv_kernel_dim, self.conv_dim_local_tp),
                projected.new_zeros(batch, heads, *sizes, dtype=wide),
            )
        newest, state = kept[self.layer_number]
        return newest, state

    def _mix(self, projected: Tensor, newest: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """From the projections (b, s, ·) to what the state gives, and its gate, (b, s, heads, width) both.

        States are brought up to date in place.
        """
        x, gate, strength, decay = projected.split(self.feat_dim_split, -1)
        before = None if newest is None else newest[:, 1:]
        mixed = F.silu(causal_convolution(x, self._own(self.conv1d.weight, self.widths).squeeze(1), before=before))
        if newest is not None:
            newest.copy_(torch.cat([newest, x], 1)[:, -newest.shape[1] :])
        wide = torch.promote_types(x.dtype, torch.float32)
        query, key, value = mixed.to(wide).split([width // self.cp_size for width in self.widths], -1)
        share = self.num_value_heads // self.num_key_heads
        query, key = (
            unit(part.unflatten(-1, (-1, self.key_head_dim))).repeat_interleave(share, 2) for part in (query, key)
        )
        rates, bias = (self._own(each).to(wide) for each in (self.A_log, self.dt_bias))
        log_decay = -rates.exp() * F.softplus(decay.to(wide) + bias)
        output, after = scan(
            query * self.key_head_dim**-0.5,
            key,
            value.unflatten(-1, (-1, self.value_head_dim)),
            log_decay,
            strength.to(wide).sigmoid(),
            state,
        )
        if state is not None:
            state.copy_(after)
        return output.to(x.dtype), gate.unflatten(-1, (-1, self.value_head_dim))

    def _own(self, parameter: Tensor, widths: list[int] | None = None) -> Tensor:
        """The part of a parameter that belongs to a context-parallel rank's heads."""
        own: Tensor = common.get_parameter_local_cp(parameter, 0, self.pg_collection.cp, widths)
        return own
