"""SwiGLU in Megatron-core's interface for activation modules, by the kernel of `composer_kernels`."""

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from composer_kernels.swiglu import swiglu
from composer_megatron.errors import UsageError


class SwiGLU(nn.Module):
    """y = silu(gate) · up (arXiv 2002.05202) of the two halves that an MLP's first projection makes side by side."""

    def __init__(self, *, config: TransformerConfig) -> None:
        """Build the activation.

        Raises:
            UsageError: If the configuration asks for another activation.
        """
        super().__init__()
        if not config.gated_linear_unit or config.activation_func.__name__ != "silu":
            raise UsageError("this activation is SwiGLU; pass --swiglu, or --backend-part activation=local")
        if config.glu_linear_offset:
            raise UsageError(f"glu_linear_offset={config.glu_linear_offset} is not supported; set it to 0")
        self.limit = config.activation_func_clamp_value

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """(…, 2F), the gate first, to (…, F)."""
        return swiglu(gate_and_up, limit=self.limit)
