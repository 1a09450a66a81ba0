"""Weight gradients added straight to Megatron's gradient buffers, without Apex.

Megatron's linear layers ask a module ``fused_weight_gradient_mlp_cuda``, which comes with Apex, to multiply and to add
in one matrix multiplication. `install` puts `composer_kernels.wgrad_accumulate` in its place where it is missing.
"""

import importlib.util
import sys

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_APEX_MODULE = "fused_weight_gradient_mlp_cuda"


def apex_is_there() -> bool:
    """Whether Apex brought its own module, which then serves."""
    if _APEX_MODULE in sys.modules:
        return hasattr(sys.modules[_APEX_MODULE], "__file__")  # ours was read from no file
    return importlib.util.find_spec(_APEX_MODULE) is not None


def install() -> None:
    """Let Megatron find a module of that name: Apex's where it is there, else ours."""
    from composer_kernels.wgrad_accumulate import install_wgrad_module

    layers.fused_weight_gradient_mlp_cuda = install_wgrad_module()  # Megatron's layers looked for it when imported
    layers._grad_accum_fusion_available = True


def main_grad(weight: Tensor, config: TransformerConfig) -> Tensor | None:
    """The gradient buffer that a kernel may add the weight's gradient to, or None where autograd is to hand it over.

    There is one under Megatron's distributed data parallelism alone; kernels add in fp32.
    """
    if not config.gradient_accumulation_fusion or hasattr(weight, "__fsdp_param__"):
        return None
    buffer = getattr(weight, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype == torch.float32 else None


def stand_in(weight: Tensor) -> Tensor | None:
    """What autograd is given in place of a gradient that was added to the buffer: Megatron's hooks run on one."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
