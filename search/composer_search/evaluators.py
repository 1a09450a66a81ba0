"""The MAD evaluator: what a sequence is worth is what tiny models of it learn on synthetic tasks."""

from __future__ import annotations

import dataclasses
import difflib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import Widths
from composer_search.evaluation import Evaluation, Evaluator
from composer_search.mad import Setting, baseline
from composer_search.mad.tasks import find_task
from composer_search.trainer import TaskData, TrainResult, TrainSettings, train


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """One task of an evaluation.

    Attributes:
        setting: The task and its difficulty.
        n_valid: Validation sequences, disjoint from training and test.
        steps: Optimizer steps at most.
        batch_size: Sequences a step.
        evaluate_every: Steps between looks at the validation data.
    """

    setting: Setting
    n_valid: int
    steps: int
    batch_size: int
    evaluate_every: int


@dataclass(frozen=True, kw_only=True)
class MadSettings:
    """A whole evaluation; `preset` makes the usual ones.

    Attributes:
        tasks: The tasks; the score is their plain mean.
        train: The trainer's settings, but for those that a `TaskPlan` holds.
        seeds: Trainings of each task, from different weights and batches.
        seed: Of the data, which every training shares, and of the trainings' seeds.
    """

    tasks: tuple[TaskPlan, ...]
    train: TrainSettings = field(default_factory=TrainSettings)
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise a `UsageError` for an evaluation of nothing, before any trial runs."""
        if not self.tasks:
            raise UsageError("an evaluation needs at least one task")
        names = [plan.setting.name for plan in self.tasks]
        if len(set(names)) < len(names):
            raise UsageError(f"the same task twice: {', '.join(names)}")
        for name, least in (("seeds", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)}; expected at least {least}")
        for plan in self.tasks:
            find_task(plan.setting.task).at(**plan.setting.settings)
            self.for_task(plan)

    def for_task(self, plan: TaskPlan) -> TrainSettings:
        """The trainer's settings for one task."""
        own = {name: getattr(plan, name) for name in ("steps", "batch_size", "evaluate_every")}
        return dataclasses.replace(self.train, **own)


class MadEvaluator(Evaluator):
    """Mean accuracy over MAD tasks of tiny models of the sequence (arXiv 2403.17844; as proxy: arXiv 2510.00379).

    The learning rate is chosen for each task from the grid with the first seed; further seeds are trained at that rate.

    Args:
        settings: Tasks, widths, budget and seeds.
        cache_dir: Folder for generated data; None generates them anew in each process.
    """

    def __init__(self, settings: MadSettings, cache_dir: Path | None = None) -> None:
        self.settings, self.cache_dir = settings, cache_dir
        self._data: dict[TaskPlan, TaskData] = {}

    def describe(self) -> dict[str, Any]:
        """All settings as JSON values. Where data are cached is not among them."""
        tasks = [_describe_task(plan) for plan in self.settings.tasks]
        trainer = dataclasses.asdict(self.settings.train)
        trainer |= trainer.pop("widths") | {"learning_rates": list(self.settings.train.learning_rates)}
        for own in ("steps", "batch_size", "evaluate_every", "device"):
            del trainer[own]
        return {"name": "mad", "tasks": tasks, **trainer, "seeds": self.settings.seeds, "seed": self.settings.seed}

    def evaluate(self, sequence: CompositeSequence) -> Evaluation:
        """Train the sequence's models and score them."""
        results = {self._label(plan): self._train_seeds(sequence, plan) for plan in self.settings.tasks}
        by_seed = list(zip(*results.values(), strict=True))
        scores = tuple(statistics.fmean(result.validation for result in seed) for seed in by_seed)
        tests = [statistics.fmean(result.test for result in seed) for seed in by_seed]
        return Evaluation(
            score=statistics.fmean(scores),
            spread=statistics.stdev(scores) if len(scores) > 1 else 0.0,
            seed_scores=scores,
            tasks={name: statistics.fmean(result.validation for result in seeds) for name, seeds in results.items()},
            test_score=statistics.fmean(tests),
            details={"tasks": {name: _details(seeds) for name, seeds in results.items()}},
        )

    def _train_seeds(self, sequence: CompositeSequence, plan: TaskPlan) -> list[TrainResult]:
        settings, data = self.settings.for_task(plan), self._task_data(plan)
        first, *others = (training_seed(self.settings.seed, number) for number in range(self.settings.seeds))
        results = [train(sequence, data, settings, first)]
        at_that_rate = dataclasses.replace(settings, learning_rates=(results[0].learning_rate,))
        return results + [train(sequence, data, at_that_rate, seed) for seed in others]

    def _label(self, plan: TaskPlan) -> str:
        """The task's name, with what differs from its baseline where the task occurs at several difficulties."""
        same = [other for other in self.settings.tasks if other.setting.task == plan.setting.task]
        return plan.setting.task if len(same) == 1 else plan.setting.name

    def _task_data(self, plan: TaskPlan) -> TaskData:
        if plan not in self._data:
            setting = plan.setting
            parts = setting.dataset(self.settings.seed, n_valid=plan.n_valid, cache_dir=self.cache_dir)
            vocab_size = find_task(setting.task).at(**setting.settings).vocab_size
            autoencoder = setting.task == "compression"
            self._data[plan] = TaskData(vocab_size, parts["train"], parts["valid"], parts["test"], autoencoder)
        return self._data[plan]


def training_seed(seed: int, number: int) -> int:
    """The seed of training `number` in an evaluation of that seed; no two evaluations share one."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _describe_task(plan: TaskPlan) -> dict[str, Any]:
    setting = plan.setting
    sampler = dataclasses.asdict(find_task(setting.task).at(**setting.settings))
    counts = {"n_train": setting.n_train, "n_valid": plan.n_valid, "n_test": setting.n_test}
    budget = {name: getattr(plan, name) for name in ("steps", "batch_size", "evaluate_every")}
    return {"task": setting.task, **sampler, **counts, **budget}


def _details(seeds: list[TrainResult]) -> dict[str, Any]:
    """How one task went: of each seed its accuracies, and the first seed's choice of rate and course."""
    first = seeds[0]
    return {
        "validation": [result.validation for result in seeds],
        "test": [result.test for result in seeds],
        "learning_rate": first.learning_rate,
        "by_rate": [list(pair) for pair in first.by_rate],
        "steps": [result.steps for result in seeds],
        "curve": [list(point) for point in first.curve],
    }


def preset(name: str, **overrides: Any) -> MadSettings:
    """A preset with some settings changed.

    - ``smoke``: two tasks, a fraction of a second a candidate; the scores mean little.
    - ``demo``: three easy tasks at a budget at which six-block sequences differ, some 12 CPU seconds a candidate.
    - ``baseline``: the six tasks at MAD's baseline, days of CPU time a candidate; meant for a GPU.

    Args:
        name: The preset.
        **overrides: Fields of `MadSettings`, `TrainSettings`, `Widths`; of `TaskPlan`, for all tasks alike; and
            ``tasks``, names that pick some of the preset's tasks.

    Raises:
        UsageError: If there is no such preset or setting, or a value is impossible.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown evaluator preset {name!r}; expected {', '.join(PRESETS)}")
    settings = PRESETS[name]()
    if "tasks" in overrides:
        settings = _pick_tasks(settings, overrides.pop("tasks"))
    places = {"search": settings, "train": settings.train, "widths": settings.train.widths, "plan": settings.tasks[0]}
    changes: dict[str, dict[str, Any]] = {place: {} for place in places}
    for key, value in overrides.items():
        place = _place_of(key, places)
        changes[place][key] = _like(key, value, getattr(places[place], key))
    plans = tuple(dataclasses.replace(plan, **changes["plan"]) for plan in settings.tasks)
    widths = dataclasses.replace(settings.train.widths, **changes["widths"])
    trainer = dataclasses.replace(settings.train, widths=widths, **changes["train"])
    return dataclasses.replace(settings, tasks=plans, train=trainer, **changes["search"])


def _pick_tasks(settings: MadSettings, names: str | Sequence[str]) -> MadSettings:
    """The settings with the named tasks alone; a text separates them by commas."""
    wanted = names.split(",") if isinstance(names, str) else list(names)
    have = {plan.setting.task: plan for plan in settings.tasks}
    for name in wanted:
        if name not in have:
            raise UsageError(f"tasks: {name!r} is not in this preset, which has {', '.join(have)}")
    return dataclasses.replace(settings, tasks=tuple(have[name] for name in wanted))


def _place_of(key: str, places: Mapping[str, Any]) -> str:
    """Which part of the settings has the field; what a task has of its own comes before the trainer's."""
    fields = {field.name: place for place, part in places.items() for field in dataclasses.fields(part)}
    for whole in ("tasks", "train", "widths", "setting"):
        del fields[whole]
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are tasks, {', '.join(sorted(fields))}"
        raise UsageError(f"the evaluator has no setting {key!r}{hint}")
    return fields[key]


def _like(key: str, value: Any, old: Any) -> Any:
    """`value` as the kind of `old`."""
    if isinstance(old, tuple):
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        return tuple(_like(key, item, 0.0) for item in values)
    numbers = (int, float) if isinstance(old, float) else (type(old),)
    if not isinstance(value, numbers) or isinstance(value, bool) is not isinstance(old, bool):
        raise UsageError(f"evaluator setting {key}={value!r}; expected {type(old).__name__}")
    return type(old)(value)


def _plan(
    task: str, *, steps: int, batch_size: int, evaluate_every: int, sizes: tuple[int, int, int], **settings: int
) -> TaskPlan:
    n_train, n_valid, n_test = sizes
    return TaskPlan(
        setting=Setting(task, n_train, n_test, tuple(settings.items())),
        n_valid=n_valid,
        steps=steps,
        batch_size=batch_size,
        evaluate_every=evaluate_every,
    )


def _smoke() -> MadSettings:
    sizes = (256, 64, 64)
    common = {"steps": 20, "batch_size": 16, "evaluate_every": 10}
    return MadSettings(
        tasks=(
            _plan("in-context-recall", **common, sizes=sizes, vocab_size=6, seq_len=12),
            _plan("memorization", **common, sizes=sizes, vocab_size=32, seq_len=8),
        ),
        train=TrainSettings(
            widths=Widths(hidden_size=16, num_heads=2, ffn_hidden_size=48),
            learning_rates=(1e-2,),
            cosine=False,
            device="cpu",
        ),
    )


def _demo() -> MadSettings:
    """Sizes and steps were measured: each task is about half learnt then, and how far depends on the sequence.

    Over all 64 sequences of six blocks the score was .17 without attention, .74 to .81 with one attention block, .77 to
    .95 with more. Where there is attention, scores had a standard deviation of .049 between sequences and .033 between
    the seeds of one, and the seeds' rankings a Spearman correlation of .63. At a third of the steps the curves are
    still at the floor.
    """
    sizes = (4096, 256, 256)
    copying = {"vocab_size": 8, "seq_len": 20, "num_tokens_to_copy": 3}
    return MadSettings(
        tasks=(
            _plan(
                "in-context-recall", steps=300, batch_size=32, evaluate_every=50, sizes=sizes, vocab_size=6, seq_len=12
            ),
            _plan("memorization", steps=60, batch_size=16, evaluate_every=20, sizes=sizes, vocab_size=1024, seq_len=32),
            _plan("selective-copying", steps=150, batch_size=32, evaluate_every=50, sizes=sizes, **copying),
        ),
        train=TrainSettings(
            widths=Widths(hidden_size=32, num_heads=4, ffn_hidden_size=96),
            learning_rates=(3e-3, 6e-3),
            cosine=False,
            device="cpu",
        ),
        seeds=2,
    )


def _baseline() -> MadSettings:
    """MAD's baseline with its budget of 200 epochs; the validation data are as many as the test data."""
    batch_size, epochs = 128, 200
    plans = tuple(
        TaskPlan(
            setting=setting,
            n_valid=setting.n_test,
            steps=epochs * -(-setting.n_train // batch_size),
            batch_size=batch_size,
            evaluate_every=5 * -(-setting.n_train // batch_size),
        )
        for setting in baseline()
    )
    return MadSettings(tasks=plans)


PRESETS: Mapping[str, Callable[[], MadSettings]] = MappingProxyType(
    {"smoke": _smoke, "demo": _demo, "baseline": _baseline}
)
"""The evaluations that have a name."""
