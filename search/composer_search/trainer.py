"""The trainer: a candidate on one task, at each learning rate of a small grid, until it is solved or the budget spent.

Simple and correct rather than fast: one candidate, one task, one seed at a time, on one CPU thread or a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import Candidate, Widths
from composer_search.mad import IGNORE, Counts

Split = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Inputs and targets, both int64 [sequences, length]; targets of `IGNORE` do not count."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a candidate is trained; the defaults are MAD's, with its schedule really applied.

    Attributes:
        widths: The model's widths.
        steps: Optimizer steps at most.
        batch_size: Sequences a step; less where the training data are fewer.
        learning_rates: The grid; the rate with the best validation accuracy is kept, and none is tried after one that
            solves the task.
        min_learning_rate: Where the cosine ends.
        cosine: Whether the rate falls along half a cosine over `steps`; otherwise it stays.
        warmup_steps: Steps over which the rate first rises linearly.
        weight_decay: AdamW's, on every parameter.
        evaluate_every: Steps between evaluations on the validation data.
        patience: Evaluations without progress after which training stops; 0 for never.
        solved: Validation accuracy at which training stops.
        metric: What accuracy means: over positions, or MAD's mean over classes (`composer_search.mad.Counts`).
        device: ``cpu``, ``cuda``, …, or ``auto`` for a GPU where there is one.
    """

    widths: Widths = field(default_factory=Widths)
    steps: int = 20_000
    batch_size: int = 128
    learning_rates: tuple[float, ...] = (1e-4, 5e-4, 1e-3)
    min_learning_rate: float = 1e-6
    cosine: bool = True
    warmup_steps: int = 0
    weight_decay: float = 0.0
    evaluate_every: int = 500
    patience: int = 10
    solved: float = 0.999
    metric: Literal["accuracy", "macro_accuracy"] = "accuracy"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the setting, its value and what would do."""
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("evaluate_every", 1),
            ("warmup_steps", 0),
            ("patience", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)}; expected at least {least}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UsageError(f"learning_rates={self.learning_rates}; expected one or more positive rates")
        if self.metric not in ("accuracy", "macro_accuracy"):
            raise UsageError(f"metric={self.metric!r}; expected accuracy or macro_accuracy")
        if self.weight_decay < 0 or self.min_learning_rate < 0:
            problem = f"weight_decay={self.weight_decay}, min_learning_rate={self.min_learning_rate}"
            raise UsageError(f"{problem}; expected neither below 0")

    def learning_rate(self, peak: float, step: int) -> float:
        """The rate at `step`, counted from 0, when its peak is `peak`."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if not self.cosine:
            return peak
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        end = min(peak, self.min_learning_rate)
        return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, eq=False)
class TaskData:
    """The data of one task.

    Attributes:
        vocab_size: Token ids are below it.
        train: What the weights are fitted to.
        validation: What the learning rate, the weights kept and the search itself are chosen by.
        test: What nothing is chosen by.
        autoencoder: Whether the model has to rebuild its inputs from one vector ('compression').
    """

    vocab_size: int
    train: Split
    validation: Split
    test: Split
    autoencoder: bool = False


@dataclass(frozen=True)
class TrainResult:
    """What became of one candidate on one task from one seed.

    Attributes:
        validation: Accuracy on the validation data at the chosen rate, at the best evaluation.
        test: Accuracy on the test data of those same weights.
        learning_rate: The chosen rate.
        steps: Steps trained at that rate.
        by_rate: Validation accuracy of every rate tried, in the grid's order.
        curve: (step, validation accuracy) of every evaluation at that rate.
    """

    validation: float
    test: float
    learning_rate: float
    steps: int
    by_rate: tuple[tuple[float, float], ...]
    curve: tuple[tuple[int, float], ...]


def train(sequence: CompositeSequence, data: TaskData, settings: TrainSettings, seed: int) -> TrainResult:
    """Train a candidate at each learning rate of the grid and keep the best on the validation data.

    Every rate starts from the same weights, and all rates and sequences see the same batches, so that differences carry
    less noise. On a CPU the result is a function of the arguments and the
    number of threads, bit for bit.

    Args:
        sequence: The candidate.
        data: The task's three splits.
        settings: Widths, schedule and grid.
        seed: Of the initial weights and the order of the batches.

    Returns:
        The result at the chosen rate; of rates as good, the first in the grid.

    Raises:
        UsageError: If the sequence holds a primitive unknown to the proxy, or there are no training data.
    """
    if min(len(split[0]) for split in (data.train, data.validation, data.test)) == 0:
        raise UsageError("a split of the task's data is empty; ask for more training or test sequences")
    runs: list[TrainResult] = []
    for rate in settings.learning_rates:
        runs.append(_train_at(rate, sequence, data, settings, seed))
        if runs[-1].validation >= settings.solved:
            break
    best = max(runs, key=lambda run: run.validation)
    return dataclasses.replace(best, by_rate=tuple((run.learning_rate, run.validation) for run in runs))


def _train_at(
    rate: float, sequence: CompositeSequence, data: TaskData, settings: TrainSettings, seed: int
) -> TrainResult:
    device = choose_device(settings.device)
    model = build(sequence, data, settings, seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=settings.weight_decay, fused=True)
    inputs, targets = (torch.from_numpy(part).to(device) for part in data.train)
    watch = _Watch(model, _on(data.validation, device), settings)
    for step, rows in enumerate(batches(len(inputs), settings.batch_size, settings.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate(rate, step)
        chosen = torch.from_numpy(rows).to(device)
        logits = model(inputs[chosen])
        loss = F.cross_entropy(logits.flatten(0, 1), targets[chosen].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch.due(step + 1) and watch.look(step + 1):
            break
    model.load_state_dict(watch.best_weights)
    test, _ = evaluate(model, _on(data.test, device))
    return TrainResult(watch.best, getattr(test, settings.metric), rate, watch.curve[-1][0], (), tuple(watch.curve))


class _Watch:
    """Looks at the validation data now and then: keeps the best weights and says when to stop."""

    def __init__(self, model: Candidate, validation: tuple[Tensor, Tensor], settings: TrainSettings) -> None:
        self.model, self.validation, self.settings = model, validation, settings
        self.curve: list[tuple[int, float]] = []
        self.best, self.least_loss, self.idle = -1.0, math.inf, 0
        self.best_weights: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        return step % self.settings.evaluate_every == 0 or step == self.settings.steps

    def look(self, step: int) -> bool:
        """Evaluate after `step` steps; whether the task is solved, hopeless or diverged."""
        counts, loss = evaluate(self.model, self.validation)
        accuracy: float = getattr(counts, self.settings.metric)
        self.curve.append((step, accuracy))
        self.idle += 1
        if loss < self.least_loss:
            self.least_loss, self.idle = loss, 0
        if accuracy > self.best:
            self.best, self.idle = accuracy, 0
            self.best_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        stuck = 0 < self.settings.patience <= self.idle
        return accuracy >= self.settings.solved or stuck or not math.isfinite(loss)


def build(sequence: CompositeSequence, data: TaskData, settings: TrainSettings, seed: int) -> Candidate:
    """The untrained candidate; its weights come from `seed` alone, and the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Candidate(sequence, data.vocab_size, settings.widths, autoencoder=data.autoencoder)


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        UsageError: If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def batches(rows: int, size: int, steps: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Row indices of `steps` batches, shuffled anew each epoch; the last rows are left out where they fill no batch."""
    generator = np.random.default_rng(seed)
    size = min(size, rows)
    order, start = generator.permutation(rows), 0
    for _ in range(steps):
        if start + size > rows:
            order, start = generator.permutation(rows), 0
        yield order[start : start + size]
        start += size


@torch.no_grad()
def evaluate(model: Candidate, split: tuple[Tensor, Tensor], chunk: int = 256) -> tuple[Counts, float]:
    """The counts of right and wrong over the scored positions of inputs and targets [sequences, length], and the loss.

    The loss is the mean cross-entropy in nats.
    """
    batches = zip(split[0].split(chunk), split[1].split(chunk), strict=True)
    parts = [_evaluate_batch(model, inputs, targets) for inputs, targets in batches]
    counts = functools.reduce(operator.add, (counts for counts, _ in parts))
    return counts, sum(loss for _, loss in parts) / int(counts.target.sum())


def _evaluate_batch(model: Candidate, inputs: Tensor, targets: Tensor) -> tuple[Counts, float]:
    logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    predictions = logits.argmax(dim=-1).cpu().numpy()
    return Counts.of(predictions, targets.cpu().numpy(), num_classes=logits.shape[-1]), float(loss)


def _on(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(split[0]).to(device), torch.from_numpy(split[1]).to(device)
