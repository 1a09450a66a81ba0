"""The figures of `composer_search.evidence`, and a page for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from composer_megatron.files import write_text
from composer_search.evidence.ablation import Ablation
from composer_search.evidence.agreement import Agreement
from composer_search.evidence.exhibit import Cell, Exhibit
from composer_search.evidence.growth import Growth
from composer_search.evidence.oracle import Oracle
from composer_search.evidence.regret import RegretResult
from composer_search.evidence.standing import Standing
from composer_search.evidence.votes import Votes
from composer_search.report.charts import block_strip, primitive_legend
from composer_search.report.drawings import Band, Estimate, Mark, bands, forest, scatter
from composer_search.report.markup import (
    Column,
    Markup,
    bullets,
    decimal,
    element,
    escape,
    integer,
    join,
    phrase,
    table,
)
from composer_search.report.shell import fill_page

_MOST_RANKS = 100
"""Candidates of a ranking that are drawn, best first; the table has all."""

_MOST_VOTES = 12
"""Sequences that resampled seeds vote for that are drawn, the most frequent first."""


def exhibit_markup(exhibit: Exhibit, figure: Markup | None = None) -> Markup:
    """A figure, what was found, and the table."""
    kinds = [any(isinstance(row[index], int | float) for row in exhibit.rows) for index in range(len(exhibit.columns))]
    columns = [Column(title, numeric) for title, numeric in zip(exhibit.columns, kinds, strict=True)]
    rows = [[_cell(cell) for cell in row] for row in exhibit.rows]
    listing = element("div", table(exhibit.title, columns, rows), class_="tall")
    return phrase(figure or "", bullets(exhibit.findings), listing)


def _cell(cell: Cell) -> Markup:
    if isinstance(cell, float):
        return decimal(cell, 4)
    return integer(cell) if isinstance(cell, int) else escape("–" if cell is None else cell)


def write_exhibit(path: Path, exhibit: Exhibit, figure: Markup | None) -> None:
    """Write a self-contained page of one exhibit, in one step."""
    section = element("section", exhibit_markup(exhibit, figure), aria_label=exhibit.title)
    write_text(path, fill_page(exhibit.title, sections=section))


def oracle_figure(found: Oracle) -> Markup:
    """Score by rank, with the standard errors as whiskers."""
    marks = []
    for index, sequence in enumerate(found.scores.sequences[:_MOST_RANKS]):
        score, error = float(found.scores.values[index]), float(found.errors[index])
        place = f"{found.rank_low[index]:.0f} to {found.rank_high[index]:.0f}"
        words = f"{sequence.notation}\n{score:.4f} ± {error:.4f}, rank {place}, wins {found.wins[index]:.0%}"
        style = "disc member" if found.wins[index] >= 0.05 else "disc"
        marks.append(Mark(index + 1, score, words, style, score - error, score + error))
    label = f"Scores of {len(marks)} sequences by rank; the best is {found.scores.sequences[0].notation}"
    drawing = scatter(marks, titles=("Score", "Rank"), label=label, whole=True, size="")
    caption = "Whiskers: ± standard error over seeds. Marked: sequences that win at least one resample in twenty."
    return element("figure", drawing, element("figcaption", caption))


def regret_figure(found: RegretResult) -> Markup:
    """Median simple regret by trials, with bands from the 10 % to the 90 % quantile over replays."""
    curves = []
    start = 1 + found.replays[0].regret.shape[1] // 10
    for replay in found.replays:
        low, middle, high = (quantile[start - 1 :] for quantile in replay.quantiles())
        curves.append(Band(replay.proposer, middle.tolist(), low.tolist(), high.tolist()))
    label = f"Simple regret by trials of {', '.join(curve.name for curve in curves)}"
    drawing = bands(curves, titles=("Simple regret", "Trials"), label=label, start=start)
    caption = f"Medians of {len(found.replays[0].regret)} replays; bands from the 10 % to the 90 % quantile."
    caption += f" Drawn from trial {start} on; what is before would flatten the picture." if start > 1 else ""
    return element("figure", drawing, element("figcaption", caption))


def agreement_figure(found: Sequence[Agreement]) -> Markup | None:
    """Spearman's rho of every comparison with its interval, and the scores of a single one; None without any."""
    known = [each for each in found if each.spearman is not None]
    if not known:
        return None
    parts = []
    if len(known) == 1:
        only = known[0]
        points = zip(*only.points, only.names, strict=True)
        marks = [Mark(float(x), float(y), f"{name}\n{x:.4f}, {y:.4f}") for x, y, name in points]
        label = f"{only.target} by {only.proxy} for {only.candidates} candidates"
        parts.append(scatter(marks, titles=(only.target, only.proxy), label=label))
    parts.append(_rho_forest(known))
    caption = "Spearman's rho, 95 % bootstrap intervals over candidates."
    return element("figure", *parts, element("figcaption", caption))


def _rho_forest(found: Sequence[Agreement]) -> Markup:
    estimates = []
    for each in found:
        pairs = ((each.proxy, each.spearman), ("↳ parameter count alone", each.by_parameters))
        for name, interval in pairs:
            if interval is not None:
                words = f"{name} against {each.target}\n{interval}"
                estimates.append(Estimate(name, interval.value, interval.low, interval.high, words))
    label = "; ".join(estimate.words.replace("\n", ": ") for estimate in estimates)
    return forest(estimates, title="Spearman's rho", label=label, through=0.0)


def standing_figure(found: Standing) -> Markup:
    """How far each sequence lies behind the study's best, with intervals over resampled seeds."""
    estimates = []
    for place in found.places:
        name = f"{place.sequence.notation} {place.name}".strip()
        words = f"{name}\nscore {place.score:.4f}, rank {place.rank} of {found.candidates}, behind {place.behind}"
        estimates.append(Estimate(name, place.behind.value, place.behind.low, place.behind.high, words))
    label = "; ".join(estimate.words.replace("\n", ": ") for estimate in estimates)
    drawing = forest(estimates, title="Score behind the best", label=label, through=0.0)
    caption = f"Of {found.candidates} candidates with {found.seeds} seeds each; lines: 95 % over resampled seeds."
    return element("figure", drawing, element("figcaption", caption))


def ablation_figure(found: Ablation) -> Markup:
    """The median score of every rule's choice, with the 10 % and 90 % quantiles over drawn studies."""
    estimates = []
    for each in found.rules:
        quantiles = each.quantiles()
        if quantiles:
            low, middle, high = quantiles
            words = f"{each.rule}\n{middle:.4f} [{low:.4f}, {high:.4f}]"
            estimates.append(Estimate(each.rule, middle, low, high, words))
    label = "; ".join(estimate.words.replace("\n", ": ") for estimate in estimates)
    drawing = forest(estimates, title="Oracle's score of the choice", label=label, through=found.best)
    draws = len(found.rules[0].scores)
    caption = f"Medians over {draws} studies of {found.size} trials; lines from the 10 % to the 90 % quantile; dashed: "
    return element("figure", drawing, element("figcaption", f"{caption}the best sequence of the oracle."))


def votes_figure(found: Votes) -> Markup:
    """The share of the resamples that choose each sequence."""
    estimates = []
    for sequence, share in [*found.shares.items()][:_MOST_VOTES]:
        words = f"{sequence.notation}\nchosen by {share:.1%} of {found.resamples} resamples"
        estimates.append(Estimate(sequence.notation, share, None, None, words))
    label = "; ".join(estimate.words.replace("\n", ": ") for estimate in estimates)
    drawing = forest(estimates, title="Share of the resamples that choose it", label=label, through=0.0)
    caption = f"The {len(estimates)} most frequent of {len(found.shares)} sequences; the vote as it is: "
    return element("figure", drawing, element("figcaption", f"{caption}{found.chosen.notation}."))


def growth_figure(found: Growth) -> Markup:
    """The architectures as bars at one scale."""
    longest = max(len(each.sequence) for each in found.architectures.values())
    bars = []
    for name, each in found.architectures.items():
        words = element("p", element("strong", name), class_="bar-head")
        bars.append(element("div", words, block_strip(each.sequence.letters, longest), class_="bar"))
    return element("figure", primitive_legend(), join(bars))
