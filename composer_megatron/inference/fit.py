"""Try on a GPU whether as many requests decode as `composer_megatron.kv` says."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from composer_megatron.architecture import Architecture
from composer_megatron.errors import ComposerError
from composer_megatron.inference.cache import make_cache
from composer_megatron.inference.engine import Admission, Engine
from composer_megatron.inference.limits import SPARE
from composer_megatron.inference.sampling import GREEDY
from composer_megatron.inference.weights import Weights, random_weights


@dataclass(frozen=True)
class Trial:
    """A batch that was decoded.

    Attributes:
        batch: Requests.
        context: Tokens of each.
        cache: Bytes that allocating the cache requested.
        cache_formula: Bytes that it should have.
        used: Bytes of the GPU in use at the peak, CUDA's own among them; None where memory ran out.
    """

    batch: int
    context: int
    cache: int
    cache_formula: int
    used: int | None


def try_batch(architecture: Architecture, weights: Weights, batch: int, context: int) -> Trial:
    """Allocate a batch, run one prompt of the whole length, and decode some steps.

    Raises:
        ComposerError: If there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise ComposerError("checking what fits needs a CUDA GPU, and there is none")
    used: int | None = None
    held = 0
    formula = batch * architecture.state_bytes(context)
    try:
        held = _cache_bytes(weights, batch, context)
        engine = Engine(weights, batch, context)
        engine.admit([Admission(0, [1] * (context - SPARE), GREEDY)])
        after_prompt = _used_bytes()
        for _ in range(SPARE // 2):
            engine.step()
        used = max(after_prompt, _used_bytes())
        del engine
    except torch.OutOfMemoryError:
        used = None
    gc.collect()
    torch.cuda.empty_cache()
    return Trial(batch, context, held, formula, used)


def _used_bytes() -> int:
    """Of the GPU, what the allocator keeps for its next use among them: the peak since it gave any back."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def weights_for(architecture: Architecture) -> Weights:
    """Random weights in bf16 on the GPU."""
    return random_weights(architecture, torch.bfloat16, torch.device("cuda"))


def _cache_bytes(weights: Weights, batch: int, context: int) -> int:
    """Bytes of keys and values as the allocator counts what was asked for, tables of windows left out."""
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    cache = make_cache(weights, batch, context)
    held = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
    tables = [layer.page_table for layer in cache if layer is not None and layer.page_table is not None]
    return int(held - sum({table.data_ptr(): table.nbytes for table in tables}.values()))
