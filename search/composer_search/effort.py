"""What a search has cost so far and what it has yet to cost, its steps included where it is an incremental one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from composer_search.incremental import step_spaces
from composer_search.region import Region
from composer_search.study import Study, Trial

_COUNTED = 4096
"""Sequences of which those within the constraints are counted: this is asked for at every look at a running search."""


@dataclass(frozen=True)
class Stage:
    """A one-shot search, or one step of an incremental one.

    Attributes:
        length: Blocks of its sequences.
        trials: Those done, in the order of completion.
        total: Trials that it will have; of a step that has not begun under constraints, at most.
    """

    length: int
    trials: tuple[Trial, ...]
    total: int

    @property
    def left(self) -> int:
        """Trials to go."""
        return max(0, self.total - len(self.trials))


@dataclass(frozen=True)
class Effort:
    """The stages of a search.

    Attributes:
        stages: One, or one a step.
    """

    stages: tuple[Stage, ...]

    @property
    def trials(self) -> list[Trial]:
        """All trials done, step by step."""
        return [trial for stage in self.stages for trial in stage.trials]

    @property
    def left(self) -> int:
        """Trials to go."""
        return sum(stage.left for stage in self.stages)

    @property
    def current(self) -> int:
        """The first stage that is not over, from 0; the last one where all are."""
        return next((number for number, stage in enumerate(self.stages) if stage.left), len(self.stages) - 1)

    @property
    def spent(self) -> float:
        """Seconds of all trials."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def to_go(self) -> float | None:
        """Seconds that one worker will need for the trials to go, at the mean of those done; None before the first.

        A trial of a later step is taken to last longer by as much as its sequence has more blocks.
        """
        per_block = [trial.seconds / stage.length for stage in self.stages for trial in stage.trials]
        if not per_block:
            return None
        mean = statistics.fmean(per_block)
        return sum(stage.left * stage.length * mean for stage in self.stages)


def effort(study: Study) -> Effort:
    """The effort of a search, given its study or the study of one of its steps, which then counts as it is given."""
    root = _root(study)
    if root.settings.strategy == "one-shot":
        return Effort((_stage(root),))
    return Effort(tuple(_steps(root, study)))


def _root(study: Study) -> Study:
    """The study that a step belongs to, or the study itself."""
    above = study.path.parent
    if study.path.name.startswith("step-") and (above / "study.json").exists():
        return Study.load(above)
    return study


def _steps(root: Study, given: Study) -> Iterator[Stage]:
    settings = root.settings
    before = 0
    for number, length in step_spaces(settings):
        path = root.path / f"step-{number:02}"
        if path == given.path:
            yield _stage(given)
        elif (path / "study.json").exists():
            yield _stage(Study.load(path))
        else:
            yield Stage(length, (), min(settings.budget, len(settings.space.primitives) ** (length - before)))
        before = length


def _stage(study: Study) -> Stage:
    """A study whose space is known: never more trials than sequences, those that constraints leave if they are few."""
    settings = study.settings
    size = settings.space.size
    if size <= _COUNTED:
        size = Region(settings.space, settings.criteria).size
    total = min(settings.budget, size)
    return Stage(settings.space.length, tuple(study.trials), max(total, len(study.trials)))
