"""The settings at which MAD scores an architecture: six baselines, or 66 that vary one difficulty at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from composer_search.mad.base import Pair
from composer_search.mad.cache import cached_dataset
from composer_search.mad.data import dataset
from composer_search.mad.tasks import TASKS, Value, find_task

_FEWER_EXAMPLES = (6_400, 3_200, 1_600, 800)

CHANGES: Mapping[str, Mapping[str, tuple[Value, ...]]] = MappingProxyType(
    {
        "in-context-recall": {
            "vocab_size": (32, 64, 128),
            "seq_len": (256, 512, 1024),
            "n_train": _FEWER_EXAMPLES,
        },
        "noisy-in-context-recall": {
            "vocab_size": (48, 80, 144),
            "seq_len": (256, 512, 1024),
            "n_train": _FEWER_EXAMPLES,
            "frac_noise": (0.4, 0.6, 0.8),
        },
        "fuzzy-in-context-recall": {
            "vocab_size": (32, 64, 128),
            "seq_len": (256, 512, 1024),
            "n_train": _FEWER_EXAMPLES,
        },
        "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
        "compression": {
            "vocab_size": (32, 64, 128),
            "seq_len": (64, 128, 256),
            "n_train": _FEWER_EXAMPLES,
        },
        "selective-copying": {
            "vocab_size": (32, 64, 128),
            "seq_len": (512, 1024),
            "n_train": _FEWER_EXAMPLES,
            "num_tokens_to_copy": (32, 64, 96),
        },
    }
)
"""What MAD changes from each task's baseline, one value at a time (configs/tasks of athms/mad-lab)."""


@dataclass(frozen=True)
class Setting:
    """One task at one difficulty.

    Attributes:
        task: A name of `TASKS` or `PROXIES`.
        n_train: Training sequences.
        n_test: Test sequences.
        changes: Settings that differ from the baseline, by name; pairs, so that a setting can be hashed and pickled.
    """

    task: str
    n_train: int
    n_test: int
    changes: tuple[tuple[str, Value], ...] = ()

    @property
    def settings(self) -> dict[str, Value]:
        """The changes as keyword arguments of `composer_search.mad.dataset`."""
        return dict(self.changes)

    @property
    def name(self) -> str:
        """The task and what differs from its baseline: ``in-context-recall vocab_size=32``."""
        examples = (("n_train", self.n_train),) if self.n_train != find_task(self.task).n_train else ()
        return " ".join([self.task, *(f"{name}={value}" for name, value in examples + self.changes)])

    def dataset(self, seed: int, *, n_valid: int = 0, cache_dir: Path | None = None) -> dict[str, Pair]:
        """The data at this setting; see `composer_search.mad.dataset` and, with a folder, `cached_dataset`."""
        if cache_dir is None:
            return dataset(self.task, self.n_train, self.n_test, seed, n_valid=n_valid, **self.settings)
        return cached_dataset(cache_dir, self.task, self.n_train, self.n_test, seed, n_valid=n_valid, **self.settings)


def baseline(*, reference_behaviour: bool = False) -> tuple[Setting, ...]:
    """The six tasks at MAD's baseline."""
    return tuple(_at_baseline(task, reference_behaviour) for task in TASKS)


def difficulty_sweep(*, reference_behaviour: bool = False) -> tuple[Setting, ...]:
    """MAD's 66 settings: each task's baseline, and each value of `CHANGES` alone.

    A task's score is the mean over its settings, the total the mean over tasks. Published scores also take at each
    setting the best of six training runs (learning rate .0001, .0005, .001; weight decay 0, .1).
    """
    return tuple(setting for task in TASKS for setting in _around_baseline(task, reference_behaviour))


def _at_baseline(task: str, reference_behaviour: bool) -> Setting:
    row = TASKS[task]
    return Setting(task, row.n_train, row.n_test, (("reference_behaviour", True),) if reference_behaviour else ())


def _around_baseline(task: str, reference_behaviour: bool) -> Iterator[Setting]:
    start = _at_baseline(task, reference_behaviour)
    yield start
    for name, values in CHANGES[task].items():
        for value in values:
            if name == "n_train":
                yield replace(start, n_train=int(value))
            else:
                yield replace(start, changes=(*start.changes, (name, value)))
