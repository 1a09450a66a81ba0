"""The model of a whole population: the same blocks as `composer_search.candidate`, for many rows at once.

At each depth the rows are grouped by primitive (`Layout`): one batched matrix product per layer of a group and one
attention call. Computing both primitives for each row and masking one away, or `torch.vmap`, was slower than training
the candidates in turn. A norm's gain is multiplied into the weights behind it, ``(g · x) W = x (g W)``: weights are
fewer than activations, and the norm is then one call for all rows.

No row enters another row's arithmetic, so that a row which diverges harms none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from composer_search.candidate import Candidate, rotation, sinusoids
from composer_search.population.layout import ROW, Depth, Layout
from composer_search.population.operations import Operations, Plain, norm
from composer_search.population.product import product
from composer_search.population.stream import Stream

ONE_HOT_VOCABULARY = 64
"""Up to this vocabulary a GPU looks embeddings up by a matrix product: the gradient of a look-up would have thousands
of tokens add to each of a few rows."""


_MLP = "M.gate_up.weight", "M.norm.weight", "M.down.weight"


@dataclass(frozen=True)
class Shape:
    """What all rows of a population have in common.

    Attributes:
        vocab_size: Rows of the embedding.
        num_heads: Attention heads.
        autoencoder: Whether the rows rebuild their inputs from one vector.
        dtype: What matrices are multiplied in.
        scored: So many last positions of a sequence are asked for, and the stream after the last attention is computed
            there alone; None for all of them. See `composer_search.population.feed.scored_positions`.
    """

    vocab_size: int
    num_heads: int
    autoencoder: bool
    dtype: torch.dtype
    scored: int | None = None


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
        layout: The plan; aligned where `shape.scored` is a number.
        weights: Stacked weights, which may change in place.
        shape: What the rows share.
        operations: What is computed between the matrix products; PyTorch's own without it.
    """

    def __init__(
        self, layout: Layout, weights: Mapping[str, Tensor], shape: Shape, operations: Operations | None = None
    ) -> None:
        self.layout, self.weights, self.shape = layout, weights, shape
        self.operations = operations or Plain()
        self.slices = {name: self._slices(name) for name in weights}
        device = next(iter(weights.values())).device
        self._rotations: dict[int, Tensor] = {}
        self._start = None if layout.start is None else torch.tensor(layout.start, device=device)
        self._moves = [_moves(depth.order, device) for depth in layout.depths]

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
        """The logits [rows, sequences · positions, vocabulary] of tokens int64 [rows, sequences, length].

        The positions are those of `answers`.
        """
        rows, sequences, length = tokens.shape
        scored, mixing = self._scored(length), self.layout.mixing
        if mixing == 0:  # no attention anywhere
            tokens = tokens[..., length - scored :]
        sizes = [*(depth.sizes(rows) for depth in self.layout.depths), [rows]]
        x, normed = self._embed(tokens, sizes[0])
        plan = zip(self.layout.depths, self._moves, sizes[1:], strict=True)
        for number, (depth, moves, after) in enumerate(plan, start=1):
            wanted = scored if number == mixing else length
            outs, biases = zip(*self._blocks(normed, depth, length, wanted), strict=True)
            if number == mixing:
                x = x.last(length, scored)
            x, normed = self.operations.residual(x, outs, biases, moves, after, self.shape.dtype)
        (h,) = normed
        own = {name: self.slices[name][0] for name in self.weights if name.startswith(ROW)}
        if self.shape.autoencoder:
            last = x.last(x.values.shape[1] // sequences, 1).tensor().unflatten(1, (sequences, 1))
            h = norm(self._decode(last, length, own), self.shape.dtype)
        return self._linear(h, own, f"{ROW}.unembedding", gain=own[f"{ROW}.final_norm.weight"])

    def answers(self, targets: Tensor) -> Tensor:
        """The targets of the positions whose logits a call gives, [rows, sequences · positions]."""
        length = targets.shape[2]
        first = 0 if self.shape.autoencoder else length - self._scored(length)
        return targets[..., first:].flatten(1)

    def _scored(self, length: int) -> int:
        return length if self.shape.scored is None else min(length, self.shape.scored)

    def _embed(self, tokens: Tensor, sizes: list[int]) -> tuple[Stream, Sequence[Tensor]]:
        """The stream before the first depth in that depth's order, and its groups' parts of the stream normalised."""
        table = self.slices[f"{ROW}.embedding.weight"][0]
        if self._start is not None:
            table, tokens = table.index_select(0, self._start), tokens.index_select(0, self._start)
        flat, vocab_size = tokens.flatten(1), table.shape[1]
        if table.is_cuda and vocab_size <= ONE_HOT_VOCABULARY:
            return look_up(self.operations, flat, table, sizes, self.shape.dtype)
        offsets = vocab_size * torch.arange(len(table), device=flat.device)
        x = F.embedding(flat + offsets[:, None], table.flatten(0, 1))
        stream = self.operations.stream(x, self.shape.dtype)
        return self.operations.residual(stream, [], [], (None, None), sizes, self.shape.dtype)

    def _blocks(
        self, normed: Sequence[Tensor], depth: Depth, length: int, wanted: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The output of each group's blocks for its part of the normalised stream, and the bias still to be added.

        Of attention's, the last `wanted` positions of each sequence.
        """
        for group, h in zip(depth.groups, normed, strict=False):
            mine = f"{group.letter}."
            weights = {name: parts[group.first] for name, parts in self.slices.items() if name.startswith(mine)}
            if group.letter == "A":
                yield self._attention(h, weights, length, wanted), weights["A.output.bias"]
            else:
                yield self.operations.mlp(h, *(weights[name] for name in _MLP)), None

    def _attention(self, h: Tensor, weights: dict[str, Tensor], length: int, wanted: int) -> Tensor:
        joint = self.operations.linear(h, weights["A.query_key_value.weight"], weights["A.norm.weight"])
        heads = self.shape.num_heads
        turns = self._turns(length, h.shape[2] // heads)
        mixed = self.operations.attend(joint, weights["A.query_key_value.bias"], turns, heads, wanted)
        return self.operations.linear(mixed, weights["A.output.weight"], None)

    def _turns(self, length: int, width: int) -> Tensor:
        """`rotation`, kept as long as this model: a CUDA graph reads the memory that was there when it was captured."""
        if length not in self._rotations:
            self._rotations[length] = rotation(length, width, self.slices[f"{ROW}.embedding.weight"][0].device)
        return self._rotations[length]

    def _decode(self, x: Tensor, length: int, own: dict[str, Tensor]) -> Tensor:
        """The auto-encoder's head on last positions x [rows, sequences, 1, hidden], for `length` positions."""
        positions = sinusoids(length, x.shape[3], x.device)
        x = (x + positions).flatten(1, 2)
        for before, linear in ((0, 1), (3, 4)):
            gain = own[f"{ROW}.decoder.{before}.weight"]
            x = F.gelu(self._linear(norm(x, self.shape.dtype), own, f"{ROW}.decoder.{linear}", gain))
        return x

    def _linear(self, h: Tensor, own: dict[str, Tensor], name: str, gain: Tensor) -> Tensor:
        """A layer that each row has once, with its bias."""
        return product(h, own[f"{name}.weight"], gain) + own[f"{name}.bias"][:, None].to(h.dtype)


def look_up(
    operations: Operations, tokens: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype
) -> tuple[Stream, list[Tensor]]:
    """The stream of each row's embeddings, and parts of their norms in `dtype`, by matrix products.

    The norms are looked up as well: those of the table's rows are fewer than those of the tokens.

    Args:
        operations: How.
        tokens: [rows, tokens], int64.
        table: [rows, vocabulary, hidden].
        sizes: Rows of each part.
        dtype: Of the norms, and of matrix products.
    """
    # not F.one_hot, which would ask the GPU for the largest token
    one_hot = (tokens[..., None] == torch.arange(table.shape[1], device=tokens.device)).to(dtype)
    parts = zip(one_hot.split(sizes), norm(table, dtype).split(sizes), strict=True)
    return operations.look_up(one_hot, table), [torch.bmm(*part) for part in parts]


def _moves(order: tuple[int, ...] | None, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """For each place after, the place before, and the inverse; None where all stay."""
    if order is None:
        return None, None
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return torch.tensor(order, device=device), torch.tensor(inverse, device=device)
