"""Checking a text folder: a sound one passes, and each kind of damage that leaves the sizes as they are is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from composer_megatron.errors import FileError
from composer_megatron.text.check import check_text_folder
from composer_megatron.text.folder import INDEX_HEADER
from composer_megatron.text.preprocess import preprocess


def test_a_sound_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composer_megatron.text.check._CHUNK", 7)  # documents lie across chunks
    seen: list[tuple[int, int]] = []
    info = check_text_folder(folder, lambda *progress: seen.append(progress))
    assert seen[-1] == (info.train.tokens + info.valid.tokens,) * 2 and seen == sorted(seen)
    assert info.train.sha256 and info.valid.sha256
    description = json.loads((folder / "text.json").read_text())
    del description["train"]["sha256"]
    (folder / "text.json").write_text(json.dumps(description))
    assert check_text_folder(folder).train.sha256 is None  # as older versions wrote it


@pytest.mark.parametrize(
    ("place", "token", "message"),
    [
        (0, 260, r"token 0 is 260, of a vocabulary of 260"),
        (1, 0, r"token 1 is 0: documents and ends of text do not fit"),
        (-1, 5, r"is 5: documents and ends of text do not fit"),
        (1, None, r"train.bin does not have the checksum of text.json"),
    ],
)
def test_changed_tokens(folder: Path, place: int, token: int | None, message: str) -> None:
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    tokens[place] = tokens[place] % 258 + 1 if token is None else token
    tokens.tofile(folder / "train.bin")
    with pytest.raises(FileError, match=message):
        check_text_folder(folder)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("lengths", 1, "its documents have"),
        ("lengths", -1000, "document 3 has no tokens"),
        ("offsets", 2, "document 3 does not begin where the last one ends"),
        ("documents", 1, "its documents are not one sequence each"),
    ],
)
def test_an_inconsistent_index(folder: Path, field: str, change: int, message: str) -> None:
    data = bytearray((folder / "train.idx").read_bytes())
    count = INDEX_HEADER.unpack(data[: INDEX_HEADER.size])[3]
    start = {"lengths": 0, "offsets": 4 * count, "documents": 12 * count}[field] + INDEX_HEADER.size
    values = np.frombuffer(data, np.int32 if field == "lengths" else np.int64, count, start)
    values[3] += change
    (folder / "train.idx").write_bytes(data)
    with pytest.raises(FileError, match=rf"train.idx is inconsistent: {message}"):
        check_text_folder(folder)


def test_another_tokenizer(folder: Path, made: Path) -> None:
    (folder / "a.txt").write_text("some other text, some other words, some other text")
    other = preprocess([folder / "a.txt"], folder / "other", vocab_size=270, workers=1)
    shutil.copy(other.tokenizer, folder / "tokenizer.json")
    with pytest.raises(FileError, match=r"tokenizer.json has .* tokens and end of text 0, text.json says 260 and 0"):
        check_text_folder(folder)
