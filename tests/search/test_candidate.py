"""The tiny model against a plain float64 reference, and the properties that the proxy tasks rely on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search import candidate
from composer_search.candidate import Candidate, Widths, rotate

WIDTHS = Widths(hidden_size=16, num_heads=2, ffn_hidden_size=24)
LETTERS = st.text("AM", min_size=1, max_size=5)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make(text, vocab_size=11, widths=WIDTHS, **options):
    torch.manual_seed(0)
    model = Candidate(CompositeSequence.parse(text), vocab_size, widths, **options).double()
    with torch.no_grad():  # weights of ones and zeros would hide a norm or a bias that is left out
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch=3, length=7, vocab_size=11, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).integers(vocab_size, size=(batch, length)))


def array(tensor):
    return tensor.detach().numpy()


def reference_norm(x, module):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * array(module.weight)


def reference_attention(x, module):
    """One head and one query at a time, rotating with 2x2 matrices."""
    length, hidden = x.shape
    width = hidden // module.num_heads
    projected = x @ array(module.query_key_value.weight).T + array(module.query_key_value.bias)
    out = np.zeros_like(x)

    def turn(vector, position):
        turned = vector.copy()
        for i in range(width // 2):
            angle = position * 10_000.0 ** (-2 * i / width)
            matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            turned[2 * i : 2 * i + 2] = matrix @ vector[2 * i : 2 * i + 2]
        return turned

    for head in range(module.num_heads):
        at = slice(head * width, (head + 1) * width)
        query, key, value = (projected[:, part * hidden : (part + 1) * hidden][:, at] for part in range(3))
        for here in range(length):
            scores = [turn(query[here], here) @ turn(key[there], there) / np.sqrt(width) for there in range(here + 1)]
            weights = np.exp(scores) / np.exp(scores).sum()
            out[here, at] = weights @ value[: here + 1]
    return out @ array(module.output.weight).T + array(module.output.bias)


def reference_mlp(x, module):
    gate, up = np.split(x @ array(module.gate_up.weight).T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ array(module.down.weight).T


def reference_stack(model, text, row):
    x = array(model.embedding.weight)[row]
    for letter, norm, block in zip(text, model.norms, model.blocks, strict=True):
        mix = reference_attention if letter == "A" else reference_mlp
        x = x + mix(reference_norm(x, norm), block)
    return x


def reference_output(model, x):
    return reference_norm(x, model.final_norm) @ array(model.unembedding.weight).T + array(model.unembedding.bias)


@pytest.mark.parametrize("text", ["A", "M", "AMMA", "MAAM"])
def test_the_logits_are_those_of_the_formulas(text):
    model, inputs = make(text), tokens()
    expected = [reference_output(model, reference_stack(model, text, row)) for row in inputs.numpy()]
    # rotary angles are float32 numbers in both precisions of the model: 1e-7 relative, times positions up to 7
    np.testing.assert_allclose(array(model(inputs)), expected, atol=2e-5)


def test_the_autoencoder_decodes_the_last_position_alone():
    text = "MAM"
    model, inputs = make(text, autoencoder=True), tokens()
    expected = []
    for row in inputs.numpy():
        vector = reference_stack(model, text, row)[-1]
        angles = np.arange(len(row))[:, None] * 10_000.0 ** (-np.arange(0, 16, 2) / 16)
        x = vector + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        for norm, linear in ((model.decoder[0], model.decoder[1]), (model.decoder[3], model.decoder[4])):
            x = reference_norm(x, norm) @ array(linear.weight).T + array(linear.bias)
            x = x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2
        expected.append(reference_output(model, x))
    np.testing.assert_allclose(array(model(inputs)), expected, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(text=LETTERS, changed=st.integers(0, 6))
def test_no_position_sees_a_later_one(text, changed):
    model, inputs = make(text), tokens()
    other = inputs.clone()
    other[:, changed] = (other[:, changed] + 1) % 11
    differs = (model(inputs) - model(other)).abs().amax(dim=(0, 2)) > 1e-12
    assert not differs[:changed].any()
    assert differs[changed]
    assert bool(differs[changed + 1 :].any()) is ("A" in text and changed < 6)


def test_the_score_of_rotated_pairs_depends_on_their_distance_alone():
    query, key = (torch.randn(8, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    scores = rotate(query.expand(12, 8)) @ rotate(key.expand(12, 8)).T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert (scores[0, 0] - scores[0, 3]).abs() > 1e-3
    torch.testing.assert_close(scores[0, 0], query @ key)


def test_blocks_have_the_sizes_of_mad():
    """MAD counts 66,304 and 135,424 with a LayerNorm of 256 elements; ours is an RMSNorm of 128."""

    def size(text):
        model = Candidate(CompositeSequence.parse(text), 16, Widths())
        return sum(parameter.numel() for parameter in model.parameters())

    assert size("2A") - size("A") == 66_304 - 128
    assert size("2M") - size("M") == 135_424 - 128
    assert size("A") == 2 * 16 * 128 + 16 + 128 + 66_176


def test_initial_weights_are_those_of_mad():
    torch.manual_seed(0)
    plain = Candidate(CompositeSequence.parse("AM"), 500, Widths())
    coder = Candidate(CompositeSequence.parse("AM"), 500, Widths(), autoencoder=True)
    # 3 % is over six standard errors of a standard deviation of 22,528 elements and more
    for model in (plain, coder):
        assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert not model.unembedding.bias.any()
    assert plain.blocks[1].gate_up.weight.std().item() == pytest.approx(1 / np.sqrt(3 * 128), rel=0.03)
    assert coder.blocks[1].gate_up.weight.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize(
    ("values", "named"),
    [({"hidden_size": 0}, "hidden_size=0"), ({"num_heads": 3}, "num_heads=3"), ({"num_heads": 128}, "pairs")],
)
def test_impossible_widths_are_named(values, named):
    with pytest.raises(UsageError, match=named):
        Widths(**values)


def test_a_primitive_without_a_block_is_named(monkeypatch):
    monkeypatch.delitem(candidate._BLOCKS, "M")
    with pytest.raises(UsageError, match="2A1M: the proxy model has no block for 'M'; it has A"):
        Candidate(CompositeSequence.parse("2A1M"), 8, WIDTHS)
