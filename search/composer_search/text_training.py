"""Training on text: rows of a population for all their steps, judged by the loss they end with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from composer_search.candidate import Candidate
from composer_search.population.feed import Row
from composer_search.population.operations import fits_kernels
from composer_search.population.plan import chunks, rows_at_once
from composer_search.population.population import Population
from composer_search.population.replay import cuda_graph
from composer_search.trainer import Split, TrainSettings, build, choose_device, computing, evaluate, matmul_precision

_LOGITS = 1 << 24
"""Logits that are computed at once when a model is judged: 64 MiB of them in float32."""


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


def train_for_loss(rows: Sequence[Row], settings: TrainSettings) -> list[LossResult]:
    """Train rows on the same data, as many at once as are worth it and fit; a result for each, in their order.

    Unlike an accuracy that may be solved or stuck, a loss is compared at equal budgets: every row trains for all steps
    and is judged by its last weights, at the end of its schedule. On a CPU the results repeat bit for bit.

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
        results |= zip(places, _train([rows[place] for place in places], settings, device), strict=True)
    return [results[place] for place in range(len(rows))]


def _train(rows: Sequence[Row], settings: TrainSettings, device: torch.device) -> list[LossResult]:
    capture = cuda_graph if device.type == "cuda" else None
    with matmul_precision(settings.precision):
        population = Population(rows, settings, device, capture, fits_kernels(device, settings))
        models = [build(row.sequence, row.data, settings, row.seed).to(device) for row in rows]
        curves: list[list[tuple[int, float]]] = [[] for _ in rows]
        while population.step < settings.steps:
            population.advance(min(settings.steps, population.step + settings.evaluate_every))
            for place, (model, row) in enumerate(zip(models, rows, strict=True)):
                model.load_state_dict(population.state(place))
                curves[place].append((population.step, _loss(model, row.data.validation, settings, device)))
        tests = [_loss(model, row.data.test, settings, device) for model, row in zip(models, rows, strict=True)]
    return [
        LossResult(curve[-1][1], test, row.learning_rate, tuple(curve))
        for row, curve, test in zip(rows, curves, tests, strict=True)
    ]


def _loss(model: Candidate, split: Split, settings: TrainSettings, device: torch.device) -> float:
    inputs, targets = (torch.from_numpy(part).to(device) for part in split)
    logits = inputs.shape[1] * model.unembedding.out_features
    with computing(settings.precision, device):
        _, nats = evaluate(model, (inputs, targets), chunk=max(1, _LOGITS // logits))
    return nats if math.isfinite(nats) else math.inf
