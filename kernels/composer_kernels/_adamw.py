"""The kernels of `adamw`, over many tensors in one launch, and how they are launched.

Layout: the table of an update has a row for each tensor: the addresses of the parameter, of m, of v, of the copy and of
the step, the number of elements, and the number of the first program that works on this tensor. Addresses of gradients,
which change more often, have a table of their own; a row of the norm's has the address, the number of elements and the
first program. Scalars that may differ between tensors, such as bias corrections, lie in rows of SCALARS fp32 numbers.

Legend: a program handles TILES x BLOCK neighbouring elements of one tensor, and masks them only where the tensor ends.
ALIGNED: every address of the table is a multiple of 16.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_kernels._launch import Kernel, describe
from composer_kernels._multi_tensor import aligned, is_dense, spread, tables

SCALARS = tl.constexpr(8)
"""Of a tensor: 1 - lr·λ, lr / (1 - β1^t), √(1 - β2^t), ε, 1 - β1, β2, 1 - β2, and the sign of the gradient."""

ELEMENT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _pointer(table_ptr: tl.tensor, start: tl.tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """To element `start` of the tensor whose address is stored at `table_ptr`."""
    pointer = tl.load(table_ptr).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _update_block(
    row: tl.tensor, grad_ptr: tl.tensor, scalars: tl.tensor, scale: tl.tensor, start: tl.tensor, numel: tl.tensor,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr, COPY: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
) -> None:  # fmt: skip
    offset = tl.arange(0, BLOCK)
    mask = (start + offset < numel) if MASKED else None
    param_ptr = _pointer(row, start, PARAM, ALIGNED) + offset
    exp_avg_ptr = _pointer(row + 1, start, EXP_AVG, ALIGNED) + offset
    exp_avg_sq_ptr = _pointer(row + 2, start, EXP_AVG_SQ, ALIGNED) + offset
    g = tl.load(_pointer(grad_ptr, start, GRAD, ALIGNED) + offset, mask=mask, eviction_policy="evict_first")
    param = tl.load(param_ptr, mask=mask).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr, mask=mask, eviction_policy="evict_first").to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr, mask=mask, eviction_policy="evict_first").to(tl.float32)
    g = g.to(tl.float32) * (scale * tl.load(scalars + 7))
    exp_avg += (g - exp_avg) * tl.load(scalars + 4)
    exp_avg_sq = exp_avg_sq * tl.load(scalars + 5) + g * g * tl.load(scalars + 6)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.load(scalars + 2)) + tl.load(scalars + 3)
    param = param * tl.load(scalars) - tl.load(scalars + 1) * tl.div_rn(exp_avg, denominator)
    tl.store(param_ptr, param.to(PARAM), mask=mask)
    tl.store(exp_avg_ptr, exp_avg.to(EXP_AVG), mask=mask, eviction_policy="evict_first")
    tl.store(exp_avg_sq_ptr, exp_avg_sq.to(EXP_AVG_SQ), mask=mask, eviction_policy="evict_first")
    if COPY is not None:
        tl.store(_pointer(row + 3, start, COPY, ALIGNED) + offset, param.to(COPY), mask=mask)


@triton.jit
def _update_kernel(
    table_ptr: tl.tensor, grads_ptr: tl.tensor, owners_ptr: tl.tensor, scalars_ptr: tl.tensor, scale_ptr: tl.tensor,
    found_inf_ptr: tl.tensor,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr, COPY: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    owner = tl.load(owners_ptr + tl.program_id(0))
    row = table_ptr + owner * 7
    numel = tl.load(row + 5)
    if found_inf_ptr is not None:
        numel = tl.where(tl.load(found_inf_ptr) == 0.0, numel, 0)
    start = (tl.program_id(0) - tl.load(row + 6)) * (BLOCK * TILES)
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr).to(tl.float32)
    scalars = scalars_ptr + owner * SCALARS
    grad_ptr = grads_ptr + owner
    if start + BLOCK * TILES <= numel:
        for tile in range(TILES):
            _update_block(
                row, grad_ptr, scalars, scale, start + tile * BLOCK, numel,
                PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, COPY, ALIGNED, BLOCK, MASKED=False,
            )  # fmt: skip
    else:
        for tile in range(TILES):
            _update_block(
                row, grad_ptr, scalars, scale, start + tile * BLOCK, numel,
                PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, COPY, ALIGNED, BLOCK, MASKED=True,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first", "tensors", "step"])
def _prepare_kernel(
    table_ptr: tl.tensor, scalars_ptr: tl.tensor, lr_ptr: tl.tensor, found_inf_ptr: tl.tensor,
    first: tl.tensor, tensors: tl.tensor, step: tl.tensor,
    lr: tl.tensor, log_beta1: tl.tensor, log_beta1_rest: tl.tensor, log_beta2: tl.tensor, log_beta2_rest: tl.tensor,
    one_minus_beta1: tl.tensor, beta2: tl.tensor, one_minus_beta2: tl.tensor, eps: tl.tensor, weight_decay: tl.tensor,
    sign: tl.tensor,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tensors
    index += first
    if STEPS:  # each tensor counts its own
        step_ptr = tl.load(table_ptr + index * 7 + 4, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        count = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
        stored = count
        if found_inf_ptr is not None:
            stored = tl.where(tl.load(found_inf_ptr) == 0.0, count, count - 1.0)
        tl.store(step_ptr, stored, mask=mask)
    else:
        count = tl.zeros([BLOCK], tl.float32) + step
    wide = tl.zeros([BLOCK], tl.float64)  # 1 - β^t cancels: fp32 would leave four digits of it
    rate = wide + (lr if lr_ptr is None else tl.load(lr_ptr))
    correction1 = 1.0 - tl.exp((wide + log_beta1 + log_beta1_rest) * count)
    correction2 = 1.0 - tl.exp((wide + log_beta2 + log_beta2_rest) * count)
    row = scalars_ptr + index * SCALARS
    zero = tl.zeros([BLOCK], tl.float32)
    tl.store(row, (1.0 - rate * weight_decay).to(tl.float32), mask=mask)
    tl.store(row + 1, (rate / correction1).to(tl.float32), mask=mask)
    tl.store(row + 2, tl.sqrt(correction2).to(tl.float32), mask=mask)
    tl.store(row + 3, zero + eps, mask=mask)
    tl.store(row + 4, zero + one_minus_beta1, mask=mask)
    tl.store(row + 5, zero + beta2, mask=mask)
    tl.store(row + 6, zero + one_minus_beta2, mask=mask)
    tl.store(row + 7, zero + sign, mask=mask)


@triton.jit(do_not_specialize=["first_result"])
def _square_kernel(
    table_ptr: tl.tensor, owners_ptr: tl.tensor, squares_ptr: tl.tensor, first_result: tl.tensor,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    row = table_ptr + tl.load(owners_ptr + tl.program_id(0)) * 3
    numel = tl.load(row + 1)
    start = (tl.program_id(0) - tl.load(row + 2)) * (BLOCK * TILES)
    grad_ptr = _pointer(row, start, GRAD, ALIGNED)
    offset = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    if start + BLOCK * TILES <= numel:
        for tile in range(TILES):
            g = tl.load(grad_ptr + tile * BLOCK + offset).to(tl.float32)
            squares += g * g
    else:
        for tile in range(TILES):
            mask = start + tile * BLOCK + offset < numel
            g = tl.load(grad_ptr + tile * BLOCK + offset, mask=mask, other=0.0).to(tl.float32)
            squares += g * g
    tl.store(squares_ptr + first_result + tl.program_id(0), tl.sum(squares))


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        block: Elements that a program handles at once, a power of two.
        tiles: How many such blocks it handles, one after another.
        warps: Warps of a program.
    """

    block: int
    tiles: int
    warps: int

    @functools.cached_property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """As `Kernel.launch` takes them."""
        return (("num_warps", self.warps),)


UPDATE_LAUNCH = Launch(block=1024, tiles=4, warps=8)
"""Four elements a thread: one 16-byte load of each fp32 input. Twice as many double the registers (`ptxas -v`)."""

NORM_LAUNCH = Launch(block=2048, tiles=16, warps=8)
"""A number for each 32768 elements is left to be added up."""

PREPARE_BLOCK = 128

_update = Kernel(_update_kernel)
_prepare = Kernel(_prepare_kernel)
_square = Kernel(_square_kernel)


@dataclass(frozen=True)
class Group:
    """Tensors that are updated with the same hyperparameters. Sequences have an entry for each parameter.

    Attributes:
        params: What is updated, in place.
        grads: Gradients.
        exp_avgs: m, updated in place.
        exp_avg_sqs: v, updated in place.
        steps: How many updates each has had, fp32 scalars on its device, counted on here; or t, for all, which the
            caller counts.
        copies: 16-bit copies that are written, None where there is none.
        lr: Learning rate, a number or a scalar tensor.
        betas: β1 and β2.
        eps: ε.
        weight_decay: λ.
        maximize: Go up the gradient.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor] | int
    copies: Sequence[Tensor | None]
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool


def tensors_of(group: Group, index: int) -> tuple[Tensor | None, ...]:
    """The parameter of that index, its gradient, m, v and copy."""
    return group.params[index], group.grads[index], group.exp_avgs[index], group.exp_avg_sqs[index], group.copies[index]


@dataclass(frozen=True)
class Update:
    """A launch that updates many tensors of equal types, as often as one likes while they lie where they lay.

    Attributes:
        device: Where all lie.
        table: A row for each tensor.
        grads: Addresses of the gradients.
        owners: The tensor each program works on.
        spans: For each group that has tensors here its number, its first row and how many rows it has.
        constants: Of the kernel.
        launch: How it is launched.
        copied: Gradients that were copied first, to be laid out as their parameters.
    """

    device: torch.device
    table: Tensor
    grads: Tensor
    owners: Tensor
    spans: tuple[tuple[int, int, int], ...]
    constants: tuple[Any, ...]
    launch: Launch
    copied: tuple[Tensor, ...]

    def run(self, groups: Sequence[Group], scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update; hyperparameters and numbers of steps may be others than last time."""
        for name, scalar in {"scale": scale, "found_inf": found_inf}.items():
            if scalar is not None and scalar.device != self.device:
                wanted = f"{name} must be on {self.device}, as the params"
                raise ValueError(f"adamw_step: {wanted}; given {describe(scalar)}")
        rows = self.spans[-1][1] + self.spans[-1][2]
        scalars = torch.empty(rows, int(SCALARS), dtype=torch.float32, device=self.device)
        for number, start, count in self.spans:
            _launch_prepare(groups[number], self.table, scalars, start, count, found_inf)
        _update.launch(
            len(self.owners),
            (self.table, self.grads, self.owners, scalars, scale, found_inf),
            (),
            (),
            (),
            self.constants,
            self.launch.options,
        )


def prepare_update(
    groups: Sequence[Group], members: Sequence[tuple[int, int]], launch: Launch = UPDATE_LAUNCH
) -> Update:
    """The launch for tensors of equal types, given by the numbers of their group (ascending) and in it."""
    given = [groups[g].grads[i] for g, i in members]
    grads = [_laid_out_as(groups[g].params[i], grad) for (g, i), grad in zip(members, given, strict=True)]
    programs, first = spread([tensor.numel() for tensor in grads], launch.block * launch.tiles)
    addresses = (_addresses(groups[g], i) for g, i in members)
    rows = (
        row
        for where, tensor, start in zip(addresses, grads, first, strict=True)
        for row in (*where, tensor.numel(), start)
    )
    spans, start = [], 0
    for number, found in itertools.groupby(members, key=lambda member: member[0]):
        count = len(list(found))
        spans.append((number, start, count))
        start += count
    tensors = tensors_of(groups[members[0][0]], members[0][1])
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    on_16 = aligned(grads) and all(aligned(tensors_of(groups[g], i)) for g, i in members)
    param = groups[members[0][0]].params[members[0][1]]
    return Update(
        param.device,
        tables.integers(tuple(rows), param),
        tables.integers(tuple(tensor.data_ptr() for tensor in grads), param),
        tables.owners(programs, param),
        tuple(spans),
        (*[None if dtype is None else ELEMENT_TYPES[dtype] for dtype in dtypes], on_16, launch.block, launch.tiles),
        launch,
        tuple(new for new, old in zip(grads, given, strict=True) if new is not old),
    )


def launch_update(
    groups: Sequence[Group],
    members: Sequence[tuple[int, int]],
    scale: Tensor | None,
    found_inf: Tensor | None,
    launch: Launch = UPDATE_LAUNCH,
) -> None:
    """Run the kernels on the tensors of `prepare_update`."""
    prepare_update(groups, members, launch).run(groups, scale, found_inf)


def _addresses(group: Group, index: int) -> tuple[int, ...]:
    """Columns of the table: of the parameter, m, v, the copy and the step."""
    param, _, exp_avg, exp_avg_sq, copy = tensors_of(group, index)
    step = 0 if isinstance(group.steps, int) else group.steps[index].data_ptr()
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (param, exp_avg, exp_avg_sq, copy)]
    return (*addresses, step)


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient, or a copy whose elements lie in the order of the parameter's."""
    if grad.stride() == param.stride() or (grad.is_contiguous() and param.is_contiguous()):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _launch_prepare(
    group: Group, table: Tensor, scalars: Tensor, first: int, tensors: int, found_inf: Tensor | None
) -> None:
    """Count the step of these rows of the table and compute their scalars."""
    lr = group.lr
    on_device = lr if isinstance(lr, Tensor) and (lr.is_cuda or not table.is_cuda) else None
    beta1, beta2 = group.betas
    step = group.steps if isinstance(group.steps, int) else None
    _prepare.launch(
        -(-tensors // PREPARE_BLOCK),
        (table, scalars, on_device, found_inf),
        (),
        (first, tensors, step or 0),
        (
            0.0 if on_device is not None else float(lr),
            *_exact_log(beta1),
            *_exact_log(beta2),
            1 - beta1,
            beta2,
            1 - beta2,
            group.eps,
            group.weight_decay,
            -1.0 if group.maximize else 1.0,
        ),
        (step is None, PREPARE_BLOCK),
        (("num_warps", 4),),
    )


@functools.cache
def _exact_log(beta: float) -> tuple[float, float]:
    """Logarithm as two fp32 numbers, of which kernels make a float64; for 0 one whose exponential is 0."""
    log = math.log(beta) if beta > 0 else -1e6
    rounded = torch.tensor(log, dtype=torch.float32).item()
    return rounded, log - rounded


def launch_norm(grads: Sequence[Tensor], launch: Launch = NORM_LAUNCH) -> Tensor:
    """The 2-norm of all elements of tensors that are not empty, on one device, by the kernel; an fp32 scalar."""
    grads = [grad if grad.is_contiguous() or is_dense(grad) else grad.contiguous() for grad in grads]
    addresses, sizes = [grad.data_ptr() for grad in grads], [grad.numel() for grad in grads]
    kinds = [(grad.dtype, address % 16 == 0) for grad, address in zip(grads, addresses, strict=True)]
    elements = launch.block * launch.tiles
    squares = grads[0].new_empty(sum(-(-size // elements) for size in sizes), dtype=torch.float32)
    start = 0
    for kind in dict.fromkeys(kinds):
        members = [index for index, other in enumerate(kinds) if other == kind]
        programs, first = spread([sizes[index] for index in members], elements)
        rows = [(addresses[index], sizes[index], begin) for index, begin in zip(members, first, strict=True)]
        table, owners = tables.integers(tuple(itertools.chain(*rows)), squares), tables.owners(programs, squares)
        constants = (ELEMENT_TYPES[kind[0]], kind[1], launch.block, launch.tiles)
        _square.launch(len(owners), (table, owners, squares), (), (start,), (), constants, launch.options)
        start += len(owners)
    return squares.sum().sqrt()
