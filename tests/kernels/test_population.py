"""The kernels of `composer_search.population` against PyTorch's operations in float64."""

import pytest
import torch
import triton

from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import Widths, rotation
from composer_search.mad import IGNORE
from composer_search.population import Row
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "heads", "width"),
    [(1, 2, 8), (15, 3, 8), (32, 2, 8), (33, 1, 16), (64, 2, 6), (127, 1, 8), (130, 1, 32), (256, 1, 8)],
)
def test_attention(length, heads, width, dtype):
    """One pass over the whole sequence and several; heads that fill the kernel's channels and that do not."""
    rows, per_row = 2, 2
    joint = normal(rows, per_row * length, 3 * heads * width).to(dtype).double().requires_grad_()
    bias = normal(rows, 3 * heads * width, seed=1, dtype=torch.float32).double().requires_grad_()
    turns = rotation(length, width, DEVICE)
    expected = Plain().attend(joint, bias, turns, heads)
    inputs = [joint.detach().to(dtype).requires_grad_(), bias.detach().float().requires_grad_()]
    found = Fused("ieee").attend(*inputs, turns, heads)
    compare([found], [expected], dtype)
    compare(gradients([found], inputs), gradients([expected], [joint, bias]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    ("sizes", "used"), [((2, 3), (0, 1)), ((4,), (0, 1)), ((), (1,)), ((2, 1), (0,)), ((3, 1), (1,))]
)
def test_residual(sizes, used, moved, dtype):
    """Groups with a bias and without, rows of none, in a new order or not; and a result that nobody uses."""
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
        both = operations.residual(inputs[0], own, given, moves, wide or dtype)
        results.append((both, gradients([both[place] for place in used], inputs)))
    compare(results[0][0], results[1][0], dtype)
    compare(results[0][1], results[1][1], dtype)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("tokens", "hidden", "inner"), [(100, 16, 32), (130, 32, 96), (5, 128, 64)])
def test_mlp(tokens, hidden, inner, whole):
    """In one kernel and in several, for tokens that fill a program's and that do not."""
    shapes = (2, tokens, hidden), (2, 2 * inner, hidden), (2, hidden), (2, hidden, inner)
    h, *weights = (normal(*shape, seed=place) / shape[-1] ** 0.5 for place, shape in enumerate(shapes))
    h = (4 * h).bfloat16()
    exact = [each.double().requires_grad_() for each in (h, *weights)]
    own = [h.clone().requires_grad_(), *(each.float().requires_grad_() for each in weights)]
    assert fits(h, inner)
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


@pytest.mark.parametrize(("precision", "autoencoder"), [("float32", False), ("bfloat16", True)])
def test_a_population_trains_as_it_does_without_the_kernels(precision, autoencoder):
    """Weights after some steps: within 1e-4 in single precision, in which a sum's order is all that differs."""
    rng = torch.Generator().manual_seed(0)
    splits = [tuple(torch.randint(6, (2, size, 8), generator=rng).numpy()) for size in (24, 2, 2)]
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
