"""A population in training: rows that step together, are judged together and leave one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from composer_search.candidate import Candidate
from composer_search.mad import IGNORE, Counts
from composer_search.population.feed import Feed, Questions, Row, scored_positions
from composer_search.population.layout import Layout
from composer_search.population.memory import judged_at_once
from composer_search.population.model import GroupedModel, Shape, stack_weights, unstack_weights
from composer_search.population.operations import Fused, Operations, Plain
from composer_search.population.optimizer import AdamW, coefficients
from composer_search.population.replay import Capture, Replay
from composer_search.trainer import Course, Precision, TrainResult, TrainSettings, build

SPAN = 500
"""Steps whose batches and rates are put on the device at once."""


class Population:
    """Rows in training, all after the same number of steps.

    Rows that are over ride along until `regroup`: their results stand, their weights no longer matter.

    Args:
        rows: At least one, of one kind (`Row.kind`).
        settings: Widths, schedule and when to stop.
        device: Where all of it happens.
        capture: Records the training step; None calls it anew each time.
        fuse: Run what lies between the matrix products in kernels of our own, on a GPU and not in float64.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        settings: TrainSettings,
        device: torch.device,
        capture: Capture | None = None,
        fuse: bool = False,
    ) -> None:
        self.settings, self.device, self.step = settings, device, 0
        self.rows, self.courses = tuple(rows), [Course(settings) for _ in rows]
        self.results: dict[int, TrainResult] = {}
        self._places = list(range(len(rows)))
        self._capture = capture
        self._operations: Operations = Fused(_products_of_float32(settings.precision)) if fuse else Plain()
        data = rows[0].data
        dtype = torch.bfloat16 if settings.precision == "bfloat16" else settings.weight_dtype
        scored = scored_positions(rows)
        self._shape = Shape(data.vocab_size, settings.widths.num_heads, data.autoencoder, dtype, scored)
        self._layout = Layout.of([row.sequence for row in rows], aligned=scored is not None)
        stacked = stack_weights(self._layout, _candidates(rows, settings))
        self._weights = {name: weight.to(device) for name, weight in stacked.items()}
        self._best = {name: weight.clone() for name, weight in self._weights.items()}
        self._recipes = list(dict.fromkeys((row.learning_rate, row.weight_decay) for row in rows))
        span = min(SPAN, settings.steps)
        self._feed = Feed(rows, settings, device, span)
        self._table = torch.zeros(span, 3, len(self._recipes), dtype=settings.weight_dtype, device=device)
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self._assemble(None)

    @property
    def living(self) -> list[int]:
        """The rows that are not over, by their number in `rows`."""
        return [row for row in self._places if row not in self.results]

    @property
    def riding(self) -> int:
        """Rows that are over and still cost their share of each step."""
        return len(self._places) - len(self.living)

    def advance(self, step: int) -> None:
        """Train until `step` steps are done in all."""
        while self.step < step:
            steps = min(len(self._table), step - self.step)
            self._feed.prepare(steps)
            self._table[:steps].copy_(coefficients(self.settings, self._recipes, self.step, self.step + steps))
            self._cursor.zero_()
            self._replay(steps)
            self.step += steps

    def look(self) -> dict[int, float]:
        """Judge the living rows on their validation data, end those that are over; the accuracies by row."""
        judged = self._judge(self._model, self._validation)
        better, over = [], []
        for place, (row, (counts, loss)) in enumerate(zip(self._places, judged, strict=True)):
            if row in self.results:
                continue
            if self.courses[row].look(self.step, counts, loss):
                better.append(place)
            if self.courses[row].ended:
                over.append(row)
        self._remember(better)
        living = self.living
        self.finish(over)
        return {row: self.courses[row].curve[-1][1] for row in living}

    def finish(self, rows: Sequence[int]) -> None:
        """End these living rows: judge their best weights on their test data."""
        if not rows:
            return
        places = [self._places.index(row) for row in rows]
        layout, sources = self._layout.take(places)
        model = GroupedModel(layout, _take(self._best, sources), self._shape, self._operations)
        judged = self._judge(model, Questions([self.rows[row].data.test for row in rows], self.device))
        for row, (counts, _) in zip(rows, judged, strict=True):
            recipe = self.rows[row].learning_rate, self.rows[row].weight_decay
            self.results[row] = self.courses[row].result(counts, *recipe)

    def regroup(self) -> None:
        """Go on with the living rows alone."""
        kept = [place for place, row in enumerate(self._places) if row not in self.results]
        if not kept or len(kept) == len(self._places):
            return
        self._layout, sources = self._layout.take(kept)
        self._places = [self._places[place] for place in kept]
        self._weights, self._best = _take(self._weights, sources), _take(self._best, sources)
        moments = _take(self._optimizer.first, sources), _take(self._optimizer.second, sources)
        self._feed.keep(self._present())
        self._assemble(moments)

    def release(self) -> None:
        """Give back the memory of the recorded step, if there is one."""
        self._replay.release()

    @torch.no_grad()
    def losses(self, part: Literal["validation", "test"], at_once: int) -> dict[int, float]:
        """Mean cross-entropy, in nats, of the present weights on that split, by the rows' number in `rows`.

        Args:
            part: Of the rows' data.
            at_once: Sequences of a row in one pass.
        """
        sums = torch.zeros(2, len(self._places), dtype=torch.float64, device=self.device)
        questions = self._validation
        if part == "test":
            questions = Questions([row.data.test for row in self._present()], self.device)
        for inputs, targets in questions.batches(at_once):
            wanted = self._model.answers(targets)
            nats = self._operations.nats(self._model(inputs), wanted)
            sums += torch.stack([each.sum(1, dtype=torch.float64) for each in (nats, wanted != IGNORE)])
        means: list[float] = (sums[0] / sums[1]).tolist()
        return dict(zip(self._places, means, strict=True))

    def state(self, row: int) -> dict[str, Tensor]:
        """The present weights of a row that has not been grouped away, as its `Candidate` has them."""
        return unstack_weights(self._layout, self._weights, self._places.index(row))

    def _assemble(self, moments: tuple[dict[str, Tensor], dict[str, Tensor]] | None) -> None:
        """Build what depends on which rows there are."""
        recipes = [self._recipes.index((row.learning_rate, row.weight_decay)) for row in self._present()]
        self._optimizer = AdamW(self._layout, self._weights, recipes, moments, self._operations)
        self._model = GroupedModel(self._layout, self._weights, self._shape, self._operations)
        self._validation = Questions([row.data.validation for row in self._present()], self.device)
        self._replay = Replay(self._train_step, self._capture)

    def _present(self) -> list[Row]:
        return [self.rows[row] for row in self._places]

    def _train_step(self) -> None:
        """One step of all rows. What it reads and writes stays where it is, and nothing waits for the device."""
        inputs, targets = self._feed.batch(self._cursor)
        wanted = self._model.answers(targets)
        losses = self._operations.nats(self._model(inputs), wanted).sum(1) / (wanted != IGNORE).sum(1)
        of_leaves = torch.autograd.grad(losses.sum(), self._model.leaves())
        self._optimizer.step(self._model.gradients(of_leaves), self._table.index_select(0, self._cursor)[0])
        self._cursor += 1

    @torch.no_grad()
    def _judge(self, model: GroupedModel, questions: Questions) -> list[tuple[Counts, float]]:
        """Counts and mean loss of each row; read from the device once."""
        rows, classes = len(model.layout.sequences), self._shape.vocab_size
        counts = torch.zeros(3, rows, classes + 1, dtype=torch.int64, device=self.device)
        losses = torch.zeros(rows, dtype=torch.float64, device=self.device)
        for inputs, targets in questions.batches(judged_at_once(self.settings)):
            logits, wanted = model(inputs), model.answers(targets)
            _count(counts, logits.argmax(-1), wanted)
            losses += self._operations.nats(logits, wanted).sum(1)
        correct, target, predicted = counts[:, :, :classes].cpu().numpy()
        means = (losses.cpu() / counts[1, :, :classes].sum(1).cpu()).tolist()
        return [(Counts(*parts), mean) for *parts, mean in zip(correct, target, predicted, means, strict=True)]

    def _remember(self, places: Sequence[int]) -> None:
        """Keep the present weights of the rows at these places as their best."""
        if not places:
            return
        wanted = set(places)
        for name, weight in self._weights.items():
            owners = self._layout.owners(name.partition(".")[0])
            chosen = [place for place, owner in enumerate(owners) if owner in wanted]
            index = torch.tensor(chosen, dtype=torch.int64, device=self.device)
            self._best[name].index_copy_(0, index, weight.index_select(0, index))


def _candidates(rows: Sequence[Row], settings: TrainSettings) -> list[Candidate]:
    """The untrained candidates; rows of the same sequence and seed share one."""
    shared = {(row.sequence, row.seed): row for row in rows}
    built = {key: build(row.sequence, row.data, settings, row.seed) for key, row in shared.items()}
    return [built[row.sequence, row.seed] for row in rows]


def _products_of_float32(precision: Precision) -> str:
    """How Triton calls it."""
    return "tf32" if precision == "tf32" else "ieee"


def _count(counts: Tensor, predictions: Tensor, wanted: Tensor) -> None:
    """Add to counts [correct, target, predicted; rows; classes and one for what is not scored]."""
    nowhere = counts.shape[2] - 1
    scored = wanted != IGNORE
    target, predicted = (part.where(scored, nowhere) for part in (wanted, predictions))
    correct = target.where(predictions == wanted, nowhere)
    ones = torch.ones((), dtype=torch.int64, device=counts.device).expand_as(wanted)
    for count, classes in zip(counts, (correct, target, predicted), strict=True):
        count.scatter_add_(1, classes, ones)


def _take(weights: Mapping[str, Tensor], sources: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The weights at these places of each kind."""
    device = next(iter(weights.values())).device
    index = {kind: torch.tensor(places, dtype=torch.int64, device=device) for kind, places in sources.items()}
    kinds = {name: name.partition(".")[0] for name in weights}
    return {name: weights[name].index_select(0, index[kind]) for name, kind in kinds.items() if kind in index}
