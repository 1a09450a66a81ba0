"""Training throughput on this machine: a Composite beside its Llama baseline, interleaved, in one process.

A step is forward, loss, backward and AdamW on random tokens: the model as Megatron builds it, without data loading and
without communication. What a Composite saves depends on the sequence length, so measure at yours.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from composer_megatron.architecture import Architecture
from composer_megatron.env import environment
from composer_megatron.errors import UsageError
from composer_megatron.model import build_model, end_single_process


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed.

    Attributes:
        seq_len: Tokens in a sequence.
        batch: Sequences in a step.
        warmup: Steps of each model before the clock starts.
        steps: Timed steps of each model; the median counts.
    """

    seq_len: int
    batch: int
    warmup: int = 2
    steps: int = 10

    def __post_init__(self) -> None:
        """Refuse sizes that time nothing."""
        for name, least in (("seq_len", 1), ("batch", 1), ("warmup", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)}; expected at least {least}")


def bench_training(composite: Architecture, workload: Workload) -> dict[str, Any]:
    """Median seconds a step, tokens/s and TFLOP/s (causal count) of the Composite and of its baseline.

    Both models are in memory at once and take turns, so that a change of clocks meets both.
    """
    started_here = not torch.distributed.is_initialized()
    models = {"composite": composite, "baseline": composite.baseline()}
    steps = {name: _training_step(architecture, workload) for name, architecture in models.items()}
    for name, _ in itertools.product(models, range(workload.warmup)):
        steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _, name in itertools.product(range(workload.steps), models):
        seconds[name].append(_timed(steps[name]))
    if started_here:
        end_single_process()
    rows = {name: _row(models[name], workload, seconds[name]) for name in models}
    return {
        "what": "training step: forward, loss, backward, AdamW; random tokens, one process",
        "shape": composite.shape.as_dict(),
        "seq_len": workload.seq_len,
        "batch": workload.batch,
        "warmup": workload.warmup,
        "dtype": str(_dtype()).removeprefix("torch."),
        "models": rows,
        "speedup": rows["composite"]["tokens_per_second"] / rows["baseline"]["tokens_per_second"],
        "environment": environment(),
    }


def _row(architecture: Architecture, workload: Workload, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    tokens = workload.seq_len * workload.batch
    return {
        "sequence": str(architecture.sequence),
        "params_total": architecture.params_total,
        "kv_bytes_per_token": architecture.kv_bytes_per_token(),
        "flops_per_token": architecture.flops_per_token(workload.seq_len),
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": tokens / median,
        "tflops": architecture.flops_per_token(workload.seq_len) * tokens / median / 1e12,
    }


def _training_step(architecture: Architecture, workload: Workload) -> Callable[[], None]:
    model = build_model(architecture, max_sequence_length=workload.seq_len, dtype=_dtype())
    model.train()
    device = next(model.parameters()).device
    shape = (workload.batch, workload.seq_len + 1)
    tokens = torch.randint(architecture.shape.vocab_size, shape, device=device)
    positions = torch.arange(workload.seq_len, device=device).expand(workload.batch, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).float().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _timed(step: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    step()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
