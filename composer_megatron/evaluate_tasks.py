"""Scores of a trained run on lm-eval's tasks, with data from the hub as lm-eval has them, or from local files.

A task is what lm-eval says it is: its prompts, choices and metrics. Only where its documents come from can change: in a
folder of JSON lines, a file whose name begins with a task's name holds that task's documents, and ends with the split
that they are (``arc_easy_test.jsonl``, ``winogrande_xl_validation.jsonl``); then nothing is fetched for that task.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from composer_megatron.env import environment
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import naming, write_json

if TYPE_CHECKING:
    from composer_megatron.checkpoint import LoadedRun
    from composer_megatron.harness import RunLM

_SPLITS = ("train", "validation", "test")
_GROUP = "local_files"
_SEED, _FEWSHOT_SEED = 0, 1234
"""lm-eval's own."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: lm-eval's name.
        metric: Such as acc, acc_norm (by the bytes of the choices), perplexity, bits_per_byte.
        filter: Of the answers, before the metric; "none" for most tasks.
        value: The score.
        stderr: Its standard error over the documents; None where lm-eval has none.
        samples: Documents.
        fewshot: Solved examples before each.
        higher_is_better: Whether it is; None where lm-eval does not say.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int
    fewshot: int
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskScores:
    """What was scored.

    Attributes:
        iteration: The checkpoint's.
        scores: By task, then metric.
        limit: Documents of each task that were used at most; None for all.
        data: Of each task with local data the file's name and the SHA-256 of its content.
        versions: lm-eval's version of each task.
    """

    iteration: int
    scores: tuple[TaskScore, ...]
    limit: int | None
    data: dict[str, dict[str, str]]
    versions: dict[str, Any]

    def save(self, run_dir: Path) -> Path:
        """Write ``tasks.json`` into a run folder, in one step; returns its path."""
        path = run_dir / "tasks.json"
        values = asdict(self) | {"scores": [asdict(score) for score in self.scores], "environment": environment()}
        write_json(path, values | {"lm_eval": importlib.metadata.version("lm-eval")})
        return path


def evaluate_tasks(
    run: LoadedRun,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    task_path: Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> TaskScores:
    """Score a run on tasks.

    Args:
        run: A trained run with a tokenizer.
        tasks: Names of lm-eval's tasks, groups or tags.
        data: A folder of JSON lines; see above.
        task_path: A folder of further tasks, as YAML files that lm-eval reads.
        fewshot: Solved examples before each document; None for as many as the task says.
        limit: Documents of each task at most; the first ones.
        batch_tokens: As `composer_megatron.harness.RunLM`.
        progress: Called with the requests done and those there are, for each kind of request.
        report: Called with a line before a step that can take long.

    Raises:
        ComposerError: If lm-eval is missing, or a task's data cannot be had.
        UsageError: For an unknown task, or a number that is impossible.
        FileError: If the run has no tokenizer, or a folder is none.
    """
    for name, value, least in (("limit", limit, 1), ("fewshot", fewshot, 0)):
        if value is not None and value < least:
            raise UsageError(f"{name}={value}; expected at least {least}")
    if not tasks:
        raise UsageError("no task; name one of lm-eval's, such as arc_easy")
    _require_lm_eval()
    from composer_megatron.harness import RunLM

    model = RunLM(run, batch_tokens=batch_tokens, progress=progress)
    for folder in (data, task_path):
        if folder is not None and not folder.is_dir():
            raise FileError(f"{folder} is no folder")
    manager = _manager(task_path)
    _check_names(tasks, manager.all_tasks)
    files = {} if data is None else local_files(data, tasks)
    asked = [task for task in tasks if task not in files]
    if asked and report is not None:
        report(f"asking the hub for task{'s' if len(asked) > 1 else ''} {', '.join(asked)}")
    found = _evaluate(model, _load(manager, tasks, files), fewshot, limit)
    if found is None:
        raise ComposerError("lm-eval gave no result: it gives one to the first of several processes alone")
    sources = {task: {"file": path.name, "sha256": _digest(path)} for task, path in files.items()}
    versions = {task: version for task, version in found["versions"].items() if task != _GROUP}
    return TaskScores(run.iteration, tuple(_scores(found)), limit, sources, versions)


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ComposerError('tasks need lm-eval, which is missing: pip install "composer-megatron[eval]"')
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else it forks for the standard error of a perplexity
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets

    datasets.disable_progress_bars()
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


@functools.cache
def _manager(task_path: Path | None) -> Any:
    """Knows all tasks; it reads thousands of files to do so."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if task_path is None else str(task_path))


def _check_names(tasks: Iterable[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise UsageError(f"unknown task {task!r}: {hint}")


def local_files(folder: Path, tasks: Iterable[str]) -> dict[str, Path]:
    """The file of each task that has one in a folder: ``TASK….jsonl``, the one with the shortest name.

    A longer task's file, such as ``arc_easy_test.jsonl`` for ``arc``, is not taken where that task is asked for, too.
    """
    names = sorted(tasks, key=len, reverse=True)
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: (len(path.stem), path.stem)):
        task = next((name for name in names if path.stem == name or path.stem.startswith(f"{name}_")), None)
        if task is not None and task not in found:
            found[task] = path
    return found


def local_task(task: str, path: Path) -> dict[str, Any]:
    """What changes about a task whose documents are in a file: where they come from, and their split."""
    split = next((split for split in _SPLITS if path.stem.endswith(f"_{split}")), "test")
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.resolve())}},
        "training_split": None,
        "validation_split": None if split == "test" else split,
        "test_split": "test" if split == "test" else None,
        "fewshot_split": split,
    }


def _load(manager: Any, tasks: Sequence[str], files: dict[str, Path]) -> dict[str, Any]:
    """Tasks, by name, with their documents. A group whose members are known tasks with changes is lm-eval's own way."""
    members = [local_task(task, path) for task, path in files.items()]
    specs: list[Any] = [task for task in tasks if task not in files]
    if members:
        specs.append({"group": _GROUP, "task": members})
    try:
        return dict(manager.load(specs)["tasks"])
    except Exception as error:  # whatever a hub, a file or a task's code raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        names = ", ".join(tasks)
        raise ComposerError(
            f"cannot load {names}: {reason}; without the hub, give a folder of JSON lines with --task-data"
        ) from error


def _evaluate(model: RunLM, tasks: dict[str, Any], fewshot: int | None, limit: int | None) -> Any:
    """lm-eval's evaluation, prepared as its `simple_evaluate` does, which would call git and list all packages.

    What lm-eval prints to standard output goes to standard error: the former is for results.
    """
    from lm_eval import evaluate

    random.seed(_SEED)  # some tasks shuffle their choices
    np.random.seed(_FEWSHOT_SEED)
    for task in tasks.values():
        usual = task.get_config("num_fewshot")
        if usual is None or (fewshot is not None and usual != 0):  # a task's own 0 is never changed
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    with contextlib.redirect_stdout(sys.stderr):
        loaded = {"tasks": tasks, "groups": {}}
        return evaluate(model, loaded, limit=limit, bootstrap_iters=1000, log_samples=False)


def _scores(found: dict[str, Any]) -> Iterable[TaskScore]:
    for task, metrics in found["results"].items():
        if task == _GROUP:
            continue
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            yield TaskScore(
                task=task,
                metric=metric,
                filter=filtered,
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) else None,
                samples=int(found["n-samples"].get(task, {}).get("effective", 0)),
                fewshot=int(found["n-shot"].get(task, 0)),
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
            )


def _digest(path: Path) -> str:
    with naming(path, "read"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
