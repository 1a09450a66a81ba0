"""The kernels of `adamw`, compiled ahead of time: registers, spills and 16-byte accesses."""

import pytest
import torch
from triton import language as tl

from composer_kernels import _adamw

I64, FP32 = torch.int64, torch.float32
MASTER = (tl.float32, tl.float32, tl.float32, tl.float32, tl.bfloat16)
"""Types of the parameter, the gradient, m, v and the copy: fp32 all, and a copy in bf16."""
CASES = {
    "master": MASTER,
    "master, bf16 gradient": (tl.float32, tl.bfloat16, tl.float32, tl.float32, tl.bfloat16),
    "fp32": (tl.float32, tl.float32, tl.float32, tl.float32, None),
    "bf16": (tl.bfloat16,) * 4 + (None,),
}


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_update(case, architecture, compile_ahead, assert_as_recorded):
    launch = _adamw.UPDATE_LAUNCH
    types = [I64, I64, "*i32", FP32, FP32, FP32]
    constants = (*CASES[case], True, launch.block, launch.tiles)
    resources = compile_ahead(_adamw._update_kernel, architecture, types, constants, num_warps=launch.warps)
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"update, {case}, sm_{architecture}", resources)


def test_blocks_that_are_full_and_aligned_are_accessed_in_16_bytes(compile_ahead):
    """Where a tensor ends, and in tables, accesses are narrow anyway: seven data accesses of 4 elements are not."""
    launch, narrow = _adamw.UPDATE_LAUNCH, []
    for aligned in (True, False):
        constants = (*CASES["fp32"], aligned, launch.block, launch.tiles)
        types = [I64, I64, "*i32", FP32, FP32, FP32]
        resources = compile_ahead(_adamw._update_kernel, 90, types, constants, num_warps=launch.warps)
        narrow.append(resources["narrow_accesses"])
    assert narrow[1] - narrow[0] == 7 * launch.block // (32 * launch.warps)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", [tl.float32, tl.bfloat16], ids=["fp32", "bf16"])
def test_norm(dtype, architecture, compile_ahead, assert_as_recorded):
    launch = _adamw.NORM_LAUNCH
    constants = (dtype, True, launch.block, launch.tiles)
    resources = compile_ahead(
        _adamw._square_kernel, architecture, [I64, "*i32", FP32, "i32"], constants, num_warps=launch.warps
    )
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"norm, {dtype}, sm_{architecture}", resources)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("steps", [False, True])
def test_prepare(steps, architecture, compile_ahead, assert_as_recorded):
    types = [I64, FP32, None if steps else FP32, FP32, "i32", "i32", "i32", *["fp32"] * 11]
    resources = compile_ahead(_adamw._prepare_kernel, architecture, types, (steps, _adamw.PREPARE_BLOCK), num_warps=4)
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"prepare, own steps {steps}, sm_{architecture}", resources)
