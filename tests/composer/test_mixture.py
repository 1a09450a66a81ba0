"""Blends: exact shares in what is trained on, each source's held-out loss apart, and what cannot be blended."""

import dataclasses
import json

import numpy as np
import pytest

from composer_megatron.arguments import parse_options
from composer_megatron.data_flags import document_flags, load_text
from composer_megatron.errors import FileError, UsageError
from composer_megatron.mixture import Mixture
from composer_megatron.sequence import CompositeSequence
from composer_megatron.text.preprocess import preprocess

from .conftest import STEPS, TRAINED, Place, write_numbers


@pytest.fixture(scope="module")
def folders(place, tmp_path_factory):
    """A place whose ``text`` is one of two text folders of one tokenizer; ``other`` is the second."""
    path = tmp_path_factory.mktemp("blend")
    for name, seed in {"text": 0, "other": 1}.items():
        write_numbers(path / name, TRAINED.shape.vocab_size, seed=seed)
    TRAINED.save(path / "architecture.json")
    return Place(path, place.server)


def load(*argv) -> Mixture:
    return load_text(parse_options(["--architecture", "a.json", *map(str, argv)]))


def test_a_blend_trains_in_exact_shares_and_reports_each_source(folders):
    other = str(folders.path / "other")
    weights = ("--text-weight", "0.7", "--text", other, "--text-weight", "0.3")
    run = folders.run("blend", *weights, "--pipeline-model-parallel-size", "2", processes=2)
    assert run.status == 0, run.output
    index = np.load(next((run.folder / "cache").glob("*BlendedDataset-train-dataset_index.npy")))
    drawn = index[: 8 * STEPS]
    for number in range(1, len(drawn) + 1):
        assert abs(np.count_nonzero(drawn[:number] == 1) - 0.3 * number) <= 1
    total, first, second = (run.scalars(f"lm loss{name} validation") for name in ("", " text", " other"))
    held_out = np.load(next((run.folder / "cache").glob("*BlendedDataset-valid-dataset_index.npy")))[:16]
    share = np.count_nonzero(held_out == 1) / 16
    for iteration, loss in total.items():
        assert loss == pytest.approx(first[iteration] * (1 - share) + second[iteration] * share, rel=1e-6)
        assert abs(first[iteration] - second[iteration]) > 1e-4


def test_shares_follow_from_the_sizes(folders):
    text, other = folders.path / "text", folders.path / "other"
    both = load("--text", text, "--text", other)
    tokens = [folder.train.tokens for folder in both.folders]
    assert both.weights == pytest.approx([count / sum(tokens) for count in tokens], rel=1e-15)
    assert both.names == ("text", "other") and both.tokenizer == text / "tokenizer.json"
    flags = both.flags(None)
    assert flags["--train-data-path"] == (both.weights[0], text / "train", both.weights[1], other / "train")
    assert load("--text", text).flags(None)["--valid-data-path"] == text / "valid"
    assert [each["train_tokens"] for each in both.checksums] == tokens


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (("0.7",), r"1 of --text-weight \(0.7\) for 2 of --text; give each source its weight"),
        (("0.7", "0.4"), r"--text-weight 0.7, 0.4: they sum to 1.1; expected 1"),
        (("1.5", "-0.5"), r"--text-weight 1.5, -0.5: each has to be above 0"),
        (("1", "0"), r"--text-weight 1, 0: each has to be above 0"),
        (("nan", "1"), r"--text-weight nan, 1: each has to be above 0"),
    ],
)
def test_impossible_weights(folders, weights, message):
    flags = [part for weight in weights for part in ("--text-weight=" + weight,)]
    with pytest.raises(UsageError, match=message):
        load("--text", folders.path / "text", "--text", folders.path / "other", *flags)


def test_what_cannot_be_trained_on_together(folders, tmp_path):
    text = folders.path / "text"
    with pytest.raises(UsageError, match="comes twice; give it once"):
        load("--text", text, "--text", f"{text}/../text")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"words {n}"}) + "\n" for n in range(30)))
    made = preprocess([tmp_path / "a.jsonl"], tmp_path / "made", vocab_size=260, workers=1)
    with pytest.raises(UsageError, match=r"made was made with another tokenizer than .*text: .*make it again with"):
        load("--text", text, "--text", made.folder)
    tokenizer = ("--text-tokenizer", made.tokenizer)
    with pytest.raises(UsageError, match="is a text folder, tokenized already, and does not go with raw text"):
        load("--text", tmp_path / "a.jsonl", "--text", text, *tokenizer)
    with pytest.raises(UsageError, match=r"a.jsonl is no text folder, .* needs --text-tokenizer FILE"):
        load("--text", tmp_path / "a.jsonl")
    for argv, message in {
        ("--text-weight", "1"): "options without --text",
        ("--text", text, "--text-field", "x"): "options are for raw text",
        ("--text", tmp_path / "a.jsonl", *tokenizer, "--text-shards", "0"): "--text-shards 0; expected at least 1",
        (
            "--text",
            tmp_path / "a.jsonl",
            *tokenizer,
            "--text-shuffle-megabytes",
            "-1",
        ): "megabytes -1; expected at least",
    }.items():
        with pytest.raises(UsageError, match=message):
            load(*argv)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(FileError, match=r"empty.jsonl holds no text: its files are empty"):
        load("--text", tmp_path / "empty.jsonl", *tokenizer)
    with pytest.raises(FileError, match=r"no such file or folder: .*absent"):
        load("--text", tmp_path / "absent", *tokenizer)


def test_what_document_masks_do_not_go_with():
    with pytest.raises(UsageError, match="mean the same in two ways"):
        document_flags({"reset_attention_mask": True}, TRAINED, document_masks=True)
    assert document_flags({"context_parallel_size": 2}, TRAINED, document_masks=False) == {}
    with pytest.raises(UsageError, match="on our attention alone: use --backend composer"):
        document_flags({"context_parallel_size": 2}, TRAINED, document_masks=True, own_attention=False)
    with pytest.raises(UsageError, match="--reset-attention-mask does not go with"):
        document_flags({"reset_attention_mask": True, "context_parallel_size": 2}, TRAINED, document_masks=False)


def test_a_state_that_runs_on_knows_no_documents():
    mamba = dataclasses.replace(TRAINED, sequence=CompositeSequence.parse("1A1S1M"))
    for given, ours in (({}, True), ({"dataloader_inter_document_masking": True}, False)):
        with pytest.raises(UsageError, match="--document-masks does not go with S blocks, which carry on"):
            document_flags(given, mamba, document_masks=ours)
    assert document_flags({}, mamba, document_masks=False) == {}
    window = dataclasses.replace(TRAINED, sequence=CompositeSequence.parse("1W1M"))
    assert "--dataloader-inter-document-masking" in document_flags({}, window, document_masks=True)
