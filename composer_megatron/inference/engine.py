"""The loop of decoding: requests are admitted to rows of a batch, and all rows step together.

Everything that a step reads and writes has its place for good, so that on a GPU a step is one CUDA graph: it chooses a
token from the logits of the step before, notes it, and runs it. The host neither waits nor looks in between. It asks
for the newest tokens of several steps at a time (`Engine.recent`), which come while the next steps run, and admits a
new request to a row whose request has ended. A row without a request goes on; nobody reads what it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from composer_kernels.overlap import Overlap
from composer_megatron.errors import UsageError
from composer_megatron.inference.decoder import Decoder
from composer_megatron.inference.limits import PREFILL_TOKENS, SPARE
from composer_megatron.inference.sampling import Sampling, Settings, draw, likeliest
from composer_megatron.inference.weights import Weights

_PADDING = 128
"""On a GPU prompts are padded to a multiple, since attention libraries prepare for every length anew."""


@dataclass(frozen=True)
class Admission:
    """A request to start.

    Attributes:
        row: Its place in the batch.
        prompt: Its tokens, at least one.
        sampling: How its tokens are drawn.
    """

    row: int
    prompt: Sequence[int]
    sampling: Sampling


class Recent(Protocol):
    """Tokens on their way to the host."""

    def wait(self) -> Tensor:
        """(rows, steps), on the CPU, once they are there."""


class Loop(Protocol):
    """What decodes a batch of requests.

    Attributes:
        rows: Most requests at a time.
        capacity: Most tokens of a request, new ones included.
        span: Steps after which it pays to look at the tokens; at most `SPARE`.
    """

    rows: int
    capacity: int
    span: int

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Run the prompts; the next step chooses each one's first new token."""

    def step(self) -> None:
        """Choose a token for every row, and run it."""

    def recent(self, steps: int) -> Recent:
        """The tokens of the last `steps` steps."""


class Engine:
    """A `Loop` by `Decoder`, on a GPU in a CUDA graph.

    Attributes:
        rows: As in `Loop`.
        capacity: As in `Loop`.
        span: As in `Loop`.
        decoder: Has the weights and the cache.
    """

    def __init__(
        self,
        weights: Weights,
        rows: int,
        capacity: int,
        *,
        draws: bool = False,
        vocab_size: int | None = None,
        graph: bool = True,
        fused: bool | None = None,
        overlap: Overlap | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """Allocate everything; the graph is captured at the first step.

        Args:
            weights: The model's.
            rows: Most requests at a time.
            capacity: Most tokens of a request, new ones included.
            draws: Whether a request may draw; otherwise all take the likeliest token, which is quicker.
            vocab_size: Choose ids below this alone; None for all.
            graph: Whether a step on a GPU is a CUDA graph; otherwise its kernels are launched one by one.
            fused: As `Decoder`.
            overlap: As `Decoder`.
            prefill_tokens: Most tokens of a pass over prompts, padding included.
        """
        self.decoder = Decoder(weights, rows, capacity, fused=fused, overlap=overlap)
        self.rows, self.capacity = rows, capacity
        device, vocabulary = weights.embedding.device, len(weights.output)
        self._on_gpu = device.type == "cuda"
        self._use_graph = self._on_gpu and graph
        self.span = 8 if self._on_gpu else 1
        self._choices = vocabulary if vocab_size is None else min(vocab_size, vocabulary)
        self._prefill_tokens = prefill_tokens
        self._logits = torch.zeros(rows, vocabulary, dtype=weights.embedding.dtype, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(rows, capacity + SPARE + 1, dtype=torch.int64, device=device)
        self._settings = Settings.greedy(rows, self._choices, device) if draws else None
        self._uniforms = torch.zeros(rows, capacity + SPARE + 1 if draws else 0, dtype=torch.float64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def admit(self, admissions: Sequence[Admission]) -> None:
        """As `Loop.admit`: short prompts together, long ones in chunks.

        Raises:
            UsageError: If a prompt has no token, or more than the cache takes.
        """
        for admission in admissions:
            if not 1 <= len(admission.prompt) <= self.capacity:
                given = f"a prompt has {len(admission.prompt)} tokens"
                raise UsageError(f"{given}; expected 1 to {self.capacity}, for which the cache has room")
        waiting = sorted(admissions, key=lambda admission: len(admission.prompt))
        while waiting:
            group = [waiting.pop()]
            padded = self._padded(len(group[0].prompt))
            while waiting and padded * (len(group) + 1) <= self._prefill_tokens:
                group.append(waiting.pop())
            self._prefill(group, padded)

    def _padded(self, length: int) -> int:
        multiple = _PADDING if self._on_gpu else 1
        return min(self.capacity, -(-length // multiple) * multiple)

    def _prefill(self, group: Sequence[Admission], padded: int) -> None:
        device = self._tokens.device
        lengths = [len(admission.prompt) for admission in group]
        ids = torch.zeros(len(group), padded, dtype=torch.int64)
        for line, admission in zip(ids, group, strict=True):
            line[: len(admission.prompt)] = torch.tensor(admission.prompt)
        rows = torch.tensor([admission.row for admission in group], device=device)
        tokens, sizes = ids.to(device), torch.tensor(lengths, device=device)
        self._logits[rows] = self.decoder.prefill(tokens, rows, sizes, self._prefill_tokens)
        self._lengths[rows] = sizes
        self._tokens[rows, :padded] = tokens
        for admission in group:
            if self._settings is not None:
                self._settings.put(admission.row, admission.sampling, self._choices)
                count = self._uniforms.shape[1] - len(admission.prompt)
                self._uniforms[admission.row, len(admission.prompt) :] = admission.sampling.uniforms(count).to(device)

    def assume(self, length: int) -> None:
        """For measurements: let every row hold so many tokens, which nobody ran."""
        self._lengths.fill_(length)

    @torch.no_grad()
    def step(self) -> None:
        """As `Loop.step`."""
        if not self._use_graph:
            self._step()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _step(self) -> None:
        place = self._lengths[:, None]
        logits = self._logits[:, : self._choices]
        if self._settings is None:
            token = likeliest(logits)
        else:
            token = draw(logits, self._settings, self._uniforms.gather(1, place)[:, 0])
        self._tokens.scatter_(1, place, token[:, None])
        self.decoder.decode(token, self._lengths, self._logits)
        self._lengths.add_(1).clamp_(max=self.capacity + SPARE)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A graph of a step; the steps before it, which compile kernels, leave no trace in what requests see."""
        kept = [state.clone() for state in (self._logits, self._lengths)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
                self._restore(kept)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        return graph

    def _restore(self, kept: Sequence[Tensor]) -> None:
        # Tokens and cache hold the step's token at the very place that the first real step writes.
        for state, before in zip((self._logits, self._lengths), kept, strict=True):
            state.copy_(before)

    @torch.no_grad()
    def recent(self, steps: int) -> Recent:
        """As `Loop.recent`."""
        places = self._lengths[:, None] + torch.arange(-steps, 0, device=self._lengths.device)
        tokens = self._tokens.gather(1, places.clamp(min=0))
        return _OnItsWay(tokens)


class _OnItsWay:
    """Tokens that are copied to the host behind the steps before, while the steps after run."""

    def __init__(self, tokens: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tokens = tokens
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._tokens
