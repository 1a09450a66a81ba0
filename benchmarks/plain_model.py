"""A Composite in plain PyTorch for `torch.compile`: what one has without Megatron-core and without our kernels.

The same model as `composer_megatron.model` builds (RMSNorm, grouped-query attention with rotary embedding, SwiGLU with
gate and up in one matrix, no biases), written the way one writes it for the compiler: one graph, fused by Inductor,
with PyTorch's scaled dot-product attention. `PlainTrainer` keeps bf16 weights with fp32 masters and fp32 gradients, as
Megatron does; with ``masters=False`` weights, gradients and moments are all in bf16, which is less memory traffic and
not what one trains with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from composer_megatron.architecture import Architecture
from composer_megatron.shape import Shape


class Attention(nn.Module):
    """x + out(attention(qkv(norm(x))))."""

    def __init__(self, shape: Shape) -> None:
        """Build the block."""
        super().__init__()
        self.heads, self.groups, self.head_dim = shape.num_attention_heads, shape.num_query_groups, shape.head_dim
        width = self.heads * self.head_dim
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)
        self.qkv = nn.Linear(shape.hidden_size, width + 2 * self.groups * self.head_dim, bias=False)
        self.out = nn.Linear(width, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run the block on x (b, s, h) with the angles' cosines and sines (s, d / 2)."""
        batch, length, _ = x.shape
        heads = self.qkv(self.norm(x)).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.groups, self.groups], 1)
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.groups)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """x + down(silu(gate(norm(x))) · up(norm(x)))."""

    def __init__(self, shape: Shape) -> None:
        """Build the block."""
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)
        self.gate_up = nn.Linear(shape.hidden_size, 2 * shape.ffn_hidden_size, bias=False)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run the block on x (b, s, h); the angles are for attention."""
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


_BLOCKS: dict[str, Callable[[Shape], nn.Module]] = {"A": Attention, "M": MLP}


class PlainModel(nn.Module):
    """The language model: embedding, blocks, norm, output layer, mean cross-entropy."""

    def __init__(self, architecture: Architecture) -> None:
        """Build it; the output layer is the embedding where the shape ties them."""
        super().__init__()
        shape = self.shape = architecture.shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(_BLOCKS[letter](shape) for letter in architecture.sequence)
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of tokens (b, s) with labels (b, s)."""
        half = torch.arange(0, self.shape.head_dim, 2, device=tokens.device) / self.shape.head_dim
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        angles = torch.outer(positions.float(), float(self.shape.rope_theta) ** -half)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (b, heads, s, d), computed in fp32 and rounded once."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def fastest_attention(device: torch.device) -> AbstractContextManager[None]:
    """PyTorch's attention by cuDNN, the fastest it has on a Hopper GPU, else by FlashAttention 2, its first choice."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


class PlainTrainer:
    """Steps of a plain model: micro-batches, gradient accumulation, clipping, fused AdamW."""

    def __init__(self, architecture: Architecture, *, masters: bool, device: torch.device, dtype: torch.dtype) -> None:
        """Build the model and draw its weights; the optimizer's state comes with `add_state`.

        Args:
            architecture: What to train.
            masters: Whether to keep fp32 masters and fp32 gradients of the weights.
            device: Where.
            dtype: Of the weights.
        """
        with torch.device("meta"):
            model = PlainModel(architecture)
        self.model = model.to(dtype).to_empty(device=device)
        if architecture.shape.tied_embeddings:
            self.model.head.weight = self.model.embedding.weight  # `to_empty` parts them
        self.masters: list[Tensor] | None = [] if masters else None
        self.gradients: list[Tensor] = []
        self.optimizer: torch.optim.AdamW | None = None
        self.params = list(self.model.parameters())
        self.run: Callable[[Tensor, Tensor], Tensor] = self.model
        self.fill()

    def add_state(self) -> None:
        """Allocate masters, gradients and the optimizer."""
        trained: list[Tensor] = [*self.params]
        if self.masters is not None:
            self.masters = [param.detach().float().clone() for param in self.params]
            self.gradients = [torch.zeros_like(master) for master in self.masters]
            for master, gradient in zip(self.masters, self.gradients, strict=True):
                master.grad = gradient
            trained = self.masters
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @torch.no_grad()
    def fill(self) -> None:
        """Draw the weights (anew), and forget the moments."""
        for param in self.params:
            if param.dim() > 1:
                param.normal_(0.0, 0.02)
            else:
                param.fill_(1.0)
        for param, master in zip(self.params, self.masters or (), strict=False):
            master.copy_(param)
        for state in self.optimizer.state.values() if self.optimizer else ():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].zero_()

    def tensors(self) -> Iterator[Tensor]:
        """All that stays in memory between steps."""
        yield from self.params
        yield from (*(self.masters or ()), *self.gradients)
        for state in self.optimizer.state.values() if self.optimizer else ():
            yield from (state["exp_avg"], state["exp_avg_sq"])

    def backward(self, tokens: Tensor, share: float) -> Tensor:
        """Forward and backward over a micro-batch of tokens (b, s + 1), whose loss counts `share`; returns the loss."""
        with fastest_attention(tokens.device):
            loss = self.run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        (loss * share).backward()
        return loss.detach()

    def step(self, micro_batches: list[Tensor]) -> Tensor:
        """One optimizer step; returns the last micro-batch's loss."""
        assert self.optimizer is not None
        if self.masters is not None:
            with torch.profiler.record_function("optimizer"):
                torch._foreach_zero_(self.gradients)
        for tokens in micro_batches:
            loss = self.backward(tokens, 1 / len(micro_batches))
            self._accumulate()
        with torch.profiler.record_function("optimizer"):
            trained = self.params if self.masters is None else self.masters
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=trained[0].is_cuda)
            self.optimizer.step()
            if self.masters is None:
                self.optimizer.zero_grad(set_to_none=True)
            else:
                with torch.no_grad():
                    torch._foreach_copy_([*self.params], self.masters)
        return loss

    @torch.no_grad()
    def _accumulate(self) -> None:
        """Add the bf16 gradients to those in fp32, and drop them."""
        if self.masters is None:
            return
        for param, gradient in zip(self.params, self.gradients, strict=True):
            if param.grad is not None:
                gradient.add_(param.grad)
                param.grad = None
