"""Where given sequences stand among the candidates of a study: rank, distance from its best, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.evidence.exhibit import Cell, Exhibit
from composer_search.evidence.oracle import RESAMPLES, resampled_means
from composer_search.evidence.ranks import Floats, Interval, interval
from composer_search.evidence.scores import Scores, read_scores
from composer_search.study import Study


@dataclass(frozen=True)
class Place:
    """One sequence.

    Attributes:
        name: What it is, for people.
        sequence: The sequence.
        score: Its score.
        rank: One more than the study's candidates that score higher.
        ranks: The 5 % and 95 % quantiles of its rank over resampled seeds; None with one seed.
        behind: The best candidate's score less its own, with an interval over resampled seeds.
        tasks: Its score on each task.
    """

    name: str
    sequence: CompositeSequence
    score: float
    rank: int
    ranks: tuple[int, int] | None
    behind: Interval
    tasks: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "sequence": str(self.sequence), "behind": self.behind.as_dict()}


@dataclass(frozen=True)
class Standing:
    """Several sequences in one study.

    Attributes:
        study: Its name.
        candidates: How many it has.
        seeds: Trainings of each.
        places: The sequences, best first.
    """

    study: str
    candidates: int
    seeds: int
    places: tuple[Place, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "places": [place.as_dict() for place in self.places]}

    def exhibit(self) -> Exhibit:
        """The places as a table."""
        tasks = tuple(self.places[0].tasks)
        columns = ("Sequence", "", "Score", f"Rank of {self.candidates}", "5 % to 95 %", "Behind the best", *tasks)
        return Exhibit(f"Standing in {self.study}", columns, tuple(map(self._row, self.places)), self._findings())

    def _row(self, place: Place) -> tuple[Cell, ...]:
        ranks = None if place.ranks is None else f"{place.ranks[0]} to {place.ranks[1]}"
        low, high = place.behind.low, place.behind.high
        behind = f"{place.behind.value:.4f}" + ("" if low is None or high is None else f" [{low:.4f}, {high:.4f}]")
        return place.sequence.notation, place.name, place.score, place.rank, ranks, behind, *place.tasks.values()

    def _findings(self) -> tuple[str, ...]:
        if self.seeds < 2:
            return ("One seed a candidate: how far these differences are noise cannot be told.",)
        return (
            f"Intervals: resampled seeds, {self.seeds} of each sequence. The best is the best of {self.candidates} by "
            "the same scores and so partly lucky; what lies behind it by an interval with zero may be as good.",
        )


def standing(
    study: Path,
    sequences: Sequence[tuple[str, CompositeSequence]] = (),
    *,
    others: Path | None = None,
    seed: int = 0,
) -> Standing:
    """Look sequences up in a study, or in another one that was scored by the same evaluator.

    Args:
        study: The folder of a study.
        sequences: Names and sequences; the study's best candidate is always among those that come back.
        others: The folder of a study of sequences that a search did not try (``search --only``); all of it comes back.
        seed: Of the resampling.

    Raises:
        UsageError: If a sequence was scored in neither study, or the two were scored differently.
    """
    scores = read_scores(study)
    extra = _alike(study, others) if others else None
    best = scores.sequences[int(scores.values.argmax())]
    wanted = [("best of the study", best), *sequences]
    wanted += [("", sequence) for sequence in extra.sequences] if extra else []
    named: dict[CompositeSequence, list[str]] = {}
    for name, sequence in wanted:
        named.setdefault(sequence, []).append(name)
    behind, ranks = _compared(scores, extra, seed)
    places = []
    for sequence, names in named.items():
        source, row = _find(sequence, scores, extra)
        value = float(source.values[row])
        column = row + (len(scores) if source is extra else 0)
        distance = float(scores.values.max()) - value
        quantiles = None if ranks is None else np.quantile(ranks[:, column], [0.05, 0.95], method="nearest")
        places.append(
            Place(
                name=", ".join(filter(None, names)),
                sequence=sequence,
                score=value,
                rank=1 + int((scores.values > value).sum()),
                ranks=None if quantiles is None else (int(quantiles[0]), int(quantiles[1])),
                behind=Interval(distance) if behind is None else interval(distance, behind[:, column]),
                tasks={task: float(values[row]) for task, values in source.tasks.items()},
            )
        )
    places.sort(key=lambda place: -place.score)
    seeds = 1 if scores.seeds is None else scores.seeds.shape[1]
    return Standing(str(study), len(scores), seeds, tuple(places))


def _alike(study: Path, others: Path) -> Scores:
    """The other study's scores, if they compare."""
    first, second = (Study.load(path).settings for path in (study, others))
    differing = [name for name in first.evaluator if first.evaluator[name] != second.evaluator.get(name)]
    if differing or set(second.evaluator) - set(first.evaluator):
        named = ", ".join(differing or sorted(set(second.evaluator) - set(first.evaluator)))
        raise UsageError(f"{others} was scored otherwise than {study}: they differ in {named}")
    return read_scores(others)


def _find(sequence: CompositeSequence, scores: Scores, extra: Scores | None) -> tuple[Scores, int]:
    for source in (scores, extra):
        if source is not None and sequence in source.sequences:
            return source, source.sequences.index(sequence)
    hint = f"score it with `composer-megatron search OTHER --only {sequence}` and the same options, and give --others"
    raise UsageError(f"{sequence} has no score in {scores.name}; {hint}")


def _compared(scores: Scores, extra: Scores | None, seed: int) -> tuple[Floats | None, Floats | None]:
    """Distances from the study's best mean candidate and ranks, both [resamples, candidates and extra ones].

    None where there is one seed.
    """
    parts = [source.seeds for source in (scores, extra) if source is not None]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None, None
    draws = resampled_means(np.concatenate(known), seed, RESAMPLES)
    own = np.sort(draws[:, : len(scores)], axis=1)
    best = draws[:, [int(scores.values.argmax())]]
    above = [len(scores) - np.searchsorted(mine, all_, side="right") for mine, all_ in zip(own, draws, strict=True)]
    return best - draws, 1.0 + np.array(above, dtype=np.float64)
