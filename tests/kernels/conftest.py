"""Kernel tests run unmodified on a GPU and, where there is none, in Triton's interpreter on the CPU.

Triton decides between compiling and interpreting when it is imported, and `composer_kernels` follows it. So without a
GPU each test module here runs in a pytest process of its own, with ``TRITON_INTERPRET=1``, and shows as one test; to
run part of a module, set that variable yourself. Modules named ``test_aot_*`` compile and never interpret.
"""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"


class InterpretedModule(pytest.Module):
    """A test module that runs in the interpreter, as one test."""

    def collect(self) -> Iterable[pytest.Item]:
        yield InterpretedItem.from_parent(self, name="interpreter")


class InterpretedItem(pytest.Item):
    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(self.path)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            command, env=environment, cwd=self.config.rootpath, capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            raise InterpreterFailedError(run.stdout + run.stderr)
        self.add_report_section("call", "interpreter", run.stdout)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, InterpreterFailedError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} in Triton's interpreter"


class InterpreterFailedError(Exception):
    """The output of a failed run."""


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if DEVICE == "cuda" or INTERPRETING or module_path.name.startswith("test_aot_"):
        return None
    return InterpretedModule.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` selects these tests where there is a GPU; what compiles is skipped in the interpreter."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        ahead_of_time = item.path.name.startswith("test_aot_")
        if ahead_of_time and INTERPRETING:
            item.add_marker(pytest.mark.skip("TRITON_INTERPRET is set: nothing can be compiled"))
        if DEVICE == "cuda" and not ahead_of_time:
            item.add_marker("gpu")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _mended_interpreter() -> None:
    """Mend Triton 3.6's interpreter: loop bounds under NumPy 2.5, and bfloat16.

    It cuts off where it should round to bfloat16, and multiplies matrices of the integers that stand for the numbers.
    """
    if not INTERPRETING:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    multiply = interpreter.InterpreterBuilder.create_dot

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_to_nearest(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy().view("uint32")
        return convert(values, source, target, rounding)

    def multiply_numbers(builder, a, b, *args):
        a, b = (
            interpreter.TensorHandle(convert_to_nearest(x.data, tl.bfloat16, tl.float32, None).view("f4"), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return multiply(builder, a, b, *args)

    interpreter.InterpreterBuilder.create_dot = multiply_numbers
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert_to_nearest


@pytest.fixture(scope="session")
def e4m3_in_the_interpreter(_mended_interpreter: None) -> None:
    """Mend Triton 3.6's interpreter once more: it rounds ties away from 0, and 127 to 64, where GPUs round to even."""
    if not INTERPRETING:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_to_nearest(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(values.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) == (tl.float8e4nv, tl.float32):
            return torch.from_numpy(values.copy()).view(torch.float8_e4m3fn).float().numpy().view("uint32")
        return convert(values, source, target, rounding)

    interpreter._convert_float = convert_to_nearest


@pytest.fixture
def device() -> str:
    """Where the tensors of a kernel test live."""
    return DEVICE


@pytest.fixture
def whole_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[float], None]]:
    """The GPU's memory for a large test: ``whole_gpu(24)`` waits until 24 GB are free.

    Large tests of all pytest workers take turns. One whose memory other programs keep, or that no such GPU has, is
    skipped. On a CPU nobody waits.
    """
    if DEVICE == "cpu":
        yield lambda gigabytes: None
        return

    def wait(gigabytes: float, patience: float = 60.0) -> None:
        end = time.monotonic() + patience
        while (free := torch.cuda.mem_get_info()[0] / 1e9) < gigabytes:
            total = torch.cuda.mem_get_info()[1] / 1e9
            if total < gigabytes or time.monotonic() > end:
                pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory; {free:.0f} of {total:.0f} GB are free")
            time.sleep(0.2)

    # pytest-xdist gives each worker a folder in one that they share
    with (tmp_path_factory.getbasetemp().parent / "whole_gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield wait
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element that a kernel leaves unwritten shows."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return allocate_poisoned

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def assert_as_good() -> Callable[..., None]:
    """Check ``ours`` against the exact (float64) result: at most twice the error of PyTorch in the same type.

    Errors are norms relative to that of the exact result. The floor of 2e-7, under two units in the last place of
    fp32, lets both round differently where PyTorch happens to be exact.

    Where ``ours`` is a sum of so many `tensor_core_terms` in fp32 and PyTorch's does not come from a tensor core, the
    bound grows by what these lose: they cut sums off where fp32 arithmetic rounds (Fasi, Higham, Mikaitis and Pranesh,
    Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021), up to 2^-23 of the sum after every
    16 terms, and always towards 0, so that the error grows with the number of terms and not with its root.
    """

    def check(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor, *, tensor_core_terms: int = 0) -> None:
        assert ours.shape == exact.shape
        scale = exact.double().norm().clamp_min(1e-300)
        error, bound = ((result.double() - exact.double()).norm() / scale for result in (ours, torchs))
        allowed = 2 * bound + 2e-7 + tensor_core_terms / 16 * 2**-23
        assert error <= allowed, f"relative error {error:.2e}, PyTorch's {bound:.2e}, allowed {allowed:.2e}"

    return check


@pytest.fixture
def assert_capturable() -> Callable[..., None]:
    """Check that a step never waits for the GPU, and that a CUDA graph of it gives the same results.

    The step has to make its leaves itself, since their autograd nodes belong to the capturing stream. The same bit for
    bit, unless a `tolerance` is given, relative and absolute.
    """

    def check(step: Callable[[], Sequence[torch.Tensor]], tolerance: float = 0.0) -> None:
        wanted = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        for one, two in zip(captured, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)

    return check


@pytest.fixture
def run_alone() -> Callable[[str], None]:
    """Run a test module's `main` in a process of its own, on the CPU and without the interpreter; it must succeed."""

    def run(module: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {
            "PYTHONPATH": str(HERE.parents[1] / "kernels"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, module]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}


@pytest.fixture
def compile_ahead(tmp_path: Path) -> Callable[..., dict[str, int]]:
    """Compile a kernel for a GPU that need not be there; say what `ptxas -v` and the PTX say about it.

    Arguments: the kernel, an architecture (80, 90, 100), the type of each parameter before the constants (a torch dtype
    for an aligned pointer, None for an absent one, or Triton's name of a scalar type, with ":16" for a multiple of 16),
    the constants, and launch options.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_ahead(
        kernel: Any, architecture: int, types: Sequence[Any], constants: Sequence[Any], **options: Any
    ) -> dict[str, int]:
        names = kernel.arg_names
        given = [POINTERS.get(kind, kind or "constexpr") for kind in types] + ["constexpr"] * len(constants)
        signature = {name: kind.removesuffix(":16") for name, kind in zip(names, given, strict=True)}
        values = [None] * len(types) + list(constants)
        constexprs = {(i,): value for i, value in enumerate(values) if given[i] == "constexpr"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(given) if kind[0] == "*" or ":16" in kind}
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(ASTSource(kernel, signature, constexprs, aligned), target=target, options=options)
        found = _resources(compiled.asm["ptx"], architecture, tmp_path / "kernel.ptx")
        return found | {"shared_bytes": compiled.metadata.shared}

    return compile_ahead


def _resources(ptx: str, architecture: int, path: Path) -> dict[str, int]:
    from triton import knobs

    path.write_text(ptx)
    tool = knobs.nvidia.ptxas_blackwell if architecture >= 100 else knobs.nvidia.ptxas
    named = re.search(r"\.target (\w+)", ptx)
    assert named
    command = [tool.path, "-v", f"-arch={named.group(1)}", str(path), "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    assert registers
    assert spilled
    accesses = re.findall(r"(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return {
        "registers": int(registers.group(1)),
        "spilled_bytes": int(spilled.group(1)),
        "serialised": int("wgmma.mma_async instructions are serialized" in log),
        "narrow_accesses": sum(int(count or 1) * int(bits) < 128 for count, bits in accesses),
    }


@pytest.fixture
def assert_as_recorded(request: pytest.FixtureRequest) -> Callable[[str, dict[str, int]], None]:
    """Compare a kernel's resources with ``ptxas_<op>.json`` beside the test ``test_aot_<op>.py``: none may grow.

    Other versions of Triton allocate registers differently, so that only the recorded one is compared. With the
    environment variable COMPOSER_RECORD=1 the file is written instead (not with several pytest workers).
    """
    import triton

    path = HERE / f"ptxas_{request.path.stem.removeprefix('test_aot_')}.json"
    recorded = {"triton": triton.__version__, **(json.loads(path.read_text()) if path.exists() else {})}

    def check(name: str, resources: dict[str, int]) -> None:
        if os.environ.get("COMPOSER_RECORD") == "1":
            written = {**recorded, "triton": triton.__version__, name: resources}
            path.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
            return
        if recorded["triton"] != triton.__version__:
            pytest.skip(f"{path.name} was recorded with Triton {recorded['triton']}, this is {triton.__version__}")
        assert name in recorded, f"{name} is not in {path.name}; record it with COMPOSER_RECORD=1"
        grown = {key: (recorded[name][key], value) for key, value in resources.items() if value > recorded[name][key]}
        assert not grown, f"{name} needs more than recorded in {path.name} (recorded, now): {grown}"

    return check
