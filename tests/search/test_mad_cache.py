"""Cached data sets: the same arrays, under a key that forgets nothing, whatever happened to the file."""

import numpy as np
import pytest

from composer_megatron.errors import FileError, UsageError
from composer_search import mad
from composer_search.mad.data import Request

ARGUMENTS = {"task": "noisy-in-context-recall", "n_train": 6, "n_test": 4, "seed": 0, "seq_len": 16}


def assert_equal(one, other):
    assert list(one) == list(other)
    for part in one:
        for mine, theirs in zip(one[part], other[part], strict=True):
            assert mine.dtype == theirs.dtype == np.int64
            assert (mine == theirs).all()


@pytest.mark.parametrize("task", mad.TASKS)
def test_a_second_call_reads_what_the_first_one_wrote(task, tmp_path, monkeypatch):
    expected = mad.dataset(task, 6, 4, 0, n_valid=2)
    assert_equal(mad.cached_dataset(tmp_path / "new" / "folder", task, 6, 4, 0, n_valid=2), expected)
    monkeypatch.setattr(Request, "generate", lambda self: pytest.fail("generated again"))
    assert_equal(mad.cached_dataset(str(tmp_path / "new" / "folder"), task, 6, 4, 0, n_valid=2), expected)


@pytest.mark.parametrize("vocab_size", [128, 129, 33_000])
def test_every_token_survives_the_small_type_on_disk(vocab_size, tmp_path):
    arguments = ("compression", 300, 2, 0)
    for _ in range(2):
        data = mad.cached_dataset(tmp_path, *arguments, vocab_size=vocab_size)
        assert_equal(data, mad.dataset(*arguments, vocab_size=vocab_size))
    assert data["train"][0].max() == vocab_size - 1


@pytest.mark.parametrize(
    "change",
    [
        {"task": "in-context-recall", "vocab_size": 32, "noise_vocab_size": 16, "frac_noise": 0.2},
        {"n_train": 7},
        {"n_test": 5},
        {"n_valid": 3},
        {"seed": 1},
        {"vocab_size": 33},
        {"seq_len": 18},
        {"multi_query": False},
        {"noise_vocab_size": 15},
        {"frac_noise": 0.25},
        {"reference_behaviour": True},
    ],
)
def test_every_argument_is_in_the_key(change, tmp_path):
    mad.cached_dataset(tmp_path, **ARGUMENTS)
    changed = mad.cached_dataset(tmp_path, **ARGUMENTS | change)
    assert len(list(tmp_path.iterdir())) == 2
    assert_equal(changed, mad.dataset(**ARGUMENTS | change))


def test_the_generators_version_is_in_the_key(tmp_path, monkeypatch):
    mad.cached_dataset(tmp_path, **ARGUMENTS)
    monkeypatch.setattr("composer_search.mad.data.GENERATOR_VERSION", 2)
    mad.cached_dataset(tmp_path, **ARGUMENTS)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_default_given_in_words_is_the_same_key(tmp_path):
    mad.cached_dataset(tmp_path, **ARGUMENTS)
    mad.cached_dataset(tmp_path, **ARGUMENTS, vocab_size=np.int64(32), frac_noise=0.2, multi_query=True)
    assert len(list(tmp_path.iterdir())) == 1


def damage_by_a_flipped_byte(path, other):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)


DAMAGES = {
    "empty": lambda path, other: path.write_bytes(b""),
    "no archive": lambda path, other: path.write_text("what is this?"),
    "torn": lambda path, other: path.write_bytes(path.read_bytes()[:-50]),
    "flipped byte": damage_by_a_flipped_byte,
    "another key": lambda path, other: path.write_bytes(other.read_bytes()),
    "an array": lambda path, other: np.save(path.open("wb"), np.zeros(3)),
    "wrong shapes": lambda path, other: np.savez(
        path,
        key=Request.of(**ARGUMENTS).key,
        **{f"{part}_{name}": np.zeros((1, 1)) for part in ("train", "test") for name in ("inputs", "targets")},
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(damage, tmp_path):
    expected = mad.cached_dataset(tmp_path / "this", **ARGUMENTS)
    mad.cached_dataset(tmp_path / "other", **ARGUMENTS | {"seed": 1})
    (path,), (other,) = (tmp_path / "this").iterdir(), (tmp_path / "other").iterdir()
    whole = path.read_bytes()
    DAMAGES[damage](path, other)
    assert path.read_bytes() != whole
    assert_equal(mad.cached_dataset(tmp_path / "this", **ARGUMENTS), expected)
    assert list((tmp_path / "this").iterdir()) == [path]
    with np.load(path) as file:
        assert str(file["key"]) == Request.of(**ARGUMENTS).key, "the file is whole again"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match=r"cannot write .*file"):
        mad.cached_dataset(tmp_path / "file", **ARGUMENTS)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(FileError, match=r"cannot write .*No space left"):
        mad.cached_dataset(tmp_path, **ARGUMENTS)
    assert not list(tmp_path.iterdir())


def test_a_bad_setting_leaves_no_file(tmp_path):
    with pytest.raises(UsageError):
        mad.cached_dataset(tmp_path, "compression", 4, 4, 0, seq_len=1)
    assert not list(tmp_path.iterdir())
