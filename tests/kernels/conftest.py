"""Kernel tests run unmodified on a GPU and, where there is none, in Triton's interpreter on the CPU.

Triton decides between compiling and interpreting when it is imported, and `composer_kernels` follows it. So without a
GPU each test module here runs in a pytest process of its own, with ``TRITON_INTERPRET=1``, and shows as one test; to
run part of a module, set that variable yourself. Modules named ``test_aot_*`` compile and always run in this process.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

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
        run = subprocess.run(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            cwd=self.config.rootpath,
        )
        if run.returncode != 0:
            raise InterpreterFailedError(run.stdout + run.stderr)
        self.add_report_section("call", "interpreter", run.stdout)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: str | None = None) -> str:
        if isinstance(excinfo.value, InterpreterFailedError):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

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
    """`-m gpu` selects these tests where there is a GPU."""
    for item in items:
        if DEVICE == "cuda" and HERE in item.path.parents and not item.path.name.startswith("test_aot_"):
            item.add_marker("gpu")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _mended_interpreter() -> None:
    """What Triton 3.6's interpreter gets wrong: loop bounds under NumPy 2.5, and rounding to bfloat16, which it cuts."""
    if not INTERPRETING:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_to_nearest(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy().view("uint32")
        return convert(values, source, target, rounding)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert_to_nearest


@pytest.fixture
def device() -> str:
    """Where the tensors of a kernel test live."""
    return DEVICE
