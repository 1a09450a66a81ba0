"""RMSNorm in Megatron-core's interface, in plain PyTorch: runs on a CPU, and with sequence parallelism.

Megatron-core's own wrapper of `torch.nn.RMSNorm` refuses sequence parallelism, and its other norms need
TransformerEngine or Apex.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from composer_megatron.errors import UsageError


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467).

    The mean is taken in fp32 whatever the type of `x`.
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
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence alone: Megatron sums the gradients of parameters that say so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`: (…, hidden_size) to the same shape and type."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
