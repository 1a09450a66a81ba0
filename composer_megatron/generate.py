"""Generate text from a trained run, token by token, with a decoding cache that only attention blocks have.

Prompts are decoded one after the other: so no padding needs to be hidden from attention, and what a prompt gives does
not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from composer_megatron.checkpoint import LoadedRun
from composer_megatron.errors import UsageError
from composer_megatron.files import write_json
from composer_megatron.text import tokenizing

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token always.
        top_k: Draw among this many likeliest tokens; None for all.
        top_p: Draw among the fewest likeliest tokens whose probabilities, after `top_k`, sum to this; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the value and what would do."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature={self.temperature}; expected 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k}; expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}; expected a number above 0 and at most 1")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Draw a token id.

        Args:
            logits: (vocabulary,), on the CPU.
            generator: Of the CPU; not used when greedy.
        """
        if self.temperature == 0:
            return int(logits.argmax())
        values, ids = logits.double().sort(descending=True, stable=True)
        kept = values[: self.top_k]
        probabilities = torch.softmax((kept - kept[0]) / self.temperature, dim=0)
        if self.top_p is not None:
            before = probabilities.cumsum(0) - probabilities
            probabilities = torch.where(before < self.top_p, probabilities, 0.0)
        return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


GREEDY = Sampling()
"""The likeliest token, always."""


def generate(
    run: LoadedRun,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[str]:
    """Continue each prompt, until the end of text, a stop text, or `max_new_tokens`.

    Args:
        run: A trained run.
        prompts: Texts to continue; the empty one starts a document.
        max_new_tokens: At most so many tokens each.
        temperature: As `Sampling`.
        top_k: As `Sampling`.
        top_p: As `Sampling`.
        seed: Decides the draws, of each prompt its own.
        stop: Texts that end a continuation, and are not part of it.

    Returns:
        The continuations, without the prompts.

    Raises:
        UsageError: If a setting is impossible, or a prompt and its continuation exceed the run's sequence length.
        FileError: If the run has no tokenizer.
    """
    sampling = Sampling(temperature, top_k, top_p)
    tokenizer = run.require_tokenizer()
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens}; expected at least 1")
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed={seed}; expected a whole number from 0 to 2^64 - 1")
    if "" in stop:
        raise UsageError("a stop text is empty; leave it out")
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids or [run.end_of_text] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        _check_length(prompt, len(ids), max_new_tokens, run.sequence_length)
    texts = []
    for number, ids in enumerate(encoded):
        continuation = _Continuation(tokenizer, ids, stop)
        new = generate_tokens(
            run.model,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            generator=_generator(seed, number),
            vocab_size=tokenizing.vocabulary_size(tokenizer),
            end_of_text=run.end_of_text,
            finished=continuation.is_stopped if stop else None,
        )
        texts.append(continuation.text(new))
    return texts


@torch.no_grad()
def generate_tokens(
    model: HybridModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
    finished: Callable[[list[int]], bool] | None = None,
) -> list[int]:
    """Continue a sequence of token ids: one pass over the prompt, then one over each new token alone.

    Args:
        model: In evaluation mode, in one process.
        prompt: At least one id.
        max_new_tokens: At most so many new ids.
        sampling: How an id is drawn.
        generator: A generator of the CPU; None for a fresh one.
        vocab_size: Draw ids below this alone, where the embedding has more rows than the tokenizer has tokens.
        end_of_text: An id that ends the continuation and is not part of it.
        finished: Called with the new ids after each; true ends the continuation.

    Returns:
        The new ids.
    """
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode

    device = next(model.parameters()).device
    generator = torch.Generator() if generator is None else generator
    cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(prompt) + max_new_tokens)
    new: list[int] = []
    tokens = torch.tensor([list(prompt)], device=device)
    with InferenceMode.active():
        while len(new) < max_new_tokens:
            seen, count = cache.sequence_len_offset, tokens.shape[1]
            positions = torch.arange(seen, seen + count, device=device)[None]
            logits = model(tokens, positions, None, inference_context=cache, runtime_gather_output=True)
            cache.sequence_len_offset += count
            cache.enable_decode_mode()
            token = sampling.choose(logits[0, -1, :vocab_size].cpu(), generator)
            if token == end_of_text:
                break
            new.append(token)
            if finished is not None and finished(new):
                break
            tokens = torch.tensor([[token]], device=device)
    return new


def write_samples(path: Path, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Write prompts and their continuations, in one step, as a list of ``{"prompt": …, "text": …}``."""
    write_json(path, [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)])


@dataclass(frozen=True)
class _Continuation:
    """What new ids mean as text after a prompt."""

    tokenizer: Tokenizer
    prompt: list[int]
    stop: Sequence[str]

    def text(self, new: list[int]) -> str:
        """The text that the new ids add, up to the first stop text."""
        added = self._added(new)
        ends = [added.find(text) for text in self.stop if text in added]
        return added[: min(ends, default=None)]

    def is_stopped(self, new: list[int]) -> bool:
        added = self._added(new)
        return any(text in added for text in self.stop)

    def _added(self, new: list[int]) -> str:
        # Decoded behind the prompt: some tokenizers drop the space with which a text begins.
        before, whole = self.tokenizer.decode(self.prompt), self.tokenizer.decode([*self.prompt, *new])
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(new)


def _check_length(prompt: str, prompt_tokens: int, max_new_tokens: int, longest: int) -> None:
    if prompt_tokens + max_new_tokens > longest:
        shown, room = prompt if len(prompt) <= 40 else f"{prompt[:39]}…", longest - prompt_tokens
        asked = f"prompt {shown!r} has {prompt_tokens} tokens, with max_new_tokens={max_new_tokens} more than {longest}"
        advice = f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt"
        raise UsageError(f"{asked}, the longest sequence for this run; {advice}")


def _generator(seed: int, number: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
