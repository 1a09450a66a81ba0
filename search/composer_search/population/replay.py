"""Calls a function many times; on a GPU the later calls replay a CUDA graph of it, free of Python and of launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 3
"""Calls before the capture, as PyTorch advises: libraries set themselves up and kernels are compiled meanwhile."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does on the device, without doing it, and returns what does it again."""


class Replay:
    """A function whose inputs and outputs stay where they are in memory.

    Args:
        function: Reads and writes tensors that are never replaced, and reads nothing back from the device.
        capture: Records it; None calls it each time.
    """

    def __init__(self, function: Callable[[], None], capture: Capture | None) -> None:
        self._function, self._capture = function, capture
        self._calls = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, times: int) -> None:
        """Call the function `times` times."""
        for _ in range(times):
            if self._capture is not None and self._replay is None and self._calls >= WARM_UP:
                self._replay = self._capture(self._function)
            (self._replay or self._function)()
            self._calls += 1

    def release(self) -> None:
        """Let go of the recording and of the memory it holds; it is recorded anew when needed."""
        self._replay = None


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Capture `function` as a CUDA graph; what it allocates is the graph's until the result is dropped."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
