"""Training on text: rows of a population for all their steps, judged by the loss they end with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from composer_search.population.feed import Row
from composer_search.population.memory import judged_at_once
from composer_search.population.operations import fits_kernels
from composer_search.population.plan import chunks, rows_at_once
from composer_search.population.population import Population
from composer_search.population.train import recorder
from composer_search.trainer import TrainSettings, choose_device, matmul_precision

_LOGITS = 1 << 24
"""Logits of a row that are computed at once when it is judged: 64 MiB of them in float32."""

Looked = Callable[[int, Mapping[int, float]], None]
"""Given the steps done and the validation loss of each row of a chunk, by its place in `rows`, at each evaluation."""


@dataclass(frozen=True)
class LossResult:
    """What became of one row.

    Attributes:
        validation: Cross-entropy on the validation data after the last step, in nats; infinite where it is no number.
        test: The same on the test data.
        learning_rate: The row's.
        curve: (step, validation loss) of every evaluation.
    """

    validation: float
    test: float
    learning_rate: float
    curve: tuple[tuple[int, float], ...]


def train_for_loss(rows: Sequence[Row], settings: TrainSettings, *, looked: Looked | None = None) -> list[LossResult]:
    """Train rows on the same data, as many at once as are worth it and fit; a result for each, in their order.

    Unlike an accuracy that may be solved or stuck, a loss is compared at equal budgets: every row trains for all steps
    and is judged by its last weights, at the end of its schedule. On a CPU the results repeat bit for bit.

    Args:
        rows: Sequences, rates and seeds.
        settings: What they share.
        looked: Called after each evaluation, to keep what an interruption would lose.

    Raises:
        UsageError: If there is no such device.
    """
    if not rows:
        return []
    device = choose_device(settings.device)
    order = sorted(range(len(rows)), key=lambda place: rows[place].sequence.letters)  # neighbours share groups
    results: dict[int, LossResult] = {}
    for span in chunks(len(rows), rows_at_once(rows, settings, device)):
        places = [order[place] for place in span]
        results |= _train(rows, places, settings, device, looked)
    return [results[place] for place in range(len(rows))]


def _train(
    rows: Sequence[Row], places: Sequence[int], settings: TrainSettings, device: torch.device, looked: Looked | None
) -> dict[int, LossResult]:
    """The results of the rows at these places, trained together."""
    here = [rows[place] for place in places]
    curves: dict[int, list[tuple[int, float]]] = {place: [] for place in places}
    with matmul_precision(settings.precision):
        population = Population(here, settings, device, recorder(device), fits_kernels(device, settings))
        while population.step < settings.steps:
            population.advance(min(settings.steps, population.step + settings.evaluate_every))
            judged = _judge(population, "validation", places)
            for place, nats in judged.items():
                curves[place].append((population.step, nats))
            if looked:
                looked(population.step, judged)
        tests = _judge(population, "test", places)
    return {
        place: LossResult(curve[-1][1], tests[place], rows[place].learning_rate, tuple(curve))
        for place, curve in curves.items()
    }


def _judge(population: Population, part: Literal["validation", "test"], places: Sequence[int]) -> dict[int, float]:
    """The loss of each row by its place; infinite where it is no number."""
    data = population.rows[0].data
    logits = getattr(data, part)[0].shape[1] * data.vocab_size
    at_once = max(1, min(judged_at_once(population.settings), _LOGITS // logits))
    losses = population.losses(part, at_once)
    return {places[row]: nats if math.isfinite(nats) else math.inf for row, nats in losses.items()}
