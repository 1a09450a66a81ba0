"""The kernels that linear cross entropy launches on its own buffer: aligned rows whose width may still be odd."""

import pytest
import torch

from composer_kernels import _cross_entropy_kernels as kernels
from composer_kernels._cross_entropy import one_pass_launch

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("name", "width"), [("aligned", 128256), ("odd", 50257)])
def test_loss_and_gradient_of_a_chunk(name, width, architecture, compile_ahead, assert_as_recorded):
    launch = one_pass_launch(width, BF16.itemsize, shifted=False, plain=True)
    kind = "i32:16" if width % 16 == 0 else "i32"
    types = (BF16, BF16, INT64, FP32, FP32, "i32", "i32:16", "i32:16", "i32:16", "i32:16", kind)
    types += ("i32", "fp32", "fp32", "fp32")
    constants = (0, False, False, False, launch.lanes(BF16.itemsize), launch.vectors)
    constants += (launch.policy, launch.keep, launch.store)
    found = compile_ahead(kernels._loss_and_gradient_kernel, architecture, types, constants, num_warps=launch.warps)
    assert found["spilled_bytes"] == 0
    assert_as_recorded(f"loss_and_gradient sm_{architecture} {name}", found)
