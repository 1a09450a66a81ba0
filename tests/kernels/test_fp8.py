"""`fp8`: quantised numbers against a float64 search among all of e4m3, products against float64 products of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_kernels import fp8

pytestmark = pytest.mark.usefixtures("e4m3_in_the_interpreter")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that has e4m3"
)
BYTES = torch.arange(256, dtype=torch.uint8)
E4M3 = [
    (-1) ** (code >> 7) * (math.ldexp(8 + code % 8, (code >> 3) % 16 - 10) if code & 0x78 else math.ldexp(code % 8, -9))
    for code in range(256)
    if code % 128 != 127  # NaN
]
"""All numbers of the format, as arXiv 2209.05433 defines it: 4 bits of exponent with bias 7, 3 of mantissa, no inf."""


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Each number's nearest in e4m3, of two equally near ones the even, searched for among all of them."""
    grid = np.array(sorted({abs(value) for value in E4M3}))
    magnitude = x.abs().double().numpy()
    above = np.searchsorted(grid, magnitude).clip(1, len(grid) - 1)
    below = above - 1
    down, up = magnitude - grid[below], grid[above] - magnitude
    chosen = np.where(
        (up < down) | ((up == down) & (above % 2 == 0)), above, below
    )  # the place of a number is its code
    return torch.from_numpy(grid[chosen]) * x.double().sign()


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and scales of a matrix's rows, in float64."""
    largest = x.cpu().double().abs().amax(1)
    scales = [2.0 ** max(-126, math.ceil(math.log2(value / 448))) if value else 2.0**-126 for value in largest.tolist()]
    scale = torch.tensor(scales, dtype=torch.float64)
    return nearest(x.cpu().double() / scale[:, None]), scale


def assert_exact(found: fp8.Rows, x: torch.Tensor) -> None:
    values, scales = exact(x)
    assert torch.equal(found.scales.cpu().double(), scales)
    assert torch.equal(found.values.cpu().double(), values)


def draw(rows, width, dtype, device, seed=0):
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.exp(2 * torch.randn(rows, 1, generator=generator))
    return x.to(device, dtype)


def test_pytorch_has_the_format():
    numbers = BYTES.view(fp8.E4M3).double()
    assert sorted(numbers[numbers.isfinite()].tolist()) == sorted(E4M3)
    assert max(E4M3) == fp8.LARGEST


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (5, 100), (9, 2048), (2, 3072), (2, 33_000)])
def test_quantised(rows, width, dtype, device):
    x = draw(rows, width, dtype, device)
    assert_exact(fp8.quantise(x), x)
    assert_exact(fp8.quantise_reference(x), x)


def test_every_code_every_tie_and_what_lies_beside_it(device):
    """With 448 in the row its scale is 1: each number stays, each tie goes to the even one, its neighbours do not."""
    grid = torch.tensor(sorted(E4M3), dtype=torch.float64)
    ties = (grid[1:] + grid[:-1]) / 2
    beside = [torch.nextafter(ties.float(), torch.tensor(way)) for way in (-math.inf, math.inf)]
    x = torch.cat([grid.float(), ties.float(), *beside])[None].to(device)
    found = fp8.quantise(x)
    assert found.scales.item() == 1
    assert_exact(found, x)
    assert torch.equal(found.values[0, : len(grid)].cpu().double(), grid)


@pytest.mark.parametrize("largest", [448.0, math.nextafter(448, 449), 449.0, 1e-45, 1e-38, 2.0**-126 * 448, 3.4e38])
def test_scale_at_its_borders(largest, device):
    x = torch.tensor([[largest, -largest / 3, 0.0]], device=device)
    found = fp8.quantise(x)
    assert_exact(found, x)
    assert found.values.float().abs().max() <= 448


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=5, max_size=5),
        min_size=1,
        max_size=5,
    )
)
def test_any_numbers(device, numbers):
    x = torch.tensor(numbers, dtype=torch.float32, device=device)
    found = fp8.quantise(x)
    assert_exact(found, x)
    error = (fp8.dequantise(found).double() - x.double()).abs()
    assert bool((error <= torch.maximum(x.double().abs() * 2**-4, found.scales.double()[:, None] * 2**-10)).all())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_infinity_or_nan_makes_its_row_nan_and_no_other(bad, device):
    x = draw(16, 32, FP32, device)
    wanted = fp8.quantise(x)
    x[3, 5] = bad
    found = fp8.quantise(x)
    others = torch.arange(16) != 3
    assert found.scales[3].isnan()
    assert torch.equal(found.scales[others], wanted.scales[others])
    assert torch.equal(found.values[others].float(), wanted.values[others].float())
    turned = fp8.transpose(found)
    assert bool(turned.scales.isnan().all())  # one scale for all, and NaN with it


def test_rows_of_zeros(device):
    x = torch.zeros(16, 32, device=device)
    x[1] = 3.0
    found = fp8.quantise(x)
    assert_exact(found, x)
    assert torch.equal(fp8.dequantise(fp8.transpose(found)), fp8.dequantise(found).t())


def test_zero_rows(device):
    found = fp8.quantise(torch.zeros(0, 32, device=device))
    assert found.values.shape == (0, 32)
    assert found.scales.shape == (0,)
    assert fp8.matmul(found, fp8.quantise(draw(16, 32, FP32, device))).shape == (0, 16)
    with pytest.raises(ValueError, match="no row"):
        fp8.transpose(found)


LAYOUTS = {
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "elements apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "columns": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_leading_dimensions(layout, device):
    x = draw(12, 24, BF16, device)
    assert_exact(fp8.quantise(LAYOUTS[layout](x.view(3, 4, 24))), x)


@pytest.mark.parametrize(("rows", "width"), [(16, 16), (1, 5), (37, 100), (200, 130), (130, 272)])
def test_transposed(rows, width, device):
    """The same numbers where these are no smaller than 2^-6 of the one scale; else rounded to a multiple of 2^-9."""
    matrix = fp8.quantise(draw(rows, width, FP32, device))
    for found in (fp8.transpose(matrix), fp8.transpose_reference(matrix)):
        assert found.values.shape == (width, -(-rows // 16) * 16)
        assert bool((found.scales == matrix.scales.max()).all())
        assert bool((found.values[:, rows:].float() == 0).all())
        wanted = fp8.dequantise(matrix).cpu().double() / matrix.scales.max().item()
        assert torch.equal(found.values[:, :rows].cpu().double(), nearest(wanted).t())
        normal = wanted.abs() >= 2**-6
        assert torch.equal(nearest(wanted)[normal], wanted[normal])


def test_error_of_a_product(device):
    """What rounding two random matrices to three bits of mantissa makes of their product.

    Within an interval from 2^e to 2^(e+1), rounding to multiples of 2^(e-3) has a variance of 4^e · 2^-6/12, and the
    numbers a mean square of about 4^e · 7/3: 2.4 % of a number, root mean square. Errors are independent, so that the
    product has √2 times that, 3.4 %, at any length of the sum; normal numbers, which crowd at the lower ends, 3.7 %.
    """
    a, b = draw(64, 512, FP32, device), draw(48, 512, FP32, device, seed=1)
    wanted = a.double() @ b.double().t()
    found = fp8.matmul(fp8.quantise(a), fp8.quantise(b))
    error = ((found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).median().item()
    assert 0.033 < error < 0.041


def test_product_on_a_cpu():
    a, b = fp8.quantise_reference(draw(5, 32, FP32, "cpu")), fp8.quantise_reference(draw(16, 32, FP32, "cpu", seed=1))
    wanted = fp8.dequantise(a).double() @ fp8.dequantise(b).double().t()
    torch.testing.assert_close(fp8.matmul(a, b, FP32).double(), wanted, rtol=1e-5, atol=1e-4)  # sums in fp32


def rows(count, width, device="cpu"):
    return fp8.Rows(torch.zeros(count, width, dtype=fp8.E4M3, device=device), torch.ones(count, device=device))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "quantise: x is int64", lambda: fp8.quantise(torch.zeros(2, 2, dtype=torch.int64))),
        (TypeError, "x is float64; accepted are bfloat16", lambda: fp8.quantise(torch.zeros(2, 2).double())),
        (ValueError, "K at least 1", lambda: fp8.quantise(torch.zeros(2, 0))),
        (ValueError, "K at least 1", lambda: fp8.quantise(torch.tensor(1.0))),
        (ValueError, r"\(4, 16\).*\(8, 16\).*multiples of 16", lambda: fp8.matmul(rows(4, 16), rows(8, 16))),
        (ValueError, r"\(4, 24\).*multiples of 16", lambda: fp8.matmul(rows(4, 24), rows(16, 24))),
        (ValueError, r"\(4, 32\).*\(16, 16\)", lambda: fp8.matmul(rows(4, 32), rows(16, 16))),
        (TypeError, "a is float32", lambda: fp8.matmul(fp8.Rows(torch.zeros(4, 16), torch.ones(4)), rows(16, 16))),
        (ValueError, r"contiguous", lambda: fp8.transpose(fp8.Rows(rows(4, 16).values.t(), torch.ones(16)))),
        (ValueError, r"and \(R,\)", lambda: fp8.transpose(fp8.Rows(rows(4, 16).values, torch.ones(3)))),
    ],
)
def test_bad_arguments(error, words, call):
    with pytest.raises(error, match=words):
        call()


@needs_gpu
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("m", [1, 48, 1000])
def test_cublas_multiplies_what_stands_there(m, whole, fast, out_dtype, device):
    """Against float64 products of the same 8-bit numbers. Hopper's 8-bit units keep about 14 bits of a sum: where
    `fast` leaves all 2048 terms to them, 64 additions of 2^-14 of it each remain below 1 %."""
    a, b = fp8.quantise(draw(m, 2048, BF16, device)), fp8.quantise(draw(160, 2048, BF16, device, seed=1))
    if whole:
        a, b = (fp8.Rows(each.values, each.scales.amax().expand(len(each.scales)).contiguous()) for each in (a, b))
    found = fp8.matmul(a, b, out_dtype, fast=fast, whole=whole)
    wanted = fp8.dequantise(a).double() @ fp8.dequantise(b).double().t()
    assert found.dtype == out_dtype
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < (1e-2 if fast else 2e-3 + (2**-8 if out_dtype == BF16 else 0))


@needs_gpu
@pytest.mark.parametrize(("terms", "fast", "bound"), [(2048, True, 0.05), (16_384, True, 0.3), (16_384, False, 5e-3)])
def test_long_sums_of_positive_numbers(terms, fast, bound, device):
    """The worst case for units that cut off each product at 2^-13 of the sum so far: terms that all add up.

    An emulation of such units loses 3.4 % of 2,048 terms, 22 % of 16,384; an H100 lost 23 % of these. Without `fast`
    partial sums go to fp32 every few additions, and what remains is the rounding of the result to bfloat16, 2^-8.
    """
    a, b = (fp8.quantise(draw(64, terms, BF16, device, seed).abs()) for seed in (0, 1))
    found = fp8.matmul(a, b, fast=fast)
    wanted = fp8.dequantise(a).double() @ fp8.dequantise(b).double().t()
    lost = 1 - found.double() / wanted
    assert lost.abs().max() < bound


@needs_gpu
def test_the_kernels_give_the_bits_of_pytorch(device):
    x = draw(4096, 8192, BF16, device)
    found, wanted = fp8.quantise(x), fp8.quantise_reference(x)
    assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))
    assert torch.equal(found.scales, wanted.scales)
    turned, wanted = fp8.transpose(found), fp8.transpose_reference(found)
    assert torch.equal(turned.values.view(torch.uint8), wanted.values.view(torch.uint8))
    assert torch.equal(turned.scales, wanted.scales)


@needs_gpu
def test_no_host_synchronisation_and_cuda_graph(device, assert_capturable):
    a, b = draw(64, 128, BF16, device), draw(32, 128, BF16, device, seed=1)

    def step():
        eight, other = fp8.quantise(a), fp8.quantise(b)
        product = fp8.matmul(eight, other)
        return product, fp8.matmul(fp8.transpose(eight), fp8.transpose(fp8.quantise(a)), whole=True)

    assert_capturable(step)
