"""The ledger: finished trainings in a file, so that none is ever repeated, be it after a kill or in another study.

A line is a training at one recipe from one seed. Its key is a digest of everything that its result depends on but the
machine: the task with its data and budget, the trainer's settings, the sequence, the recipe and the seed. So studies of
some tasks, or of fewer seeds, are steps on the way to one of all of them; and ledgers of several machines are joined by
putting their lines into one file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_megatron.errors import FileError
from composer_megatron.files import append_json_line, naming, read_json_lines
from composer_search.evaluators.settings import TaskPlan
from composer_search.mad.data import GENERATOR_VERSION
from composer_search.trainer import TrainResult, TrainSettings


@dataclass(frozen=True)
class TrainingKey:
    """What a training's result depends on.

    Attributes:
        settings: Digest of the task, its data and budget, and the trainer's settings (`settings_digest`).
        sequence: The candidate's letters.
        learning_rate: The peak of the schedule.
        weight_decay: AdamW's.
        seed: Of the initial weights and the batches.
    """

    settings: str
    sequence: str
    learning_rate: float
    weight_decay: float
    seed: int


def settings_digest(plan: TaskPlan, train: TrainSettings, data_seed: int) -> str:
    """The digest of what all recipes and seeds of a task share; the device is not in it.

    Args:
        plan: The task.
        train: The trainer's settings with the task's budget, and the candidate's own widths if it has some.
        data_seed: What the data were generated from.
    """
    shared = train.describe("device", "learning_rates", "weight_decay")
    data = [GENERATOR_VERSION, data_seed]
    text = json.dumps({"plan": plan.describe(), "train": shared, "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ledger:
    """The file of finished trainings. Several processes of one machine may write it at once.

    Args:
        path: A JSON object a line; made when it is first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[TrainingKey, TrainResult]:
        """All of them; of a training that is there twice, the first. A torn last line is left out.

        Raises:
            FileError: If another line is damaged; the message names it.
        """
        found: dict[TrainingKey, TrainResult] = {}
        for number, line in enumerate(read_json_lines(self.path), start=1):
            try:
                key = TrainingKey(**line["key"])
                found.setdefault(key, _result(key, line["result"]))
            except (KeyError, TypeError, ValueError) as error:
                raise FileError(f"{self.path}, line {number}: no training ({error!r}); remove that line") from None
        return found

    def record(self, results: Mapping[TrainingKey, TrainResult], task: str, device: str) -> None:
        """Append trainings; when this returns they are on the disk.

        Args:
            results: What each gave.
            task: Its name, for people.
            device: Where it ran, for people: results of different machines differ in rounding.

        Raises:
            FileError: If they cannot be written; what was there stays.
        """
        with naming(self.path, "open"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.open("a+b")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_torn(self.path):  # by a process that was killed
                read_json_lines(self.path, repair=True)
            for key, result in results.items():
                line = {"task": task, "device": device, "key": vars(key), "result": _values(result)}
                append_json_line(self.path, line)


def _values(result: TrainResult) -> dict[str, Any]:
    """What the key does not say already."""
    return {name: getattr(result, name) for name in ("validation", "test", "steps", "ended", "curve")}


def _result(key: TrainingKey, values: Mapping[str, Any]) -> TrainResult:
    """The inverse of `_values`."""
    return TrainResult(
        validation=values["validation"],
        test=values["test"],
        learning_rate=key.learning_rate,
        steps=values["steps"],
        by_rate=((key.learning_rate, values["validation"]),),
        curve=tuple((int(step), float(accuracy)) for step, accuracy in values["curve"]),
        ended=values["ended"],
        weight_decay=key.weight_decay,
    )


def _is_torn(path: Path) -> bool:
    with naming(path, "read"), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return size > 0 and file.read(1) != b"\n"
