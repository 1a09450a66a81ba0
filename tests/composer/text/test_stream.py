"""Streams of raw text: every document in its turn, and going on at any place as if there had been no stop."""

import itertools
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from composer_megatron.errors import FileError, UsageError
from composer_megatron.text.packing import Blend, Packing, held_out_samples, most_behind
from composer_megatron.text.preprocess import preprocess
from composer_megatron.text.stream import Place, RawText

FRACTION = 0.2


def document(number: int) -> str:
    return f"{number}: " + "some words of text " * (number % 7)


def write(folder: Path) -> Path:
    """97 documents in a jsonl with a blank line and an empty document in it, plain files, and a packed jsonl."""
    folder.mkdir()
    lines = [json.dumps({"text": document(number)}) for number in range(60)]
    (folder / "a.jsonl").write_text("\n".join([*lines[:10], " ", json.dumps({"text": " "}), *lines[10:]]))
    for number in range(60, 67):
        (folder / f"b{number}.txt").write_text(document(number))
    with lzma.open(folder / "c.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"text": document(number)}) + "\n" for number in range(67, 97))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("stream") / "raw")


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    return preprocess([folder], folder.parent / "text", vocab_size=290, valid_fraction=FRACTION, workers=1).folder


def raw(folder: Path, **changed: float) -> RawText:
    return RawText.find(folder, **{"valid_fraction": FRACTION} | changed)


def documents(text: RawText, number: int, place: Place | None = None, **changed: int) -> list[tuple[Place, str]]:
    given = {"shard": 0, "shards": 1, "block_bytes": 300, "seed": 5} | changed
    return list(itertools.islice(text.training(place or Place(), **given), number))


def test_each_epoch_has_every_document_that_is_not_held_out(folder: Path) -> None:
    text = raw(folder)
    held_out = set(text.held_out())
    training = {document(number) for number in range(97)} - held_out
    assert 5 < len(held_out) < 40 and not held_out & training
    number = len(training)
    found = [each for _, each in documents(text, 2 * number)]
    assert set(found[:number]) == set(found[number:]) == training
    assert found[:number] != found[number:]  # another order
    in_order = [each for _, each in documents(text, number, block_bytes=0)]
    assert in_order == [document(each) for each in range(97) if document(each) in training]
    # Within a block of some 300 bytes only: nothing moves far.
    assert max(abs(in_order.index(each) - place) for place, each in enumerate(found[:number])) < 40
    assert [each for _, each in documents(text, number, seed=6)] != found[:number]
    assert [each for _, each in documents(text, 2 * number)] == found


def test_the_sides_are_those_of_a_text_folder(folder: Path, made: Path) -> None:
    """Adding documents moves none of them, so they are the same for any corpus of more than a few."""
    from composer_megatron.text.folder import load_text_folder

    assert load_text_folder(made).valid.documents == len(list(raw(folder).held_out()))


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_share_the_documents(folder: Path, shards: int) -> None:
    text = raw(folder)
    total = 97 - len(set(text.held_out()))
    everything: list[str] = []
    for shard in range(shards):
        found = documents(text, 200, shard=shard, shards=shards)
        everything += [each for place, each in found if place.epoch == 0]
    assert len(everything) == len(set(everything)) == total


@pytest.mark.parametrize("shards", [1, 3])
def test_going_on_at_any_document(folder: Path, shards: int) -> None:
    given = {"shard": shards - 1, "shards": shards}
    whole = documents(raw(folder), 130, **given)
    for stop in range(0, 120, 7):
        place = Place.from_dict(json.loads(json.dumps(whole[stop][0].as_dict())))
        assert documents(raw(folder), 10, place, **given) == whole[stop : stop + 10]


def test_a_file_that_changes_under_way(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw")
    text = raw(folder)
    stream = text.training(Place(), shard=0, shards=1, block_bytes=300, seed=0)
    places = [next(stream)[0] for _ in range(40)]
    (folder / "c.jsonl.xz").write_bytes(b"other")
    with pytest.raises(FileError, match=r"c.jsonl.xz changed under way: it was written to; .*begin a new run"):
        list(stream)
    changed = (folder / "a.jsonl").read_text().replace("some words", "many words")
    (folder / "a.jsonl").write_text(changed)
    with pytest.raises(FileError, match=r"raw changed under way: the documents at which the run stopped are others"):
        documents(raw(folder), 1, places[30], seed=0)
    (folder / "a.jsonl").write_text("")
    for path in folder.glob("[bc]*"):
        path.unlink()
    with pytest.raises(FileError, match=r"raw changed under way: the documents at which the run stopped are gone"):
        documents(raw(folder), 1, places[30], seed=0)


def test_too_few_documents_for_the_streams(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    text = RawText.find(tmp_path, valid_fraction=1e-6)
    assert documents(text, 2, shards=3)[1][1] == "one"
    with pytest.raises(FileError, match=r"no document to train on for stream 1 of 3; give more text, or fewer"):
        documents(text, 1, shard=1, shards=3)
    with pytest.raises(UsageError, match=r"--text-valid-fraction 1; expected a number between 0 and 1"):
        RawText.find(tmp_path, valid_fraction=1)


@pytest.fixture(scope="module")
def packing(made: Path) -> Packing:
    return Packing(made / "tokenizer.json", 0, length=24)


def blend(folder: Path, packing: Packing, state: dict | None = None, **changed: int) -> Blend:
    given = {"shard": 0, "shards": 1, "block_bytes": 300, "seed": 5} | changed
    return Blend([raw(folder)], [1.0], packing, state=state, **given)


def test_the_sequences_are_the_tokens_of_a_text_folder(folder: Path, made: Path, packing: Packing) -> None:
    tokens = np.fromfile(made / "train.bin", np.uint16).astype(np.int64)
    endless = np.tile(tokens, 3)
    for number, sample in enumerate(itertools.islice(blend(folder, packing, block_bytes=0), 2 * len(tokens) // 24)):
        assert sample.tokens.tolist() == endless[24 * number : 24 * number + 25].tolist()
        ends = np.cumsum(sample.documents)
        assert ends[-1] == 24 and min(sample.documents) > 0
        assert (np.flatnonzero(sample.tokens[:-1] == 0) + 1).tolist() == [
            end for end in ends if sample.tokens[end - 1] == 0
        ]
    held_out = np.fromfile(made / "valid.bin", np.uint16).astype(np.int64)
    number = (len(held_out) - 1) // 24
    samples = held_out_samples([raw(folder)], [1.0], packing, number + 2)
    for place, sample in enumerate(samples):
        start = 24 * (place % number)
        assert sample.tokens.tolist() == held_out[start : start + 25].tolist()


def test_going_on_at_any_sequence(folder: Path, packing: Packing) -> None:
    stream = blend(folder, packing)
    whole, states = [], []
    for _ in range(90):
        states.append(json.loads(json.dumps(stream.state)))
        whole.append(next(stream).tokens.tolist())
    for stop in (0, 1, 44, 79):
        again = blend(folder, packing, states[stop])
        assert [next(again).tokens.tolist() for _ in range(10)] == whole[stop : stop + 10]


def test_several_processes_give_the_same(folder: Path, packing: Packing) -> None:
    one, two = blend(folder, packing), blend(folder, Packing(packing.tokenizer, 0, 24, workers=2))
    assert [next(one).tokens.tolist() for _ in range(40)] == [next(two).tokens.tolist() for _ in range(40)]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.05, 0.9, 0.05), (1.0,)])
def test_shares_are_exact_and_those_of_megatron(weights: tuple[float, ...]) -> None:
    from megatron.core.datasets import helpers

    number = 500
    sources, places = np.zeros(number, np.int16), np.zeros(number, np.int64)
    helpers.build_blending_indices(sources, places, np.array(weights), len(weights), number, False)
    taken = [0] * len(weights)
    for index in range(number):
        source = most_behind(taken, weights)
        assert (source, taken[source]) == (sources[index], places[index])
        taken[source] += 1
        assert all(
            abs(count - weight * (index + 1)) <= max(1, len(weights) - 1)
            for count, weight in zip(taken, weights, strict=True)
        )


def test_a_blend_goes_on_in_both_texts(folder: Path, packing: Packing, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"other {n} " * 9}) + "\n" for n in range(50)))
    texts, weights = [raw(folder), raw(tmp_path / "other.jsonl")], [0.25, 0.75]
    given = {"shard": 0, "shards": 1, "block_bytes": 300, "seed": 5}
    stream = Blend(texts, weights, packing, **given)
    first = [next(stream) for _ in range(40)]
    state = stream.state
    assert [sample.source for sample in first].count(1) == 30 and state["taken"] == [10, 30]
    rest = [next(stream).tokens.tolist() for _ in range(20)]
    again = Blend(texts, weights, packing, state=state, **given)
    assert [next(again).tokens.tolist() for _ in range(20)] == rest
    held_out = held_out_samples(texts, weights, packing, 8)
    assert [sample.source for sample in held_out].count(1) == 6
    with pytest.raises(
        FileError, match=r"other.jsonl: the held-out documents have fewer tokens than a sequence of 9999"
    ):
        held_out_samples(texts[1:], [1.0], Packing(packing.tokenizer, 0, 9999), 1)
