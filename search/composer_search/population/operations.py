"""What a population computes between its matrix products, and the steps of its optimizer: as PyTorch runs it, or fused.

PyTorch's operations run one after the other, on any device and in any precision. On a GPU they are most of the time:
the products of a proxy's narrow layers take less of it than the bytes that these operations read and write between
them. `Fused` moves about a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from composer_search.candidate import turn
from composer_search.mad import IGNORE
from composer_search.population.product import product, weight_gradients
from composer_search.population.stream import Stream, numberless
from composer_search.trainer import TrainSettings

EPS = 1e-5
"""Of the norms."""

WHOLE_MLP = True
"""Whether an MLP runs in one kernel by default."""

BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
"""PyTorch's defaults of AdamW, which MAD keeps."""


class Operations(Protocol):
    """The operations of a population; `turns` are `composer_search.candidate.rotation`'s."""

    def stream(self, x: Tensor, dtype: torch.dtype) -> Stream:
        """The stream that begins as x; `dtype` is that of matrix products."""
        ...

    def look_up(self, one_hot: Tensor, table: Tensor) -> Stream:
        """The stream that begins as each row's embeddings, of tables [rows, vocabulary, hidden].

        `one_hot` [rows, tokens, vocabulary], in the type of matrix products, is 1 where the token is.
        """
        ...

    def residual(
        self,
        x: Stream,
        outs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        moves: tuple[Tensor | None, Tensor | None],
        sizes: Sequence[int],
        dtype: torch.dtype,
    ) -> tuple[Stream, Sequence[Tensor]]:
        """Add the groups' outputs and biases to the stream x [rows, tokens, hidden] and re-order the rows.

        Args:
            x: The stream.
            outs: Of each group [rows of the group, tokens, hidden], in the order of the rows; the last rows may be of
                no group.
            biases: Of each group [rows of the group, hidden], or None.
            moves: For each place after, the place before, and the inverse; None where all stay.
            sizes: Rows of each part of the new order; all rows together.
            dtype: Of the normalised stream.

        Returns:
            The stream, and the parts of the stream over the root of its mean square.
        """
        ...

    def attend(self, joint: Tensor, bias: Tensor, turns: Tensor, heads: int, wanted: int) -> Tensor:
        """Causal attention from queries, keys and values [rows, sequences · length, 3 · hidden].

        `bias` [rows, 3 · hidden] is added first, and the rotary embedding turns queries and keys. What comes is
        [rows, sequences · wanted, hidden]: the last `wanted` positions of each sequence.
        """
        ...

    def linear(self, h: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
        """Each row's layer [rows, out, in] of attention on h [rows, tokens, in], multiplied by `gain` [rows, in]."""
        ...

    def mlp(self, h: Tensor, up: Tensor, gain: Tensor, down: Tensor) -> Tensor:
        """Each row's SwiGLU MLP on h [rows, tokens, hidden], multiplied by `gain` [rows, hidden] first.

        `up` [rows, 2 · inner, hidden] holds gate and up projection, `down` is [rows, hidden, inner].
        """
        ...

    def nats(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy [rows, positions] of logits [rows, positions, classes]; 0 where `IGNORE` is wanted."""
        ...

    def update(
        self, weights: list[Tensor], gradients: list[Tensor], moments: tuple[list[Tensor], ...], spread: list[Tensor]
    ) -> None:
        """Take a step of AdamW in place; `spread` are `coefficients` [3, blocks] of each weight [blocks, …]."""
        ...


class Plain:
    """As PyTorch runs them."""

    def stream(self, x: Tensor, dtype: torch.dtype) -> Stream:
        """See `Operations.stream`."""
        return Stream.plain(x)

    def look_up(self, one_hot: Tensor, table: Tensor) -> Stream:
        """See `Operations.look_up`."""
        return Stream.plain(torch.bmm(one_hot.to(table.dtype), table))

    def residual(
        self,
        x: Stream,
        outs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        moves: tuple[Tensor | None, Tensor | None],
        sizes: Sequence[int],
        dtype: torch.dtype,
    ) -> tuple[Stream, Sequence[Tensor]]:
        """See `Operations.residual`."""
        biased = [
            out if bias is None else out + bias[:, None].to(out.dtype) for out, bias in zip(outs, biases, strict=True)
        ]
        y: Tensor = _Merge.apply(x.tensor(), *moves, *biased)
        return Stream.plain(y), norm(y, dtype).split(list(sizes))

    def attend(self, joint: Tensor, bias: Tensor, turns: Tensor, heads: int, wanted: int) -> Tensor:
        """See `Operations.attend`."""
        rows, tokens, wide = joint.shape
        joint = joint + bias[:, None].to(joint.dtype)
        # rows and sequences become one axis of independent sequences
        parts = joint.view(-1, len(turns), 3, heads, wide // (3 * heads)).permute(2, 0, 3, 1, 4).split([2, 1])
        query, key = turn(parts[0], turns)
        length, every = len(turns), wanted == len(turns)
        seen = (
            None if every else torch.ones(wanted, length, dtype=torch.bool, device=joint.device).tril(length - wanted)
        )
        query = query[:, :, length - wanted :]
        mixed = F.scaled_dot_product_attention(query, key, parts[1][0], attn_mask=seen, is_causal=every)
        return mixed.transpose(1, 2).reshape(rows, tokens // length * wanted, wide // 3)

    def linear(self, h: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
        """See `Operations.linear`."""
        return product(h, weight, gain)

    def mlp(self, h: Tensor, up: Tensor, gain: Tensor, down: Tensor) -> Tensor:
        """See `Operations.mlp`."""
        gate, other = product(h, up, gain).chunk(2, dim=-1)
        return product(F.silu(gate) * other, down)

    def nats(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """See `Operations.nats`."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        flat = F.cross_entropy(wide.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="none")
        return flat.view_as(wanted)

    def update(
        self, weights: list[Tensor], gradients: list[Tensor], moments: tuple[list[Tensor], ...], spread: list[Tensor]
    ) -> None:
        """See `Operations.update`."""
        first, second = moments
        decay, rate, root = (
            [each[i].view(-1, *[1] * (w.dim() - 1)) for each, w in zip(spread, weights, strict=True)] for i in range(3)
        )
        torch._foreach_mul_(weights, decay)
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        divisors = torch._foreach_sqrt(second)
        torch._foreach_div_(divisors, root)
        torch._foreach_add_(divisors, ADAM_EPS)
        steps = torch._foreach_div(first, divisors)
        torch._foreach_mul_(steps, rate)
        torch._foreach_sub_(weights, steps)


class Fused:
    """In Triton kernels, for weights and a stream in fp32 on a GPU.

    Args:
        precision: Of matrix products of fp32: ``ieee`` or ``tf32``.
        whole_mlp: Run an MLP in one kernel, its products included, where it fits.
    """

    def __init__(self, precision: str, *, whole_mlp: bool = WHOLE_MLP) -> None:
        self._precision, self._whole_mlp = precision, whole_mlp
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def stream(self, x: Tensor, dtype: torch.dtype) -> Stream:
        """See `Operations.stream`."""
        return Stream.narrow(x, dtype)

    def look_up(self, one_hot: Tensor, table: Tensor) -> Stream:
        """See `Operations.look_up`."""
        x = torch.bmm(one_hot.to(table.dtype), table.detach())
        return Stream(x, _LookUp.apply(x, one_hot, table))

    def residual(
        self,
        x: Stream,
        outs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        moves: tuple[Tensor | None, Tensor | None],
        sizes: Sequence[int],
        dtype: torch.dtype,
    ) -> tuple[Stream, Sequence[Tensor]]:
        """See `Operations.residual`."""
        from composer_search.population.kernels.residual import residual

        return residual(x, outs, biases, moves, sizes, dtype, EPS)

    def attend(self, joint: Tensor, bias: Tensor, turns: Tensor, heads: int, wanted: int) -> Tensor:
        """See `Operations.attend`; of long sequences and wide heads PyTorch's own kernels take care."""
        from composer_search.population.kernels.attention import rotary_attention, tables, takes

        if not takes(len(turns), joint.shape[2] // (3 * heads)):
            return Plain().attend(joint, bias, turns, heads, wanted)
        if len(turns) not in self._tables:  # kept, since a CUDA graph reads the memory that was there at its capture
            self._tables[len(turns)] = tables(turns)
        return rotary_attention(joint, bias, *self._tables[len(turns)], heads, wanted, precision=self._precision)

    def linear(self, h: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
        """See `Operations.linear`."""
        from composer_search.population.kernels.linear import fits, linear

        return (linear if fits(h, weight.shape[1]) else product)(h, weight, gain)

    def mlp(self, h: Tensor, up: Tensor, gain: Tensor, down: Tensor) -> Tensor:
        """See `Operations.mlp`."""
        from composer_kernels.swiglu import swiglu
        from composer_search.population.kernels.mlp import fits, mlp

        if self._whole_mlp and fits(h.dtype, *down.shape[1:]):
            return mlp(h, up, gain, down)
        return product(swiglu(product(h, up, gain)), down)

    def nats(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """See `Operations.nats`; of large vocabularies PyTorch's own kernels take care."""
        from composer_search.population.kernels.cross_entropy import LARGEST, cross_entropy

        if logits.shape[-1] > LARGEST:
            return Plain().nats(logits, wanted)
        return cross_entropy(logits, wanted, IGNORE)

    def update(
        self, weights: list[Tensor], gradients: list[Tensor], moments: tuple[list[Tensor], ...], spread: list[Tensor]
    ) -> None:
        """See `Operations.update`."""
        from composer_search.population.kernels.adamw import adamw

        for weight, gradient, first, second, own in zip(weights, gradients, *moments, spread, strict=True):
            adamw(weight, gradient, first, second, own, BETAS, ADAM_EPS)


def fits_kernels(device: torch.device, settings: TrainSettings) -> bool:
    """Whether `Fused` can train there: on a GPU, and not in float64."""
    return device.type == "cuda" and settings.precision != "float64"


def norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x [..., width] / sqrt(mean(x²) + eps), in the given type."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS).to(dtype)


class _LookUp(torch.autograd.Function):
    """What autograd follows in place of looked up embeddings: their gradient goes to the table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, one_hot: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(one_hot, table)
        return numberless(x, one_hot.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        one_hot, table = ctx.saved_tensors
        of_table, _ = weight_gradients(one_hot, grads[0].contiguous(), table, None)
        return None, None, of_table


class _Merge(torch.autograd.Function):
    """Add the groups' outputs to the residual stream and bring the rows into the next depth's order.

    By hand, since the gradient of the groups' outputs is then a view of one re-ordered gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor | None, back: Tensor | None, *outs: Tensor) -> Tensor:
        ctx.back, ctx.sizes, ctx.dtype = back, [len(out) for out in outs], outs[0].dtype if outs else None
        done = sum(ctx.sizes)
        merged = x
        if outs:
            together = outs[0] if len(outs) == 1 else torch.cat(outs)
            merged = x + together if done == len(x) else torch.cat([x[:done] + together, x[done:]])
        return merged if order is None else merged.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] if ctx.back is None else grads[0].index_select(0, ctx.back)
        of_outs = grad[: sum(ctx.sizes)].to(ctx.dtype).split(ctx.sizes) if ctx.sizes else ()
        return grad, None, None, *of_outs
