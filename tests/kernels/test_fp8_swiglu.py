"""SwiGLU and its gradient in 8 bits, against float64 formulas rounded to 8 bits."""

import pytest
import torch

from composer_kernels import fp8_swiglu as op

pytestmark = pytest.mark.usefixtures("e4m3_in_the_interpreter")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def draw(rows, width, dtype, device):
    """dy and [gate | up], rows of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(torch.randn(rows, 1, generator=generator))
    pair = (torch.randn(rows, count * width, generator=generator) * sizes for count in (1, 2))
    return tuple(x.to(device, dtype) for x in pair)


def exact(dy, h, limit):
    """y and [dgate | dup] in float64."""
    gate, up = h.double().chunk(2, -1)
    gate_free, up_free = (gate <= limit, up.abs() <= limit) if limit else (1, 1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    s, dy = torch.sigmoid(gate), dy.double()
    dgate, dup = dy * up * s * (1 + gate * (1 - s)) * gate_free, dy * gate * s * up_free
    return gate * s * up, torch.cat((dgate, dup), -1)


def assert_quantised(found, wanted):
    """Rounded once, to 2^-4 of an element or 2^-10 of the scale; the scale fits, and half of it would not."""
    largest = wanted.abs().amax(1)
    scales = found.scales.double()
    assert bool((largest <= scales * 448 * (1 + 1e-6)).all())
    assert bool((largest >= scales * 224 * (1 - 1e-6)).all())
    error = (found.values.double() * scales[:, None] - wanted).abs()
    # fp32's own error comes on top
    bound = torch.maximum(wanted.abs() * 2**-4, scales[:, None] * 2**-10) * (1 + 1e-4) + largest[:, None] * 1e-6
    assert bool((error <= bound).all()), (error - bound).max()


@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (9, 100), (5, 2048), (2, 3000), (2, 17_000)])
def test_quantised(rows, width, dtype, limit, device):
    dy, h = draw(rows, width, dtype, device)
    y, gradient = exact(dy, h, limit)
    for forward, backward in (
        (op.quantised_swiglu, op.quantised_swiglu_gradient),
        (op.quantised_swiglu_reference, op.quantised_swiglu_gradient_reference),
    ):
        for found, wanted in ((forward(h, limit=limit), y), (backward(dy, h, limit=limit), gradient)):
            assert found.plain is None
            assert found.rows.values.shape == wanted.shape
            assert_quantised(found.rows, wanted)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("width", [24, 17_000])
def test_the_same_in_the_type_of_the_input(width, dtype, device):
    dy, h = (x.view(3, 2, -1) for x in draw(6, width, dtype, device))
    for found, wanted in (
        ((op.quantised_swiglu(h, plain=True), op.quantised_swiglu_reference(h, plain=True)), exact(dy, h, None)[0]),
        (
            (
                op.quantised_swiglu_gradient(dy, h, plain=True),
                op.quantised_swiglu_gradient_reference(dy, h, plain=True),
            ),
            exact(dy, h, None)[1],
        ),
    ):
        for each in found:
            assert each.plain.dtype == dtype
            assert_quantised(each.rows, wanted.view(6, -1))
            bound = (2**-8 if dtype == BF16 else 1e-5) * wanted.abs() + 1e-6 * wanted.abs().max()
            assert bool(((each.plain.double() - wanted).abs() <= bound).all())


def test_leading_dimensions_strides_and_no_rows(device):
    dy, h = draw(12, 32, BF16, device)
    wanted, gradient = op.quantised_swiglu(h).rows, op.quantised_swiglu_gradient(dy, h).rows
    apart, dy_apart = (torch.cat((x, x), -1)[..., : x.shape[-1]].view(3, 4, -1) for x in (h, dy))
    for found, other in (
        (op.quantised_swiglu(apart).rows, wanted),
        (op.quantised_swiglu_gradient(dy_apart, apart).rows, gradient),
    ):
        assert torch.equal(found.values.view(torch.uint8), other.values.view(torch.uint8))
        assert torch.equal(found.scales, other.scales)
    assert op.quantised_swiglu(h[:0]).rows.values.shape == (0, 32)
    assert op.quantised_swiglu_gradient(dy[:0], h[:0]).rows.scales.shape == (0,)


def test_nan_marks_its_row_alone(device):
    dy, h = draw(4, 32, FP32, device)
    h[2, 40] = torch.nan
    for found in (op.quantised_swiglu(h, limit=1.0), op.quantised_swiglu_gradient(dy, h)):
        assert found.rows.scales.isnan().tolist() == [False, False, True, False]


H, DY = torch.ones(3, 8), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "h is float64", lambda: op.quantised_swiglu(H.double())),
        (TypeError, "dy is int64", lambda: op.quantised_swiglu_gradient(DY.long(), H)),
        (ValueError, "h must be", lambda: op.quantised_swiglu(torch.ones(3, 7))),
        (ValueError, "h must be", lambda: op.quantised_swiglu(torch.ones(3, 0))),
        (ValueError, "half as wide", lambda: op.quantised_swiglu_gradient(H, H)),
        (ValueError, "limit must be positive", lambda: op.quantised_swiglu(H, limit=0.0)),
    ],
)
def test_bad_arguments(error, words, call):
    with pytest.raises(error, match=words):
        call()
