"""The attention kernels, compiled for GPUs that need not be there: registers, spills, width of memory accesses."""

import pytest
import torch

from composer_kernels import _flash, _flash_backward

BF16, FP32 = torch.bfloat16, torch.float32
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
KERNELS = {
    "forward": (_flash._forward_kernel, _flash.forward_launch),
    "dq": (_flash_backward._dq_kernel, _flash_backward.dq_launch),
    "dkdv": (_flash_backward._dkdv_kernel, _flash_backward.dkdv_launch),
}
MEANT = {  # bytes spilled, where smaller tiles would cost more matrix products' width than these few registers
    ("dkdv", BF16, 96, 90): 40,
    ("dkdv", BF16, 128, 90): 40,
    ("dq", FP32, 256, 90): 400,
}


def types_of(name, dtype, packed):
    """Of pointers, strides, counts and scales."""
    starts = ["*i32", "*i32"] if packed else [None, None]
    pointers, strides = {
        "forward": ([dtype] * 4 + [FP32], 12),
        "dq": ([dtype] * 5 + [FP32, None, dtype, FP32], 18),
        "dkdv": ([dtype] * 4 + [FP32, FP32, dtype, dtype], 18),
    }[name]
    return [*pointers, *starts, *["i32:16"] * strides, *["i32"] * 7, *["fp32"] * (1 if name == "forward" else 2)]


# Every kernel at every head dimension for the architecture that the launches are chosen for, and one for the others.
VARIANTS = [(90, BF16, dim, False, False) for dim in (64, 96, 128, 256)]
VARIANTS += [(90, BF16, 64, True, True), (90, FP32, 64, False, False), (90, FP32, 256, False, False)]
VARIANTS += [(architecture, BF16, 128, False, False) for architecture in (80, 100)]


@pytest.mark.parametrize(("architecture", "dtype", "dim", "windowed", "packed"), VARIANTS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiled(name, architecture, dtype, dim, windowed, packed, monkeypatch, compile_ahead, assert_as_recorded):
    kernel, choose_launch = KERNELS[name]
    for module in (_flash, _flash_backward):
        monkeypatch.setattr(module, "gpu", lambda device: (architecture // 10, SHARED[architecture]))
    launch = choose_launch.__wrapped__(dim, dtype.itemsize, 0)
    width = 64 if dim == 64 else 128 if dim <= 128 else 256
    constants = (4, dim, width, True, windowed, packed, launch.rows, launch.columns)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    found = compile_ahead(kernel, architecture, types_of(name, dtype, packed), constants, **options)
    del found["narrow_accesses"]  # of the statistics, one number a row
    assert found["spilled_bytes"] <= MEANT.get((name, dtype, dim, architecture), 0)
    kind = f"{str(dtype).removeprefix('torch.')} {dim} wide"
    extras = ", packed" * packed + ", windowed" * windowed
    assert_as_recorded(f"{name} sm_{architecture} {kind}{extras}", found)
