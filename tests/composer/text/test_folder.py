"""Reading a text folder back: the damage that can befall it is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from composer_megatron.errors import FileError
from composer_megatron.text.folder import load_text_folder


def test_paths_and_equality(folder: Path) -> None:
    info = load_text_folder(folder)
    assert info == load_text_folder(folder)
    assert (info.tokenizer, info.train_prefix) == (folder / "tokenizer.json", folder / "train")
    assert info.valid_prefix.with_suffix(".bin").is_file()
    values = json.loads((folder / "text.json").read_text())
    assert values.pop("inputs")
    assert values == info.as_dict()


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json", "text.json"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileError, match=name.replace(".", r"\.")):
        load_text_folder(folder)


@pytest.mark.parametrize("side", ["train", "valid"])
def test_torn_token_files(folder: Path, side: str) -> None:
    """Whatever number of bytes is left, the loss is noticed."""
    for suffix in (".bin", ".idx"):
        path = folder / f"{side}{suffix}"
        whole = path.read_bytes()
        for damaged in (*(whole[:end] for end in range(len(whole))), whole + b"\0"):
            path.write_bytes(damaged)
            with pytest.raises(FileError, match=rf"{side}\{suffix}.*make the folder again"):
                load_text_folder(folder)
        path.write_bytes(whole)
    index = folder / f"{side}.idx"
    index.write_bytes(b"X" + index.read_bytes()[1:])
    with pytest.raises(FileError, match="is no index of Megatron's token files"):
        load_text_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, 'expected "format": "composer-text"'),
        ({"version": 2}, "version 2; this program reads version 1"),
        ({"vocab_size": "many"}, "expected a whole number, found 'many'"),
        ({"end_of_text": -1}, "expected a whole number, found -1"),
        ({"train": 3}, "missing or of the wrong type"),
        ({"valid": {"documents": 1}}, "missing or of the wrong type: 'tokens'"),
        ({"sources": None}, "missing or of the wrong type"),
    ],
)
def test_a_description_that_says_something_else(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "text.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileError, match=message):
        load_text_folder(folder)


def test_no_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="absent is no folder: expected a text folder"):
        load_text_folder(tmp_path / "absent")
    (folder / "text.json").write_text("{torn")
    with pytest.raises(FileError, match=r"text\.json is not a text folder's description: line 1"):
        load_text_folder(folder)
