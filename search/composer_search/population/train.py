"""Many trainings at once: the way in."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from composer_megatron.errors import ComposerError
from composer_search.population.feed import Row
from composer_search.population.memory import row_bytes
from composer_search.population.operations import fits_kernels
from composer_search.population.plan import chunks, free_bytes, rows_at_once
from composer_search.population.population import Population
from composer_search.population.replay import Capture, cuda_graph
from composer_search.trainer import TrainResult, TrainSettings, choose_device, matmul_precision

log = logging.getLogger(__name__)

Prune = Callable[[int, Mapping[int, float]], Collection[int]]
"""Given the steps done and the latest validation accuracy of each row still in training, by its place in `rows`: which
to drop."""

Finished = Callable[[Mapping[int, TrainResult]], None]
"""Given the results of a chunk, by their rows' places in `rows`, as soon as it is over."""

REGROUP_SHARE = 1 / 8
"""Where steps are recorded, the part of the rows that has to be over before the others are recorded anew without."""


def train_population(
    rows: Sequence[Row],
    settings: TrainSettings,
    *,
    prune: Prune | None = None,
    fuse: bool | None = None,
    at_most: int | None = None,
    finished: Finished | None = None,
) -> list[TrainResult]:
    """Train all rows, as many at once as are of one kind and fit in memory.

    Each row's result is that of `composer_search.trainer.train` with its learning rate, weight decay and seed, up to
    rounding, whichever rows it is trained with. A row leaves when its task is solved, when it makes no progress, when
    its loss is no longer a number, or when `prune` says so. On a CPU the same arguments give the same results bit for
    bit, with the same number of threads.

    Args:
        rows: Sequences, tasks, rates and seeds, in any order and of any lengths and tasks.
        settings: What they share. Its `learning_rates` and `weight_decay` do not matter, since each row has its own.
        prune: Asked after each evaluation which rows to drop, for example the worst half. Rows of one kind
            (`Row.kind`) are asked about together, be they trained together or not; and from the start again if the
            memory has not sufficed.
        fuse: Run what lies between the matrix products in kernels of our own; without it they run on a GPU, unless the
            precision is float64.
        at_most: Rows of a chunk, which are trained together; None for as many as are worth it and fit.
        finished: Called after each chunk, to keep what would be lost with the others in an interruption.

    Returns:
        A result for each row, in their order. `by_rate` holds the row's own rate; `composer_search.trainer.best_rate`
        makes the result of a grid of rates.

    Raises:
        UsageError: If there is no such device.
        ComposerError: If the device has no memory for a single row.
    """
    device = choose_device(settings.device)
    if fuse is None:
        fuse = fits_kernels(device, settings)
    results: dict[int, TrainResult] = {}
    with matmul_precision(settings.precision):
        for places in by_kind(rows, settings):
            fitting = rows_at_once([rows[i] for i in places], settings, device, fuse)
            trainer = _Trainer(settings, device, prune, fuse, min(fitting, at_most or fitting), finished)
            results |= trainer.train(rows, places)
    return [results[place] for place in range(len(rows))]


def recorder(device: torch.device) -> Capture | None:
    """What records training steps on that device; None where calling them is as quick."""
    return cuda_graph if device.type == "cuda" else None


def _out_of_memory(error: BaseException | None) -> str:
    """The first line of what says that memory has run out, be it the error or one that it hides; empty if none does."""
    while error is not None:
        text = str(error)
        # cuBLAS and the CPU's allocator have no class of their own for it; a failed capture hides the first error
        words = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
        if isinstance(error, torch.OutOfMemoryError) or any(word in text for word in words):
            return text.splitlines()[0]
        error = error.__context__
    return ""


def by_kind(rows: Sequence[Row], settings: TrainSettings) -> list[list[int]]:
    """The places of the rows that can be trained together, ordered by sequence: neighbours then share many groups."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: rows[place].sequence.letters):
        kinds.setdefault(rows[place].kind(settings), []).append(place)
    return list(kinds.values())


@dataclasses.dataclass
class _Trainer:
    """Trains rows of one kind; `at_once` of them, or fewer after the memory has not sufficed."""

    settings: TrainSettings
    device: torch.device
    prune: Prune | None
    fuse: bool
    at_once: int
    finished: Finished | None = None

    def train(self, rows: Sequence[Row], places: Sequence[int]) -> dict[int, TrainResult]:
        """The results of the rows at these places.

        Without `prune`, one chunk is finished before the next begins. With it all chunks are kept, and each is trained
        to the next evaluation in turn, since the rows have to be compared.
        """
        results: dict[int, TrainResult] = {}
        while left := [place for place in places if place not in results]:
            together = len(left) if self.prune else self.at_once
            now = [left[i] for i in chunks(len(left), together)[0]]
            problem = ""
            try:
                over = self._together(rows, now)
            except RuntimeError as error:
                problem = _out_of_memory(error)
                if not problem:
                    raise
            if problem:  # out of the handler, which keeps the failed step's tensors
                self._retreat(rows[now[0]], problem)
                continue
            results |= over
            if self.finished:
                self.finished(over)
        return results

    def _together(self, rows: Sequence[Row], places: Sequence[int]) -> dict[int, TrainResult]:
        spans = [[places[i] for i in span] for span in chunks(len(places), self.at_once)]
        options = self.settings, self.device, recorder(self.device), self.fuse
        populations = [Population([rows[i] for i in span], *options) for span in spans]
        step = 0
        while any(population.living for population in populations):
            step = self._next_look(step)
            accuracies: dict[int, float] = {}
            for span, population in zip(spans, populations, strict=True):
                accuracies |= self._advance(span, population, step, alone=len(populations) == 1)
            dropped = set(self.prune(step, accuracies)) if self.prune and accuracies else set()
            for span, population in zip(spans, populations, strict=True):
                population.finish([row for row in population.living if span[row] in dropped])
        return {
            span[row]: result
            for span, population in zip(spans, populations, strict=True)
            for row, result in population.results.items()
        }

    def _next_look(self, step: int) -> int:
        return min(self.settings.steps, step + self.settings.evaluate_every)

    def _advance(self, span: Sequence[int], population: Population, step: int, *, alone: bool) -> dict[int, float]:
        """Train a chunk up to `step` and judge it; the accuracies of its living rows, by place."""
        if not population.living:
            return {}
        waits_for = REGROUP_SHARE if recorder(self.device) else 0
        if population.riding >= waits_for * (population.riding + len(population.living)):
            population.regroup()
        population.advance(step)
        judged = population.look()
        if not alone:
            population.release()
        return {span[row]: accuracy for row, accuracy in judged.items() if row in population.living}

    def _retreat(self, row: Row, problem: str) -> None:
        """Halve how many rows are trained at once, or give up."""
        gc.collect()
        torch.cuda.empty_cache()
        if self.at_once == 1:
            needed = row_bytes(row, self.settings, fused=self.fuse)
            needs, free = (size / 2**30 for size in (needed, free_bytes(self.device)))
            raise ComposerError(
                f"{self.device} has no memory for a single row of {row.sequence}: about {needs:.1f} GiB are needed and "
                f"{free:.1f} GiB are free; lower batch_size={self.settings.batch_size} or the widths ({problem})"
            ) from None
        self.at_once //= 2
        log.warning("out of memory on %s; going on with %d rows at once (%s)", self.device, self.at_once, problem)
