"""What a MAD evaluation consists of: tasks with their budgets, the grid, the seeds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
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
        weights: Train every sequence at widths that give its blocks so many weights (`matched_widths`); 0 for as many
            as `equal_weights`, None for the same widths throughout.
    """

    tasks: tuple[TaskPlan, ...]
    train: TrainSettings = field(default_factory=TrainSettings)
    weight_decays: tuple[float, ...] = ()
    seeds: int = 1
    seed: int = 0
    weights: int | None = None

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

    def for_task(self, plan: TaskPlan, sequence: CompositeSequence | None = None) -> TrainSettings:
        """The trainer's settings for one task and, where its widths depend on it, one sequence."""
        own: dict[str, Any] = {name: getattr(plan, name) for name in ("steps", "batch_size", "evaluate_every")}
        if sequence is not None:
            own["widths"] = self.widths(sequence)
        return dataclasses.replace(self.train, **own)

    def widths(self, sequence: CompositeSequence) -> Widths:
        """The widths that a sequence is trained at."""
        return fitting_widths(sequence, self.train.widths, self.weights)

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


def block_weights(sequence: CompositeSequence, widths: Widths) -> int:
    """Elements of the weight matrices of a candidate's blocks, without biases, norms and embeddings."""
    hidden = widths.hidden_size
    return sequence.count("A") * 4 * hidden**2 + sequence.count("M") * 3 * hidden * widths.ffn_hidden_size


def equal_weights(length: int, widths: Widths) -> int:
    """The weights of a sequence of `length` blocks, half of them attention and half MLPs."""
    return length * (4 * widths.hidden_size**2 + 3 * widths.hidden_size * widths.ffn_hidden_size) // 2


def fitting_widths(sequence: CompositeSequence, widths: Widths, weights: int | None) -> Widths:
    """The widths that `MadSettings.weights` means for a sequence."""
    if weights is None:
        return widths
    return matched_widths(sequence, widths, weights or equal_weights(len(sequence), widths))


def matched_widths(sequence: CompositeSequence, widths: Widths, weights: int) -> Widths:
    """Widths at which the blocks of a sequence hold `weights` weights, as near as whole numbers allow.

    An MLP has about twice the weights of an attention block, so that at equal widths a sequence with more of them is
    the bigger model. All widths are multiplied by the same number, heads keep their width and are a whole number, and
    the MLP makes up for what that leaves: to within half a unit of its width. Without an MLP the nearest whole number
    of heads decides.

    Raises:
        UsageError: If the weights are too few for one head, or the sequence holds another primitive.
    """
    if foreign := set(sequence) - set("AM"):
        raise UsageError(f"{sequence}: equal weights are known for attention and MLPs alone, not for {min(foreign)}")
    attention, mlp = sequence.count("A"), sequence.count("M")
    head, ratio = widths.hidden_size // widths.num_heads, widths.ffn_hidden_size / widths.hidden_size
    ideal = math.sqrt(weights / (4 * attention + 3 * ratio * mlp)) / head if weights > 0 else 0.0

    def at(heads: int) -> Widths:
        hidden = heads * head
        inner = (weights - 4 * attention * hidden**2) / (3 * mlp * hidden) if mlp else ratio * hidden
        return Widths(hidden_size=hidden, num_heads=heads, ffn_hidden_size=max(1, round(inner)))

    def miss(found: Widths) -> tuple[float, float]:
        off = abs(block_weights(sequence, found) - weights) / weights
        return (off if off > 0.02 or not mlp else 0.0), abs(found.ffn_hidden_size / found.hidden_size - ratio)

    choices = [at(heads) for heads in (math.floor(ideal), math.ceil(ideal)) if heads > 0]
    best = min(choices, key=miss, default=None)
    if best is None or abs(block_weights(sequence, best) - weights) > weights / 2:
        least = block_weights(sequence, at(1)) if weights > 0 else 0
        raise UsageError(
            f"weights={weights}: too few for {sequence} with heads of {head} channels (at least {least:,})"
        )
    return best


def width_details(sequence: CompositeSequence, widths: Widths, weights: int | None) -> dict[str, Any]:
    """For the log, the widths of a candidate that has its own, and the weights of its blocks."""
    if weights is None:
        return {}
    own = fitting_widths(sequence, widths, weights)
    return {"widths": dataclasses.asdict(own), "weights": block_weights(sequence, own)}
