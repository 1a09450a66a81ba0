"""The model of a whole population: the same blocks as `composer_search.candidate`, for many rows at once.

At each depth the rows are grouped by primitive (`Layout`): one batched matrix product per layer of a group and one
attention call. Computing both primitives for each row and masking one away, or `torch.vmap`, was slower than training
the candidates in turn. A norm's gain is multiplied into the weights behind it, ``(g · x) W = x (g W)``: weights are
fewer than activations, and the norm is then one call for all rows.

No row enters another row's arithmetic, so that a row which diverges harms none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from composer_search.candidate import Candidate, rotation, sinusoids, turn
from composer_search.population.layout import ROW, Depth, Group, Layout

EPS = 1e-5
ONE_HOT_VOCABULARY = 64
"""Up to this vocabulary a GPU looks embeddings up by a matrix product: the gradient of a look-up would have thousands
of tokens add to each of a few rows."""


class Pointwise(NamedTuple):
    """The functions between the matrix products, as they are or compiled.

    Attributes:
        norm: x [..., width] / sqrt(mean(x²) + eps), in the given type.
        turn: The rotary embedding (`composer_search.candidate.turn`).
        gate: silu(first half) · second half of the last dimension.
    """

    norm: Callable[[Tensor, torch.dtype], Tensor]
    turn: Callable[[Tensor, Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]

    @classmethod
    def eager(cls) -> Pointwise:
        """As PyTorch runs them, one operation after the other."""
        return cls(_norm, turn, _gate)

    @classmethod
    def compiled(cls) -> Pointwise:
        """Fused by `torch.compile`, once for all sizes of the leading axis."""
        norm, turn_real, gate = (torch.compile(function, dynamic=True) for function in (_norm, _turn_real, _gate))
        return cls(norm, lambda x, turns: turn_real(x, torch.view_as_real(turns)), gate)


def _norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=EPS).to(dtype)


def _gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _turn_real(x: Tensor, turns: Tensor) -> Tensor:
    """`turn` in real numbers, which compile to one kernel."""
    cosine, sine = turns.unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Shape:
    """What all rows of a population have in common.

    Attributes:
        vocab_size: Rows of the embedding.
        num_heads: Attention heads.
        autoencoder: Whether the rows rebuild their inputs from one vector.
        dtype: What matrices are multiplied in.
    """

    vocab_size: int
    num_heads: int
    autoencoder: bool
    dtype: torch.dtype


def stack_weights(layout: Layout, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
    """The weights of one candidate a row, stacked: name to [blocks of that kind, …].

    Names are ``kind.parameter``, where kind is a letter or `ROW`; a block's norm is its parameter ``norm.weight``.
    """
    states = [candidate.state_dict() for candidate in candidates]
    weights: dict[str, Tensor] = {}
    for letter, blocks in layout.blocks.items():
        row, depth = blocks[0]
        names = [name for name, _ in candidates[row].blocks[depth].named_parameters()]
        for name in names:
            weights[f"{letter}.{name}"] = torch.stack([states[row][f"blocks.{depth}.{name}"] for row, depth in blocks])
        weights[f"{letter}.norm.weight"] = torch.stack([states[row][f"norms.{depth}.weight"] for row, depth in blocks])
    for name in states[0]:
        if not name.startswith(("blocks.", "norms.")):
            weights[f"{ROW}.{name}"] = torch.stack([state[name] for state in states])
    return weights


def unstack_weights(layout: Layout, weights: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """The inverse of `stack_weights` for one row: the state of its `Candidate`."""
    state = {}
    for name, stacked in weights.items():
        kind, _, own = name.partition(".")
        if kind == ROW:
            state[own] = stacked[row]
            continue
        for place, (owner, depth) in enumerate(layout.blocks[kind]):
            if owner == row:
                whole = f"norms.{depth}.weight" if own == "norm.weight" else f"blocks.{depth}.{own}"
                state[whole] = stacked[place]
    return state


class GroupedModel:
    """Logits of all rows, from weights that lie where `stack_weights` put them.

    Args:
        layout: The plan.
        weights: Stacked weights, which may change in place.
        shape: What the rows share.
        pointwise: The functions between the matrix products.
    """

    def __init__(
        self, layout: Layout, weights: Mapping[str, Tensor], shape: Shape, pointwise: Pointwise | None = None
    ) -> None:
        self.layout, self.weights, self.shape = layout, weights, shape
        self.pointwise = pointwise or Pointwise.eager()
        self.slices = {name: self._slices(name) for name in weights}
        device = next(iter(weights.values())).device
        self._rotations: dict[int, Tensor] = {}
        self._start = _index(layout.start, device)
        self._moves = [(_index(depth.order, device), _index(_inverse(depth.order), device)) for depth in layout.depths]

    def _slices(self, name: str) -> dict[int, Tensor]:
        """The leaves that gradients are taken of, by the place of their first block: they share the stacked memory."""
        kind, stacked = name.partition(".")[0], self.weights[name].detach()
        if kind == ROW:
            return {0: stacked.detach().requires_grad_()}
        groups = [group for depth in self.layout.depths for group in depth.groups if group.letter == kind]
        return {group.first: stacked[group.first : group.first + group.size].requires_grad_() for group in groups}

    def leaves(self) -> list[Tensor]:
        """Every leaf, by name and then by depth, as `gradients` expects their gradients."""
        return [leaf for parts in self.slices.values() for leaf in parts.values()]

    def gradients(self, of_leaves: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the stacked weights, in their order, from those of the leaves."""
        left = iter(of_leaves)
        grouped = [[next(left) for _ in parts] for parts in self.slices.values()]
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in grouped]

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits [rows, sequences · length, vocabulary] of tokens int64 [rows, sequences, length]."""
        x = self._embed(tokens)
        if self._start is not None:
            x = x.index_select(0, self._start)
        for depth, moves in zip(self.layout.depths, self._moves, strict=True):
            x = self._depth(x, depth, moves, tokens.shape[2])
        own = {name: self.slices[name][0] for name in self.weights if name.startswith(ROW)}
        if self.shape.autoencoder:
            x = self._decode(x.unflatten(1, tokens.shape[1:]), own)
        return self._linear(self._norm(x), own, f"{ROW}.unembedding", gain=own[f"{ROW}.final_norm.weight"])

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.slices[f"{ROW}.embedding.weight"][0]
        rows, vocab_size, _ = table.shape
        flat = tokens.reshape(rows, -1)
        if table.is_cuda and vocab_size <= ONE_HOT_VOCABULARY:
            return torch.bmm(_one_hot(flat, vocab_size, table.dtype), table)
        offsets = vocab_size * torch.arange(rows, device=flat.device)
        return F.embedding(flat + offsets[:, None], table.flatten(0, 1))

    def _depth(self, x: Tensor, depth: Depth, moves: tuple[Tensor | None, Tensor | None], length: int) -> Tensor:
        sizes = [group.size for group in depth.groups]
        idle = len(x) - sum(sizes)
        parts = self._norm(x).split([*sizes, idle] if idle else sizes)
        outs = []
        for group, part in zip(depth.groups, parts, strict=False):
            weights = self._block(group)
            outs.append(self._attention(part, weights, length) if group.letter == "A" else self._mlp(part, weights))
        merged: Tensor = _Merge.apply(x, *moves, *outs)
        return merged

    def _block(self, group: Group) -> dict[str, Tensor]:
        mine = f"{group.letter}."
        return {name: parts[group.first] for name, parts in self.slices.items() if name.startswith(mine)}

    def _attention(self, x: Tensor, weights: dict[str, Tensor], length: int) -> Tensor:
        rows, tokens, hidden = x.shape
        heads = self.shape.num_heads
        joint = self._linear(x, weights, "A.query_key_value", gain=weights["A.norm.weight"])
        # rows and sequences become one axis of independent sequences
        parts = joint.view(-1, length, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4).split([2, 1])
        query, key = self.pointwise.turn(parts[0], self._turns(length, hidden // heads))
        mixed = F.scaled_dot_product_attention(query, key, parts[1][0], is_causal=True)
        return self._linear(mixed.transpose(1, 2).reshape(rows, tokens, hidden), weights, "A.output")

    def _turns(self, length: int, width: int) -> Tensor:
        """`rotation`, kept as long as this model: a CUDA graph reads the memory that was there when it was captured."""
        if length not in self._rotations:
            self._rotations[length] = rotation(length, width, self.slices[f"{ROW}.embedding.weight"][0].device)
        return self._rotations[length]

    def _mlp(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        inner = self._linear(x, weights, "M.gate_up", gain=weights["M.norm.weight"])
        return self._linear(self.pointwise.gate(inner), weights, "M.down")

    def _decode(self, x: Tensor, own: dict[str, Tensor]) -> Tensor:
        """The auto-encoder's head on x [rows, sequences, length, hidden]."""
        positions = sinusoids(x.shape[2], x.shape[3], x.device)
        x = (x[:, :, -1:] + positions).flatten(1, 2)
        for norm, linear in ((0, 1), (3, 4)):
            gain = own[f"{ROW}.decoder.{norm}.weight"]
            x = F.gelu(self._linear(self._norm(x), own, f"{ROW}.decoder.{linear}", gain=gain))
        return x

    def _norm(self, x: Tensor) -> Tensor:
        return self.pointwise.norm(x, self.shape.dtype)

    def _linear(self, x: Tensor, weights: dict[str, Tensor], name: str, gain: Tensor | None = None) -> Tensor:
        """Each row's own linear layer on x [rows, tokens, in], its inputs multiplied by `gain` [rows, in]."""
        weight = weights[f"{name}.weight"]
        weight = (weight if gain is None else weight * gain[:, None]).to(x.dtype).mT
        bias = weights.get(f"{name}.bias")
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None].to(x.dtype), x, weight)


class _Merge(torch.autograd.Function):
    """Add the groups' outputs to the residual stream and bring the rows into the next depth's order.

    By hand, since the gradient of the groups' outputs is then a view of one re-ordered gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor | None, back: Tensor | None, *outs: Tensor) -> Tensor:
        ctx.back, ctx.sizes, ctx.dtype = back, [len(out) for out in outs], outs[0].dtype
        done = sum(ctx.sizes)
        together = outs[0] if len(outs) == 1 else torch.cat(outs)
        merged = x + together if done == len(x) else torch.cat([x[:done] + together, x[done:]])
        return merged if order is None else merged.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] if ctx.back is None else grads[0].index_select(0, ctx.back)
        of_outs = grad[: sum(ctx.sizes)].to(ctx.dtype).split(ctx.sizes)
        return grad, None, None, *of_outs


def _one_hot(tokens: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """As `F.one_hot`, which would ask the GPU for the largest token."""
    return (tokens[..., None] == torch.arange(vocab_size, device=tokens.device)).to(dtype)


def _inverse(order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if order is None else tuple(sorted(range(len(order)), key=order.__getitem__))


def _index(order: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    return None if order is None else torch.tensor(order, device=device)
