"""The kernel of `rope` and its kin, compiled ahead of time: registers, spills and accesses narrower than 16 bytes.

Heads are read and written 16 bytes at a time; narrow are the loads of tables and boundaries, and those of libdevice.
"""

import pytest
import torch

from composer_kernels import _rope

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA = (32, 8, 128, 64)
"""Query heads, key heads, elements of a head, pairs of them that turn."""
SPLIT = {"packed": (True, False), "with_v": True}
CASES = {
    "split": (LLAMA, SPLIT),
    "split, interleaved, value a view": (LLAMA, {"packed": (True, False), "interleaved": True}),
    "split, angles": (LLAMA, SPLIT | {"angles": True}),
    "join": (LLAMA, {"packed": (False, True), "with_v": True}),
    "packed in place": (LLAMA, {"packed": (True, True), "in_place": True}),
    "query and key": (LLAMA, {}),
    "split, heads of 64": ((32, 8, 64, 32), SPLIT),
    "query and key, heads of 64": ((32, 8, 64, 32), {}),
    "one tensor": ((32, 0, 128, 64), {}),
    "one tensor, packed sequences in 2 parts": ((32, 0, 128, 64), {"cp": 2, "search": 5}),
    "one tensor, half of each head": ((32, 0, 128, 32), {}),
    "split, 28 heads in 4 groups": ((28, 4, 128, 64), SPLIT),
    "split, heads of 80 in fp32": ((32, 8, 80, 40), SPLIT | {"dtype": FP32}),
}


def compiled(
    compile_ahead, architecture, shape, packed=(False, False), in_place=False, with_v=False, interleaved=False,
    angles=False, cp=1, search=0, dtype=BF16,
):  # fmt: skip
    q_heads, kv_heads, head_dim, half = shape
    launch = _rope.default_launch(q_heads, kv_heads, with_v, half)
    parts = [[dtype, *[None if one or not kv_heads else dtype] * 2] for one in packed]
    pointers = [*parts[0], *parts[1], FP32, None if angles else FP32, "*i32" if search else None]
    table = (2 * half if angles else half, 1)
    constants = (
        *(q_heads, kv_heads, head_dim, half, *packed, in_place, with_v, interleaved, angles, *table, cp, search, True),
        *(launch.tokens, launch.heads),
    )
    types = [*pointers, *["i32:16"] * 9, *["i32"] * 7, "fp32"]
    return compile_ahead(_rope._kernel, architecture, types, constants, num_warps=launch.warps)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_compiled(case, architecture, compile_ahead, assert_as_recorded):
    shape, settings = CASES[case]
    resources = compiled(compile_ahead, architecture, shape, **settings)
    assert resources["spilled_bytes"] == 0
    assert_as_recorded(f"{case}, sm_{architecture}", resources)
