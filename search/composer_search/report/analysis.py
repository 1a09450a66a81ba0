"""The report on what scores are worth: against exact costs, task by task, under noise; and what the search costs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from composer_megatron.architecture import Architecture
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_search.effort import Effort, effort
from composer_search.evidence.agreement import exhibit, size_agreement, task_agreements
from composer_search.evidence.oracle import oracle
from composer_search.evidence.posterior import LEAST, available, fit_posterior
from composer_search.evidence.scores import Scores, scores_of
from composer_search.objectives import Target
from composer_search.report.charts import key_mark, legend_item
from composer_search.report.data import Contents, Study
from composer_search.report.drawings import Mark, scatter
from composer_search.report.evidence import agreement_figure, exhibit_markup, oracle_figure
from composer_search.report.markup import (
    Column,
    Markup,
    Missing,
    bullets,
    decimal,
    definitions,
    details,
    element,
    integer,
    phrase,
    sequence_text,
    table,
)
from composer_search.study import Study as SearchStudy

_STRETCH_FROM = 16
"""Blocks from which the paper stretches a sequence instead of stacking it."""
_MOST_ENUMERATED = 4096
_MOST_SHOWN = 30
_RESAMPLED_VALUES = 8_000_000


@dataclass(frozen=True)
class Cost:
    """One exact cost of a grown architecture, in a unit that axes can show."""

    title: str
    unit: float
    of: Callable[[Architecture, int], int]


_COSTS = (
    Cost("KV-cache bytes per token", 1.0, lambda it, seq_len: it.kv_bytes_per_token()),
    Cost("Training GFLOPs per token", 1e9, lambda it, seq_len: it.flops_per_token(seq_len)),
    Cost("Parameters without embeddings, millions", 1e6, lambda it, seq_len: it.params_non_embedding),
)


def pareto(contents: Contents) -> Markup | Missing:
    """Score against exact costs of the grown sequences, with the front of each pair."""
    study = contents.study
    if study is None:
        return Missing("no study folder was given")
    if not study.scored:
        return Missing("the study has no scored trial yet")
    target = _target(study, contents)
    scores = scores_of("the study", study.trials)
    grown: dict[CompositeSequence, tuple[Architecture, float]] = {}
    for sequence, score in zip(scores.sequences, scores.values, strict=True):
        try:
            grown[sequence] = target.grow(sequence), float(score)
        except UsageError:  # bigger than the target already
            continue
    if not grown:
        return Missing(f"every sequence is bigger than the target shape {target.shape.name}")
    fronts = {cost.title: _front(grown, cost, target.seq_len) for cost in _COSTS}
    charts = [_pareto_chart(grown, fronts[cost.title], cost, target.seq_len) for cost in _COSTS]
    left = len(scores) - len(grown)
    caption = (
        f"Every scored sequence, grown by {target.method}ing to shape {target.shape.name}. Costs are exact counts, "
        f"FLOPs at {target.seq_len:,} tokens; the score is that of the small proxy, not of the grown model. "
        "Marked and joined: no other sequence scores as high at as low a cost."
    )
    caption += f" {left} sequences are bigger than the target and left out." if left else ""
    figure = element("figure", _front_legend(), *charts, element("figcaption", caption))
    return phrase(figure, _front_table(grown, fronts, target.seq_len))


def _target(study: Study, contents: Contents) -> Target:
    """What the study names as its target; else the shape of the page's first architecture, else 1b."""
    named = study.settings.get("target")
    if isinstance(named, Mapping):
        try:
            return Target.from_dict(named)
        except (ComposerError, KeyError, TypeError):  # a target of a later version
            pass
    shape = next((each.shape for each in contents.architectures.values()), PRESETS["1b"])
    longest = max(len(trial.sequence) for trial, _ in study.scored)
    return Target(shape=shape, method="stretch" if longest >= _STRETCH_FROM else "stack", seq_len=contents.seq_len)


def _front(
    grown: Mapping[CompositeSequence, tuple[Architecture, float]], cost: Cost, seq_len: int
) -> list[CompositeSequence]:
    """Sequences that no other beats, the cheapest first; of equals in both, the first."""
    order = sorted(grown, key=lambda each: (cost.of(grown[each][0], seq_len), -grown[each][1]))
    best, front = -math.inf, []
    for sequence in order:
        if grown[sequence][1] > best:
            best = grown[sequence][1]
            front.append(sequence)
    return front


def _pareto_chart(
    grown: Mapping[CompositeSequence, tuple[Architecture, float]],
    front: Sequence[CompositeSequence],
    cost: Cost,
    seq_len: int,
) -> Markup:
    marks = []
    for sequence, (architecture, score) in grown.items():
        exact = cost.of(architecture, seq_len)
        words = f"{sequence.notation}, grown {architecture.sequence.notation}\n{score:.4f} at {exact:,}"
        style = "disc member" if sequence in front else "disc"
        marks.append(Mark(exact / cost.unit, score, words, style))
    marks.sort(key=lambda mark: "member" in mark.style)
    places = {sequence: (cost.of(grown[sequence][0], seq_len) / cost.unit, grown[sequence][1]) for sequence in front}
    label = f"Score against {cost.title}: the front is {', '.join(each.notation for each in front)}"
    return scatter(marks, titles=("Score", cost.title), label=label, steps=list(places.values()))


def _front_legend() -> Markup:
    items = [legend_item(key_mark("disc member"), "on the front"), legend_item(key_mark("disc"), "beaten")]
    return element("ul", *items, class_="legend")


def _front_table(
    grown: Mapping[CompositeSequence, tuple[Architecture, float]],
    fronts: Mapping[str, Sequence[CompositeSequence]],
    seq_len: int,
) -> Markup:
    columns = [Column("Sequence"), Column("Score", numeric=True), Column("Grown to")]
    columns += [*(Column(cost.title.partition(",")[0], numeric=True) for cost in _COSTS), Column("On the front of")]
    chosen = sorted(dict.fromkeys(itertools.chain(*fronts.values())), key=lambda each: -grown[each][1])
    rows = []
    for sequence in chosen:
        architecture, score = grown[sequence]
        values = (cost.of(architecture, seq_len) for cost in _COSTS)
        where = [cost.title.split()[0] for cost in _COSTS if sequence in fronts[cost.title]]
        counts = (integer(v) if c.unit != 1e9 else decimal(v / 1e9, 3) for v, c in zip(values, _COSTS, strict=True))
        text = sequence_text(architecture.sequence.notation)
        rows.append([sequence_text(sequence.notation), decimal(score, 4), text, *counts, ", ".join(where)])
    return element("div", table("Pareto fronts", columns, rows), class_="tall")


def tasks(study: Study) -> Markup | Missing:
    """Scores task by task, and whether tasks and parameter count rank the candidates alike."""
    scores = scores_of("the score", study.trials)
    if not len(scores):
        return Missing("the study has no scored trial yet")
    found = [size_agreement(scores), *task_agreements(scores)]
    note = (
        "A task is compared with the mean of the other tasks, the parameter count with the score. A proxy is only "
        "worth something if it ranks better than the parameter count alone."
    )
    agreements = exhibit_markup(exhibit(found), agreement_figure(found))
    return phrase(_task_strips(scores), element("h3", "Do they rank alike?"), element("p", note), agreements)


def _task_strips(scores: Scores) -> Markup:
    """Every candidate's score on each task, against its rank by the score."""
    order = sorted(range(len(scores)), key=lambda index: -scores.values[index])
    charts = []
    for name, values in scores.tasks.items():
        marks = [
            Mark(rank, float(values[index]), f"{scores.sequences[index].notation}\n{values[index]:.4f}, rank {rank}")
            for rank, index in enumerate(order, start=1)
        ]
        spread = f"from {values.min():.4f} to {values.max():.4f}"
        label = f"{name}: {spread} over {len(marks)} candidates by rank"
        charts.append(scatter(marks, titles=(name, "Rank by score"), label=label, whole=True))
    if not charts:
        return element("p", "The log holds no scores of single tasks.", class_="note")
    caption = element("figcaption", "A task whose scores fall with the rank agrees with the score that ranks.")
    return element("figure", element("div", *charts, class_="multiples"), caption)


def uncertainty(study: Study) -> Markup | Missing:
    """How far the ranking can be believed: seeds, and the Gaussian process of a Bayesian search."""
    scores = scores_of("the study", study.trials)
    parts: list[str] = []
    reasons: list[str] = []
    if scores.seeds is None:
        reasons.append("One seed, or not as many for each candidate: the noise of a score is not known.")
    elif len(scores) < 2:
        reasons.append("One candidate alone has no rank.")
    else:
        resamples = max(100, min(2000, _RESAMPLED_VALUES // scores.seeds.size))
        found = oracle(scores, resamples=resamples)
        parts.append(exhibit_markup(found.exhibit(), oracle_figure(found)))
    process = _process(study, scores)
    if isinstance(process, Missing):
        reasons.append(f"Gaussian process: {process.reason}.")
    else:
        parts.append(process)
    if not parts:
        return Missing(" ".join(reasons).rstrip("."))
    return phrase(*parts, element("p", " ".join(reasons), class_="note") if reasons else "")


def _process(study: Study, scores: Scores) -> Markup | Missing:
    """What a Gaussian process fitted to the trials believes, where the search was a Bayesian one."""
    if not (study.folder / "ax.json").exists():
        return Missing("the study holds none (no ax.json)")
    if not available():
        return Missing('BoTorch is not installed: pip install "composer-megatron[search]"')
    queries = _queries(study, scores)
    try:
        belief = fit_posterior(scores.sequences, scores.values, queries)
    except ComposerError as error:
        return Missing(f"not enough, it takes {LEAST} different scores" if len(scores) < LEAST else str(error))
    order = sorted(range(len(queries)), key=lambda index: -belief.mean[index])[:_MOST_SHOWN]
    tried = dict(zip(scores.sequences, scores.values, strict=True))
    marks, rows = [], []
    for rank, index in enumerate(order, start=1):
        mean, deviation, score = float(belief.mean[index]), float(belief.deviation[index]), tried.get(queries[index])
        seen = "not tried" if score is None else f"scored {score:.4f}"
        words = f"{queries[index].notation}\n{mean:.4f} ± {2 * deviation:.4f}, {seen}"
        style = "ring" if score is None else "disc"
        marks.append(Mark(rank, mean, words, style, mean - 2 * deviation, mean + 2 * deviation))
        shown = "not tried" if score is None else decimal(float(score), 4)
        rows.append([sequence_text(queries[index].notation), decimal(mean, 4), decimal(deviation, 4), shown])
    legend = [legend_item(key_mark("disc"), "tried"), legend_item(key_mark("ring"), "not tried")]
    label = f"Gaussian process: the {len(marks)} sequences of the highest posterior mean"
    drawing = scatter(marks, titles=("Posterior mean of the score", "Rank"), label=label, whole=True)
    caption = (
        f"The {len(marks)} sequences that the process believes best, of {len(queries):,}; whiskers: ± 2 posterior "
    )
    caption += "standard deviations. The process knows the blocks' positions alone, so it can be sure and wrong."
    figure = element("figure", element("ul", *legend, class_="legend"), drawing, element("figcaption", caption))
    columns = [Column("Sequence"), Column("Posterior mean", numeric=True), Column("Posterior deviation", numeric=True)]
    listing = table("What the Gaussian process believes", [*columns, Column("Score", numeric=True)], rows)
    return phrase(element("h3", "What the Gaussian process believes"), figure, details("As a table", listing))


def _queries(study: Study, scores: Scores) -> list[CompositeSequence]:
    """The whole space where it is small, else what was tried."""
    space = study.settings.get("space")
    candidates = study.candidates
    if isinstance(space, Mapping) and candidates and candidates <= _MOST_ENUMERATED:
        prefix, suffix = str(space.get("prefix", "")), str(space.get("suffix", ""))
        free = len(scores.sequences[0]) - len(prefix) - len(suffix) if len(scores) else 0
        letters = itertools.product(str(space["primitives"]), repeat=max(0, free))
        return [CompositeSequence(prefix + "".join(each) + suffix) for each in letters] if free > 0 else []
    return list(scores.sequences)


def cost(study: Study) -> Markup | Missing:
    """Seconds a trial, what has been spent, and what the rest of the budget will take."""
    if study.incremental:
        return _cost_of_steps(effort(SearchStudy.load(study.folder)))
    seconds = [trial.seconds for trial in study.trials if trial.seconds is not None]
    if not seconds:
        return Missing("the study has no timed trial yet")
    pairs = [("Trials done", integer(len(study.trials)))]
    pairs.append(("Failed", integer(sum(trial.score is None for trial in study.trials))))
    pairs.append(("Seconds a trial, median", decimal(statistics.median(seconds), 1)))
    pairs.append(("Seconds a trial, longest", decimal(max(seconds), 1)))
    pairs.append(("Spent on trials, hours", decimal(sum(seconds) / 3600, 2)))
    words = ["Hours are those of one worker: several at once take the less of the clock."]
    if study.budget is None:
        words.append("The study does not tell its budget, so nothing is said about what is to come.")
    else:
        rest = _trials_left(study)
        pairs.append(("Trials to go", integer(rest)))
        pairs.append(("To go at the mean of those done, hours", decimal(rest * statistics.fmean(seconds) / 3600, 2)))
    card = element("div", definitions(pairs), class_="card")
    return phrase(card, bullets(words))


def _cost_of_steps(done: Effort) -> Markup | Missing:
    """The same of an incremental search, whose trials lie in its steps' folders."""
    if done.to_go is None:
        return Missing("the study has no timed trial yet")
    columns = [Column("Step", numeric=True), Column("Blocks", numeric=True), Column("Trials done", numeric=True)]
    columns += [Column("To go", numeric=True), Column("Seconds a trial, mean", numeric=True)]
    rows = []
    for number, stage in enumerate(done.stages, start=1):
        seconds = [trial.seconds for trial in stage.trials]
        mean = decimal(statistics.fmean(seconds), 1) if seconds else "–"
        rows.append([integer(number), integer(stage.length), integer(len(stage.trials)), integer(stage.left), mean])
    pairs = [("Trials done", integer(len(done.trials))), ("Spent on trials, hours", decimal(done.spent / 3600, 2))]
    pairs += [("Trials to go", integer(done.left)), ("To go, hours", decimal(done.to_go / 3600, 2))]
    card = element("div", definitions(pairs), class_="card")
    words = [
        "Hours are those of one worker: several at once take the less of the clock.",
        "Trials to come are taken to last as long as those done, in proportion to their blocks.",
    ]
    return phrase(card, table("Steps of the search", columns, rows), bullets(words))


def _trials_left(study: Study) -> int:
    """Of the budget, but never more than there are sequences."""
    budget, space = study.budget or 0, study.candidates
    most = budget if space is None else min(budget, space)
    return max(0, most - len(study.trials))
