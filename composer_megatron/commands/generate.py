"""``generate``: what a trained model writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text
from tyro.conf import Positional

from composer_megatron.commands.options import Several
from composer_megatron.display import console, print_json
from composer_megatron.errors import UsageError

if TYPE_CHECKING:
    from composer_megatron.generate import Piece


def generate(
    run: Positional[Path],
    *,
    prompt: Several,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Several = (),
    batch_size: int = 32,
    iteration: int | None = None,
    json: bool = False,
) -> None:
    """Continue prompts, text as it comes; writes RUN/samples.json.

    Args:
        run: Folder of a training run.
        prompt: A text to continue; may be given several times.
        max_new_tokens: Tokens to add at most; by default as many as the run's sequences have room for, up to 64.
        temperature: 0 takes the likeliest token; above, samples.
        top_k: Sample among the k likeliest tokens; all by default. Needs a temperature above 0.
        top_p: Sample among the likeliest tokens that hold this much probability. Needs a temperature above 0.
        seed: Seed of the sampling, of which each prompt's own follows.
        stop: A text that ends a continuation, and is not part of it; may be given several times.
        batch_size: Prompts at a time; the decoding cache grows with it.
        iteration: Which checkpoint; the last by default.
        json: Print one JSON object for programs instead of text.
    """
    if not prompt:
        raise UsageError('no prompt: add --prompt TEXT (--prompt "" starts a new document)')
    from composer_megatron.checkpoint import load_run
    from composer_megatron.generate import requests_of, stream, write_samples

    requests = requests_of(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    with load_run(run, iteration) as loaded:
        pieces = stream(loaded, requests, batch_size=batch_size)
        texts = _collect(pieces, prompt) if json else _show(pieces, prompt)
    write_samples(loaded.path / "samples.json", prompt, texts)
    if json:
        print_json([{"prompt": start, "text": text} for start, text in zip(prompt, texts, strict=True)])


def _collect(pieces: Iterable[Piece], prompts: tuple[str, ...]) -> list[str]:
    texts = [""] * len(prompts)
    for piece in pieces:
        texts[piece.number] += piece.text
    return texts


def _show(pieces: Iterable[Piece], prompts: tuple[str, ...]) -> list[str]:
    """Print the continuations in the prompts' order: the first that has not ended as it comes, the others behind it."""
    texts, shown = [""] * len(prompts), [0] * len(prompts)
    ended = [False] * len(prompts)
    current = 0
    for count, piece in enumerate(pieces):
        if count == 0:  # not before there is a piece: a prompt that is refused is not printed above its error
            _print(prompts[0], style="bold")
        texts[piece.number] += piece.text
        ended[piece.number] = piece.ending is not None
        while current < len(prompts):
            _print(texts[current][shown[current] :])
            shown[current] = len(texts[current])
            if not ended[current]:
                break
            console.print()
            console.rule(style="dim")
            current += 1
            if current < len(prompts):
                _print(prompts[current], style="bold")
    return texts


def _print(text: str, style: str = "") -> None:
    console.print(Text(text, style=style), end="", soft_wrap=True)
    console.file.flush()
