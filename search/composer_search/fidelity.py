"""Less training for what starts badly: successive halving, and what a proxy's ranking is worth.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) trains all sequences a little, keeps the best 1/eta,
trains those eta times as long, and so on. Every rung trains anew, with a learning-rate schedule of its own length, as
a training that was cut off in the middle of its schedule says less; it costs the few survivors 1/eta + 1/eta² + … more.

It rests on early rankings being right. So a few sequences go on to the end whatever their ranking, and the correlation
of each rung's scores with the final ones, over those that went on, is kept with the results and warned about when low.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import append_json_line, read_json_lines
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluation import Evaluation, Evaluator, MatchableEvaluator, ScalableEvaluator
from composer_search.evidence.agreement import Agreement, agreement, size_agreement
from composer_search.evidence.ranks import LEAST, spearman
from composer_search.evidence.scores import Scores

log = logging.getLogger(__name__)


class FidelityEvaluator(Evaluator, Protocol):
    """An evaluator that can train less, and several sequences at once."""

    def evaluate_many(self, sequences: Sequence[CompositeSequence]) -> list[Evaluation]:
        """Score sequences, in their order."""
        ...

    def at_fidelity(self, share: float) -> FidelityEvaluator:
        """The same with that share of the training steps, above 0 and at most 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class Halving:
    """How training is spent.

    Attributes:
        rungs: How often sequences are compared, the last rung being whole trainings.
        eta: Of the sequences on a rung the best 1/eta go on, to trainings eta times as long.
        audit: Sequences drawn at random that go on to the end in any case, to see whether early rankings are right.
        seed: Of that draw.
        together: Sequences that are trained at once and then recorded; what an interruption loses at most.
        warn_below: Spearman correlation of a rung with the end below which a warning is logged.
    """

    rungs: int = 3
    eta: int = 3
    audit: int = 1
    seed: int = 0
    together: int = 32
    warn_below: float = 0.5

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the setting."""
        for name, least in (("rungs", 2), ("eta", 2), ("audit", 0), ("seed", 0), ("together", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"halving: {name}={getattr(self, name)}; expected at least {least}")
        if not -1 <= self.warn_below <= 1:
            raise UsageError(f"halving: warn_below={self.warn_below}; expected a correlation from -1 to 1")

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the training steps on each rung."""
        return tuple(1 / self.eta**left for left in reversed(range(self.rungs)))

    def going_on(self, number: int) -> int:
        """How many of `number` sequences go on to the next rung at most."""
        return min(number, math.ceil(number / self.eta) + self.audit)

    @property
    def least(self) -> int:
        """The fewest sequences of which any is dropped."""
        return next(number for number in itertools.count(1) if self.going_on(number) < number)

    def cost(self, number: int) -> float:
        """Whole trainings that halving `number` sequences costs at most, by training steps."""
        cost = 0.0
        for share in self.shares[:-1]:
            if self.going_on(number) < number:
                cost, number = cost + share * number, self.going_on(number)
        return cost + number


class HalvingEvaluator(Evaluator):
    """Another evaluator by successive halving over the sequences that it is given together.

    A sequence's evaluation is that of the last rung it reached. Those that were dropped have scores of shorter
    trainings, so that the score of a sequence depends on its company; ``details["fidelity"]`` tells. One sequence alone
    is trained in full. On a CPU, and from one process, the results are a function of the arguments.

    Args:
        base: What evaluates.
        halving: How training is spent.
        log: File to which each measurement is appended, and from which it is taken when it is needed again, be it after
            an interruption. Measurements with other settings of `base` may be in the same file; they do not matter.
    """

    def __init__(self, base: FidelityEvaluator, halving: Halving | None = None, log: Path | None = None) -> None:
        self.base, self.halving, self.log = base, halving or Halving(), log
        self._known: dict[tuple[str, str], Evaluation] = {}
        self._rungs = [(share, base.at_fidelity(share)) for share in self.halving.shares[:-1]] + [(1.0, base)]
        self._keys = [_fingerprint(evaluator.describe()) for _, evaluator in self._rungs]

    @property
    def device(self) -> str:
        """Where the evaluator's candidates are trained."""
        return str(getattr(self.base, "device", "cpu"))

    def describe(self) -> dict[str, Any]:
        """The settings, and under ``full`` those of the evaluator; where the log lies is not among them."""
        settings = dataclasses.asdict(self.halving)
        for unused in ("together", "warn_below"):
            del settings[unused]
        return {"name": "halving", **settings, "full": self.base.describe()}

    def evaluate(self, sequence: CompositeSequence) -> Evaluation:
        """Evaluate one sequence in full."""
        return self.evaluate_many([sequence])[0]

    def evaluate_many(self, sequences: Sequence[CompositeSequence]) -> list[Evaluation]:
        """Halve the sequences; an evaluation for each, in their order.

        Raises:
            FileError: If the log is corrupt or cannot be written; what it holds is safe.
        """
        self._read_log()
        left = sorted(set(sequences), key=lambda sequence: sequence.letters)
        audited = self._audited(left)
        scores: dict[CompositeSequence, list[tuple[float, float]]] = {sequence: [] for sequence in left}
        found: dict[CompositeSequence, Evaluation] = {}
        for rung, (share, _) in enumerate(self._rungs):
            last = rung == len(self._rungs) - 1
            if not last and self.halving.going_on(len(left)) >= len(left):
                continue
            evaluated = self._evaluate_rung(rung, left)
            found |= evaluated
            for sequence in left:
                scores[sequence].append((share, evaluated[sequence].score))
            ranked = sorted(left, key=lambda sequence: _worth(evaluated[sequence].score), reverse=True)
            best = set(ranked[: math.ceil(len(left) / self.halving.eta)]) | audited
            left = [sequence for sequence in left if sequence in best]
        agreements = self._agreements()
        return [_with_fidelity(found[sequence], scores[sequence], agreements) for sequence in sequences]

    def at_fidelity(self, share: float) -> HalvingEvaluator:
        """Halving of the evaluator with that share of the steps."""
        return HalvingEvaluator(self.base.at_fidelity(share), self.halving, self.log)

    def scaled(self, share: Fraction) -> HalvingEvaluator:
        """Halving of the evaluator with other widths.

        Raises:
            UsageError: If the evaluator cannot have other widths.
        """
        if not isinstance(self.base, ScalableEvaluator):
            raise UsageError(f"{type(self.base).__name__} has no widths to scale")
        base: Any = self.base.scaled(share)
        return HalvingEvaluator(base, self.halving, self.log)

    def with_weights(self, weights: int) -> HalvingEvaluator:
        """Halving of the evaluator with equally big candidates.

        Raises:
            UsageError: If the evaluator cannot have other widths.
        """
        if not isinstance(self.base, MatchableEvaluator):
            raise UsageError(f"{type(self.base).__name__} has no widths to match")
        base: Any = self.base.with_weights(weights)
        return HalvingEvaluator(base, self.halving, self.log)

    def _audited(self, sequences: Sequence[CompositeSequence]) -> set[CompositeSequence]:
        """Drawn by the seed and the sequences, so that it is not always the same place in the alphabet."""
        company = zlib.crc32(",".join(sequence.letters for sequence in sequences).encode())
        rng = np.random.default_rng([self.halving.seed, company])
        places = rng.permutation(len(sequences))[: self.halving.audit]
        return {sequences[place] for place in places}

    def _evaluate_rung(self, rung: int, sequences: Sequence[CompositeSequence]) -> dict[CompositeSequence, Evaluation]:
        """The sequences on one rung, those that are not known trained and recorded."""
        key, (_, evaluator) = self._keys[rung], self._rungs[rung]
        new = [sequence for sequence in sequences if (key, sequence.letters) not in self._known]
        for start in range(0, len(new), self.halving.together):
            together = new[start : start + self.halving.together]
            for sequence, evaluation in zip(together, evaluator.evaluate_many(together), strict=True):
                line = {"settings": key, "sequence": sequence.letters, "evaluation": dataclasses.asdict(evaluation)}
                if self.log is not None:
                    append_json_line(self.log, line)
                self._learn(json.loads(json.dumps(line)))
        return {sequence: self._known[key, sequence.letters] for sequence in sequences}

    def _read_log(self) -> None:
        if self.log is None:
            return
        for number, line in enumerate(read_json_lines(self.log, repair=True), start=1):
            try:
                self._learn(line)
            except (KeyError, TypeError) as error:
                raise FileError(f"{self.log}, line {number}: no evaluation ({error!r}); remove that line") from None

    def _learn(self, line: dict[str, Any]) -> None:
        """Take a line of the log; new measurements pass through JSON as well, so that a resumed study is the same."""
        values = dict(line["evaluation"])
        seeds = tuple(values.pop("seed_scores"))
        self._known[line["settings"], line["sequence"]] = Evaluation(**values, seed_scores=seeds)

    def _agreements(self) -> list[dict[str, Any]]:
        """How each early rung ranks, of all sequences measured so far, those that reached the end."""
        final = self._scores(len(self._rungs) - 1)
        agreements = []
        for rung, (share, _) in enumerate(self._rungs[:-1]):
            early = self._scores(rung)
            both = [letters for letters in early if letters in final]
            rho = rank_agreement([early[letters] for letters in both], [final[letters] for letters in both])
            agreements.append({"share": share, "sequences": len(both), "spearman": rho})
            if rho is not None and rho < self.halving.warn_below:
                log.warning(
                    "halving: after %.0f %% of the training the ranking of %d sequences agrees with the final one only "
                    "to a Spearman correlation of %.2f; use fewer rungs, or longer trainings",
                    100 * share,
                    len(both),
                    rho,
                )
        return agreements

    def _scores(self, rung: int) -> dict[str, float]:
        key = self._keys[rung]
        known = {letters: evaluation.score for (own, letters), evaluation in self._known.items() if own == key}
        return {letters: score for letters, score in known.items() if math.isfinite(score)}


def rank_agreement(early: Sequence[float], late: Sequence[float]) -> float | None:
    """Spearman's rho of two sets of scores of the same sequences.

    None where there are fewer than `LEAST`, or where one set holds nothing but equal scores.
    """
    if len(early) < LEAST:
        return None
    rho = float(spearman(np.array(early, dtype=np.float64), np.array(late, dtype=np.float64))[0])
    return rho if math.isfinite(rho) else None


def proxy_agreements(scores: Scores, target: Scores, *, seed: int = 0) -> list[Agreement]:
    """What a proxy's score, each of its tasks and the parameter count alone say about a target.

    A task is worth something if it ranks better than the parameter count: `Agreement.gain` is the difference of the
    Spearman correlations, with an interval, and `Agreement.verdict` says so in words.

    Args:
        scores: The proxy's scores, such as those of a study on MAD.
        target: What they should predict, such as scores of larger models on text.
        seed: Of the resampling.

    Returns:
        The score first, then each task, then the parameter count.

    Raises:
        UsageError: If no sequence is in both.
    """
    tasks = [Scores(task, scores.sequences, values) for task, values in scores.tasks.items()]
    found = [agreement(each, target, seed=seed) for each in (scores, *tasks)]
    common = set(scores.sequences)
    places = [place for place, sequence in enumerate(target.sequences) if sequence in common]
    return [*found, size_agreement(target.at(places), seed=seed)]


def _worth(score: float) -> float:
    """A score as a key of sorting: what is no number is worth nothing."""
    return score if math.isfinite(score) else -math.inf


def _with_fidelity(
    evaluation: Evaluation, scores: Sequence[tuple[float, float]], agreements: Sequence[dict[str, Any]]
) -> Evaluation:
    fidelity: dict[str, Any] = {"share": scores[-1][0], "scores": [list(pair) for pair in scores]}
    if fidelity["share"] == 1.0:
        fidelity["agreement"] = list(agreements)
    return dataclasses.replace(evaluation, details={**evaluation.details, "fidelity": fidelity})


def _fingerprint(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
