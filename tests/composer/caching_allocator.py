"""A model of PyTorch's caching allocator and of what decoding asks of it: an oracle for `composer_megatron.kv`.

The allocator's rules (c10/cuda/CUDACachingAllocator.cpp, default settings): sizes are rounded up to 512 bytes; up to
1 MiB come from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, larger ones get a segment of whole 2 MiB; a
request takes the smallest free block of its stream that is large enough, and leaves the rest of it free; freed
neighbours become one; only segments that are free altogether are given back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from composer_megatron.architecture import Architecture
from composer_megatron.inference.limits import PREFILL_TOKENS, SPARE

MIB = 2**20
WORKSPACE = 32 * MIB


@dataclass(frozen=True, order=True)
class Block:
    size: int
    segment: int
    offset: int
    whole: int
    pool: tuple[int, bool]


class Allocator:
    def __init__(self) -> None:
        self.stream = self.reserved = self.peak = self.segments = 0
        self.free = list[Block]()

    def take(self, size: int) -> Block:
        size = -(-size // 512) * 512
        pool = (self.stream, size <= MIB)
        block = min((block for block in self.free if block.pool == pool and block.size >= size), default=None)
        if block is None:
            block = self._segment(size, pool)
        else:
            self.free.remove(block)
        if block.size - size >= (512 if pool[1] else MIB + 1):
            self.free.append(replace(block, size=block.size - size, offset=block.offset + size))
            block = replace(block, size=size)
        return block

    def _segment(self, size: int, pool: tuple[int, bool]) -> Block:
        whole = 2 * MIB if pool[1] else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.segments += 1
        self.reserved += whole
        self.peak = max(self.peak, self.reserved)
        return Block(whole, self.segments, 0, whole, pool)

    def give(self, *blocks: Block | None) -> None:
        for block in filter(None, blocks):
            joined = block
            for other in [other for other in self.free if other.segment == block.segment]:
                if block.offset == other.offset + other.size or other.offset == block.offset + block.size:
                    self.free.remove(other)
                    size, offset = joined.size + other.size, min(joined.offset, other.offset)
                    joined = replace(joined, size=size, offset=offset)
            self.free.append(joined)

    def empty(self) -> None:
        self.reserved -= sum(block.whole for block in self.free if block.size == block.whole)
        self.free = [block for block in self.free if block.size != block.whole]


def peak(architecture: Architecture, batch: int, context: int, prompts: int, *, copies: bool) -> int:
    """Bytes reserved at the most by weights, a batch, passes over `prompts` prompts, and a captured step.

    Args:
        architecture: Of attention and MLP blocks.
        batch: Requests.
        context: Tokens of each.
        prompts: That are run together.
        copies: Whether attention's first projections are there twice, as a run's are.
    """
    shape, allocator = architecture.shape, Allocator()
    padded = min(context, -(-(context - SPARE) // 128) * 128)
    queries, keys = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_query_groups))
    wide = {"A": (queries + 2 * keys, queries), "M": (2 * shape.ffn_hidden_size, shape.ffn_hidden_size)}
    for _ in range(1 if shape.tied_embeddings else 2):
        allocator.take(2 * shape.vocab_size * shape.hidden_size)
    for letter in architecture.sequence:
        for width in (1, *wide[letter], wide[letter][0] if copies and letter == "A" else 0):
            allocator.take(2 * width * shape.hidden_size)
    for size in [2 * batch * context * keys] * (2 * architecture.sequence.count("A")):
        allocator.take(size)
    for size in (WORKSPACE, *[2 * (context + SPARE + 1) * shape.head_dim] * 3, 8 * batch * (context + SPARE + 1)):
        allocator.take(size)
    logits = 2 * batch * shape.vocab_size
    allocator.take(logits)
    run_prompts(allocator, architecture, padded, prompts)
    kept = allocator.take(logits)
    allocator.stream = 1
    allocator.take(WORKSPACE)
    run(allocator, architecture, batch, 0)
    allocator.empty()  # as torch.cuda.graph does first
    allocator.stream = 2  # a graph has a pool of its own
    run(allocator, architecture, batch, 0)
    allocator.stream = 0
    allocator.give(kept)
    run_prompts(allocator, architecture, padded, prompts)
    return allocator.peak


def run_prompts(allocator: Allocator, architecture: Architecture, padded: int, prompts: int) -> None:
    for start in range(0, padded, PREFILL_TOKENS):
        end = min(padded, start + PREFILL_TOKENS)
        run(allocator, architecture, (end - start) * prompts, end * prompts if start else 0)


def run(allocator: Allocator, architecture: Architecture, tokens: int, past: int) -> None:
    """A pass as `Decoder` makes it, each result under the name that it has there, until the name gets the next one."""
    shape, take, give = architecture.shape, allocator.take, allocator.give
    stream, inner_width = 2 * tokens * shape.hidden_size, 2 * tokens * shape.ffn_hidden_size
    queries, keys = (
        2 * tokens * count * shape.head_dim for count in (shape.num_attention_heads, shape.num_query_groups)
    )
    residual, x, delta, inner = take(stream), None, None, None
    for letter in architecture.sequence:
        normed = take(stream)
        if delta is not None:
            total = take(stream)
            give(x, residual)
            residual = total
        x = normed
        projected = take(2 * inner_width if letter == "M" else queries + 2 * keys)
        give(inner)
        if letter == "M":
            inner = take(inner_width)
        else:
            beside = [take(queries), take(keys)]
            beside += [take(2 * past * shape.num_query_groups * shape.head_dim) for _ in range(2 if past else 0)]
            inner = take(queries)
            give(take(4 * tokens * shape.num_attention_heads), *beside)
        give(projected)
        result = take(stream)
        give(delta)
        delta = result
    last = [take(stream), take(stream)]
    give(*last, residual, x, delta, inner)
