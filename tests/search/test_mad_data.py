"""Data sets are reproducible from one seed, independent across settings, and disjoint in their parts."""

import hashlib
import inspect
import time

import numpy as np
import pytest

from composer_megatron.errors import UsageError
from composer_search import mad


def equal(one, other):
    return one.keys() == other.keys() and all(
        (mine == theirs).all() for part in one for mine, theirs in zip(one[part], other[part], strict=True)
    )


@pytest.mark.parametrize("task", mad.TASKS)
def test_the_same_seed_gives_the_same_arrays_and_another_seed_others(task):
    data = mad.dataset(task, 64, 32, seed=7)
    np.random.seed(0)
    np.random.random(10)  # the global state must not matter
    assert equal(data, mad.dataset(task, 64, 32, seed=7))
    other = mad.dataset(task, 64, 32, seed=8)
    assert all((data[part][0] != other[part][0]).any(axis=1).all() for part in data)


GOLDEN = {
    "in-context-recall": "ec816bf07cf051a6",
    "noisy-in-context-recall": "a0fffd41a9cc961a",
    "fuzzy-in-context-recall": "2de2e1536b20e002",
    "memorization": "d2a198ff0d15be1d",
    "compression": "2d0689891a797af8",
    "selective-copying": "ae86464af375ce33",
}


@pytest.mark.parametrize("task", mad.TASKS)
def test_a_seed_means_the_same_sequences_as_ever(task):
    """If this fails on purpose, raise GENERATOR_VERSION, so that no cache is taken for the new data."""
    data = mad.dataset(task, 16, 16, seed=0)
    digest = hashlib.sha256(b"".join(array.tobytes() for pair in data.values() for array in pair)).hexdigest()
    assert (mad.GENERATOR_VERSION, digest[:16]) == (1, GOLDEN[task])


def test_settings_tasks_and_parts_have_independent_streams():
    """Sequences of 15 uniform tokens agree in 1 of 15 places; with 16 · 256 · 31 places four errors are .003."""
    wide = {"vocab_size": 16, "seq_len": 32}
    sets = [
        mad.dataset("compression", 4096, 1, seed=0, **wide)["train"][0],
        mad.dataset("compression", 4096, 1, seed=1, **wide)["train"][0],
        mad.dataset("compression", 4096, 1, seed=0, reference_behaviour=True, **wide)["train"][0],
        mad.dataset("compression", 1, 4096, seed=0, **wide)["test"][0],
        mad.dataset("compression", 1, 1, seed=0, n_valid=4096, **wide)["valid"][0],
        mad.dataset("compression", 4096, 1, seed=0, vocab_size=16, seq_len=33)["train"][0][:, 1:],
    ]
    for index, one in enumerate(sets):
        assert (one[:256, :31] == one[256:512, :31]).mean() == pytest.approx(1 / 15, abs=0.012), "chunks"
        for other in sets[index + 1 :]:
            assert (one[:, :31] == other[:, :31]).mean() == pytest.approx(1 / 15, abs=0.003)
    noisy = [mad.dataset("noisy-in-context-recall", 256, 1, seed=0, frac_noise=each)["train"][0] for each in (0.2, 0.4)]
    plain = [mad.dataset("in-context-recall", 256, 1, seed=0, multi_query=each)["train"][0] for each in (True, False)]
    for one, other in (noisy, plain):
        agreement = (one[:, :120] == other[:, :120]).mean()
        assert agreement == pytest.approx(1 / 8, abs=0.07)  # 8 keys, 8 values, less where noise meets no noise


def test_a_smaller_training_set_is_the_beginning_of_a_larger_one():
    small, large = (mad.dataset("fuzzy-in-context-recall", n, 64, seed=0, n_valid=8) for n in (100, 700))
    assert (small["train"][0] == large["train"][0][:100]).all()
    assert all((small[part][0] == large[part][0]).all() for part in ("valid", "test"))


def rows(inputs):
    return set(map(tuple, inputs.tolist()))


def test_the_parts_are_disjoint_even_where_few_sequences_exist():
    """Of 3^5 = 243 sequences training takes about 85: 300 draws would hit one of them with certainty."""
    data = mad.dataset("compression", 100, 150, seed=0, n_valid=150, vocab_size=4, seq_len=6)
    assert {part: len(pair[0]) for part, pair in data.items()} == {"train": 100, "valid": 150, "test": 150}
    assert list(data) == ["train", "valid", "test"]
    train, valid, test = (rows(pair[0]) for pair in data.values())
    assert not train & valid and not (train | valid) & test
    assert len(train) < 100, "sequences may repeat within a part"


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("memorization", {"vocab_size": 8, "seq_len": 4}),  # 3 keys in 2 places: 9 sequences
        ("memorization", {"seq_len": 2}),  # a sequence is a key
        ("compression", {"vocab_size": 3, "seq_len": 4}),
        ("in-context-recall", {"vocab_size": 2}),
    ],
)
def test_parts_that_cannot_be_disjoint_are_refused(task, changes):
    with pytest.raises(UsageError, match=rf"^{task} .*seq_len=.* too few different sequences: .*test set"):
        mad.dataset(task, 5_000, 64, seed=0, **changes)


def test_the_issues_signature():
    parameters = inspect.signature(mad.dataset).parameters
    assert list(parameters)[:4] == ["task", "n_train", "n_test", "seed"]
    assert set(mad.dataset("compression", n_train=2, n_test=2, seed=0)) == {"train", "test"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_train": 0}, "n_train=0; expected a whole number of at least 1"),
        ({"n_test": -1}, "n_test=-1"),
        ({"n_valid": -1}, "n_valid=-1"),
        ({"n_train": 1.5}, "n_train=1.5"),
        ({"n_train": True}, "n_train=True"),
        ({"seed": -1}, "seed=-1; expected a whole number of at least 0"),
        ({"seed": "0"}, "seed='0'"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        mad.dataset(**{"task": "compression", "n_train": 2, "n_test": 2, "seed": 0} | arguments)


def test_generation_takes_seconds_where_the_reference_takes_hours():
    """12,800 fuzzy sequences at 128 tokens take .4 s of one core; the bound leaves room for a slow, busy machine."""
    start = time.process_time()
    mad.dataset("fuzzy-in-context-recall", 12_800, 1_280, seed=0, vocab_size=128, seq_len=128)
    assert time.process_time() - start < 8
