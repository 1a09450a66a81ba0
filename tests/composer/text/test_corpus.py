"""Corpus: the split depends on content alone, copies stay together, and samples keep to their size."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_megatron.errors import FileError, UsageError
from composer_megatron.text.corpus import Corpus


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def scan(*files: Path, **changed: Any) -> Corpus:
    values: dict[str, Any] = {"field": "text", "valid_fraction": 0.2, "seed": 0, "max_bytes": None}
    return Corpus.scan(files, **values | {"progress": lambda *_: None} | changed)


def sides(corpus: Corpus) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"train": set(), "valid": set()}
    for split, text in corpus.documents():
        found[split].add(text)
    return found


WORDS = [f"document {number} " + "word " * (number % 40) for number in range(400)]


def test_a_document_keeps_its_side_whatever_is_around_it(tmp_path: Path) -> None:
    everything = sides(scan(write(tmp_path / "all.jsonl", WORDS)))
    one, two = write(tmp_path / "b.jsonl", WORDS[250:]), write(tmp_path / "a.jsonl", WORDS[:250][::-1])
    assert sides(scan(one, two)) == everything
    part = sides(scan(two))
    assert part["train"] < everything["train"]
    assert part["valid"] < everything["valid"]
    assert not everything["train"] & everything["valid"]
    assert sides(scan(one, two, seed=1))["valid"] != everything["valid"]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.9])
def test_the_fraction_is_kept_on_average(tmp_path: Path, fraction: float) -> None:
    texts = [str(number) for number in range(4000)]
    found = sides(scan(write(tmp_path / "a.jsonl", texts), valid_fraction=fraction))
    spread = (fraction * (1 - fraction) / len(texts)) ** 0.5
    # Five standard deviations of independent draws; the hash has no other choice to make.
    assert abs(len(found["valid"]) / len(texts) - fraction) < 5 * spread


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.integers(0, 5), min_size=2, max_size=12),
    fraction=st.sampled_from([1e-9, 0.05, 0.5, 0.999]),
    seed=st.integers(0, 50),
)
def test_both_sides_have_something_and_copies_stay_together(
    tmp_path: Path, numbers: list[int], fraction: float, seed: int
) -> None:
    path = write(tmp_path / "a.jsonl", [f"text {number}" for number in numbers])
    if len(set(numbers)) == 1:
        with pytest.raises(FileError, match=f"all {len(numbers)} documents are the same text"):
            scan(path, valid_fraction=fraction, seed=seed)
        return
    corpus = scan(path, valid_fraction=fraction, seed=seed)
    found = sides(corpus)
    assert found["train"] and found["valid"] and not found["train"] & found["valid"]
    assert [text for _, text in corpus.documents()] == [f"text {number}" for number in numbers]


@pytest.mark.parametrize("count", [2, 3, 10, 300])
@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_the_held_out_side_has_half_its_fraction_of_the_bytes(tmp_path: Path, count: int, fraction: float) -> None:
    for seed in range(10):
        texts = [f"{number} " + "x" * (2000 if number % 3 else 0) for number in range(count)]
        found = sides(scan(write(tmp_path / "a.jsonl", texts), valid_fraction=fraction, seed=seed))
        held_out, training = (sum(map(len, found[split])) for split in ("valid", "train"))
        assert held_out >= fraction / 2 * (held_out + training) or len(found["train"]) == 1
        assert len(found["valid"]) < 0.2 * count + 4 or fraction == 0.5  # and not much more than that


@given(text=st.text(alphabet="ab \n", min_size=2, max_size=60), fraction=st.floats(0.01, 0.99))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_document_is_cut_in_two(tmp_path: Path, text: str, fraction: float) -> None:
    text = "x" + text
    (tmp_path / "a.txt").write_text(text)
    corpus = scan(tmp_path / "a.txt", valid_fraction=fraction)
    (first, head), (second, tail) = corpus.documents()
    assert (first, second, head + tail) == ("train", "valid", text)
    assert head and tail
    assert list(corpus.training_sample(10**6)) == [head]


def test_the_cut_is_at_the_start_of_a_line(tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (_, head), (_, tail) = scan(tmp_path / "a.txt", valid_fraction=0.1).documents()
    assert head.endswith("\n") and tail.startswith("line ")
    assert 0.08 < len(tail) / len(head + tail) < 0.13
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(FileError, match="one character"):
        list(scan(tmp_path / "b.txt").documents())


@pytest.mark.parametrize("limit", [30, 500, 5000, 10**6])
def test_at_most_max_bytes_are_used_and_no_more_would_fit(tmp_path: Path, limit: int) -> None:
    corpus = scan(write(tmp_path / "a.jsonl", WORDS), max_bytes=limit)
    # A document alone would come in two parts.
    used = {"".join(text for _, text in corpus.documents())} if limit == 30 else set.union(*sides(corpus).values())
    left_out = set(WORDS) - used
    total = sum(map(len, used))
    assert total == corpus.bytes <= limit
    assert all(total + len(text) > limit for text in left_out)
    assert used != set(WORDS[: len(used)]) or not left_out  # a sample, not the beginning


def test_a_limit_below_every_document(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_bytes=3 has no room for a document; the smallest has 11 bytes"):
        scan(write(tmp_path / "a.jsonl", WORDS), max_bytes=3)


@pytest.mark.parametrize("limit", [1, 700, 10**6])
def test_the_training_sample_is_of_training_text(tmp_path: Path, limit: int) -> None:
    corpus = scan(write(tmp_path / "a.jsonl", WORDS))
    training = [text for split, text in corpus.documents() if split == "train"]
    sample = list(corpus.training_sample(limit))
    assert sum(map(len, sample)) == min(limit, sum(map(len, training)))
    assert set(sample[:-1]) < set(training) and any(text.startswith(sample[-1]) for text in training)
    if limit == 10**6:
        assert sample == training


def test_no_text_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(FileError, match="no text in 1 file: every document is empty"):
        scan(tmp_path / "a.txt")


@pytest.mark.parametrize("change", [["one", "two", "three"], ["one"], ["one", "other"]])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, change: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    corpus = scan(path)
    write(path, change)
    with pytest.raises(FileError, match="changed while it was read"):
        list(corpus.documents())
