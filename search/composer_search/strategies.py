"""Strategies: the loop that proposes, evaluates and records until the budget is spent. `search` is the way in."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composer_megatron.errors import ComposerError, UsageError
from composer_search.evaluation import Evaluator
from composer_search.proposers import Proposal, Proposer, make_proposer, propose_batch
from composer_search.study import Space, Study, StudySettings, Trial, now
from composer_search.workers import Outcome, Pool, worker_pool

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[Study, Sequence[Proposal]], None]
"""Called with the study and the running trials whenever either has changed."""

_HOPELESS = 3
"""So many failed trials while none was ever completed end a search: the next ones would fail as well."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a search does; everything that its study is bound to.

    Attributes:
        length: Blocks of a sequence.
        primitives: Letters to choose from.
        proposer: Who chooses. Where the budget covers the whole space, the search is exhaustive whatever is asked for.
        budget: Trials in all.
        initial: Quasi-random trials before the Bayesian ones; None for one a block, but at least 5.
        seed: Of the proposals, the data and the weights.
        evaluator: The MAD preset: ``smoke``, ``demo`` or ``baseline``.
        overrides: Settings of the preset to change, by name (`composer_search.evaluators.preset`).
        seeds: Trainings of each candidate; None for the preset's.
    """

    length: int = 6
    primitives: str = "AM"
    proposer: Literal["bayesian", "exhaustive", "random"] = "bayesian"
    budget: int = 16
    initial: int | None = None
    seed: int = 0
    evaluator: str = "demo"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seeds: int | None = None

    def study_settings(self, evaluator: Evaluator) -> StudySettings:
        """The settings in full, as a study keeps them."""
        space = Space(self.primitives, self.length)
        return StudySettings(
            space=space,
            proposer="exhaustive" if space.size <= self.budget else self.proposer,
            initial=max(5, self.length) if self.initial is None else self.initial,
            seed=self.seed,
            budget=self.budget,
            evaluator=evaluator.describe(),
        )


def search(
    settings: SearchSettings,
    study_path: Path | str,
    *,
    workers: int = 1,
    progress: Progress | None = None,
    evaluator: Evaluator | None = None,
    cache_dir: Path | None = None,
) -> Study:
    """Search, or go on with the search in that folder; return the study when the budget is spent.

    Called again with the same settings it continues after the trials in the log. With one worker the scores are a
    function of the settings, wherever the search was interrupted; with more, proposals depend on which trial ends
    first.

    Args:
        settings: What to search.
        study_path: The study's folder, made if it is not there.
        workers: Processes that evaluate, each one trial at a time on one thread; 0 evaluates in this process.
        progress: Called when a trial starts or ends.
        evaluator: Used instead of MAD with the settings' preset.
        cache_dir: Folder where generated MAD data are kept; None generates them in each worker.

    Raises:
        UsageError: If a setting is wrong, or the study was made with others.
        ComposerError: If another process works on the study, its files cannot be written, or all trials fail.
    """
    if workers < 0:
        raise UsageError(f"workers={workers}; expected 0 (in this process) or more")
    if evaluator is None:
        from composer_search.evaluators import MadEvaluator, preset

        seeds = {"seed": settings.seed} | ({} if settings.seeds is None else {"seeds": settings.seeds})
        evaluator = MadEvaluator(preset(settings.evaluator, **{**settings.overrides, **seeds}), cache_dir)
    wanted = settings.study_settings(evaluator)
    proposer = make_proposer(wanted)
    with Study.open(study_path, wanted) as study:
        run_one_shot(study, proposer, evaluator, workers=workers, progress=progress)
    return study


def run_one_shot(
    study: Study, proposer: Proposer, evaluator: Evaluator, *, workers: int = 1, progress: Progress | None = None
) -> None:
    """Search all positions at once (One-Shot of arXiv 2510.00379) until the budget is spent or no sequence is left.

    Args:
        study: Open for writing.
        proposer: Chooses the sequences.
        evaluator: Scores them.
        workers: As for `search`.
        progress: As for `search`.

    Raises:
        FileError: If a trial cannot be recorded; those before it are safe.
        ComposerError: If trials fail and none was ever completed.
    """
    before, failures = len(study.trials), 0
    with worker_pool(evaluator, workers) as pool:
        while _start_trials(study, proposer, pool, progress) or pool.running:
            for proposal, outcome in pool.wait():
                study.record(_trial(proposal, outcome))
                failures += not study.trials[-1].completed
                if progress is not None:
                    progress(study, pool.running)
            if failures >= _HOPELESS and not study.completed:
                error = study.trials[-1].error
                raise ComposerError(f"{failures} trials failed and none was completed; the last one: {error}")
    snapshot = proposer.snapshot(study.trials) if len(study.trials) > before else None
    if snapshot is not None:
        study.save_snapshot(snapshot)


def _start_trials(study: Study, proposer: Proposer, pool: Pool, progress: Progress | None) -> bool:
    """Give every free worker a trial, as far as the budget and the space allow; whether any was started."""
    numbers = study.free_numbers([proposal.trial for proposal in pool.running])
    batch = propose_batch(proposer, study.trials, pool.running, numbers[: pool.free])
    for proposal in batch:
        if proposal.snapshot is not None:
            study.save_snapshot(proposal.snapshot)
        pool.start(proposal)
        if progress is not None:
            progress(study, pool.running)
    return bool(batch)


def _trial(proposal: Proposal, outcome: Outcome) -> Trial:
    """The line for the log."""
    common: dict[str, Any] = {
        "trial": proposal.trial,
        "sequence": proposal.sequence,
        "proposer": proposal.proposer,
        "seconds": round(outcome.seconds, 3),
        "finished": now(),
    }
    note = {"proposer_note": proposal.note} if proposal.note else {}
    found = outcome.evaluation
    if found is None:
        return Trial(**common, error=outcome.error or "no reason was given", details=note)
    if not math.isfinite(found.score):
        return Trial(**common, error=f"the score is {found.score}", details=note)
    return Trial(
        **common,
        score=found.score,
        spread=found.spread,
        seed_scores=found.seed_scores,
        tasks=found.tasks,
        test_score=found.test_score,
        details={**found.details, **note},
    )


@contextlib.contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Progress]:
    """A `Progress` for people: a line for each finished trial, and below them a bar where the console is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = console or Console(highlight=False)
    columns = (
        TextColumn("trials"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    shown: int | None = None
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, now="starting workers")

        def show(study: Study, running: Sequence[Proposal]) -> None:
            nonlocal shown
            for trial in study.trials[shown if shown is not None else len(study.trials) :]:
                bar.console.print(_line(trial, study), markup=False)
            shown = len(study.trials)
            names = ", ".join(str(proposal.sequence) for proposal in running)
            bar.update(task, completed=shown, total=study.settings.budget, now=f"running {names}" if names else "")

        yield show


def _line(trial: Trial, study: Study) -> str:
    """A finished trial on one line."""
    start = f"trial {trial.trial:>3}  {trial.sequence!s:<12}  "
    if trial.score is None:
        return f"{start}failed: {trial.error}"
    mark = "  best so far" if trial is study.best else ""
    return f"{start}{trial.score:.3f} ± {trial.spread:.3f}  {trial.proposer:<10} {trial.seconds:6.1f} s{mark}"
