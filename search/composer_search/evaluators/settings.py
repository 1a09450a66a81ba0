"""What a MAD evaluation consists of: tasks with their budgets, the grid, the seeds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from composer_megatron.errors import UsageError
from composer_search.candidate import Widths
from composer_search.mad import Setting
from composer_search.mad.tasks import find_task
from composer_search.trainer import TrainSettings


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

    def describe(self) -> dict[str, Any]:
        """The task with all its settings, counts and budget, as JSON values."""
        setting = self.setting
        sampler = dataclasses.asdict(find_task(setting.task).at(**setting.settings))
        counts = {"n_train": setting.n_train, "n_valid": self.n_valid, "n_test": setting.n_test}
        budget = {name: getattr(self, name) for name in ("steps", "batch_size", "evaluate_every")}
        return {"task": setting.task, **sampler, **counts, **budget}


@dataclass(frozen=True, kw_only=True)
class MadSettings:
    """A whole evaluation; `preset` makes the usual ones.

    Attributes:
        tasks: What is trained on. A task's score is the mean over its difficulties, the score the mean over tasks.
        train: The trainer's settings, but for those that a `TaskPlan` holds.
        weight_decays: Tried with each of the learning rates, the first with all of them before the second; empty for
            the one of `train`.
        seeds: Trainings of each task, from different weights and batches.
        seed: Of the data, which every training shares, and of the trainings' seeds.
    """

    tasks: tuple[TaskPlan, ...]
    train: TrainSettings = field(default_factory=TrainSettings)
    weight_decays: tuple[float, ...] = ()
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
        self._check_decays()
        for plan in self.tasks:
            find_task(plan.setting.task).at(**plan.setting.settings)
            self.for_task(plan)

    def _check_decays(self) -> None:
        if self.weight_decays and self.train.weight_decay:
            both = f"weight_decay={self.train.weight_decay}, weight_decays={self.weight_decays}"
            raise UsageError(f"{both}; give one of the two")
        if not all(0 <= decay < math.inf for decay in self.weight_decays):
            raise UsageError(f"weight_decays={self.weight_decays}; expected numbers of at least 0")

    @property
    def recipes(self) -> tuple[tuple[float, float], ...]:
        """The grid: (learning rate, weight decay), in the order in which they are preferred."""
        decays = self.weight_decays or (self.train.weight_decay,)
        return tuple((rate, decay) for decay in decays for rate in self.train.learning_rates)

    @property
    def runs(self) -> int:
        """Trainings of a sequence at most: the grid from the first seed, and the choice from the others."""
        return len(self.tasks) * (len(self.recipes) + self.seeds - 1)

    def for_task(self, plan: TaskPlan) -> TrainSettings:
        """The trainer's settings for one task."""
        own = {name: getattr(plan, name) for name in ("steps", "batch_size", "evaluate_every")}
        return dataclasses.replace(self.train, **own)

    def label(self, plan: TaskPlan) -> str:
        """The task's name, with what differs from its baseline where the task occurs at several difficulties."""
        same = [other for other in self.tasks if other.setting.task == plan.setting.task]
        return plan.setting.task if len(same) == 1 else plan.setting.name

    def at_fidelity(self, share: float) -> MadSettings:
        """The same with that share of each task's steps, and a schedule of that length."""
        plans = (dataclasses.replace(plan, steps=max(1, round(share * plan.steps))) for plan in self.tasks)
        train = dataclasses.replace(self.train, warmup_steps=round(share * self.train.warmup_steps))
        return dataclasses.replace(self, tasks=tuple(plans), train=train)

    def scaled(self, share: Fraction) -> MadSettings:
        """The same with every width of the candidates times `share`; see `scaled_widths`."""
        widths = scaled_widths(self.train.widths, share)
        return dataclasses.replace(self, train=dataclasses.replace(self.train, widths=widths))


def scaled_widths(widths: Widths, share: Fraction) -> Widths:
    """Widths times `share`: whole heads, at least one, of the same width each, and the MLP to the nearest number.

    Raises:
        UsageError: If `share` is not above 0.
    """
    if share <= 0:
        raise UsageError(f"share={share}; expected a share of the widths above 0")
    heads = max(1, round(share * widths.num_heads))
    return Widths(
        hidden_size=heads * (widths.hidden_size // widths.num_heads),
        num_heads=heads,
        ffn_hidden_size=max(1, round(share * widths.ffn_hidden_size)),
    )
