"""A study: the folder that holds a search, its settings in `study.json` and a line a trial in `trials.jsonl`.

The log is the single source of truth. It only grows, a line is on the disk before the next trial begins, and everything
else that a search needs is computed from it, so that a killed search goes on where it stood. `ax.json`, the Ax
snapshot, is for people who want to look at the model with Ax; nothing here reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import append_json_line, naming, read_json, read_json_lines, write_json, write_text
from composer_megatron.sequence import CompositeSequence
from composer_search.constraints import Criteria
from composer_search.space import Space

_FORMAT = "composer-study"
_VERSION = 1


@dataclass(frozen=True)
class StudySettings:
    """What determines a search; a study is only ever continued with the same.

    Attributes:
        space: What is searched.
        proposer: ``bayesian``, ``exhaustive``, ``random``, ``evolution`` or ``listed``.
        initial: Quasi-random trials before the first Bayesian one, and the population of an evolution.
        seed: Of the proposer.
        budget: Trials in all, failed ones included; of an incremental search, trials of a step. The one setting that
            may be raised later, but not in an incremental search, whose later steps rest on the earlier ones.
        evaluator: All of the evaluator's settings as JSON values.
        batch: Trials that are proposed together, before any of them is known.
        criteria: What is wanted of a sequence.
        strategy: ``one-shot``, ``end`` or ``middle``.
        step: Blocks that a step of an incremental search adds; 0 for one-shot.
        width_scaling: Whether candidates are as wide, in proportion to their depth, as the target.
        only: What the proposer ``listed`` tries, in that order.
    """

    space: Space
    proposer: str
    initial: int
    seed: int
    budget: int
    evaluator: Mapping[str, Any]
    batch: int = 1
    criteria: Criteria = field(default_factory=Criteria)
    strategy: str = "one-shot"
    step: int = 0
    width_scaling: bool = False
    only: tuple[CompositeSequence, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The settings as they stand in `study.json`."""
        only = {"only": [str(each) for each in self.only]} if self.only else {}
        return {
            "space": self.space.as_dict(),
            "strategy": {"name": self.strategy, "step": self.step, "width_scaling": self.width_scaling},
            "proposer": {"name": self.proposer, "initial": self.initial, "seed": self.seed, "batch": self.batch} | only,
            **self.criteria.as_dict(),
            "evaluator": dict(self.evaluator),
            "budget": self.budget,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudySettings:
        """The inverse of `as_dict`, which also reads studies from before there were strategies and objectives.

        Raises `KeyError`, `TypeError` or `UsageError` on values of another kind.
        """
        proposer, strategy = values["proposer"], values.get("strategy", {"name": "one-shot", "step": 0})
        space = values["space"]
        return cls(
            space=Space(space["primitives"], space["length"], space.get("prefix", ""), space.get("suffix", "")),
            proposer=proposer["name"],
            initial=proposer["initial"],
            seed=proposer["seed"],
            budget=values["budget"],
            evaluator=dict(values["evaluator"]),
            batch=proposer.get("batch", 1),
            criteria=Criteria.from_dict(values),
            strategy=strategy["name"],
            step=strategy["step"],
            width_scaling=strategy.get("width_scaling", False),
            only=tuple(CompositeSequence.parse(text) for text in proposer.get("only", ())),
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One line of the log: a sequence and what its evaluation gave, or why it gave nothing.

    Attributes:
        trial: Number in the study, from 0, in the order of proposal; the log is in the order of completion.
        sequence: The candidate.
        proposer: Who proposed it, as in `composer_search.proposers.Proposal`.
        seconds: Time its evaluation took.
        finished: When it ended, ISO 8601.
        score: Its accuracy; None for a failed trial.
        spread: Standard deviation of the score over seeds.
        seed_scores: The score of each seed.
        tasks: The score of each task, mean over seeds.
        test_score: The score on data that nothing was chosen by.
        objective: The exact metrics of the grown sequence and, of a mix, its ``value``, of several goals ``goal_1``, …;
            empty where there is no target.
        details: More, for people.
        error: Why the trial failed; None for a completed one.
    """

    trial: int
    sequence: CompositeSequence
    proposer: str
    seconds: float
    finished: str
    score: float | None = None
    spread: float = 0.0
    seed_scores: tuple[float, ...] = ()
    tasks: Mapping[str, float] = field(default_factory=dict)
    test_score: float | None = None
    objective: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def completed(self) -> bool:
        """Whether it has a score."""
        return self.score is not None

    @property
    def value(self) -> float | None:
        """What it is ranked by: the objective's value or first goal, of a plain one the score; None if it failed."""
        return self.objective.get("value", self.objective.get("goal_1", self.score)) if self.completed else None

    def as_dict(self) -> dict[str, Any]:
        """The trial as a line of the log."""
        values: dict[str, Any] = {"trial": self.trial, "sequence": str(self.sequence)}
        if self.completed:
            values |= {"status": "completed", "score": self.score, "spread": self.spread}
            values |= {"seed_scores": list(self.seed_scores), "tasks": dict(self.tasks), "test_score": self.test_score}
        else:
            values |= {"status": "failed", "error": self.error}
        if self.objective:
            values["objective"] = dict(self.objective)
        values |= {"proposer": self.proposer, "seconds": self.seconds, "finished": self.finished}
        return values | {"details": dict(self.details)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """The inverse of `as_dict`.

        Raises:
            UsageError: If a field is missing or of the wrong kind; the message names it.
        """
        completed = _take(values, "status", str) == "completed"
        return cls(
            trial=_take(values, "trial", int),
            sequence=CompositeSequence.parse(_take(values, "sequence", str)),
            proposer=_take(values, "proposer", str),
            seconds=_take(values, "seconds", float),
            finished=_take(values, "finished", str),
            score=_take(values, "score", float) if completed else None,
            spread=_take(values, "spread", float) if completed else 0.0,
            seed_scores=tuple(_take(values, "seed_scores", list)) if completed else (),
            tasks=_take(values, "tasks", dict) if completed else {},
            test_score=values.get("test_score"),
            objective=values.get("objective", {}),
            details=values.get("details", {}),
            error=None if completed else _take(values, "error", str),
        )


def _take(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; expected {kind.__name__}")
    return value


class Study:
    """A study on the disk. `open` one to search, `load` one to look at it.

    Attributes:
        path: The folder.
        settings: What was asked for.
        created: When, ISO 8601.
        trials: In the order of completion.
        steps: What an incremental search has found so far, a JSON object a step.
    """

    def __init__(
        self,
        path: Path,
        settings: StudySettings,
        created: str,
        trials: Sequence[Trial],
        steps: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Use `open` or `load`."""
        self.path, self.settings, self.created = path, settings, created
        self.steps = list(steps)
        self.trials = list(trials)
        self._lock: IO[bytes] | None = None

    @classmethod
    def load(cls, path: Path | str) -> Study:
        """Read a study and change nothing, not even a torn last line; another process may be writing it.

        Raises:
            FileError: If there is no study, or a file of it is corrupt.
        """
        return cls._read(Path(path), repair=False)

    @classmethod
    def open(cls, path: Path | str, settings: StudySettings) -> Study:
        """Create the study, or resume it if it is there, for this process alone until `close`.

        Raises:
            UsageError: If the study was made with other settings; the message names them.
            ComposerError: If another process has it open.
            FileError: If a file is corrupt or cannot be written.
        """
        path = Path(path)
        with naming(path, "make the study"):
            path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            if not (path / "study.json").exists():
                cls._create(path, settings)
            study = cls._read(path, repair=True)
            study._continue_with(settings)
        except BaseException:
            lock.close()
            raise
        study._lock = lock
        return study

    @staticmethod
    def _create(path: Path, settings: StudySettings) -> None:
        if (path / "trials.jsonl").exists():
            raise FileError(f"{path} has trials.jsonl but no study.json; restore it, or use another folder")
        _write_head(path, settings, now(), ())

    @classmethod
    def _read(cls, path: Path, *, repair: bool) -> Study:
        file = path / "study.json"
        if not file.exists():
            raise FileError(f"no study at {path}: there is no study.json; `composer-megatron search` makes one")
        values = read_json(file, "a study")
        if values.get("format") != _FORMAT:
            raise FileError(f'{file} is not a study: expected "format": "{_FORMAT}"')
        if values.get("version") != _VERSION:
            raise FileError(f"{file} has version {values.get('version')!r}; this program reads version {_VERSION}")
        try:
            settings = StudySettings.from_dict(values)
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{file} is not a whole study: {error!r}; restore it, or use another folder") from None
        trials = _read_trials(path, settings.space, repair=repair)
        return cls(path, settings, str(values.get("created")), trials, values.get("steps", ()))

    def _continue_with(self, settings: StudySettings) -> None:
        """Refuse other settings; take over a raised budget, and the exhaustive search that it may allow."""
        old, new = _flat(self.settings.as_dict()), _flat(json.loads(json.dumps(settings.as_dict())))
        raised = settings.budget > self.settings.budget and settings.strategy == "one-shot"
        if raised:
            old["budget"] = new["budget"]
        if raised and settings.proposer == "exhaustive":
            old["proposer.name"] = new["proposer.name"]
        differing = [name for name in old | new if old.get(name) != new.get(name)]
        if differing:
            shown = [f"{name} is {old.get(name)!r} there and {new.get(name)!r} now" for name in differing[:3]]
            rest = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
            advice = "repeat its settings or use another folder"
            raise UsageError(f"the study {self.path} has other settings: {'; '.join(shown)}{rest}; {advice}")
        if raised:
            self.settings = settings
            _write_head(self.path, settings, self.created, self.steps)

    @property
    def completed(self) -> list[Trial]:
        """The trials with a score."""
        return [trial for trial in self.trials if trial.completed]

    @property
    def best(self) -> Trial | None:
        """The trial with the highest value of the objective, the earliest of equals; None before the first.

        Where the objective has several goals, the first one counts; `composer_search.objectives.pareto_front` has all.
        """

        def value(trial: Trial) -> tuple[float, int]:
            return self.settings.criteria.goals(trial.sequence, trial.score or 0.0)[0], -trial.trial

        return max(self.completed, key=value, default=None)

    def free_numbers(self, running: Sequence[int] = ()) -> list[int]:
        """Numbers of the trials that the budget still allows, lowest first; that of a lost trial is free again."""
        taken = {trial.trial for trial in self.trials} | set(running)
        return [number for number in range(self.settings.budget) if number not in taken]

    def record(self, trial: Trial) -> None:
        """Append a trial to the log; when this returns it is on the disk.

        Raises:
            FileError: If it cannot be written, as on a full disk; the log then is as it was.
        """
        if self._lock is None:
            raise ComposerError(f"the study {self.path} is not open for writing")
        append_json_line(self.path / "trials.jsonl", trial.as_dict())
        self.trials.append(trial)

    def save_steps(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Put the steps of an incremental search into `study.json`, in one step."""
        if list(steps) != self.steps:
            _write_head(self.path, self.settings, self.created, steps)
            self.steps = list(steps)

    def save_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        """Replace `ax.json`, in one step."""
        write_text(self.path / "ax.json", json.dumps(snapshot) + "\n")

    def close(self) -> None:
        """Let other processes open the study."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_head(path: Path, settings: StudySettings, created: str, steps: Sequence[Mapping[str, Any]]) -> None:
    """Write `study.json`."""
    head = {"format": _FORMAT, "version": _VERSION, "created": created}
    tail = {"steps": list(steps)} if steps else {}
    write_json(path / "study.json", head | settings.as_dict() | tail)


def _lock(path: Path) -> IO[bytes]:
    """Hold the study's lock until the returned file is closed, or this process ends in whatever way."""
    with naming(path / "study.lock", "lock"):
        file = (path / "study.lock").open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            file.close()
            advice = "wait until it ends or stop it, or use another folder"
            raise ComposerError(f"the study {path} is in use by process {holder}; {advice}") from None
    with contextlib.suppress(OSError):  # the number is for the message above alone; a full disk must not matter here
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    return file


def _read_trials(path: Path, space: Space, *, repair: bool) -> list[Trial]:
    log = path / "trials.jsonl"
    trials: list[Trial] = []
    numbers: set[int] = set()
    for line, values in enumerate(read_json_lines(log, repair=repair), start=1):
        try:
            trial = Trial.from_dict(values)
        except UsageError as error:
            raise FileError(f"{log}, line {line}: {error}; mend or remove that line") from None
        if trial.sequence not in space:
            where = f"{log}, line {line}: {trial.sequence}"
            raise FileError(f"{where} is not of {space}; remove that line")
        if trial.trial in numbers:
            raise FileError(f"{log}, line {line}: trial {trial.trial} is there twice; remove one of the two")
        numbers.add(trial.trial)
        trials.append(trial)
    return trials


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON values under dotted names: ``{"proposer": {"seed": 0}}`` gives ``{"proposer.seed": 0}``."""
    if isinstance(value, dict) and value:
        return {name: leaf for key, item in value.items() for name, leaf in _flat(item, f"{prefix}{key}.").items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _flat({str(number): item for number, item in enumerate(value)}, prefix)
    return {prefix.rstrip("."): value}
