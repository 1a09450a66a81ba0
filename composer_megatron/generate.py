"""Generate text from a trained run: prompts in a batch, text as it comes, every request with its own settings.

As in::

    with load_run(Path("runs/composite")) as run:
        print(generate(run, ["def ", "class "], max_new_tokens=16))
        for piece in stream(run, [Request("def ", sampling=Sampling(temperature=0.8, seed=1))]):
            print(piece.text, end="", flush=True)

Only attention blocks have a decoding cache, and those with a window no more of it than the window. On a GPU a step of
decoding is one CUDA graph. What a request gives depends on its own settings and seed, not on its neighbours, as far as
the rounding of products over batches of other sizes lets it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from composer_megatron.backend import require
from composer_megatron.checkpoint import LoadedRun
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import write_json
from composer_megatron.inference.sampling import GREEDY, Sampling
from composer_megatron.text import tokenizing

if TYPE_CHECKING:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from composer_megatron.inference.batching import Job
    from composer_megatron.inference.engine import Loop

__all__ = [
    "GREEDY",
    "Piece",
    "Request",
    "Sampling",
    "generate",
    "generate_tokens",
    "requests_of",
    "stream",
    "stream_tokens",
    "write_samples",
]

BATCH_SIZE = 32
"""Requests decoded at a time, where nobody says how many: others wait for a row to become free."""

_NEW_TOKENS = 64
"""Tokens to add at most, where nobody says how many."""

_CAPACITIES = 256
"""On a GPU the cache has room for a multiple of so many tokens: kernels are compiled for its size."""

Ending = Literal["end of text", "stop", "length"]


@dataclass(frozen=True)
class Request:
    """What to continue, and how.

    Attributes:
        prompt: The text to continue; the empty one starts a document.
        max_new_tokens: Tokens to add at most; None for as many as the run's sequences have room for, up to 64.
        sampling: How they are drawn, the seed included.
        stop: Texts that end the continuation, and are not part of it.
    """

    prompt: str
    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise a `UsageError` that names the value and what would do."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens}; expected at least 1")
        if "" in self.stop:
            raise UsageError("a stop text is empty; leave it out")


class Piece(NamedTuple):
    """A part of a continuation.

    Attributes:
        number: Of the request, counted from 0.
        text: Whole characters.
        ending: In a request's last piece why it ended; before that None.
    """

    number: int
    text: str
    ending: Ending | None = None


def generate(
    run: LoadedRun,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """Continue each prompt, until the end of text, a stop text, or `max_new_tokens`, all with the same settings.

    Args:
        run: A trained run.
        prompts: Texts to continue; the empty one starts a document.
        max_new_tokens: As `Request`.
        temperature: As `Sampling`.
        top_k: As `Sampling`, with a temperature above 0.
        top_p: As `Sampling`, with a temperature above 0.
        seed: Decides the draws, of each prompt its own.
        stop: Texts that end a continuation, and are not part of it.
        batch_size: As `stream`.

    Returns:
        The continuations, without the prompts.

    Raises:
        UsageError: If a setting is impossible, or a prompt and its continuation exceed the run's sequence length.
        FileError: If the run has no tokenizer.
        ComposerError: If the memory does not suffice.
    """
    requests = requests_of(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    texts = [""] * len(requests)
    for piece in stream(run, requests, batch_size=batch_size):
        texts[piece.number] += piece.text
    return texts


def requests_of(
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[Request]:
    """Requests with the same settings, each with a seed of its own; arguments and errors as for `generate`."""
    settings = Sampling(temperature, top_k, top_p, seed)
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and temperature == 0:
            raise UsageError(
                f"{name}={value} at temperature=0, which takes the likeliest token always: "
                f"give a temperature above 0, such as 0.8, or leave {name} out"
            )
    return [
        Request(prompt, max_new_tokens, dataclasses.replace(settings, seed=_seed(seed, number)), tuple(stop))
        for number, prompt in enumerate(prompts)
    ]


def stream(run: LoadedRun, requests: Sequence[Request], *, batch_size: int = BATCH_SIZE) -> Iterator[Piece]:
    """Continue each request, text as it comes.

    Args:
        run: A trained run.
        requests: What to continue.
        batch_size: Requests decoded at a time; the cache grows with it.

    Yields:
        Pieces of the continuations, in no order between requests; each request's last one says why it ended.

    Raises:
        UsageError: If a prompt and its continuation exceed the run's sequence length, or the batch size is impossible.
        FileError: If the run has no tokenizer.
        ComposerError: If the memory does not suffice.
    """
    from composer_megatron.inference.batching import Job
    from composer_megatron.inference.text import TextStream

    tokenizer = run.require_tokenizer()
    prompts = [tokenizer.encode(each.prompt, add_special_tokens=False).ids or [run.end_of_text] for each in requests]
    limits = [_limit(each, len(ids), run.sequence_length) for each, ids in zip(requests, prompts, strict=True)]
    jobs = [Job(ids, limit, each.sampling) for each, ids, limit in zip(requests, prompts, limits, strict=True)]
    texts = [TextStream(tokenizer, ids, each.stop) for each, ids in zip(requests, prompts, strict=True)]
    received = [0] * len(jobs)
    for number, token in stream_tokens(run.model, jobs, tokenizing.vocabulary_size(tokenizer), batch_size):
        job, text = jobs[number], texts[number]
        received[number] += 1
        if token == run.end_of_text:
            job.ended = True
            yield Piece(number, text.end(), "end of text")
            continue
        new = text.add(token)
        if text.is_stopped:
            job.ended = True
            yield Piece(number, new, "stop")
        elif received[number] == job.limit:
            new += text.end()
            yield Piece(number, new, "stop" if text.is_stopped else "length")
        elif new:
            yield Piece(number, new)


def stream_tokens(
    model: HybridModel, jobs: Sequence[Job], vocab_size: int | None = None, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[int, int]]:
    """Continue sequences of token ids, tokens as they come.

    Args:
        model: In evaluation mode, in one process.
        jobs: What to continue. Set a job's `ended` to get no more tokens of it.
        vocab_size: Choose ids below this alone, where the embedding has more rows than the tokenizer has tokens.
        batch_size: Jobs decoded at a time.

    Yields:
        A job's number and its next token, in no order between jobs.

    Raises:
        UsageError: If the batch size is impossible, or a job has no prompt or asks for nothing.
        ComposerError: If the memory does not suffice.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}; expected at least 1")
    for number, job in enumerate(jobs):
        if not job.prompt:
            raise UsageError(f"prompt {number} has no token; start a document with the end of text")
        if job.limit < 1:
            raise UsageError(f"max_new_tokens={job.limit}; expected at least 1")
    if not jobs:
        return
    require("triton", "generation", "pip install triton")
    from composer_megatron.inference.batching import decode

    rows = min(batch_size, len(jobs))
    capacity = max(len(job.prompt) + job.limit for job in jobs)
    draws = any(job.sampling.temperature > 0 for job in jobs)
    try:
        yield from decode(_loop(model, rows, capacity, draws, vocab_size), jobs)
    except torch.OutOfMemoryError as error:
        asked = f"{rows} requests of up to {capacity} tokens at a time"
        raise ComposerError(f"out of memory while decoding {asked}; take a smaller batch size than {rows}") from error


def generate_tokens(
    model: HybridModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
    finished: Callable[[list[int]], bool] | None = None,
) -> list[int]:
    """Continue one sequence of token ids.

    Args:
        model: In evaluation mode, in one process.
        prompt: At least one id.
        max_new_tokens: At most so many new ids.
        sampling: How an id is drawn.
        vocab_size: As `stream_tokens`.
        end_of_text: An id that ends the continuation and is not part of it.
        finished: Called with the new ids after each; true ends the continuation.

    Returns:
        The new ids.

    Raises:
        UsageError: If the prompt is empty or `max_new_tokens` impossible.
    """
    from composer_megatron.inference.batching import Job

    job, new = Job(prompt, max_new_tokens, sampling), list[int]()
    for _, token in stream_tokens(model, [job], vocab_size):
        if token == end_of_text:
            job.ended = True
            break
        new.append(token)
        job.ended = finished is not None and finished(new)
    return new


def write_samples(path: Path, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Write prompts and their continuations, in one step, as a list of ``{"prompt": …, "text": …}``."""
    write_json(path, [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)])


def _loop(model: HybridModel, rows: int, capacity: int, draws: bool, vocab_size: int | None) -> Loop:
    """Our own forward pass for the blocks that it knows, Megatron's for all others."""
    from composer_megatron.inference.engine import Engine
    from composer_megatron.inference.megatron import MegatronLoop
    from composer_megatron.inference.weights import is_decoded, weights_of

    if is_decoded(model):
        weights = weights_of(model)
        if weights.embedding.is_cuda:
            capacity = -(-capacity // _CAPACITIES) * _CAPACITIES
        return Engine(weights, rows, capacity, draws=draws, vocab_size=vocab_size)
    return MegatronLoop(model, rows, capacity, vocab_size)


def _limit(request: Request, prompt_tokens: int, longest: int) -> int:
    """Tokens to add at most: as asked for, which must fit, or as many as fit."""
    prompt, room = request.prompt, longest - prompt_tokens
    new = max(1, min(_NEW_TOKENS, room)) if request.max_new_tokens is None else request.max_new_tokens
    if new > room:
        shown = prompt if len(prompt) <= 40 else f"{prompt[:39]}…"
        asked = f"prompt {shown!r} has {prompt_tokens} tokens, with max_new_tokens={new} more than {longest}"
        advice = f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt"
        raise UsageError(f"{asked}, the longest sequence for this run; {advice}")
    return new


def _seed(seed: int, number: int) -> int:
    """The seed of a prompt: its own, and the same whatever other prompts there are."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
