"""A trained run as a language model for lm-eval, the Language Model Evaluation Harness, whose package this needs.

lm-eval asks for three things: how likely a continuation is after a context, how likely a whole text is, and what the
model writes after a prompt. Its conventions hold: a context too long loses its beginning; a text too long is cut into
windows that know the token before their first alone, but for the last one, which is as long as the others and so knows
more; the end of text stands before what has nothing before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from composer_megatron.checkpoint import LoadedRun
from composer_megatron.errors import UsageError

if TYPE_CHECKING:
    from composer_megatron.generate import Request

_ROWS = 1024
"""Tokens whose logits are widened to fp32 at a time."""

_NEW_TOKENS = 256
"""That lm-eval's tasks get where they do not say how many."""


class Stretch(NamedTuple):
    """Tokens to score: `targets` are what follows the last of the `inputs`, one after each of the last so many."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


class Score(NamedTuple):
    """Natural logarithm of the targets' probability, and whether each was the likeliest token."""

    log_probability: float
    is_greedy: bool


class RunLM(TemplateLM):
    """lm-eval's interface on a run."""

    def __init__(
        self, run: LoadedRun, *, batch_tokens: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Wrap a run.

        Args:
            run: With a tokenizer.
            batch_tokens: Tokens in one pass; by default 2048 on a CPU, 16384 on a GPU.
            progress: Called with the requests done and those there are.

        Raises:
            FileError: If the run has no tokenizer.
            UsageError: If `batch_tokens` is impossible.
        """
        super().__init__()
        if batch_tokens is not None and batch_tokens < 1:
            raise UsageError(f"batch_tokens={batch_tokens}; expected at least 1")
        self.run = run
        self._tokenizer = run.require_tokenizer()
        self._batch_tokens = batch_tokens or (2048 if run.device.type == "cpu" else 16_384)
        self._progress = progress or (lambda done, total: None)

    @property
    def eot_token_id(self) -> int:
        """Id of the end of text."""
        return self.run.end_of_text

    @property
    def max_length(self) -> int:
        """Tokens that the model may be asked for."""
        return self.run.sequence_length

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of prompts."""
        return str(self.run.path.name)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; nothing is put before or after it."""
        return list(self._tokenizer.encode(string, add_special_tokens=False).ids)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's; where a token spans the border and nothing would be left to score, that token is scored."""
        before, after = super()._encode_pair(context, continuation)
        if after or not continuation:
            return before, after
        whole = self.tok_encode(context + continuation)
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
        alike = min(alike, len(whole) - 1)
        return whole[:alike] or [self.eot_token_id], whole[alike:]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's, without its bar over the texts that are encoded: `progress` is told of what takes long."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        stretches = [self._stretch(context, continuation) for _, context, continuation in requests]
        scores = score_all(self.run, stretches, self._batch_tokens, self._progress)
        return [(score.log_probability, score.is_greedy) for score in scores]

    def _stretch(self, context: list[int], continuation: list[int]) -> Stretch:
        """The last tokens that the model may be asked for; a continuation too long loses its beginning, too."""
        tokens = (*context, *continuation)[-(self.max_length + 1) :]
        return Stretch(tokens[:-1], tokens[len(tokens) - min(len(continuation), len(tokens) - 1) :])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Logarithms of the probabilities of whole texts."""
        owners, stretches = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for before, after in map(make_disjoint_window, windows):
                owners.append(number)
                stretches.append(Stretch((*before, *after[:-1]), tuple(after)))
        totals = [0.0] * len(requests)
        for owner, score in zip(
            owners, score_all(self.run, stretches, self._batch_tokens, self._progress), strict=True
        ):
            totals[owner] += score.log_probability
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes, up to the first of the texts that end it."""
        from composer_megatron.generate import stream

        asked = [self._request(*request.args) for request in requests]
        texts, ended = [""] * len(asked), 0
        for piece in stream(self.run, asked):
            texts[piece.number] += piece.text
            if piece.ending is not None:
                ended += 1
                self._progress(ended, len(asked))
        return texts

    def _request(self, context: str, options: dict[str, Any]) -> Request:
        from composer_megatron.generate import Request
        from composer_megatron.inference.sampling import Sampling

        known = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise UsageError(f"the task asks for {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        until = options.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        new = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _NEW_TOKENS)
        new = min(new, self.max_length - 1)
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
        sampling = Sampling(temperature, options.get("top_k") or None, options.get("top_p"))
        return Request(self._end_of(context, self.max_length - new), new, sampling, stop)

    def _end_of(self, text: str, room: int) -> str:
        """The end of a text that has at most so many tokens."""
        ids = self.tok_encode(text)
        for keep in range(room, 0, -1):  # what is decoded may be encoded in more tokens than before
            if len(ids) <= room:
                return text
            text = self._tokenizer.decode(ids[-keep:], skip_special_tokens=False)
            ids = self.tok_encode(text)
        return text if len(ids) <= room else ""


def score_all(
    run: LoadedRun,
    stretches: Sequence[Stretch],
    batch_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Score stretches, in batches of about equal lengths, longest first; equal inputs run once.

    Args:
        run: A trained run.
        stretches: None longer than the run's sequences.
        batch_tokens: Tokens of a padded batch, unless one stretch has more.
        progress: Called with the stretches done and those there are.

    Returns:
        Their scores, in order; a stretch without targets is certain.
    """
    owners: dict[tuple[int, ...], list[int]] = {}
    scores = [Score(0.0, is_greedy=True)] * len(stretches)
    for number, stretch in enumerate(stretches):
        if stretch.targets:
            owners.setdefault(stretch.inputs, []).append(number)
    done = len(stretches) - sum(map(len, owners.values()))
    for batch in _batches(owners, batch_tokens):
        for inputs, logits in zip(batch, _logits(run, batch), strict=True):
            for number in owners[inputs]:
                scores[number] = _score(logits, stretches[number].targets)
            done += len(owners[inputs])
        progress(done, len(stretches))
    return scores


def _batches(inputs: Sequence[tuple[int, ...]] | dict[tuple[int, ...], Any], most: int) -> Iterator[list[Any]]:
    batch: list[tuple[int, ...]] = []
    for each in sorted(inputs, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > most:
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


@torch.no_grad()
def _logits(run: LoadedRun, batch: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Logits (tokens, vocabulary) of each; padding stands on the right, where causal attention does not see it."""
    longest = max(map(len, batch))
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, inputs in enumerate(batch):
        tokens[row, : len(inputs)] = torch.tensor(inputs)
    positions = torch.arange(longest, device=run.device).expand(len(batch), -1)
    logits = run.model(tokens.to(run.device), positions, None)
    return (logits[row, : len(inputs)] for row, inputs in enumerate(batch))


def _score(logits: Tensor, targets: tuple[int, ...]) -> Score:
    wanted = torch.tensor(targets, device=logits.device)
    total, greedy = 0.0, True
    for part, ids in zip(logits[-len(targets) :].split(_ROWS), wanted.split(_ROWS), strict=True):
        wide = part.float()
        total += float(wide.log_softmax(-1).gather(1, ids[:, None]).double().sum())
        greedy = greedy and bool((wide.argmax(-1) == ids).all())
    return Score(total, greedy)
