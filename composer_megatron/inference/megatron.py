"""Decoding by Megatron-core's own forward pass, for models with blocks that `Decoder` does not compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from composer_megatron.inference.engine import Admission
from composer_megatron.inference.sampling import Settings, draw

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel


@dataclass
class _Row:
    """A request: Megatron's caches and states, the tokens to run next, and the numbers that decide its draws."""

    context: Any
    tokens: Tensor
    settings: Settings
    uniforms: Tensor
    new: list[int]


class MegatronLoop:
    """A `Loop` that runs the requests one after the other, each with Megatron's static inference context.

    Attributes:
        rows: As in `Loop`.
        capacity: As in `Loop`.
        span: As in `Loop`.
    """

    span = 1

    def __init__(self, model: HybridModel, rows: int, capacity: int, vocab_size: int | None) -> None:
        """Take a model.

        Args:
            model: In evaluation mode, in one process.
            rows: As the attribute.
            capacity: As the attribute.
            vocab_size: Choose ids below this alone; None for all.
        """
        self.rows, self.capacity = rows, capacity
        self._model, self._vocab_size = model, vocab_size
        self._device = next(model.parameters()).device
        self._requests: dict[int, _Row] = {}

    def admit(self, admissions: Sequence[Admission]) -> None:
        """As `Loop.admit`; the prompt runs with the first step."""
        from megatron.core.inference.contexts import StaticInferenceContext

        for admission in admissions:
            settings = Settings.greedy(1, self._model.vocab_size, self._device)
            settings.put(0, admission.sampling, self._model.vocab_size)
            self._requests[admission.row] = _Row(
                StaticInferenceContext(max_batch_size=1, max_sequence_length=self.capacity),
                torch.tensor([list(admission.prompt)], device=self._device),
                settings,
                admission.sampling.uniforms(self.capacity).to(self._device),
                [],
            )

    @torch.no_grad()
    def step(self) -> None:
        """As `Loop.step`; a request that has reached the capacity rests."""
        from megatron.core.inference.utils import InferenceMode

        with InferenceMode.active():
            for row in self._requests.values():
                if row.context.sequence_len_offset + row.tokens.shape[1] <= self.capacity:
                    self._advance(row)

    def _advance(self, row: _Row) -> None:
        seen, count = row.context.sequence_len_offset, row.tokens.shape[1]
        positions = torch.arange(seen, seen + count, device=self._device)[None]
        logits = self._model(row.tokens, positions, None, inference_context=row.context, runtime_gather_output=True)
        row.context.sequence_len_offset += count
        row.context.enable_decode_mode()
        token = draw(logits[:, -1, : self._vocab_size], row.settings, row.uniforms[len(row.new), None])
        row.new.append(int(token))
        row.tokens = token[:, None]

    def recent(self, steps: int) -> _Here:
        """As `Loop.recent`."""
        tokens = torch.zeros(self.rows, steps, dtype=torch.int64)
        for number, row in self._requests.items():
            newest = row.new[-steps:]
            tokens[number, steps - len(newest) :] = torch.tensor(newest, dtype=torch.int64)
        return _Here(tokens)


class _Here:
    """Tokens that are on the host already."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def wait(self) -> Tensor:
        return self._tokens
