"""A recipe: everything that decides what a pretraining run computes, and nothing of the machine that it runs on.

A recipe is a frozen value, so that one is made from another by `dataclasses.replace`; the layout on GPUs is chosen
afterwards, by `composer_megatron.recipes.layouts`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

CooldownStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]

OURS = "ours"
"""The source of a value that comes from no publication."""

CHANGED = "changed here"
"""The source of a value that the user changed."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pretraining run.

    The learning rate rises linearly, stays, and falls: ``warmup=0.25, cooldown=0.2`` is a trapezoid, and
    ``cooldown = 1 - warmup`` with ``cooldown_style="cosine"`` the usual cosine schedule.

    Attributes:
        name: What it is called on the command line.
        about: What it is, in a line.
        sequence: The blocks.
        shape: The widths.
        data: The corpus that it is meant for. Nothing fetches it: a run is given its text.
        tokenizer: The tokenizer that the vocabulary is of.
        tokens: Training tokens; a run takes the fewest whole steps that reach them.
        seq_len: Tokens in a sequence.
        global_batch_size: Sequences in a step.
        learning_rate: Its peak.
        min_learning_rate: Where it ends.
        warmup: Share of the steps in which it rises from zero.
        cooldown: Share of the steps in which it falls.
        cooldown_style: How it falls; Megatron's names.
        weight_decay: Of AdamW.
        beta1: Of AdamW.
        beta2: Of AdamW.
        epsilon: Of AdamW.
        clip_grad: Norm to which gradients are clipped; 0 for none.
        seed: Of weights and data order.
        sources: Where values come from, by field; those of a field that is not named are `OURS`.
    """

    name: str
    about: str
    sequence: CompositeSequence
    shape: Shape
    data: str
    tokenizer: str
    tokens: int
    seq_len: int
    global_batch_size: int
    learning_rate: float
    min_learning_rate: float = 0.0
    warmup: float = 0.25
    cooldown: float = 0.2
    cooldown_style: CooldownStyle = "linear"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad: float = 1.0
    seed: int = 1234
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the field, its value and what would do."""
        for name in ("tokens", "seq_len", "global_batch_size"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("seed", self.seed >= 0, "at least 0")
        self._check("learning_rate", self.learning_rate > 0, "above 0")
        self._check("epsilon", self.epsilon > 0, "above 0")
        for name in ("weight_decay", "clip_grad"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("beta1", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        peak = self.learning_rate
        self._check("min_learning_rate", 0 <= self.min_learning_rate <= peak, f"between 0 and learning_rate={peak}")
        self._check("warmup", 0 <= self.warmup < 1, "a share of the steps, at least 0 and below 1")
        left = 1 - self.warmup
        self._check("cooldown", 0 <= self.cooldown <= left + 1e-9, f"a share between 0 and {left:g}, after the warm-up")
        styles = get_args(CooldownStyle)
        self._check("cooldown_style", self.cooldown_style in styles, " or ".join(styles))
        unknown = set(self.sources) - {each.name for each in dataclasses.fields(self)}
        if unknown:
            raise UsageError(f"recipe {self.name}: sources name {', '.join(sorted(unknown))}, which are no fields")

    def _check(self, name: str, good: bool, expected: str) -> None:
        value = getattr(self, name)
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(f"recipe {self.name}: {name}={value!r}; expected {expected}")

    @property
    def architecture(self) -> Architecture:
        """The model; its origin names the recipe, and what of it the user changed."""
        changed = [name for name, source in self.sources.items() if source == CHANGED]
        return Architecture(self.sequence, self.shape, {"recipe": self.name, "changed": changed})

    @property
    def step_tokens(self) -> int:
        """Tokens in a step."""
        return self.seq_len * self.global_batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.tokens // self.step_tokens)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises; fewer than there are."""
        return min(round(self.warmup * self.steps), self.steps - 1)

    @property
    def cooldown_steps(self) -> int:
        """Steps in which it falls; none of those in which it rises."""
        return min(round(self.cooldown * self.steps), self.steps - self.warmup_steps)

    @property
    def flops(self) -> int:
        """Training FLOPs of the whole run, counted as `Architecture.flops_per_token` does."""
        return self.steps * self.step_tokens * self.architecture.flops_per_token(self.seq_len)

    def source(self, name: str) -> str:
        """Where the value of a field comes from."""
        return self.sources.get(name, OURS)

    def megatron_flags(self) -> dict[str, Any]:
        """Megatron's flags for all but the model: lengths, batch, learning rate, optimizer, seed."""
        return {
            "--seq-length": self.seq_len,
            "--global-batch-size": self.global_batch_size,
            "--train-iters": self.steps,
            "--lr": self.learning_rate,
            "--min-lr": self.min_learning_rate,
            "--lr-warmup-iters": self.warmup_steps,
            "--lr-decay-style": "WSD",
            "--lr-wsd-decay-style": self.cooldown_style,
            "--lr-wsd-decay-iters": self.cooldown_steps,
            "--weight-decay": self.weight_decay,
            "--adam-beta1": self.beta1,
            "--adam-beta2": self.beta2,
            "--adam-eps": self.epsilon,
            "--clip-grad": self.clip_grad,
            "--seed": self.seed,
        }

    def as_dict(self) -> dict[str, Any]:
        """Fields, sources and what follows from them, as JSON values."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        derived = ("steps", "step_tokens", "warmup_steps", "cooldown_steps", "flops")
        return (
            values
            | {"sequence": str(self.sequence), "shape": self.shape.as_dict(), "sources": dict(self.sources)}
            | {name: getattr(self, name) for name in derived}
        )
