"""What `cross_entropy` and `linear_cross_entropy` share: launches of their kernels, and the same in plain PyTorch.

PyTorch's form is for CPUs and float64. Here `logits` are (outer, inner, width) with neighbouring columns, and `target`
is (outer · inner,).
"""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.distributed import ProcessGroup

from composer_kernels._cross_entropy_kernels import (
    _finish_kernel,
    _gradient_kernel,
    _loss_and_gradient_kernel,
    _rescale_kernel,
    _statistics_kernel,
)
from composer_kernels._launch import Kernel, runs_kernel


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
        keep: Tiles of a row that the one-pass kernel keeps in registers instead, where no shift is needed.
        store: Triton's eviction policy for the gradient that the one-pass kernel writes: none, or "evict_first".
    """

    warps: int
    vectors: int
    policy: str = ""
    keep: int = 0
    store: str = ""

    @functools.cached_property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """As `Kernel.launch` takes them."""
        return (("num_warps", self.warps),)

    def lanes(self, itemsize: int) -> int:
        """Columns that the program's threads read with one vector each."""
        return self.warps * 512 // itemsize


_statistics = Kernel(_statistics_kernel)
_finish = Kernel(_finish_kernel)
_gradient = Kernel(_gradient_kernel)
_loss_and_gradient = Kernel(_loss_and_gradient_kernel)
_rescale = Kernel(_rescale_kernel)
_FOUR_WARPS = (("num_warps", 4),)


@functools.cache
def statistics_launch(width: int, itemsize: int, shifted: bool) -> Launch:
    """For reading rows of `width` once: programs of up to 8 warps, several a multiprocessor."""
    return _launch(triton.cdiv(width * itemsize, 512), 1 if shifted else 4, 8)


@functools.cache
def gradient_launch(width: int, itemsize: int, shifted: bool) -> Launch:
    """For reading and writing rows once: likewise; fewer vectors, since these also wait in registers to be written."""
    return _launch(triton.cdiv(width * itemsize, 512), 1 if shifted else 2, 8)


@functools.cache
def one_pass_launch(width: int, itemsize: int, shifted: bool, plain: bool) -> Launch:
    """For loss and gradient at once: few rows on a multiprocessor, a wide one alone, so that the caches hold them.

    What will be read again is to stay in the L2 cache, and what is written is to leave it first: 8192 rows of 131072 in
    bfloat16 take an H100 1483 us so, 1508 with one of the two wishes, 1778 without.

    32 warps leave 64 registers a thread, in which 4 vectors are too many unless the loss is `plain`, without cap and
    smoothing, and no mask is finer than a vector.
    """
    most = 4 if plain and width % 16 == 0 else 2
    warps = 32 if width * itemsize > 96 * 1024 else 16
    launch = _launch(triton.cdiv(width * itemsize, 512), 1 if shifted else most, warps)
    return replace(launch, policy="evict_last", store="evict_first")


def _launch(needed: int, most_vectors: int, most_warps: int) -> Launch:
    """As many vectors and warps, up to these numbers, as a row has use for that takes `needed` vectors of a warp."""
    vectors = min(most_vectors, triton.next_power_of_2(needed))
    return Launch(min(most_warps, triton.next_power_of_2(triton.cdiv(needed, vectors))), vectors)


def _row_strides(*tensors: Tensor) -> tuple[tuple[int, ...], bool]:
    """Strides of the first two dimensions of each tensor, and whether the kernels must align rows themselves."""
    strides: tuple[int, ...] = ()
    for x in tensors:
        (outer, inner, _), (first, second, _) = x.shape, x.stride()
        strides += (first if outer > 1 else 0, second if inner > 1 else 0)
    alike = strides[:2] == strides[-2:]
    return strides, alike and (strides[0] % 16 > 0 or strides[1] % 16 > 0)


def _flags(logits: Tensor, terms: LossTerms) -> tuple[bool, bool]:
    """The kernels' constants SOFTCAP and PRECISE."""
    return terms.softcap > 0, logits.dtype == torch.float32


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
        capped, precise, lanes = *_flags(logits, terms), launch.lanes(logits.element_size())
        _statistics.launch(
            target.shape[0],
            (logits, target, out),
            (logits.shape[1], *strides, width),
            (terms.start, terms.ignore_index),
            (terms.softcap,),
            (int(shifted), capped, smooth, precise, lanes, launch.vectors),
            launch.options,
        )
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
        rows = target.shape[0]
        loss, norm = gathered.new_empty(rows), gathered.new_empty(rows, 2)
        _finish.launch(
            -(-rows // 128),
            (gathered, target, loss, norm),
            (),
            (rows, gathered.shape[0], terms.vocab, terms.ignore_index),
            (terms.smoothing, terms.z_loss),
            (terms.smoothing > 0, 128),
            _FOUR_WARPS,
        )
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
        tiles = -(-(width + 15 * shifted) // (lanes * launch.vectors))
        rows = target.shape[0]
        _gradient.launch(
            rows * tiles,
            (logits, out, target, norm, scale),
            (rows, logits.shape[1], *strides, scale.stride(0) if scale.shape[0] > 1 else 0, width),
            (terms.start, terms.vocab, terms.ignore_index),
            (terms.smoothing, terms.z_loss, terms.softcap),
            (int(shifted), *_flags(logits, terms), lanes, launch.vectors),
            launch.options,
        )
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
    lanes = launch.lanes(logits.element_size())
    keep = 0 if shifted else min(launch.keep, width // (lanes * launch.vectors))
    loss = logits.new_empty(len(target), dtype=torch.float32)
    capped, precise = _flags(logits, terms)
    reading = (lanes, launch.vectors, launch.policy, keep, launch.store)
    _loss_and_gradient.launch(
        target.shape[0],
        (logits, out, target, scale, loss),
        (logits.shape[1], *strides, width),
        (terms.ignore_index,),
        (terms.smoothing, terms.z_loss, terms.softcap),
        (int(shifted), capped, terms.smoothing > 0, precise, *reading),
        launch.options,
    )
    return loss


def rescale_(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply `x` (outer, inner, width) in place by the single number in `factor`; 1 costs next to nothing."""
    if not runs_kernel(x):
        return x.mul_(factor)
    rows = x.shape[0] * x.shape[1]
    integers = (rows, x.shape[1], *_row_strides(x)[0], x.shape[2])
    _rescale.launch(min(rows, 1024), (x, factor), integers, (), (), (4096,), _FOUR_WARPS)
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
