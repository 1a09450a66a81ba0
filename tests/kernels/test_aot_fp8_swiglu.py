"""The kernels of `fp8_swiglu`, compiled ahead of time: registers, spills, 16-byte accesses."""

import pytest
import torch

from composer_kernels import fp8_swiglu as op

E4M3, BF16 = "*fp8e4nv", torch.bfloat16


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize(
    ("width", "limited", "plain"),
    [(8192, False, False), (8192, False, True), (11_008, True, True)],
)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_compiled(name, width, limited, plain, architecture, compile_ahead, assert_as_recorded):
    launch = op.default_launch(width, limited=limited)
    back = name == "backward"
    types = [
        *[BF16] * (1 + back),
        E4M3,
        torch.float32,
        BF16 if plain else None,
        *["i32:16"] * (1 + back),
        "i32",
        "fp32",
    ]
    constants = (width, launch.block, launch.rows, limited)
    kernel = getattr(op, f"_{name}_kernel")
    resources = compile_ahead(kernel, architecture, types, constants, num_warps=launch.warps)
    assert resources["spilled_bytes"] == 0
    assert resources["narrow_accesses"] == 1  # the scale
    assert_as_recorded(f"{name}, {width} wide, limited {limited}, plain {plain}, sm_{architecture}", resources)
