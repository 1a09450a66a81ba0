"""Strategies: what a search looks at and in which order. `search` is the way in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape
from composer_search.constraints import Criteria
from composer_search.effort import effort
from composer_search.evaluation import Evaluator, MatchableEvaluator, ScalableEvaluator
from composer_search.extrapolate import Match, Method
from composer_search.incremental import search_steps, step_line
from composer_search.lines import trial_line
from composer_search.loop import Progress, run_trials
from composer_search.objectives import ACCURACY, Objective, Target
from composer_search.proposers import Proposal, make_proposer
from composer_search.region import Region
from composer_search.space import Space
from composer_search.speed import Measured
from composer_search.study import Study, StudySettings
from composer_search.workers import Executor

if TYPE_CHECKING:
    from rich.console import Console

ProposerName = Literal["bayesian", "exhaustive", "random", "evolution"]
Strategy = Literal["one-shot", "end", "middle"]

_DEFAULT_TARGET = "1b"
"""The target of objectives and constraints that name none: the size of the paper's main results."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a search does; everything that its study is bound to.

    Attributes:
        length: Blocks of a sequence.
        primitives: Letters to choose from.
        strategy: ``one-shot`` searches all blocks at once; ``end`` and ``middle`` add `step` blocks at a time, after
            the best sequence so far or between its halves (arXiv 2510.00379).
        step: Blocks that a step of an incremental search adds.
        width_scaling: Make candidates as wide, in proportion to their depth, as the target: the evaluator's own widths
            belong to the depth of the target's Llama-style baseline.
        weights: Make all candidates equally big: each is trained at widths that give its blocks so many weights; 0 for
            as many as half attention and half MLPs have at the evaluator's widths, None for those widths throughout.
        proposer: Who chooses. Where the budget covers the whole space, the search is exhaustive whatever is asked for.
        budget: Trials in all; of an incremental search, trials of each step.
        initial: Quasi-random trials before the Bayesian ones, and the population of an evolution; None for one a block
            that is searched, but at least 5.
        batch: Trials that are proposed together and handed to one worker.
        objective: What is maximised, such as ``accuracy - 0.2 kv_bytes`` (`composer_search.objectives`).
        constraints: What every candidate meets, such as ``attention <= 1/3`` (`composer_search.constraints`).
        target_shape: Preset or file of the shape that candidates are grown to for exact metrics; None for ``1b`` where
            something needs one, and else for none.
        method: How they are grown.
        match: Their size; ``parameters`` is the arm of equal parameters.
        seq_len: Tokens of a sequence, for FLOPs and times.
        device: GPU that times are predicted for.
        profile: File of ``composer-megatron profile`` for the target shape: throughput and prefill are measured then.
        only: Sequences to score in place of a search, such as known designs; the budget is then their number.
        seed: Of the proposals, the data and the weights.
        evaluator: A name of `composer_search.evaluators.EVALUATORS`.
        overrides: Settings of it to change, by name (`composer_search.evaluators.preset`).
        text: What the text evaluators train on: files and folders, or one folder of ``tools/preprocess_text.py``.
        shape: Widths for the evaluator ``large-text``, a preset or a file.
        halving: Rungs of successive halving within each batch (`composer_search.fidelity`); 0 for none.
        seeds: Trainings of each candidate; None for the evaluator's own number.
    """

    length: int = 6
    primitives: str = "AM"
    strategy: Strategy = "one-shot"
    step: int = 4
    width_scaling: bool = False
    weights: int | None = None
    proposer: ProposerName = "bayesian"
    budget: int = 16
    initial: int | None = None
    batch: int = 1
    objective: str = ACCURACY
    constraints: Sequence[str] = ()
    target_shape: str | None = None
    method: Method = "stack"
    match: Match = "paper"
    seq_len: int = 4096
    device: str = "h100"
    profile: Path | str | None = None
    only: Sequence[str] = ()
    seed: int = 0
    evaluator: str = "demo"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    text: Sequence[str] = ()
    shape: str | None = None
    halving: int = 0
    seeds: int | None = None

    @property
    def criteria(self) -> Criteria:
        """The objective, the constraints and the target, read and checked."""
        needed = bool(self.constraints or self.profile) or not Objective.parse(self.objective).plain
        name = self.target_shape or (_DEFAULT_TARGET if needed else None)
        return Criteria.parse(self.objective, self.constraints, None if name is None else self._target(name))

    def _target(self, name: str) -> Target:
        shape = load_shape(name)
        profile = self.profile and Measured.load(self.profile, shape, self.seq_len, self.primitives)
        return Target(
            shape=shape,
            method=self.method,
            match=self.match,
            seq_len=self.seq_len,
            device=self.device,
            profile=profile or None,
        )

    def study_settings(self, evaluator: Evaluator) -> StudySettings:
        """The settings in full, as a study keeps them."""
        space, criteria, incremental = Space(self.primitives, self.length), self.criteria, self.strategy != "one-shot"
        searched = self.step if incremental else self.length
        only = tuple(dict.fromkeys(CompositeSequence.parse(text) for text in self.only))
        if only and incremental:
            raise UsageError(f"only: a list of sequences has no steps; leave strategy={self.strategy!r} out")
        budget = len(only) or self.budget
        whole = not incremental and Region(space, criteria).size <= budget
        return StudySettings(
            space=space,
            proposer="listed" if only else "exhaustive" if whole else self.proposer,
            initial=max(5, searched) if self.initial is None else self.initial,
            seed=self.seed,
            budget=budget,
            evaluator=evaluator.describe(),
            batch=self.batch,
            criteria=criteria,
            strategy=self.strategy,
            step=self.step if incremental else 0,
            width_scaling=self.width_scaling,
            only=only,
        )


def search(
    settings: SearchSettings,
    study_path: Path | str,
    *,
    workers: int = 1,
    executor: Executor = "local",
    progress: Progress | None = None,
    evaluator: Evaluator | None = None,
    cache_dir: Path | None = None,
    ledger: Path | None = None,
    at_once: int | None = None,
) -> Study:
    """Search, or go on with the search in that folder; return the study when the budget is spent.

    Called again with the same settings it continues after the trials in the log. With one worker the scores are a
    function of the settings, wherever the search was interrupted; with more, proposals depend on which trial ends
    first.

    Args:
        settings: What to search.
        study_path: The study's folder, made if it is not there.
        workers: Processes that evaluate, each one batch at a time on one thread; 0 evaluates in this process.
        executor: ``local`` for processes of this machine, ``ray`` for a Ray cluster's.
        progress: Called when a trial starts or ends.
        evaluator: Used instead of the one that the settings name.
        cache_dir: Folder where generated MAD data are kept; None generates them in each worker.
        ledger: File of finished trainings, which studies may share; None for ``trainings.jsonl`` in the study. Like
            `at_once`, of evaluators on MAD tasks alone.
        at_once: Trainings after which those go to the ledger, the most that an interruption costs; None for as many as
            train together.

    Raises:
        UsageError: If a setting is wrong, or the study was made with others.
        ComposerError: If another process works on the study, its files cannot be written, or all trials fail.
    """
    if workers < 0:
        raise UsageError(f"workers={workers}; expected 0 (in this process) or more")
    if evaluator is None:
        evaluator = _named_evaluator(settings, Path(study_path), cache_dir, ledger, at_once)
    whole = _fitting(evaluator, settings, settings.length)  # refuses what it cannot do before there is a folder
    wanted = settings.study_settings(whole if settings.strategy == "one-shot" else evaluator)

    def run(study: Study) -> None:
        fitting = _fitting(evaluator, settings, study.settings.space.length)
        run_trials(study, make_proposer(study.settings), fitting, workers=workers, executor=executor, progress=progress)

    if settings.strategy != "one-shot":

        def describe(length: int) -> dict[str, Any]:
            return _fitting(evaluator, settings, length).describe()

        return search_steps(wanted, study_path, describe, run)
    make_proposer(wanted)  # likewise
    with Study.open(study_path, wanted) as study:
        run(study)
    return study


def _named_evaluator(
    settings: SearchSettings, study_path: Path, cache_dir: Path | None, ledger: Path | None, at_once: int | None
) -> Evaluator:
    """The evaluator that the settings name; successive halving keeps its own log beside the trials."""
    from composer_search.evaluators import PRESETS, make_evaluator

    if ledger is None and settings.evaluator in PRESETS:
        ledger = study_path / "trainings.jsonl"
    seeds = {"seed": settings.seed} | ({} if settings.seeds is None else {"seeds": settings.seeds})
    evaluator = make_evaluator(
        settings.evaluator,
        text=settings.text,
        shape=settings.shape,
        cache_dir=cache_dir,
        halving=settings.halving,
        log=study_path / "rungs.jsonl" if settings.halving else None,
        ledger=ledger,
        at_once=at_once,
        **{**settings.overrides, **seeds},
    )
    if settings.halving > 1:
        _check_halving(settings)
    return evaluator


def _check_halving(settings: SearchSettings) -> None:
    """Refuse batches of which every sequence would go on: each would be trained in full, and nothing saved."""
    from composer_search.fidelity import Halving

    halving = Halving(rungs=settings.halving)
    if settings.batch < (least := halving.least):
        raise UsageError(
            f"halving={settings.halving} drops no candidate where batch={settings.batch}; "
            f"give batches of at least {least}, better {halving.eta**settings.halving}"
        )


def _fitting(evaluator: Evaluator, settings: SearchSettings, length: int) -> Evaluator:
    """The evaluator for candidates of that length.

    With width scaling, width : depth is the target's throughout: a candidate of L of the target's D blocks has L/D of
    the widths that the evaluator would give the target. The rule is the paper's (arXiv 2510.00379: shrink the widths
    too, keeping width to depth), which does not state its small widths. With a number of weights each candidate then
    has widths of its own.
    """
    name = evaluator.describe().get("name")
    if settings.width_scaling:
        if not isinstance(evaluator, ScalableEvaluator):
            raise UsageError(f"width scaling: the evaluator {name!r} cannot change its widths; leave it off")
        depth = 2 * load_shape(settings.target_shape or _DEFAULT_TARGET).baseline_pairs
        evaluator = evaluator.scaled(Fraction(length, depth))
    if settings.weights is not None:
        if settings.weights < 0:
            raise UsageError(f"weights={settings.weights}; expected 0 or more")
        if not isinstance(evaluator, MatchableEvaluator):
            raise UsageError(f"weights: the evaluator {name!r} cannot change its widths; leave it out")
        evaluator = evaluator.with_weights(settings.weights)
    return evaluator


@contextlib.contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Progress]:
    """A `Progress` for people: a line for each finished trial, and for each step of an incremental search one above.

    Below them is a bar where the console is a terminal.
    """
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
    shown: dict[Path, int] = {}
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, now="starting workers")

        def show(study: Study, running: Sequence[Proposal]) -> None:
            done = effort(study)
            if study.path not in shown and (steps := len(done.stages)) > 1:
                bar.console.print(step_line(study.settings.space, done.current + 1, steps), markup=False)
            for trial in study.trials[shown.get(study.path, len(study.trials)) :]:
                mark = "  best so far" if trial is study.best else ""
                bar.console.print(trial_line(trial) + mark, markup=False)
            shown[study.path] = len(study.trials)
            names = ", ".join(str(proposal.sequence) for proposal in running)
            count = len(done.trials)
            bar.update(task, completed=count, total=count + done.left, now=f"running {names}" if names else "")

        yield show
