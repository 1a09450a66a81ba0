"""Text folders: decoded tokens are the documents, every count is exact, and a folder is whole or absent."""

import contextlib
import fcntl
import gzip
import json
import logging
import lzma
import math
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.text import corpus, parts
from composer_megatron.text.preprocess import TextInfo, load_text_folder, preprocess, read_documents
from composer_megatron.text.tokenizing import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")

FILES = ("tokenizer.json", "train.bin", "train.idx", "valid.bin", "valid.idx", "text.json")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def article(number: int) -> str:
    return "\n".join(f"{number}. the {number * line} — cats of §{line} sat\r" for line in range(number % 7 + 1))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in all forms: 6 plain files, 3 x 20 lines, an empty one, one twice, one with an end of text in it."""
    folder = tmp_path_factory.mktemp("sources")
    for number, suffix in enumerate((".txt", ".md", ".rst", ".py", ".txt.gz", ".md.xz")):
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(suffix[-3:], bytes)
        (folder / f"plain{suffix}").write_bytes(pack(article(number).encode()))
    for number, suffix in enumerate((".jsonl", ".jsonl.gz", ".jsonl.xz")):
        lines = [json.dumps({"text": article(20 * number + line + 10), "src": "x"}) for line in range(20)]
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(suffix[-3:], bytes)
        (folder / f"lines{suffix}").write_bytes(pack("\n".join(lines).encode()))
    (folder / "empty.txt").write_text("")
    (folder / "plain_again.txt").write_bytes(article(3).encode())
    (folder / "z.txt").write_text("an <|endoftext|> in the middle ends nothing")
    return folder


@pytest.fixture(scope="module")
def made(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> TextInfo:
    output = tmp_path_factory.mktemp("made") / "deep" / "text"
    return preprocess([sources], output, vocab_size=300, valid_fraction=0.2, workers=1)


def sequences(prefix: Path) -> list[list[int]]:
    """The token files as Megatron reads them for training."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[index].tolist() for index in range(len(dataset))]


def test_decoded_tokens_are_the_documents(made: TextInfo, sources: Path) -> None:
    tokenizer = load_tokenizer(made.tokenizer)
    decoded = {}
    for name, prefix in (("train", made.train_prefix), ("valid", made.valid_prefix)):
        rows = sequences(prefix)
        assert all(row[-1] == made.end_of_text == 0 and 0 not in row[:-1] for row in rows)
        decoded[name] = [tokenizer.decode(row[:-1], skip_special_tokens=False) for row in rows]
    read = list(read_documents([sources]))
    assert len(read) == 68
    assert Counter(decoded["train"] + decoded["valid"]) == Counter(read)
    for texts in decoded.values():
        assert texts == [text for text in read if text in texts]  # in reading order
    assert len(decoded["valid"]) > 3 and not set(decoded["train"]) & set(decoded["valid"])


def test_counts_are_exact(made: TextInfo, sources: Path) -> None:
    for prefix, split in ((made.train_prefix, made.train), (made.valid_prefix, made.valid)):
        tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
        assert split.tokens == len(tokens)
        assert split.documents == np.count_nonzero(tokens == 0)
    read = list(read_documents([sources]))
    assert made.train.documents + made.valid.documents == len(read)
    assert made.train.bytes + made.valid.bytes == sum(len(text.encode()) for text in read)
    tokenizer = load_tokenizer(made.tokenizer)
    held_out = [tokenizer.decode(row) for row in sequences(made.valid_prefix)]
    assert made.valid.bytes == sum(len(text.encode()) for text in held_out)
    assert made.vocab_size == tokenizer.get_vocab_size() == 300


def test_unigram_numbers(made: TextInfo) -> None:
    """Against exact probabilities, one token at a time."""
    train = Counter(token for row in sequences(made.train_prefix) for token in row)
    valid = [token for row in sequences(made.valid_prefix) for token in row]
    total = sum(train.values()) + made.vocab_size
    nats = math.fsum(-math.log(Fraction(train[token] + 1, total)) for token in valid)
    # Both are float64 sums of at most some thousand terms.
    assert made.unigram_nats_per_token == pytest.approx(nats / len(valid), rel=1e-12)
    assert made.unigram_bits_per_byte == pytest.approx(nats / math.log(2) / made.valid.bytes, rel=1e-12)


def test_the_tokenizer_has_not_seen_the_held_out_side(made: TextInfo) -> None:
    tokenizer = load_tokenizer(made.tokenizer)
    training = [tokenizer.decode(row[:-1], skip_special_tokens=False) for row in sequences(made.train_prefix)]
    assert train_tokenizer(training, 300).to_str(pretty=True) == made.tokenizer.read_text()


def test_two_processes_write_the_same_bytes(made: TextInfo, sources: Path, tmp_path: Path) -> None:
    other = preprocess([sources], tmp_path / "text", vocab_size=300, valid_fraction=0.2, workers=2)
    for name in FILES:
        assert (other.folder / name).read_bytes() == (made.folder / name).read_bytes()
    assert names(other.folder) == sorted(FILES)
    assert other.as_dict() == made.as_dict() == load_text_folder(other.folder).as_dict()


def test_text_json_is_what_other_stages_read(made: TextInfo, sources: Path) -> None:
    values = json.loads((made.folder / "text.json").read_text())
    inputs = values.pop("inputs")
    assert inputs["vocab_size"] == 300 and inputs["valid_fraction"] == 0.2
    assert values["sources"] == [str(sources)]
    assert (values["format"], values["version"], values["vocab_size"], values["end_of_text"]) == (
        "composer-text",
        1,
        300,
        0,
    )
    assert values["train"].keys() == {"documents", "tokens", "bytes", "sha256"}
    extra = {"sha256", "unigram_nats_per_token", "unigram_bits_per_byte"}
    assert values["valid"].keys() == {"documents", "tokens", "bytes"} | extra


def test_the_same_again_is_returned_at_once(made: TextInfo, sources: Path) -> None:
    before = {name: (made.folder / name).stat().st_mtime_ns for name in FILES}

    def never(*_: object) -> None:
        raise AssertionError("work was done again")

    again = preprocess([sources], made.folder, vocab_size=300, valid_fraction=0.2, workers=2, progress=never)
    assert again == made
    assert before == {name: (made.folder / name).stat().st_mtime_ns for name in FILES}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 301}, "vocab_size 300 -> 301 changed"),
        ({"vocab_size": None}, "vocab_size 300 -> 4096"),
        ({"valid_fraction": 0.3}, "valid_fraction 0.2 -> 0.3"),
        ({"seed": 1, "max_bytes": 500}, "max_bytes None -> 500, seed 0 -> 1 changed"),
        ({"paths": None}, "source_files changed"),
    ],
)
def test_a_folder_made_otherwise_is_left_alone(
    made: TextInfo, sources: Path, changed: dict[str, Any], message: str
) -> None:
    before = {name: (made.folder / name).read_bytes() for name in FILES}
    arguments = {"paths": [sources], "vocab_size": 300, "valid_fraction": 0.2} | changed
    with pytest.raises(UsageError, match=message):
        preprocess(output=made.folder, **arguments)
    assert before == {name: (made.folder / name).read_bytes() for name in FILES}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """20 documents in one file."""
    path = tmp_path / "in" / "small.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": article(number)}) + "\n" for number in range(20)))
    return path


def test_a_changed_source_is_noticed(small: Path, tmp_path: Path) -> None:
    preprocess([small], tmp_path / "out" / "text", vocab_size=260, workers=1)
    status = small.stat()
    os.utime(small, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UsageError, match="source_files changed"):
        preprocess([small], tmp_path / "out" / "text", vocab_size=260, workers=1)


def test_what_is_in_the_way_stays(small: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="occupied exists and holds something else than text"):
        preprocess([small], occupied)
    with pytest.raises(UsageError, match=r"thesis\.txt exists and is no folder"):
        preprocess([small], occupied / "thesis.txt")
    with pytest.raises(FileError, match=r"cannot make .*thesis\.txt.*: Not a directory"):
        preprocess([small], occupied / "thesis.txt" / "text")
    assert (occupied / "thesis.txt").read_text() == "mine" and names(occupied) == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert preprocess([small], tmp_path / "empty", vocab_size=260, workers=1).folder == tmp_path / "empty"


@pytest.mark.parametrize("stage", ["read", "tokenizer", "encode"])
def test_an_interruption_leaves_nothing_but_finished_parts(small: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(now: str, done: int, total: int | None) -> None:
        if now == stage and (stage == "tokenizer" or done):
            assert names(tmp_path / "out") == [".text.partial"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess([small], tmp_path / "out" / "text", vocab_size=260, workers=1, progress=interrupt)
    assert names(tmp_path / "out") == ([".text.partial"] if stage == "encode" else [])


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write more than `size` bytes into a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1000, 40_000])
def test_a_full_disk_leaves_nothing(small: Path, tmp_path: Path, size: int) -> None:
    """1000 bytes stop the tokenizer, 40,000 the tokens."""
    small.write_text("".join(json.dumps({"text": f"{number} word " * 1000}) + "\n" for number in range(40)))
    output = tmp_path / "out" / "text"
    with largest_file(size), pytest.raises(FileError, match=r"cannot write .*partial.*: File too large") as failure:
        preprocess([small], output, vocab_size=260, workers=1)
    still_open = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert failure.tb is not None  # keeps alive what was at work
    assert not [name for name in still_open if ".text.partial" in name]
    assert names(output.parent) == []


def test_what_a_killed_process_left_is_cleared(small: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out" / ".text.partial"
    partial.mkdir(parents=True)
    (partial / "train.bin").write_bytes(b"torn")
    (partial / "old").write_bytes(b"torn")
    info = preprocess([small], tmp_path / "out" / "text", vocab_size=260, workers=1)
    assert names(info.folder) == sorted(FILES) and names(tmp_path / "out") == ["text"]


KILLED = """
import os, signal, sys
from pathlib import Path
from composer_megatron.text import parts, preprocess
parts.PART_BYTES = 300
def kill(stage, done, total):
    if stage == "encode" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
preprocess.preprocess([Path(sys.argv[1])], Path(sys.argv[2]), vocab_size=260, workers=1, progress=kill)
"""


def test_a_killed_process_is_taken_up_where_it_was(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 300)
    whole = preprocess([small], tmp_path / "whole", vocab_size=260, workers=1)
    output, left = tmp_path / "out" / "text", tmp_path / "out" / ".text.partial" / "parts"
    done = subprocess.run([sys.executable, "-c", KILLED, str(small), str(output)], check=False)
    assert done.returncode == -signal.SIGKILL and names(tmp_path / "out") == [".text.partial"]
    finished = sorted(left.glob("part-*"))
    assert len(finished) > 2
    # A damaged part is made again, a torn one never had the name.
    data = bytearray(finished[0].read_bytes())
    data[len(data) // 3] ^= 1
    finished[0].write_bytes(data)
    (left / ".part-000099.npz").write_bytes(b"torn")
    encoded: list[Path] = []
    encode_part = parts._encode_part

    def note(task: Any) -> None:
        encoded.append(task.file)
        encode_part(task)

    monkeypatch.setattr(parts, "_encode_part", note)
    info = preprocess([small], output, vocab_size=260, workers=1)
    assert finished[0] in encoded and not set(encoded) & set(finished[1:])
    assert names(info.folder) == sorted(FILES) and names(tmp_path / "out") == ["text"]
    for name in FILES[:-1]:
        assert (info.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_kill_before_the_last_rename(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is written but the folder's name: the next call only renames."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out" / "text"
    with monkeypatch.context() as patch:
        patch.setattr("composer_megatron.text.preprocess.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            preprocess([small], output, vocab_size=260, workers=1)
    assert names(tmp_path / "out") == [".text.partial"]

    def never(*_: object) -> None:
        raise AssertionError("work was done again")

    info = preprocess([small], output, vocab_size=260, workers=1, progress=never)
    assert names(info.folder) == sorted(FILES) and names(tmp_path / "out") == ["text"]


def test_parts_and_ranges_change_nothing(
    made: TextInfo, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    monkeypatch.setattr(corpus, "_RANGE", 777)
    other = preprocess([sources], tmp_path / "text", vocab_size=300, valid_fraction=0.2, workers=2)
    for name in FILES:
        assert (other.folder / name).read_bytes() == (made.folder / name).read_bytes()


def test_two_at_once_do_not_mix(small: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".text.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match=r"another process is making .*text; wait for it"):
        preprocess([small], tmp_path / "text", vocab_size=260, workers=1)
    assert partial.is_dir()
    os.close(lock)
    preprocess([small], tmp_path / "text", vocab_size=260, workers=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 256}, "vocab_size=256; expected at least 257"),
        ({"vocab_size": 300, "tokenizer": Path("t.json")}, "vocab_size=300 beside tokenizer t.json: give one"),
        ({"valid_fraction": 0.0}, "valid_fraction=0.0; expected a number between 0 and 1"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0"),
        ({"valid_fraction": math.nan}, "valid_fraction=nan"),
        ({"max_bytes": 0}, "max_bytes=0; expected at least 1"),
        ({"seed": -1}, "seed=-1; expected a whole number from 0"),
        ({"workers": 0}, "workers=0; expected at least 1"),
        ({"paths": []}, "no text is named"),
        ({"max_bytes": 2}, "max_bytes=2 has no room for a document"),
    ],
)
def test_impossible_settings(small: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        preprocess(**{"paths": [small], "output": tmp_path / "out" / "text"} | arguments)
    assert not (tmp_path / "out" / "text").exists() and not list(tmp_path.glob("out/.*"))


def test_bad_text_leaves_nothing(small: Path, tmp_path: Path) -> None:
    with small.open("a") as file:
        file.write('{"text": "torn')
    for paths, message in (([small], "line 21: not JSON"), ([tmp_path / "absent"], "no such file or folder")):
        with pytest.raises(FileError, match=message):
            preprocess(paths, tmp_path / "out" / "text")
    small.write_text("\n\n")
    with pytest.raises(FileError, match="no text in 1 file"):
        preprocess([small], tmp_path / "out" / "text")
    with pytest.raises(FileError, match="cannot read the tokenizer"):
        preprocess([small], tmp_path / "out" / "text", tokenizer=tmp_path / "absent.json")
    assert names(tmp_path / "out") == []


def test_a_given_tokenizer_with_a_large_vocabulary(small: Path, tmp_path: Path) -> None:
    """Ids above 65,535 need four bytes each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: 70_000 + number for number, letter in enumerate(alphabet)} | {"</s>": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "mine.json"))
    info = preprocess([small], tmp_path / "text", tokenizer=tmp_path / "mine.json", workers=1)
    assert (info.vocab_size, info.end_of_text) == (70_256, 2)
    for prefix, split in ((info.train_prefix, info.train), (info.valid_prefix, info.valid)):
        assert split.tokens == split.bytes + split.documents  # one token a byte
        tokens = np.fromfile(f"{prefix}.bin", dtype=np.int32)
        assert np.count_nonzero(tokens == 2) == split.documents and len(tokens) == split.tokens
    texts = {tokenizer.decode(row[:-1]) for row in sequences(info.train_prefix) + sequences(info.valid_prefix)}
    assert texts == set(read_documents([small]))
    assert preprocess([small], tmp_path / "text", tokenizer=tmp_path / "mine.json") == info
    train_tokenizer(["other"], 260).save(str(tmp_path / "other.json"))
    with pytest.raises(UsageError, match=r"tokenizer .* changed"):
        preprocess([small], tmp_path / "text", tokenizer=tmp_path / "other.json")


def test_one_plain_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {number}\n" for number in range(1000)))
    info = preprocess([tmp_path / "book.txt"], tmp_path / "text", vocab_size=260, valid_fraction=0.1, workers=1)
    assert (info.train.documents, info.valid.documents) == (1, 1)
    assert info.train.bytes + info.valid.bytes == (tmp_path / "book.txt").stat().st_size


def test_the_default_is_a_sample_of_the_standard_library(tmp_path: Path) -> None:
    info = preprocess(None, tmp_path / "text", vocab_size=512, max_bytes=300_000, workers=1)
    assert 250_000 < info.train.bytes + info.valid.bytes <= 300_000
    assert info.sources == (f"Python {sys.version.split()[0]} standard library",)
    assert "self" in load_tokenizer(info.tokenizer).get_vocab()


def test_missing_megatron_is_named(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.datasets", None)
    with pytest.raises(ComposerError, match=r'is not installed: pip install "composer-megatron\[train\]"'):
        preprocess([small], tmp_path / "out" / "text")
    assert not (tmp_path / "out").exists()
    assert logging.root.manager.disable == 0  # silenced for that import alone
