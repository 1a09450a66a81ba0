"""``search`` and ``watch``: find good short sequences."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from composer_megatron.commands.options import Several, read_overrides, read_sequence
from composer_megatron.display import console, print_json
from composer_megatron.errors import ComposerError, UsageError


def search(
    study: Positional[Path],
    *,
    length: int = 6,
    primitives: str = "AM",
    budget: int = 64,
    initial: int | None = None,
    batch: int = 1,
    strategy: Literal["one-shot", "end", "middle"] = "one-shot",
    step: int = 4,
    width_scaling: bool = False,
    weights: int | None = None,
    proposer: Literal["bayesian", "random", "exhaustive", "evolution"] = "bayesian",
    objective: str = "accuracy",
    constraint: Several = (),
    target_shape: str | None = None,
    method: Literal["stack", "stretch"] = "stack",
    match: Literal["paper", "parameters"] = "paper",
    seq_len: int = 4096,
    device: str = "h100",
    profile: Path | None = None,
    preset: Literal["smoke", "demo", "baseline", "full", "proxies", "small-text", "large-text"] = "baseline",
    override: Several = (),
    text: tuple[str, ...] = (),
    text_shape: str | None = None,
    halving: int = 0,
    seeds: int | None = None,
    seed: int = 0,
    only: Several = (),
    trainings: Path | None = None,
    at_once: int | None = None,
    max_minutes: float | None = None,
    workers: int | None = None,
    executor: Literal["local", "ray"] = "local",
    live: bool = False,
    json: bool = False,
) -> None:
    """Search short sequences on the MAD tasks or a text; the same command again goes on where it stopped.

    Args:
        study: Folder of the study; made if absent, continued if present.
        length: Blocks in a candidate; 2^length candidates in all where there are two primitives.
        primitives: Letters of the blocks to choose from, such as AMSG (docs/primitives.md).
        budget: Trials, in end and middle those of each step. A space that is no larger is searched exhaustively.
        initial: Trials before the Gaussian process takes over, population of an evolution; one a block, at least 5.
        batch: Trials that are proposed at once and handed to one worker.
        strategy: one-shot, or in steps: end adds blocks after the best sequence so far, middle between its halves.
        step: Blocks that a step of end or middle adds.
        width_scaling: Make candidates as wide, for their depth, as the target.
        weights: Make all candidates equally big: each at widths that give its blocks so many weights; 0 for as many as
            half attention, half MLP have at the preset's widths.
        proposer: Who chooses the next candidate.
        objective: What to maximise, such as "accuracy - 0.2 kv_bytes"; with a comma, goals of a Pareto front.
        constraint: Such as "attention <= 1/3" or "kv_bytes <= 0.6x" (of the Llama baseline); may be given often.
        target_shape: Shape that candidates are grown to for exact costs; 1b where something needs one.
        method: How candidates are grown, as in extrapolate.
        match: To which size, as in extrapolate; parameters gives every candidate the baseline's.
        seq_len: Tokens in a sequence, for flops, throughput, prefill and latency.
        device: GPU that throughput, prefill and latency are predicted for.
        profile: File that composer-megatron profile made for the target shape; throughput and prefill are then its.
        preset: What scores a candidate: smoke (seconds), demo (minutes), baseline (MAD's own six tasks), full (its 66
            settings), proxies (recall and state tracking beside MAD), or a text, small or with large models.
        override: NAME=VALUE of one of the preset's settings, such as epochs=50, learning_rates=1e-3 or
            tasks=memorization; may be given often.
        text: Files or folders for small-text and large-text, or a folder made by tools/preprocess_text.py.
        text_shape: Widths for large-text, a preset or a JSON file.
        halving: Rungs of successive halving within a batch; 0 for none.
        seeds: Training runs a candidate, whose mean is the score; by default the preset's number.
        seed: Seed of data, weights and proposals.
        only: A sequence to score in place of a search, such as a known design, or the JSON file of an aggregate; may be
            given often.
        trainings: File where finished trainings are kept and found again; studies may share it. By default
            trainings.jsonl in the study.
        at_once: Trainings after which those are in that file, the most that a kill can cost; by default as many as
            train together.
        max_minutes: End after so long, in good order; the same command again goes on.
        workers: Batches at once, one process and one thread each; by default one a GPU, or without GPUs one a core, at
            most 8; 0 for none, in this process.
        executor: local, or ray for workers of a Ray cluster, whose address is in RAY_ADDRESS.
        live: Show a table that follows the search, instead of a line a trial.
        json: Print one JSON object for programs instead of text.
    """
    from rich.console import Console

    from composer_search.evaluators import GPU_PRESETS
    from composer_search.live import live_view
    from composer_search.objectives import goal_front
    from composer_search.strategies import SearchSettings, progress_bar
    from composer_search.strategies import search as run_search
    from composer_search.workers import default_workers

    _check_kept(trainings, at_once)
    settings = SearchSettings(
        length=length,
        primitives=primitives,
        strategy=strategy,
        step=step,
        width_scaling=width_scaling,
        weights=weights,
        proposer=proposer,
        budget=budget,
        initial=initial,
        batch=batch,
        objective=objective,
        constraints=constraint,
        target_shape=target_shape,
        method=method,
        match=match,
        seq_len=seq_len,
        device=device,
        profile=profile,
        seed=seed,
        evaluator=preset,
        overrides=read_overrides(override),
        text=text,
        shape=text_shape,
        halving=halving,
        seeds=seeds,
        only=tuple(str(read_sequence(source)) for source in only),
    )
    show = live_view if live else progress_bar
    with (
        _ending_after(max_minutes, study),
        show(Console(stderr=True, highlight=False) if json else console) as progress,
    ):
        found = run_search(
            settings,
            study,
            workers=default_workers(preset in GPU_PRESETS) if workers is None else workers,
            executor=executor,
            progress=progress,
            cache_dir=study / "cache",
            ledger=trainings,
            at_once=at_once,
        )
    best = found.best
    if best is None or best.score is None:
        raise ComposerError(f"no trial of {study} was completed; see the errors in {study / 'trials.jsonl'}")
    if json:
        print_json(best.as_dict())
    else:
        value = f", value {best.objective['value']:.4f}" if "value" in best.objective else ""
        console.print(f"best of {len(found.completed)}: {best.sequence} with {best.score:.4f}{value}; all in {study}")
        if front := goal_front(found.trials):
            names = ", ".join(str(trial.sequence) for trial in front)
            console.print(f"the best by its first goal; on the Pareto front of all goals: {names}", soft_wrap=True)


def _check_kept(trainings: Path | None, at_once: int | None) -> None:
    """Refuse, before anything runs, what would end every trial: no file can be there, or no training finish.

    Raises:
        UsageError: If `trainings` is a folder or below a file, or `at_once` is no number of trainings.
    """
    if at_once is not None and at_once < 1:
        raise UsageError(f"--at-once {at_once}; expected at least 1 training")
    if trainings is None:
        return
    if trainings.is_dir():
        raise UsageError(f"--trainings {trainings} is a folder; name a file in it: {trainings / 'trainings.jsonl'}")
    above = next(folder for folder in trainings.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"--trainings {trainings}: {above} is no folder")


class _TimeIsUp(BaseException):
    """Ends a search; no handler of the errors of a trial may catch it."""


@contextlib.contextmanager
def _ending_after(minutes: float | None, study: Path) -> Iterator[None]:
    """End what runs inside after so many minutes, and then the program, with exit status 0.

    Raises:
        UsageError: If `minutes` is not above 0.
    """
    if minutes is None:
        yield
        return
    if not 0 < minutes < math.inf:
        raise UsageError(f"--max-minutes {minutes}; expected more than 0")

    def end(*_: object) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    except _TimeIsUp:
        console.print(f"{minutes:g} minutes are over; the same command goes on with {study}", markup=False)
        raise SystemExit(0) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def watch(study: Positional[Path], *, seconds: float = 1.0) -> None:
    """Follow a study that another process is searching, until its budget is spent; Ctrl-C leaves the search alone.

    Args:
        study: Folder of the study.
        seconds: Between looks.
    """
    from composer_search.live import watch as follow

    if not seconds > 0:
        raise UsageError(f"--seconds {seconds}; expected more than 0")
    follow(study, console, seconds=seconds)
