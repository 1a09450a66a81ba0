"""The report on a search: candidates and scores, and the vote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from composer_megatron.sequence import CompositeSequence
from composer_search.report.charts import block_strip, primitive_legend, trials_chart, trials_legend, votes_chart
from composer_search.report.data import Study, Trial
from composer_search.report.markup import (
    Column,
    Markup,
    Missing,
    bullets,
    decimal,
    details,
    element,
    integer,
    phrase,
    sequence_text,
    table,
)


def seeds_phrase(study: Study) -> str:
    """How many seeds the scores are means of."""
    counts = sorted({trial.seeds for trial, _ in study.scored})
    if counts == [1]:
        return "one seed"
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def search(study: Study) -> Markup | Missing:
    """Candidates and scores over trials: a chart and a table."""
    if not study.scored:
        return Missing("the study has no scored trial yet")
    caption = element("figcaption", *_ranking(study), *_search_caption(study))
    chart = element("figure", trials_legend(study), trials_chart(study), caption)
    failed = [trial for trial in study.trials if trial.score is None]
    listing = [f"Trial {trial.number}, {trial.sequence}: {trial.error or trial.status}" for trial in failed]
    errors = details(f"Trials without a score: {len(failed)}", bullets(listing)) if failed else ""
    return phrase(chart, element("h3", "Every trial, best first"), _trials_table(study), errors)


def _objective(study: Study) -> str:
    """What was maximised, in the words of whoever asked for it."""
    return str(study.settings.get("objective", "accuracy"))


def _ranking(study: Study) -> Iterator[Markup]:
    """By what the trials are ranked, where that is not the score alone."""
    goals = study.scored[0][0].goals
    if not goals:
        return
    yield phrase("Ranked by the objective ", element("code", _objective(study)))
    yield phrase(f", of whose {len(goals)} goals the first counts; " if len(goals) > 1 else ": ", "the best trial, ")
    yield phrase(sequence_text(study.scored[0][0].sequence.notation), ", has the value ", decimal(goals[0], 4), ". ")


def _search_caption(study: Study) -> Iterator[Markup]:
    (best, score), tasks = study.scored[0], len(study.scored[0][0].tasks)
    on = f" of {tasks} proxy task{'s' * (tasks != 1)}" if tasks else ""
    yield phrase(f"Score: mean accuracy{on} on validation data, {seeds_phrase(study)} per candidate. ")
    if all(trial.seeds == 1 for trial, _ in study.scored):
        yield phrase("With one seed the noise of a score is not measured: near ties mean nothing. ")
    elif len(study.scored) > 1:
        lead = (best.value or score) - (study.scored[1][0].value or 0.0)
        verdict = "less than" if lead < best.spread else "at least"
        yield phrase("The best leads the second by ", decimal(lead, 4), f", {verdict} its own spread of ")
        yield phrase(decimal(best.spread, 4), " (standard deviation over seeds). ")
    yield phrase("The best of many noisy scores is biased upward")
    if best.test_score is None:
        yield phrase(".")
    else:
        yield phrase("; on test data, unused in the choice, it scores ", decimal(best.test_score, 4), ".")


def _trials_table(study: Study) -> Markup:
    tasks = list(dict.fromkeys(name for trial, _ in study.scored for name in trial.tasks))
    goals = len(study.scored[0][0].goals)
    columns = [Column("Trial", numeric=True), Column("Sequence")]
    names = ["Value"] if goals == 1 else [f"Goal {number}" for number in range(1, goals + 1)]
    columns += [Column(name, True, f"of the objective {_objective(study)}") for name in names]
    columns += [Column("Score", True, "mean task accuracy, validation")]
    columns += [Column("±", True, "standard deviation over seeds"), Column("Test", True, "mean task accuracy, test")]
    columns += [*(Column(task, numeric=True) for task in tasks), Column("Proposer"), Column("Seconds", numeric=True)]
    unscored = [trial for trial in study.trials if trial.score is None]
    ranges = {task: _range([trial.tasks[task] for trial, _ in study.scored if task in trial.tasks]) for task in tasks}
    rows = [_trial_row(trial, ranges, goals) for trial in [*(trial for trial, _ in study.scored), *unscored]]
    note = element("p", "Tint: from the lowest to the highest accuracy within a task.", class_="note") if tasks else ""
    trials = table("Trials of the study", columns, rows, sortable=True)
    return phrase(element("div", trials, class_="tall"), note)


def _trial_row(trial: Trial, ranges: Mapping[str, tuple[float, float]], goals: int) -> list[str]:
    row: list[str] = [integer(trial.number)]
    row.append(phrase(_thumb(trial.sequence), sequence_text(trial.sequence.notation)))
    row += [decimal(goal, 4) for goal in trial.goals] or ["–"] * goals
    row.append(trial.status if trial.score is None else element("strong", decimal(trial.score, 4)))
    row.append("–" if trial.score is None or trial.seeds == 1 else decimal(trial.spread, 4))
    row.append("–" if trial.test_score is None else decimal(trial.test_score, 4))
    row += [_tinted(trial.tasks[task], *ranges[task]) if task in trial.tasks else "–" for task in ranges]
    return [*row, trial.proposer, "–" if trial.seconds is None else decimal(trial.seconds, 1)]


def _tinted(value: float, low: float, high: float) -> Markup:
    strength = (value - low) / (high - low) if high > low else 0.5
    return element("span", decimal(value, 3), class_="tint", style=f"--tint:{100 * strength:.0f}%")


def _range(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def vote(study: Study) -> Markup | Missing:
    """The votes per position, with the aggregated letters and the sequences that voted."""
    aggregate = study.aggregate
    if aggregate is None:
        return Missing("the study has not been aggregated yet")
    memory = "each position by itself" if aggregate.context == 0 else f"given the {aggregate.context} letters before"
    caption = (
        f"Scores fall into {aggregate.clusters} K-means clusters; the {len(aggregate.members)} sequences of the best "
        f"one vote, {memory}. Below each bar: the letter taken."
    )
    ties = sum(decision == "tie" for decision in aggregate.decisions)
    unseen = sum(decision == "unseen context" for decision in aggregate.decisions)
    if ties:
        caption += f" {ties} position{'s were ties' if ties > 1 else ' was a tie'}, broken by rule."
    if unseen:
        caption += f" At {unseen} position{'s' * (unseen > 1)} no voter had those letters before it."
    columns = [Column("Sequence"), Column("Blocks"), Column("Score", numeric=True)]
    rows = [(sequence_text(each.notation), _thumb(each), decimal(score, 4)) for each, score in aggregate.members]
    members = table("Sequences that vote", columns, rows)
    figure = element("figure", primitive_legend(), votes_chart(aggregate), element("figcaption", caption))
    return phrase(figure, details(f"The {len(aggregate.members)} sequences that vote", members))


def _thumb(sequence: CompositeSequence) -> Markup:
    return element("span", block_strip(sequence.letters, len(sequence)), class_="thumb", aria_hidden="true")
