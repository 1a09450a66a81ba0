"""Megatron-core and PyTorch remark at import on packages and GPUs that this machine lacks; none of them is needed."""

import logging
import warnings


def hush_imports() -> None:
    """Keep those remarks back, in this process; call before Megatron is imported."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
