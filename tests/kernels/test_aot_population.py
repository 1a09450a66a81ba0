"""The kernels of `composer_search.population` at MAD's widths, compiled ahead of time: no spills, nothing too large."""

import pytest
import torch

from composer_search.population.kernels import adamw, attention, cross_entropy, mlp, residual

BF16, FP32, I64 = torch.bfloat16, torch.float32, torch.int64
ATTENTION = (BF16, FP32, FP32, FP32)


@pytest.mark.parametrize("length", [32, 128, 256])
def test_attention(length, compile_ahead):
    sizes = ["i32:16", "i32:16", "fp32"]
    positions, warps = attention.default_launch(length, backward=False)
    types = [*ATTENTION, BF16, FP32, *sizes]
    found = compile_ahead(attention._forward_kernel, 90, types, (16, 8, 16, positions, "ieee"), num_warps=warps)
    assert found["spilled_bytes"] == 0
    positions, warps = attention.default_launch(length, backward=True)
    constants = (16, 8, 16, positions, positions >= length, "ieee")
    types = [*ATTENTION, BF16, BF16, FP32, BF16, FP32, *sizes, "fp32"]
    assert compile_ahead(attention._backward_kernel, 90, types, constants, num_warps=warps)["spilled_bytes"] == 0


def test_the_others(compile_ahead):
    warps = {"num_warps": 4}
    stream = [FP32, BF16, FP32, I64, FP32, BF16, "i32", "i32:16", "fp32"]
    kernels = (
        (residual._forward_kernel, stream, (128, 128, 32, True, True, True), warps),
        (residual._backward_kernel, [*stream[:6], FP32, *stream[6:]], (128, 128, 32, *[True] * 5), warps),
        (adamw._kernel, [FP32] * 5 + ["i32:16", "i32", "fp32"], (0.9, 0.999, adamw.BLOCK), warps),
        (cross_entropy._forward_kernel, [BF16, I64, FP32, FP32, "i32"], (-100, 16, 16, 256), warps),
        (cross_entropy._backward_kernel, [BF16, I64, FP32, FP32, BF16, "i32"], (-100, 16, 16, 256), warps),
        (mlp._forward_kernel, [BF16] * 4 + ["i32:16"], (128, 352, mlp.TOKENS, mlp.CHUNK), {"num_warps": mlp.WARPS}),
        (mlp._backward_kernel, [BF16] * 7 + ["i32:16"], (128, 352, mlp.TOKENS, mlp.CHUNK), {"num_warps": mlp.WARPS}),
    )
    for kernel, types, constants, options in kernels:
        assert compile_ahead(kernel, 90, types, constants, **options)["spilled_bytes"] == 0, kernel
