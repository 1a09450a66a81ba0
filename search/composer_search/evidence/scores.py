"""Scores of sequences, taken from a study or from a JSON file, in the form in which this package compares them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError, SequenceError, UsageError
from composer_megatron.files import read_json
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS, Shape
from composer_search.evidence.ranks import Floats
from composer_search.study import Study


class ScoredTrial(Protocol):
    """What is needed of a trial: `composer_search.study.Trial` and the report's own both have it."""

    @property
    def sequence(self) -> CompositeSequence:
        """The candidate."""
        ...

    @property
    def score(self) -> float | None:
        """Its score; None for a failed trial."""
        ...

    @property
    def seed_scores(self) -> Sequence[float]:
        """The score of each seed."""
        ...

    @property
    def tasks(self) -> Mapping[str, float]:
        """The score of each task."""
        ...


@dataclass(frozen=True)
class Scores:
    """Scores of different sequences.

    Attributes:
        name: Where they come from, for people.
        sequences: The candidates, n of them.
        values: Their scores, [n]; higher is better.
        seeds: The score of each seed, [n, seeds]; None where there are fewer than two, or not as many for each.
        tasks: Scores of each task that every candidate has, [n] by name.
    """

    name: str
    sequences: tuple[CompositeSequence, ...]
    values: Floats
    seeds: Floats | None = None
    tasks: Mapping[str, Floats] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sequences)

    def at(self, indices: Sequence[int]) -> Scores:
        """The candidates of those indices, in that order."""
        rows = np.asarray(indices, dtype=np.intp)
        seeds = None if self.seeds is None else self.seeds[rows]
        tasks = {name: values[rows] for name, values in self.tasks.items()}
        return Scores(self.name, tuple(self.sequences[row] for row in rows), self.values[rows], seeds, tasks)

    def require_seeds(self) -> Floats:
        """The score of each seed.

        Raises:
            UsageError: If there are fewer than two seeds a candidate.
        """
        if self.seeds is None:
            raise UsageError(
                f"{self.name}: fewer than two seeds for some candidate, so that noise cannot be told from difference; "
                "search with --seeds 3 in another folder"
            )
        return self.seeds

    def view(self, number: int | None) -> tuple[Floats, Floats]:
        """What a search sees, and what its findings are judged by, both [n].

        Args:
            number: The seed whose scores are seen, after the last the first again; the mean of the others
                judges. None for the mean of all in both places.

        Raises:
            UsageError: If there are fewer than two seeds a candidate.
        """
        if number is None:
            return self.values, self.values
        by_seed = self.require_seeds()
        seen = number % by_seed.shape[1]
        return by_seed[:, seen], np.delete(by_seed, seen, axis=1).mean(axis=1)


def scores_of(name: str, trials: Iterable[ScoredTrial]) -> Scores:
    """The scores of the completed trials; of a sequence scored twice, the first."""
    found: dict[CompositeSequence, ScoredTrial] = {}
    for trial in trials:
        if trial.score is not None:
            found.setdefault(trial.sequence, trial)
    each = list(found.values())
    counts = {len(trial.seed_scores) for trial in each}
    even = len(counts) == 1 and min(counts) > 1
    shared = [task for task in (each[0].tasks if each else ()) if all(task in trial.tasks for trial in each)]
    return Scores(
        name=name,
        sequences=tuple(found),
        values=np.array([trial.score for trial in each], dtype=np.float64),
        seeds=np.array([list(trial.seed_scores) for trial in each], dtype=np.float64) if even else None,
        tasks={task: np.array([trial.tasks[task] for trial in each], dtype=np.float64) for task in shared},
    )


def read_scores(source: Path) -> Scores:
    """The scores of a study folder, or of a JSON file that maps sequences to numbers, such as ``{"2A4M": 0.81}``.

    Such a file brings in what was measured elsewhere: for a loss, which is better when lower, its negative.

    Raises:
        FileError: If it is neither, or a score is no finite number.
        UsageError: If a study has no completed trial.
    """
    if source.suffix == ".json":
        return Scores(source.name, *_read_table(source))
    scores = scores_of(str(source), Study.load(source).trials)
    if not len(scores):
        raise UsageError(f"the study {source} has no completed trial yet")
    return scores


def _read_table(path: Path) -> tuple[tuple[CompositeSequence, ...], Floats]:
    found: dict[CompositeSequence, float] = {}
    for text, value in read_json(path, "a table of scores").items():
        try:
            sequence = CompositeSequence.parse(text)
        except SequenceError as error:
            raise FileError(f'{path}: expected sequences and scores, such as {{"2A4M": 0.81}}; {error}') from None
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise FileError(f"{path}: the score of {text} is {value!r}; expected a finite number")
        if sequence in found:
            raise FileError(f"{path}: {sequence} is there twice; remove one of the two")
        found[sequence] = float(value)
    return tuple(found), np.array(list(found.values()), dtype=np.float64)


def parameters(sequences: Iterable[CompositeSequence], shape: Shape | None = None) -> Floats:
    """Elements of the blocks' matrices of each sequence at one shape, by default 1b's widths: [n].

    Within sequences of one length this ranks as any count of parameters does wherever an MLP block is the bigger one.
    """
    widths = shape or PRESETS["1b"]
    return np.array([Architecture(each, widths).matrix_parameters for each in sequences], dtype=np.float64)
