"""Training on raw text: the numbers of a text folder in the same order, whatever the ranks and wherever it stopped."""

import argparse
import dataclasses
import json

import pytest

from composer_megatron import streaming
from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError, UsageError
from composer_megatron.raw import RawMixture, RawOptions
from composer_megatron.text.preprocess import preprocess

from .conftest import TRAINED, Place

VALID = 0.2


@pytest.fixture(scope="module")
def folders(place, tmp_path_factory):
    """The same documents twice, each as the ``text`` of a place to train: a text folder, and raw."""
    made, raw = (Place(tmp_path_factory.mktemp(name), place.server) for name in ("made", "raw"))
    (raw.path / "text").mkdir()
    lines = [
        json.dumps({"text": "".join(f"{step * number} apples, " for step in range(number % 9 + 1))})
        for number in range(150)
    ]
    (raw.path / "text" / "a.jsonl").write_text("\n".join(lines[:80]))
    (raw.path / "text" / "b.jsonl").write_text("\n".join(lines[80:]))
    info = preprocess([raw.path / "text"], made.path / "text", vocab_size=290, valid_fraction=VALID, workers=1)
    (raw.path / "tokenizer.json").write_bytes(info.tokenizer.read_bytes())
    architecture = Architecture(TRAINED.sequence, dataclasses.replace(TRAINED.shape, vocab_size=290))
    for each in (made, raw):
        architecture.save(each.path / "architecture.json")
    return made, raw


def stream(raw: Place, name: str, *flags: str, megabytes: str = "0", processes: int = 1):
    options = ("--text-tokenizer", f"{raw.path}/tokenizer.json", "--text-valid-fraction", str(VALID))
    return raw.run(name, *options, "--text-shuffle-megabytes", megabytes, *flags, processes=processes)


def test_the_numbers_are_those_of_a_text_folder_in_the_same_order(folders):
    made, raw = folders
    wanted = made.run("made", "--document-masks", fault="read-in-order")
    assert wanted.status == 0, wanted.output
    stream(raw, "raw", "--document-masks").assert_same(wanted)
    (said,) = stream(raw, "other", "--load", str(wanted.folder / "checkpoints")).errors
    assert "was not trained on raw text" in said and "--finetune" in said


@pytest.fixture(scope="module")
def whole(folders):
    """A run on two streams, shuffled, without a stop."""
    run = stream(folders[1], "whole", "--text-shards", "2", megabytes="0.002")
    assert run.status == 0, run.output
    return run


def test_a_run_goes_on_where_it_was_on_other_ranks(folders, whole):
    _, raw = folders
    stop = ("--exit-interval", "5", "--save-interval", "5", "--text-shards", "2")
    stream(raw, "stopped", *stop, processes=2, megabytes="0.002").assert_same(whole, last=5)
    pipeline = ("--pipeline-model-parallel-size", "2")
    stream(raw, "stopped", *pipeline, processes=2, megabytes="0.002").assert_same(whole)


def test_text_that_changed_since_the_checkpoint(folders, whole):
    _, raw = folders
    path = raw.path / "text" / "b.jsonl"
    before = path.read_text()
    try:
        path.write_text(before.replace("apples", "pears.", 1))
        (said,) = stream(raw, "whole", "--train-iters", "9", "--text-shards", "2", megabytes="0.002").errors
    finally:
        path.write_text(before)
    assert "b.jsonl changed since the checkpoint" in said and "restore it, or begin a new run" in said


def test_settings_that_changed_since_the_checkpoint(folders):
    _, raw = folders
    options = RawOptions(tokenizer=raw.path / "tokenizer.json")
    text = RawMixture.load([raw.path / "text"], (), options)
    text.check_same(text.checksums)
    for changed, message in {
        "shuffle_megabytes": "shuffle_bytes 64000000 -> 3000000 changed since the checkpoint",
        "valid_fraction": r"valid_fraction 0.05 -> 0.3 changed",
    }.items():
        value = {"shuffle_megabytes": 3, "valid_fraction": 0.3}[changed]
        other = RawMixture.load([raw.path / "text"], (), dataclasses.replace(options, **{changed: value}))
        with pytest.raises(FileError, match=message):
            other.check_same(text.checksums)
    with pytest.raises(FileError, match="trained on 2 texts, and 1 are given"):
        text.check_same(text.checksums * 2)
    one = RawMixture.load([raw.path / "text" / "a.jsonl"], (), options)
    with pytest.raises(FileError, match="files changed since the checkpoint"):
        one.check_same(text.checksums)


@pytest.mark.parametrize(
    ("shards", "ranks", "batch", "message"),
    [
        (2, 4, 8, "dealt to 2 streams, which 4 data-parallel ranks cannot share equally; use a number of ranks"),
        (6, 2, 8, "--global-batch-size 8 has no equal part of each of 6 streams; use a multiple of 6"),
    ],
)
def test_streams_that_ranks_cannot_share(folders, monkeypatch, shards, ranks, batch, message):
    _, raw = folders
    text = RawMixture.load([raw.path / "text"], (), RawOptions(raw.path / "tokenizer.json", shards=shards))
    monkeypatch.setattr(streaming.parallel_state, "get_data_parallel_world_size", lambda: ranks)
    with pytest.raises(UsageError, match=message):
        streaming.StreamedText(text)._shards(argparse.Namespace(global_batch_size=batch))
