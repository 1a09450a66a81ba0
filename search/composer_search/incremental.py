"""Incremental strategies: grow the sequence by a few blocks a step, around the best one so far (arXiv 2510.00379).

``end`` adds the blocks after it, ``middle`` between its halves. Each step is a study of its own, in a folder of the
search's, whose space has the earlier blocks fixed; so a search goes on in the step and at the trial where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.proposers import make_proposer
from composer_search.region import Region
from composer_search.space import Space
from composer_search.study import Study, StudySettings, Trial


def step_spaces(settings: StudySettings) -> Iterator[tuple[int, int]]:
    """The number and the length of each step's sequences: `step` blocks more each time, up to the whole length."""
    for number, length in enumerate(
        range(settings.step, settings.space.length + settings.step, settings.step), start=1
    ):
        yield number, min(length, settings.space.length)


def step_space(settings: StudySettings, length: int, found: str) -> Space:
    """The space of a step whose sequences have `length` blocks, those of `found` among them."""
    half = len(found) if settings.strategy == "end" else (len(found) + 1) // 2
    return Space(settings.space.primitives, length, prefix=found[:half], suffix=found[half:])


def step_line(space: Space, number: int, steps: int) -> str:
    """What a step does, for people: ``step 2 of 4: 4 blocks after 1A3M``."""
    prefix, suffix = (CompositeSequence(each).notation if each else "" for each in (space.prefix, space.suffix))
    place = f" between {prefix} and {suffix}" if suffix else f" after {prefix}" if prefix else ""
    return f"step {number} of {steps}: {space.free} block{'s' if space.free > 1 else ''}{place}"


def search_steps(
    settings: StudySettings,
    path: Path | str,
    describe: Callable[[int], Mapping[str, Any]],
    run: Callable[[Study], None],
) -> Study:
    """Search step by step; return the study, which then holds the last step's trials.

    `study.json` lists the steps that are done. Nothing but the steps' own logs decides how it goes on.

    Args:
        settings: Of the whole search.
        path: Its folder.
        describe: The evaluator's settings for sequences of a length.
        run: Runs the trials that a step's study lacks.

    Raises:
        UsageError: If a setting is wrong, or a study was made with others.
        ComposerError: If no trial of a step was completed, or as `run` does.
    """
    _check(settings, describe)
    with Study.open(path, settings) as study:
        found, steps, trials = "", [], list[Trial]()
        for number, length in step_spaces(settings):
            folder = f"step-{number:02}"
            space = step_space(settings, length, found)
            with Study.open(study.path / folder, _step_settings(settings, space, describe(length))) as step:
                run(step)
            best, trials = step.best, step.trials
            if best is None:
                raise ComposerError(f"no trial of {step.path} was completed; see the errors in its trials.jsonl")
            found = best.sequence.letters
            here = {"folder": folder, **space.as_dict(), "trials": len(trials)}
            steps.append(here | {"best": str(best.sequence), "score": best.score})
            study.save_steps(steps + study.steps[len(steps) :])
        recorded = {trial.trial for trial in study.trials}
        for trial in trials:
            if trial.trial not in recorded:
                study.record(trial)
    return study


def _check(settings: StudySettings, describe: Callable[[int], Mapping[str, Any]]) -> None:
    """Refuse, before there is a folder, what the first step or the last would refuse."""
    if settings.strategy not in ("end", "middle"):
        raise UsageError(f"unknown strategy {settings.strategy!r}; expected one-shot, end or middle")
    if not 1 <= settings.step <= settings.space.length:
        raise UsageError(f"step={settings.step}; expected 1 to {settings.space.length} blocks, the length")
    settings.criteria.check(settings.space)
    first = step_space(settings, settings.step, "")
    make_proposer(_step_settings(settings, first, describe(settings.step)))


def _step_settings(settings: StudySettings, space: Space, evaluator: Mapping[str, Any]) -> StudySettings:
    """The settings of a step: a one-shot search of its space, exhaustive where the budget covers that."""
    whole = Region(space, settings.criteria).size <= settings.budget
    return dataclasses.replace(
        settings,
        space=space,
        proposer="exhaustive" if whole else settings.proposer,
        evaluator=evaluator,
        strategy="one-shot",
        step=0,
    )
