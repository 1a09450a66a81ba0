"""The trainer: a candidate on one task, at each learning rate of a small grid, until it is solved or the budget spent.

Simple and correct rather than fast: one candidate, one task, one seed at a time, on one CPU thread or a GPU. It is the
reference for `composer_search.population`, which trains many at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

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

Precision = Literal["float32", "tf32", "bfloat16", "float64"]
Ending = Literal["solved", "stuck", "diverged", "budget", "dropped"]
"""Why a training ended: solved; no progress (`patience`); a loss that is no number; all steps done; by the caller."""


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
        precision: What matrices are multiplied in: ``float32``; ``tf32``, which on a GPU rounds them to 10 bits of
            mantissa; ``bfloat16``, MAD's own, with weights, residual stream and loss in float32; or all in ``float64``,
            for checks.
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
    precision: Precision = "float32"
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
        if self.precision not in get_args(Precision):
            raise UsageError(f"precision={self.precision!r}; expected {', '.join(get_args(Precision))}")
        if self.weight_decay < 0 or self.min_learning_rate < 0:
            problem = f"weight_decay={self.weight_decay}, min_learning_rate={self.min_learning_rate}"
            raise UsageError(f"{problem}; expected neither below 0")

    def describe(self, *without: str) -> dict[str, Any]:
        """All fields as JSON values, but for those named; the widths' are among them."""
        values = dataclasses.asdict(self)
        values |= values.pop("widths") | {"learning_rates": list(self.learning_rates)}
        return {name: value for name, value in values.items() if name not in without}

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type of weights, gradients and optimizer state."""
        return torch.float64 if self.precision == "float64" else torch.float32

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
        ended: Why training at that rate ended.
        weight_decay: What it was trained with.
    """

    validation: float
    test: float
    learning_rate: float
    steps: int
    by_rate: tuple[tuple[float, float], ...]
    curve: tuple[tuple[int, float], ...]
    ended: Ending = "budget"
    weight_decay: float = 0.0


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
    require_data(data)
    runs: list[TrainResult] = []
    for rate in settings.learning_rates:
        runs.append(_train_at(rate, sequence, data, settings, seed))
        if runs[-1].validation >= settings.solved:
            break
    return best_rate(runs, settings.solved)


def best_rate(runs: Sequence[TrainResult], solved: float) -> TrainResult:
    """The result of a grid from one result for each rate, in the grid's order; of rates as good, the first.

    Rates after the first one that solves the task do not count, as `train` would not have tried them: so a grid trained
    all at once gives what a grid trained in turn gives.
    """
    first = next((index for index, run in enumerate(runs) if run.validation >= solved), len(runs) - 1)
    tried = runs[: first + 1]
    best = max(tried, key=lambda run: run.validation)
    return dataclasses.replace(best, by_rate=tuple((run.learning_rate, run.validation) for run in tried))


def require_data(data: TaskData) -> None:
    """Raise a `UsageError` if a split is empty."""
    if min(len(split[0]) for split in (data.train, data.validation, data.test)) == 0:
        raise UsageError("a split of the task's data is empty; ask for more training or test sequences")


def _train_at(
    rate: float, sequence: CompositeSequence, data: TaskData, settings: TrainSettings, seed: int
) -> TrainResult:
    device = choose_device(settings.device)
    model = build(sequence, data, settings, seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=settings.weight_decay, fused=True)
    inputs, targets = _on(data.train, device)
    validation, course = _on(data.validation, device), Course(settings)
    best_weights: dict[str, Tensor] = {}
    with computing(settings.precision, device):
        for step, rows in enumerate(batches(len(inputs), settings.batch_size, settings.steps, seed)):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate(rate, step)
            chosen = torch.from_numpy(rows).to(device)
            logits = model(inputs[chosen])
            loss = F.cross_entropy(logits.flatten(0, 1), targets[chosen].flatten(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if due(step + 1, settings):
                if course.look(step + 1, *evaluate(model, validation)):
                    best_weights = {name: value.clone() for name, value in model.state_dict().items()}
                if course.ended:
                    break
        model.load_state_dict(best_weights)
        test, _ = evaluate(model, _on(data.test, device))
    return course.result(test, rate, settings.weight_decay)


def due(step: int, settings: TrainSettings) -> bool:
    """Whether the validation data are looked at after `step` steps."""
    return step % settings.evaluate_every == 0 or step == settings.steps


class Course:
    """How one training goes: its evaluations so far, the best of them, and whether it is over."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.curve: list[tuple[int, float]] = []
        self.best, self.least_loss, self.idle = -1.0, math.inf, 0
        self.ended: Ending | None = None

    def look(self, step: int, counts: Counts, loss: float) -> bool:
        """Take note of an evaluation after `step` steps; whether it is the best one yet."""
        accuracy: float = getattr(counts, self.settings.metric)
        self.curve.append((step, accuracy))
        self.idle += 1
        if loss < self.least_loss:
            self.least_loss, self.idle = loss, 0
        better = accuracy > self.best
        if better:
            self.best, self.idle = accuracy, 0
        self.ended = self._ending(step, accuracy, loss)
        return better

    def _ending(self, step: int, accuracy: float, loss: float) -> Ending | None:
        if accuracy >= self.settings.solved:
            return "solved"
        if not math.isfinite(loss):
            return "diverged"
        if step == self.settings.steps:
            return "budget"
        return "stuck" if 0 < self.settings.patience <= self.idle else None

    def result(self, test: Counts, rate: float, weight_decay: float) -> TrainResult:
        """The result, given how the best weights did on the test data."""
        return TrainResult(
            validation=self.best,
            test=getattr(test, self.settings.metric),
            learning_rate=rate,
            steps=self.curve[-1][0],
            by_rate=((rate, self.best),),
            curve=tuple(self.curve),
            ended=self.ended or "dropped",
            weight_decay=weight_decay,
        )


def build(sequence: CompositeSequence, data: TaskData, settings: TrainSettings, seed: int) -> Candidate:
    """The untrained candidate; its weights come from `seed` alone, and the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        candidate = Candidate(sequence, data.vocab_size, settings.widths, autoencoder=data.autoencoder)
    return candidate.to(settings.weight_dtype)


@contextlib.contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Multiply matrices in that precision; outside of the context all is as before."""
    # the cache of rounded weights would outlive the optimizer's steps
    rounded = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
    with matmul_precision(precision), rounded:
        yield


@contextlib.contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Allow TF32 if that is the precision, else forbid it, whatever the process does otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
