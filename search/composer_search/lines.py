"""A finished trial as a line for people: what it is worth, and what to know before one believes that."""

from __future__ import annotations

from composer_search.study import Trial


def trial_line(trial: Trial) -> str:
    """Number, sequence, score, the objective's value or goals, proposer, seconds; why it failed, or what it lacked.

    A score that successive halving left at a share of the steps, or that counts trainings which diverged, says so.
    """
    start = f"trial {trial.trial:>3}  {trial.sequence!s:<12}  "
    if trial.score is None:
        return f"{start}failed: {trial.error}"
    score = f"{trial.score:.3f} ± {trial.spread:.3f}{_worth(trial)}"
    return f"{start}{score}  {trial.proposer:<10} {trial.seconds:6.1f} s{_but(trial)}"


def _worth(trial: Trial) -> str:
    """The value of a mix, or the goals; nothing where accuracy alone counts."""
    if "value" in trial.objective:
        return f"  value {trial.objective['value']:.3f}"
    goals = [f"{worth:.3f}" for name, worth in trial.objective.items() if name.startswith("goal_")]
    return f"  goals {', '.join(goals)}" if goals else ""


def _but(trial: Trial) -> str:
    """What the score is not: that of whole trainings, or of trainings that all ended well."""
    share = trial.details.get("fidelity", {}).get("share", 1.0)
    notes = [] if share == 1.0 else [f"after {100 * share:.0f} % of the steps"]
    tasks = trial.details.get("tasks", {})
    diverged = [task for task, course in tasks.items() if "diverged" in course.get("ended", ())]
    notes += [f"diverged: {', '.join(diverged)}"] if diverged else []
    return "".join(f"  {note}" for note in notes)
