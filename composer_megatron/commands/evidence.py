"""``evidence …``: what scores, proposers and aggregators are worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tyro.conf import Positional

from composer_megatron.commands.options import Several, read_sequence
from composer_megatron.display import console, print_json, print_table
from composer_megatron.errors import ComposerError
from composer_megatron.shape import load_shape

if TYPE_CHECKING:
    from rich.console import JustifyMethod

    from composer_search.evidence.exhibit import Exhibit
    from composer_search.report.markup import Markup


def evidence_oracle(study: Positional[Path], *, seed: int = 0, output: Path | None = None, json: bool = False) -> None:
    """Rank an exhaustive study with its seeds: error of each rank, who wins how often, and the noise ceiling.

    Args:
        study: Folder of a study with at least two seeds.
        seed: Of the resampling.
        output: The page with the figure; by default STUDY/evidence/oracle.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.oracle import oracle
    from composer_search.evidence.scores import read_scores
    from composer_search.report.evidence import oracle_figure

    found = oracle(read_scores(study), seed=seed)
    output = output or study / "evidence" / "oracle.html"
    _show_exhibit(found.exhibit(), found.as_dict(), oracle_figure(found), output, json)


def evidence_regret(
    study: Positional[Path],
    *,
    proposers: tuple[str, ...] = ("random", "evolution", "bayesian"),
    replays: int = 10,
    budget: int | None = None,
    noisy: bool = False,
    seed: int = 0,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Replay proposers against an exhaustive study and show how soon each finds its best sequence.

    Args:
        study: Folder of a study that has tried every sequence of its space.
        proposers: Who is replayed.
        replays: Seeds of each.
        budget: Trials of a replay; by default half the space.
        noisy: Show one seed's scores and judge by the mean of the others.
        seed: Of the first replay.
        output: The page with the figure; by default STUDY/evidence/regret.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.regret import regret
    from composer_search.report.evidence import regret_figure
    from composer_search.study import Study

    loaded = Study.load(study)
    found = regret(loaded, proposers=proposers, replays=replays, budget=budget, noisy=noisy, seed=seed)
    output = output or study / "evidence" / "regret.html"
    _show_exhibit(found.exhibit(), found.as_dict(), regret_figure(found), output, json)


def evidence_agreement(
    study: Positional[Path],
    *,
    target: Path | None = None,
    seed: int = 0,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Do scores rank as others do, and better than the parameter count alone?

    Without --target, each task is compared with the mean of the others, and the parameter count with the score.

    Args:
        study: Folder of the study that is judged, or a JSON file {"2A4M": 0.81, ...}.
        target: What it should predict: another study, or such a file.
        seed: Of the resampling.
        output: The page with the figure; by default STUDY/evidence/agreement.html, or agreement-TARGET.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence import agreement as ranks
    from composer_search.evidence.scores import read_scores
    from composer_search.report.evidence import agreement_figure

    scores = read_scores(study)
    if target:
        found = ranks.compare(scores, read_scores(target), seed=seed)
    else:
        found = [ranks.size_agreement(scores, seed=seed), *ranks.task_agreements(scores, seed=seed)]
    values = {"agreements": [each.as_dict() for each in found]}
    folder = study.parent if study.suffix == ".json" else study
    name = f"agreement-{_label(target)}" if target else "agreement"
    output = output or folder / "evidence" / f"{name}.html"
    _show_exhibit(ranks.exhibit(found), values, agreement_figure(found), output, json)


def _label(source: Path) -> str:
    """A study's folder or a score file, by its last name."""
    return source.stem if source.suffix == ".json" else source.resolve().name


def evidence_standing(
    study: Positional[Path],
    sequences: Positional[tuple[str, ...]] = (),
    *,
    others: Path | None = None,
    seed: int = 0,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Where do given sequences stand among the candidates of a study?

    Args:
        study: Folder of a study.
        sequences: Such as 2A4M, or the aggregate.json of a study; the study's best is shown in any case.
        others: Folder of a study made with search --only, of sequences that the search itself did not try.
        seed: Of the resampling.
        output: The page with the figure; by default STUDY/evidence/standing.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.standing import standing
    from composer_search.report.evidence import standing_figure

    named = [("" if "." not in each else Path(each).stem, read_sequence(each)) for each in sequences]
    found = standing(study, named, others=others, seed=seed)
    output = output or study / "evidence" / "standing.html"
    _show_exhibit(found.exhibit(), found.as_dict(), standing_figure(found), output, json)


def evidence_ablation(
    study: Positional[Path],
    *,
    trials: int | None = None,
    draws: int = 50,
    clusters: tuple[int, ...] = (2, 3, 5, 8),
    noisy: bool = False,
    seed: int = 0,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Compare aggregators (clusters, N_0, N_1, all, best trial, Gaussian process) on studies drawn from a big one.

    Args:
        study: Folder of a study, exhaustive where every choice is to be judged.
        trials: Trials of a drawn study; by default a quarter, at least 8.
        draws: How many studies are drawn.
        clusters: Numbers of K-means clusters.
        noisy: Show one seed's scores and judge by the mean of the others.
        seed: Of the draws.
        output: The page with the figure; by default STUDY/evidence/ablation.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.ablation import ablate
    from composer_search.evidence.scores import read_scores
    from composer_search.report.evidence import ablation_figure

    found = ablate(read_scores(study), size=trials, draws=draws, clusters=clusters, noisy=noisy, seed=seed)
    output = output or study / "evidence" / "ablation.html"
    _show_exhibit(found.exhibit(), found.as_dict(), ablation_figure(found), output, json)


def evidence_votes(
    study: Positional[Path],
    *,
    resamples: int = 500,
    seed: int = 0,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """How firm is the vote: other numbers of clusters, one seed alone, one task less, and resampled seeds.

    Args:
        study: Folder of a study with at least two seeds and sequences of one length.
        resamples: Of the seeds, each of which votes.
        seed: Of the resampling.
        output: The page with the figure; by default STUDY/evidence/votes.html.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.scores import read_scores
    from composer_search.evidence.votes import votes
    from composer_search.report.evidence import votes_figure

    found = votes(read_scores(study), resamples=resamples, seed=seed)
    output = output or study / "evidence" / "votes.html"
    _show_exhibit(found.exhibit(), found.as_dict(), votes_figure(found), output, json)


def evidence_growth(
    source: Positional[str],
    *,
    shape: str = "1b",
    seq_len: int = 4096,
    run: Several = (),
    output: Path = Path("growth.html"),
    json: bool = False,
) -> None:
    """Stacking against stretching: both grown architectures with exact counts, and their losses where runs are given.

    Args:
        source: A sequence such as 2A4M, an aggregate.json, or an aggregated study.
        shape: A preset or a JSON file with the widths.
        seq_len: Tokens in a sequence, for the FLOPs.
        run: Folder of an evaluated training run; may be given several times.
        output: The page with the figure.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.evidence.growth import grow_both
    from composer_search.report.data import read_run
    from composer_search.report.evidence import growth_figure

    folder = Path(source)
    sequence = read_sequence(str(folder / "aggregate.json") if folder.is_dir() else source)
    trained = []
    for each in run:
        found_run = read_run(each, Path(each))
        if found_run.evaluation is None:
            raise ComposerError(f"{each} has no eval.json: run `composer-megatron eval {each}` first")
        trained.append((found_run.architecture, found_run.evaluation["bits_per_byte"]))
    found = grow_both(sequence, load_shape(shape), seq_len=seq_len, runs=trained)
    _show_exhibit(found.exhibit(), found.as_dict(), growth_figure(found), output, json)


def _show_exhibit(exhibit: Exhibit, values: dict[str, Any], figure: Markup | None, page: Path, json: bool) -> None:
    """A result of `composer_search.evidence`: its page, and its table or its JSON."""
    from composer_search.evidence.exhibit import shown
    from composer_search.report.evidence import write_exhibit

    write_exhibit(page, exhibit, figure)
    if json:
        print_json(values)
        return
    table = Table(title=exhibit.title, title_justify="left")
    rows = [[shown(value) for value in row] for row in exhibit.rows]
    for index, heading in enumerate(exhibit.columns):
        numeric = any(isinstance(row[index], int | float) for row in exhibit.rows)
        whole = max((len(row[index]) for row in rows), default=0) if numeric else None  # no number is broken
        justify: JustifyMethod = "right" if numeric else "left"
        table.add_column(heading, justify=justify, min_width=whole, overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_table(table)
    for finding in exhibit.findings:
        console.print(finding, markup=False)
    console.print(f"figure written to {page}", markup=False)
