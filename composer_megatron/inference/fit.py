"""Try on a GPU whether as many requests decode as `composer_megatron.kv` says."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from composer_megatron.architecture import Architecture
from composer_megatron.errors import ComposerError
from composer_megatron.inference.cache import make_cache
from composer_megatron.inference.engine import Admission, Engine
from composer_megatron.inference.limits import PREFILL_TOKENS, SPARE
from composer_megatron.inference.sampling import GREEDY
from composer_megatron.inference.weights import Weights, random_weights
from composer_megatron.kv import CUDA_BYTES


@dataclass(frozen=True)
class Trial:
    """A batch that was decoded.

    Attributes:
        batch: Requests.
        context: Tokens of each.
        cache: Bytes that allocating the cache requested.
        cache_formula: Bytes that it should have.
        used: Bytes of the GPU that this process used at the peak, CUDA's own among them; None where memory ran out.
        others: Bytes that other processes held before or after it, as far as can be seen from here.
    """

    batch: int
    context: int
    cache: int
    cache_formula: int
    used: int | None
    others: int


def try_batch(architecture: Architecture, weights: Weights, batch: int, context: int) -> Trial:
    """Allocate a batch, run as many whole prompts as a pass takes, decode some steps, and do both once more.

    Raises:
        ComposerError: If there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise ComposerError("checking what fits needs a CUDA GPU, and there is none")
    used: int | None = None
    held = 0
    formula = batch * architecture.state_bytes(context)
    _release()
    others = others_bytes()
    try:
        held = _cache_bytes(weights, batch, context)
        _release()  # else copies are cut out of what the cache has left, and the next cache needs more
        torch.cuda.reset_peak_memory_stats()
        used = _decode(weights, batch, context)
    except torch.OutOfMemoryError:
        used = None
    _release()
    return Trial(batch, context, held, formula, used, max(others, others_bytes()))


def _decode(weights: Weights, batch: int, context: int) -> int:
    """Run prompts of a whole pass, steps, and the prompts again beside the captured step; bytes used at the peak."""
    copies = [torch.empty_like(block.first) for block in weights.blocks if block.attends]  # which a run's weights have
    engine = Engine(weights, batch, context)
    together = max(1, min(batch, PREFILL_TOKENS // context))
    admissions = [Admission(row, [1] * (context - SPARE), GREEDY) for row in range(together)]
    for _ in range(2):
        engine.admit(admissions)
        for _ in range(SPARE // 4):
            engine.step()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_reserved() + min(_outside_bytes(), CUDA_BYTES)
    del copies
    return used


def _release() -> None:
    """Give back what is not in use, of trials and models before as well: the peak would count it.

    cuBLAS keeps a workspace of 32 MiB for every stream that it ever ran on, those of earlier captures among them.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def others_bytes() -> int:
    """Bytes of the GPU that other processes hold: what PyTorch does not, beyond the sum that is left for CUDA's own."""
    return max(0, _outside_bytes() - CUDA_BYTES)


def _outside_bytes() -> int:
    """Bytes in use that PyTorch's allocator does not hold: CUDA's own, and other processes'."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def weights_for(architecture: Architecture) -> Weights:
    """Random weights in bf16 on the GPU."""
    _release()
    return random_weights(architecture, torch.bfloat16, torch.device("cuda"))


def _cache_bytes(weights: Weights, batch: int, context: int) -> int:
    """Bytes of keys and values as the allocator counts what was asked for, tables of windows left out."""
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    cache = make_cache(weights, batch, context)
    held = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
    tables = [layer.page_table for layer in cache if layer is not None and layer.page_table is not None]
    return int(held - sum({table.data_ptr(): table.nbytes for table in tables}.values()))
