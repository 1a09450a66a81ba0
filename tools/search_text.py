"""Do MAD's tasks rank the 64 sequences of six blocks as a little text does, and better than the parameter count alone?

::

    python tools/preprocess_text.py --text books/ --vocab-size 1024 --valid-fraction 0.1 --output runs/text
    python tools/search_text.py run --text runs/text --seconds 140     # trains what is missing; meant for a GPU
    python tools/search_text.py compare                                # with results.json's scores; no GPU, no text

``benchmarks/results/search`` keeps the losses, ``text.jsonl.gz``, and what follows from them, ``text.json``. The models
have MAD's own widths, so that only what they are trained on differs.

``run`` trains all sequences of a seed at once, one seed after the other, and appends their held-out losses, in nats a
token, to the work folder's ``text.jsonl`` at every evaluation. A seed that was cut short begins anew; what it has left
says how early the ranking is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search_studies import RESULTS, SIX, VOTES, above_zero, pack, rounded, show, unpack

from composer_megatron.commands.options import read_overrides
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import append_json_line, read_json, read_json_lines, write_json
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluators.mad import training_seed
from composer_search.evidence import agreement as ranks
from composer_search.evidence.agreement import Agreement
from composer_search.evidence.exhibit import Exhibit
from composer_search.evidence.oracle import noise_ceiling, oracle
from composer_search.evidence.ranks import Floats, spearman
from composer_search.evidence.scores import Scores, parameters
from composer_search.evidence.votes import votes
from composer_search.population import Row
from composer_search.report import evidence as figures
from composer_search.report.drawings import Mark, scatter
from composer_search.report.markup import Markup, element, join
from composer_search.text_evaluator import TextEvaluator, text_preset
from composer_search.text_training import train_for_loss
from composer_search.trainer import choose_device

PACKED = "text.jsonl.gz"
SHOWN = 5
"""The best sequences of each ranking that are listed."""

NAMED = ("2A4M", "1A1M1A1M1A1M", "6A", "6M")
"""Listed in any case: the paper's, a Llama, and the two of one primitive."""

FIDELITY: Mapping[str, Any] = {
    **{"hidden_size": 128, "num_heads": 16, "ffn_hidden_size": 352},
    **{"seq_len": 256, "n_train": 28_672, "n_valid": 1024, "n_test": 1024},
    **{"steps": 3200, "batch_size": 8, "learning_rates": 4e-3, "warmup_steps": 160, "evaluate_every": 400},
    **{"precision": "bfloat16", "device": "auto", "seeds": 1},
}
"""MAD's widths; 2,048 tokens a step, 6.6 million in all. Of 2, 4 and 8 thousandths 4 left 2A4M the least loss after 300
steps of half as many tokens on a CPU; 6A stood at the plateau of single tokens longest at the lowest rate."""

Nats = Mapping[str, float | None]
"""Held-out loss a token by letters; None where it is no number."""


class _OutOfTimeError(Exception):
    """Ends a training after an evaluation."""


@dataclass(frozen=True)
class Log:
    """Losses of one seed on their way into the file.

    Attributes:
        path: The file.
        head: What all lines of the seed begin with.
        letters: The sequences.
        steps: Of a training.
        end: When the time is up, as `time.monotonic` counts.
    """

    path: Path
    head: Mapping[str, Any]
    letters: Sequence[str]
    steps: int
    end: float

    def look(self, step: int, judged: Mapping[int, float]) -> None:
        """Keep the validation losses of some sequences, by their places."""
        self.write(step, "validation", judged)
        left = self.end - time.monotonic()
        print(f"seed {self.head['seed']}, step {step}: {min(judged.values()):.4f} nats, {left:.0f} s left", flush=True)
        if left <= 0 and step < self.steps:
            raise _OutOfTimeError

    def write(self, step: int, part: str, nats: Mapping[int, float]) -> None:
        """Append a line."""
        values = {self.letters[place]: round(each, 6) if np.isfinite(each) else None for place, each in nats.items()}
        append_json_line(self.path, {**self.head, "step": step, part: values})


def run(
    text: Path, losses: Path, letters: Sequence[str], seeds: int, seconds: float, overrides: Mapping[str, Any]
) -> None:
    """Train the seeds that are missing, until the time is up.

    Raises:
        UsageError: If there are several learning rates or seeds, which are not this program's to choose from.
    """
    end = time.monotonic() + seconds
    evaluator = TextEvaluator(text_preset("small-text", text=[text], **{**FIDELITY, **overrides}))
    settings, train = evaluator.settings, evaluator.settings.train
    if len(train.learning_rates) > 1 or settings.seeds > 1:
        raise UsageError(f"learning_rates={train.learning_rates}, seeds={settings.seeds}; expected one of each")
    described = {name: value for name, value in evaluator.describe().items() if name not in ("name", "seeds")}
    device = choose_device(train.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    read_json_lines(losses, repair=True)
    known = read_losses(losses, described).test
    for number in range(seeds):
        if set(known.get(number, ())) >= set(letters):
            print(f"seed {number} is there", flush=True)
            continue
        if time.monotonic() >= end:
            break
        seed, rate = training_seed(settings.seed, number), train.learning_rates[0]
        rows = [Row(CompositeSequence(each), evaluator.sample.data, rate, train.weight_decay, seed) for each in letters]
        log = Log(losses, {"settings": described, "device": machine, "seed": number}, letters, train.steps, end)
        try:
            results = train_for_loss(rows, train, looked=log.look)
        except _OutOfTimeError:
            break
        log.write(train.steps, "test", {place: result.test for place, result in enumerate(results)})
    found = read_losses(losses, described).test
    whole = sum(set(found.get(number, ())) >= set(letters) for number in range(seeds))
    print(f"{whole} of {seeds} seeds are whole in {losses}; the same command trains what is missing", flush=True)


@dataclass(frozen=True)
class Losses:
    """What a file holds of one setting.

    Attributes:
        settings: The evaluator's, without its seeds.
        validation: By seed and step.
        test: By seed, after the last step.
    """

    settings: Mapping[str, Any]
    validation: Mapping[tuple[int, int], Nats]
    test: Mapping[int, Nats]


def read_losses(path: Path, settings: Mapping[str, Any] | None = None) -> Losses:
    """The losses of these settings, by default of those that most lines have; of repeated ones the last.

    Raises:
        FileError: If a line is none of `Log`'s.
    """
    lines = read_json_lines(path)
    validation: dict[tuple[int, int], dict[str, float | None]] = {}
    test: dict[int, dict[str, float | None]] = {}
    spelled = [json.dumps(line.get("settings"), sort_keys=True) for line in lines]
    wanted = json.dumps(settings, sort_keys=True) if settings else max(spelled, key=spelled.count, default="{}")
    for number, line in enumerate(lines, start=1):
        try:
            if json.dumps(line["settings"], sort_keys=True) == wanted:
                validation.setdefault((line["seed"], line["step"]), {}).update(line.get("validation", {}))
                test.setdefault(line["seed"], {}).update(line.get("test", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path}, line {number}: no losses ({error!r}); remove that line") from None
    return Losses(json.loads(wanted), validation, {seed: nats for seed, nats in test.items() if nats})


@dataclass(frozen=True)
class Curves:
    """Losses of the same sequences from several seeds.

    Attributes:
        sequences: Those whose losses are numbers throughout.
        left_out: The others' letters.
        steps: Of the evaluations that all seeds have.
        validation: [seeds, evaluations, sequences], in nats a token.
        test: [seeds, sequences] after the last step; None if a seed was cut short.
    """

    sequences: tuple[CompositeSequence, ...]
    left_out: tuple[str, ...]
    steps: tuple[int, ...]
    validation: Floats
    test: Floats | None

    @classmethod
    def of(cls, found: Losses) -> Curves:
        """The seeds that have come furthest.

        Raises:
            ComposerError: If there are no losses.
        """
        most = max(map(len, found.validation.values()), default=0)
        whole = {key: nats for key, nats in found.validation.items() if len(nats) == most > 0}
        if not whole:
            raise ComposerError("there are no losses on text; `run` on a GPU makes them")
        last = max(step for _, step in whole)
        seeds = [seed for seed, step in sorted(whole) if step == last]
        steps = [step for step in sorted({step for _, step in whole}) if all((seed, step) in whole for seed in seeds)]
        tests = [found.test.get(seed, {}) for seed in seeds]
        tested = all(len(nats) == most for nats in tests)
        parts = [whole[seed, step] for seed in seeds for step in steps] + (tests if tested else [])
        letters = [each for each in parts[0] if all(part.get(each) is not None for part in parts)]
        table = np.array([[part[each] for each in letters] for part in parts], dtype=np.float64)
        looks = len(seeds) * len(steps)
        return cls(
            sequences=tuple(map(CompositeSequence, letters)),
            left_out=tuple(each for each in parts[0] if each not in letters),
            steps=tuple(steps),
            validation=table[:looks].reshape(len(seeds), len(steps), -1),
            test=table[looks:] if tested else None,
        )

    def scores(self) -> Scores:
        """Held-out nats a token after the last step, of both halves where known, times -1: higher is better."""
        last = self.validation[:, -1]
        seeds = -(last if self.test is None else (last + self.test) / 2).T
        return Scores("text", self.sequences, seeds.mean(1), seeds if seeds.shape[1] > 1 else None)


def mad_scores(folder: Path) -> Scores:
    """The scores on MAD's tasks that `search_studies.py collect` has written.

    Raises:
        FileError: If they are not there.
    """
    path = folder / "results.json"
    try:
        found: Mapping[str, dict[str, Any]] = read_json(path, "a summary of studies")["six"]["scores"]
        seeds = np.array([row["seeds"] for row in found.values()], dtype=np.float64)
        names = [name for name in next(iter(found.values())) if name != "seeds"]
        tasks = {name: np.array([row[name] for row in found.values()], dtype=np.float64) for name in names}
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise FileError(f"{path} has no scores of six blocks ({error!r}); search_studies.py collect makes it") from None
    sequences = tuple(map(CompositeSequence.parse, found))
    return Scores("MAD", sequences, seeds.mean(1), seeds if seeds.shape[1] > 1 else None, tasks)


def compare(folder: Path, losses: Path, work: Path) -> None:
    """Print, draw and write what the losses on text say about the scores on MAD's tasks."""
    unpack(folder / PACKED, losses)
    found = read_losses(losses)
    curves, mad = Curves.of(found), mad_scores(folder)
    pack(losses, folder / PACKED)
    text = curves.scores()
    if missing := sorted(set(text.sequences) - set(mad.sequences), key=str):
        raise UsageError(f"{losses} has {missing[0]}, which has no score in {folder / 'results.json'}")
    inner = [ranks.at_equal_counts(each) for each in (mad, text)]
    alike = [replace(each, by_parameters=None, gain=None) for each in ranks.compare(*inner)]
    compared = [ranks.size_agreement(text), *ranks.compare(mad, text), *alike]
    listing = ranks.exhibit(compared)
    listing = replace(listing, findings=(*listing.findings, *_noise(curves, text, inner[1], mad, inner[0])))
    results: dict[str, Any] = {
        "settings": found.settings,
        "scores": {str(each): list(nats) for each, nats in zip(text.sequences, -_by_seed(text), strict=True)},
        "agreement": show(work / "text.html", listing, _figure(mad, text, compared)),
        "places": show(work / "text-places.html", places(mad, text), None),
        "fidelity": show(work / "text-fidelity.html", fidelity(curves, mad), None),
    }
    if text.seeds is not None:
        ballots, ranking = votes(text, resamples=VOTES), oracle(text)
        results["votes"] = show(work / "text-votes.html", ballots.exhibit(), figures.votes_figure(ballots))
        results["oracle"] = show(work / "text-oracle.html", ranking.exhibit(), figures.oracle_figure(ranking))
    write_json(folder / "text.json", rounded(results))
    print(f"summary written to {folder / 'text.json'}")


def _by_seed(scores: Scores) -> Floats:
    return scores.values[:, None] if scores.seeds is None else scores.seeds


def _noise(curves: Curves, *several: Scores) -> list[str]:
    """What any agreement is bounded by."""
    words = [f"Left out, since a loss was no number: {', '.join(curves.left_out)}."] if curves.left_out else []
    if curves.test is not None:
        halves = spearman(curves.validation[:, -1].mean(0), curves.test.mean(0))[0]
        words.append(f"The two halves of the held-out text rank the sequences alike at Spearman {halves:.3f}.")
    for scores in several:
        found = None if scores.seeds is None else noise_ceiling(scores.seeds)
        if found:
            ceiling = f"the ceiling of any proxy for it is {found.ceiling:.2f}"
            words.append(f"{scores.name}: two single seeds agree at Spearman {found.single}; {ceiling}.")
    return words


def _figure(mad: Scores, text: Scores, compared: Sequence[Agreement]) -> Markup:
    """Each sequence's loss by its rank on MAD's tasks, and all correlations with their intervals."""
    scores = mad.at([mad.sequences.index(each) for each in text.sequences]).values
    marks = []
    for sequence, score, value in zip(text.sequences, scores.tolist(), text.values.tolist(), strict=True):
        rank = 1 + int((scores > score).sum())
        words = f"{sequence.notation}\n{-value:.4f} nats; MAD {score:.4f}, rank {rank}"
        marks.append(Mark(rank, -value, words, "disc member" if sequence.notation in NAMED else "disc"))
    label = f"Held-out nats a token by rank on MAD's tasks for {len(marks)} sequences"
    drawing = scatter(marks, titles=("Nats a token", "Rank on MAD's tasks"), label=label, whole=True, size="")
    caption = f"{len(marks)} sequences; the lower and the further left, the better. Marked: {', '.join(NAMED)}."
    # the count's own row stands for all: the target is the same
    once = [replace(each, by_parameters=None) for each in compared]
    return join([element("figure", drawing, element("figcaption", caption)), figures.agreement_figure(once) or ""])


def places(mad: Scores, text: Scores) -> Exhibit:
    """The best sequences of each ranking and the well-known ones, with their places in both."""
    mad = mad.at([mad.sequences.index(each) for each in text.sequences])
    known = text.sequences
    values = text.values, mad.values, parameters(known)
    mine, other, counted = ((each > each[:, None]).sum(1) + 1 for each in values)
    spread = [None] * len(known) if text.seeds is None else text.seeds.std(1, ddof=1).tolist()
    listed = [
        place for place in np.argsort(mine) if min(mine[place], other[place]) <= SHOWN or known[place].notation in NAMED
    ]
    columns = ("Sequence", "Nats a token", "of seeds, ±", "Rank on text", "Rank on MAD", "Rank by parameters")
    rows = tuple(
        (known[i].notation, -float(text.values[i]), spread[i], int(mine[i]), int(other[i]), int(counted[i]))
        for i in listed
    )
    best = int(other.argmin())
    findings = (
        f"The best of {len(known)} on MAD's tasks, {known[best].notation}, has rank {mine[best]:.0f} on text. By "
        "parameters the most come first.",
    )
    return Exhibit("Best sequences of each ranking", columns, rows, findings)


def fidelity(curves: Curves, mad: Scores) -> Exhibit:
    """How early the ranking on text is there, and how MAD's agreement with it goes."""
    of_mad = mad.at([mad.sequences.index(each) for each in curves.sequences]).values
    size = parameters(curves.sequences)
    pairs = list(itertools.permutations(range(len(curves.validation)), 2))
    rows = []
    for number, step in enumerate(curves.steps):
        here = -curves.validation[:, number]
        early = [spearman(here[one], -curves.validation[other, -1])[0] for one, other in pairs]
        mean = here.mean(0)
        others = (float(spearman(each, mean)[0]) for each in (of_mad, size))
        nats = float(-mean.max()), float(-mean.min())
        rows.append((step, *nats, float(np.mean(early)) if early else None, *others))
    columns = (
        "Step",
        "Least nats",
        "Most nats",
        "One seed: Spearman with another's end",
        "MAD: with the mean here",
        "Parameters: with it",
    )
    finding = "Losses before the last step are at a rate that has not fallen yet, so differences are smaller then."
    return Exhibit("The ranking on text by steps", columns, tuple(rows), (finding,))


def main() -> None:
    """Run from the command line."""
    options = argparse.ArgumentParser(description="MAD's ranking of the sequences of six blocks against text's.")
    options.add_argument("verb", choices=("run", "compare"))
    options.add_argument("--folder", type=Path, default=RESULTS, help="where packed losses and results are")
    options.add_argument("--work", type=Path, default=Path("runs/search-studies"), help="where pages go")
    options.add_argument("--losses", type=Path, help="file of losses; else text.jsonl in the work folder")
    options.add_argument("--text", type=Path, help="of run: a folder made by tools/preprocess_text.py, or text")
    options.add_argument("--seeds", type=partial(above_zero, int), default=3, help="of run: trainings of a sequence")
    options.add_argument("--seconds", type=partial(above_zero, float), default=140.0, help="of run: time to spend")
    options.add_argument("--only", action="append", default=[], help="of run: a sequence, in place of all 64")
    options.add_argument("--override", action="append", default=[], help="of run: NAME=VALUE, such as steps=500")
    chosen = options.parse_args()
    losses = chosen.losses or chosen.work / "text.jsonl"
    try:
        if chosen.verb == "compare":
            if chosen.losses and not chosen.losses.is_file():
                raise FileError(f"{chosen.losses} is no file: expected losses that a run has left")
            compare(chosen.folder, losses, chosen.work)
            return
        if chosen.text is None:
            raise UsageError("run needs --text: a folder made by tools/preprocess_text.py, or files of text")
        only = dict.fromkeys(CompositeSequence.parse(each).letters for each in chosen.only)
        overrides = read_overrides(tuple(chosen.override))
        unpack(chosen.folder / PACKED, losses)
        run(chosen.text, losses, tuple(only) or SIX, chosen.seeds, chosen.seconds, overrides)
    except ComposerError as error:
        print(f"search_text: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
