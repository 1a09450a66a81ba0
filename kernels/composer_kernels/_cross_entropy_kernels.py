"""Kernels of `cross_entropy` and `linear_cross_entropy`: statistics of rows of logits, their gradient, both at once.

`cross_entropy` says what they compute and how many bytes that moves; `_cross_entropy` launches them. Legend: R rows
(tokens), V columns of the whole vocabulary, of which this process holds `width`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
type Tensors = tuple[tl.tensor, ...]

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
    UNROLL: tl.constexpr, POLICY: tl.constexpr, KEEP: tl.constexpr,
) -> Tensors:  # fmt: skip
    """Maximum, Σ exp(s - maximum) and Σ s of the row at `shift` after the pointer `row`, and its first KEEP tiles."""
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
    kept = ()
    for tile in tl.static_range(KEEP):
        kept += (tl.load(row + tile * TILE + offsets, eviction_policy="evict_first"),)  # type: ignore[assignment]
    for tile in tl.static_range(KEEP):
        peak, mass, total = _absorb(peak, mass, total, kept[tile], everywhere, softcap, SOFTCAP, SMOOTH, PRECISE)
    for tile in range(SHIFT + KEEP, full):
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
    return top, mass, whole, kept


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
def _store_slope(
    x: tl.tensor, out: tl.tensor, first: tl.tensor, inside: tl.tensor, terms: tl.tuple, softcap: tl.tensor,
    SOFTCAP: tl.constexpr, PRECISE: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, STORE: tl.constexpr,
) -> None:  # fmt: skip
    """Write the gradient of the tile x from position `first` of the row at the pointer; the label is one, too."""
    label, peak, log_mass, gain, drop, floor = terms
    position = first + _positions(LANES, UNROLL)
    s = x.to(tl.float32)
    derivative = s
    if SOFTCAP:
        s, derivative = _cap(s, softcap, PRECISE)
    slope = tl.exp2((s - peak) * LOG2E - log_mass * LOG2E) * gain - floor
    if (label >= first) & (label < first + LANES * UNROLL):  # one tile of a row; the others need no comparisons
        slope = tl.where(position == label, slope - drop, slope)
    if SOFTCAP:
        slope *= derivative
    tl.store(out + position, slope.to(out.dtype.element_ty), mask=inside, eviction_policy=STORE)


@triton.jit
def _slope_tile(
    logits: tl.tensor, out: tl.tensor, first: tl.tensor, inside: tl.tensor, terms: tl.tuple, softcap: tl.tensor,
    SOFTCAP: tl.constexpr, PRECISE: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, POLICY: tl.constexpr,
    STORE: tl.constexpr,
) -> None:  # fmt: skip
    """`_store_slope` of the tile in memory."""
    x = tl.load(logits + (first + _positions(LANES, UNROLL)), mask=inside, other=0.0, eviction_policy=POLICY)
    _store_slope(x, out, first, inside, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, STORE)


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
        peak, mass, total, _ = _reduce_row(
            logits + base, shift, width, softcap, SHIFT, SOFTCAP, SMOOTH, PRECISE, LANES, UNROLL, "", 0
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
            _slope_tile(x, y, first, whole, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, "", "")
        else:
            _slope_tile(x, y, first, inside, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, "", "")


@triton.jit(do_not_specialize=["inner", "ignore_index"])
def _loss_and_gradient_kernel(
    logits: tl.tensor, out: tl.tensor, target: tl.tensor, scale: tl.tensor, loss: tl.tensor, inner: tl.tensor,
    stride_outer: tl.tensor, stride_inner: tl.tensor, out_stride_outer: tl.tensor, out_stride_inner: tl.tensor,
    width: tl.tensor, ignore_index: tl.tensor, smoothing: tl.tensor, z_loss: tl.tensor, softcap: tl.tensor,
    SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, PRECISE: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr, POLICY: tl.constexpr, KEEP: tl.constexpr, STORE: tl.constexpr,
) -> None:  # fmt: skip
    """One row a program: loss[R], and the gradient of scale · loss; the first KEEP tiles stay in registers."""
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
        peak, mass, total, kept = _reduce_row(
            x, shift, width, softcap, SHIFT, SOFTCAP, SMOOTH, PRECISE, LANES, UNROLL, POLICY, KEEP
        )
        peak = tl.where(known, peak, float("nan"))
        log_mass = tl.log(mass)
        tl.store(loss + row, _row_loss(peak, log_mass, at_label, total, width, smoothing, z_loss))
        mark = tl.where(known, label + shift, -1).to(tl.int32)
        terms = _row_terms(mark, peak, log_mass, factor, width, smoothing, z_loss)
        if (full >= SHIFT) & (full * TILE < end):
            first = full * TILE
            inside = first + offsets < end
            _slope_tile(x, y, first, inside, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, AGAIN, STORE)
        whole = tl.full([UNROLL, LANES], True, tl.int1)
        for back in range(SHIFT + KEEP, full):
            first = (full - 1 + SHIFT + KEEP - back) * TILE
            _slope_tile(x, y, first, whole, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, AGAIN, STORE)
        if SHIFT:
            inside = (offsets >= shift) & (offsets < end)
            _slope_tile(x, y, 0, inside, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, AGAIN, STORE)
        for tile in tl.static_range(KEEP):
            _store_slope(kept[tile], y, tile * TILE, whole, terms, softcap, SOFTCAP, PRECISE, LANES, UNROLL, STORE)


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
