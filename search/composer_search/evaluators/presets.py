"""The MAD evaluations that have a name, and changing some of their settings."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from composer_megatron.errors import UsageError
from composer_search.candidate import Widths
from composer_search.evaluators.settings import MadSettings, TaskPlan
from composer_search.mad import PROXIES, Setting, baseline, difficulty_sweep
from composer_search.mad.tasks import Value
from composer_search.trainer import TrainSettings

BATCH_SIZE, EPOCHS = 128, 200
"""MAD's batch and passes over the training data."""

_MAD = TrainSettings(precision="bfloat16")
"""MAD's training; in single precision a GPU would multiply matrices at a fraction of its speed."""


def preset(name: str, **overrides: Any) -> MadSettings:
    """A preset with some settings changed.

    - ``smoke``: two tasks, a fraction of a second a candidate; the scores mean little.
    - ``demo``: three easy tasks at a budget at which six-block sequences differ, some 10 CPU seconds a candidate.
    - ``baseline``: the six tasks at MAD's baseline, days of CPU time a candidate; meant for a GPU.
    - ``full``: MAD's whole protocol, 66 settings at 6 recipes, 396 trainings a candidate. Choices are made on
      validation data, which MAD does not have.
    - ``proxies``: our tasks beside MAD's: recall of many keys, state tracking, variable tracking; three are tested on
      twice the length.

    Args:
        name: The preset.
        **overrides: Fields of `MadSettings`, `TrainSettings`, `Widths`; of `TaskPlan`, for all tasks alike;
            ``epochs`` in place of ``steps``, passes over each task's training data; ``tasks``, names that pick some of
            the preset's tasks; and for ``baseline`` and ``full`` ``difficulty_sweep``, whether each task is trained at
            all difficulties or at MAD's baseline alone.

    Raises:
        UsageError: If there is no such preset or setting, or a value is impossible.
    """
    settings = _named(name, overrides)
    if "tasks" in overrides:
        settings = _pick_tasks(settings, overrides.pop("tasks"))
    epochs = like("epochs", overrides.pop("epochs"), 0) if "epochs" in overrides else None
    places = {"search": settings, "train": settings.train, "widths": settings.train.widths, "plan": settings.tasks[0]}
    changes: dict[str, dict[str, Any]] = {place: {} for place in places}
    for key, value in overrides.items():
        place = _place_of(key, places)
        changes[place][key] = like(key, value, getattr(places[place], key))
    plans = tuple(dataclasses.replace(plan, **changes["plan"]) for plan in settings.tasks)
    if epochs is not None:
        if epochs < 1 or "steps" in changes["plan"]:
            raise UsageError(f"epochs={epochs}; expected at least 1, and no steps beside it")
        plans = tuple(dataclasses.replace(plan, steps=epochs * steps_of_an_epoch(plan)) for plan in plans)
    widths = dataclasses.replace(settings.train.widths, **changes["widths"])
    trainer = dataclasses.replace(settings.train, widths=widths, **changes["train"])
    return dataclasses.replace(settings, tasks=plans, train=trainer, **changes["search"])


def steps_of_an_epoch(plan: TaskPlan) -> int:
    """Steps of one pass over a task's training data, the last of which may lack some of its sequences."""
    return -(-plan.setting.n_train // plan.batch_size)


def _named(name: str, overrides: dict[str, Any]) -> MadSettings:
    """The preset itself, at the difficulties asked for."""
    if name not in PRESETS:
        raise UsageError(f"unknown evaluator preset {name!r}{nearest(name, PRESETS)}")
    settings = PRESETS[name]()
    if "difficulty_sweep" not in overrides:
        return settings
    wanted = like("difficulty_sweep", overrides.pop("difficulty_sweep"), False)
    if name not in ("baseline", "full"):
        raise UsageError(f"difficulty_sweep belongs to the presets baseline and full, not to {name}")
    return dataclasses.replace(settings, tasks=_mad_plans(difficulty_sweep() if wanted else baseline()))


def _pick_tasks(settings: MadSettings, names: str | Sequence[str]) -> MadSettings:
    """The settings with the named tasks alone; a text separates them by commas."""
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    have: dict[str, list[TaskPlan]] = {}
    for plan in settings.tasks:
        have.setdefault(plan.setting.task, []).append(plan)
    for name in wanted:
        if name not in have:
            raise UsageError(f"tasks: {name!r} is not in this preset{nearest(name, have)}")
    return dataclasses.replace(settings, tasks=tuple(plan for name in wanted for plan in have[name]))


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected {', '.join(names)}"


def _place_of(key: str, places: Mapping[str, Any]) -> str:
    """Which part of the settings has the field; what a task has of its own comes before the trainer's."""
    fields = {field.name: place for place, part in places.items() for field in dataclasses.fields(part)}
    for whole in ("tasks", "train", "widths", "setting", "weights"):
        del fields[whole]
    if key not in fields:
        known = ["tasks", "epochs", *sorted(fields)]
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
        raise UsageError(f"the evaluator has no setting {key!r}{hint}")
    return fields[key]


def like(key: str, value: Any, old: Any) -> Any:
    """`value` as the kind of `old`; a tuple is one of numbers.

    Raises:
        UsageError: If it is of another kind.
    """
    if isinstance(old, tuple):
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        return tuple(like(key, item, 0.0) for item in values)
    numbers = (int, float) if isinstance(old, float) else (type(old),)
    if not isinstance(value, numbers) or isinstance(value, bool) is not isinstance(old, bool):
        raise UsageError(f"evaluator setting {key}={value!r}; expected {type(old).__name__}")
    return type(old)(value)


def _plan(
    task: str, *, steps: int, batch_size: int, evaluate_every: int, sizes: tuple[int, int, int], **settings: Value
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
    """MAD's baseline with its budget of 200 epochs and its precision; validation data are as many as test data."""
    return MadSettings(tasks=_mad_plans(baseline()), train=_MAD)


def _full() -> MadSettings:
    """Every difficulty at every recipe of MAD's grid."""
    return MadSettings(tasks=_mad_plans(difficulty_sweep()), train=_MAD, weight_decays=(0.0, 0.1))


def _mad_plans(settings: Iterable[Setting]) -> tuple[TaskPlan, ...]:
    """MAD's budget of passes over the training data, looked at after every fifth."""
    plans = []
    for setting in settings:
        steps = -(-setting.n_train // BATCH_SIZE)
        budget = {"steps": EPOCHS * steps, "batch_size": BATCH_SIZE, "evaluate_every": 5 * steps}
        plans.append(TaskPlan(setting=setting, n_valid=setting.n_test, **budget))
    return tuple(plans)


def _proxies() -> MadSettings:
    """Each task at its own sizes with MAD's budget; lengths beyond training's are what state tracking is judged by."""
    settings = (Setting(name, row.n_train, row.n_test) for name, row in PROXIES.items())
    return MadSettings(tasks=_mad_plans(settings), train=_MAD)


PRESETS: Mapping[str, Callable[[], MadSettings]] = MappingProxyType(
    {"smoke": _smoke, "demo": _demo, "baseline": _baseline, "full": _full, "proxies": _proxies}
)
"""The evaluations that have a name."""
