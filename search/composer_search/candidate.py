"""A candidate: the tiny model of one sequence.

It is the model of MAD (Poli et al., arXiv 2403.17844): an embedding, a pre-norm residual block ``x + block(norm(x))``
for each letter in any order, a final norm and an untied output layer. Positions reach it through the rotary embedding
of attention and the order of recurrences alone. The task 'compression' puts an auto-encoder's head on the same stack.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_search.blocks import Attention, SwiGLU, Widths, rotate, rotation, turn
from composer_search.mixers import DeltaNet, Experts, LatentAttention, Mamba2, WindowAttention

__all__ = ["Attention", "Candidate", "SwiGLU", "Widths", "require_blocks", "rotate", "rotation", "sinusoids", "turn"]


_BLOCKS: dict[str, Callable[[Widths], nn.Module]] = {
    "A": Attention,
    "M": SwiGLU,
    "W": WindowAttention,
    "E": Experts,
    "S": Mamba2,
    "G": DeltaNet,
    "L": LatentAttention,
}


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
