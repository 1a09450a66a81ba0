"""What the operations share: which launches skip Triton's own examination of arguments, and views of rows."""

import pytest
import torch

from composer_kernels import _launch
from composer_kernels._launch import Kernel, as_rows, check_dtypes, describe


class Pointer:
    """As much of a tensor on a GPU as a launch looks at."""

    def __init__(self, address=4096, dtype=torch.bfloat16, device=0):
        self.address, self.dtype, self.device = address, dtype, device

    def data_ptr(self):
        return self.address

    def get_device(self):
        return self.device


class Recorder:
    """A kernel that writes down how it was launched: through Triton (which compiles) or what Triton compiled."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append(("triton", grid, args, options))
            return {(grid[0], 1, 1): lambda *args: self.launches.append(("compiled", grid, args, {}))}

        return launch

    @property
    def ways(self):
        return [way for way, *_ in self.launches]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel(Recorder())


def launch(kernel, *pointers, strides=(32,), counts=(5,), constants=(64, True), warps=4):
    kernel.launch(7, pointers, strides, counts, (0.5,), constants, (("num_warps", warps),))


def test_the_second_launch_of_a_variant_is_short(kernel):
    x = Pointer()
    launch(kernel, x, None)
    launch(kernel, Pointer(8192), None, strides=(48,), counts=(6,))
    first, second = kernel.function.launches
    assert first == ("triton", (7,), (x, None, 32, 5, 0.5, 64, True), {"num_warps": 4})
    assert second == ("compiled", (7,), (8192, None, 48, 6, 0.5, 64, True), {})


@pytest.mark.parametrize(
    ("pointers", "changes"),
    [
        ((Pointer(dtype=torch.float32), None), {}),
        ((Pointer(), Pointer()), {}),
        ((Pointer(), None), {"constants": (128, True)}),
        ((Pointer(), None), {"warps": 8}),
    ],
)
def test_another_variant_is_compiled(kernel, pointers, changes):
    launch(kernel, Pointer(), None)
    launch(kernel, *pointers, **changes)
    launch(kernel, *pointers, **changes)
    launch(kernel, Pointer(), None)
    assert kernel.function.ways == ["triton", "triton", "compiled", "compiled"]


@pytest.mark.parametrize(
    ("pointers", "changes"),
    [
        ((Pointer(4098), None), {}),
        ((Pointer(), Pointer(4104)), {}),
        ((Pointer(), None), {"strides": (33,)}),
        ((Pointer(), None), {"strides": (2**31,)}),
        ((Pointer(), None), {"counts": (2**31,)}),
    ],
)
def test_what_decides_the_code_otherwise_always_goes_through_triton(kernel, pointers, changes):
    for _ in range(2):
        launch(kernel, Pointer(), Pointer())
        launch(kernel, *pointers, **changes)
    assert kernel.function.ways == ["triton", "triton", "compiled", "triton"]


def test_no_programs_launch_nothing(kernel):
    kernel.launch(0, (Pointer(),), (), (5,), (), (), ())
    assert kernel.function.launches == []


def test_the_tensors_device_is_the_current_one_during_a_launch(monkeypatch):
    current = [0]

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *raised):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    seen = []

    class Watcher:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(current[-1])

    launch(Kernel(Watcher()), Pointer(device=3))
    assert (seen, current) == ([3], [0])


@pytest.mark.parametrize(
    ("x", "stride", "copied"),
    [
        (torch.randn(2, 3, 4), 4, False),
        (torch.randn(6, 8)[:, :4], 8, False),
        (torch.randn(2, 3, 8)[..., :4], 8, False),
        (torch.randn(4).expand(6, 4), 0, False),
        (torch.randn(3, 2, 4).transpose(0, 1), 4, True),
        (torch.randn(4, 6).T, 4, True),
        (torch.randn(6, 1).expand(6, 4), 4, True),
        (torch.randn(0, 4), 4, False),
    ],
)
def test_rows(x, stride, copied):
    rows, apart = as_rows(x)
    assert apart == stride
    assert (rows.data_ptr() != x.data_ptr()) == copied
    for index, row in enumerate(x.reshape(-1, 4)):
        assert torch.equal(rows.as_strided((4,), (1,), rows.storage_offset() + index * stride), row)


def test_types():
    check_dtypes("op", x=torch.bfloat16, weight=torch.float32)
    check_dtypes("op", x=torch.float64, weight=torch.float64)
    with pytest.raises(TypeError, match="op: weight is int8; accepted are bfloat16, float16 and float32, or float64"):
        check_dtypes("op", x=torch.bfloat16, weight=torch.int8)
    with pytest.raises(TypeError, match="op: x is float64"):
        check_dtypes("op", x=torch.float64, weight=torch.float32)


def test_words():
    assert describe(torch.ones(2, 3)) == "float32 (2, 3) on cpu"
    assert describe("a") == "'a'"
    assert _launch.multiprocessors(-1) > 1
