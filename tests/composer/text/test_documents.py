"""Documents: every form of file gives back the same texts, and every bad file is one clear error."""

import gzip
import json
import lzma
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.errors import FileError, UsageError
from composer_megatron.text.documents import read_documents, source_files, standard_library_sources

PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py", ".log", ""])
def test_plain_text_is_one_document_a_file(tmp_path: Path, suffix: str, packed: str) -> None:
    text = "first\r\nsecond — ünïcode 漢字\n\n\ttabs and no end of line"
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACKERS[packed](text.encode()))
    assert list(read_documents([path])) == [text]


@given(texts=st.lists(TEXT, max_size=6), packed=st.sampled_from(list(PACKERS)), ascii_only=st.booleans())
def test_jsonl_is_one_document_a_line(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], packed: str, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / f"a.jsonl{packed}"
    lines = [json.dumps({"src": "x", "body": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes(PACKERS[packed]("\n".join(lines).encode()))
    assert list(read_documents([path], field="body")) == [text for text in texts if text.strip()]


def test_a_folder_is_walked_in_order_and_each_file_read_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "a.TXT", "c.jsonl.xz", "picture.png", ".hidden.txt", ".git/x.txt", "data.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = json.dumps({"text": name}).encode() if "jsonl" in name else name.encode()
        path.write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.TXT")
    (tmp_path / "round").symlink_to(tmp_path)
    assert list(read_documents([tmp_path])) == ["a.TXT", "c.jsonl.xz", "b/1.md", "b/2.txt"]
    assert list(read_documents([tmp_path / "b/2.txt", tmp_path])) == ["b/2.txt", "a.TXT", "c.jsonl.xz", "b/1.md"]
    assert list(read_documents([tmp_path / "data.json"])) == ["data.json"]


def test_a_mark_at_the_start_and_blank_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufefftext".encode())
    (tmp_path / "b.txt").write_bytes(b" \n\t\r\n")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": ""}\n\n{"text": "line"}\r\n{"text": " "}\n')
    assert list(read_documents([tmp_path])) == ["text", "line"]


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff\xfec", r"a\.txt: not text in UTF-8: byte 2 \(0xff\)"),
        ("a.txt", b"\xef\xbb\xbfab\xff", r"byte 2 \(0xff\)"),
        ("a.txt", "wide".encode("utf-16-le"), r"a\.txt: binary data, not text: byte 1 is zero"),
        ("a.jsonl", GOOD + b'{"text": "cut', r"a\.jsonl, line 2: not JSON: .*mend or remove the line"),
        ("a.jsonl", GOOD + b"\n" + b'"text"', r"a\.jsonl, line 3: expected a JSON object, found str"),
        ("a.jsonl", b'{"body": "x", "id": 3}', r"line 1: no field 'text'; its fields: 'body', 'id'"),
        ("a.jsonl", b"{}", r"no field 'text'; its fields: none"),
        ("a.jsonl", b'{"text": ["x"]}', r"field 'text' holds list; expected text"),
        ("a.jsonl", GOOD + b'{"text": "a\\ud800"}', r"line 2: character 1 of 'text' is half a surrogate pair"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}', r"a\.jsonl, line 2: not text in UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"line 1: not JSON"),
        ("a.jsonl.gz", gzip.compress(GOOD + b"{", mtime=0), r"a\.jsonl\.gz, line 2: not JSON"),
        ("a.txt.xz", b"not packed", r"a\.txt\.xz is no sound \.xz file"),
        ("a.txt.gz", b"not packed", r"cannot read .*a\.txt\.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 100, mtime=0)[:-6] + b"\0\0\0\0\0\0", r"a\.txt\.gz: CRC check failed"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        list(read_documents([path]))


@pytest.mark.parametrize("packed", [".gz", ".xz"])
def test_a_packed_file_cut_anywhere_is_an_error(tmp_path: Path, packed: str) -> None:
    whole = PACKERS[packed](GOOD * 20)
    path = tmp_path / f"a.jsonl{packed}"
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(FileError, match=r"a\.jsonl"):
            list(read_documents([path]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="cut off"):
        list(read_documents([path]))


def test_paths_that_hold_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no text is named"):
        source_files([])
    with pytest.raises(FileError, match=r"no such file or folder: .*absent"):
        source_files([tmp_path / "absent"])
    with pytest.raises(FileError, match=r"holds no text: expected files ending in \.txt"):
        source_files([tmp_path])
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(FileError, match="neither a file nor a folder"):
        source_files([tmp_path / "pipe.txt"])
    with pytest.raises(FileError, match="cannot read /proc/self/mem: Input/output error"):
        list(read_documents([Path("/proc/self/mem")]))

    def forbidden(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch, pytest.raises(FileError, match=f"cannot read {tmp_path}: Permission denied"):
        patch.setattr(os, "scandir", forbidden)
        source_files([tmp_path])


def test_the_standard_library_is_all_text_without_tests_or_installed_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = standard_library_sources()
    names = [file.relative_to(root).as_posix() for file in files]
    assert {"json/decoder.py", "ast.py", "unittest/case.py"} <= set(names)
    assert not {"test", "tests", "site-packages", "encodings"} & {part for name in names for part in name.split("/")}
    assert files == standard_library_sources()
    assert [name.split("/") for name in names] == sorted(name.split("/") for name in names)
    # A demo wants 5 to 20 MB; this also reads every file.
    assert 5e6 < sum(len(text.encode()) for text in read_documents(files)) < 20e6


def test_a_python_without_library_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileError, match="keeps no library sources under"):
        standard_library_sources()
