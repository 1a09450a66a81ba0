"""Kernels that begin before those before them on the stream have ended: programmatic dependent launch.

GPUs have it from compute capability 9.0 on. A kernel launched so runs as soon as every program of the one before has
allowed it or ended, does what needs nothing of those before, such as loading weights, and waits. What it waits for is
the end of the kernel before; that one waited, too, so that all before it have ended as well. What allows and waits are
two instructions, `tl.extra.cuda.gdc_launch_dependents` and `gdc_wait`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

Overlap = Literal["none", "tail", "full"]
"""When a kernel of a sequence begins: after the one before it; when all programs of that one run and have waited, so
that just the one before may still be at work; or when they run, wait as they may, so that several may be."""


@functools.cache
def launch_options(warps: int, overlap: Overlap) -> tuple[tuple[str, Any], ...]:
    """What `Kernel.launch` takes for a kernel of so many warps that overlaps so."""
    options = ("num_warps", warps)
    return (options,) if overlap == "none" else (options, ("launch_pdl", True))


@functools.cache
def can_overlap(device: int) -> bool:
    """Whether a GPU starts a kernel while the one before it ends; a CPU (-1) does not."""
    return device >= 0 and torch.cuda.get_device_capability(device) >= (9, 0)
