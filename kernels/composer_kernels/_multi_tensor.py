"""Tables that tell one launch about many tensors, for operations on lists of tensors: no public interface.

A table is an int64 tensor on the device with numbers such as the addresses of the tensors; `owners` says for each
program of a launch which tensor it works on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Values = tuple[int, ...]
Key = tuple[Callable[[Values, torch.device], Tensor], Values, torch.device]
"""What writes a table, what of, and where."""


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order of the dimensions."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def aligned(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all of them begin at a multiple of 16 bytes."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _write_integers(values: Values, device: torch.device) -> Tensor:
    """An int64 tensor of these values.

    They travel as arguments of kernels. A copy from the host's memory would have to wait for it, or could find it gone
    when a CUDA graph runs again.
    """
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    if values:
        torch._foreach_add_(table.unbind(), values)
    return table


def _write_owners(programs: Values, device: torch.device) -> Tensor:
    """For each program the tensor it works on, if that many programs work on each of the tensors; int32."""
    numbers = torch.arange(len(programs), device=device, dtype=torch.int32)
    return numbers.repeat_interleave(_write_integers(programs, device), output_size=sum(programs))


class Tables:
    """Tables on their devices, the latest of which are kept.

    A table is nothing but a function of the numbers in it, so that none can go stale. What a CUDA graph reads is kept
    for good.
    """

    def __init__(self, size: int) -> None:
        """Keep so many."""
        self.size = size
        self._kept: OrderedDict[Key, tuple[Tensor, int]] = OrderedDict()
        self._in_graphs: dict[Key, Tensor] = {}

    def integers(self, values: Values, like: Tensor) -> Tensor:
        """These values in an int64 tensor on the device of `like`, without waiting for it."""
        return self._get((_write_integers, values, like.device))

    def owners(self, programs: Values, like: Tensor) -> Tensor:
        """For each program (int32) the tensor it works on, on the device of `like`, without waiting for it.

        Args:
            programs: How many work on each tensor, one tensor after another.
            like: Any tensor on the device.
        """
        return self._get((_write_owners, programs, like.device))

    def _get(self, key: Key) -> Tensor:
        write, values, device = key
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        table, written_on = self._kept.get(key, (None, stream))
        if capturing:  # after a synchronisation; memory that is allocated here belongs to the graph
            if table is not None:
                self._in_graphs[key] = table
            kept = self._in_graphs.get(key)
            return write(values, device) if kept is None else kept
        if table is None or written_on != stream:  # complete on its own stream alone
            table = write(values, device)
            self._kept[key] = (table, stream)
        self._kept.move_to_end(key)
        if len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return table


tables = Tables(64)
"""Those of all operations."""


def spread(sizes: Sequence[int], elements: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How programs of so many elements each are shared out over tensors of these sizes.

    Returns:
        The number of programs for each tensor, and that of its first one.
    """
    programs = tuple(-(-size // elements) for size in sizes)
    first, total = [], 0
    for count in programs:
        first.append(total)
        total += count
    return programs, tuple(first)
