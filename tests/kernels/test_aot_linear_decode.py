"""The kernel of `linear_decode`, compiled ahead of time: registers, spills and 16-byte accesses."""

import importlib

import pytest
import torch

op = importlib.import_module("composer_kernels.linear_decode")
BF16 = torch.bfloat16
CASES = {
    "1b, norm and qkv": (1, 3072, 2048, True, False, False),
    "1b, norm, gate and up": (1, 8192, 2048, True, False, True),
    "1b, down and residual": (1, 2048, 8192, False, True, False),
    "1b, norm and words": (1, 128256, 2048, True, False, False),
    "3b of 8 rows, norm, gate and up": (8, 8192, 3072, True, False, True),
}
"""Rows, outputs, inputs, and whether there are a norm, a residual and a gate."""


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_compiled(name, architecture, compile_ahead, assert_as_recorded):
    rows, outputs, inputs, norm, add, gated = CASES[name]
    launch = op.default_launch(rows, outputs, inputs, gated)
    types = [*[BF16] * 5, *["i32:16"] * 3, "fp32"]
    blocks = (launch.outputs, launch.block, launch.stages)
    constants = (outputs, inputs, rows, rows, *blocks, norm, add, gated)
    resources = compile_ahead(op._kernel, architecture, types, constants, num_warps=launch.warps)
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"{name}, sm_{architecture}", resources)
