"""Held-out loss: every token once, equal to plain PyTorch's cross-entropy, divided by the text's true bytes."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.checkpoint import load_run
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.evaluate import Evaluation, Window, batches, cut, evaluate_text
from composer_megatron.text.preprocess import load_text_folder

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(runs):
    with load_run(runs["plain"]) as run:
        yield run


def documents(text_folder, *, held_out: bool) -> list[str]:
    """The source's documents, all or those of the valid side, found without reading a token file of the folder's."""
    lines = (text_folder.parent / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    if not held_out:
        return texts
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    tokenizer, dataset = (
        Tokenizer.from_file(str(text_folder / "tokenizer.json")),
        IndexedDataset(str(text_folder / "valid")),
    )
    decoded = {tokenizer.decode(dataset[number].tolist()) for number in range(len(dataset))}
    assert decoded <= set(texts)
    return [text for text in texts if text in decoded]


def reference(run, texts: list[str]) -> tuple[float, int, int]:
    """Nats, tokens and bytes by the windowing rule: one window at a time, cross-entropy in float64."""
    nats, tokens = 0.0, 0
    for text in texts:
        ids = [0, *run.require_tokenizer().encode(text).ids, 0]  # 0 is the end of text
        for start in range(0, len(ids) - 1, 32):
            window = torch.tensor([ids[start : start + 33]])
            with torch.no_grad():
                logits = run.model(window[:, :-1], torch.arange(window.shape[1] - 1)[None], None)
            nats += float(F.cross_entropy(logits[0].double(), window[0, 1:], reduction="sum"))
            tokens += window.shape[1] - 1
    return nats, tokens, sum(len(text.encode()) for text in texts)


def assert_equals(found: Evaluation, wanted: tuple[float, int, int]) -> None:
    nats, tokens, size = wanted
    assert (found.tokens, found.bytes, found.iteration) == (tokens, size, 7)
    # Megatron's loss is fp32: each token's is right to about 1e-6 relative, and their errors average out.
    assert found.nats_per_token == pytest.approx(nats / tokens, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.nats_per_token), rel=1e-12)


def test_the_held_out_side_of_a_text_folder(run, text_folder):
    texts = documents(text_folder, held_out=True)
    lengths = [len(run.require_tokenizer().encode(text).ids) + 1 for text in texts]
    assert min(lengths) < 32 < 64 < max(lengths)  # part of a window, and several
    found = evaluate_text(run, text_folder)
    assert_equals(found, reference(run, texts))
    info = load_text_folder(text_folder)
    assert (found.tokens, found.bytes) == (info.valid.tokens, info.valid.bytes)


def test_raw_text_files(run, text_folder):
    source = text_folder.parent / "documents.jsonl"
    wanted = reference(run, documents(text_folder, held_out=False))
    assert_equals(evaluate_text(run, source), wanted)
    assert_equals(evaluate_text(run, [source]), wanted)


def test_a_text_that_tokens_do_not_divide_evenly(run, tmp_path):
    """Several files; characters of several bytes; a text that mentions the end of text, which is a text like any."""
    texts = ["é", "<|endoftext|>", "日本語 " * 30]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    found = evaluate_text(run, [tmp_path / "0.txt", tmp_path / "1.txt", tmp_path / "2.txt"])
    assert found.bytes == 2 + 13 + 300
    ids = [run.require_tokenizer().encode(text).ids for text in texts]
    assert found.tokens == sum(map(len, ids)) + 3
    assert_equals(found, reference(run, texts))


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_batching_changes_nothing(run, text_folder, batch_tokens):
    done = []
    found = evaluate_text(run, text_folder, batch_tokens=batch_tokens, progress=done.append)
    # The same sums in another order: fp32 rounding of single losses, about 1e-7.
    assert found.nats_per_token == pytest.approx(evaluate_text(run, text_folder).nats_per_token, rel=1e-6)
    assert done == sorted(done)
    assert done[-1] == found.tokens


def test_a_model_that_knows_nothing_is_uniform(runs, text_folder):
    with load_run(runs["plain"]) as run:
        run.model.output_layer.weight.zero_()
        found = evaluate_text(run, text_folder)
    assert found.nats_per_token == pytest.approx(math.log(300), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(found.tokens * math.log2(300) / found.bytes, rel=1e-6)
    assert found.perplexity == pytest.approx(300, rel=1e-5)


@given(tokens=st.lists(st.integers(0, 99), min_size=1, max_size=60), length=st.integers(1, 20))
def test_windows_hold_each_token_once_behind_the_one_before_it(tokens, length):
    windows = list(cut(np.array(tokens), 7, length))
    assert [len(window.targets) for window in windows[:-1]] == [length] * (len(windows) - 1)
    assert np.concatenate([window.targets for window in windows]).tolist() == tokens
    assert np.concatenate([window.inputs for window in windows]).tolist() == [7, *tokens[:-1]]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=30), limit=st.integers(1, 100))
def test_batches_hold_each_window_once_within_the_limit(lengths, limit):
    windows = [Window(np.full(length, number), np.full(length, number)) for number, length in enumerate(lengths)]
    found = list(batches(windows, limit))
    assert sorted(int(window.inputs[0]) for batch in found for window in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(len(window.targets) for window in batch) <= limit


def test_a_text_folder_of_another_tokenizer_is_refused(run, text_folder, tmp_path):
    other = shutil.copytree(text_folder, tmp_path / "text")
    values = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    (other / "tokenizer.json").write_text(json.dumps(values))  # the same, written otherwise
    assert evaluate_text(run, other) == evaluate_text(run, text_folder)
    values["model"]["merges"] = values["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(FileError, match=r"is another tokenizer than .*tokenizer\.json; evaluate on text made with"):
        evaluate_text(run, other)


def test_wrong_requests(run, text_folder, tmp_path):
    with pytest.raises(UsageError, match="batch_tokens=0; expected at least 1"):
        evaluate_text(run, text_folder, batch_tokens=0)
    with pytest.raises(ComposerError, match="no such file or folder"):
        evaluate_text(run, tmp_path / "nothing.txt")
    with pytest.raises(UsageError, match="no text is named"):
        evaluate_text(run, [])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(FileError, match=r"empty\.txt: no text to evaluate on"):
        evaluate_text(run, tmp_path / "empty.txt")


def test_a_model_whose_training_diverged(runs, text_folder):
    with load_run(runs["plain"]) as run:
        run.model.decoder.final_norm.weight.fill_(float("nan"))
        with pytest.raises(ComposerError, match="at iteration 7 is nan: its training diverged"):
            evaluate_text(run, text_folder)


def test_a_run_without_a_tokenizer(run_dir, text_folder):
    (run_dir / "tokenizer.json").unlink()
    with load_run(run_dir) as run:
        for text in (text_folder, text_folder.parent / "documents.jsonl"):
            with pytest.raises(FileError, match="cannot read text"):
                evaluate_text(run, text)


def test_an_evaluation_is_saved(tmp_path):
    evaluation = Evaluation(2.5, 1.25, math.exp(2.5), 1000, 2885, 40)
    path = evaluation.save(tmp_path)
    assert path == tmp_path / "eval.json"
    assert json.loads(path.read_text()) == {
        "nats_per_token": 2.5,
        "bits_per_byte": 1.25,
        "perplexity": math.exp(2.5),
        "tokens": 1000,
        "bytes": 2885,
        "iteration": 40,
    }
