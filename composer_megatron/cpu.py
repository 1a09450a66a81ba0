"""Megatron-core on a CPU: all that it needs beyond its own flags, in one place. Nothing here does anything on a GPU.

Megatron-core computes with ordinary PyTorch operations, which run anywhere, but asks for CUDA by name in many places.
Each replacement below answers one of them, and says which. They are for good and for the whole process: a process
without a GPU has no other use for these functions, which would only raise.
"""

import os
import queue
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Replacement:
    """``owner.name = value``, and why."""

    owner: Any
    name: str
    value: Any
    why: str

    def install(self) -> None:
        """Put the replacement in place; again does no harm."""
        setattr(self.owner, self.name, self.value)


def has_gpu() -> bool:
    """Whether this process can use a GPU."""
    return torch.cuda.is_available()


def skip_compilation() -> None:
    """Turn `torch.compile` off where there is no GPU: for a few small functions it would take over a minute.

    Call it before Megatron-core is imported, which decorates those functions as it is. A value of
    ``TORCHDYNAMO_DISABLE`` that the user has set stands.
    """
    if not has_gpu():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def prepare_model() -> None:
    """What building and running a model of one process needs, in training or not."""
    if not has_gpu():
        _CURRENT_DEVICE.install()


def prepare_training() -> None:
    """What `megatron.training.pretrain` needs, with any number of processes. Call it after importing Megatron-core.

    Calling it again does no harm.
    """
    if has_gpu() or torch.cuda.synchronize is _nothing:
        return
    prepare_model()
    for replacement in (*_torch_replacements(), *_megatron_replacements()):
        replacement.install()
    _CudaMeansCPU().__enter__()


_CURRENT_DEVICE = Replacement(
    torch.cuda,
    "current_device",
    lambda: "cpu",
    "rotary embedding, decoding cache, sequence-parallel, pipeline and gradient buffers allocate there",
)


class _CudaMeansCPU(TorchFunctionMode):
    """Reads ``device="cuda"`` as the CPU: the schedules, the optimizer and the training loop write it out.

    Pinned memory is memory: context parallelism's rotary embedding asks for it, which raises without a driver.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs and "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))


class _Stream:
    """A CUDA stream where everything is done as it is called."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _nothing(self, *_: Any) -> None: ...

    wait_stream = wait_event = record_event = synchronize = _nothing


def _same(tensor_or_module: Any, *_: Any, **__: Any) -> Any:
    return tensor_or_module


def _nothing(*_: Any, **__: Any) -> None: ...


def _get_rng_state(*_: Any, **__: Any) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


_tensor_type = torch.Tensor.type


def _cuda_type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    found = _tensor_type(tensor, *args, **kwargs)
    if not isinstance(found, str) or found.startswith("torch.cuda."):  # PyTorch may come back here from inside
        return found
    return found.replace("torch.", "torch.cuda.", 1)


def _torch_replacements() -> tuple[Replacement, ...]:
    cuda = torch.cuda
    return (
        Replacement(cuda, "synchronize", _nothing, "pipeline receives wait so; timers, too"),
        Replacement(cuda, "empty_cache", _nothing, "called after set-up and between phases"),
        Replacement(cuda, "Stream", _Stream, "data-parallel gradients are built on a stream of their own"),
        Replacement(cuda, "stream", lambda *_: nullcontext(), "and entered so"),
        Replacement(cuda, "current_stream", _Stream, "gradient reduction waits for it"),
        Replacement(cuda, "get_rng_state", _get_rng_state, "checkpoints save it; the generator tracker forks it"),
        Replacement(cuda, "set_rng_state", _set_rng_state, "checkpoints restore it"),
        Replacement(cuda, "manual_seed", torch.manual_seed, "the generator tracker seeds its generators"),
        Replacement(
            torch.Tensor, "cuda", _same, "a tied embedding on two pipeline stages is moved before it is summed"
        ),
        Replacement(torch.nn.Module, "cuda", _same, "the model is moved when built"),
        Replacement(torch.Tensor, "type", _cuda_type, "gradient clipping and the bf16 optimizer compare type names"),
    )


class _ResultsQueue:
    """Gives a queue within this process until one to another process is asked for, which writes in the background."""

    def __init__(self, between_processes: Callable[[str], Any]) -> None:
        self._queue: Any = queue.Queue()
        self._between_processes = getattr(between_processes, "_between_processes", between_processes)

    def __call__(self, mp_mode: str | None = None) -> Any:
        if mp_mode is not None:
            self._queue = self._between_processes(mp_mode)
        return self._queue


def _megatron_replacements() -> tuple[Replacement, ...]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from megatron.training import arguments, training

    return (
        Replacement(
            filesystem_async,
            "get_write_results_queue",
            _ResultsQueue(filesystem_async.get_write_results_queue),
            "a checkpoint is written by this process, yet its results go through a server process, which takes seconds "
            "to start and outlives a kill",
        ),
        Replacement(random, "_get_cuda_rng_state", _get_rng_state, "dropout, sequence parallelism and recomputation"),
        Replacement(random, "_set_cuda_rng_state", _set_rng_state, "fork the generator, which is the CPU's here"),
        Replacement(arguments, "get_device_arch_version", lambda: 9, "flags are checked against the GPU's generation"),
        Replacement(training, "initialize_megatron", _initialize_megatron, "refuses to start, and sets up no groups"),
    )


def _initialize_megatron(*args: Any, **kwargs: Any) -> None:
    """Start Megatron on gloo, with one device pretended for as long as it looks whether to set up groups and seeds."""
    from datetime import timedelta

    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import get_args
    from megatron.training.initialize import initialize_megatron

    flags = get_args()
    if flags.async_save:
        # The worker that lives on looks for its GPU and dies; one forked for each checkpoint writes as well.
        flags.use_persistent_ckpt_worker = False
        filesystem_async.get_write_results_queue("fork")
    timeout = timedelta(minutes=flags.distributed_timeout_minutes)
    torch.distributed.init_process_group(flags.distributed_backend, timeout=timeout)
    device_count = torch.cuda.device_count
    pretended = Replacement(torch.cuda, "device_count", lambda: 1, "none found means no groups and no seeds")
    try:
        pretended.install()
        initialize_megatron(*args, **{**kwargs, "allow_no_cuda": True})
    finally:
        torch.cuda.device_count = device_count
