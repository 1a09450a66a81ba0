"""The kernels of `swiglu`, compiled ahead of time: registers, spills and widths of accesses."""

import importlib

import pytest
import torch

op = importlib.import_module("composer_kernels.swiglu")  # the package's attribute of that name is the function
BF16 = torch.bfloat16
CASES = [(14336, True, False), (11008, True, True), (8192, False, False)]
"""Width, whether gate and up are packed, whether they are limited."""


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("width", "packed", "limited"), CASES)
@pytest.mark.parametrize(
    ("name", "pointers", "strides"), [("forward", 3, 2), ("backward", 5, 3)], ids=["forward", "backward"]
)
def test_compiled(name, pointers, strides, width, packed, limited, architecture, compile_ahead, assert_as_recorded):
    launch = getattr(op, f"{name}_launch")(width)
    types = [*[BF16] * pointers, *["i32:16"] * strides, "i32", "fp32"]
    constants = (width, launch.block, launch.rows, width if packed else 0, limited)
    kernel = getattr(op, f"_{name}_kernel")
    resources = compile_ahead(kernel, architecture, types, constants, num_warps=launch.warps)
    assert resources["spilled_bytes"] == 0
    assert name == "forward" or resources["narrow_accesses"] == 0  # forward ones have 8 bytes
    assert_as_recorded(f"{name}, {width} wide, packed {packed}, limited {limited}, sm_{architecture}", resources)
