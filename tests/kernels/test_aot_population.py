"""The kernels of `composer_search.population` at MAD's widths, compiled ahead of time: no spills, or next to none."""

import pytest
import torch

from composer_search.population.kernels import (
    adamw,
    attention,
    attention_long,
    attention_parts,
    attention_short,
    cross_entropy,
    linear,
    mlp,
    residual,
)

BF16, FP32, I64 = torch.bfloat16, torch.float32, torch.int64
HIDDEN = 128


@pytest.mark.parametrize(
    ("architecture", "length", "width", "dtype", "precision", "last"),
    [
        *((each, length, 8, BF16, "ieee", False) for each in (80, 90, 100) for length in (16, 32, 64, 272)),
        *((90, length, width, BF16, "ieee", False) for length in (64, 272) for width in (16, 32)),
        *((90, length, width, FP32, "ieee", False) for length, width in ((32, 8), (32, 16), (272, 8), (272, 16))),
        *((90, length, 32, FP32, "tf32", False) for length in (32, 272)),
        *((each, 272, 8, BF16, "ieee", True) for each in (80, 90, 100)),
    ],
    ids=str,
)
def test_attention(architecture, length, width, dtype, precision, last, compile_ahead):
    form = attention.form(length, dtype)
    launch = form.default_launch(length, width, dtype)
    heads = HIDDEN // width
    own = back_own = (heads, *attention_parts.channels(width).values(), launch.positions, precision)
    if form is attention_long:
        sizes = attention_long._constants(width, launch)
        width_of, tile = (sizes["WIDTH"], sizes["WIDE"], sizes["DEEP"]), (sizes["BLOCK"], sizes["PREPARED"])
        own = (heads, *width_of, *tile, precision, last)
        back_own = (heads, *width_of, launch.warps, *tile, precision, last)
        both = [dtype, FP32, FP32, FP32, dtype, dtype, FP32, *["i32:16"] * 4, "fp32"]
        back = [dtype, FP32, FP32, dtype, dtype, FP32, FP32, FP32, dtype, FP32, *["i32:16"] * 3, "fp32"]
    else:
        assert form is attention_short
        both = [dtype, FP32, FP32, FP32, dtype, FP32, "i32:16", "i32:16", "fp32"]
        back = [dtype, FP32, FP32, FP32, dtype, dtype, FP32, dtype, FP32, "i32:16", "i32:16", "fp32", "fp32"]
    kernels = (form._forward_kernel, both, own), (form._backward_kernel, back, back_own)
    for kernel, types, constants in kernels:
        options = {"num_warps": launch.warps, "num_stages": 1}
        found = compile_ahead(kernel, architecture, types, constants, **options)
        # elsewhere ptxas may keep a few numbers in memory, so that one program more fits a multiprocessor; and more of
        # heads wider than any proxy's, whose products sum over twice their channels
        most = 0 if architecture == 90 and width == 8 else 640 if form is attention_long and width > 8 else 32
        assert found["spilled_bytes"] <= most, kernel


@pytest.mark.parametrize(("times", "most"), [(1, 0), (3, 256)])
def test_linear(times, most, compile_ahead):
    """The wider layer keeps a few addresses in memory; of shared memory both take what `fits` asks a GPU for."""
    launch = linear.default_launch(HIDDEN, times * HIDDEN)
    constants = (HIDDEN, times == 3, min(launch.columns, HIDDEN), launch.block)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    found = compile_ahead(linear._kernel, 90, [BF16] * 5 + ["i32:16", "i32:16"], constants, **options)
    assert found["spilled_bytes"] <= most
    assert found["shared_bytes"] == launch.shared_bytes(HIDDEN, times * HIDDEN)


def test_the_others(compile_ahead):
    warps = {"num_warps": 4}
    stream = [FP32, BF16, FP32, I64, FP32, BF16, FP32, "i32", "i32:16", "fp32"]
    back = [BF16, BF16, BF16, FP32, I64, BF16, FP32, "i32", "i32:16"]
    kernels = (
        (residual._forward_kernel, stream, (128, 128, 32, True, True, True), warps),
        (residual._backward_kernel, back, (128, 128, 32, *[True] * 4), warps),
        (adamw._kernel, [FP32] * 5 + ["i32:16", "i32", "fp32"], (0.9, 0.999, adamw.BLOCK), warps),
        (cross_entropy._forward_kernel, [BF16, I64, FP32, FP32, "i32"], (-100, 16, 16, 256), warps),
        (cross_entropy._backward_kernel, [BF16, I64, FP32, FP32, BF16, "i32"], (-100, 16, 16, 256), warps),
        (mlp._forward_kernel, [BF16] * 4 + ["i32:16"], (128, 352, *mlp.FORWARD[:2]), mlp.FORWARD.options),
        (mlp._backward_kernel, [BF16] * 7 + ["i32:16"], (128, 352, *mlp.BACKWARD[:2]), mlp.BACKWARD.options),
    )
    for kernel, types, constants, options in kernels:
        assert compile_ahead(kernel, 90, types, constants, **options)["spilled_bytes"] == 0, kernel
