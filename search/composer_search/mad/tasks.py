"""The tasks in two tables, MAD's six and ours, and the way from a name and settings to a `Sampler`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from composer_megatron.errors import UsageError
from composer_search.mad.associative import MultiQueryRecall
from composer_search.mad.base import Sampler
from composer_search.mad.compression import Compression
from composer_search.mad.copying import SelectiveCopying
from composer_search.mad.fuzzy import FuzzyInContextRecall
from composer_search.mad.memorization import Memorization
from composer_search.mad.recall import InContextRecall, NoisyInContextRecall
from composer_search.mad.state_tracking import Parity, Permutations3, Permutations5
from composer_search.mad.variables import VariableTracking

type Value = int | float | bool
"""A setting's value."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        sampler: Its generator; the fields are its settings, their defaults the baseline.
        n_train: Training sequences at the baseline.
        n_test: Test sequences.
    """

    sampler: type[Sampler]
    n_train: int = 12_800
    n_test: int = 1_280

    @property
    def name(self) -> str:
        """The name people use, such as ``in-context-recall``."""
        return self.sampler.task

    @property
    def defaults(self) -> Mapping[str, Value]:
        """Every setting that the task takes, at the baseline."""
        fields = dataclasses.fields(self.sampler)
        return MappingProxyType({field.name: cast("Value", field.default) for field in fields})

    def at(self, **settings: Value) -> Sampler:
        """The task at the given settings, the rest at the baseline.

        Raises:
            UsageError: For a setting that the task does not take, or a value that it cannot have.
        """
        for name in settings:
            if name not in self.defaults:
                raise UsageError(f"{self.name} has no setting {name!r}{_hint(name, self.defaults)}{_elsewhere(name)}")
        checked: dict[str, Any] = settings  # the names; the sampler checks the values
        return self.sampler(**checked)


_ROWS = (
    Task(InContextRecall),
    Task(NoisyInContextRecall),
    Task(FuzzyInContextRecall),
    Task(Memorization, n_train=256),
    Task(Compression),
    Task(SelectiveCopying),
)

TASKS = MappingProxyType({row.name: row for row in _ROWS})
"""The six tasks of MAD by name, in the order in which reports list them."""


PROXIES = MappingProxyType(
    {
        row.name: row
        for row in (
            Task(MultiQueryRecall),
            Task(Parity),
            Task(Permutations3),
            Task(Permutations5),
            Task(VariableTracking),
        )
    }
)
"""Tasks beside MAD's, on which primitives with a state differ from attention; not part of MAD's score."""


def find_task(name: str) -> Task:
    """The row of a task of either table.

    Raises:
        UsageError: With the nearest name, if there is no such task.
    """
    known = {**TASKS, **PROXIES}
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"unknown MAD task {name!r}{_hint(name, known)}")
    return known[name]


def _hint(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _elsewhere(setting: str) -> str:
    owners = [row.name for row in (*_ROWS, *PROXIES.values()) if setting in row.defaults]
    return f" ({setting} belongs to {', '.join(owners)})" if owners else ""
