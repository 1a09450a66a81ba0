"""What a report is made from, read from the files of a run and checked, so that drawing it cannot fail half way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from composer_megatron.architecture import Architecture
from composer_megatron.env import environment
from composer_megatron.errors import FileError, SequenceError, UsageError
from composer_megatron.files import naming, read_json, read_json_lines
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence


@dataclass(frozen=True)
class ReportInputs:
    """Where a report's contents lie. What is None or empty is left out of the page.

    Attributes:
        study: Study folder.
        architectures: Architecture files by the name that the page gives them.
        runs: Training run folders by name.
        text: Text folder.
        plan: Pipeline plan, as JSON.
        seq_len: Sequence length of the FLOPs in the table of costs.
        environment: Versions and devices, as `composer_megatron.env.environment` gives them; None for this machine's.
    """

    study: Path | None = None
    architectures: Mapping[str, Path] = field(default_factory=dict)
    runs: Mapping[str, Path] = field(default_factory=dict)
    text: Path | None = None
    plan: Path | None = None
    seq_len: int = 4096
    environment: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse a sequence length below one."""
        if self.seq_len < 1:
            raise UsageError(f"seq_len={self.seq_len}; expected at least 1")


@dataclass(frozen=True)
class Trial:
    """One line of the trial log; `score` and `test_score` are None where there is none, `tasks` may be empty.

    `seed_scores` is empty where the log has none, `goals` where accuracy alone was maximised.
    """

    number: int
    sequence: CompositeSequence
    score: float | None
    spread: float
    seed_scores: tuple[float, ...]
    tasks: dict[str, float]
    test_score: float | None
    proposer: str
    seconds: float | None
    status: str
    error: str
    goals: tuple[float, ...] = ()

    @property
    def value(self) -> float | None:
        """What it is ranked by: the first goal, or the score; None where it has no score."""
        return self.goals[0] if self.goals else self.score

    @property
    def seeds(self) -> int:
        """How many trainings the score is a mean of."""
        return max(1, len(self.seed_scores))


@dataclass(frozen=True)
class Aggregate:
    """The vote: for each position the letters' counts, the winner, and how it won."""

    sequence: CompositeSequence
    context: int
    clusters: int
    members: tuple[tuple[CompositeSequence, float], ...]
    votes: tuple[dict[str, int], ...]
    decisions: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A study folder: its settings, its trials in the order of the log, and its aggregate if there is one."""

    folder: Path
    settings: dict[str, Any]
    trials: tuple[Trial, ...]
    aggregate: Aggregate | None

    @property
    def scored(self) -> list[tuple[Trial, float]]:
        """The trials that have a score, with it; by the value of the objective, of equal ones the earlier first."""
        pairs = [(trial, trial.score) for trial in self.trials if trial.score is not None]
        return sorted(pairs, key=lambda pair: -(pair[0].value or 0.0))

    @property
    def incremental(self) -> bool:
        """Whether the search went step by step, each step in a folder of its own."""
        strategy = self.settings.get("strategy")
        return isinstance(strategy, dict) and strategy.get("name") in ("end", "middle")

    @property
    def candidates(self) -> int | None:
        """How many sequences the searched space holds, where the settings tell it."""
        space = self.settings.get("space")
        primitives, length = (space.get("primitives"), space.get("length")) if isinstance(space, dict) else (None, None)
        if not isinstance(primitives, str) or not isinstance(length, int) or not isinstance(space, dict):
            return None
        fixed = len(str(space.get("prefix", ""))) + len(str(space.get("suffix", "")))
        return len(primitives) ** max(0, length - fixed)

    @property
    def budget(self) -> int | None:
        """How many trials were asked for, where the settings tell it."""
        budget = self.settings.get("budget")
        return budget if isinstance(budget, int) and not isinstance(budget, bool) else None


Curve = tuple[tuple[int, float], ...]
"""Loss in nats per token by iteration, in order."""


@dataclass(frozen=True)
class TrainingRun:
    """A training run folder; what it does not hold yet is None or empty.

    Attributes:
        architecture: What was trained.
        training: Loss of the logged steps.
        validation: Loss on held-out text during training.
        dropped: Logged losses that are no finite number and so in neither curve.
        evaluation: Final loss on held-out text.
        samples: Prompts and what the model wrote.
    """

    name: str
    folder: Path
    architecture: Architecture
    training: Curve
    validation: Curve
    dropped: int
    evaluation: dict[str, float] | None
    samples: tuple[tuple[str, str], ...]

    @property
    def is_baseline(self) -> bool:
        """Whether it is its shape's Llama baseline."""
        return is_baseline(self.architecture)


@dataclass(frozen=True)
class Contents:
    """All that a page shows, read and checked."""

    study: Study | None
    architectures: dict[str, Architecture]
    runs: tuple[TrainingRun, ...]
    text: dict[str, Any] | None
    plan: dict[str, Any] | None
    seq_len: int
    environment: Mapping[str, Any]

    @property
    def models(self) -> dict[str, Architecture]:
        """Every architecture of the page by name: those given, those trained, and each shape's baseline."""
        found = dict(self.architectures)
        for run in self.runs:
            if run.architecture not in found.values():
                found[run.name if run.name not in found else f"{run.name} (trained)"] = run.architecture
        for shape in dict.fromkeys(architecture.shape for architecture in found.values()):
            baselines = [each for each in found.values() if each.shape == shape and is_baseline(each)]
            if not baselines:
                some = next(each for each in found.values() if each.shape == shape)
                found[f"Llama baseline, {shape.name}"] = some.baseline()
        return found

    @property
    def unigram(self) -> tuple[float, float] | None:
        """The unigram model's held-out loss, in nats per token and in bits per byte."""
        if self.text is None:
            return None
        valid = self.text["valid"]
        return valid["unigram_nats_per_token"], valid["unigram_bits_per_byte"]


def is_baseline(architecture: Architecture) -> bool:
    """Whether an architecture is its shape's Llama baseline."""
    return architecture == architecture.baseline()


def gather(inputs: ReportInputs) -> Contents:
    """Read everything.

    Raises:
        FileError: If a named file or folder is missing, or holds something else than it should; the message names it.
    """
    return Contents(
        study=read_study(inputs.study) if inputs.study else None,
        architectures={name: Architecture.load(path) for name, path in inputs.architectures.items()},
        runs=tuple(read_run(name, folder) for name, folder in inputs.runs.items()),
        text=read_text_summary(inputs.text / "text.json") if inputs.text else None,
        plan=read_plan(inputs.plan) if inputs.plan else None,
        seq_len=inputs.seq_len,
        environment=environment() if inputs.environment is None else inputs.environment,
    )


def read_study(folder: Path) -> Study:
    """Read a study folder: ``study.json``, ``trials.jsonl`` and, if it is there, ``aggregate.json``."""
    path = folder / "study.json"
    settings = _read_format(path, "a study", "composer-study")
    log = folder / "trials.jsonl"
    trials = [_trial(line, f"{log}, line {number}") for number, line in enumerate(read_json_lines(log), start=1)]
    aggregate = folder / "aggregate.json"
    return Study(folder, settings, tuple(trials), _aggregate(aggregate) if aggregate.exists() else None)


def read_run(name: str, folder: Path) -> TrainingRun:
    """Read a training run folder; only ``architecture.json`` must be there."""
    training, dropped = _curve(folder / "metrics.jsonl", "lm loss")
    validation, dropped_too = _curve(folder / "metrics.jsonl", "lm loss validation")
    evaluation, samples = folder / "eval.json", folder / "samples.json"
    return TrainingRun(
        name=name,
        folder=folder,
        architecture=Architecture.load(folder / "architecture.json"),
        training=training,
        validation=validation,
        dropped=dropped + dropped_too,
        evaluation=_evaluation(evaluation) if evaluation.exists() else None,
        samples=_samples(samples) if samples.exists() else (),
    )


def read_text_summary(path: Path) -> dict[str, Any]:
    """Read ``text.json`` of a text folder."""
    text = _read_format(path, "a text folder's summary", "composer-text")
    for part, keys in (("train", ()), ("valid", ("unigram_nats_per_token", "unigram_bits_per_byte"))):
        split = _field(text, part, dict, str(path))
        for key in ("documents", "tokens", "bytes"):
            _field(split, key, int, f"{path}, {part}")
        for key in keys:
            _number(split, key, f"{path}, {part}")
    _field(text, "vocab_size", int, str(path))
    return text


def read_plan(path: Path) -> dict[str, Any]:
    """Read a pipeline plan."""
    values = read_json(path, "a plan")
    where = str(path)
    sequence = _sequence(values.get("sequence"), where)
    letters = ""
    for number, stage in enumerate(_field(values, "stages", list, where), start=1):
        at = f"{where}, stage {number}"
        if not isinstance(stage, dict):
            raise FileError(f"{at}: expected a JSON object, found {type(stage).__name__}")
        if stage.get("blocks") != "":  # a stage may hold the output layer alone
            letters += _sequence(stage.get("blocks"), at).letters
        for key in ("flops_per_token", "params_per_rank", "state_bytes", "activation_bytes"):
            _field(stage, key, int, at)
    if letters != sequence.letters:
        raise FileError(f"{where}: the stages' blocks are not those of {sequence}; make the plan again")
    return values


def _read_format(path: Path, what: str, name: str) -> dict[str, Any]:
    values = read_json(path, what)
    if values.get("format") != name:
        raise FileError(f'{path} is not {what}: expected "format": "{name}"')
    if values.get("version") != 1:
        raise FileError(f"{path} has version {values.get('version')!r}; this program reads version 1")
    return values


def _trial(line: dict[str, Any], where: str) -> Trial:
    status = _field(line, "status", str, where)
    completed = status == "completed"
    seeds = _field(line, "seed_scores", list, where) if "seed_scores" in line and completed else []
    if not all(_is_finite(score) for score in seeds):
        raise FileError(f"{where}: seed_scores={seeds!r}; expected finite numbers")
    tasks = _field(line, "tasks", dict, where) if "tasks" in line else {}
    return Trial(
        number=_field(line, "trial", int, where),
        sequence=_sequence(line.get("sequence"), where),
        score=_number(line, "score", where) if completed else None,
        spread=_number(line, "spread", where) if completed and "spread" in line else 0.0,
        seed_scores=tuple(float(score) for score in seeds),
        tasks={name: _number(tasks, name, f"{where}, tasks") for name in tasks} if completed else {},
        test_score=_number(line, "test_score", where) if line.get("test_score") is not None else None,
        proposer=str(line.get("proposer", "unknown")),
        seconds=_number(line, "seconds", where) if line.get("seconds") is not None else None,
        status=status,
        error=str(line.get("error", "")),
        goals=_goals(line, where) if completed else (),
    )


def _goals(line: dict[str, Any], where: str) -> tuple[float, ...]:
    """The values of an objective that is more than accuracy: of a mix one, of several goals each."""
    values = _field(line, "objective", dict, where) if "objective" in line else {}
    names = [name for name in values if name == "value" or name.startswith("goal_")]
    return tuple(_number(values, name, f"{where}, objective") for name in names)


def _aggregate(path: Path) -> Aggregate:
    values, where = read_json(path, "an aggregate"), str(path)
    sequence = _sequence(values.get("sequence"), where)
    members = [_sequence(text, where) for text in _field(values, "members", list, where)]
    scores, votes = _field(values, "member_scores", list, where), _field(values, "votes", list, where)
    decisions = _field(values, "decisions", list, where)
    if len(scores) != len(members) or not len(votes) == len(decisions) == len(sequence):
        raise FileError(f"{where}: members, votes and decisions do not belong together; aggregate the study again")
    for vote in votes:
        if not isinstance(vote, dict) or not all(
            letter in PRIMITIVES and _is_count(count) for letter, count in vote.items()
        ):
            raise FileError(f"{where}: votes hold {vote!r}; expected a count for each primitive's letter")
    if not all(_is_finite(score) for score in scores):
        raise FileError(f"{where}: member_scores={scores!r}; expected finite numbers")
    return Aggregate(
        sequence=sequence,
        context=_field(values, "context", int, where),
        clusters=_field(values, "clusters", int, where),
        members=tuple(zip(members, scores, strict=True)),
        votes=tuple(votes),
        decisions=tuple(str(decision) for decision in decisions),
    )


def _curve(path: Path, name: str) -> tuple[Curve, int]:
    """The scalar's values by iteration, the last one where a resumed run logged an iteration twice."""
    values: dict[int, float] = {}
    dropped = 0
    for number, line in enumerate(read_json_lines(path), start=1):
        if line.get("name") != name:
            continue
        iteration, value = _field(line, "iteration", int, f"{path}, line {number}"), line.get("value")
        if _is_finite(value):
            values[iteration] = value
        else:
            dropped += 1
    return tuple(sorted(values.items())), dropped


def _evaluation(path: Path) -> dict[str, float]:
    values, where = read_json(path, "an evaluation"), str(path)
    exact = {key: _field(values, key, int, where) for key in ("tokens", "bytes", "iteration")}
    return exact | {key: _number(values, key, where) for key in ("nats_per_token", "bits_per_byte", "perplexity")}


def _samples(path: Path) -> tuple[tuple[str, str], ...]:
    with naming(path, "read"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = json.loads(text)
        return tuple((str(sample["prompt"]), str(sample["text"])) for sample in values)
    except (ValueError, TypeError, KeyError):
        raise FileError(f"{path} holds no samples: expected a list of objects with a prompt and a text") from None


def _field[T](values: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    value = values.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {int: "a whole number", str: "text", list: "a list", dict: "an object"}
        raise FileError(f"{where}: {key}={value!r}; expected {names.get(kind, kind.__name__)}")
    return value


def _number(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values.get(key)
    if not _is_finite(value):
        raise FileError(f"{where}: {key}={value!r}; expected a finite number")
    return float(value)


def _is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number within what a float holds; JSON lets NaN, Infinity and endless integers through."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sequence(text: object, where: str) -> CompositeSequence:
    if not isinstance(text, str):
        raise FileError(f"{where}: sequence={text!r}; expected text such as 2A4M")
    try:
        return CompositeSequence.parse(text)
    except SequenceError as error:
        raise FileError(f"{where}: {error}") from None
