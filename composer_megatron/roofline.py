"""Predicted times of blocks from a device's ceilings: arithmetic, memory and links. Predictions, not measurements.

A block takes its matrix products at the GEMM rate, its core attention at the attention rate, its element-wise passes
at the copy bandwidth, and what of its communication is not hidden. The ceilings are a kernel's; whole training steps
reach `EFFICIENCY` of them, which is calibrated on published and our own measured throughputs
(``tests/composer/test_roofline.py`` lists them; each is within a factor of 1.25 of the prediction).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout
from composer_megatron.primitives import PRIMITIVES, Primitive
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

EFFICIENCY = 0.7
"""Share of the ceilings that a training step reaches: geometric mean over the anchors, rounded."""

LINK_EFFICIENCY = 0.8
"""Share of a link's nominal bandwidth that collectives reach; assumed."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU's ceilings, and its links'.

    Attributes:
        name: Key in `DEVICES`.
        peak: Dense bf16 FLOP/s of the data sheet, to which MFU refers.
        gemm: FLOP/s of large matrix products.
        attention_forward: FLOP/s of the core attention, causal FLOPs counted.
        attention_backward: The same in the backward pass, which counts 2.5 times the forward pass's FLOPs.
        copy: Bytes/s that memory reads and writes together reach.
        memory: Bytes of memory.
        node: Bytes/s from a GPU to others of its node, one direction.
        network: Bytes/s from a GPU to other nodes, one direction.
        node_size: GPUs in a node.
    """

    name: str
    peak: float
    gemm: float
    attention_forward: float
    attention_backward: float
    copy: float
    memory: float
    node: float
    network: float
    node_size: int = 8

    def link(self, reach: int) -> float:
        """Bytes/s between ranks that lie up to `reach` ranks apart, in Megatron's order of ranks."""
        return LINK_EFFICIENCY * (self.node if reach <= self.node_size else self.network)


_ROWS = (
    # Peak, memory and links: NVIDIA's data sheets (SXM boards; one 400 or 200 Gb/s network port a GPU). GEMM rate: 704
    # TFLOP/s measured on an H100 (docs/lab-notebook.md). Copy: 3.0 and 4.3 TB/s measured. Attention, head width 64 to
    # 128: half and 42 % of the peak, assumed. A100: the H100's shares of its peaks, assumed.
    Device(
        name="h100",
        peak=989e12,
        gemm=704e12,
        attention_forward=495e12,
        attention_backward=415e12,
        copy=3.0e12,
        memory=80e9,
        node=450e9,
        network=50e9,
    ),
    Device(
        name="h200",
        peak=989e12,
        gemm=704e12,
        attention_forward=495e12,
        attention_backward=415e12,
        copy=4.3e12,
        memory=141e9,
        node=450e9,
        network=50e9,
    ),
    Device(
        name="a100",
        peak=312e12,
        gemm=222e12,
        attention_forward=156e12,
        attention_backward=131e12,
        copy=1.83e12,
        memory=80e9,
        node=300e9,
        network=25e9,
    ),
)

DEVICES: Mapping[str, Device] = MappingProxyType({row.name: row for row in _ROWS})
"""Every device by its name."""


def get_device(name: str) -> Device:
    """The device of that name.

    Raises:
        UsageError: If there is none, with the names that there are.
    """
    if name == "cpu":
        raise UsageError(
            "a CPU has no data sheet to predict from: measure with composer-megatron profile, and give --profile"
        )
    if name not in DEVICES:
        near = difflib.get_close_matches(name, DEVICES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown device {name!r}: {hint}known: {', '.join(DEVICES)}; or measure, and give --profile")
    return DEVICES[name]


class Passes(NamedTuple):
    """Seconds of a forward and of a backward pass over a micro-batch, on one rank.

    Attributes:
        forward: Seconds.
        backward: Seconds.
    """

    forward: float
    backward: float


@dataclass(frozen=True)
class UnitTimes:
    """The times from which a pipeline is cut.

    Attributes:
        blocks: Of a block of each primitive, by its letter.
        embedding: Of the embedding.
        head: Of the final norm, the output layer and the loss.
        source: Where they come from, for people.
        predicted: Whether they are predictions, not measurements.
    """

    blocks: Mapping[str, Passes]
    embedding: Passes
    head: Passes
    source: str
    predicted: bool


def predict(architecture: Architecture, layout: Layout, device: Device) -> UnitTimes:
    """Predicted times of every kind of block, the embedding and the loss head, for one rank of a layout."""
    kinds = architecture.sequence.counts
    return UnitTimes(
        blocks={letter: _block(PRIMITIVES[letter], architecture.shape, layout, device) for letter in kinds},
        embedding=_embedding(architecture.shape, layout, device),
        head=_head(architecture.shape, layout, device),
        source=f"roofline of {device.name}",
        predicted=True,
    )


def multi_token_prediction(
    blocks: CompositeSequence, architecture: Architecture, layout: Layout, device: Device
) -> Passes:
    """One depth of multi-token prediction: the joining projection, blocks, another loss head."""
    shape = architecture.shape
    projection = 4 * shape.hidden_size**2 / layout.tensor_parallel * layout.tokens / device.gemm / EFFICIENCY
    passes = [_block(PRIMITIVES[letter], shape, layout, device) for letter in blocks]
    passes += [_head(shape, layout, device), _embedding(shape, layout, device), Passes(projection, 2 * projection)]
    return Passes(sum(each.forward for each in passes), sum(each.backward for each in passes))


def ring_seconds(size: float, ranks: int, bandwidth: float) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes in all; an all-reduce takes two."""
    return size * (ranks - 1) / ranks / bandwidth


def transfer_seconds(architecture: Architecture, layout: Layout, device: Device) -> float:
    """Seconds to send a micro-batch's hidden states from a pipeline rank to the next."""
    if layout.pipeline_parallel == 1:
        return 0.0
    size = 2 * layout.tokens * architecture.shape.hidden_size / layout.hidden_split
    # A rank's neighbour in the pipeline is as many ranks away as all other dimensions hold.
    reach = 2 * layout.tensor_parallel * layout.replicas
    return size / device.link(reach)


def _block(row: Primitive, shape: Shape, layout: Layout, device: Device) -> Passes:
    tokens, ranks = layout.tokens, layout.tensor_parallel
    matrices = row.matrix_parameters(shape) / ranks
    gemm = 2 * row.active_parameters(shape) / ranks * tokens / device.gemm
    mixing = row.mixing_flops(shape, layout.seq_len) / 2 * tokens / ranks
    core = Passes(mixing / device.attention_forward, 2.5 * mixing / device.attention_backward)
    # Between the matrices: the norm reads and writes, the residual addition reads twice and writes; backward as much
    # and the incoming gradient. Inside: what is kept is read or written once forward, one and a half times backward.
    hidden = shape.hidden_size / layout.hidden_split
    inner = (row.saved_elements(shape) - 2 * shape.hidden_size) / ranks
    element_wise = Passes(
        tokens * (10 * hidden + 2 * inner) / device.copy, tokens * (12 * hidden + 3 * inner) / device.copy
    )
    accumulate = 8 * matrices / device.copy  # weight gradients are added to fp32 ones
    tensor, context = _tensor_seconds(shape, layout, device), _context_seconds(row, shape, layout, device, core)
    forward = (gemm + core.forward + element_wise.forward) / EFFICIENCY + tensor.forward + context.forward
    backward = (2 * gemm + core.backward + element_wise.backward + accumulate) / EFFICIENCY
    backward += tensor.backward + context.backward
    if layout.recompute == "full":
        backward += forward
    elif layout.recompute == "selective":
        backward += core.forward / EFFICIENCY + context.forward
    return Passes(forward, backward)


def _tensor_seconds(shape: Shape, layout: Layout, device: Device) -> Passes:
    """Communication among tensor-parallel ranks that nothing hides.

    Forward both collectives of a block are exposed. Backward, the reduction of the input's gradient runs beside the
    weight gradient's product; only sequence parallelism's gathering of the output's gradient is exposed.
    """
    size = 2 * layout.tokens * shape.hidden_size
    once = ring_seconds(size, layout.tensor_parallel, device.link(layout.tensor_parallel))
    return Passes(2 * once, once if layout.sequence_parallel else 0.0)


def _context_seconds(row: Primitive, shape: Shape, layout: Layout, device: Device, core: Passes) -> Passes:
    """Ring attention: keys and values go round while the core attention runs; what takes longer than it is exposed."""
    ranks = layout.context_parallel
    size = 2 * layout.tokens * row.cache_elements(shape) / layout.tensor_parallel
    seconds = (ranks - 1) * size / device.link(layout.tensor_parallel * ranks)
    forward = max(0.0, seconds - core.forward / EFFICIENCY)
    return Passes(forward, max(0.0, 2 * seconds - core.backward / EFFICIENCY))  # backward their gradients go round, too


def _embedding(shape: Shape, layout: Layout, device: Device) -> Passes:
    """Looking up reads and writes bf16; backward adds into fp32 gradients."""
    elements = layout.tokens * shape.hidden_size
    communication = ring_seconds(2 * elements, layout.tensor_parallel, device.link(layout.tensor_parallel))
    forward = 4 * elements / device.copy / EFFICIENCY + communication
    return Passes(forward, 10 * elements / device.copy / EFFICIENCY + communication)


def _head(shape: Shape, layout: Layout, device: Device) -> Passes:
    """Final norm, output layer, and a loss that reads the logits and overwrites them by their gradient."""
    tokens, ranks = layout.tokens, layout.tensor_parallel
    weights = shape.vocab_size * shape.hidden_size / ranks
    gemm = 2 * weights * tokens / device.gemm
    norm = 4 * tokens * shape.hidden_size / layout.hidden_split / device.copy
    loss = 3 * tokens * shape.vocab_size / ranks / device.copy
    communication = ring_seconds(2 * tokens * shape.hidden_size, ranks, device.link(ranks)) * layout.sequence_parallel
    backward = (2 * gemm + 1.5 * norm + loss + 8 * weights / device.copy) / EFFICIENCY
    return Passes((gemm + norm + loss) / EFFICIENCY + communication, backward)
