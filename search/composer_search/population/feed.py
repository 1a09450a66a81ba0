"""What a population is trained and judged on: the rows, and their data on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import require_blocks
from composer_search.mad import IGNORE
from composer_search.trainer import Split, TaskData, TrainSettings, batches, require_data

GROUPED = "AM"
"""The primitives whose blocks a population groups; `composer_search.trainer` trains the others one at a time."""


@dataclass(frozen=True, eq=False)
class Row:
    """One training: what `composer_search.trainer.train` does at one learning rate.

    Attributes:
        sequence: The candidate.
        data: The task's splits. Rows that train on the same data should hold the same object, which is then on the
            device once; with the same seed besides, they share the batches.
        learning_rate: The peak of the schedule.
        weight_decay: AdamW's, on every parameter.
        seed: Of the initial weights and the order of the batches.
    """

    sequence: CompositeSequence
    data: TaskData
    learning_rate: float
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the value."""
        require_blocks(self.sequence)
        if foreign := sorted(set(self.sequence) - set(GROUPED)):
            problem = f"{self.sequence}: a population trains {' and '.join(GROUPED)} together, and has no {foreign[0]}"
            raise UsageError(
                f"{problem}; composer_search.trainer trains such a sequence alone, as the MAD evaluator does"
            )
        require_data(self.data)
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"{self.sequence}: learning_rate={self.learning_rate}; expected a positive number")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"{self.sequence}: weight_decay={self.weight_decay}; expected 0 or more")
        if self.seed < 0:
            raise UsageError(f"{self.sequence}: seed={self.seed}; expected 0 or more")

    def kind(self, settings: TrainSettings) -> tuple[object, ...]:
        """What rows must have in common to be trained together: every shape of their tensors but the sequence's."""
        data = self.data
        shapes = tuple(split[0].shape for split in (data.validation, data.test))
        batch = min(settings.batch_size, len(data.train[0])), data.train[0].shape[1]
        return data.vocab_size, data.autoencoder, batch, shapes


def scored_positions(rows: Sequence[Row]) -> int | None:
    """So many last positions of the sequences hold all that these rows are asked for; None if they are not few.

    An auto-encoder is asked for one, whose stream it decodes. Few are a quarter: rows that wait for others to reach
    their last attention cost something, too.
    """
    data = list({id(row.data): row.data for row in rows}.values())
    length = data[0].train[0].shape[1]
    if data[0].autoencoder:
        most = 1
    else:
        targets = [split[1] for each in data for split in (each.train, each.validation, each.test)]
        most = max(each.shape[1] - int((each != IGNORE).any(0).argmax()) for each in targets)
    return most if 4 * most <= length else None


class Feed:
    """The training batches of a population: all data on the device, and for a span of steps the places of its batches.

    Args:
        rows: The population.
        settings: Batch size and steps.
        device: Where the data lie.
        span: How many steps are prepared at once.
    """

    def __init__(self, rows: Sequence[Row], settings: TrainSettings, device: torch.device, span: int) -> None:
        self._settings = settings
        data = list({id(row.data): row.data for row in rows}.values())
        first = np.cumsum([0, *(len(each.train[0]) for each in data)])
        self._first = {id(each): int(start) for each, start in zip(data, first, strict=False)}
        self._inputs, self._targets = (
            torch.from_numpy(np.concatenate([each.train[part] for each in data])).to(device) for part in range(2)
        )
        self._streams: dict[tuple[int, int], Iterator[NDArray[np.int64]]] = {}
        for row in rows:
            stream = batches(len(row.data.train[0]), settings.batch_size, settings.steps, row.seed)
            self._streams.setdefault((id(row.data), row.seed), stream)
        self._span, self._device = span, device
        self.keep(rows)

    def keep(self, rows: Sequence[Row]) -> None:
        """Go on with these rows alone."""
        wanted = dict.fromkeys((id(row.data), row.seed) for row in rows)
        self._streams = {key: self._streams[key] for key in wanted}
        order = {key: place for place, key in enumerate(self._streams)}
        streams = [order[id(row.data), row.seed] for row in rows]
        self._stream_of_row = torch.tensor(streams, device=self._device)
        size = min(self._settings.batch_size, len(rows[0].data.train[0]))
        self._places = torch.zeros(self._span, len(order), size, dtype=torch.int64, device=self._device)

    def prepare(self, steps: int) -> None:
        """Draw the batches of the next `steps` steps and write them over those before, in the same memory."""
        drawn = [
            np.stack([next(stream) for _ in range(steps)]) + self._first[data]
            for (data, _), stream in self._streams.items()
        ]
        self._places[:steps].copy_(torch.from_numpy(np.stack(drawn, axis=1)))

    def batch(self, cursor: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets [rows, sequences, length] of the prepared step number `cursor` [1]."""
        places = self._places.index_select(0, cursor)[0]
        inputs, targets = self._inputs[places], self._targets[places]
        if len(places) == 1:
            rows = len(self._stream_of_row)
            return inputs.expand(rows, -1, -1), targets.expand(rows, -1, -1)
        return inputs.index_select(0, self._stream_of_row), targets.index_select(0, self._stream_of_row)


class Questions:
    """One split of the rows' data, on the device.

    Args:
        splits: The split of each row; rows may share one.
        device: Where it lies.
    """

    def __init__(self, splits: Sequence[Split], device: torch.device) -> None:
        keys = [(id(inputs), id(targets)) for inputs, targets in splits]
        unique = dict(zip(keys, splits, strict=True))
        order = {key: place for place, key in enumerate(unique)}
        self._inputs, self._targets = (
            torch.from_numpy(np.stack([split[part] for split in unique.values()])).to(device) for part in range(2)
        )
        self._of_row = torch.tensor([order[key] for key in keys], device=device)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets [rows, at most size sequences, length]."""
        for inputs, targets in zip(self._inputs.split(size, dim=1), self._targets.split(size, dim=1), strict=True):
            yield inputs.index_select(0, self._of_row), targets.index_select(0, self._of_row)
