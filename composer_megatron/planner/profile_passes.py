"""Run and time forward and backward passes of single blocks on this machine, for `profile`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from composer_megatron.architecture import Architecture
from composer_megatron.model import build_model
from composer_megatron.roofline import Passes
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape


class PassTimer:
    """Builds stages of one block and times their passes over one micro-batch of random numbers."""

    def __init__(self, shape: Shape, seq_len: int, micro_batch_size: int) -> None:
        """Set the widths and the micro-batch."""
        self.shape = dataclasses.replace(shape, tied_embeddings=False)  # so that each stage has its own matrices
        self.seq_len, self.micro_batch_size = seq_len, micro_batch_size
        self.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.dtype_name = str(self.dtype).removeprefix("torch.")

    def passes(self, letter: str, *, embedding: bool = False, head: bool = False) -> Callable[[], Passes]:
        """A function that runs and times one forward and one backward pass of a stage of one block.

        Args:
            letter: The block's primitive.
            embedding: Whether the stage begins with the embedding.
            head: Whether it ends with the final norm, the output layer and the loss.
        """
        architecture = Architecture(CompositeSequence(letter), self.shape)
        model = build_model(
            architecture,
            max_sequence_length=self.seq_len,
            dtype=self.dtype,
            pre_process=embedding,
            post_process=head,
        ).train()
        device = next(model.parameters()).device
        tokens = torch.randint(self.shape.vocab_size, (self.micro_batch_size, self.seq_len), device=device)
        positions = torch.arange(self.seq_len, device=device).expand(self.micro_batch_size, -1)
        size = (self.seq_len, self.micro_batch_size, self.shape.hidden_size)
        hidden = torch.randn(size, dtype=self.dtype, device=device, requires_grad=True)

        def run() -> Passes:
            model.zero_grad(set_to_none=True)
            hidden.grad = None
            if not embedding:
                model.set_input_tensor(hidden)
            start = _now()
            output = model(tokens, positions, None, labels=tokens if head else None)
            middle = _now()
            output.backward(torch.ones_like(output))
            return Passes(middle - start, _now() - middle)

        return run


def _now() -> float:
    """The time when everything that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
