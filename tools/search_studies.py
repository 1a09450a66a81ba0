"""The studies under ``benchmarks/results/search``: all sequences of six blocks, and a search of sixteen, in slices.

::

    python tools/search_studies.py collect                     # what there is: studies, votes, evidence; no GPU
    python tools/search_studies.py plan                        # proposes sixteen-block sequences; needs Ax, no GPU
    python tools/search_studies.py run --seconds 290           # trains what is missing; again goes on

The folder keeps what cannot be computed again, ``trainings.jsonl.gz`` and the proposals in ``sixteen.txt``, and a
summary of what follows from them, ``results.json``. Studies, their pages and unpacked trainings go to ``--work``.

``run`` is for a GPU that is lent for minutes at a time. What it trains is ordered by worth and kept in the work
folder's ``trainings.jsonl`` as each chunk of 64 trainings ends, so that a study can be made of whatever there is. Each
step is a ``composer-megatron search``, whose options are printed. ``collect`` adds that file to the folder's.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import math
import shlex
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from composer_megatron.cli import main as composer
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming, read_json, write_json, write_text
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluators import MadEvaluator, preset, training_seed
from composer_search.evaluators.ledger import Ledger, TrainingKey, settings_digest
from composer_search.evidence import agreement
from composer_search.evidence.ablation import ablate
from composer_search.evidence.exhibit import Exhibit, shown
from composer_search.evidence.oracle import oracle
from composer_search.evidence.regret import regret
from composer_search.evidence.scores import read_scores
from composer_search.evidence.standing import standing
from composer_search.evidence.votes import votes
from composer_search.proposers import make_proposer, propose_batch
from composer_search.report import evidence as figures
from composer_search.report.markup import Markup
from composer_search.space import Space
from composer_search.study import Study, StudySettings

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "search"
PACKED = "trainings.jsonl.gz"

PROPOSERS, REPLAYS, DRAWS, VOTES = ("random", "evolution", "bayesian"), 12, 50, 500
"""Who is replayed and how often, studies drawn to compare aggregators, and resamples of seeds to repeat the vote."""

PROPOSED, BATCH = 32, 32
"""Quasi-random sequences of sixteen blocks, and those that the Gaussian process proposes at once after them."""

TASKS = (
    *("memorization", "compression", "in-context-recall", "noisy-in-context-recall"),
    *("fuzzy-in-context-recall", "selective-copying"),
)
"""MAD's, the cheap ones first."""

SEEDS = 3
SIX = tuple(map("".join, itertools.product("AM", repeat=6)))
KNOWN = tuple(
    CompositeSequence.parse(text).letters
    for text in ("2A5M2A3M1A3M", "AM" * 8, "AMM" * 5 + "A", "AAA" + "AM" * 5 + "MMM", "2A4M2A4M2A2M")
)
"""The paper's search result of sixteen blocks, a Llama, 1:2 striped, sandwich, and its six-block result stacked."""


@dataclass(frozen=True)
class Fidelity:
    """How long candidates are trained: fewer steps of a smaller batch than MAD's 20,000 of 128."""

    steps: int
    batch_size: int
    learning_rate: float
    preset: str = "baseline"

    @property
    def overrides(self) -> dict[str, int | float]:
        """Settings of the preset, by name."""
        looks = max(1, self.steps // 8)
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "evaluate_every": looks,
            "learning_rates": self.learning_rate,
        }

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those of `TASKS` that the preset has."""
        have = {plan.setting.task for plan in preset(self.preset).tasks}
        return tuple(task for task in TASKS if task in have)

    def lacking(self, task: str, seeds: int, sequences: Sequence[str], known: dict[TrainingKey, object]) -> int:
        """Trainings of these sequences (letters) on a task that are not in the ledger."""
        settings = preset(self.preset, tasks=task, **self.overrides)
        (plan,) = settings.tasks
        digest = settings_digest(plan, settings.for_task(plan), settings.seed)
        keys = (
            TrainingKey(digest, letters, self.learning_rate, 0.0, training_seed(settings.seed, number))
            for letters in sequences
            for number in range(seeds)
        )
        return sum(key not in known for key in keys)


@dataclass(frozen=True)
class Step:
    """Sequences of one length on some tasks; `sequences` are letters, and all of the space where they are `SIX`."""

    name: str
    sequences: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: int

    def command(self, study: Path, trainings: Path, fidelity: Fidelity) -> list[str]:
        """The search, all of it in one batch and in this process."""
        count, length = len(self.sequences), len(self.sequences[0])
        command = ["search", str(study), "--length", str(length), "--budget", str(count), "--batch", str(count)]
        command += ["--preset", fidelity.preset, "--seeds", str(self.seeds), "--workers", "0"]
        if self.sequences != SIX:
            command += itertools.chain.from_iterable(("--only", letters) for letters in self.sequences)
        settings = {"tasks": ",".join(self.tasks), **fidelity.overrides}
        command += itertools.chain.from_iterable(("--override", f"{key}={value}") for key, value in settings.items())
        return [*command, "--trainings", str(trainings)]


def plan(folder: Path, work: Path) -> None:
    """Add a batch to `sixteen.txt`: Sobol points at first, then what Ax proposes from the study collected so far.

    Raises:
        UsageError: If some of those listed have no score yet.
        ComposerError: If Ax is not installed.
    """
    study = work / "sixteen"
    trials = Study.load(study).trials if study.exists() else []
    listed = read_list(folder)
    if len(trials) < len(listed):
        counts = f"{folder / 'sixteen.txt'}: {len(listed)} sequences, {len(trials)} of them scored in {study}"
        raise UsageError(f"{counts}; `run` trains the others, and `collect` makes that study")
    numbers = range(len(listed), len(listed) + (BATCH if listed else PROPOSED))
    settings = StudySettings(
        space=Space("AM", 16), proposer="bayesian", initial=PROPOSED, seed=0, budget=numbers.stop, evaluator={}
    )
    proposals = propose_batch(make_proposer(settings), trials, [], numbers)
    found = [*listed, *(proposal.sequence.letters for proposal in proposals)]
    write_text(folder / "sixteen.txt", "".join(f"{CompositeSequence(letters)}\n" for letters in found))
    print(f"{len(proposals)} more sequences of sixteen blocks, {len(found)} in all")


def read_list(folder: Path) -> tuple[str, ...]:
    """The sequences proposed so far, as letters."""
    path = folder / "sixteen.txt"
    return tuple(CompositeSequence.parse(line).letters for line in path.read_text().split()) if path.exists() else ()


def steps(folder: Path, tasks: Sequence[str]) -> Iterator[Step]:
    """What there is to train, what is worth most first; any beginning of it makes studies."""
    cheap, sixteen = tuple(tasks[:4]), (*KNOWN, *read_list(folder))
    yield Step("six", SIX, cheap, SEEDS)
    yield Step("sixteen", sixteen, cheap, 1)
    for task in tasks[4:]:
        yield Step("six", SIX, (task,), SEEDS)
        yield Step("sixteen", sixteen, (task,), 1)


def unpack(packed: Path, trainings: Path) -> None:
    """Put packed trainings into a file, before those that it has.

    Raises:
        FileError: If the packed ones are damaged.
    """
    if not packed.exists():
        return
    try:
        with naming(packed, "read"):
            kept = _lines(gzip.decompress(packed.read_bytes()).decode())
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FileError(f"{packed} is damaged ({error}); restore it from version control") from None
    with naming(trainings, "read"):
        own = _lines(trainings.read_text()) if trainings.exists() else []
    write_text(trainings, "".join(dict.fromkeys([*kept, *own])))


def pack(trainings: Path, packed: Path) -> None:
    """Keep a file of trainings packed, in one step; the same trainings give the same bytes."""
    partial = packed.with_name(f".{packed.name}.tmp")
    with naming(packed, "write"):
        partial.write_bytes(gzip.compress("".join(_lines(trainings.read_text())).encode(), mtime=0))
        partial.replace(packed)


def _lines(text: str) -> list[str]:
    """Its lines without a last one that was torn."""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run(folder: Path, trainings: Path, seconds: float, at_once: int, fidelity: Fidelity) -> None:
    """Train until the time is up."""
    end = time.monotonic() + seconds
    unpack(folder / PACKED, trainings)
    _try_out(fidelity)
    with tempfile.TemporaryDirectory() as temporary:
        for number, step in enumerate(steps(folder, fidelity.tasks)):
            command = step.command(Path(temporary) / str(number), trainings, fidelity)
            minutes = (end - time.monotonic()) / 60
            if minutes <= 0:
                break
            print(shlex.join(["composer-megatron", *command]), flush=True)
            composer([*command, "--at-once", str(at_once), "--max-minutes", f"{minutes:.6f}"])
            print(f"{step.name}: {', '.join(step.tasks)} done, {end - time.monotonic():.0f} s left", flush=True)


def _try_out(fidelity: Fidelity) -> None:
    """Train all of `SIX` for a moment, rows leaving early; what fails here is no candidate's fault."""
    steps = min(fidelity.steps, 96)
    quick = {"tasks": fidelity.tasks[0], "steps": steps, "evaluate_every": max(1, steps // 12), "solved": 0.3}
    start = time.monotonic()
    evaluator = MadEvaluator(preset(fidelity.preset, **{**fidelity.overrides, **quick}))
    evaluator.evaluate_many([CompositeSequence(letters) for letters in SIX])
    print(f"tried out in {time.monotonic() - start:.0f} s", flush=True)


def collect(folder: Path, trainings: Path, work: Path, fidelity: Fidelity) -> None:
    """Make studies of what is whole, vote, and say what that is worth; proposals without trainings wait.

    Raises:
        ComposerError: If nothing was trained.
    """
    unpack(folder / PACKED, trainings)
    known: dict[TrainingKey, object] = dict(Ledger(trainings).read())
    if not known:
        raise ComposerError(f"neither {folder / PACKED} nor {trainings} has a training; `run` on a GPU makes them")
    pack(trainings, folder / PACKED)
    results: dict[str, Any] = {"fidelity": asdict(fidelity)}
    six = _make(work, _whole("six", SIX, SIX, fidelity, known), trainings, fidelity)
    if six:
        results["six"] = _summary(six) | _judge(six, ["2A4M", "AMAMAM"], None)
    listed = read_list(folder)
    sixteen = _whole("sixteen", (*listed[:PROPOSED], *KNOWN), listed, fidelity, known)
    searched = _make(work, sixteen, trainings, fidelity)
    if searched:
        others = _make(work, sixteen and replace(sixteen, name="sixteen-known", sequences=KNOWN), trainings, fidelity)
        results["sixteen"] = _summary(searched) | _judge(searched, ["2A5M2A3M1A3M"], others)
    write_json(folder / "results.json", rounded(results))
    print(f"summary written to {folder / 'results.json'}, studies and pages to {work}")


def _whole(
    name: str, needed: tuple[str, ...], wanted: tuple[str, ...], fidelity: Fidelity, known: dict[TrainingKey, object]
) -> Step | None:
    """The tasks that all of `needed` were trained on, and of `wanted` the sequences that were, too.

    With as many seeds as there are for two tasks, of sixteen blocks with one.
    """
    for seeds in (SEEDS, 1) if wanted == SIX else (1,):
        tasks = tuple(task for task in fidelity.tasks if not fidelity.lacking(task, seeds, needed, known))
        if len(tasks) < 2 or not wanted:
            continue
        waiting = {each for each in wanted for task in tasks if fidelity.lacking(task, seeds, [each], known)}
        return Step(name, tuple(each for each in wanted if each not in waiting), tasks, seeds)
    print(f"{name}: fewer than two tasks are whole")
    return None


def _make(work: Path, step: Step | None, trainings: Path, fidelity: Fidelity) -> Path | None:
    """A study of its own, grown to 1b unless it is of known designs."""
    if step is None:
        return None
    study = work / step.name
    shutil.rmtree(study, ignore_errors=True)
    composer(step.command(study, trainings, fidelity))
    if step.sequences != KNOWN:
        composer(["aggregate", str(study)])
        grown = ["--shape", "1b", "--output", str(study / "stacked-1b.json")]
        composer(["extrapolate", str(study / "aggregate.json"), *grown])
    return study


def _summary(study: Path) -> dict[str, Any]:
    """Scores of every sequence, best first, and how far those of a task differ between sequences and between seeds."""
    trials = sorted(Study.load(study).completed, key=lambda trial: -(trial.score or 0.0))
    spread = {}
    for task in trials[0].tasks:
        seeds = [trial.details["tasks"][task]["validation"] for trial in trials]
        within = [statistics.variance(each) for each in seeds if len(each) > 1]
        between = statistics.stdev(trial.tasks[task] for trial in trials)
        spread[task] = {"between": between, "seeds": math.sqrt(statistics.fmean(within)) if within else None}
    voted = read_json(study / "aggregate.json", "an aggregate")
    return {
        "scores": {str(trial.sequence): {"seeds": trial.seed_scores, **trial.tasks} for trial in trials},
        "standard_deviation": spread,
        "vote": {"sequence": voted["sequence"], "voters": voted["members"]},
    }


def _judge(study: Path, sequences: Sequence[str], others: Path | None) -> dict[str, Any]:
    """All evidence that a study allows: printed, drawn on pages in it, and returned as JSON values."""
    pages = study / "evidence"
    scores = replace(read_scores(study), name=study.name)
    named = [("", CompositeSequence.parse(each)) for each in sequences]
    placed = standing(study, named, others=others)
    ranks = [agreement.size_agreement(scores), *agreement.task_agreements(scores)]
    values = {
        "standing": show(pages / "standing.html", placed.exhibit(), figures.standing_figure(placed)),
        "agreement": show(pages / "agreement.html", agreement.exhibit(ranks), figures.agreement_figure(ranks)),
    }
    if scores.seeds is None:
        return values
    ballots = votes(scores, resamples=VOTES)
    ranking = oracle(scores)
    replayed = regret(Study.load(study), proposers=PROPOSERS, replays=REPLAYS, noisy=True)
    rules = ablate(scores, draws=DRAWS, noisy=True)
    return values | {
        "votes": show(pages / "votes.html", ballots.exhibit(), figures.votes_figure(ballots)),
        "oracle": show(pages / "oracle.html", ranking.exhibit(), figures.oracle_figure(ranking)),
        "regret": show(pages / "regret.html", replayed.exhibit(), figures.regret_figure(replayed)),
        "ablation": show(pages / "ablation.html", rules.exhibit(), figures.ablation_figure(rules)),
    }


def show(page: Path, exhibit: Exhibit, figure: Markup | None) -> dict[str, Any]:
    """Print an exhibit, write its page, and give its rows and findings."""
    figures.write_exhibit(page, exhibit, figure)
    print(f"\n{exhibit.title}")
    for row in (exhibit.columns, *exhibit.rows):
        print("  ".join(shown(cell) for cell in row))
    print(*exhibit.findings, f"figure written to {page}", sep="\n")
    rows = [dict(zip(exhibit.columns, row, strict=True)) for row in exhibit.rows]
    return {"rows": rows, "findings": exhibit.findings}


def rounded(value: Any) -> Any:
    """JSON values with numbers to five digits, which is more than they are worth."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def above_zero(kind: type[int] | type[float], text: str) -> float:
    """A number for argparse, which makes a usage error of what is raised."""
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        expected = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r}; expected {expected} above 0")
    return value


def main() -> None:
    """Run from the command line."""
    count, positive = partial(above_zero, int), partial(above_zero, float)
    options = argparse.ArgumentParser(description="The studies under benchmarks/results/search.")
    options.add_argument("verb", choices=("plan", "run", "collect"))
    options.add_argument("--folder", type=Path, default=RESULTS, help="where lists, packed trainings and results are")
    options.add_argument("--work", type=Path, default=Path("runs/search-studies"), help="where studies and pages go")
    options.add_argument("--trainings", type=Path, help="file of trainings; else trainings.jsonl in the work folder")
    options.add_argument("--seconds", type=positive, default=290.0, help="of run: time to spend")
    options.add_argument("--at-once", type=count, default=64, help="of run: trainings of a chunk")
    options.add_argument("--steps", type=count, default=1000, help="optimizer steps of a training")
    options.add_argument("--batch-size", type=count, default=32, help="sequences a step")
    options.add_argument("--learning-rate", type=positive, default=2e-3, help="peak of the cosine")
    options.add_argument("--preset", default="baseline", help="whose tasks, widths and precision")
    chosen = options.parse_args()
    fidelity = Fidelity(chosen.steps, chosen.batch_size, chosen.learning_rate, chosen.preset)
    trainings = chosen.trainings or chosen.work / "trainings.jsonl"
    try:
        if chosen.verb == "collect" and chosen.trainings and not chosen.trainings.is_file():
            raise FileError(f"{chosen.trainings} is no file: expected trainings that a run has left")
        if chosen.verb == "plan":
            plan(chosen.folder, chosen.work)
        elif chosen.verb == "run":
            run(chosen.folder, trainings, chosen.seconds, chosen.at_once, fidelity)
        else:
            collect(chosen.folder, trainings, chosen.work, fidelity)
    except ComposerError as error:
        print(f"search_studies: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
