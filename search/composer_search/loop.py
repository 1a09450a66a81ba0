"""The loop of a search: propose, evaluate and record until the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from composer_megatron.errors import ComposerError, FileError
from composer_search.constraints import Criteria
from composer_search.evaluation import Evaluator
from composer_search.proposers import Proposal, Proposer, propose_batch
from composer_search.study import Study, Trial, now
from composer_search.workers import Executor, Outcome, Pool, open_pool

Progress = Callable[[Study, Sequence[Proposal]], None]
"""Called with the study and the running trials whenever either has changed."""

_HOPELESS = 3
"""So many failed trials while none was ever completed end a search: the next ones would fail as well."""


def run_trials(
    study: Study,
    proposer: Proposer,
    evaluator: Evaluator,
    *,
    workers: int = 1,
    executor: Executor = "local",
    progress: Progress | None = None,
) -> None:
    """Run the trials that the study lacks, until the budget is spent or no sequence is left.

    Args:
        study: Open for writing.
        proposer: Chooses the sequences.
        evaluator: Scores them.
        workers: Processes that evaluate, each one batch at a time; 0 evaluates in this process.
        executor: Where they are.
        progress: Called when a trial starts or ends.

    Raises:
        FileError: If a trial cannot be recorded, or a file of the evaluator is corrupt or cannot be written; the trials
            before it are safe, and it runs again when the search goes on.
        ComposerError: If trials fail and none was ever completed.
    """
    before, failures = len(study.trials), 0
    with open_pool(evaluator, workers, executor) as pool:
        while _start_trials(study, proposer, pool, progress) or pool.running:
            ended = pool.wait()
            for proposal, outcome in ended:
                if outcome.file_error:
                    continue
                study.record(_trial(proposal, outcome, study.settings.criteria))
                failures += not study.trials[-1].completed
                if progress is not None:
                    progress(study, pool.running)
            if broken := next((outcome for _, outcome in ended if outcome.file_error), None):
                raise FileError(str(broken.error))
            if failures >= _HOPELESS and not study.completed:
                error = study.trials[-1].error
                raise ComposerError(f"{failures} trials failed and none was completed; the last one: {error}")
    snapshot = proposer.snapshot(study.trials) if len(study.trials) > before else None
    if snapshot is not None:
        study.save_snapshot(snapshot)


def _start_trials(study: Study, proposer: Proposer, pool: Pool, progress: Progress | None) -> bool:
    """Give every free worker a batch, as far as the budget and the space allow; whether any was started."""
    started = False
    while pool.free:
        batch = _next_batch(study, proposer, pool.running)
        if not batch:
            break
        pool.start(batch)
        started = True
        if progress is not None:
            progress(study, pool.running)
    return started


def _next_batch(study: Study, proposer: Proposer, running: Sequence[Proposal]) -> list[Proposal]:
    """The trials of the lowest batch that are neither done nor running.

    They are proposed without the scores of their batch, even of trials that were finished before an interruption: so
    they are those that the uninterrupted search would have run.
    """
    size = study.settings.batch
    numbers = study.free_numbers([proposal.trial for proposal in running])
    if not numbers:
        return []
    place = numbers[0] // size
    known = [trial for trial in study.trials if trial.trial // size != place]
    mates = [Proposal(each.trial, each.sequence, each.proposer) for each in study.trials if each.trial // size == place]
    wanted = [number for number in numbers if number // size == place]
    return propose_batch(proposer, known, [*running, *mates], wanted)


def _trial(proposal: Proposal, outcome: Outcome, criteria: Criteria) -> Trial:
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
    score = None if found is None or not math.isfinite(found.score) else found.score
    common["objective"] = criteria.record(proposal.sequence, score)
    if found is None:
        return Trial(**common, error=outcome.error or "no reason was given", details=note)
    if score is None:
        reason = found.details.get("reason", f"the score is {found.score}")
        return Trial(**common, error=f"diverged: {reason}", details={**found.details, **note})
    return Trial(
        **common,
        score=score,
        spread=found.spread,
        seed_scores=found.seed_scores,
        tasks=found.tasks,
        test_score=found.test_score,
        details={**found.details, **note},
    )
