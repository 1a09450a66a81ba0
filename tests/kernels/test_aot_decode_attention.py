"""The kernels of `decode_attention`, compiled ahead of time: registers, spills and 16-byte accesses."""

import pytest
import torch

from composer_kernels import _decode as op

BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "1b, append and rotate": (8, 4, 64, 0, 0, 1, 64),
    "8b, append and rotate": (8, 4, 128, 0, 0, 1, 128),
    "8b, paged by 16": (8, 4, 128, 16, 0, 1, 128),
    "heads of 256, window, no append": (1, 8, 256, 0, 4096, 0, 0),
}
"""Key-value heads, query heads of each, width, page, window, whether a token is appended, elements rotated."""


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_split(name, architecture, compile_ahead, assert_as_recorded):
    kv_heads, group, dim, page, window, append, rotary = CASES[name]
    launch = op.default_launch(kv_heads, 32768, dim, 2, 132)
    new = BF16 if append else None
    types = [BF16, BF16, BF16, new, new, "*i32", "*i32", FP32, FP32, FP32, FP32, *["i32:16"] * 12, *["i32"] * 3, "fp32"]
    constants = (kv_heads, group, dim, dim, 16, launch.block, launch.splits, page, window, append, rotary, False)
    options = launch.paged_options if page else launch.options
    resources = compile_ahead(op._split_kernel, architecture, types, constants, **dict(options))
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"split, {name}, sm_{architecture}", resources)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_join(architecture, compile_ahead, assert_as_recorded):
    resources = compile_ahead(op._join_kernel, architecture, [FP32, FP32, BF16], (32, 128, 128, 33, 32), num_warps=4)
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"join, sm_{architecture}", resources)
