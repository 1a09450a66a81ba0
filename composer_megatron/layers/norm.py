"""RMSNorm in Megatron-core's interface: runs on a CPU, with sequence parallelism, and on a residual stream in fp32.

Megatron-core's own wrapper of `torch.nn.RMSNorm` refuses sequence parallelism, and its other norms need
TransformerEngine or Apex. This one takes the residual addition before it along, which `composer_megatron.stack` asks
for.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from composer_megatron.errors import UsageError


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467), in plain PyTorch.

    The mean is taken in fp32 whatever the type of `x`. With ``config.fp32_residual_connection`` y has the type of the
    weight, that of the blocks, and else that of `x`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Build the norm.

        Args:
            config: Megatron-core's configuration of the model.
            hidden_size: Width of the last dimension.
            eps: Added to the mean square.

        Raises:
            UsageError: If the configuration asks for another norm than this one.
        """
        super().__init__()
        if config.normalization != "RMSNorm":
            raise UsageError(f"normalization={config.normalization!r}; Composite models have RMSNorm")
        if config.layernorm_zero_centered_gamma:
            raise UsageError("layernorm_zero_centered_gamma (--apply-layernorm-1p) is not supported by this RMSNorm")
        self.config = config
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence alone: Megatron sums the gradients of parameters that say so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise.

        Args:
            x: (…, hidden_size).
            residual: Same shape, to be added to `x` first, or None.

        Returns:
            The norm of `x`; with `residual` the norm of the sum, and the sum in the type of `residual`.
        """
        if residual is None:
            return self._normalise(x)
        total = residual + x.to(residual.dtype)
        return self._normalise(total), total

    def _normalise(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return y.to(self._out_dtype(x))

    def _out_dtype(self, x: Tensor) -> torch.dtype:
        return self.weight.dtype if self.config.fp32_residual_connection else x.dtype
