"""`composer_megatron.layers.norm.RMSNorm` by the kernels of `composer_kernels`."""

from torch import Tensor

from composer_kernels.add_rms_norm import add_rms_norm
from composer_kernels.rms_norm import rms_norm
from composer_megatron.layers.norm import RMSNorm
from composer_megatron.layers.wgrad import main_grad


class FusedRMSNorm(RMSNorm):
    """`RMSNorm` by the kernels of `composer_kernels`: one pass over memory, the residual addition included.

    With gradient accumulation fusion the gradient of the weight goes into Megatron's gradient buffer in fp32.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As `RMSNorm.forward`."""
        buffer = main_grad(self.weight, self.config)
        if residual is None:
            return rms_norm(x, self.weight, self.eps, out_dtype=self._out_dtype(x), main_grad=buffer)
        return add_rms_norm(x, residual, self.weight, self.eps, main_grad=buffer)
