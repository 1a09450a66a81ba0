"""One contender of `bench_training.py` in a process of its own: trains a model when told to, and gives its memory back.

Reads a JSON object a line from standard input and answers each with one: ``prepare`` for a workload, ``measure``.
Between commands the contender holds next to nothing on the GPU, so that many can take turns on one: its tensors' memory
is freed, and drawn anew before the next turn (`_Memory`). What can be done side by side (imports, compilation) is; what
needs the GPU takes a lock.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from breakdown import breakdown, kernels_of, mark_loss_head
from torch import Tensor

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.backend import UNFUSED
from composer_megatron.errors import ComposerError, UsageError

PLAIN = {"compile": True, "compile-bf16": False}
"""Contenders in plain PyTorch, and whether they keep fp32 masters."""

UNFUSED_NOTE = (
    "TransformerEngine refused its fused attention and computed it unfused: no picture of what its users get, and left "
    "out of comparisons; docs/training.md says what to set"
)
"""A row's ``note`` and ``unfair``, with which nothing compares it."""


class Trainer(Protocol):
    """A model with its optimizer."""

    model: torch.nn.Module

    def step(self, micro_batches: list[Tensor]) -> Tensor:
        """One optimizer step over micro-batches of tokens (b, s + 1); returns the last one's loss."""

    def tensors(self) -> Iterator[Tensor]:
        """All that stays in memory between steps."""

    def fill(self) -> None:
        """Draw the weights anew, and forget the moments."""


class _Memory:
    """Frees the memory behind a trainer's tensors, and gets it back, with other values in it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._sizes: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def free(self) -> None:
        if not torch.cuda.is_available():
            return
        for param in self._trainer.model.parameters():
            param.grad = None  # which a step that failed left behind
        for storage in (tensor.untyped_storage() for tensor in self._trainer.tensors()):
            if storage.nbytes():
                self._sizes[storage._cdata] = (storage, storage.nbytes())
                storage.resize_(0)
        gc.collect()
        torch.cuda.empty_cache()

    def restore(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Get the memory behind these tensors back, or behind all; only then are there values in it."""
        some = None if tensors is None else [tensor.untyped_storage()._cdata for tensor in tensors]
        for key in list(self._sizes) if some is None else some:
            if key in self._sizes:
                storage, size = self._sizes.pop(key)
                storage.resize_(size)
        if some is None:
            torch.manual_seed(1)  # so that backends of a model begin alike, and their losses can be compared
            self._trainer.fill()


class _Lock:
    """The GPU, which one process may fill at a time; taken when first asked for."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("w")  # noqa: SIM115 - open for as long as the process lives

    def take(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def release(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


class Worker:
    """Obeys the commands."""

    def __init__(self, architecture: Architecture, backend: str, lock: _Lock) -> None:
        """Say what to train, and how."""
        self.architecture, self.backend, self.lock = architecture, backend, lock
        self.has_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.has_gpu else "cpu")
        self.dtype = torch.bfloat16 if self.has_gpu else torch.float32
        self.trainer: Any = None
        self.memory: Any = None
        self.micro_batches: list[Tensor] = []

    def prepare(self, seq_len: int, micro_batch: int, micro_batches: int) -> dict[str, Any]:
        """Build the model, once, and run a first step of the workload: what compiles, compiles here."""
        start = time.perf_counter()
        torch.manual_seed(0)
        size = (micro_batches, micro_batch, seq_len + 1)
        tokens = torch.randint(self.architecture.shape.vocab_size, size, device=self.device)
        self.micro_batches = list(tokens)
        try:
            if self.backend in PLAIN:
                self._prepare_plain()
            else:
                self._prepare_megatron(seq_len)
            for _ in range(2):  # the second one beside the optimizer's state, as all that are to come
                loss = float(self.trainer.step(self.micro_batches[:1]))
        finally:
            self.rest()
        self.lock.release()
        says = getattr(self.trainer, "says", "torch.compile, cuDNN attention, fused AdamW")
        found = {"prepared_in": time.perf_counter() - start, "first_loss": loss, "says": says}
        return found | self._chosen_attention()

    def _prepare_megatron(self, seq_len: int) -> None:
        import megatron.core.models.hybrid.hybrid_model  # noqa: F401 - slow, so side by side with the others
        from megatron_trainer import MegatronTrainer

        from composer_megatron.backend import get_backend

        name, *parts = self.backend.split("+")
        players = get_backend(name, dict(part.split("=", 1) for part in parts))
        players.report(self.architecture.shape, self.dtype)  # imports the attention that it finds, which is slow, too
        self.lock.take()
        if self.trainer is None:
            self.trainer = MegatronTrainer(self.architecture, self.backend, seq_len, self.dtype)
            self.memory = _Memory(self.trainer)
        else:
            self.memory.restore()

    def _prepare_plain(self) -> None:
        from plain_model import PlainTrainer

        if self.trainer is None:
            masters = PLAIN[self.backend]
            self.trainer = PlainTrainer(self.architecture, masters=masters, device=self.device, dtype=self.dtype)
            self.memory = _Memory(self.trainer)
        else:
            self.memory.restore(self.trainer.params)
        torch._dynamo.reset()
        self.trainer.run = torch.compile(self.trainer.model, backend=self._compile, fullgraph=True, dynamic=False)
        self.trainer.backward(self.micro_batches[0], 1.0)  # the lock is taken between compiling and running
        self.lock.take()
        for param in self.trainer.params:
            param.grad = None
        if self.trainer.optimizer is None:
            self.trainer.add_state()
        self.memory.restore()

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(graph, inputs)
        self.lock.take()
        return compiled

    def rest(self) -> None:
        """Give memory back."""
        if self.memory is not None:
            self.memory.free()

    def measure(self, warmup: int, steps: int, profile: bool = False) -> dict[str, Any]:
        """Seconds of each of so many steps, after others that do not count; the peak of the memory allocated.

        Args:
            warmup: Steps that do not count.
            steps: Steps that do.
            profile: Whether to say, too, where the GPU's time of one more step goes.
        """
        try:
            self.memory.restore()
            for _ in range(warmup):
                self.trainer.step(self.micro_batches)
            if self.has_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            seconds, loss = self._timed(steps)
            peak = torch.cuda.max_memory_allocated() if self.has_gpu else None
            reserved = torch.cuda.max_memory_reserved() if self.has_gpu else None
            parts = {"profile": self._profile()} if profile and self.has_gpu else {}
        finally:
            self.rest()
        found = {"seconds": seconds, "peak_bytes": peak, "reserved_bytes": reserved, "loss": loss}
        return found | parts | self._chosen_attention()

    def _chosen_attention(self) -> dict[str, str]:
        """What TransformerEngine computed attention with, and why such a row may be compared to none."""
        chosen = getattr(self.trainer, "attention", None)
        said = {} if chosen is None else {"attention": chosen}
        return said | ({"unfair": UNFUSED_NOTE} if chosen == UNFUSED else {})

    def _timed(self, steps: int) -> tuple[list[float], float]:
        """From the end of a step to the end of the next: the host runs ahead of the GPU as in training."""
        if not self.has_gpu:
            seconds = []
            for _ in range(steps):
                start = time.perf_counter()
                loss = self.trainer.step(self.micro_batches)
                seconds.append(time.perf_counter() - start)
            return seconds, float(loss)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            loss = self.trainer.step(self.micro_batches)
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)], float(loss)

    def _profile(self) -> dict[str, Any]:
        """A step as warm as those that were timed; a note where the profiler fails, which costs no figure."""
        from torch.profiler import ProfilerActivity, profile

        try:
            marks = mark_loss_head(getattr(self.trainer, "model", None))
            with marks, profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                self.trainer.step(self.micro_batches)
                torch.cuda.synchronize()
            return breakdown(*kernels_of(profiler.events()))
        except Exception as error:
            traceback.print_exc()
            return {"note": _note(error)}


def _ceilings() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"copy": None, "gemm": None}
    from timing import copy_bandwidth, gemm_rate, own_stream

    with own_stream():
        return {"copy": copy_bandwidth(), "gemm": gemm_rate()}


def _note(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    name = "" if isinstance(error, ComposerError) else f"{type(error).__name__}: "
    return f"{name}{(str(error).strip() or 'no message').splitlines()[0]}"[:300]


def _serve(worker: Worker, commands: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    known: dict[str, Callable[..., dict[str, Any]]] = {
        "prepare": worker.prepare,
        "measure": worker.measure,
    }
    for line in commands:
        command = json.loads(line)
        try:
            found = known[command.pop("do")](**command)
        except Exception as error:  # the reason goes into the row; the others go on
            traceback.print_exc()
            found = {"note": _note(error)}
        if "note" in found:
            worker.rest()  # only now nothing refers to the tensors of the step that failed
            worker.lock.release()
        answer(found)


def main() -> None:
    """Obey standard input until it ends."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--architecture", type=Path)
    options.add_argument("--backend", required=True)
    options.add_argument("--lock", required=True)
    given = options.parse_args()
    # Answers have a stream of their own: libraries print on standard output.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")

    if given.backend == "ceilings":
        answer(_ceilings())
        return
    if given.architecture is None:
        raise UsageError("--architecture is missing")
    if given.backend not in PLAIN:
        cpu.skip_compilation()
    _serve(Worker(Architecture.load(given.architecture), given.backend, _Lock(given.lock)), sys.stdin, answer)


if __name__ == "__main__":
    main()
