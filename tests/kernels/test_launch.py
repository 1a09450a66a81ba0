"""What the operations share: which launches skip Triton's own examination of arguments, and views of rows."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.nvidia import driver

from composer_kernels import _launch, _norm_op
from composer_kernels._launch import Function, Kept, Kernel, as_rows, check_dtypes, describe, power_of_2, traits
from composer_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from composer_kernels.cross_entropy import cross_entropy
from composer_kernels.rms_norm import rms_norm, rms_norm_reference
from composer_kernels.rope import rope
from composer_kernels.swiglu import swiglu


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

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append(("triton", grid, args, options))
            return self

        return launch

    def run(self, x, y, z, stream, function, metadata, *arguments):
        """As Triton's launcher takes them: launch metadata and two hooks come before the kernel's own arguments."""
        assert (y, z, stream, function, metadata, *arguments[:3]) == (1, 1, 77, "function", "metadata", *[None] * 3)
        self.launches.append(("compiled", (x,), arguments[3:], {}))

    @property
    def ways(self):
        return [way for way, *_ in self.launches]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77 + device, raising=False)
    return Kernel(Recorder())


def launch(kernel, *pointers, strides=(32,), counts=(5,), constants=(64, True), warps=4):
    kernel.launch(7, pointers, strides, counts, (0.5,), constants, (("num_warps", warps),))


def test_the_second_launch_of_a_variant_is_short(kernel):
    x = Pointer()
    launch(kernel, x, None)
    launch(kernel, Pointer(8192), None, counts=(-6,))
    first, second = kernel.function.launches
    assert first == ("triton", (7,), (x, None, 32, 5, 0.5, 64, True), {"num_warps": 4})
    assert second == ("compiled", (7,), (8192, 0, 32, -6, 0.5, 64, True), {})


@pytest.mark.parametrize(
    ("pointers", "changes"),
    [
        ((Pointer(dtype=torch.float32), None), {}),
        ((Pointer(), Pointer()), {}),
        ((Pointer(), None), {"constants": (128, True)}),
        ((Pointer(), None), {"warps": 8}),
        ((Pointer(), None), {"strides": (33,)}),
        ((Pointer(), None), {"strides": (48,)}),
        ((Pointer(), None), {"strides": (2**31,)}),
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
        ((Pointer(), None), {"counts": (2**31,)}),
        ((Pointer(), None), {"counts": (-(2**31) - 1, 5)}),
    ],
)
def test_what_decides_the_code_otherwise_always_goes_through_triton(kernel, pointers, changes):
    for _ in range(2):
        launch(kernel, Pointer(), Pointer())
        launch(kernel, *pointers, **changes)
    assert kernel.function.ways == ["triton", "triton", "compiled", "triton"]


def test_a_whole_number_among_floats_compiles_as_a_float(kernel):
    for number in (1, 1.5):
        kernel.launch(7, (Pointer(),), (), (), (number,), (), ())
    (_, _, compiled_with, _), (way, *_) = kernel.function.launches
    assert isinstance(compiled_with[1], float)
    assert way == "compiled"


def test_who_watches_launches_sees_each(kernel):
    def watch(metadata):
        """Of a launch."""

    hooks = triton.knobs.runtime.launch_enter_hook
    launch(kernel, Pointer())
    hooks.add(watch)
    try:
        launch(kernel, Pointer())
    finally:
        hooks.remove(watch)
    launch(kernel, Pointer())
    assert kernel.function.ways == ["triton", "triton", "compiled"]


class CudaLauncher(driver.CudaLauncher):
    """Triton's own, before a function that writes down what it gets instead of launching."""

    def __init__(self, scratch=0):
        self.num_ctas, self.launch_cooperative_grid, self.launch_pdl = 1, "cooperative", "pdl"
        self.global_scratch_size, self.profile_scratch_size = scratch, 0
        self.global_scratch_align = self.profile_scratch_align = 1
        self.calls = []

    def launch(self, *arguments):
        self.calls.append(arguments)


def runner(launcher):
    return _launch._runner(SimpleNamespace(run=launcher, function="function", packed_metadata="metadata"))


def test_the_function_behind_tritons_launcher_gets_what_that_one_hands_on():
    launcher = CudaLauncher()
    run, before = runner(launcher)
    launcher(7, 1, 1, 77, "function", "metadata", None, None, None, 4096, 0.5)
    run(7, 1, 1, 77, *before, 4096, 0.5)
    assert run == launcher.launch
    assert launcher.calls[0] == launcher.calls[1]


@pytest.mark.parametrize(("scratch", "version"), [(128, "3.6.0"), (0, "3.7.0"), (0, "3.5.1")])
def test_kernels_that_want_memory_and_other_tritons_keep_the_launcher(monkeypatch, scratch, version):
    monkeypatch.setattr(triton, "__version__", version)
    launcher = CudaLauncher(scratch)
    assert runner(launcher) == (launcher, ("function", "metadata", None, None, None))


def test_variants_do_not_pile_up(kernel, monkeypatch):
    monkeypatch.setattr(_launch, "_MOST_KEPT", 3)
    for stride in (16, 32, 48, 64, 64, 16):
        launch(kernel, Pointer(), strides=(stride,))
        assert len(kernel._variants) <= 3
    assert kernel.function.ways == ["triton"] * 4 + ["compiled", "triton"]


def test_what_is_kept_does_not_pile_up(monkeypatch):
    monkeypatch.setattr(_launch, "_MOST_KEPT", 2)
    kept = Kept()
    assert [kept.keep(key, 10 * key) for key in (1, 2)] == [10, 20]
    assert kept.get(2) == 20
    kept.keep(3, 30)
    assert dict(kept) == {3: 30}


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(2, 4),
        torch.ones(4, 3).T,
        torch.ones(3, 4, dtype=torch.float16),
        torch.ones(3, 4, device="meta"),
        None,
    ],
)
def test_tensors_of_other_traits_are_told_apart(other):
    x = torch.ones(3, 4)
    assert traits(x) == traits(torch.zeros(3, 4))
    assert traits(x) != traits(other)


X, W = torch.randn(3, 8), torch.randn(8)
NORMS = [
    ({}, {}),
    ({"x": X.bfloat16()}, {}),
    ({"x": torch.randn(3, 9)[:, :8]}, {}),
    ({"x": torch.randn(8, 3).T}, {}),
    ({"x": torch.randn(2, 3, 8)}, {}),
    ({"weight": None}, {}),
    ({"weight": torch.randn(16)[::2]}, {}),
    ({"weight": W.half()}, {}),
    ({}, {"eps": 0.5}),
    ({}, {"zero_centered": True}),
    ({}, {"out_dtype": torch.bfloat16}),
]
BAD_NORMS = [
    (TypeError, "x is int64", {"x": X.long()}, {}),
    (TypeError, "weight is float64", {"weight": W.double()}, {}),
    (TypeError, "out is int32", {}, {"out_dtype": torch.int32}),
    (ValueError, r"weight must be \(8,\).* \(4,\)", {"weight": W[:4]}, {}),
    (ValueError, "weight must be.* on meta", {"weight": W.to("meta")}, {}),
    (ValueError, "main_grad must be float32", {}, {"main_grad": W.half()}),
    (ValueError, "main_grad must be.* contiguous", {}, {"main_grad": torch.ones(16)[::2]}),
    (ValueError, "there is none", {"weight": None}, {"main_grad": W}),
]


@pytest.mark.skipif(not _launch.INTERPRETING, reason="on a CPU; GPUs get the same code")
@pytest.mark.parametrize(("error", "words", "arguments", "options"), BAD_NORMS)
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_what_was_made_ready_lets_nothing_else_through(error, words, arguments, options, wants_gradient):
    good = {"x": X, "weight": W}
    for _ in range(2):
        rms_norm(**good), rms_norm(**good, main_grad=W.clone()), rms_norm(X)
    given = {name: x if x is None else x.clone() for name, x in (good | arguments).items()}
    for x in given.values():
        if x is not None and x.is_floating_point():
            x.requires_grad_(wants_gradient)
    with pytest.raises(error, match=words):
        rms_norm(**given, **options)


@pytest.mark.skipif(not _launch.INTERPRETING, reason="on a CPU; GPUs get the same code")
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_what_was_made_ready_is_found_again_and_for_nothing_else(wants_gradient, monkeypatch):
    """Each call twice, the others between; the second time without rules."""
    good = {"x": X, "weight": W}
    calls = [(good | arguments, options) for arguments, options in NORMS]
    for again in (False, True):
        if again:
            monkeypatch.setattr(_norm_op, "check", None)
        for arguments, options in calls:
            x = arguments["x"].detach().requires_grad_(wants_gradient)
            y = rms_norm(x, arguments["weight"], **options)
            wanted = rms_norm_reference(x, arguments["weight"], **options)
            torch.testing.assert_close(y, wanted, rtol=1e-2 if y.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
            assert y.is_contiguous()
            if "out_dtype" in options or arguments["weight"] is None:
                continue
            for residual in (torch.ones_like(x), torch.ones_like(x, dtype=torch.float16)):
                results = add_rms_norm(x, residual, arguments["weight"], **options)
                wanted = add_rms_norm_reference(x, residual, arguments["weight"], **options)
                for one, two in zip(results, wanted, strict=True):
                    torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)  # bfloat16, float16: a rounding


class Double(Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def test_functions_differentiate_as_pytorchs_do_and_refuse_transforms_likewise():
    x = torch.ones(3, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="must override the setup_context"):
        torch.func.grad(lambda x: Double.apply(x).sum())(torch.ones(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_from_the_second_call_on_operations_go_round_triton(monkeypatch):
    def call(rows):
        """Forward and backward of what is called most, on so many rows."""
        x, gate, logits = (
            torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for width in (64, 128, 96)
        )
        angles, labels = torch.randn(64, 8, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
        weight = torch.ones(64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        normed, total = add_rms_norm(rms_norm(x, weight), x, weight)
        turned = rope((normed + total).view(rows, 4, 16), angles, angles)
        loss = swiglu(gate).sum() + turned.sum() + cross_entropy(logits, labels)
        loss.backward()

    call(16)
    call(16)
    monkeypatch.setattr(triton.runtime.JITFunction, "run", None)
    call(16)


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

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    seen = []

    class Watcher(Recorder):
        def __getitem__(self, grid):
            seen.append(current[-1])
            return super().__getitem__(grid)

        def run(self, *arguments):
            seen.append(current[-1])

    kernel = Kernel(Watcher())
    launch(kernel, Pointer(device=3))
    launch(kernel, Pointer(device=3))
    assert (seen, current) == ([3, 3], [0])


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


def test_powers_of_two():
    assert [power_of_2(number) for number in (1, 2, 3, 4, 5, 128, 129)] == [1, 2, 4, 4, 8, 128, 256]


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
