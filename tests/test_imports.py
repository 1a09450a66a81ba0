"""The arrows of the house: who may import whom, what importing costs, and that the three packages stand alone."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "composer_kernels": ROOT / "kernels" / "composer_kernels",
    "composer_megatron": ROOT / "composer_megatron",
    "composer_search": ROOT / "search" / "composer_search",
}
FRONT_DOOR = PACKAGES["composer_megatron"] / "commands"
"""The program's commands call every room."""
MEGATRON_FREE = {
    *("errors", "files", "primitives", "sequence", "shape", "architecture", "env", "layout", "roofline"),
    *("planner.profile", "planner.schedule", "systems", "widths"),
    *("text.corpus", "text.documents", "text.folder", "text.tokenizing"),
}
TORCH_ALONE = {"recurrences"}
"""Shared, too, and more than light: they import torch, and nothing else."""
MODULES = [(name, path) for name, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, function bodies included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda value: getattr(value, "name", value))
def test_arrows_point_one_way(package: str, path: Path) -> None:
    if package == "composer_kernels":
        third_party = tops(path) - set(sys.stdlib_module_names)
        assert third_party <= {"composer_kernels", "torch", "triton"}
    if package == "composer_megatron" and path.parent != FRONT_DOOR:
        assert "composer_search" not in tops(path)
    if package == "composer_search":
        assert "megatron" not in tops(path)
        ours = {
            name.removeprefix("composer_megatron.") for name in imports(path) if name.startswith("composer_megatron.")
        }
        shared = MEGATRON_FREE | TORCH_ALONE
        assert all(any(f"{name}.".startswith(f"{free}.") for free in shared) for name in ours if name != "text")


def test_every_package_and_data_file_is_installed() -> None:
    """What ``pip install .`` copies is listed by hand: a folder that is not listed is missing in the wheel alone."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {
        ".".join((name, *path.parent.relative_to(folder).parts)): path.parent
        for name, folder in PACKAGES.items()
        for path in folder.rglob("__init__.py")
    }
    assert sorted(tool["packages"]) == sorted(folders)
    listed = {
        path for name, folder in PACKAGES.items() for each in tool["package-data"][name] for path in folder.glob(each)
    }
    data = {
        path
        for folder in PACKAGES.values()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not (path.suffix == ".py" and path.parent in folders.values())
    }
    assert sorted(data) == sorted(listed)


@pytest.mark.parametrize("name", sorted(MEGATRON_FREE))
def test_shared_modules_import_no_megatron(name: str) -> None:
    path = PACKAGES["composer_megatron"] / f"{name.replace('.', '/')}.py"
    assert not tops(path) & {"megatron", "torch"}


@pytest.mark.parametrize("name", sorted(TORCH_ALONE))
def test_shared_modules_of_torch_import_nothing_else(name: str) -> None:
    assert tops(PACKAGES["composer_megatron"] / f"{name}.py") <= {"torch", *sys.stdlib_module_names}


def test_importing_starts_no_cuda_and_loads_nothing_heavy() -> None:
    """In a fresh process: the light modules load neither torch nor Megatron, and no CUDA context appears."""
    present = [name for name, folder in PACKAGES.items() if folder.is_dir()]
    light = [f"composer_megatron.{name}" for name in sorted(MEGATRON_FREE)]
    program = f"""
import importlib, sys
for name in {["composer_megatron", *light, "composer_megatron.cli"]!r}:
    importlib.import_module(name)
heavy = [name for name in ("torch", "megatron", "ax", "sklearn", "transformers") if name in sys.modules]
assert not heavy, heavy
for name in {present!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
"""
    path = ":".join(str(ROOT / part) for part in (".", "kernels", "search"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": path, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
