"""Generation: the cache changes nothing, requests stand alone in a batch, text comes whole and ends where it should."""

import dataclasses
import json

import pytest
import torch

from composer_megatron.architecture import Architecture
from composer_megatron.checkpoint import load_run
from composer_megatron.errors import FileError, UsageError
from composer_megatron.generate import (
    Piece,
    Request,
    Sampling,
    generate,
    generate_tokens,
    stream,
    stream_tokens,
    write_samples,
)
from composer_megatron.inference.batching import Job
from composer_megatron.model import build_model
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

torch.set_num_threads(1)

SHAPE = dataclasses.replace(PRESETS["tiny"], init_std=0.3)  # large, as in conftest.py
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


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_a_batch_gives_what_each_sequence_gives_alone(run, batch_size):
    """Lengths, limits and places in the batch differ; with few rows, jobs wait for one and find another's leavings."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 9), (14, 3), (5, 1), (7, 12), (2, 5), (20, 4)]
    jobs = [Job(torch.randint(0, 300, (length,), generator=generator).tolist(), limit) for length, limit in sizes]
    found = [[] for _ in jobs]
    for number, token in stream_tokens(run.model, jobs, batch_size=batch_size):
        found[number].append(token)
    assert found == [full_forward(run.model, job.prompt, job.limit) for job in jobs]


@pytest.mark.parametrize("letters", ["MWAWM", "AEM", "ASM", "LM"])
def test_other_blocks_are_decoded_too(letters):
    """Windows by our own pass; experts, recurrences and latent attention by Megatron's."""
    shape = dataclasses.replace(SHAPE, window=7)
    architecture = Architecture(CompositeSequence(letters), shape)
    model = build_model(architecture, max_sequence_length=64).eval().requires_grad_(False)
    jobs = [Job(list(range(20)), 12), Job([5, 6, 7], 4), Job([8], 9)]
    found = [[] for _ in jobs]
    for number, token in stream_tokens(model, jobs, batch_size=2):
        found[number].append(token)
    assert found == [full_forward(model, job.prompt, job.limit) for job in jobs]
    drawn = generate_tokens(model, [1], max_new_tokens=8, sampling=Sampling(1.0, seed=2))
    assert drawn == generate_tokens(model, [1], max_new_tokens=8, sampling=Sampling(1.0, seed=2))
    assert drawn != generate_tokens(model, [1], max_new_tokens=8)


def test_a_job_that_is_ended_gets_no_more_tokens(run):
    jobs = [Job([1], 9), Job([2], 9), Job([3], 9)]
    found = [[] for _ in jobs]
    for number, token in stream_tokens(run.model, jobs, batch_size=2):
        found[number].append(token)
        jobs[number].ended = number == 0 and len(found[0]) == 4
    assert list(map(len, found)) == [4, 9, 9]
    assert found[2] == full_forward(run.model, [3], 9)  # in the row that the first one left


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


def test_pieces_are_the_text_in_order_and_say_why_they_end(run):
    (text,) = generate(run, ["12 Ä"], max_new_tokens=12)
    end = Request("12 Ä", 12, stop=(text[4:6],))
    pieces = list(stream(run, [Request("12 Ä", 12), end, Request("12 Ä", 3)]))
    texts = ["".join(piece.text for piece in pieces if piece.number == number) for number in range(3)]
    assert texts[:2] == [text, text[: text.index(end.stop[0])]]
    assert text.startswith(texts[2])
    endings = [[piece.ending for piece in pieces if piece.number == number] for number in range(3)]
    assert [each[-1] for each in endings] == ["length", "stop", "length"]
    assert not any(ending for each in endings for ending in each[:-1])
    assert sum(piece.number == 0 for piece in pieces) > 3  # it came in parts
    assert isinstance(pieces[0], Piece)


def test_requests_have_their_own_settings(run):
    greedy, drawn = Request("7", 8), Request("7", 8, Sampling(1.5, seed=3))
    other, narrow = Request("7", 8, Sampling(1.5, seed=4)), Request("7", 8, Sampling(1.5, top_k=1, seed=3))

    def texts(*requests):
        found = [""] * len(requests)
        for piece in stream(run, requests, batch_size=3):
            found[piece.number] += piece.text
        return found

    alone = [texts(request)[0] for request in (greedy, drawn, other, narrow)]
    assert texts(greedy, drawn, other, narrow) == alone
    assert texts(narrow, other, drawn, greedy) == alone[::-1]
    assert alone[0] == alone[3]
    assert len(set(alone)) == 3


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
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"max_new_tokens": 32}, "prompt '!' has 1 tokens, with max_new_tokens=32 more than 32.*at most 31 new tokens"),
        ({"prompts": ["!", "Ä" * 400]}, "prompt 'ÄÄÄ.*…' has .* more than 32, .*shorten the prompt"),
    ],
)
def test_wrong_requests(run, changes, message):
    with pytest.raises(UsageError, match=message):
        generate(run, **({"prompts": ["!"], "max_new_tokens": 4} | changes))


@pytest.mark.parametrize(("prompt", "count", "message"), [([], 1, "no token"), ([1], 0, "max_new_tokens=0")])
def test_wrong_token_requests(run, prompt, count, message):
    with pytest.raises(UsageError, match=message):
        generate_tokens(run.model, prompt, max_new_tokens=count)


def test_nothing_to_continue(run):
    assert generate(run, [], max_new_tokens=4) == []


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
