"""The proxy's blocks of W, E, S, G and L against naive float64 recurrences and formulas, and training with them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.errors import UsageError
from composer_megatron.recurrences import causal_convolution, scan, unit
from composer_megatron.sequence import CompositeSequence
from composer_search import blocks, mixers
from composer_search.blocks import Widths
from composer_search.candidate import Candidate
from composer_search.evaluators import MadEvaluator, preset
from composer_search.population.feed import Row
from composer_search.trainer import TaskData, TrainSettings, train

WIDTHS = Widths(hidden_size=16, num_heads=2, ffn_hidden_size=24)
EXACT = 1e-12
"""Float64: sums of a few hundred terms in another order."""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def block(kind, widths=WIDTHS):
    """A block whose weights, biases and norms are all random, in float64."""
    torch.manual_seed(0)
    made = kind(widths).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def hidden(length, batch=2, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((batch, length, WIDTHS.hidden_size)))


def naive_scan(query, key, value, log_decay, strength):
    """One token after the other, one head after the other, in NumPy."""
    batch, length, heads, width = value.shape
    outputs = np.zeros(value.shape)
    for row in range(batch):
        for head in range(heads):
            state = np.zeros((key.shape[-1], width))
            for t in range(length):
                k, q, v = key[row, t, head], query[row, t, head], value[row, t, head]
                state = math.exp(log_decay[row, t, head]) * state
                added = v if strength is None else strength[row, t, head] * (v - state.T @ k)
                state = state + np.outer(k, added)
                outputs[row, t, head] = state.T @ q
    return outputs, state


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 20), chunk=st.integers(1, 9), delta=st.booleans(), seed=st.integers(0, 9))
def test_the_scan_is_the_recurrence(length, chunk, delta, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(2, length, 2, width, dtype=torch.float64, generator=generator) for width in (3, 3, 5)
    )
    decay = -3 * torch.rand(2, length, 2, dtype=torch.float64, generator=generator)
    strength = torch.rand(2, length, 2, dtype=torch.float64, generator=generator) if delta else None
    key = unit(key)
    arrays = [None if tensor is None else tensor.numpy() for tensor in (query, key, value, decay, strength)]
    wanted, last = naive_scan(*arrays)
    found, state = scan(query, key, value, decay, strength, chunk=chunk)
    assert np.abs(found.numpy() - wanted).max() < EXACT
    assert np.abs(state[-1, -1].numpy() - last).max() < EXACT
    # In two calls, the state handed on.
    middle = length // 2
    if middle:
        parts = [
            [None if tensor is None else tensor[:, span] for tensor in (query, key, value, decay, strength)]
            for span in (slice(middle), slice(middle, None))
        ]
        first, between = scan(*parts[0], chunk=chunk)
        second, _ = scan(*parts[1], between, chunk=chunk)
        assert np.abs(torch.cat([first, second], 1).numpy() - wanted).max() < EXACT


def test_fast_decays_do_not_overflow():
    """A chunk's total decay is far below what a float can hold; only differences of logarithms are exponentiated."""
    value = torch.ones(1, 64, 1, 2)
    found, _ = scan(value, value, value, torch.full((1, 64, 1), -50.0))
    assert torch.isfinite(found).all()
    assert torch.allclose(found, 2 * value)  # nothing is left of the token before


def test_the_convolution_goes_on_where_it_stopped():
    x, weight, bias = torch.randn(2, 9, 3), torch.randn(3, 4), torch.randn(3)
    whole = causal_convolution(x, weight, bias)
    wanted = bias + sum(torch.nn.functional.pad(x, (0, 0, back, 0))[:, :9] * weight[:, 3 - back] for back in range(4))
    assert torch.allclose(whole, wanted, atol=1e-6)
    rest = causal_convolution(x[:, 5:], weight, bias, before=x[:, 2:5])
    assert torch.allclose(whole[:, 5:], rest, atol=1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def weights(made):
    return {name: parameter.detach().numpy() for name, parameter in made.named_parameters()}


def convolve(x, weight, bias=0.0):
    padded = np.pad(x, ((0, 0), (weight.shape[1] - 1, 0), (0, 0)))
    return bias + sum(padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(weight.shape[1]))


def test_mamba_is_its_formulas():
    made, x = block(mixers.Mamba2), hidden(11)
    w, inner, state, heads = weights(made), 32, 16, 4
    gate, channels, steps = np.split(x.numpy() @ w["project.weight"].T, [inner, 2 * inner + 2 * state], -1)
    mixed = silu(convolve(channels, w["conv_weight"], w["conv_bias"]))
    value, key, query = np.split(mixed, [inner, inner + state], -1)
    value = value.reshape(2, 11, heads, 8)
    step = softplus(steps + w["step_bias"])
    shared = [np.repeat(part[:, :, None], heads, 2) for part in (query, key)]
    y, _ = naive_scan(*shared, value * step[..., None], -step * np.exp(w["log_rate"]), None)
    y = (y + value * w["skip"][:, None]).reshape(2, 11, inner)
    wanted = rms(y * silu(gate), w["norm.weight"]) @ w["output.weight"].T
    assert np.abs(made(x).detach().numpy() - wanted).max() < EXACT


def test_delta_net_is_its_formulas():
    made, x = block(mixers.DeltaNet), hidden(11)
    w = weights(made)
    channels, gate, strength, decay = np.split(x.numpy() @ w["project.weight"].T, [64, 96, 100], -1)
    query, key, value = np.split(silu(convolve(channels, w["conv_weight"])), [16, 32], -1)
    query, key = (part.reshape(2, 11, 2, 8).repeat(2, 2) for part in (query, key))
    query, key = (part / np.sqrt((part * part).sum(-1, keepdims=True) + 1e-6) for part in (query, key))
    log_decay = -np.exp(w["log_rate"]) * softplus(decay + w["step_bias"])
    beta = 1 / (1 + np.exp(-strength))
    y, _ = naive_scan(query / math.sqrt(8), key, value.reshape(2, 11, 4, 8), log_decay, beta)
    y = rms(y, w["norm.weight"]) * silu(gate.reshape(2, 11, 4, 8))
    wanted = y.reshape(2, 11, 32) @ w["output.weight"].T
    assert np.abs(made(x).detach().numpy() - wanted).max() < EXACT


def test_each_position_takes_its_best_experts():
    made, x = block(mixers.Experts), hidden(5)
    w = weights(made)
    wanted = np.zeros(x.shape)
    for row, position in np.ndindex(2, 5):
        token = x[row, position].numpy()
        scores = w["router.weight"] @ token
        chosen = np.argsort(scores)[-mixers.TOP_K :]
        shares = np.exp(scores[chosen]) / np.exp(scores[chosen]).sum()
        for share, expert in zip(shares, chosen, strict=True):
            gate, up = np.split(token @ w["gate_up"][expert], 2)
            wanted[row, position] += share * (silu(gate) * up) @ w["down"][expert]
    assert np.abs(made(x).detach().numpy() - wanted).max() < EXACT


def test_a_window_hides_what_lies_before_it(monkeypatch):
    monkeypatch.setattr(mixers.WindowAttention, "window", 3)
    made, x = block(mixers.WindowAttention), hidden(8)
    output = made(x)
    changed = x.clone()
    changed[:, 2] += 1
    moved = (made(changed) - output).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [False, False, True, True, True, False, False, False]
    wide = block(blocks.Attention)
    assert torch.equal(wide(x[:, :3]), made(x[:, :3]))  # nothing lies before it yet


def test_latent_attention_is_its_formulas():
    made, x = block(mixers.LatentAttention), hidden(7)
    with torch.no_grad():
        w = dict(made.named_parameters())
        query = (x @ w["query.weight"].T).view(2, 7, 2, 12)
        latent, turned = (x @ w["latent.weight"].T).split([32, 4], -1)
        latent = latent * torch.rsqrt((latent**2).mean(-1, keepdim=True) + 1e-5) * w["norm.weight"]
        key_value = (latent @ w["key_value.weight"].T).view(2, 7, 2, 16)
        wanted = torch.zeros(2, 7, 16, dtype=torch.float64)
        for head in range(2):
            q = torch.cat([query[:, :, head, :8], blocks.rotate(query[:, :, head, 8:])], -1)
            k = torch.cat([key_value[:, :, head, :8], blocks.rotate(turned)], -1)
            scores = q @ k.mT / math.sqrt(12)
            scores.masked_fill_(torch.ones(7, 7).triu(1).bool(), -math.inf)
            wanted[:, :, 8 * head : 8 * head + 8] = scores.softmax(-1) @ key_value[:, :, head, 8:]
        assert (made(x) - wanted @ w["output.weight"].T).abs().max() < EXACT


@pytest.mark.parametrize("letter", "WESGL")
def test_no_position_sees_a_later_one_and_all_weights_learn(letter):
    torch.manual_seed(0)
    model = Candidate(CompositeSequence(letter + "M"), 11, WIDTHS)
    tokens = torch.randint(11, (2, 70), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    later = tokens.clone()
    later[:, 66:] = (later[:, 66:] + 1) % 11
    assert torch.equal(model(later)[:, :66], logits[:, :66])
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def copying():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 6, size=(64, 8))
    split = (tokens, np.roll(tokens, 1, axis=1))
    return TaskData(6, split, split, split)


def test_recurrences_learn_what_came_before():
    """The token before: an S and a G alone, where an M can only guess one in five."""
    settings_ = TrainSettings(
        widths=WIDTHS, steps=100, batch_size=32, learning_rates=(1e-2,), evaluate_every=50, device="cpu"
    )
    for letters in ("S", "G"):
        assert train(CompositeSequence(letters), copying(), settings_, seed=0).validation > 0.8


def test_the_evaluator_trains_them_alone_beside_a_population():
    evaluator = MadEvaluator(preset("smoke", steps=20, batch_size=8, learning_rates=(1e-2,)))
    sequences = [CompositeSequence(letters) for letters in ("AM", "GM", "MA")]
    together = evaluator.evaluate_many(sequences)
    assert [each.score for each in together] == [evaluator.evaluate(sequence).score for sequence in sequences]


def test_a_population_says_that_it_has_no_such_block():
    with pytest.raises(UsageError, match=r"2A1S: a population trains A and M together, and has no S; .*alone"):
        Row(CompositeSequence("AAS"), copying(), 1e-3)
