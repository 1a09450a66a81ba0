"""The kernels of `linear_decode`, compiled ahead of time: registers, spills and 16-byte accesses."""

import importlib
import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

op = importlib.import_module("composer_kernels.linear_decode")
rows_op = importlib.import_module("composer_kernels._linear_decode_rows")
BF16 = torch.bfloat16
CASES = {
    "1b, norm and qkv": (1, 3072, 2048, True, False, False),
    "1b, norm, gate and up": (1, 8192, 2048, True, False, True),
    "1b, down and residual": (1, 2048, 8192, False, True, False),
    "1b, norm and words": (1, 128256, 2048, True, False, False),
    "1b of 8 rows, norm and qkv": (8, 3072, 2048, True, False, False),
    "1b of 8 rows, norm, gate and up": (8, 8192, 2048, True, False, True),
    "1b of 8 rows, down and residual": (8, 2048, 8192, False, True, False),
    "1b of 16 rows, norm and words": (16, 128256, 2048, True, False, False),
    "1b of 32 rows, gate and up": (32, 8192, 2048, False, False, True),
    "1b of 64 rows, down and residual": (64, 2048, 8192, False, True, False),
}
"""Rows, outputs, inputs, and whether there are a norm, a residual and a gate."""


def compiled_arguments(rows, outputs, inputs, norm, add, gated, overlap="none"):
    """The kernel, the types of its parameters before the constants, these, and the launch's options."""
    if rows == 1:
        launch = op.default_launch(outputs, inputs, gated, overlap)
        constants = (outputs, inputs, launch.outputs, launch.block, launch.overlap, norm, add, gated)
        return op._kernel, [*[BF16] * 5, "i32:16", "fp32"], constants, dict(launch.options)
    launch = rows_op.default_rows_launch(rows, outputs, gated, BF16, overlap)
    blocks = (launch.outputs, launch.block, launch.warps, launch.stages, launch.overlap)
    constants = (outputs, inputs, rows, rows_op.padded(rows), *blocks, norm, add, gated)
    return rows_op._kernel, [*[BF16] * 5, *["i32:16"] * 3, "fp32"], constants, dict(launch.options)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_compiled(name, architecture, compile_ahead, assert_as_recorded):
    kernel, types, constants, options = compiled_arguments(*CASES[name])
    resources = compile_ahead(kernel, architecture, types, constants, **options)
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"{name}, sm_{architecture}", resources)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_several_rows_go_to_tensor_cores_and_memory_runs_ahead(architecture):
    """Each round copies blocks of 32 rows of gate and of up, 256 wide, and 8 rows of x; two are on their way."""
    ptx = ptx_of(architecture, 8, 8192, 2048, True, False, True)
    copies = 2 * 32 * 256 // (8 * 128) + 8 * 256 // (8 * 128)  # of 16 bytes by each of 128 threads
    assert len(re.findall(r"cp\.async\.cg\.shared\.global", ptx)) == 3 * copies  # two before the loop, one in it
    assert "mma.sync.aligned.m16n8k16" in ptx


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("overlap", ["tail", "full"])
def test_several_rows_fetch_the_matrix_before_they_wait_and_read_after(overlap, architecture):
    before, after = ptx_of(architecture, 8, 2048, 8192, False, True, False, overlap).split("griddepcontrol.wait")
    # 16 rows of 2048 elements, 64 in a line, one line an access of each of 128 threads
    assert before.count("prefetch.global.L2") == 16 * 2048 // 64 // 128
    assert not re.search(r"(ld|st)\.global|cp\.async", before)
    assert ("griddepcontrol.launch_dependents" in before) == (overlap == "full")
    assert ("griddepcontrol.launch_dependents" in after) == (overlap == "tail")
    alone = ptx_of(architecture, 8, 2048, 8192, False, True, False)
    assert "griddepcontrol" not in alone
    assert "prefetch" not in alone


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("overlap", ["tail", "full"])
def test_an_overlapping_kernel_reads_the_matrix_before_it_waits_and_all_else_after(overlap, architecture):
    """The first block of W is 4 rows of 1024: 4 accesses of 16 bytes for each of 128 threads."""
    before, after = ptx_of(architecture, 1, 2048, 8192, False, True, False, overlap).split("griddepcontrol.wait")
    assert before.count("ld.global") == 4
    assert "st.global" not in before
    assert ("griddepcontrol.launch_dependents" in before) == (overlap == "full")
    assert ("griddepcontrol.launch_dependents" in after) == (overlap == "tail")
    assert "griddepcontrol" not in ptx_of(architecture, 1, 2048, 8192, False, True, False)


def ptx_of(architecture, *case):
    """The code for a case, and an overlap where one is given."""
    kernel, types, constants, options = compiled_arguments(*case)
    kinds = [
        *["*bf16" if kind is BF16 else kind.removesuffix(":16") for kind in types],
        *["constexpr"] * len(constants),
    ]
    values = {(len(types) + place,): value for place, value in enumerate(constants)}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(types) - 1)}
    source = ASTSource(kernel, dict(zip(kernel.arg_names, kinds, strict=True)), values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]
