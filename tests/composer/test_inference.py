"""Decoding below the text: the draw, the cache and its windows, chunks of prompts, text as it comes."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.inference.cache import make_cache
from composer_megatron.inference.decoder import Decoder
from composer_megatron.inference.engine import Admission, Engine
from composer_megatron.inference.sampling import GREEDY, Sampling, Settings, draw, likeliest
from composer_megatron.inference.text import TextStream
from composer_megatron.inference.weights import random_weights
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape
from composer_megatron.text.tokenizing import train_tokenizer

torch.set_num_threads(1)

CPU = torch.device("cpu")
SHAPE = Shape(
    name="test",
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=8,
    vocab_size=90,
    tied_embeddings=False,
    baseline_pairs=2,
    rope_theta=1000,
    init_std=0.4,  # large, as in conftest.py
)


def make(letters: str, window: int = 7, **changes):
    """An architecture and random weights in float64, so that no two logits are equal by rounding."""
    shape = dataclasses.replace(SHAPE, window=window, **changes)
    architecture = Architecture(CompositeSequence(letters), shape)
    return architecture, random_weights(architecture, torch.float64, CPU)


def reference(weights, tokens: list[int]) -> torch.Tensor:
    """The logits after every token, (s, v): the model written down without cache, kernels or batch."""
    x = weights.embedding[tokens]
    positions = torch.arange(len(tokens))
    angles = torch.outer(positions.double(), weights.frequencies.double())

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + weights.epsilon).sqrt() * weight

    def turn(x):  # (s, heads, d)
        a, b = x.chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    for block in weights.blocks:
        inner = norm(x, block.norm) @ block.first.T
        if block.attends:
            heads = inner.unflatten(-1, (-1, weights.head_dim))
            query, key, value = heads.split((weights.heads, weights.groups, weights.groups), 1)
            repeat = weights.heads // weights.groups
            key, value = turn(key).repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
            scores = torch.einsum("qhd,khd->hqk", turn(query), key) * weights.head_dim**-0.5
            distance = positions[:, None] - positions
            seen = (distance >= 0) & (distance < (block.window or len(tokens)))
            inner = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value).flatten(1)
        else:
            gate, up = inner.chunk(2, -1)
            inner = F.silu(gate) * up
        x = x + inner @ block.second.T
    return norm(x, weights.final_norm) @ weights.output.T


def greedy(weights, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(reference(weights, ids)[-1].argmax()))
    return ids[len(prompt) :]


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 90, (length,), generator=generator).tolist() for length in lengths]


def continuations(engine: Engine, given: list[list[int]], count: int) -> list[list[int]]:
    engine.admit([Admission(row, prompt, GREEDY) for row, prompt in enumerate(given)])
    for _ in range(count):
        engine.step()
    return engine.recent(count).wait().tolist()[: len(given)]


@pytest.mark.parametrize("letters", ["MAAMMAM", "WMWAM", "AW", "M"])
@pytest.mark.parametrize(("chunk", "fused"), [(3, False), (8, True), (100, False)])
def test_decoding_equals_the_whole_pass(letters, chunk, fused):
    """Prompts shorter and longer than the window and than a chunk; decoding passes the window and goes round again."""
    _, weights = make(letters)
    given = prompts(1, 6, 7, 8, 15, 20)
    engine = Engine(weights, len(given), 40, prefill_tokens=chunk, fused=fused)
    assert continuations(engine, given, 18) == [greedy(weights, prompt, 18) for prompt in given]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    window=st.integers(1, 30),
    chunk=st.integers(1, 40),
    steps=st.integers(1, 12),
)
def test_windows_chunks_and_lengths_of_all_sizes(lengths, window, chunk, steps):
    _, weights = make("WMA", window)
    given = prompts(*lengths)
    engine = Engine(weights, len(given), max(lengths) + steps, prefill_tokens=chunk)
    assert continuations(engine, given, steps) == [greedy(weights, prompt, steps) for prompt in given]


@pytest.mark.parametrize("chunk", [1, 3, 8, 30])
def test_padded_prompts_in_chunks(chunk):
    """As on a GPU, where whole chunks may be padding, and the padding is not zero."""
    _, weights = make("WMAW")
    given = prompts(1, 6, 7, 9, 20)
    decoder = Decoder(weights, 7, 40)
    tokens = torch.full((len(given), 30), 77)
    for line, prompt in zip(tokens, given, strict=True):
        line[: len(prompt)] = torch.tensor(prompt)
    rows, lengths = torch.tensor([6, 2, 0, 4, 1]), torch.tensor([len(prompt) for prompt in given])
    logits = torch.zeros(7, 90, dtype=torch.float64)
    logits[rows] = decoder.prefill(tokens, rows, lengths, chunk)
    held = torch.zeros(7, dtype=torch.int64)
    held[rows] = lengths
    texts = {row: list(prompt) for row, prompt in zip(rows.tolist(), given, strict=True)}
    for _ in range(9):
        for row, text in texts.items():
            # The angles are computed in fp32.
            torch.testing.assert_close(logits[row], reference(weights, text)[-1], atol=1e-5, rtol=1e-5)
            text.append(int(logits[row].argmax()))
        decoder.decode(logits.argmax(-1), held, logits)
        held += 1


def test_a_row_can_be_given_to_another_request():
    """Before, during and after: what its former request left is not seen, and the other row goes on undisturbed."""
    _, weights = make("WMAM")
    first, second, third = prompts(20, 11, 3)
    engine = Engine(weights, 2, 40)
    assert continuations(engine, [first, second], 6) == [greedy(weights, each, 6) for each in (first, second)]
    engine.admit([Admission(0, third, GREEDY)])
    for _ in range(5):
        engine.step()
    tokens = engine.recent(5).wait().tolist()
    assert tokens == [greedy(weights, third, 5), greedy(weights, second, 11)[6:]]


def test_only_attention_blocks_have_a_cache_and_windows_bound_it():
    architecture, weights = make("MAWMW", window=7)
    engine = Engine(weights, 3, 20)
    held = [None if layer is None else layer.keys.shape[1] for layer in engine.decoder.cache]
    assert held == [None, 20, 7, None, 7]
    assert engine.decoder.cache_bytes == 3 * architecture.state_bytes(20, 8)  # float64
    small = Engine(weights, 3, 5)  # shorter than the window
    assert small.decoder.cache_bytes == 3 * architecture.state_bytes(5, 8)


def test_a_row_that_goes_on_past_its_end_disturbs_nobody():
    _, weights = make("WAM")
    short, long = prompts(4, 9)
    engine = Engine(weights, 2, 12)
    engine.admit([Admission(0, long, GREEDY)])
    for _ in range(80):  # far past the capacity
        engine.step()
    engine.admit([Admission(1, short, GREEDY)])
    for _ in range(8):
        engine.step()
    assert engine.recent(8).wait().tolist()[1] == greedy(weights, short, 8)


@pytest.mark.parametrize("length", [0, 13])
def test_a_prompt_that_the_cache_cannot_take(length):
    engine = Engine(make("AM")[1], 1, 12)
    with pytest.raises(UsageError, match=f"a prompt has {length} tokens; expected 1 to 12"):
        engine.admit([Admission(0, [1] * length, GREEDY)])


def test_other_blocks_are_refused():
    architecture = Architecture(CompositeSequence("AM"), SHAPE)
    object.__setattr__(architecture, "sequence", "AX")
    with pytest.raises(UsageError, match="AX: blocks X are not decoded here, A, M, W are"):
        random_weights(architecture, torch.float32, CPU)


def choose(logits: torch.Tensor, sampling: Sampling, uniform: float = 0.0) -> int:
    chosen = Settings.greedy(1, len(logits), CPU)
    chosen.put(0, sampling, len(logits))
    return int(draw(logits[None], chosen, torch.tensor([uniform], dtype=torch.float64)))


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12, unique=True),
    temperature=st.floats(0.05, 3),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_draw_comes_from_the_set_that_the_settings_allow(logits, temperature, top_k, top_p, uniform):
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = np.exp((np.array([logits[i] for i in order], dtype=np.float64) - max(logits)) / temperature)
    # The fewest that reach top_p, and all of them without it; one more where rounding could decide.
    reached = int(np.searchsorted(np.cumsum(weights / weights.sum()), (top_p or 1) + 1e-9)) + 1
    allowed = {order[i] for i in range(min(reached + 1, len(order)))}
    values = torch.tensor(logits)
    assert choose(values, Sampling(temperature, top_k, top_p), uniform) in allowed
    assert choose(values, GREEDY, uniform) == order[0]
    assert choose(values, Sampling(temperature, top_k=1), uniform) == order[0]


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(0.5), [0.25, 0.09, 0.0225, 0.0025]),  # squared
        (Sampling(1.0, top_k=2), [0.5, 0.3, 0, 0]),
        (Sampling(1.0, top_p=0.79), [0.5, 0.3, 0, 0]),
        (Sampling(1.0, top_p=0.81), [0.5, 0.3, 0.15, 0]),
        (Sampling(1.0, top_k=2, top_p=0.6), [0.5, 0, 0, 0]),  # 0.5 of 0.8 is more than 0.6
    ],
)
def test_draws_have_the_right_frequencies(sampling, wanted):
    """At evenly spread numbers the shares are the probabilities themselves."""
    rows = 2000
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(rows, -1)
    chosen = Settings.greedy(rows, 4, CPU)
    for row in range(rows):
        chosen.put(row, sampling, 4)
    found = draw(logits, chosen, (torch.arange(rows, dtype=torch.float64) + 0.5) / rows)
    shares = np.bincount(found, minlength=4)[[1, 3, 2, 0]] / rows
    # Each border between two tokens falls between two of the numbers; logs of fp32 move it by 1e-7.
    assert shares == pytest.approx(np.array(wanted) / sum(wanted), abs=2 / rows)


def test_of_equal_logits_the_first_is_taken():
    assert choose(torch.tensor([1.0, 2.0, 2.0]), GREEDY) == 1
    assert choose(torch.tensor([1.0, 2.0, 2.0]), Sampling(1.0, top_k=1)) == 1


@pytest.mark.parametrize("count", [5, 4096, 64 * 65, 128_256, 50_257])
def test_the_likeliest_is_the_first_of_the_largest(count):
    """Reduced in parts or not, of rows that lie apart; few values, so that many are equal."""
    logits = torch.randint(-3, 3, (3, count + 7), generator=torch.Generator().manual_seed(count)).bfloat16()[:, :count]
    logits[1] = -math.inf
    wanted = [row.index(max(row)) for row in logits.tolist()]
    assert likeliest(logits).tolist() == wanted


def test_where_the_first_tokens_make_up_top_p_exactly_the_next_is_left_out():
    logits = torch.zeros(4)
    assert {choose(logits, Sampling(1.0, top_p=0.5), uniform) for uniform in (0.0, 0.3, 0.6, 0.99)} == {0, 1}


def test_a_tiny_temperature_is_greedy_and_finite():
    assert choose(torch.tensor([1.0, 2.0, 1.5]), Sampling(1e-300), 0.999) == 1


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_every_seed_makes_its_own_numbers(seed):
    numbers = Sampling(seed=seed).uniforms(50)
    assert torch.equal(numbers[:20], Sampling(seed=seed).uniforms(20))
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    assert not torch.equal(numbers, Sampling(seed=seed ^ 1).uniforms(50))


@pytest.fixture(scope="module")
def tokenizer():
    """One with a few merges, so that tokens begin and end within characters."""
    return train_tokenizer(["Äpfel für 3 €, größere für 4 €. 🍏🍎" * 3], 290)


TEXT = st.text(st.sampled_from("Äpfel ür€🍏🍎, 3.\n") | st.characters(codec="utf-8"), max_size=30)


@settings(max_examples=150, deadline=None)
@given(before=TEXT, after=TEXT, stop=st.lists(TEXT.filter(bool), max_size=2), cut=st.integers(0, 5))
def test_text_comes_whole_and_ends_at_the_first_stop(tokenizer, before, after, stop, cut):
    """Whatever the pieces, together they are the text up to the first stop text, and never take anything back."""
    stop = [*stop, after[cut : cut + 2]] if after[cut : cut + 2] else stop
    ids = tokenizer.encode(after).ids
    text = TextStream(tokenizer, tokenizer.encode(before).ids, stop)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_stopped:
            break
    stopped = text.is_stopped
    pieces.append(text.end())
    # It ends with the token that completes a stop text, not with the text's end: of two, the first to be complete.
    ends = [after.find(each) + len(each) for each in stop if each in after]
    assert stopped == bool(ends)
    found = "".join(pieces)
    assert after.startswith(found)
    if not ends:
        assert found == after
    else:
        assert not any(each in found for each in stop)
        assert any(after[len(found) :].startswith(each) for each in stop)
    assert all(piece.isprintable() or "\ufffd" not in piece for piece in pieces if "\ufffd" not in after)


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer):
    ids = tokenizer.encode("Ä🍏").ids
    text = TextStream(tokenizer, [], [])
    pieces = [text.add(token) for token in ids[:-1]]
    assert "\ufffd" not in "".join(pieces)
    assert ("".join(pieces) + text.end()).startswith("Ä")


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class TestOnGPU:
    """The same in a CUDA graph."""

    pytestmark = gpu

    @pytest.mark.parametrize("letters", ["MAAMMAM", "WMWAM", "M"])
    @pytest.mark.parametrize(("fused", "overlap"), [(True, "full"), (True, "tail"), (True, "none"), (False, "none")])
    @pytest.mark.parametrize("graph", [True, False])
    def test_decoding_equals_the_whole_pass(self, letters, fused, overlap, graph):
        """In fp32, whose rounding moves logits by 1e-5 of what separates them; the reference is in float64."""
        architecture, _ = make(letters)
        weights = random_weights(architecture, torch.float32, torch.device("cuda"))
        exact = on_cpu_in_float64(weights)
        given = prompts(1, 6, 7, 8, 15, 20)
        engine = Engine(weights, len(given), 40, prefill_tokens=8, fused=fused, overlap=overlap, graph=graph)
        assert continuations(engine, given, 18) == [greedy(exact, prompt, 18) for prompt in given]
        engine.admit([Admission(2, given[0], GREEDY)])  # a captured graph goes on with another request
        for _ in range(6):
            engine.step()
        tokens = engine.recent(6).wait().tolist()
        assert tokens[2] == greedy(exact, given[0], 6)
        assert tokens[0] == greedy(exact, given[0], 24)[18:]

    def test_draws_are_those_of_the_cpu(self):
        architecture, _ = make("MAM")
        weights = random_weights(architecture, torch.float32, torch.device("cuda"))
        found = []
        for each in (weights, on_cpu_in_float64(weights)):
            engine = Engine(each, 3, 40, draws=True)
            sampling = (Sampling(1.0, seed=5), GREEDY, Sampling(0.7, top_k=9, top_p=0.9, seed=6))
            pairs = zip(prompts(3, 8, 5), sampling, strict=True)
            engine.admit([Admission(row, prompt, settings) for row, (prompt, settings) in enumerate(pairs)])
            for _ in range(16):
                engine.step()
            found.append(engine.recent(16).wait().tolist())
        assert found[0] == found[1]

    def test_a_step_never_waits_for_the_gpu(self):
        architecture, _ = make("WAM")
        engine = Engine(random_weights(architecture, torch.bfloat16, torch.device("cuda")), 2, 40, draws=True)
        engine.admit([Admission(0, [1, 2, 3], Sampling(1.0))])
        engine.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                engine.step()
            engine.recent(4)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("letters", ["AMAM", "WMAM"])
    def test_the_cache_takes_as_many_bytes_as_counted(self, letters):
        architecture, _ = make(letters, window=64)
        weights = random_weights(architecture, torch.bfloat16, torch.device("cuda"))
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        cache = make_cache(weights, 3, 512)
        held = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
        tables = {id(layer.page_table): layer.page_table for layer in cache if layer and layer.page_table is not None}
        assert held - sum(table.nbytes for table in tables.values()) == 3 * architecture.state_bytes(512)


def on_cpu_in_float64(weights):
    """The same weights for the reference."""

    def moved(tensor):
        return tensor.double().cpu()

    blocks = tuple(
        dataclasses.replace(block, norm=moved(block.norm), first=moved(block.first), second=moved(block.second))
        for block in weights.blocks
    )
    names = ("embedding", "final_norm", "output")
    tensors = {name: moved(getattr(weights, name)) for name in names}
    return dataclasses.replace(weights, **tensors, blocks=blocks, frequencies=weights.frequencies.cpu())
