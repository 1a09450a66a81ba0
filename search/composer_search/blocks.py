"""The blocks A and M of the proxy model, its widths, and the rotary embedding.

They are MAD's (Poli et al., arXiv 2403.17844); `composer_search.mixers` has the blocks of the other primitives.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composer_megatron.errors import UsageError


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
    """Causal multi-head attention with rotary positions (Su et al., arXiv 2104.09864, base 10,000).

    Attributes:
        window: How many positions each sees, its own included; None for all up to it.
    """

    window: int | None = None

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
        seen = None
        if self.window is not None and self.window < length:
            seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril().triu(1 - self.window)
        mixed = F.scaled_dot_product_attention(query, key, value[0], attn_mask=seen, is_causal=seen is None)
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
