"""The forward passes of decoding: over prompts, in chunks, and over one new token of every request.

Both are the model's own forward pass by `composer_kernels`: a residual addition and the norm after it are one kernel,
and in the pass over one token rotation, append and attention are one call. With few requests norm, product, SwiGLU and
addition are one kernel as well, so that an MLP takes two and attention four. On a CPU the same operations are plain
PyTorch.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from composer_kernels.add_rms_norm import add_rms_norm
from composer_kernels.attention import attention
from composer_kernels.decode_attention import decode_attention
from composer_kernels.linear_decode import linear_decode
from composer_kernels.overlap import Overlap
from composer_kernels.rms_norm import rms_norm
from composer_kernels.rope import rope_qk
from composer_kernels.swiglu import swiglu
from composer_megatron.inference.cache import LayerCache, cache_bytes, make_cache
from composer_megatron.inference.limits import SPARE
from composer_megatron.inference.weights import Block, Weights

FUSED_ROWS = 8
"""Requests up to which products are `linear_decode`'s, and not cuBLAS's with other kernels around them.

On an H100 a step of Llama 1b at 512 tokens takes 1.08 ms by it and 1.30 by cuBLAS with one request, 1.22 and 1.37 with
eight, and 1.77 and 1.52 with 32 (`benchmarks/bench_inference.py`).
"""


def best_overlap(rows: int) -> Overlap:
    """How far these kernels should overlap in a step of so many requests.

    Up to the tail saves 2.8 to 4.2 % of a step of one request there, and costs 5 % with eight.
    """
    return "tail" if rows == 1 else "none"


class Decoder:
    """A model with the cache of a batch of requests.

    Attributes:
        weights: The model's.
        rows: Most requests at a time.
        capacity: Most tokens of a request, new ones included.
        cache: Of each block; None where the block has none.
        fused: Whether a pass over one token is by `linear_decode`.
        overlap: How far its kernels overlap.
    """

    def __init__(
        self, weights: Weights, rows: int, capacity: int, *, fused: bool | None = None, overlap: Overlap | None = None
    ) -> None:
        """Allocate the cache.

        Args:
            weights: The model's.
            rows: As the attribute.
            capacity: As the attribute.
            fused: As the attribute; None for where it pays.
            overlap: As the attribute, on GPUs that can; None for the best.
        """
        self.weights, self.rows, self.capacity = weights, rows, capacity
        self.fused = (weights.embedding.is_cuda and rows <= FUSED_ROWS) if fused is None else fused
        self.overlap = best_overlap(rows) if overlap is None else overlap
        self.cache = make_cache(weights, rows, capacity)
        positions = torch.arange(capacity + SPARE + 1, dtype=torch.float32, device=weights.embedding.device)
        angles = torch.outer(positions, weights.frequencies)
        wide = torch.promote_types(torch.float32, weights.embedding.dtype)
        self._cos, self._sin = angles.cos().to(wide), angles.sin().to(wide)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values, as allocated."""
        return cache_bytes(self.cache)

    def prefill(self, tokens: Tensor, rows: Tensor, lengths: Tensor, chunk: int) -> Tensor:
        """Run prompts and fill their cache.

        Padding at the end changes nothing: no query before it sees it, and what it leaves in the cache lies past the
        request's length, which nothing reads.

        Args:
            tokens: (b, s), padded at the end with anything.
            rows: Which rows of the cache the requests have, (b,).
            lengths: Tokens of each prompt, (b,), 1 to s.
            chunk: Most tokens of a request in a pass; more passes need less memory.

        Returns:
            Logits after each prompt's last token, (b, v).
        """
        last: Tensor | None = None
        for start in range(0, tokens.shape[1], chunk):
            part = tokens[:, start : start + chunk]
            ends = lengths.clamp(max=start + part.shape[1])
            hidden = self._run(part, rows, start, ends)
            place = lengths - 1 - start
            found = hidden[place.clamp(0, len(hidden) - 1), torch.arange(len(rows), device=rows.device)]
            here = ((place >= 0) & (place < len(hidden)))[:, None]
            last = found if last is None else torch.where(here, found, last)
        return F.linear(cast(Tensor, last), self.weights.output)

    def _run(self, tokens: Tensor, rows: Tensor, start: int, ends: Tensor) -> Tensor:
        """The hidden states of a chunk of prompts, (s, b, h), normed."""
        residual, delta = F.embedding(tokens.t(), self.weights.embedding), None
        for block, cache in zip(self.weights.blocks, self.cache, strict=True):
            x, residual = self._norm(delta, residual, block.norm)
            inner = F.linear(x, block.first)
            inner = swiglu(inner) if cache is None else self._attend(inner, block, cache, rows, start, ends)
            delta = F.linear(inner, block.second)
        return self._norm(delta, residual, self.weights.final_norm)[0]

    def _attend(
        self, projected: Tensor, block: Block, cache: LayerCache, rows: Tensor, start: int, ends: Tensor
    ) -> Tensor:
        query, key, value = self._split(projected)
        query, key = rope_qk(query, key, self._cos, self._sin, position_offset=start)
        keys, values = cache.extend(rows, start, ends, key.transpose(0, 1), value.transpose(0, 1))
        before = None if block.window is None else block.window - 1
        seen = cast(Tensor, attention(query.transpose(0, 1), keys, values, window=before))
        return seen.transpose(0, 1).flatten(-2)

    def decode(self, tokens: Tensor, lengths: Tensor, logits: Tensor) -> None:
        """Run one token of every row, and append it to the cache where it has room.

        Args:
            tokens: (rows,).
            lengths: Tokens of each row before this one, (rows,); at most `SPARE` more than the capacity.
            logits: Takes the logits, (rows, v).
        """
        if self.fused:
            self._decode_fused(tokens, lengths, logits)
            return
        residual, delta = F.embedding(tokens, self.weights.embedding), None
        for block, cache in zip(self.weights.blocks, self.cache, strict=True):
            x, residual = self._norm(delta, residual, block.norm)
            inner = F.linear(x, block.first)
            inner = swiglu(inner) if cache is None else self._attend_to_cache(inner, cache, lengths)
            delta = F.linear(inner, block.second)
        torch.mm(self._norm(delta, residual, self.weights.final_norm)[0], self.weights.output.t(), out=logits)

    def _decode_fused(self, tokens: Tensor, lengths: Tensor, logits: Tensor) -> None:
        weights, stream = self.weights, F.embedding(tokens, self.weights.embedding)
        multiply = functools.partial(linear_decode, eps=weights.epsilon, overlap=self.overlap)
        for block, cache in zip(weights.blocks, self.cache, strict=True):
            inner = multiply(stream, block.first, norm_weight=block.norm, gated=cache is None)
            if cache is not None:
                inner = self._attend_to_cache(inner, cache, lengths)
            stream = multiply(inner, block.second, residual=stream)
        multiply(stream, weights.output, norm_weight=weights.final_norm, out=logits)

    def _attend_to_cache(self, projected: Tensor, cache: LayerCache, lengths: Tensor) -> Tensor:
        query, key, value = self._split(projected)
        output = decode_attention(
            query,
            cache.keys,
            cache.values,
            lengths,
            new_k=key,
            new_v=value,
            page_table=cache.page_table,
            cos=self._cos,
            sin=self._sin,
            window=cache.window,
        )
        return output.flatten(-2)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads, (…, heads or groups, head_dim), views of the projection."""
        weights = self.weights
        heads = projected.unflatten(-1, (weights.heads + 2 * weights.groups, weights.head_dim))
        query, key, value = heads.split((weights.heads, weights.groups, weights.groups), dim=-2)
        return query, key, value

    def _norm(self, delta: Tensor | None, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual and delta, and their sum."""
        if delta is None:
            return rms_norm(residual, weight, self.weights.epsilon), residual
        return add_rms_norm(delta, residual, weight, self.weights.epsilon)
