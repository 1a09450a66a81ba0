"""Generation: the cache changes nothing, the draws follow the settings, each prompt stands alone."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.checkpoint import load_run
from composer_megatron.errors import FileError, UsageError
from composer_megatron.generate import Sampling, generate, generate_tokens, write_samples

torch.set_num_threads(1)

PROMPTS = ["12 Äpf", "!", "", "3 Äpfel, 6 Äpfel, 9 Äpfel"]


@pytest.fixture(scope="module")
def run(runs):
    with load_run(runs["plain"]) as run:
        yield run


def full_forward(model, prompt: list[int], count: int, vocab_size=None) -> list[int]:
    """Greedy decoding without a cache: the whole sequence again for each token."""
    ids = list(prompt)
    for _ in range(count):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(tokens, torch.arange(len(ids))[None], None)
        ids.append(int(logits[0, -1, :vocab_size].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["plain", "pipeline", "mlp"])
@pytest.mark.parametrize("length", [1, 5, 20])
def test_greedy_decoding_equals_the_full_forward_pass(runs, name, length):
    prompt = torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    with load_run(runs[name]) as run:
        wanted = full_forward(run.model, prompt, 12)
        assert generate_tokens(run.model, prompt, max_new_tokens=12) == wanted
    if name != "mlp":
        assert len(set(wanted)) > 3  # a sequence that could have come out wrong


def test_only_attention_blocks_have_a_cache(run, monkeypatch):
    from megatron.core.inference import contexts

    caches = []

    class Recorded(contexts.StaticInferenceContext):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(self)

    monkeypatch.setattr(contexts, "StaticInferenceContext", Recorded)
    generate_tokens(run.model, [1, 2, 3], max_new_tokens=5)
    (cache,) = caches
    assert sorted(cache.key_value_memory_dict) == [2, 3, 6]  # -**--*- counted from 1
    elements = sum(buffer.numel() for pair in cache.key_value_memory_dict.values() for buffer in pair)
    assert elements * 2 == (3 + 5) * run.architecture.kv_bytes_per_token()


def test_prompts_of_different_lengths_do_not_disturb_each_other(run):
    together = generate(run, PROMPTS, max_new_tokens=6)
    assert together == [generate(run, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    tokenizer = run.require_tokenizer()
    for prompt, text in zip(PROMPTS, together, strict=True):
        ids = tokenizer.encode(prompt).ids or [run.end_of_text]
        new = full_forward(run.model, ids, 6, vocab_size=tokenizer.get_vocab_size())
        new = new[: new.index(run.end_of_text)] if run.end_of_text in new else new
        assert tokenizer.decode(ids) + text == tokenizer.decode([*ids, *new])


def test_draws_depend_on_the_seed_and_the_prompts_place_alone(run):
    def draw(prompts, seed):
        return generate(run, prompts, max_new_tokens=8, temperature=1.5, seed=seed)

    first = draw(["!", "!", "7"], seed=3)
    assert draw(["!", "!", "7"], seed=3) == first
    assert draw(["!", "!"], seed=3) == first[:2]
    assert first[0] != first[1]
    assert draw(["!", "!", "7"], seed=4) != first


def test_the_end_of_text_ends_a_continuation(run):
    new = generate_tokens(run.model, [5], max_new_tokens=12)
    end = new[7]
    assert generate_tokens(run.model, [5], max_new_tokens=12, end_of_text=end) == new[: new.index(end)]


def test_ids_without_a_token_are_not_drawn(run):
    everything = generate_tokens(run.model, [5], max_new_tokens=20)
    limit = sorted(everything)[10]
    assert max(generate_tokens(run.model, [5], max_new_tokens=20, vocab_size=limit)) < limit
    assert generate_tokens(run.model, [5], max_new_tokens=20, vocab_size=limit) == full_forward(
        run.model, [5], 20, vocab_size=limit
    )


def test_a_stop_text_cuts_a_continuation(run):
    (text,) = generate(run, ["12 Ä"], max_new_tokens=12)
    assert len(text) > 6
    stop = text[4:6]
    assert generate(run, ["12 Ä"], max_new_tokens=12, stop=["never so", stop]) == [text[: text.index(stop)]]
    assert generate(run, ["12 Ä"], max_new_tokens=12, stop=[text[0]]) == [""]
    assert generate(run, ["12 Ä"], max_new_tokens=12, stop=["never so"]) == [text]


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12, unique=True),
    temperature=st.floats(0.05, 3),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_a_draw_comes_from_the_set_that_the_settings_allow(logits, temperature, top_k, top_p, seed):
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = np.exp((np.array([logits[i] for i in order], dtype=np.float64) - max(logits)) / temperature)
    # The fewest that reach top_p; one more where rounding could decide.
    reached = int(np.searchsorted(np.cumsum(weights / weights.sum()), (top_p or 1) - 1e-9)) + 1
    allowed = {order[i] for i in range(min(reached + 1, len(order)))}
    generator = torch.Generator().manual_seed(seed)
    chosen = Sampling(temperature, top_k, top_p).choose(torch.tensor(logits), generator)
    assert chosen in allowed
    assert Sampling().choose(torch.tensor(logits), generator) == order[0]
    assert Sampling(temperature, top_k=1).choose(torch.tensor(logits), generator) == order[0]


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
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    generator = torch.Generator().manual_seed(1)
    counts = np.bincount([sampling.choose(logits, generator) for _ in range(3000)], minlength=4)[[1, 3, 2, 0]]
    probabilities = np.array(wanted) / sum(wanted)
    # Six standard deviations of a binomial count: one chance in about 10^8 for a right sampler to fail.
    assert np.all(np.abs(counts - 3000 * probabilities) <= 6 * np.sqrt(3000 * probabilities * (1 - probabilities)))


def test_a_tiny_temperature_is_greedy_and_finite():
    assert Sampling(1e-300).choose(torch.tensor([1.0, 2.0, 1.5]), torch.Generator()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0; expected at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0; expected 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0; expected at least 1"),
        ({"top_p": 0.0}, "top_p=0.0; expected a number above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": ["x", ""]}, "a stop text is empty"),
        ({"max_new_tokens": 32}, "prompt '!' has 1 tokens, with max_new_tokens=32 more than 32.*at most 31 new tokens"),
        ({"prompts": ["!", "Ä" * 400]}, "prompt 'ÄÄÄ.*…' has .* more than 32, .*shorten the prompt"),
    ],
)
def test_wrong_requests(run, changes, message):
    with pytest.raises(UsageError, match=message):
        generate(run, **({"prompts": ["!"], "max_new_tokens": 4} | changes))


def test_the_longest_continuation_that_fits(run):
    assert len(generate_tokens(run.model, [1], max_new_tokens=31)) == 31
    generate(run, ["!"], max_new_tokens=31)


def test_a_run_without_a_tokenizer(run_dir):
    (run_dir / "tokenizer.json").unlink()
    with load_run(run_dir) as run, pytest.raises(FileError, match="cannot read text"):
        generate(run, ["!"], max_new_tokens=1)


def test_samples_are_written(tmp_path):
    write_samples(tmp_path / "samples.json", ["a", ""], ["b", "Äpfel\n"])
    found = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert found == [{"prompt": "a", "text": "b"}, {"prompt": "", "text": "Äpfel\n"}]
