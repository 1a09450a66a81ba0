"""The cross-entropy kernels, compiled for GPUs that need not be there: registers, spills, width of memory accesses."""

import pytest
import torch

from composer_kernels import _cross_entropy_kernels as kernels
from composer_kernels._cross_entropy import gradient_launch, one_pass_launch, statistics_launch

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
WIDTHS = {"aligned": 128256, "odd": 128257}
CASES = [  # (dtype of the logits, width, cap and smoothing)
    (BF16, "aligned", False),
    (FP32, "aligned", True),
    (BF16, "odd", False),
    (BF16, "aligned", True),
]


def spread(dtype, width, everything, choose):
    """Types of (strides, width), constants (SHIFT, SOFTCAP, SMOOTH, PRECISE, LANES, UNROLL) and warps of a launch."""
    launch = choose(WIDTHS[width], dtype.itemsize, width == "odd", *([not everything] * (choose == one_pass_launch)))
    kind = "i32:16" if width == "aligned" else "i32"
    constants = (
        int(width == "odd"),
        everything,
        everything,
        dtype == FP32,
        launch.lanes(dtype.itemsize),
        launch.vectors,
    )
    return kind, constants, launch


def named(kernel, architecture, dtype, width, everything):
    loss = "everything" if everything else "plain"
    return f"{kernel} sm_{architecture} {str(dtype).removeprefix('torch.')} {width} {loss}"


# Every kernel for every architecture; all variants for the one that the launches are tuned on.
VARIANTS = [(90, *case) for case in CASES] + [(arch, *case) for arch in (80, 100) for case in CASES[:2]]


@pytest.mark.parametrize(("architecture", "dtype", "width", "everything"), VARIANTS)
def test_statistics(architecture, dtype, width, everything, compile_ahead, assert_as_recorded):
    kind, constants, launch = spread(dtype, width, everything, statistics_launch)
    types = (dtype, INT64, FP32, "i32", kind, kind, kind, "i32", "i32", "fp32")
    found = compile_ahead(kernels._statistics_kernel, architecture, types, constants, num_warps=launch.warps)
    assert found["spilled_bytes"] == 0
    assert_as_recorded(named("statistics", architecture, dtype, width, everything), found)


@pytest.mark.parametrize(("architecture", "dtype", "width", "everything"), VARIANTS)
def test_gradient(architecture, dtype, width, everything, compile_ahead, assert_as_recorded):
    kind, (shift, cap, _, precise, *tile), launch = spread(dtype, width, everything, gradient_launch)
    types = (dtype, dtype, INT64, FP32, FP32, "i32", "i32", kind, kind, kind, kind, "i32", kind)
    types += ("i32", "i32", "i32", "fp32", "fp32", "fp32")
    constants = (shift, cap, precise, *tile)
    found = compile_ahead(kernels._gradient_kernel, architecture, types, constants, num_warps=launch.warps)
    assert found["spilled_bytes"] == 0
    assert_as_recorded(named("gradient", architecture, dtype, width, everything), found)


@pytest.mark.parametrize(("architecture", "dtype", "width", "everything"), VARIANTS)
def test_loss_and_gradient(architecture, dtype, width, everything, compile_ahead, assert_as_recorded):
    kind, constants, launch = spread(dtype, width, everything, one_pass_launch)
    types = (dtype, dtype, INT64, FP32, FP32, "i32", kind, kind, kind, kind, kind, "i32", "fp32", "fp32", "fp32")
    constants = (*constants, launch.policy, launch.keep, launch.store)
    found = compile_ahead(kernels._loss_and_gradient_kernel, architecture, types, constants, num_warps=launch.warps)
    assert found["spilled_bytes"] == 0
    assert_as_recorded(named("loss_and_gradient", architecture, dtype, width, everything), found)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_finish(architecture, compile_ahead, assert_as_recorded):
    types = (FP32, INT64, FP32, FP32, "i32", "i32", "i32", "i32", "fp32", "fp32")
    found = compile_ahead(kernels._finish_kernel, architecture, types, (True, 128), num_warps=4)
    assert found["spilled_bytes"] == 0
    assert_as_recorded(f"finish sm_{architecture}", found)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_rescale(architecture, compile_ahead, assert_as_recorded):
    types = (BF16, FP32, "i32", "i32", "i32:16", "i32:16", "i32:16")
    found = compile_ahead(kernels._rescale_kernel, architecture, types, (4096,), num_warps=4)
    assert found["spilled_bytes"] == 0
    assert_as_recorded(f"rescale sm_{architecture}", found)
