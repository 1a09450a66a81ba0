"""The studies under ``benchmarks/results/search``: all sequences of six blocks, and a search of sixteen, in slices.

::

    python tools/search_studies.py plan                        # proposes sixteen-block sequences; needs Ax, no GPU
    python tools/search_studies.py run --seconds 290           # trains; again goes on
    python tools/search_studies.py collect                     # studies, votes and comparisons; trains nothing

``run`` is for a GPU that is lent for minutes at a time. What it trains is ordered by worth and kept in
``trainings.jsonl`` as each chunk of 64 trainings ends, so that a study can be made of whatever there is. Each step is a
``composer-megatron search``, whose options are printed.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_megatron.cli import main as composer
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import write_text
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluators import MadEvaluator, preset, training_seed
from composer_search.evaluators.ledger import Ledger, TrainingKey, settings_digest

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "search"

PROPOSED, BATCH = 32, 32
"""Quasi-random sequences of sixteen blocks, and those that the Gaussian process proposes at once after them."""

TASKS = (
    *("memorization", "compression", "in-context-recall", "noisy-in-context-recall"),
    *("fuzzy-in-context-recall", "selective-copying"),
)
"""MAD's, the cheap ones first."""

SEEDS = 3
SIX = tuple("".join(letters) for letters in itertools.product("AM", repeat=6))
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


def plan(folder: Path) -> None:
    """Add a batch to `sixteen.txt`: Sobol points at first, then what Ax proposes from the study collected so far."""
    from composer_search.proposers import make_proposer, propose_batch
    from composer_search.space import Space
    from composer_search.study import Study, StudySettings

    study = folder / "sixteen"
    trials = Study.load(study).trials if study.exists() else []
    listed = read_list(folder)
    if len(trials) < len(listed):
        raise UsageError(
            f"{folder / 'sixteen.txt'}: {len(listed)} sequences, {len(trials)} scored; train the others first"
        )
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


def run(folder: Path, trainings: Path, seconds: float, at_once: int, fidelity: Fidelity) -> None:
    """Train until the time is up."""
    end = time.monotonic() + seconds
    if not trainings.exists() and (folder / "trainings.jsonl").exists():
        trainings.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "trainings.jsonl", trainings)
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


def collect(folder: Path, fidelity: Fidelity) -> None:
    """Make studies of all tasks that are whole, vote, and compare with the paper's sequences."""
    known: dict[TrainingKey, object] = dict(Ledger(folder / "trainings.jsonl").read())
    listed = read_list(folder)
    for name, sequences, most in (("six", SIX, SEEDS), ("sixteen", listed, 1), ("sixteen-known", KNOWN, 1)):
        together = (*listed, *KNOWN) if name.startswith("sixteen") else sequences
        options = [
            (seeds, tuple(task for task in fidelity.tasks if not fidelity.lacking(task, seeds, together, known)))
            for seeds in sorted({most, 1}, reverse=True)
        ]
        seeds, tasks = next(((seeds, tasks) for seeds, tasks in options if len(tasks) > 1), (0, ()))
        if not tasks or not sequences:
            print(f"{name}: fewer than two tasks are whole")
            continue
        _make(folder, Step(name, tuple(sequences), tasks, seeds), fidelity)
    if (folder / "six").exists():
        _compare(folder / "six", ["2A4M", "AMAMAM"], None)
    if (folder / "sixteen").exists():
        _compare(folder / "sixteen", ["2A5M2A3M1A3M"], folder / "sixteen-known")


def _make(folder: Path, step: Step, fidelity: Fidelity) -> None:
    """A study of its own; what only the search needs is not kept."""
    study = folder / step.name
    shutil.rmtree(study, ignore_errors=True)
    composer(step.command(study, folder / "trainings.jsonl", fidelity))
    (study / "study.lock").unlink(missing_ok=True)
    if step.sequences != KNOWN:
        composer(["aggregate", str(study)])


def _compare(study: Path, sequences: list[str], others: Path | None) -> None:
    from composer_search.study import Study

    extra = ["--others", str(others)] if others else [str(study / "aggregate.json")]
    composer(["evidence", "standing", str(study), *sequences, *extra])
    composer(["evidence", "agreement", str(study)])
    composer(
        ["extrapolate", str(study / "aggregate.json"), "--shape", "1b", "--output", str(study / "stacked-1b.json")]
    )
    if Study.load(study).completed[0].spread:
        composer(["evidence", "oracle", str(study)])


def main() -> None:
    """Run from the command line."""
    options = argparse.ArgumentParser(description="The studies under benchmarks/results/search, in slices.")
    options.add_argument("verb", choices=("plan", "run", "collect"))
    options.add_argument("--folder", type=Path, default=RESULTS, help="where lists, trainings and studies are")
    options.add_argument(
        "--trainings", type=Path, help="of run: file to fill; by default trainings.jsonl in the folder"
    )
    options.add_argument("--seconds", type=float, default=290.0, help="of run: time to spend")
    options.add_argument("--at-once", type=int, default=64, help="of run: trainings of a chunk")
    options.add_argument("--steps", type=int, default=1000, help="optimizer steps of a training")
    options.add_argument("--batch-size", type=int, default=32, help="sequences a step")
    options.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the cosine")
    options.add_argument("--preset", default="baseline", help="whose tasks, widths and precision")
    chosen = options.parse_args()
    fidelity = Fidelity(chosen.steps, chosen.batch_size, chosen.learning_rate, chosen.preset)
    try:
        if chosen.verb == "plan":
            plan(chosen.folder)
        elif chosen.verb == "run":
            trainings = chosen.trainings or chosen.folder / "trainings.jsonl"
            run(chosen.folder, trainings, chosen.seconds, chosen.at_once, fidelity)
        else:
            collect(chosen.folder, fidelity)
    except ComposerError as error:
        sys.exit(f"search_studies: {error}")


if __name__ == "__main__":
    main()
