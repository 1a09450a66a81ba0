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
    constants = [HIDDEN // width, *attention_parts.channels(width).values(), launch.positions]
    if form is attention_long:
        constants.append(attention_long.PREPARED_NUMBERS // constants[2])
        both = [dtype, FP32, FP32, FP32, dtype, dtype, FP32, *["i32:16"] * 4, "fp32"]
        back = [dtype, FP32, FP32, dtype, dtype, FP32, FP32, FP32, dtype, FP32, *["i32:16"] * 3, "fp32"]
    else:
        assert form is attention_short
        both = [dtype, FP32, FP32, FP32, dtype, FP32, "i32:16", "i32:16", "fp32"]
        back = [dtype, FP32, FP32, FP32, dtype, dtype, FP32, dtype, FP32, "i32:16", "i32:16", "fp32", "fp32"]
    for kernel, types in ((form._forward_kernel, both), (form._backward_kernel, back)):
        options = {"num_warps": launch.warps, "num_stages": 1}
        limited = kernel is form._backward_kernel and launch.registers is not None
        options |= {"maxnreg": launch.registers} if limited else {}
        own = (*constants, precision, last) if form is attention_long else (*constants, precision)
        found = compile_ahead(kernel, architecture, types, own, **options)
        measured = architecture == 90 and width == 8
        # elsewhere ptxas may keep a few numbers in memory, so that one program more fits a multiprocessor; and where
        # registers are limited, what is used once a tile of keys
        assert found["spilled_bytes"] <= (256 if limited else 0 if measured else 32), kernel


def test_the_others(compile_ahead):
    warps = {"num_warps": 4}
    stream = [FP32, BF16, FP32, I64, FP32, BF16, FP32, "i32", "i32:16", "fp32"]
    back = [FP32, BF16, BF16, FP32, I64, FP32, BF16, FP32, "i32", "i32:16", "i32"]
    kernels = (
        (residual._forward_kernel, stream, (128, 128, 32, True, True, True), warps),
        (residual._backward_kernel, back, (128, 128, 32, *[True] * 5), warps),
        (adamw._kernel, [FP32] * 5 + ["i32:16", "i32", "fp32"], (0.9, 0.999, adamw.BLOCK), warps),
        (cross_entropy._forward_kernel, [BF16, I64, FP32, FP32, "i32"], (-100, 16, 16, 256), warps),
        (cross_entropy._backward_kernel, [BF16, I64, FP32, FP32, BF16, "i32"], (-100, 16, 16, 256), warps),
        (mlp._forward_kernel, [BF16] * 4 + ["i32:16"], (128, 352, *mlp.FORWARD[:2]), mlp.FORWARD.options),
        (mlp._backward_kernel, [BF16] * 7 + ["i32:16"], (128, 352, *mlp.BACKWARD[:2]), mlp.BACKWARD.options),
    )
    for kernel, types, constants, options in kernels:
        assert compile_ahead(kernel, 90, types, constants, **options)["spilled_bytes"] == 0, kernel
