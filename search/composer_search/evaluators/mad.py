"""The MAD evaluator: what a sequence is worth is what tiny models of it learn on synthetic tasks."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.evaluation import Evaluation, Evaluator
from composer_search.evaluators.ledger import Ledger, TrainingKey, settings_digest
from composer_search.evaluators.settings import MadSettings, TaskPlan, width_details
from composer_search.mad.tasks import find_task
from composer_search.population import Row, train_population
from composer_search.population.feed import GROUPED
from composer_search.trainer import TaskData, TrainResult, TrainSettings, best_rate, choose_device, train

Recipe = tuple[float, float]
"""Learning rate and weight decay."""

TOGETHER_ON_CPU = 256
"""Tokens a step up to which a CPU trains a population: at 384 and 512 tokens three sequences at once gained 7 %."""


class MadEvaluator(Evaluator):
    """Mean accuracy over MAD tasks of tiny models of the sequence (arXiv 2403.17844; as proxy: arXiv 2510.00379).

    Learning rate and weight decay are chosen for each task from the grid with the first seed, on validation data;
    further seeds are trained at the choice. Whatever has the same schedule trains together, all sequences, recipes and
    seeds in one population (`composer_search.population`); where a CPU gains nothing from that, it trains in turn. The
    scores are the same up to rounding, and on a CPU they repeat bit for bit.

    Args:
        settings: Tasks, widths, budget and seeds.
        cache_dir: Folder for generated data; None generates them anew in each process.
        ledger: Keeps each finished training, and gives those that it has; None repeats what an interruption lost.
        at_once: Trainings of a chunk, after which they go to the ledger; None for as many as fit.
    """

    def __init__(
        self,
        settings: MadSettings,
        cache_dir: Path | None = None,
        ledger: Ledger | None = None,
        at_once: int | None = None,
    ) -> None:
        if at_once is not None and at_once < 1:
            raise UsageError(f"at_once={at_once}; expected at least 1 training")
        self.settings, self.cache_dir, self.ledger, self.at_once = settings, cache_dir, ledger, at_once
        self._data: dict[TaskPlan, TaskData] = {}

    @property
    def device(self) -> str:
        """Where candidates are trained."""
        return self.settings.train.device

    def describe(self) -> dict[str, Any]:
        """All settings as JSON values. Where data are cached and trainings kept is not among them."""
        settings = self.settings
        trainer = settings.train.describe("steps", "batch_size", "evaluate_every", "device")
        if settings.weight_decays:
            trainer = {name: value for name, value in trainer.items() if name != "weight_decay"}
            trainer["weight_decays"] = list(settings.weight_decays)
        tasks = [plan.describe() for plan in settings.tasks]
        matched = {} if settings.weights is None else {"weights": settings.weights}
        return {"name": "mad", "tasks": tasks, **trainer, **matched, "seeds": settings.seeds, "seed": settings.seed}

    def evaluate(self, sequence: CompositeSequence) -> Evaluation:
        """Train the sequence's models and score them."""
        return self.evaluate_many([sequence])[0]

    def evaluate_many(self, sequences: Sequence[CompositeSequence]) -> list[Evaluation]:
        """Train the models of all sequences at once; an evaluation for each, in their order.

        Raises:
            UsageError: If a sequence holds a primitive unknown to the proxy.
        """
        first, *others = (training_seed(self.settings.seed, number) for number in range(self.settings.seeds))
        grid = [_Training(sequence, plan, first) for sequence in sequences for plan in self.settings.tasks]
        chosen = dict(zip(grid, self._train(grid, lambda _: self.settings.recipes), strict=True))
        again = [dataclasses.replace(training, seed=seed) for training in grid for seed in others]

        def choice(training: _Training) -> tuple[Recipe, ...]:
            result = chosen[dataclasses.replace(training, seed=first)]
            return ((result.learning_rate, result.weight_decay),)

        results = chosen | dict(zip(again, self._train(again, choice), strict=True))
        return [
            self._evaluation(
                sequence,
                {plan: [results[_Training(sequence, plan, seed)] for seed in (first, *others)] for plan in self._plans},
            )
            for sequence in sequences
        ]

    def at_fidelity(self, share: float) -> MadEvaluator:
        """The evaluator with that share of the steps."""
        return self._with(self.settings.at_fidelity(share))

    def scaled(self, share: Fraction) -> MadEvaluator:
        """The evaluator with every width of the candidates times `share`."""
        return self._with(self.settings.scaled(share))

    def with_weights(self, weights: int) -> MadEvaluator:
        """The evaluator with every candidate at widths that give its blocks so many weights; see `MadSettings`."""
        return self._with(dataclasses.replace(self.settings, weights=weights))

    def _with(self, settings: MadSettings) -> MadEvaluator:
        return MadEvaluator(settings, self.cache_dir, self.ledger, self.at_once)

    @property
    def _plans(self) -> tuple[TaskPlan, ...]:
        return self.settings.tasks

    def _train(
        self, trainings: Sequence[_Training], recipes: Callable[[_Training], Sequence[Recipe]]
    ) -> list[TrainResult]:
        """The best result of each training over its recipes."""
        known = self.ledger.read() if self.ledger else {}
        results: dict[_Training, TrainResult] = {}
        schedules: dict[TrainSettings, list[_Training]] = {}
        for training in dict.fromkeys(trainings):
            schedules.setdefault(self.settings.for_task(training.plan, training.sequence), []).append(training)
        for settings, group in schedules.items():
            runs = _Runs(settings, self.settings.seed, self.ledger, known)
            together = [each for each in group if set(each.sequence) <= set(GROUPED) and self._pays(each.plan)]
            self._together([(each, recipe) for each in together for recipe in recipes(each)], runs)
            for training in group:
                results[training] = self._in_turn(training, recipes(training), runs)
        return [results[training] for training in trainings]

    def _pays(self, plan: TaskPlan) -> bool:
        """Whether training several at once is any faster; decided by the task alone, so that scores repeat."""
        sampler = find_task(plan.setting.task).at(**plan.setting.settings)
        tokens = min(plan.batch_size, plan.setting.n_train) * sampler.length
        return tokens <= TOGETHER_ON_CPU or choose_device(self.settings.train.device).type != "cpu"

    def _together(self, wanted: Sequence[tuple[_Training, Recipe]], runs: _Runs) -> None:
        """Train what `runs` does not have yet as one population."""
        new = [each for each in wanted if runs.find(*each) is None]
        rows = [
            Row(training.sequence, self._task_data(training.plan), *recipe, training.seed) for training, recipe in new
        ]

        def keep(results: Mapping[int, TrainResult]) -> None:
            runs.keep({new[place]: result for place, result in results.items()})

        if rows:
            train_population(rows, runs.settings, at_most=self.at_once, finished=keep)

    def _in_turn(self, training: _Training, recipes: Sequence[Recipe], runs: _Runs) -> TrainResult:
        """The best recipe's result; what is not there is trained in turn, and nothing after what solves the task."""
        found: list[TrainResult] = []
        for recipe in recipes:
            result = runs.find(training, recipe)
            if result is None:
                rate, decay = recipe
                own = dataclasses.replace(runs.settings, learning_rates=(rate,), weight_decay=decay)
                result = train(training.sequence, self._task_data(training.plan), own, training.seed)
                runs.keep({(training, recipe): result})
            found.append(result)
            if result.validation >= runs.settings.solved:
                break
        return best_rate(found, runs.settings.solved)

    def _evaluation(self, sequence: CompositeSequence, results: Mapping[TaskPlan, Sequence[TrainResult]]) -> Evaluation:
        """What the results of each seed, by task, amount to."""
        scores, tests = self._scores(results, "validation"), self._scores(results, "test")
        by_task = self._by_task(
            {plan: statistics.fmean(result.validation for result in seeds) for plan, seeds in results.items()}
        )
        tasks = {"tasks": {self.settings.label(plan): _details(seeds) for plan, seeds in results.items()}}
        return Evaluation(
            score=statistics.fmean(scores),
            spread=statistics.stdev(scores) if len(scores) > 1 else 0.0,
            seed_scores=scores,
            tasks=by_task,
            test_score=statistics.fmean(tests),
            details=tasks | width_details(sequence, self.settings.train.widths, self.settings.weights),
        )

    def _scores(self, results: Mapping[TaskPlan, Sequence[TrainResult]], split: str) -> tuple[float, ...]:
        """The score of each seed on one split."""
        return tuple(
            statistics.fmean(
                self._by_task({plan: getattr(seeds[number], split) for plan, seeds in results.items()}).values()
            )
            for number in range(self.settings.seeds)
        )

    def _by_task(self, accuracies: Mapping[TaskPlan, float]) -> dict[str, float]:
        """Mean over each task's difficulties."""
        found: dict[str, list[float]] = {}
        for plan, accuracy in accuracies.items():
            found.setdefault(plan.setting.task, []).append(accuracy)
        return {task: statistics.fmean(values) for task, values in found.items()}

    def _task_data(self, plan: TaskPlan) -> TaskData:
        if plan not in self._data:
            setting = plan.setting
            parts = setting.dataset(self.settings.seed, n_valid=plan.n_valid, cache_dir=self.cache_dir)
            vocab_size = find_task(setting.task).at(**setting.settings).vocab_size
            autoencoder = setting.task == "compression"
            self._data[plan] = TaskData(vocab_size, parts["train"], parts["valid"], parts["test"], autoencoder)
        return self._data[plan]


@dataclass(frozen=True)
class _Training:
    """A sequence on a task from a seed, at whichever recipes."""

    sequence: CompositeSequence
    plan: TaskPlan
    seed: int


class _Runs:
    """The results of trainings at their recipes under one schedule: those of the ledger, and new ones, which go there.

    Args:
        settings: What they are trained with.
        data_seed: Of their data.
        ledger: Where new ones are kept.
        known: What the ledger held.
    """

    def __init__(
        self,
        settings: TrainSettings,
        data_seed: int,
        ledger: Ledger | None,
        known: Mapping[TrainingKey, TrainResult],
    ) -> None:
        self.settings = settings
        self._data_seed, self._ledger, self._known = data_seed, ledger, dict(known)
        self._digests: dict[TaskPlan, str] = {}

    def find(self, training: _Training, recipe: Recipe) -> TrainResult | None:
        """The result, if there is one."""
        return self._known.get(self._key(training, recipe))

    def keep(self, results: Mapping[tuple[_Training, Recipe], TrainResult]) -> None:
        """Take results; when this returns they are in the ledger."""
        by_task: dict[str, dict[TrainingKey, TrainResult]] = {}
        for (training, recipe), result in results.items():
            by_task.setdefault(training.plan.setting.name, {})[self._key(training, recipe)] = result
        for task, found in by_task.items():
            self._known |= found
            if self._ledger is not None:
                self._ledger.record(found, task, _device_name(self.settings.device))

    def _key(self, training: _Training, recipe: Recipe) -> TrainingKey:
        plan = training.plan
        if plan not in self._digests:
            self._digests[plan] = settings_digest(plan, self.settings, self._data_seed)
        return TrainingKey(self._digests[plan], training.sequence.letters, *recipe, training.seed)


def _device_name(device: str) -> str:
    """What the device is, for people."""
    chosen = choose_device(device)
    return torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU"


def training_seed(seed: int, number: int) -> int:
    """The seed of training `number` in an evaluation of that seed; no two evaluations share one."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _details(seeds: Sequence[TrainResult]) -> dict[str, Any]:
    """How one task went: of each seed its accuracies, and the first seed's choice of recipe and course."""
    first = seeds[0]
    return {
        "validation": [result.validation for result in seeds],
        "test": [result.test for result in seeds],
        "learning_rate": first.learning_rate,
        "weight_decay": first.weight_decay,
        "by_rate": [list(pair) for pair in first.by_rate],
        "steps": [result.steps for result in seeds],
        "ended": [result.ended for result in seeds],
        "curve": [list(point) for point in first.curve],
    }
