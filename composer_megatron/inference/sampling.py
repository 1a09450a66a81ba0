"""How the next token is chosen from the logits: greedy, or drawn with temperature, top-k and top-p; on the device.

A draw inverts the cumulative distribution at one uniform number. These numbers are made beforehand on the CPU, from a
request's seed and a token's position alone: no generator runs on the device, where a CUDA graph would have to carry it,
and what a request draws does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from composer_megatron.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token always.
        top_k: Draw among this many likeliest tokens; None for all.
        top_p: Draw among the fewest likeliest tokens whose probabilities, after `top_k`, sum to this; None for all.
        seed: Decides the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the value and what would do."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature={self.temperature}; expected 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k}; expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}; expected a number above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed={self.seed}; expected a whole number from 0 to 2^64 - 1")

    def uniforms(self, count: int) -> Tensor:
        """The numbers in [0, 1) at which the first `count` draws invert the distribution, (count,) in float64."""
        # PyTorch's generator takes 64 bits, too, but as a signed number.
        generator = torch.Generator().manual_seed(self.seed - (self.seed >> 63 << 64))
        return torch.rand(count, generator=generator, dtype=torch.float64)


GREEDY = Sampling()
"""The likeliest token, always."""


class Settings(NamedTuple):
    """The sampling of every row of a batch, on the device.

    Attributes:
        temperature: (b,) in float64.
        top_k: (b,); the size of the vocabulary where there is no limit.
        top_p: (b,) in float64; 1 where there is no limit.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor

    @classmethod
    def greedy(cls, rows: int, vocab_size: int, device: torch.device) -> Settings:
        """Settings of `rows` rows that take the likeliest token."""
        zeros = torch.zeros(rows, dtype=torch.float64, device=device)
        return cls(zeros, torch.full((rows,), vocab_size, device=device), torch.ones_like(zeros))

    def put(self, row: int, sampling: Sampling, vocab_size: int) -> None:
        """Give a row other settings."""
        self.temperature[row] = sampling.temperature
        self.top_k[row] = vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size)
        self.top_p[row] = 1.0 if sampling.top_p is None else sampling.top_p


def likeliest(logits: Tensor) -> Tensor:
    """The id of each row's largest logit, of equal ones the first: (b, v) to (b,), int64.

    A GPU reduces a row in a few programs only, which takes 31 us for 128,256 logits on an H100, so that a row is first
    reduced in parts.
    """
    count = logits.shape[-1]
    part = next((size for size in (512, 256, 128, 64) if count % size == 0), None)
    if part is None or count < 64 * part:
        return logits.argmax(-1)
    values, places = logits.unflatten(-1, (-1, part)).max(-1)
    best = values.argmax(-1, keepdim=True)
    return (best * part + places.gather(-1, best))[:, 0]


def draw(logits: Tensor, settings: Settings, uniforms: Tensor) -> Tensor:
    """Choose a token id for each row; equal logits and numbers give equal ids on every device.

    Args:
        logits: (b, v).
        settings: How; where the temperature is 0, the likeliest token, of equal ones the first.
        uniforms: (b,) in [0, 1), float64.

    Returns:
        (b,), int64.
    """
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    greedy = settings.temperature == 0
    temperature = torch.where(greedy, 1.0, settings.temperature)[:, None]
    values = values.double()
    values = (values - values[:, :1]) / temperature
    rank = torch.arange(logits.shape[-1], device=logits.device)
    values = values.masked_fill(rank >= settings.top_k[:, None], -math.inf)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < settings.top_p[:, None], probabilities, 0.0)
    cumulative = probabilities.cumsum(-1)
    place = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)
    place = torch.where(greedy, 0, place.clamp(max=logits.shape[-1] - 1))
    return ids.gather(-1, place[:, None])[:, 0]
