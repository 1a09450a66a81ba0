"""The decoding cache: keys and values of attention blocks, and of no other block.

A block that sees all keys keeps ``capacity`` tokens a request, one with a window no more than its window: token n lies
in place n mod window, which token n - window has just left. `decode_attention` reads such a ring through a page table
that names the request's one page for every stretch of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from composer_megatron.inference.limits import SPARE
from composer_megatron.inference.weights import Weights


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one attention block.

    Attributes:
        keys: (rows, places, groups, head_dim), rotated.
        values: Likewise.
        page_table: (rows, pages), where the places are a ring; else None.
        window: Tokens that a query sees, its own included; None for all.
    """

    keys: Tensor
    values: Tensor
    page_table: Tensor | None
    window: int | None

    def extend(self, rows: Tensor, start: int, ends: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put a chunk of tokens into the cache, and say what its queries attend to.

        Args:
            rows: Requests of the chunk, (b,).
            start: Position of the chunk's first token.
            ends: Tokens of each request up to the chunk's last one that is no padding, (b,).
            key: (b, s, groups, head_dim), padded at the end; rotated.
            value: Likewise.

        Returns:
            Keys and values, (b, t, groups, head_dim), of which the last s are the chunk's.
        """
        if self.page_table is None:
            stop = start + key.shape[1]
            self.keys[rows, start:stop] = key
            self.values[rows, start:stop] = value
            if start == 0:
                return key, value
            return self.keys[rows, :stop], self.values[rows, :stop]
        seen = tuple(self._with_past(cache, rows, start, new) for cache, new in self._pairs(key, value))
        for cache, new in self._pairs(key, value):
            self._turn(cache, rows, start, ends, new)
        return seen[0], seen[1]

    def _pairs(self, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.keys, key), (self.values, value)

    def _with_past(self, cache: Tensor, rows: Tensor, start: int, new: Tensor) -> Tensor:
        """The chunk behind those tokens of the ring that its first query sees, oldest first."""
        places = cache.shape[1]
        kept = min(start, places - 1)
        if kept == 0:
            return new
        past = torch.arange(start - kept, start, device=new.device) % places
        return torch.cat((cache[rows[:, None], past], new), 1)

    @staticmethod
    def _turn(cache: Tensor, rows: Tensor, start: int, ends: Tensor, new: Tensor) -> None:
        """Each place takes the newest of its tokens, if that is one of the chunk's."""
        places = torch.arange(cache.shape[1], device=new.device)
        newest = ends[:, None] - 1 - (ends[:, None] - 1 - places) % cache.shape[1]
        fresh = newest >= start
        index = (newest - start).clamp(min=0)
        taken = new.gather(1, index[:, :, None, None].expand(-1, -1, *new.shape[2:]))
        cache[rows] = torch.where(fresh[:, :, None, None], taken, cache[rows])


def make_cache(weights: Weights, rows: int, capacity: int) -> tuple[LayerCache | None, ...]:
    """The cache of each block, None where the block needs none.

    Args:
        weights: Say which blocks attend, and with which window.
        rows: Requests.
        capacity: Most tokens of a request.
    """
    like, tables = weights.embedding, dict[int, Tensor]()

    def layer(window: int | None) -> LayerCache:
        ring = window is not None and window < capacity
        places = window if ring and window is not None else capacity
        size = (rows, places, weights.groups, weights.head_dim)
        keys, values = (torch.zeros(size, dtype=like.dtype, device=like.device) for _ in range(2))
        if ring and places not in tables:
            request = torch.arange(rows, dtype=torch.int32, device=like.device)[:, None]
            tables[places] = request.repeat(1, (capacity + SPARE) // places + 1)
        return LayerCache(keys, values, tables[places] if ring else None, window)

    return tuple(layer(block.window) if block.attends else None for block in weights.blocks)


def cache_bytes(cache: tuple[LayerCache | None, ...]) -> int:
    """Bytes of keys and values, as allocated."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache if layer is not None)
