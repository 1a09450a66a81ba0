"""The report: one self-contained HTML page of a search and of the models that came out of it.

The page needs no network and no script: charts are inline SVG. Its script adds values on hover and sorting by column.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from composer_megatron.files import write_text
from composer_megatron.sequence import CompositeSequence
from composer_search.report import analysis, models, search, settings
from composer_search.report.charts import block_strip
from composer_search.report.data import Contents, ReportInputs, Study, TrainingRun, gather, is_baseline
from composer_search.report.markup import (
    Markup,
    Missing,
    bullets,
    decimal,
    element,
    integer,
    join,
    phrase,
    sequence_text,
)
from composer_search.report.shell import fill_page

__all__ = ["ReportInputs", "build_report", "write_report"]

type _Section = Callable[[Contents], Markup | Missing]


def _of_study(section: Callable[[Study], Markup | Missing]) -> _Section:
    """A section that needs a study and nothing else."""
    return lambda contents: section(contents.study) if contents.study else Missing("no study folder was given")


_SECTIONS: tuple[tuple[str, str, _Section], ...] = (
    ("search", "Candidates and scores", _of_study(search.search)),
    ("pareto", "Score against cost", analysis.pareto),
    ("tasks", "Tasks and agreement", _of_study(analysis.tasks)),
    ("uncertainty", "How sure is the ranking?", _of_study(analysis.uncertainty)),
    ("vote", "The vote", _of_study(search.vote)),
    ("sequences", "Sequences", models.sequences),
    ("costs", "Parameters, FLOPs and KV cache", models.costs),
    ("effort", "Cost of the search", _of_study(analysis.cost)),
    ("plan", "Pipeline plan", models.plan),
    ("training", "Training", models.training),
    ("samples", "Generated text", models.samples),
    ("settings", "Settings and versions", settings.settings),
)


_MOST_BARS = 4


def build_report(inputs: ReportInputs) -> str:
    """The page as HTML.

    Parts for which `inputs` holds nothing are left out, and the page says so.

    Raises:
        FileError: If a named file or folder is missing, or holds something else than it should; the message names it.
    """
    contents = gather(inputs)
    shown = []
    left_out: dict[str, list[str]] = {}
    for anchor, title, build in _SECTIONS:
        body = build(contents)
        if isinstance(body, Missing):
            left_out.setdefault(body.reason, []).append(title)
        else:
            shown.append((anchor, title, body))
    if contents.text is None:
        left_out.setdefault("no text folder was given", []).append("Unigram model")
    links = (element("a", title, href=f"#{anchor}") for anchor, title, _ in shown)
    headings = (element("h2", title, id=f"{anchor}-title") for anchor, title, _ in shown)
    sections = (
        element("section", heading, body, id=anchor, aria_labelledby=f"{anchor}-title")
        for heading, (anchor, _, body) in zip(headings, shown, strict=True)
    )
    return fill_page(
        _title(contents),
        sections=join(sections),
        summary=_summary(contents),
        left_out=_left_out(left_out),
        contents=bullets(links),
    )


def write_report(inputs: ReportInputs, path: Path) -> None:
    """Write the page to `path`, in one step; raises as `build_report` does, and then leaves `path` as it was."""
    write_text(path, build_report(inputs))


def _title(contents: Contents) -> str:
    composite = next((each for each in contents.models.values() if not is_baseline(each)), None)
    found = next((sequence for _, sequence in reversed(_found(contents))), None)
    if composite and found and composite.sequence != found:
        return f"From {found.notation} to {composite.sequence.notation}"
    if composite:
        return f"{composite.sequence.notation} beside its Llama baseline"
    return f"A search that found {found.notation}" if found else "Composer report"


def _found(contents: Contents) -> list[tuple[str, CompositeSequence]]:
    """What the search led to: its best trial's sequence, then the aggregated one."""
    study = contents.study
    found = [("best trial", study.scored[0][0].sequence)] if study and study.scored else []
    return [*found, ("aggregated", study.aggregate.sequence)] if study and study.aggregate else found


def _summary(contents: Contents) -> Markup:
    """The opening: what was done in a few sentences, the figures that matter, and the models as bars."""
    sentences = [*_search_sentences(contents), *_training_sentences(contents)]
    lead = element("p", join(sentences, " "), class_="lead") if sentences else ""
    tiles = _tiles(contents)
    figures = element("div", *tiles, class_="tiles") if tiles else ""
    return phrase(lead, _opening_bars(contents), figures)


def _search_sentences(contents: Contents) -> list[Markup]:
    study = contents.study
    if study is None or not study.scored:
        return []
    best, score = study.scored[0]
    of = [" of ", integer(study.candidates)] if study.candidates else []
    tried = phrase("The search scored ", integer(len(study.scored)), *of, " candidate sequences; ")
    best_one = phrase("the best, ", sequence_text(best.sequence.notation), ", reached ", decimal(score, 3), ".")
    sentences = [phrase(tried, best_one)]
    if study.aggregate:
        voters = integer(len(study.aggregate.members))
        text = sequence_text(study.aggregate.sequence.notation)
        sentences.append(phrase("The ", voters, " sequences of the best cluster voted for ", text, "."))
    return sentences


def _training_sentences(contents: Contents) -> list[Markup]:
    clauses = [_clause(run, run.evaluation) for run in contents.runs if run.evaluation]
    if not clauses:
        return []
    if contents.unigram:
        clauses.append(phrase("a unigram model ", decimal(contents.unigram[1], 3)))
    return [phrase("On held-out text ", join(clauses, "; "), ".")]


def _clause(run: TrainingRun, evaluation: dict[str, float]) -> Markup:
    name = phrase(element("strong", run.name), ", ", sequence_text(run.architecture.sequence.notation))
    bits, steps = decimal(evaluation["bits_per_byte"], 3), integer(int(evaluation["iteration"]))
    return phrase(name, ", needs ", bits, " bits per byte after ", steps, " steps")


def _opening_bars(contents: Contents) -> Markup:
    """The models, or what was found where there is no model yet, as bars without words: the page's picture."""
    found = [(name, each.sequence) for name, each in contents.models.items()] or _found(contents)
    if not found:
        return Markup()
    shown = found[:_MOST_BARS]
    longest = max(len(sequence) for _, sequence in shown)
    rows = [
        element("div", element("span", name, class_="note"), block_strip(sequence.letters, longest))
        for name, sequence in shown
    ]
    return element("div", *rows, class_="opening")


def _tiles(contents: Contents) -> list[Markup]:
    tiles = []
    if contents.study and contents.study.scored:
        best, score = contents.study.scored[0]
        words = f"mean task accuracy of {best.sequence.notation}, {search.seeds_phrase(contents.study)}"
        tiles.append(_tile("best score", decimal(score, 3), words))
    losses = [
        (run.name, run.evaluation["bits_per_byte"], run.evaluation["nats_per_token"])
        for run in contents.runs
        if run.evaluation
    ]
    if contents.unigram:
        nats, bits = contents.unigram
        losses.append(("unigram model", bits, nats))
    for name, bits, nats in losses:
        note = phrase("held-out bits per byte; ", decimal(nats, 4), " nats per token")
        tiles.append(_tile(name, decimal(bits, 3), note))
    return tiles


def _tile(name: str, value: Markup, note: str) -> Markup:
    return element(
        "div",
        element("p", name, class_="tile-name"),
        element("p", value, class_="tile-value"),
        element("p", note, class_="note"),
        class_="tile",
    )


def _left_out(titles: dict[str, list[str]]) -> Markup:
    """What the page does not hold, by reason."""
    if not titles:
        return Markup()
    listing = bullets(f"{', '.join(sections)}: {reason}" for reason, sections in titles.items())
    return element("aside", element("p", "Left out of this page"), listing, class_="left-out")
