"""``composer-megatron import``: a trained Llama from elsewhere becomes a run folder of the sequence ``(AM)xN``.

::

    import_run(Path("Llama-2-7b-hf"), Path("runs/llama"))

It generates, evaluates and exports like any other run; training starts from it by Megatron's
``--pretrained-checkpoint runs/llama/checkpoints``.
"""

from __future__ import annotations

import os
from pathlib import Path

from composer_megatron.conversion import Source, write_run
from composer_megatron.errors import FileError, UsageError
from composer_megatron.import_gpt import TRACKER, open_gpt
from composer_megatron.import_llama import open_llama


def import_run(source: Path, run_dir: Path) -> Source:
    """Make a run folder of a trained model. It appears whole or not at all.

    Args:
        source: A Hugging Face folder (``config.json`` and safetensors), or a ``torch_dist`` checkpoint of Megatron's
            GPTModel.
        run_dir: The folder to make.

    Returns:
        What was imported.

    Raises:
        UsageError: If `run_dir` exists.
        FileError: If the source is neither, cannot be read, or is no model that our blocks compute exactly.
        ComposerError: If Megatron-core or safetensors is not installed.
    """
    if os.path.lexists(run_dir):
        raise UsageError(f"{run_dir} exists; nothing is overwritten: choose another folder, or remove it")
    opened = open_source(source)
    write_run(opened, run_dir)
    return opened


def open_source(path: Path) -> Source:
    """Read what a trained model says about itself; arguments and errors as for `import_run`."""
    if not path.is_dir():
        raise FileError(f"{path} is no folder: expected a Hugging Face model or a checkpoint of Megatron's")
    if (path / "config.json").is_file():
        return open_llama(path)
    if (path / "metadata.json").is_file() or (path / TRACKER).is_file():
        return open_gpt(path)
    if (path / "checkpoints" / TRACKER).is_file():
        return open_gpt(path / "checkpoints")
    raise FileError(f"{path} holds neither config.json, of a Hugging Face model, nor a checkpoint of Megatron's")
