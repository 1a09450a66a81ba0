"""Kernels of `cross_entropy` and `linear_cross_entropy`: statistics of rows of logits, their gradient, both at once.

`cross_entropy` says what they compute and how many bytes that moves. Legend: R rows (tokens), V columns of the whole
vocabulary, of which this process holds `width`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from composer_kernels._launch import runs_kernel

LOG2E = tl.constexpr(1.4426950408889634)
type Tensors = tuple[tl.tensor, ...]

# --- Kernels ---------------------------------------------------------------------------------------------------------
# A row is walked in tiles x[UNROLL, LANES]. A thread owns the same lanes of every tile, so that its running maximum and
# sum need no other thread before the row's end. With SHIFT, rows begin `shift` elements after an aligned address and
# tiles count from there: rows of an odd width, too, are read 16 bytes at a time, but for their first and last tile.


@triton.jit
def _row_start(
    row: tl.tensor, inner: tl.tensor, stride_outer: tl.tensor, stride_inner: tl.tensor,
    SHIFT: tl.constexpr,
) -> Tensors:  # fmt: skip
    """Element offset of row number `row`, rounded down to an aligned one, and the shift from there to the row."""
    start = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    shift = 0
    if SHIFT:
        shift = (start % 16).to(tl.int32)
        start = tl.multiple_of(start - shift, 16)
    return start, shift


@triton.jit
def _positions(LANES: tl.constexpr, UNROLL: tl.constexpr) -> tl.tensor:
    """Where the elements of a tile lie in a row."""
    return tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _cap(x: tl.tensor, softcap: tl.tensor, PRECISE: tl.constexpr) -> Tensors:
    """Softcap · tanh(x / softcap) and its derivative; PRECISE keeps the relative accuracy of small x."""
    rest = 1.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / softcap)))
    capped = softcap * (1.0 - 2.0 * rest)
    if PRECISE:
        w = (x / softcap) * (x / softcap)
        series = 1.0 + w * (-1.0 / 3.0 + w * (2.0 / 15.0 + w * (-17.0 / 315.0 + w * (62.0 / 2835.0))))
        capped = tl.where(w < 0.04, x * series, capped)
    return capped, 4.0 * rest * (1.0 - rest)


@triton.jit
def _absorb(
    peak: tl.tensor, mass: tl.tensor, total: tl.tensor, x: tl.tensor, inside: tl.tensor, softcap: tl.tensor,
    SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, PRECISE: tl.constexpr,
) -> Tensors:  # fmt: skip
    """Take a tile into the lanes' running maximum, Σ exp(s - maximum) and Σ s."""
    s = x.to(tl.float32)
    if SOFTCAP:
        s = _cap(s, softcap, PRECISE)[0]
    if SMOOTH:
        total += tl.sum(tl.where(inside, s, 0.0), 0)
    s = tl.where(inside, s, float("-inf"))
    top = tl.maximum(peak, tl.max(s, 0))
    base = tl.where(top == float("-inf"), 0.0, top)
    mass = mass * tl.exp2((peak - base) * LOG2E) + tl.sum(tl.exp2((s - base[None, :]) * LOG2E), 0)
    return top, mass, total


@triton.jit
def _reduce_row(
    row: tl.tensor, shift: tl.tensor, width: tl.tensor, softcap: tl.tensor,
    SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, PRECISE: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr, POLICY: tl.constexpr,
) -> Tensors:  # fmt: skip
    """Maximum, Σ exp(s - maximum) and Σ s of the row at `shift` after the pointer `row`."""
    TILE: tl.constexpr = LANES * UNROLL
    offsets = _positions(LANES, UNROLL)
    everywhere = tl.full([UNROLL, LANES], True, tl.int1)
    peak = tl.full([LANES], float("-inf"), tl.float32)
    mass = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    end = shift + width
    if SHIFT:
        inside = (offsets >= shift) & (offsets < end)
        x = tl.load(row + offsets, mask=inside, other=0.0, eviction_policy=POLICY)
        peak, mass, total = _absorb(peak, mass, total, x, inside, softcap, SOFTCAP, SMOOTH, PRECISE)
    full = end // TILE
    for tile in range(SHIFT, full):
        x = tl.load(row + tile * TILE + offsets, eviction_policy=POLICY)
        peak, mass, total = _absorb(peak, mass, total, x, everywhere, softcap, SOFTCAP, SMOOTH, PRECISE)
    if (full >= SHIFT) & (full * TILE < end):
        inside = full * TILE + offsets < end
        x = tl.load(row + full * TILE + offsets, mask=inside, other=0.0, eviction_policy=POLICY)
        peak, mass, total = _absorb(peak, mass, total, x, inside, softcap, SOFTCAP, SMOOTH, PRECISE)
    top = tl.max(peak, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.sum(mass * tl.exp2((peak - base) * LOG2E), 0)
    whole = 0.0
    if SMOOTH:
        whole = tl.sum(total, 0)
    return top, mass, whole


@triton.jit
def _row_loss(
    peak: tl.tensor, log_mass: tl.tensor, at_label: tl.tensor, total: tl.tensor, vocab: tl.tensor,
    smoothing: tl.tensor, z_loss: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Loss of a row; differences to the maximum come first, so that large logits cost no accuracy."""
    lse = peak + log_mass
    likelihood = (1.0 - smoothing) * (peak - at_label) + smoothing * (peak - total / vocab)
    return likelihood + log_mass + z_loss * lse * lse


@triton.jit
def _row_terms(
    label: tl.tensor, peak: tl.tensor, log_mass: tl.tensor, scale: tl.tensor, vocab: tl.tensor, smoothing: tl.tensor,
    z_loss: tl.tensor,
) -> Tensors:  # fmt: skip
    """What `_slope_tile` must know of a row: dloss/ds_j = exp(s_j - lse) · gain - [j = label] · drop - floor."""
    gain = scale * (1.0 + 2.0 * z_loss * (peak + log_mass))
    return label, peak, log_mass, gain, scale * (1.0 - smoothing), scale * smoothing / vocab


@triton.jit
def _slope_tile(
    logits: tl.tensor, out: tl.tensor, first: tl.tensor, inside: tl.tensor, terms: tl.tuple, softcap: tl.tensor,
    SOFTCAP: tl.constexpr, PRECISE: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, POLICY: tl.constexpr,
) -> None:  # fmt: skip
    """Write the gradient of a tile from position `first` of the row at the pointers; the label is a position, too."""
    label, peak, log_mass, gain, drop, floor = terms
    position = first + _positions(LANES, UNROLL)
    s = tl.load(logits + position, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    derivative = s
    if SOFTCAP:
        s, derivative = _cap(s, softcap, PRECISE)
    slope = tl.exp2((s - peak) * LOG2E - log_mass * LOG2E) * gain - floor
    if (label >= first) & (label < first + LANES * UNROLL):  # one tile of a row; the others need no comparisons
        slope = tl.where(position == label, slope - drop, slope)
    if SOFTCAP:
        slope *= derivative
    tl.store(out + position, slope.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["inner", "start", "ignore_index"])
def _statistics_kernel(
    logits: tl.tensor, target: tl.tensor, statistics: tl.tensor, inner: tl.tensor, stride_outer: tl.tensor,
    stride_inner: tl.tensor, width: tl.tensor, start: tl.tensor, ignore_index: tl.tensor, softcap: tl.tensor,
    SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, PRECISE: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """One row a program: statistics[R, 3 or 4] of this process's columns."""
    row = tl.program_id(0)
    label = tl.load(target + row).to(tl.int64)
    peak = 0.0
    mass = 1.0
    total = 0.0
    at_label = 0.0
    if label != ignore_index:
        base, shift = _row_start(row, inner, stride_outer, stride_inner, SHIFT)
        held = (label >= start) & (label < start + width)
        at_label = tl.load(logits + base + shift + (label - start), mask=held, other=0.0).to(tl.float32)
        if SOFTCAP:
            at_label = _cap(at_label, softcap, PRECISE)[0]
        peak, mass, total = _reduce_row(
            logits + base, shift, width, softcap, SHIFT, SOFTCAP, SMOOTH, PRECISE, LANES, UNROLL, ""
        )
    out = statistics + row.to(tl.int64) * (3 + SMOOTH)
    tl.store(out, peak)
    tl.store(out + 1, mass)
    tl.store(out + 2, at_label)
    if SMOOTH:
        tl.store(out + 3, total)


@triton.jit(do_not_specialize=["rows", "parts", "vocab", "ignore_index"])
def _finish_kernel(
    gathered: tl.tensor, target: tl.tensor, loss: tl.tensor, norm: tl.tensor, rows: tl.tensor, parts: tl.tensor,
    vocab: tl.tensor, ignore_index: tl.tensor, smoothing: tl.tensor, z_loss: tl.tensor,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK rows a program: gathered[parts, R, 3 or 4] to loss[R], norm[R, 2] = (maximum, log Σ exp(s - maximum))."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    label = tl.load(target + row, mask=valid, other=0).to(tl.int64)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    at_label = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    here = gathered + row * (3 + SMOOTH)
    for _ in range(parts):
        part_peak = tl.load(here, mask=valid, other=0.0)
        part_mass = tl.load(here + 1, mask=valid, other=1.0)
        at_label += tl.load(here + 2, mask=valid, other=0.0)
        if SMOOTH:
            total += tl.load(here + 3, mask=valid, other=0.0)
        top = tl.maximum(peak, part_peak)
        base = tl.where(top == float("-inf"), 0.0, top)
        mass = mass * tl.exp2((peak - base) * LOG2E) + part_mass * tl.exp2((part_peak - base) * LOG2E)
        peak = top
        here += rows.to(tl.int64) * (3 + SMOOTH)
    ignored = label == ignore_index
    # The host cannot be told of a label outside the vocabulary without waiting for the device: NaN says it.
    peak = tl.where(ignored | ((label >= 0) & (label < vocab)), peak, float("nan"))
    log_mass = tl.log(mass)
    value = _row_loss(peak, log_mass, at_label, total, vocab, smoothing, z_loss)
    tl.store(loss + row, tl.where(ignored, 0.0, value), mask=valid)
    tl.store(norm + 2 * row, peak, mask=valid)
    tl.store(norm + 2 * row + 1, log_mass, mask=valid)


@triton.jit(do_not_specialize=["rows", "inner", "scale_stride", "start", "vocab", "ignore_index"])
def _gradient_kernel(
    logits: tl.tensor, out: tl.tensor, target: tl.tensor, norm: tl.tensor, scale: tl.tensor, rows: tl.tensor,
    inner: tl.tensor, stride_outer: tl.tensor, stride_inner: tl.tensor, out_stride_outer: tl.tensor,
    out_stride_inner: tl.tensor, scale_stride: tl.tensor, width: tl.tensor, start: tl.tensor, vocab: tl.tensor,
    ignore_index: tl.tensor, smoothing: tl.tensor, z_loss: tl.tensor, softcap: tl.tensor,
    SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, PRECISE: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of a row a program; the last rows first, which the pass before has left in the cache."""
    TILE: tl.constexpr = LANES * UNROLL
    tiles = tl.cdiv(width + 15 * SHIFT, TILE)
    row = rows - 1 - tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * TILE
    base, shift = _row_start(row, inner, stride_outer, stride_inner, SHIFT)
    out_base, _ = _row_start(row, inner, out_stride_outer, out_stride_inner, SHIFT)
    end = shift + width
    position = first + _positions(LANES, UNROLL)
    inside = (position >= shift) & (position < end)
    label = tl.load(target + row).to(tl.int64)
    if label == ignore_index:
        tl.store(out + out_base + position, tl.zeros([UNROLL, LANES], out.dtype.element_ty), mask=inside)
    else:
        peak = tl.load(norm + 2 * row.to(tl.int64))
        log_mass = tl.load(norm + 2 * row.to(tl.int64) + 1)
        factor = tl.load(scale + row.to(tl.int64) * scale_stride).to(tl.float32)
        held = (label >= start) & (label < start + width)
        mark = tl.where(held, label - start + shift, -1).to(tl.int32)
        terms = _row_terms(mark, peak, log_mass, factor, vocab, smoothing, z_loss)
        x = logits + base
        y = out + out_base
        if (first >= shift) & (first + TILE <= end):
            whole = tl.full([UNROLL, LANES], True, tl.int1)
            _slope_tile(x, y, first, whole, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, "")
        else:
            _slope_tile(x, y, first, inside, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, "")


@triton.jit(do_not_specialize=["inner", "ignore_index"])
def _loss_and_gradient_kernel(
    logits: tl.tensor, out: tl.tensor, target: tl.tensor, scale: tl.tensor, loss: tl.tensor, inner: tl.tensor,
    stride_outer: tl.tensor, stride_inner: tl.tensor, out_stride_outer: tl.tensor, out_stride_inner: tl.tensor,
    width: tl.tensor, ignore_index: tl.tensor, smoothing: tl.tensor, z_loss: tl.tensor, softcap: tl.tensor,
    SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, PRECISE: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr, POLICY: tl.constexpr,
) -> None:  # fmt: skip
    """One row a program: loss[R], and the gradient of scale · loss."""
    TILE: tl.constexpr = LANES * UNROLL
    AGAIN: tl.constexpr = "evict_first" if POLICY == "evict_last" else ""
    row = tl.program_id(0)
    label = tl.load(target + row).to(tl.int64)
    factor = tl.load(scale)
    base, shift = _row_start(row, inner, stride_outer, stride_inner, SHIFT)
    out_base, _ = _row_start(row, inner, out_stride_outer, out_stride_inner, SHIFT)
    x = logits + base
    y = out + out_base
    end = shift + width
    offsets = _positions(LANES, UNROLL)
    full = end // TILE
    if label == ignore_index:
        tl.store(loss + row, 0.0)
        for tile in range(0, full + 1):
            inside = (tile * TILE + offsets >= shift) & (tile * TILE + offsets < end)
            tl.store(y + tile * TILE + offsets, tl.zeros([UNROLL, LANES], out.dtype.element_ty), mask=inside)
    else:
        known = (label >= 0) & (label < width)
        at_label = tl.load(x + shift + label, mask=known, other=float("nan")).to(tl.float32)
        if SOFTCAP:
            at_label = _cap(at_label, softcap, PRECISE)[0]
        peak, mass, total = _reduce_row(
            x, shift, width, softcap, SHIFT, SOFTCAP, SMOOTH, PRECISE, LANES, UNROLL, POLICY
        )
        peak = tl.where(known, peak, float("nan"))
        log_mass = tl.log(mass)
        tl.store(loss + row, _row_loss(peak, log_mass, at_label, total, width, smoothing, z_loss))
        mark = tl.where(known, label + shift, -1).to(tl.int32)
        terms = _row_terms(mark, peak, log_mass, factor, width, smoothing, z_loss)
        if (full >= SHIFT) & (full * TILE < end):
            first = full * TILE
            inside = first + offsets < end
            _slope_tile(x, y, first, inside, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, AGAIN)
        whole = tl.full([UNROLL, LANES], True, tl.int1)
        for back in range(SHIFT, full):
            first = (full - 1 + SHIFT - back) * TILE
            _slope_tile(x, y, first, whole, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, AGAIN)
        if SHIFT:
            inside = (offsets >= shift) & (offsets < end)
            _slope_tile(x, y, 0, inside, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, AGAIN)


@triton.jit(do_not_specialize=["rows", "inner"])
def _rescale_kernel(
    x: tl.tensor, factor: tl.tensor, rows: tl.tensor, inner: tl.tensor, stride_outer: tl.tensor,
    stride_inner: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply all rows by one number; the usual one, 1, costs some microseconds."""
    value = tl.load(factor).to(tl.float32)
    if value != 1.0:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            base, _ = _row_start(row, inner, stride_outer, stride_inner, False)
            for first in range(0, width, BLOCK):
                column = first + tl.arange(0, BLOCK)
                y = tl.load(x + base + column, mask=column < width, other=0.0).to(tl.float32) * value
                tl.store(x + base + column, y.to(x.dtype.element_ty), mask=column < width)


# --- Launches, and the same in plain PyTorch for CPUs and float64 ----------------------------------------------------
# Below, `logits` are (outer, inner, width) with neighbouring columns, and `target` is (outer · inner,).


@dataclass(frozen=True)
class LossTerms:
    """Which loss, and which columns of the whole vocabulary this process holds: `start` on, of `vocab`."""

    ignore_index: int
    smoothing: float
    z_loss: float
    softcap: float
    start: int
    vocab: int

    def pack(self) -> list[float]:
        """As an operator takes them."""
        return [float(value) for value in astuple(self)]

    @classmethod
    def unpack(cls, values: list[float]) -> LossTerms:
        """From what `pack` made."""
        return cls(*(field(value) for field, value in zip((int, float, float, float, int, int), values, strict=True)))


@dataclass(frozen=True)
class Launch:
    """How a kernel is laid over a row.

    Attributes:
        warps: Warps of a program.
        vectors: 16-byte vectors that each thread reads before it uses the first one.
        policy: Triton's eviction policy for what the one-pass kernel will read a second time: none, or "evict_last".
    """

    warps: int
    vectors: int
    policy: str = ""

    def lanes(self, itemsize: int) -> int:
        """Columns that the program's threads read with one vector each."""
        return self.warps * 512 // itemsize


def statistics_launch(width: int, itemsize: int, shifted: bool) -> Launch:
    """For reading rows of `width` once: programs of up to 8 warps, several a multiprocessor."""
    return _launch(triton.cdiv(width * itemsize, 512), 1 if shifted else 4, 8)


def gradient_launch(width: int, itemsize: int, shifted: bool) -> Launch:
    """For reading and writing rows once: likewise; fewer vectors, since these also wait in registers to be written."""
    return _launch(triton.cdiv(width * itemsize, 512), 1 if shifted else 2, 8)


def one_pass_launch(width: int, itemsize: int, shifted: bool, plain: bool) -> Launch:
    """For loss and gradient at once: few rows on a multiprocessor, a wide one alone, so that its cache holds them.

    32 warps leave 64 registers a thread, in which 4 vectors are too many unless the loss is `plain`, without cap and
    smoothing, and no mask is finer than a vector.
    """
    most = 4 if plain and width % 16 == 0 else 2
    warps = 32 if width * itemsize > 96 * 1024 else 16
    return _launch(triton.cdiv(width * itemsize, 512), 1 if shifted else most, warps)


def _launch(needed: int, most_vectors: int, most_warps: int) -> Launch:
    """As many vectors and warps, up to these numbers, as a row has use for that takes `needed` vectors of a warp."""
    vectors = min(most_vectors, triton.next_power_of_2(needed))
    return Launch(min(most_warps, triton.next_power_of_2(triton.cdiv(needed, vectors))), vectors)


def _row_strides(*tensors: Tensor) -> tuple[tuple[int, ...], bool]:
    """Strides of the first two dimensions of each tensor, and whether the kernels must align rows themselves."""
    strides = tuple(x.stride(i) if x.shape[i] > 1 else 0 for x in tensors for i in (0, 1))
    alike = strides[:2] == strides[-2:]
    return strides, alike and any(stride % 16 for stride in strides)


def _flags(logits: Tensor, terms: LossTerms, shifted: bool) -> dict[str, Any]:
    """The kernels' common constants."""
    return {"SHIFT": int(shifted), "SOFTCAP": terms.softcap > 0, "PRECISE": logits.dtype == torch.float32}


def _capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """(R, width) logits after the soft cap, in fp32 or float64, and the cap's derivative."""
    s = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    if not softcap:
        return s, None
    tanh = torch.tanh(s / softcap)
    return softcap * tanh, 1 - tanh * tanh


def _label_columns(target: Tensor, terms: LossTerms, width: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in this process's columns, and in which: (R, 1) each."""
    held = (target >= terms.start) & (target < terms.start + width)
    return held[:, None], torch.where(held, target - terms.start, 0)[:, None].long()


def statistics(logits: Tensor, target: Tensor, terms: LossTerms, launch: Launch | None = None) -> Tensor:
    """What one process says of each row: (R, 3) maximum, Σ exp(s - maximum), s of the label; with smoothing also Σ s.

    The label's s is 0 where another process holds it. An ignored row says 0, 1, 0, 0.
    """
    smooth, width = terms.smoothing > 0, logits.shape[-1]
    if runs_kernel(logits):
        strides, shifted = _row_strides(logits)
        launch = launch or statistics_launch(width, logits.element_size(), shifted)
        out = logits.new_empty(len(target), 3 + smooth, dtype=torch.float32)
        with torch.cuda.device_of(logits):
            _statistics_kernel[(len(target),)](
                logits, target, out, logits.shape[1], *strides, width, terms.start, terms.ignore_index, terms.softcap,
                **_flags(logits, terms, shifted), SMOOTH=smooth, LANES=launch.lanes(logits.element_size()),
                UNROLL=launch.vectors, num_warps=launch.warps,
            )  # fmt: skip
        return out
    s, _ = _capped(logits, terms.softcap)
    peak = s.amax(1)
    mass = torch.exp(s - torch.where(peak == -torch.inf, 0, peak)[:, None]).sum(1)
    held, column = _label_columns(target, terms, width)
    at_label = torch.where(held, s.gather(1, column), 0)[:, 0]
    said = torch.stack([peak, mass, at_label] + [s.sum(1)] * smooth, 1)
    ignored = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=s.dtype, device=s.device)[: said.shape[1]]
    return torch.where((target == terms.ignore_index)[:, None], ignored, said)


def finish(gathered: Tensor, target: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """From the `statistics` of all processes, (processes, R, 3 or 4), the loss (R,) and each row's norm (R, 2).

    The norm is the maximum over the whole vocabulary and log Σ exp(s - maximum); lse is their sum.
    """
    if runs_kernel(gathered):
        loss, norm = gathered.new_empty(len(target)), gathered.new_empty(len(target), 2)
        with torch.cuda.device_of(gathered):
            _finish_kernel[(triton.cdiv(len(target), 128),)](
                gathered, target, loss, norm, len(target), len(gathered), terms.vocab, terms.ignore_index,
                terms.smoothing, terms.z_loss, SMOOTH=terms.smoothing > 0, BLOCK=128, num_warps=4,
            )  # fmt: skip
        return loss, norm
    peak = gathered[..., 0].amax(0)
    log_mass = (gathered[..., 1] * torch.exp(gathered[..., 0] - peak)).sum(0).log()
    ignored = target == terms.ignore_index
    peak = torch.where(ignored | ((target >= 0) & (target < terms.vocab)), peak, torch.nan)
    lse, said = peak + log_mass, gathered.sum(0)
    loss = (1 - terms.smoothing) * (peak - said[:, 2]) + log_mass + terms.z_loss * lse * lse
    if terms.smoothing:
        loss = loss + terms.smoothing * (peak - said[:, 3] / terms.vocab)
    return torch.where(ignored, 0, loss), torch.stack([peak, log_mass], 1)


def gradient_into(
    out: Tensor,
    logits: Tensor,
    target: Tensor,
    norm: Tensor,
    scale: Tensor,
    terms: LossTerms,
    launch: Launch | None = None,
) -> None:
    """Write the gradient of Σ scale · loss by `logits` into `out`, which may be `logits` themselves.

    Args:
        out: Like `logits`.
        logits: (outer, inner, width).
        target: (R,).
        norm: (R, 2) from `finish`.
        scale: (R,) or (1,), of the loss's dtype.
        terms: The loss.
        launch: Instead of the heuristic's.
    """
    width = logits.shape[-1]
    if runs_kernel(logits):
        strides, shifted = _row_strides(logits, out)
        launch = launch or gradient_launch(width, logits.element_size(), shifted)
        lanes = launch.lanes(logits.element_size())
        tiles = triton.cdiv(width + 15 * shifted, lanes * launch.vectors)
        with torch.cuda.device_of(logits):
            _gradient_kernel[(len(target) * tiles,)](
                logits, out, target, norm, scale, len(target), logits.shape[1], *strides,
                scale.stride(0) if len(scale) > 1 else 0, width, terms.start, terms.vocab, terms.ignore_index,
                terms.smoothing, terms.z_loss, terms.softcap, **_flags(logits, terms, shifted), LANES=lanes,
                UNROLL=launch.vectors, num_warps=launch.warps,
            )  # fmt: skip
        return
    s, derivative = _capped(logits, terms.softcap)
    peak, log_mass = norm[:, :1], norm[:, 1:]
    held, column = _label_columns(target, terms, width)
    slope = torch.exp(s - peak - log_mass) * (1 + 2 * terms.z_loss * (peak + log_mass)) - terms.smoothing / terms.vocab
    slope = slope.scatter_add(1, column, held.to(s.dtype) * (terms.smoothing - 1)) * scale[:, None]
    if derivative is not None:
        slope = slope * derivative
    out.copy_(torch.where((target == terms.ignore_index)[:, None], 0, slope).view(logits.shape))


def loss_and_gradient_into(
    out: Tensor, logits: Tensor, target: Tensor, scale: Tensor, terms: LossTerms, launch: Launch | None = None
) -> Tensor:
    """The loss (R,) and, written into `out`, the gradient of scale · Σ loss by `logits` (or in their place): one pass.

    The columns must be the whole vocabulary. `scale` is (1,).
    """
    if not runs_kernel(logits):
        loss, norm = finish(statistics(logits, target, terms)[None], target, terms)
        gradient_into(out, logits, target, norm, scale, terms)
        return loss
    width = logits.shape[-1]
    strides, shifted = _row_strides(logits, out)
    plain = not (terms.softcap or terms.smoothing)
    launch = launch or one_pass_launch(width, logits.element_size(), shifted, plain)
    loss = logits.new_empty(len(target), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _loss_and_gradient_kernel[(len(target),)](
            logits, out, target, scale, loss, logits.shape[1], *strides, width, terms.ignore_index, terms.smoothing,
            terms.z_loss, terms.softcap, **_flags(logits, terms, shifted), SMOOTH=terms.smoothing > 0,
            LANES=launch.lanes(logits.element_size()), UNROLL=launch.vectors, POLICY=launch.policy,
            num_warps=launch.warps,
        )  # fmt: skip
    return loss


def rescale_(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply `x` (outer, inner, width) in place by the single number in `factor`; 1 costs next to nothing."""
    if not runs_kernel(x):
        return x.mul_(factor)
    rows = x.shape[0] * x.shape[1]
    if rows:
        with torch.cuda.device_of(x):
            _rescale_kernel[(min(rows, 1024),)](
                x, factor, rows, x.shape[1], *_row_strides(x)[0], x.shape[2], BLOCK=4096, num_warps=4
            )
    return x


def losses(logits: Tensor, target: Tensor, terms: LossTerms, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Losses and norms of all rows as `finish` returns them, with one collective if there is a group."""
    said = statistics(logits, target, terms)
    gathered = said[None]
    if group is not None and len(target):
        gathered = said.new_empty(dist.get_world_size(group) * said.shape[0], said.shape[1])
        dist.all_gather_into_tensor(gathered, said, group=group)
        gathered = gathered.view(-1, *said.shape)
    return finish(gathered, target, terms)
