"""The environment report holds what a figure needs beside it."""

import importlib.metadata
import json
import platform

from composer_megatron.env import environment


def test_environment() -> None:
    found = environment()
    json.dumps(found)
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["packages"]["apex"] is None or isinstance(found["packages"]["apex"], str)
    assert found["cpu_cores"] >= 1
    assert isinstance(found["gpus"], list)
