"""Tokenizing: nothing is lost, nothing depends on processes or threads, and long documents are cut without a trace."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.text import tokenizing

TRAINING = """
import sys
from composer_megatron.text.tokenizing import train_tokenizer
print(train_tokenizer([open(sys.argv[1]).read()] * 3, 600).to_str())
"""


def words(count: int, seed: int = 0) -> str:
    """Text of made-up words, punctuation, numbers and indented lines."""
    draw = random.Random(seed)
    letters = "etaoinshrdlu éß漢"
    parts = []
    for _ in range(count):
        word = "".join(draw.choices(letters, k=draw.randint(1, 9)))
        parts.append(word + draw.choice([" ", " ", ", ", ".\n", "\n    ", " 42 ", "  ", "!?\n\n"]))
    return "".join(parts)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizing.train_tokenizer([words(3000)], 400).save(str(path))
    return path


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.sampled_from(["a<|endoftext|>b", "\0\r\n"]))
def test_every_text_comes_back(path: Path, text: str) -> None:
    tokenizer = tokenizing.load_tokenizer(path)
    ((key, size, ids),) = tokenizing.encode_documents([("key", text)], path, 1)
    assert (key, size) == ("key", len(text.encode()))
    assert 0 not in ids
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_the_vocabulary_is_end_of_text_then_bytes_then_pairs(path: Path) -> None:
    tokenizer = tokenizing.load_tokenizer(path)
    assert tokenizing.vocabulary_size(tokenizer) == 400
    assert tokenizing.end_of_text_id(tokenizer, path) == 0
    assert all(len(tokenizer.id_to_token(number)) == 1 for number in range(1, 257))
    assert all(len(tokenizer.id_to_token(number)) > 1 for number in range(257, 400))
    smallest = tokenizing.train_tokenizer(["ab"], 5000)
    assert tokenizing.vocabulary_size(smallest) == tokenizing.SMALLEST_VOCABULARY
    with pytest.raises(UsageError, match="vocab_size=256; expected at least 257"):
        tokenizing.train_tokenizer(["ab"], 256)


def test_training_does_not_depend_on_threads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(5000))
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "a.txt")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "true"}
    found = {
        subprocess.run(
            command, env=environment | {"RAYON_NUM_THREADS": threads}, check=True, capture_output=True, text=True
        ).stdout
        for threads in ("1", "3")
    }
    assert len(found) == 1 and len(json.loads(found.pop())["model"]["merges"]) == 600 - 257


@given(text=st.text(alphabet="ab \n", max_size=80), limit=st.integers(1, 20))
def test_pieces_are_the_text(text: str, limit: int) -> None:
    pieces, last = zip(*tokenizing._pieces(text, limit), strict=True)
    assert "".join(pieces) == text
    assert last == (False,) * (len(pieces) - 1) + (True,)
    assert all(0 < len(piece) <= limit for piece in pieces[:-1]) and len(pieces[-1]) <= limit


@pytest.mark.parametrize("seed", range(3))
def test_cutting_a_long_document_changes_no_token(path: Path, seed: int) -> None:
    tokenizer, text = tokenizing.load_tokenizer(path), words(4000, seed)
    pieces = [piece for piece, _ in tokenizing._pieces(text, 300)]
    assert len(pieces) > 50
    cut = [number for piece in pieces for number in tokenizer.encode(piece).ids]
    assert cut == tokenizer.encode(text).ids


def test_processes_change_nothing(path: Path) -> None:
    """Three batches: many short documents, one of two pieces, one endless word."""
    texts = [words(20, seed) for seed in range(200)] + [words(150_000), "漢" * 5000, "last"]
    assert len(texts[200]) > tokenizing._PIECE
    alone = list(tokenizing.encode_documents(enumerate(texts), path, 1))
    together = list(tokenizing.encode_documents(enumerate(texts), path, 2))
    assert [key for key, _, _ in alone] == [key for key, _, _ in together] == list(range(len(texts)))
    for (_, size, ids), (_, other_size, other_ids), text in zip(alone, together, texts, strict=True):
        assert size == other_size == len(text.encode())
        np.testing.assert_array_equal(ids, other_ids)
    assert not multiprocessing.active_children()


def test_a_process_that_dies(path: Path) -> None:
    encoded = tokenizing.encode_documents(((number, words(60_000)) for number in range(40)), path, 1 + 1)
    next(encoded)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(ComposerError, match=r"a process that worked on text died.*try fewer workers than 2"):
        list(encoded)


def test_settings_inside_a_tokenizer_do_not_shorten_text(path: Path, tmp_path: Path) -> None:
    tokenizer = tokenizing.load_tokenizer(path)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "odd.json"))
    for file in (path, tmp_path / "odd.json"):
        ((_, _, ids),) = tokenizing.encode_documents([(0, "no more and no less than this")], file, 1)
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "no more and no less than this"


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read the tokenizer .*absent\.json: No such file"):
        tokenizing.load_tokenizer(tmp_path / "absent.json")
    for content in ("", "{}", "no JSON", json.dumps({"model": {"type": "BPE"}})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(FileError, match=r"bad\.json is no tokenizer"):
            tokenizing.load_tokenizer(tmp_path / "bad.json")


def test_a_tokenizer_without_end_of_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "</s>": 7}, merges=[]))
    assert tokenizing.end_of_text_id(tokenizer, tmp_path) == 7
    assert tokenizing.vocabulary_size(tokenizer) == 8
    with pytest.raises(FileError, match=r"x\.json has no end-of-text token; expected one of <\|endoftext\|>"):
        tokenizing.end_of_text_id(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), Path("x.json"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ComposerError, match=r'tokenizers is not installed: pip install "composer-megatron\[train\]"'):
        tokenizing.load_tokenizer(path)
