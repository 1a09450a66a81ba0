"""The kernels of `fp8`, compiled ahead of time: registers, spills, 16-byte accesses. Before sm_89 there is no e4m3."""

import pytest
import torch

from composer_kernels import fp8

E4M3 = "*fp8e4nv"


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("width", [2048, 3072, 8192, 16_384, 28_672, 65_536])
def test_quantise_compiled(width, architecture, compile_ahead, assert_as_recorded):
    launch = fp8.quantise_launch(width)
    types = [torch.bfloat16, E4M3, torch.float32, "i32:16", "i32"]
    constants = (width, launch.block, launch.rows)
    resources = compile_ahead(fp8._quantise_kernel, architecture, types, constants, num_warps=launch.warps)
    assert resources["spilled_bytes"] == 0
    assert resources["narrow_accesses"] == 1  # the scale
    assert_as_recorded(f"quantise, {width} wide, sm_{architecture}", resources)


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("width", [2048, 3072])
def test_transpose_compiled(width, architecture, compile_ahead, assert_as_recorded):
    launch = fp8.TRANSPOSE_LAUNCH
    types = [E4M3, torch.float32, torch.float32, E4M3, torch.float32, "i32:16", "i32"]
    constants = (width, launch.rows, launch.block)
    resources = compile_ahead(fp8._transpose_kernel, architecture, types, constants, num_warps=launch.warps)
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"transpose, {width} wide, sm_{architecture}", resources)
