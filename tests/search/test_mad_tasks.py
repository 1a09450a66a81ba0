"""The table of tasks, and what is said about settings that are unknown or impossible."""

import dataclasses
import pickle

import numpy as np
import pytest

from composer_megatron.errors import UsageError
from composer_search import mad

NOISE = {"noise_vocab_size": 0, "frac_noise": 0.0}
BASELINES = {
    "in-context-recall": {"vocab_size": 16, "seq_len": 128, "multi_query": True, **NOISE},
    "noisy-in-context-recall": {
        "vocab_size": 32,
        "seq_len": 128,
        "multi_query": True,
        "noise_vocab_size": 16,
        "frac_noise": 0.2,
    },
    "fuzzy-in-context-recall": {
        "vocab_size": 16,
        "seq_len": 128,
        "multi_query": True,
        "k_motif_size": 3,
        "v_motif_size": 3,
        **NOISE,
    },
    "memorization": {"vocab_size": 256, "seq_len": 32, **NOISE},
    "compression": {"vocab_size": 16, "seq_len": 32, **NOISE},
    "selective-copying": {"vocab_size": 16, "seq_len": 256, "num_tokens_to_copy": 16},
}


def test_the_table_holds_mads_baselines():
    assert list(mad.TASKS) == list(BASELINES)
    for name, row in mad.TASKS.items():
        assert row.name == name
        assert row.defaults == BASELINES[name] | {"reference_behaviour": False}
        assert (row.n_train, row.n_test) == (256 if name == "memorization" else 12_800, 1_280)


def test_rows_and_samplers_are_values():
    row = mad.TASKS["compression"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.n_train = 1
    with pytest.raises(TypeError):
        row.defaults["vocab_size"] = 1
    sampler = row.at(vocab_size=np.int32(32))
    assert sampler == row.at(vocab_size=32) and hash(sampler) == hash(row.at(vocab_size=32))
    assert pickle.loads(pickle.dumps(sampler)) == sampler


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("in-context-recal", r"unknown MAD task 'in-context-recal'; did you mean 'in-context-recall'\?"),
        ("selective_coping", r"did you mean 'selective-copying'\?"),
        ("xyz", "known are in-context-recall, noisy-in-context-recall"),
        ("", "unknown MAD task ''"),
        (None, "unknown MAD task None"),
    ],
)
def test_an_unknown_task_is_answered_with_the_nearest(task, message):
    with pytest.raises(UsageError, match=message):
        mad.dataset(task, 1, 1, 0)


RECALL, NOISY, FUZZY = "in-context-recall", "noisy-in-context-recall", "fuzzy-in-context-recall"


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (RECALL, {"vocabsize": 8}, r"has no setting 'vocabsize'; did you mean 'vocab_size'\?$"),
        (RECALL, {"colour": 8}, "has no setting 'colour'; known are vocab_size, seq_len, "),
        (RECALL, {"num_tokens_to_copy": 8}, r"no setting 'num_tokens_to_copy'.*\(.*belongs to selective-copying\)"),
        ("selective-copying", {"frac_noise": 0.1}, "no setting 'frac_noise'.*belongs to in-context-recall, noisy"),
        (RECALL, {"vocab_size": 0}, "in-context-recall: vocab_size=0: expected a whole number from 1 to 131072"),
        (RECALL, {"vocab_size": 1}, "vocab_size=1: expected at least 2 tokens more than its 0 special and 0 noise"),
        (RECALL, {"vocab_size": 2, "multi_query": False}, "vocab_size=2: .* 1 special"),
        (RECALL, {"vocab_size": 10**9}, "vocab_size=1000000000: expected a whole number from 1"),
        (RECALL, {"vocab_size": 16.0}, "vocab_size=16.0: expected a whole number"),
        (RECALL, {"vocab_size": True}, "vocab_size=True: expected a whole number"),
        (RECALL, {"vocab_size": "16"}, "vocab_size='16': expected a whole number"),
        (RECALL, {"seq_len": 127}, "seq_len=127: expected an even number of at least 4"),
        (RECALL, {"seq_len": 2}, "seq_len=2: expected an even number of at least 4"),
        (RECALL, {"multi_query": 1}, "multi_query=1: expected True or False"),
        (RECALL, {"frac_noise": 0.1}, "frac_noise=0.1: noise needs tokens; give noise_vocab_size"),
        (RECALL, {"reference_behaviour": "yes"}, "reference_behaviour='yes': expected True or False"),
        (NOISY, {"frac_noise": 1.0}, "frac_noise=1.0: expected a fraction of at least 0 and below 1"),
        (NOISY, {"frac_noise": -0.1}, "frac_noise=-0.1: expected a fraction"),
        (NOISY, {"frac_noise": float("nan")}, "frac_noise=nan: expected a fraction"),
        (NOISY, {"frac_noise": "much"}, "frac_noise='much': expected a number"),
        (NOISY, {"noise_vocab_size": 31}, "vocab_size=32: expected at least 2 tokens more than its .* 31 noise"),
        (NOISY, {"noise_vocab_size": -1}, "noise_vocab_size=-1: expected a whole number from 0"),
        (FUZZY, {"k_motif_size": 8}, "k_motif_size=8: a motif repeats no token, and the vocabulary has 7 key tokens"),
        (FUZZY, {"v_motif_size": 9}, "v_motif_size=9: .* 8 value tokens"),
        (FUZZY, {"k_motif_size": 0}, "k_motif_size=0: expected a whole number from 1"),
        (FUZZY, {"seq_len": 12}, r"seq_len=12: expected at least .* = 13: the longest key and value must fit twice"),
        (FUZZY, {"vocab_size": 128, "k_motif_size": 12}, r"k_motif_size=12: expected fewer than 2\^63 different keys"),
        ("memorization", {"seq_len": 31}, "seq_len=31: expected an even number"),
        ("memorization", {"vocab_size": 2}, "vocab_size=2: .* 1 special"),
        ("compression", {"seq_len": 1}, "seq_len=1: expected at least 2"),
        ("selective-copying", {"vocab_size": 3}, "vocab_size=3: expected at least 4"),
        ("selective-copying", {"num_tokens_to_copy": 0}, "num_tokens_to_copy=0: expected a whole number from 1"),
        ("selective-copying", {"seq_len": 33}, r"seq_len=33: expected at least 2·num_tokens_to_copy \+ 2 = 34"),
    ],
)
def test_unknown_and_impossible_settings_are_refused_with_the_reason(task, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        mad.dataset(task, 1, 1, 0, **settings)
    assert str(caught.value).startswith(task)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        (RECALL, {"seq_len": 4}),
        (FUZZY, {"seq_len": 13}),
        (FUZZY, {"vocab_size": 128, "k_motif_size": 10, "v_motif_size": 1}),
        (FUZZY, {"k_motif_size": 7, "v_motif_size": 8, "multi_query": True}),
        ("selective-copying", {"seq_len": 34}),
    ],
)
def test_the_outermost_possible_settings_work(task, settings):
    data = mad.dataset(task, 4, 4, 0, **settings)
    assert data["test"][0].shape == (4, mad.TASKS[task].at(**settings).length)
