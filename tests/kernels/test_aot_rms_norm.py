"""The kernels of `rms_norm` and `add_rms_norm`, compiled ahead of time: registers, spills and 16-byte accesses."""

import pytest
import torch

from composer_kernels import _norm

BF16, FP32 = torch.bfloat16, torch.float32
ARCHITECTURES = [80, 90, 100]
STREAMS = {"none": None, "bf16": BF16, "fp32": FP32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("width", [4096, 16384, 65536])
def test_forward(width, stream, architecture, compile_ahead, assert_as_recorded):
    launch = _norm.forward_launch(width)
    kind = STREAMS[stream]
    types = [BF16, kind, BF16, BF16, kind, FP32, "i32:16", "i32:16", "i32", "fp32"]
    constants = (width, launch.block, launch.rows, False)
    resources = compile_ahead(_norm._forward_kernel, architecture, types, constants, num_warps=launch.warps)
    assert resources["spilled_bytes"] == 0
    assert resources["narrow_accesses"] == 1  # rstd
    assert_as_recorded(f"forward, {width} wide, residual {stream}, sm_{architecture}", resources)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("width", [2048, 4096, 8192, 16384])
def test_backward(width, stream, architecture, compile_ahead, assert_as_recorded):
    kind = STREAMS[stream]
    launch = _norm.backward_launch(width, 4 if kind is None else 2 + 2 * kind.itemsize)
    total, copy = (BF16, None) if kind is None else (kind, BF16 if kind == FP32 else None)
    types = [BF16, kind, total, BF16, FP32, total, copy, FP32, *["i32:16"] * 3, "i32", "i32"]
    pin = launch.pin and launch.block >= width
    constants = (width, launch.block, launch.rows, False, pin, launch.stages, architecture >= 90)
    resources = compile_ahead(_norm._backward_kernel, architecture, types, constants, num_warps=launch.warps)
    # At most four registers, in the launch that was timed as the fastest at 8192 columns with an fp32 stream.
    assert resources["spilled_bytes"] <= (16 if (width, stream) == (8192, "fp32") else 0)
    if launch.block >= width:  # all programs of a multiprocessor run at once
        assert launch.programs * launch.warps * 32 * resources["registers"] <= 65536
    assert_as_recorded(f"backward, {width} wide, residual {stream}, sm_{architecture}", resources)


@pytest.mark.parametrize(("architecture", "overlap"), [(80, False), (90, False), (90, True), (100, True)])
def test_weight_grad(architecture, overlap, compile_ahead, assert_as_recorded):
    constants = (4096, 32, 256, True, overlap)
    options = {"num_warps": 8, "launch_pdl": overlap}
    resources = compile_ahead(_norm._weight_grad_kernel, architecture, [FP32, FP32, "i32"], constants, **options)
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"weight gradient, overlap {overlap}, sm_{architecture}", resources)
