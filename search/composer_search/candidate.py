"""A candidate: the tiny model of one sequence.

It is the model of MAD (Poli et al., arXiv 2403.17844): an embedding, a pre-norm residual block ``x + block(norm(x))``
for each letter in any order, a final norm and an untied output layer. Positions reach it through the rotary embedding
of attention alone. The task 'compression' puts an auto-encoder's head on the same stack.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence


@dataclass(frozen=True, kw_only=True)
class Widths:
    """The widths of a candidate; the defaults are MAD's.

    Attributes:
        hidden_size: Width of the residual stream.
        num_heads: Attention heads; they divide hidden_size into even parts.
        ffn_hidden_size: Inner width of the SwiGLU MLP.
    """

    hidden_size: int = 128
    num_heads: int = 16
    ffn_hidden_size: int = 352

    def __post_init__(self) -> None:
        """Raise a `UsageError` where the widths do not fit together."""
        if min(self.hidden_size, self.num_heads, self.ffn_hidden_size) < 1:
            raise UsageError(f"{self}: expected widths of at least 1")
        if self.hidden_size % (2 * self.num_heads):
            expected = "a multiple of twice num_heads, since rotary embeddings turn pairs"
            raise UsageError(f"hidden_size={self.hidden_size}, num_heads={self.num_heads}; expected {expected}")


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions (Su et al., arXiv 2104.09864, base 10,000)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.num_heads = widths.num_heads
        self.query_key_value = nn.Linear(widths.hidden_size, 3 * widths.hidden_size)
        self.output = nn.Linear(widths.hidden_size, widths.hidden_size)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [batch, length, hidden] over the positions up to each; the result has the same shape."""
        batch, length, hidden = x.shape
        parts = self.query_key_value(x).view(batch, length, 3, self.num_heads, hidden // self.num_heads)
        query_key, value = parts.permute(2, 0, 3, 1, 4).split([2, 1])
        query, key = rotate(query_key)
        mixed = F.scaled_dot_product_attention(query, key, value[0], is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, hidden))


def rotate(x: Tensor) -> Tensor:
    """Turn each pair (2i, 2i + 1) of the last dimension of x [..., length, width] by position · 10000^(-2i/width)."""
    return turn(x, rotation(x.shape[-2], x.shape[-1], x.device))


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Multiply the pairs (2i, 2i + 1) of the last dimension of x [..., length, width] by turns [length, width/2]."""
    wide = x.float() if x.dtype == torch.bfloat16 else x  # there are no complex numbers of bfloat16
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


@functools.lru_cache(maxsize=16)
def rotation(length: int, width: int, device: torch.device) -> Tensor:
    """The unit complex numbers [length, width/2] at the angles position · 10000^(-2i/width)."""
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


class SwiGLU(nn.Module):
    """The gated MLP ``down(silu(gate(x)) · up(x))`` without biases (Shazeer, arXiv 2002.05202)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.gate_up = nn.Linear(widths.hidden_size, 2 * widths.ffn_hidden_size, bias=False)
        self.down = nn.Linear(widths.ffn_hidden_size, widths.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map each position of x [batch, length, hidden]; the result has the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


_BLOCKS: dict[str, type[Attention] | type[SwiGLU]] = {"A": Attention, "M": SwiGLU}


def require_blocks(sequence: CompositeSequence) -> None:
    """Raise a `UsageError` if the sequence holds a primitive that the proxy has no block for."""
    if unknown := set(sequence) - set(_BLOCKS):
        have = ", ".join(_BLOCKS)
        raise UsageError(f"{sequence}: the proxy model has no block for {min(unknown)!r}; it has {have}")


class Candidate(nn.Module):
    """The model of one sequence: tokens int64 [batch, length] to logits [batch, length, vocab_size].

    Args:
        sequence: The blocks, in order.
        vocab_size: Rows of the embedding and of the output layer.
        widths: The widths.
        autoencoder: Rebuild the tokens from the stack's last position, as MAD's 'compression' asks, instead of
            predicting one token at each position.

    Raises:
        UsageError: If the sequence holds a primitive that the proxy has no block for.
    """

    def __init__(
        self, sequence: CompositeSequence, vocab_size: int, widths: Widths, *, autoencoder: bool = False
    ) -> None:
        super().__init__()
        require_blocks(sequence)
        hidden = widths.hidden_size
        self.embedding = nn.Embedding(vocab_size, hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-5) for _ in sequence)
        self.blocks = nn.ModuleList(_BLOCKS[letter](widths) for letter in sequence)
        self.decoder = _decoder(hidden) if autoencoder else None
        self.final_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.unembedding = nn.Linear(hidden, vocab_size)
        nn.init.zeros_(self.unembedding.bias)
        if autoencoder:
            self.apply(_small_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits [batch, length, vocab_size] of tokens [batch, length]."""
        x = self.embedding(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        if self.decoder is not None:
            positions = sinusoids(tokens.shape[1], x.shape[2], x.device)
            x = self.decoder(x[:, -1:] + positions)
        return self.unembedding(self.final_norm(x))


def _decoder(hidden: int) -> nn.Sequential:
    """Two layers for each position alone, with a norm before each."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.RMSNorm(hidden, eps=1e-5), nn.Linear(hidden, hidden), nn.GELU()]
    return nn.Sequential(*layers)


def _small_weights(module: nn.Module) -> None:
    """Draw a linear layer's weights from N(0, 0.02), as MAD does for its auto-encoder alone."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions [length, width]: sines, then cosines, of the angles of `rotation`."""
    turns = rotation(length, width, device)
    return torch.cat([turns.imag, turns.real], dim=-1)
