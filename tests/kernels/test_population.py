"""The kernels of `composer_search.population` against PyTorch's operations in float64."""

import pytest
import torch
import triton

from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import Widths, rotation
from composer_search.mad import IGNORE
from composer_search.population import Row
from composer_search.population.kernels import linear
from composer_search.population.kernels.mlp import fits
from composer_search.population.operations import BETAS, Fused, Plain
from composer_search.population.population import Population
from composer_search.population.replay import cuda_graph
from composer_search.trainer import TaskData, TrainSettings

INTERPRETING = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of numbers of about 1: 24 bits of mantissa and sums of a hundred terms; or 8 bits, rounded several times on the
way."""


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def gradients(outputs, inputs):
    weights = [normal(*out.shape, seed=7 + place) for place, out in enumerate(outputs)]
    total = sum((out.double() * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, inputs)


def compare(found, expected, dtype):
    for own, reference in zip(found, expected, strict=True):
        scale = max(1.0, float(reference.detach().abs().max()))
        torch.testing.assert_close(own.double() / scale, reference / scale, atol=TOLERANCES[dtype], rtol=0)


def attend(operations, length, heads, width, dtype, *, wanted=None, exact=False):
    """The mixture and the gradients of projection and bias, computed in `dtype` or from the same inputs in float64."""
    joint = normal(2, 2 * length, 3 * heads * width, dtype=dtype)
    bias = normal(2, 3 * heads * width, seed=1, dtype=torch.float32)
    inputs = [(each.double() if exact else each).requires_grad_() for each in (joint, bias)]
    mixed = operations.attend(*inputs, rotation(length, width, DEVICE), heads, wanted or length)
    return [mixed, *gradients([mixed], inputs)]


ATTENTIONS = [
    *((length, 2, 8) for length in (1, 15, 16, 17, 32, 33, 64, 65, 128)),
    *((length, 1, 8) for length in (127, 200, 272, 288, 300)),
    *((length, 3, 6) for length in (5, 64, 100)),
    *((length, 1, 16) for length in (33, 130)),
    *((length, 1, 32) for length in (20, 70)),
]
"""Length, heads and width. One tile and several, full and not; heads that fill the kernel's channels and not."""


@pytest.mark.parametrize(("length", "heads", "width"), ATTENTIONS)
def test_attention_is_as_exact_as_pytorchs(length, heads, width, poisoned, assert_as_good):
    shape = length, heads, width, torch.bfloat16
    exact = attend(Plain(), *shape, exact=True)
    for results in zip(attend(Fused("ieee"), *shape), attend(Plain(), *shape), exact, strict=True):
        assert_as_good(*results)


@pytest.mark.parametrize(
    ("length", "wanted", "heads", "width"),
    [(32, 1, 2, 8), (64, 16, 1, 8), (65, 1, 2, 8), (128, 64, 2, 8), (200, 17, 1, 8), (256, 16, 2, 8), (130, 70, 1, 16)],
)
def test_attention_of_the_last_positions_is_as_exact_as_pytorchs(
    length, wanted, heads, width, poisoned, assert_as_good
):
    shape = length, heads, width, torch.bfloat16
    exact = attend(Plain(), *shape, wanted=wanted, exact=True)
    assert exact[0].shape[1] == 2 * wanted
    fused, plain = (attend(operations, *shape, wanted=wanted) for operations in (Fused("ieee"), Plain()))
    for results in zip(fused, plain, exact, strict=True):
        assert_as_good(*results)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(("length", "heads", "width"), [(1, 2, 8), (32, 2, 8), (33, 2, 6), (65, 2, 8), (100, 1, 32)])
def test_attention_in_fp32(length, heads, width, precision, poisoned, assert_as_good):
    shape = length, heads, width, torch.float32
    exact = attend(Plain(), *shape, exact=True)
    for found, other, expected in zip(attend(Fused(precision), *shape), attend(Plain(), *shape), exact, strict=True):
        if precision == "ieee":
            assert_as_good(found, other, expected)
        else:  # 10 bits of mantissa, in each of up to three products one after the other
            assert (found.double() - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("length", [32, 200])
def test_attention_gives_the_same_bits_twice(length):
    one, two = (attend(Fused("ieee"), length, 2, 8, torch.bfloat16) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("length", [20, 100])
def test_attention_looks_at_no_later_position_and_at_no_other_sequence(length):
    joint, bias = normal(1, 2 * length, 48).bfloat16(), normal(1, 48, seed=1, dtype=torch.float32)
    turns, changed = rotation(length, 8, DEVICE), joint.clone()
    changed[:, length + 13 :] = 100
    before, after = (Fused("ieee").attend(each, bias, turns, 2, length) for each in (joint, changed))
    assert torch.equal(before[:, : length + 13], after[:, : length + 13])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    ("sizes", "after", "used"),
    [
        ((2, 3), (5,), (0, 1)),
        ((4,), (1, 4), (0, 1, 2)),
        ((), (3, 2), (1, 2)),
        ((2, 1), (5,), (0,)),
        ((3, 1), (2, 2, 1), (2,)),
        ((2, 3), (3, 2), (0, 1)),
    ],
)
def test_residual(sizes, after, used, moved, dtype):
    """Groups with a bias and without, rows of none, in a new order or not; and results that nobody uses."""
    rows, tokens, hidden = 5, 37, 24
    order = torch.tensor([3, 0, 4, 1, 2], device=DEVICE)
    moves = (order, order.argsort()) if moved else (None, None)
    x = normal(rows, tokens, hidden, dtype=torch.float32)
    outs = [normal(size, tokens, hidden, seed=1 + size, dtype=dtype) for size in sizes]
    biases = [normal(size, hidden, seed=11, dtype=torch.float32) if size == 2 else None for size in sizes]
    results = []
    for operations, wide in ((Fused("ieee"), None), (Plain(), torch.float64)):
        inputs = [each if wide is None else each.to(wide) for each in (x, *outs, *biases) if each is not None]
        inputs = [each.clone().requires_grad_() for each in inputs]
        own, left = inputs[1 : 1 + len(outs)], iter(inputs[1 + len(outs) :])
        given = [None if bias is None else next(left) for bias in biases]
        stream = operations.stream(inputs[0], wide or dtype)
        y, parts = operations.residual(stream, own, given, moves, after, wide or dtype)
        outputs = [y.tensor(), *parts]
        results.append((outputs, gradients([outputs[place] for place in used], inputs)))
    compare(results[0][0], results[1][0], dtype)
    compare(results[0][1], results[1][1], dtype)


@pytest.mark.parametrize(
    ("tokens", "hidden", "times", "gained"),
    [(1, 32, 3, True), (100, 16, 1, False), (1100, 16, 3, True), (130, 128, 3, True), (1100, 128, 1, False)],
)
def test_linear_is_as_exact_as_pytorchs(tokens, hidden, times, gained, poisoned, assert_as_good):
    """Tokens in one share and in two of different sizes, whose last rounds are not full."""
    h, weight = normal(2, tokens, hidden, dtype=torch.bfloat16), normal(2, times * hidden, hidden, seed=1).float()
    gain = normal(2, hidden, seed=2).float() if gained else None
    assert linear.fits(h, times * hidden)

    def run(operations, exact):
        given = [each for each in (h, weight, gain) if each is not None]
        inputs = [(each.double() if exact else each.clone()).requires_grad_() for each in given]
        y = operations.linear(*inputs, *([] if gained else [None]))
        return [y, *gradients([y], inputs)]

    for results in zip(run(Fused("ieee"), False), run(Plain(), False), run(Plain(), True), strict=True):
        assert_as_good(*results)


def test_linear_fits_narrow_layers_in_bf16_alone():
    sizes = [(128, 384), (128, 128), (128, 256), (96, 96), (256, 256), (64, 192)]
    fitting = [linear.fits(normal(1, 1, ins, dtype=torch.bfloat16), outs) for ins, outs in sizes]
    assert fitting == [True, True, False, False, False, True]
    assert not linear.fits(normal(1, 1, 128, dtype=torch.float32), 128)


def test_linear_adds_no_row_to_another_and_gives_the_same_bits_twice():
    h, weight = normal(3, 70, 16, dtype=torch.bfloat16), normal(3, 48, 16, seed=1, dtype=torch.bfloat16)
    dy = normal(3, 70, 48, seed=2, dtype=torch.bfloat16)
    whole = linear.launch_backward(dy, h, weight)
    spoiled = [each.index_fill(0, torch.tensor([1], device=DEVICE), torch.nan) for each in (dy, h, weight)]
    for found, expected in zip(linear.launch_backward(*spoiled), whole, strict=True):
        assert torch.equal(found[::2], expected[::2])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("tokens", "hidden", "inner"), [(100, 16, 32), (130, 32, 96), (5, 128, 64)])
def test_mlp(tokens, hidden, inner, whole):
    """In one kernel and in several, for tokens that fill a program's and that do not."""
    shapes = (2, tokens, hidden), (2, 2 * inner, hidden), (2, hidden), (2, hidden, inner)
    h, *weights = (normal(*shape, seed=place) / shape[-1] ** 0.5 for place, shape in enumerate(shapes))
    h = (4 * h).bfloat16()
    exact = [each.double().requires_grad_() for each in (h, *weights)]
    own = [h.clone().requires_grad_(), *(each.float().requires_grad_() for each in weights)]
    assert fits(h.dtype, hidden, inner)
    found, expected = Fused("ieee", whole_mlp=whole).mlp(*own), Plain().mlp(*exact)
    compare([found], [expected], torch.bfloat16)
    compare(gradients([found], own), gradients([expected], exact), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 16, 33, 256])
def test_cross_entropy(vocabulary, dtype):
    """Of positions that count and that do not, one of which has a logit far beyond the others."""
    logits = (4 * normal(3, 50, vocabulary)).to(dtype)
    logits[0, 0, 0] = 90
    wanted = torch.randint(vocabulary, (3, 50), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted[:, ::3] = IGNORE
    exact, own = logits.double().requires_grad_(), logits.clone().requires_grad_()
    found, expected = Fused("ieee").nats(own, wanted), Plain().nats(exact, wanted)
    compare([found], [expected], torch.float32)
    compare(gradients([found], [own]), gradients([expected], [exact]), dtype)


def test_adamw():
    weights = [normal(3, 5, 7, dtype=torch.float32), normal(2, 1500, seed=1, dtype=torch.float32)]
    spread = [torch.tensor([[0.9, 0.99, 1.0], [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]], device=DEVICE)]
    spread.append(spread[0][:, :2])
    made = []
    for operations, wide in ((Fused("ieee"), torch.float32), (Plain(), torch.float64)):
        own = [weight.to(wide, copy=True) for weight in weights]
        moments = [torch.zeros_like(each) for each in own], [torch.zeros_like(each) for each in own]
        for step in range(3):
            gradient = [normal(*each.shape, seed=step).to(wide) for each in own]
            operations.update(own, gradient, moments, [each.to(wide) for each in spread])
        made.append([*own, *moments[0], *moments[1]])
    compare(*made, torch.float32)
    assert BETAS == (0.9, 0.999)


@pytest.mark.parametrize(
    ("precision", "autoencoder", "unscored"),
    [("float32", False, 0), ("float32", False, 6), ("float32", True, 0), ("bfloat16", True, 0), ("bfloat16", False, 6)],
)
def test_a_population_trains_as_it_does_without_the_kernels(precision, autoencoder, unscored):
    """Weights after some steps: within 1e-4 in single precision, in which a sum's order is all that differs."""
    rng = torch.Generator().manual_seed(0)
    splits = [tuple(torch.randint(6, (2, size, 8), generator=rng).numpy()) for size in (24, 2, 2)]
    for _, targets in splits:
        targets[:, :unscored] = IGNORE
    data = TaskData(6, *splits, autoencoder=autoencoder)
    rows = [Row(CompositeSequence(text), data, 1e-2, 0.1, 0) for text in ("AM", "M", "MA")]
    widths = Widths(hidden_size=16, num_heads=2, ffn_hidden_size=24)
    settings = TrainSettings(widths=widths, steps=20, batch_size=2, precision=precision)
    states = []
    for fuse in (False, True):
        population = Population(rows, settings, DEVICE, None if INTERPRETING else cuda_graph, fuse)
        population.advance(2 if INTERPRETING else 10)
        population.look()
        states.append([population.state(row) for row in range(len(rows))])
    for plain, fused in zip(*states, strict=True):
        for name, value in plain.items():
            keys = name.endswith("query_key_value.bias")  # a key's bias has no gradient but rounding
            tolerance = 0.1 if keys or precision == "bfloat16" else 1e-4
            torch.testing.assert_close(fused[name], value, atol=tolerance, rtol=0)
