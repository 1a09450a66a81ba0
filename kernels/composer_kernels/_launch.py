"""Launching Triton kernels from plain PyTorch with little host time: shared by the operations, no public interface."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

INTERPRETING = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on CPU tensors too. Triton itself decides when it is imported."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels read and write; they compute in fp32."""

_KERNEL_DTYPES = frozenset(DTYPES)

Value = TypeVar("Value")


def runs_kernel(x: Tensor) -> bool:
    """Whether a kernel computes on `x`; else (on a CPU, or in float64) the plain PyTorch formula does."""
    return (x.is_cuda or INTERPRETING) and x.dtype in DTYPES


@functools.cache
def multiprocessors(device: int) -> int:
    """Streaming multiprocessors of a GPU; under the interpreter (-1) a few, so that work is shared out there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 3


def power_of_2(least: int) -> int:
    """The smallest power of two that is not below `least`, from 1; in a tenth of the time that Triton's function takes.

    That one serves kernels too, and unwraps their constants.
    """
    return 1 << (least - 1).bit_length()


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """A tensor that holds `x` (…, width) as rows of neighbouring elements, and how far apart these begin.

    It is `x` itself or a view, unless no single stride leads from row to row or the elements of a row lie apart: then
    it is a contiguous copy.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    matrix = x.reshape(-1, x.shape[-1])
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return matrix, matrix.stride(0)


def describe(value: object) -> str:
    """A tensor's dtype, shape and device for an error message; anything else as itself."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {tuple(value.shape)} on {value.device}"
    return repr(value)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without the module: bfloat16."""
    return str(dtype).removeprefix("torch.")


def check_dtypes(op: str, **dtypes: torch.dtype) -> None:
    """Refuse element types that the operation does not compute with.

    Raises:
        TypeError: If an argument (named by its keyword) is neither bfloat16, float16, float32 nor, with all the others,
            float64.
    """
    if _KERNEL_DTYPES.issuperset(dtypes.values()) or set(dtypes.values()) == {torch.float64}:
        return
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            accepted = "bfloat16, float16 and float32, or float64 throughout"
            raise TypeError(f"{op}: {name} is {dtype_name(dtype)}; accepted are {accepted}")


class Kept(dict[Hashable, Value]):
    """What was worked out for arguments of one kind, by all that decides it.

    It forgets everything before it would grow without end: there can be as many kinds as batches have shapes, and
    working one out anew is cheap.
    """

    def keep(self, key: Hashable, value: Value) -> Value:
        """Remember `value` and return it."""
        if len(self) >= _MOST_KEPT:
            self.clear()
        self[key] = value
        return value


_MOST_KEPT = 1024


def traits(x: Tensor | None) -> tuple[Hashable, ...] | None:
    """All of a tensor that decides whether it fits and how a kernel is launched on it, but its address."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


class Variant:
    """A Triton kernel on one device, its constants and strides and the types of its tensors settled.

    Triton examines every argument of every launch. Here it does so once, then what it compiled is called as Triton
    itself calls it in the end, which saves most of the host time of a launch. A launch goes through Triton each time
    where a pointer is not aligned to 16 bytes or a count passes 2^31, since these decide the code too, and where a
    profiler has hooked itself into launches.
    """

    def __init__(
        self,
        function: Any,
        device: int,
        strides: tuple[int, ...],
        constants: tuple[Any, ...],
        options: tuple[tuple[str, Any], ...],
    ) -> None:
        """Settle what `Kernel.variant` takes."""
        self._function, self._device, self._options = function, device, dict(options)
        self._strides, self._constants = strides, constants
        self._run: Callable[..., None] | None = None  # what Triton compiled, once it has
        self._before: tuple[object, ...] = ()

    def launch(
        self, programs: int, tensors: tuple[Tensor | None, ...], counts: tuple[int, ...], floats: tuple[float, ...] = ()
    ) -> None:
        """Launch on the device's current stream; the arguments are those of `Kernel.launch`."""
        device = self._device
        if programs == 0:
            return
        if device < 0:
            self._through_triton(programs, tensors, counts, floats)
            return
        if device != torch._C._cuda_getDevice():  # what `torch.cuda.current_device` returns, in a fifth of its time
            with torch.cuda.device(device):
                self.launch(programs, tensors, counts, floats)
            return
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        regular = _regular(pointers, counts)
        if self._run is not None and regular and not _hooked():
            stream = torch._C._cuda_getCurrentRawStream(device)
            beside = (*self._strides, *counts, *floats, *self._constants)
            self._run(programs, 1, 1, stream, *self._before, *pointers, *beside)
            return
        compiled = self._through_triton(programs, tensors, counts, floats)
        if compiled is not None and regular:  # None: a hook forbade to compile
            run, self._before = _runner(compiled)
            self._run = run  # last: another thread may be about to call it

    def _through_triton(
        self, programs: int, tensors: tuple[Tensor | None, ...], counts: tuple[int, ...], floats: tuple[float, ...]
    ) -> Any:
        values = (*tensors, *self._strides, *counts, *map(float, floats), *self._constants)
        return self._function[(programs,)](*values, **self._options)


class Kernel:
    """A Triton kernel that remembers its variants."""

    def __init__(self, function: Any) -> None:
        """Wrap what `triton.jit` made.

        Its parameters must be, in this order: pointers, strides and other integers that decide the code or seldom
        change, counts (named in `do_not_specialize`), floats, constants.
        """
        self.function = function
        self._variants: Kept[Variant] = Kept()

    def variant(
        self,
        device: int,
        dtypes: Sequence[torch.dtype | None],
        strides: tuple[int, ...],
        constants: tuple[Any, ...],
        options: tuple[tuple[str, Any], ...],
    ) -> Variant:
        """The variant for tensors of these types (None where there is none) on a device, -1 for the interpreter's."""
        key = (device, strides, constants, options, *dtypes)
        known = self._variants.get(key)
        if known is not None:
            return known
        return self._variants.keep(key, Variant(self.function, device, strides, constants, options))

    def launch(
        self,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        strides: tuple[int, ...],
        counts: tuple[int, ...],
        floats: tuple[float, ...],
        constants: tuple[Any, ...],
        options: tuple[tuple[str, Any], ...],
    ) -> None:
        """Launch on the device of the first tensor, on its current stream.

        Args:
            programs: Programs of the one-dimensional grid; with none nothing happens.
            tensors: For the pointers; the first is never None.
            strides: And other integers; what is compiled is remembered for these very values.
            counts: Integers whose values do not decide the code.
            floats: Likewise.
            constants: For the `tl.constexpr` parameters.
            options: Triton's launch options (`num_warps`, …) by name.
        """
        device = tensors[0].get_device()  # type: ignore[union-attr]
        dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        self.variant(device, dtypes, strides, constants, options).launch(programs, tensors, counts, floats)


def _runner(compiled: Any) -> tuple[Callable[..., None], tuple[object, ...]]:
    """What launches a compiled kernel, and what it takes between grid and stream and the kernel's own arguments.

    Triton's launcher first finds memory for kernels that want some of their own, then calls a function in C. Others are
    launched by that function, in half the time; it takes these arguments in Triton 3.6. Other builds of Triton need not
    have the launcher's module, hence the class by its name.
    """
    run, rest = compiled.run, (compiled.packed_metadata, None, None, None)  # no metadata for hooks, and no hooks
    known = type(run).__name__ == "CudaLauncher" and triton.__version__.startswith("3.6.")
    if not known or run.global_scratch_size or run.profile_scratch_size:
        return run, (compiled.function, *rest)
    return run.launch, (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest)


def _regular(pointers: list[int], counts: tuple[int, ...]) -> bool:
    """Whether Triton would compile the same for any other pointers and counts of which this is true."""
    bits = 0
    for pointer in pointers:
        bits |= pointer
    for count in counts:
        if not -0x80000000 <= count <= 0x7FFFFFFF:
            return False
    return bits % 16 == 0


def _hooked() -> bool:
    """Whether someone, such as a profiler, is to be told of launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


@dataclass(frozen=True)
class Launch:
    """How a kernel of rows and columns is launched.

    Attributes:
        block: Columns that a program holds at a time, a power of two.
        rows: Rows of a program, a power of two.
        warps: Warps of a program.
    """

    block: int
    rows: int
    warps: int

    @functools.cached_property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """As `Kernel.launch` takes them."""
        return (("num_warps", self.warps),)


class Function(torch.autograd.Function):
    """PyTorch's, applied in two thirds of the time.

    What it does for the transforms of `torch.func` is left to it where one of them runs, and left out elsewhere.
    """

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Apply as usual."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args, **kwargs)
        return super(torch.autograd.Function, cls).apply(*args, **kwargs)  # type: ignore[misc]  # no stubs tell of it


class _Final(torch.autograd.Function):
    """Hands a gradient on, and raises where that is differentiated. `source` makes it part of the graph."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor, op: str) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"{ctx.op}: its gradient cannot be differentiated; {ctx.op}_reference's can")


def differentiable_once(op: str) -> Callable[[Callable[..., tuple[Any, ...]]], Callable[..., tuple[Any, ...]]]:
    """Decorate the backward of the operation called `op`, so that differentiating its results raises.

    PyTorch's `once_differentiable` lets that pass unseen where the upstream gradient is a constant.
    """

    def decorate(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        def backward_once(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            source = torch.empty(0, requires_grad=True)
            return tuple(None if x is None else _Final.apply(x, source, op) for x in gradients)

        return backward_once

    return decorate
