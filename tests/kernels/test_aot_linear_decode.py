"""The kernel of `linear_decode`, compiled ahead of time: registers, spills and 16-byte accesses."""

import importlib

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
    blocks = (launch.outputs, launch.block, launch.overlap)
    constants = (outputs, inputs, rows, rows, *blocks, norm, add, gated)
    resources = compile_ahead(op._kernel, architecture, types, constants, num_warps=launch.warps)
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"{name}, sm_{architecture}", resources)


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("overlap", ["tail", "full"])
def test_an_overlapping_kernel_reads_the_matrix_before_it_waits_and_all_else_after(overlap, architecture):
    """The first block of W is 4 rows of 1024: 4 accesses of 16 bytes for each of 128 threads."""
    ptx = op_ptx(architecture, op.default_launch(1, 2048, 8192, False, overlap))
    before, after = ptx.split("griddepcontrol.wait")
    assert before.count("ld.global") == 4
    assert "st.global" not in before
    assert ("griddepcontrol.launch_dependents" in before) == (overlap == "full")
    assert ("griddepcontrol.launch_dependents" in after) == (overlap == "tail")
    assert "griddepcontrol" not in op_ptx(architecture, op.default_launch(1, 2048, 8192, False))


def op_ptx(architecture, launch):
    """The code for the product with 2048 rows of 8192, added to a residual."""
    constants = (2048, 8192, 1, 1, launch.outputs, launch.block, launch.overlap, False, True, False)
    names = op._kernel.arg_names
    kinds = [*["*bf16"] * 5, *["i32"] * 3, "fp32", *["constexpr"] * len(constants)]
    values = {(9 + place,): value for place, value in enumerate(constants)}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(8)}
    source = ASTSource(op._kernel, dict(zip(names, kinds, strict=True)), values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options)).asm["ptx"]
