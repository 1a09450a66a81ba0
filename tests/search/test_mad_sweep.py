"""The settings that MAD scores: 6 baselines, 66 in all, each different from its baseline in one respect."""

import pickle
from collections import Counter

import pytest

from composer_search import mad

COUNTS = {
    "in-context-recall": 11,
    "noisy-in-context-recall": 14,
    "fuzzy-in-context-recall": 11,
    "memorization": 6,
    "compression": 11,
    "selective-copying": 13,
}


def test_the_sweep_has_mads_66_settings():
    sweep = mad.difficulty_sweep()
    assert len(sweep) == len(set(sweep)) == len({setting.name for setting in sweep}) == 66
    assert Counter(setting.task for setting in sweep) == COUNTS
    assert {setting for setting in sweep if setting.name == setting.task} == set(mad.baseline())
    assert pickle.loads(pickle.dumps(sweep)) == sweep


def test_each_setting_changes_one_thing():
    for setting in mad.difficulty_sweep():
        row = mad.TASKS[setting.task]
        differs = [name for name, value in setting.settings.items() if row.defaults[name] != value]
        assert len(differs) == len(setting.settings)
        assert len(differs) + (setting.n_train != row.n_train) <= 1
        assert setting.n_test == 1_280


@pytest.mark.parametrize("reference_behaviour", [False, True])
def test_every_setting_can_be_generated(reference_behaviour):
    for setting in mad.difficulty_sweep(reference_behaviour=reference_behaviour):
        sampler = mad.TASKS[setting.task].at(**setting.settings)
        assert sampler.reference_behaviour is reference_behaviour
        if sampler.seq_len <= 256:
            data = mad.dataset(setting.task, 2, 2, 0, **setting.settings)
            assert data["train"][0].shape == (2, sampler.length)


def test_names_say_what_differs():
    names = [setting.name for setting in mad.difficulty_sweep()]
    assert names[:3] == ["in-context-recall", "in-context-recall vocab_size=32", "in-context-recall vocab_size=64"]
    assert "noisy-in-context-recall frac_noise=0.8" in names
    assert "selective-copying n_train=800" in names
    assert "memorization vocab_size=8192" in names


def test_a_setting_makes_its_data(tmp_path):
    setting = mad.Setting("compression", 8, 4, (("vocab_size", 32),))
    expected = mad.dataset("compression", 8, 4, 1, n_valid=2, vocab_size=32)
    for cache_dir in (None, tmp_path, tmp_path):
        data = setting.dataset(1, n_valid=2, cache_dir=cache_dir)
        assert all((data[part][0] == expected[part][0]).all() for part in ("train", "valid", "test"))
    assert len(list(tmp_path.iterdir())) == 1
