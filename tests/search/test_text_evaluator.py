"""The text evaluators: what their score is, what they depend on, where the text comes from."""

import dataclasses
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from composer_megatron.errors import FileError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_search.candidate import Widths
from composer_search.population import Row
from composer_search.text_data import TextSource, sample_text
from composer_search.text_evaluator import TextEvaluator, text_preset
from composer_search.text_training import train_for_loss
from composer_search.trainer import TaskData, TrainSettings, batches, build

SEQUENCE = CompositeSequence("MAM")
SMALL = {
    "hidden_size": 16,
    "num_heads": 2,
    "ffn_hidden_size": 24,
    "seq_len": 16,
    "n_train": 64,
    "n_valid": 8,
    "n_test": 8,
}
SHORT = {"steps": 8, "batch_size": 4, "evaluate_every": 4, "warmup_steps": 2, "learning_rates": [1e-2]}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Forty short documents of a few words, which a model can learn something about in a few steps."""
    folder = tmp_path_factory.mktemp("stories")
    rng = np.random.default_rng(0)
    words = ["the cat", "a dog", "sat on", "ran to", "the mat", "the house", "and then", "one day"]
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(" ".join(rng.choice(words, 60)) + f" {number}\n")
    return folder


def small(stories, **changes):
    return text_preset("small-text", text=[stories], **{**SMALL, **SHORT, **changes})


def reference_loss(row, settings):
    """AdamW by PyTorch on the candidate alone; mean cross-entropy of all validation targets after the last step."""
    model = build(row.sequence, row.data, settings, row.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=row.learning_rate, weight_decay=row.weight_decay)
    inputs, targets = map(torch.from_numpy, row.data.train)
    for step, places in enumerate(batches(len(inputs), settings.batch_size, settings.steps, row.seed)):
        optimizer.param_groups[0]["lr"] = settings.learning_rate(row.learning_rate, step)
        loss = F.cross_entropy(model(inputs[places]).flatten(0, 1), targets[places].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        inputs, targets = map(torch.from_numpy, row.data.validation)
        return float(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()))


def test_the_loss_is_that_of_training_each_model_by_itself(stories):
    settings = dataclasses.replace(small(stories).train, precision="float64")
    data = sample_text(small(stories).source, 0).data
    letters = ("MAM", "AM", "MMMM", "MAM")
    rows = [Row(CompositeSequence(each), data, 1e-2, 0.1, seed) for seed, each in enumerate(letters)]
    results = train_for_loss(rows, settings)
    for row, result in zip(rows, results, strict=True):
        assert result.validation == pytest.approx(reference_loss(row, settings), abs=1e-9)
        assert [step for step, _ in result.curve] == [4, 8]
        assert result.curve[-1][1] == result.validation
    assert train_for_loss([], settings) == []
    heard = []
    assert train_for_loss(rows, settings, looked=lambda step, judged: heard.append((step, dict(judged)))) == results
    for place, result in enumerate(results):
        assert [(step, judged[place]) for step, judged in heard if place in judged] == [*result.curve]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_finds_the_losses_of_a_cpu(precision):
    """Recorded steps, and judging between them; rounding in 16 bits was up to 0.013 nats on a CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    widths = Widths(hidden_size=16, num_heads=2, ffn_hidden_size=24)
    settings = TrainSettings(widths=widths, steps=8, batch_size=4, evaluate_every=4, patience=0, precision=precision)
    rng = np.random.default_rng(0)
    train, valid, test = (rng.integers(600, size=(2, many, 48)) ** 2 // 600 for many in (64, 70, 8))
    data = TaskData(600, (train[0], train[1]), (valid[0], valid[1]), (test[0], test[1]))
    rows = [Row(CompositeSequence(each), data, 1e-2, 0.0, seed) for seed in (0, 1) for each in ("MAM", "AM", "MMMM")]
    cpu, gpu = (train_for_loss(rows, dataclasses.replace(settings, device=where)) for where in ("cpu", "cuda"))
    for one, other in zip(cpu, gpu, strict=True):
        for mine, its in ((one.validation, other.validation), (one.test, other.test)):
            assert its == pytest.approx(mine, abs=2e-3 if precision == "float32" else 5e-2)


def test_the_score_is_the_share_of_the_unigram_loss_that_is_gone(stories):
    evaluator = TextEvaluator(small(stories, seeds=2, learning_rates=[1e-5, 1e-2], steps=24))
    train, valid, test = evaluator.sample.data.train, evaluator.sample.data.validation, evaluator.sample.data.test
    counts = np.ones(evaluator.sample.data.vocab_size)
    for token in train[1].ravel():
        counts[token] += 1
    unigram = [-np.log(counts / counts.sum())[split[1]].mean() for split in (valid, test)]
    found = evaluator.evaluate(SEQUENCE)
    assert found.details["unigram_nats"] == pytest.approx(unigram[0])
    assert found.seed_scores == pytest.approx([1 - nats / unigram[0] for nats in found.details["nats"]])
    assert found.score == pytest.approx(np.mean(found.seed_scores))
    assert found.spread == pytest.approx(np.std(found.seed_scores, ddof=1))
    assert found.test_score == pytest.approx(np.mean([1 - nats / unigram[1] for nats in found.details["test_nats"]]))
    assert found.details["learning_rate"] == 1e-2
    assert found.tasks == {"text": found.score}
    assert 0 < found.score < 1  # better than frequencies after 24 steps at 1e-2
    json.dumps(dict(found.details))


def test_it_repeats_itself_pickled_and_in_company(stories):
    evaluator = TextEvaluator(small(stories))
    sequences = [CompositeSequence(letters) for letters in ("MAM", "AA")]
    alone = [evaluator.evaluate(sequence) for sequence in sequences]
    assert evaluator.evaluate_many(sequences) == alone
    assert pickle.loads(pickle.dumps(evaluator)).evaluate_many(sequences) == alone
    assert TextEvaluator(small(stories)).evaluate(SEQUENCE) == alone[0]
    assert TextEvaluator(small(stories, seed=1)).evaluate(SEQUENCE) != alone[0]


def test_sequences_are_pieces_of_documents_on_their_side(stories):
    sample = sample_text(
        TextSource(text=(str(stories),), vocab_size=300, seq_len=16, n_train=64, n_valid=8, n_test=8), 0
    )
    data = sample.data
    for inputs, targets in (data.train, data.validation, data.test):
        assert inputs.shape[1] == 16
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        assert inputs.max() < data.vocab_size <= 300
    pieces = {row.tobytes() for row in data.train[0]}
    assert not any(row.tobytes() in pieces for split in (data.validation, data.test) for row in split[0])


def test_a_preprocessed_folder_gives_its_own_tokens(tmp_path):
    """Its layout is written here by hand: the counts in text.json, Megatron's header, and the bare tokens."""
    rng = np.random.default_rng(1)
    streams = {"train": rng.integers(500, size=900), "valid": rng.integers(500, size=300)}
    values = {"format": "composer-text", "version": 1, "sources": [], "vocab_size": 500, "end_of_text": 0}
    for name, stream in streams.items():
        head = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + bytes([8])
        head += np.array([1, 2], "<u8").tobytes() + np.array([len(stream)], "<i4").tobytes()
        head += np.array([0, 0, 1], "<i8").tobytes()
        (tmp_path / f"{name}.idx").write_bytes(head)
        (tmp_path / f"{name}.bin").write_bytes(stream.astype("<u2").tobytes())
        values[name] = {"documents": 1, "tokens": len(stream), "bytes": 3 * len(stream)}
    values["valid"] |= {"unigram_nats_per_token": 6.0, "unigram_bits_per_byte": 3.0}
    (tmp_path / "text.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_text("{}")
    source = TextSource(text=(str(tmp_path),), vocab_size=300, seq_len=20, n_train=44, n_valid=7, n_test=7)
    data = sample_text(source, 0).data
    assert data.vocab_size == 500
    whole = [
        " ".join(map(str, stream)) for stream in (streams["train"], streams["valid"][:150], streams["valid"][150:])
    ]
    for text, (inputs, targets) in zip(whole, (data.train, data.validation, data.test), strict=True):
        assert len({row.tobytes() for row in inputs}) == len(inputs)
        for tokens, target in zip(inputs, targets, strict=True):
            assert " ".join(map(str, [*tokens, target[-1]])) in text


def test_the_description_holds_every_setting_and_the_text_but_not_its_place(stories, tmp_path):
    before = TextEvaluator(small(stories)).describe()
    assert json.loads(json.dumps(before)) == before
    assert before["name"] == "small-text"
    changes = [{"seeds": 3}, {"seed": 1}, {"steps": 9}, {"weight_decay": 0.1}, {"hidden_size": 20}, {"n_valid": 7}]
    changes += [{"seq_len": 15}, {"vocab_size": 270}, {"learning_rates": [1e-3]}, {"cosine": False}]
    for change in changes:
        assert TextEvaluator(small(stories, **change)).describe() != before, change
    for file in stories.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert TextEvaluator(small(tmp_path)).describe() == before
    (tmp_path / "00.txt").write_text("another story about nothing at all\n" * 20)
    assert TextEvaluator(small(tmp_path)).describe() != before


def test_candidates_as_wide_as_the_target(stories):
    settings = text_preset("large-text", text=str(stories), shape="tiny", **{**SHORT, "seq_len": 16, "n_train": 32})
    assert settings.train.widths == Widths(hidden_size=64, num_heads=4, ffn_hidden_size=256)
    assert settings.source.vocab_size == PRESETS["tiny"].vocab_size
    few = dataclasses.replace(settings.source, n_valid=4, n_test=4)
    precise = dataclasses.replace(settings.train, precision="float32", device="cpu")
    score = TextEvaluator(dataclasses.replace(settings, source=few, train=precise)).evaluate(SEQUENCE).score
    assert math.isfinite(score)


def test_less_training_and_other_widths_on_the_same_text(stories):
    evaluator = TextEvaluator(small(stories))
    assert evaluator.at_fidelity(0.25).settings.train.steps == 2
    assert evaluator.at_fidelity(0.25).sample is evaluator.sample
    half = evaluator.scaled(Fraction(1, 2))
    assert half.settings.train.widths == Widths(hidden_size=8, num_heads=1, ffn_hidden_size=12)
    assert half.evaluate(SEQUENCE).score == TextEvaluator(half.settings).evaluate(SEQUENCE).score


def test_a_training_that_diverges_has_no_score_but_a_reason(stories):
    found = TextEvaluator(small(stories, learning_rates=[1e30], cosine=False, warmup_steps=0)).evaluate(SEQUENCE)
    assert math.isnan(found.score)
    assert "no number" in found.details["reason"]
    json.dumps(dict(found.details), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("small-tex", {}, "unknown text evaluator 'small-tex'; did you mean 'small-text'"),
        ("large-text", {}, "large-text needs a shape"),
        ("large-text", {"shape": "1bb"}, "unknown shape '1bb'"),
        ("small-text", {"stepz": 1}, "no setting 'stepz'; did you mean 'steps'"),
        ("small-text", {"metric": "accuracy"}, "no setting 'metric'"),
        ("small-text", {"steps": "many"}, "steps='many'; expected int"),
        ("small-text", {"seq_len": 0}, "seq_len=0; expected at least 1"),
        ("small-text", {"vocab_size": 10}, "vocab_size=10; expected at least 257"),
        ("small-text", {"seeds": 0}, "seeds=0"),
    ],
)
def test_wrong_settings_are_named(name, options, message):
    with pytest.raises(UsageError, match=message):
        text_preset(name, text=["somewhere"], **options)
    with pytest.raises(UsageError, match="needs text"):
        text_preset("small-text", text=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_train": 10**6}, r"training tokens, .* sequences of seq_len=16; n_train=1000000 needs 16,000,001"),
        ({"n_valid": 5000}, "validation tokens, .*n_valid=5000 needs"),
        ({"seq_len": 10**5}, "0 sequences of seq_len=100000; n_train=64 needs"),
        ({"max_bytes": 5}, "max_bytes=5 has no room for a document"),
    ],
)
def test_too_little_text_is_told_with_both_numbers(stories, change, message):
    with pytest.raises(UsageError, match=message):
        TextEvaluator(small(stories, **change))


def test_text_that_is_not_there(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        TextEvaluator(small(tmp_path / "nowhere"))
    with pytest.raises(FileError, match="holds no text"):
        TextEvaluator(small(tmp_path))


def test_a_shape_whose_heads_do_not_fill_it(tmp_path):
    shape = tmp_path / "wide.json"
    shape.write_text(json.dumps(PRESETS["tiny"].as_dict() | {"head_dim": 32}))
    with pytest.raises(UsageError, match="4 heads of 32 and hidden_size=64"):
        text_preset("large-text", text=["x"], shape=str(shape))
