"""`linear_decode` against its formula in float64, on a GPU or in Triton's interpreter."""

import importlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_kernels.linear_decode import MOST_ROWS, linear_decode, linear_decode_reference

op = importlib.import_module("composer_kernels.linear_decode")
rows_op = importlib.import_module("composer_kernels._linear_decode_rows")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def exact(x, weight, norm_weight=None, eps=1e-5, residual=None, gated=False):
    """The result in float64, written out."""
    x, weight = x.double(), weight.double()
    if norm_weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double()
    y = x @ weight.T
    if gated:
        gate, up = y.chunk(2, -1)
        y = gate / (1 + torch.exp(-gate)) * up
    return y if residual is None else y + residual.double()


def make(rows, outputs, inputs, dtype, device, *, norm, add, gated, seed=0):
    """x, weight, and the optional tensors; x and residual are parts of wider ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

    return (
        normal(rows, inputs + 16)[:, :inputs],
        normal(outputs * (2 if gated else 1), inputs, scale=inputs**-0.5),
        {
            "norm_weight": 1 + normal(inputs, scale=0.1) if norm else None,
            "residual": normal(rows, outputs + 16)[:, :outputs] if add else None,
            "gated": gated,
        },
    )


@pytest.fixture(params=["kernel", "formula"])
def _both_ways(request, monkeypatch):
    """The Triton kernel, and the formula that CPUs get."""
    if request.param == "formula":
        monkeypatch.setattr(op, "runs_kernel", lambda x: False)


@pytest.mark.usefixtures("_both_ways", "poisoned")
@pytest.mark.parametrize(("norm", "add", "gated"), [(True, False, False), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(1, 24, 64), (1, 37, 1300), (2, 24, 64), (3, 37, 301), (8, 16, 256), (17, 40, 300), (33, 24, 64), (64, 37, 136)],
)
def test_as_good_as_torch(rows, outputs, inputs, dtype, norm, add, gated, device, assert_as_good):
    x, weight, options = make(rows, outputs, inputs, dtype, device, norm=norm, add=add, gated=gated)
    ours, theirs = linear_decode(x, weight, **options), linear_decode_reference(x, weight, **options)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert_as_good(ours, theirs, exact(x, weight, **options))


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    rows=st.integers(1, MOST_ROWS),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    norm=st.booleans(),
    add=st.booleans(),
    gated=st.booleans(),
)
def test_all_sizes(device, assert_as_good, rows, outputs, inputs, dtype, norm, add, gated):
    x, weight, options = make(rows, outputs, inputs, dtype, device, norm=norm, add=add, gated=gated)
    theirs = linear_decode_reference(x, weight, **options)
    assert_as_good(linear_decode(x, weight, **options), theirs, exact(x, weight, **options))


@pytest.mark.parametrize(
    ("rows", "launch"),
    [
        *((1, launch) for launch in (op.Launch(2, 128), op.Launch(8, 64, 8), op.Launch(4, 512, 2))),
        *((5, launch) for launch in (rows_op.RowsLaunch(16, 32, 2), rows_op.RowsLaunch(32, 16, 3, 8))),
        (20, rows_op.RowsLaunch(64, 16, 4, 2)),
    ],
)
def test_every_launch_computes_the_same(rows, launch, device):
    x, weight, options = make(rows, 21, 300, torch.float32, device, norm=True, add=False, gated=True)
    run = op.launch_row if rows == 1 else op.launch_rows
    found = run(x, weight, options["norm_weight"], 1e-5, None, True, None, launch)
    # fp32 sums of 300 products in another order
    torch.testing.assert_close(found.double(), exact(x, weight, **options), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [5, 20])
def test_a_row_does_not_depend_on_what_the_others_hold(rows, dtype, device):
    """Bit for bit, whatever the neighbours are, and whichever place the row has."""
    x, weight, options = make(rows, 37, 300, dtype, device, norm=True, add=True, gated=True)
    wanted = linear_decode(x, weight, **options)
    other = torch.full_like(x, math.nan)
    other[1], other[rows - 1] = 1e4, x[2]
    options["residual"] = options["residual"].clone()
    options["residual"][rows - 1] = options["residual"][2]
    found = linear_decode(other, weight, **options)
    assert torch.equal(found[rows - 1], wanted[2])
    assert found[0].isnan().all()


def test_a_weighted_row_may_exceed_float16(device):
    """x · norm_weight is 4.8e5, and the norm of x at most 45 times 8."""
    x, weight, options = make(3, 16, 64, torch.float16, device, norm=True, add=False, gated=False)
    x, norm = (x.sign() * 6e4).contiguous(), torch.full_like(options["norm_weight"], 8.0)
    found = linear_decode(x, weight, norm_weight=norm)
    # one rounding of the norm, one of the result, in float16
    torch.testing.assert_close(found.double(), exact(x, weight, norm), rtol=2e-3, atol=2e-2)


@pytest.mark.usefixtures("_both_ways")
def test_the_result_goes_where_it_is_told_even_onto_the_residual(device):
    x, weight, options = make(2, 24, 64, torch.float32, device, norm=False, add=True, gated=False)
    residual = options["residual"].contiguous()
    wanted = exact(x, weight, residual=residual)
    assert linear_decode(x, weight, residual=residual, out=residual) is residual
    torch.testing.assert_close(residual.double(), wanted, atol=2e-6, rtol=2e-6)  # fp32 sums of 64 products


@pytest.mark.usefixtures("_both_ways")
def test_a_result_over_what_is_still_read_is_refused(device):
    x, weight, options = make(2, 64, 64, torch.float32, device, norm=True, add=False, gated=False)
    memory = torch.zeros(192, device=device)
    shifted, residual = memory[64:].view(2, 64), memory[:128].view(2, 64)
    x = x.contiguous()
    for out, added in ((x, None), (weight[:2], None), (shifted, residual)):
        with pytest.raises(ValueError, match="linear_decode: out lies over what other programs still read"):
            linear_decode(x, weight, norm_weight=options["norm_weight"], residual=added, out=out)


def test_float64_is_the_formula(device):
    x, weight, options = make(2, 5, 7, torch.float64, device, norm=True, add=True, gated=False)
    torch.testing.assert_close(linear_decode(x, weight, **options), exact(x, weight, **options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("overlap", ["none", "tail", "full"])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_a_graph_can_hold_it(rows, overlap, assert_capturable):
    x, weight, options = make(rows, 96, 512, torch.bfloat16, "cuda", norm=True, add=True, gated=False)
    assert_capturable(lambda: [linear_decode(x, weight, overlap=overlap, **options)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("overlap", ["tail", "full"])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_overlapping_kernels_see_each_others_results_and_keep_off_what_is_still_read(rows, captured, overlap):
    """A chain, each link reading what the one before wrote, in two buffers that take turns: bit-equal without overlap.

    Links are of unlike sizes, so that a small one could run ahead of a large one; other kernels stand between some.
    """
    widths = [256, 8192, 512, 2048, 4096, 256, 256]
    links = [make(rows, n, k, torch.float32, "cuda", norm=True, add=False, gated=False) for k, n in pairwise(widths)]
    first = links[0][0].contiguous()
    buffers = [torch.empty(rows * max(widths), device="cuda") for _ in range(2)]

    def chain(overlap):
        x = first
        for turn in range(20 * len(links)):
            _, weight, options = links[turn % len(links)]
            out = buffers[turn % 2][: rows * len(weight)].view(rows, len(weight))
            x = linear_decode(x, weight, norm_weight=options["norm_weight"], out=out, overlap=overlap)
            if turn % 5 == 0:
                x.mul_(0.5)
        return x

    wanted = chain("none").clone()
    chain(overlap)  # compiles
    torch.cuda.synchronize()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = chain(overlap)
    for _ in range(10):
        for buffer in buffers:
            buffer.fill_(math.nan)
        if captured:
            graph.replay()
        found = held if captured else chain(overlap)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(0, 4)}, ValueError, r"x must be \(B, K\) with B from 1 to 64; given float32 \(0, 4\)"),
        ({"x": torch.ones(65, 4)}, ValueError, r"B from 1 to 64; given float32 \(65, 4\)"),
        ({"x": torch.ones(4)}, ValueError, "x must be"),
        ({"x": torch.ones(1, 4, dtype=torch.int32)}, TypeError, "x is int32"),
        ({"weight": torch.ones(6, 5)}, ValueError, r"weight must be \(6, 4\).*given float32 \(6, 5\)"),
        ({"weight": torch.ones(6, 4).bfloat16()}, ValueError, "weight must be"),
        ({"weight": torch.ones(4, 6).t()}, ValueError, "elements of a row side by side"),
        ({"weight": torch.ones(5, 4), "gated": True}, ValueError, "an even number of rows"),
        ({"norm_weight": torch.ones(5)}, ValueError, r"norm_weight must be \(4,\)"),
        ({"residual": torch.ones(1, 5)}, ValueError, r"residual must be \(1, 6\)"),
        ({"out": torch.ones(1, 5)}, ValueError, r"out must be \(1, 6\)"),
        ({"x": torch.ones(2, 4), "out": torch.ones(2, 12)[:, :6]}, ValueError, "out must be contiguous"),
        ({"weight": torch.ones(6, 4, requires_grad=True)}, RuntimeError, "has no gradient"),
    ],
)
def test_wrong_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        linear_decode(**({"x": torch.ones(1, 4), "weight": torch.ones(6, 4)} | changes))
