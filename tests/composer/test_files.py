"""Files: what was there before survives every failure."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.errors import FileError
from composer_megatron.files import append_json_line, read_json, read_json_lines, write_json, write_text


def test_write_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"a": 1})
    assert read_json(path, "a value") == {"a": 1}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        write_text(path, "new")
    assert read_json(path, "a value") == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_append_takes_back_a_line_that_did_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    append_json_line(path, {"trial": 0})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=r"log\.jsonl: No space left"):
            append_json_line(path, {"trial": 1})
    assert read_json_lines(path) == [{"trial": 0}]
    append_json_line(path, {"trial": 1})
    assert read_json_lines(path) == [{"trial": 0}, {"trial": 1}]


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20), max_size=3), max_size=5),
    data=st.data(),
)
def test_a_torn_last_line_costs_only_itself(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    lines = [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept, end = [], 0
    for row, line in zip(rows, lines, strict=True):
        end += len(line)
        if end - 1 <= cut:  # all but the newline is there
            kept.append(row)
    assert read_json_lines(path, repair=True) == kept
    append_json_line(path, {"next": True})
    assert read_json_lines(path) == [*kept, {"next": True}]


def test_reading_alone_repairs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    assert read_json_lines(path) == [{"a": 1}]
    assert path.read_text() == '{"a": 1}\n{"b"'


def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(FileError, match=r"log\.jsonl, line 2"):
        read_json_lines(path, repair=True)
    assert read_json_lines(tmp_path / "absent.jsonl") == []


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileError, match="taken"):
        append_json_line(tmp_path / "taken", {})
    with pytest.raises(FileError, match="taken"):
        write_text(tmp_path / "taken", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file"):
        write_text(tmp_path / "file" / "below", "x")
