"""What a run ran on: versions and devices, as one JSON object for bug reports and for every measured figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from typing import Any

_PACKAGES = (
    "composer-megatron",
    "torch",
    "triton",
    "megatron-core",
    "ax-platform",
    "botorch",
    "scikit-learn",
    "tokenizers",
    "transformers",
    "numpy",
    "transformer-engine",
    "flash-attn",
    "apex",
)


def environment() -> dict[str, Any]:
    """Python, platform, CPU, package versions (None: not installed) and GPUs. Starts no CUDA context."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "packages": {name: _version(name) for name in _PACKAGES},
        "gpus": _gpus(),
    }


def device_name() -> str:
    """The device in a form that suits a folder's name, such as ``nvidia-h100-80gb-hbm3`` or ``cpu``."""
    gpus = _gpus()
    name = gpus[0]["name"] if gpus else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a device file, not a path of ours
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, str]]:
    """Names, memory and driver as nvidia-smi tells them; asking torch would start a CUDA context."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in listing.splitlines() if line.count(", ") == 2]
    return [{"name": name, "memory": memory, "driver": driver} for name, memory, driver in rows]
