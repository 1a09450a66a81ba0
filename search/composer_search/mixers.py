"""The blocks W, E, S, G and L of the proxy model: small, batched, in plain PyTorch.

Each is what the primitive of that letter computes (`composer_megatron.widths` cites the papers), at widths that follow
from those of A and M: heads as wide as attention's, states of a few head widths, experts that together cost a token
what an M costs. What only training at size needs is left out: experts have no loss that balances them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composer_megatron.recurrences import causal_convolution, scan, unit
from composer_search.blocks import Attention, Widths, rotate

WINDOW = 32
"""Positions that a W sees: a quarter of MAD's sequences of 128."""

NUM_EXPERTS, TOP_K = 8, 2
"""Experts of an E, and how many a token goes to."""

CONV_WIDTH = 4
"""Positions that the convolution of an S or a G sees."""


class WindowAttention(Attention):
    """Attention to the last `WINDOW` positions."""

    window = WINDOW


class Experts(nn.Module):
    """SwiGLU experts, of which each position takes the `TOP_K` that a router scores highest, weighted by softmax.

    All experts are computed for all positions, and those not taken weighted by zero: at this size that is the fastest.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        hidden, inner = widths.hidden_size, max(1, widths.ffn_hidden_size // TOP_K)
        self.router = nn.Linear(hidden, NUM_EXPERTS, bias=False)
        self.gate_up = _matrices(NUM_EXPERTS, hidden, 2 * inner)
        self.down = _matrices(NUM_EXPERTS, inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map each position of x [batch, length, hidden]; the result has the same shape."""
        scores, chosen = self.router(x).topk(TOP_K, dim=-1)
        shares = scores.softmax(-1)
        weights = shares.new_zeros(*x.shape[:-1], NUM_EXPERTS).scatter(-1, chosen, shares)
        gate, up = torch.einsum("blh,ehi->beli", x, self.gate_up).chunk(2, dim=-1)
        mapped = torch.einsum("beli,eih->belh", F.silu(gate) * up, self.down)
        return torch.einsum("ble,belh->blh", weights.to(mapped.dtype), mapped)


def _matrices(number: int, inputs: int, outputs: int) -> nn.Parameter:
    """Matrices [number, inputs, outputs], drawn as `torch.nn.Linear` draws one."""
    bound = 1 / math.sqrt(inputs)
    return nn.Parameter(torch.empty(number, inputs, outputs).uniform_(-bound, bound))


class Mamba2(nn.Module):
    """Mamba-2: twice attention's heads, one group, states of twice a head's width."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.head_dim = widths.hidden_size // widths.num_heads
        heads, self.inner, self.state_dim = 2 * widths.num_heads, 2 * widths.hidden_size, 2 * self.head_dim
        channels = self.inner + 2 * self.state_dim
        self.project = nn.Linear(widths.hidden_size, self.inner + channels + heads, bias=False)
        self.conv_weight = _convolution(channels)
        self.conv_bias = nn.Parameter(torch.empty(channels).uniform_(-0.5, 0.5))
        steps = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.log_rate = _log_rates(heads)
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.output = nn.Linear(self.inner, widths.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [batch, length, hidden] over the positions up to each; the result has the same shape."""
        gate, channels, steps = self.project(x).split(
            [self.inner, self.inner + 2 * self.state_dim, len(self.skip)], dim=-1
        )
        mixed = _wide(F.silu(causal_convolution(channels, self.conv_weight, self.conv_bias)))
        value, key, query = mixed.split([self.inner, self.state_dim, self.state_dim], dim=-1)
        value = value.unflatten(-1, (-1, self.head_dim))
        step = F.softplus(_wide(steps) + self.step_bias)
        key, query = (part[:, :, None].expand(-1, -1, len(self.skip), -1) for part in (key, query))
        y, _ = scan(query, key, value * step[..., None], -step * self.log_rate.exp())
        y = (y + value * self.skip[:, None]).flatten(-2).to(x.dtype)
        return self.output(self.norm(y * F.silu(gate)))


class DeltaNet(nn.Module):
    """Gated DeltaNet: keys of attention's heads and width, and twice as many values."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        hidden = widths.hidden_size
        self.head_dim, self.heads = hidden // widths.num_heads, 2 * widths.num_heads
        self.project = nn.Linear(hidden, 6 * hidden + 2 * self.heads, bias=False)
        self.conv_weight = _convolution(4 * hidden)
        self.step_bias = nn.Parameter(torch.ones(self.heads))
        self.log_rate = _log_rates(self.heads)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.output = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [batch, length, hidden] over the positions up to each; the result has the same shape."""
        hidden = x.shape[-1]
        channels, gate, strength, decay = self.project(x).split(
            [4 * hidden, 2 * hidden, self.heads, self.heads], dim=-1
        )
        mixed = _wide(F.silu(causal_convolution(channels, self.conv_weight)))
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)) for part in mixed.split([hidden, hidden, 2 * hidden], dim=-1)
        )
        query, key = (unit(part).repeat_interleave(2, dim=2) for part in (query, key))
        log_decay = -self.log_rate.exp() * F.softplus(_wide(decay) + self.step_bias)
        y, _ = scan(query * self.head_dim**-0.5, key, value, log_decay, _wide(strength).sigmoid())
        y = self.norm(y.to(x.dtype)) * F.silu(gate.unflatten(-1, (-1, self.head_dim)))
        return self.output(y.flatten(-2))


class LatentAttention(nn.Module):
    """Latent attention: keys and values from a latent vector of four head widths, and half a head's rotary part."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        hidden, self.heads = widths.hidden_size, widths.num_heads
        self.head_dim = hidden // self.heads
        self.rope_dim = self.head_dim // 2 + self.head_dim // 2 % 2
        self.query = nn.Linear(hidden, self.heads * (self.head_dim + self.rope_dim), bias=False)
        self.latent = nn.Linear(hidden, 4 * self.head_dim + self.rope_dim, bias=False)
        self.norm = nn.RMSNorm(4 * self.head_dim, eps=1e-5)
        self.key_value = nn.Linear(4 * self.head_dim, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [batch, length, hidden] over the positions up to each; the result has the same shape."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, query_turned = query.split([self.head_dim, self.rope_dim], dim=-1)
        latent, key_turned = self.latent(x).split([4 * self.head_dim, self.rope_dim], dim=-1)
        key, value = self.key_value(self.norm(latent)).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(2, dim=-1)
        shared = rotate(key_turned)[:, None].expand(-1, self.heads, -1, -1)
        mixed = F.scaled_dot_product_attention(
            torch.cat([query, rotate(query_turned)], dim=-1), torch.cat([key, shared], dim=-1), value, is_causal=True
        )
        return self.output(mixed.transpose(1, 2).flatten(-2))


def _convolution(channels: int) -> nn.Parameter:
    """Weights [channels, width], drawn as PyTorch draws those of a convolution of one channel."""
    return nn.Parameter(torch.empty(channels, CONV_WIDTH).uniform_(-0.5, 0.5))


def _log_rates(heads: int) -> nn.Parameter:
    """How fast each head's state decays, from U(1, 16) as Mamba-2 has it."""
    return nn.Parameter(torch.empty(heads).uniform_(1, 16).log())


def _wide(x: Tensor) -> Tensor:
    """In fp32 or wider, for recurrences."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
