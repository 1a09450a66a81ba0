"""``composer-megatron import``: a trained model from elsewhere becomes a run folder; a Llama's sequence is ``(AM)xN``.

::

    import_run(Path("Llama-2-7b-hf"), Path("runs/llama"))

It generates, evaluates and exports like any other run; training starts from it by Megatron's
``--pretrained-checkpoint runs/llama/checkpoints``.
"""

from __future__ import annotations

from pathlib import Path

from composer_megatron.checkpoint import TRACKER
from composer_megatron.errors import FileError
from composer_megatron.files import read_json
from composer_megatron.importing.composite import MODEL_TYPE, open_composite
from composer_megatron.importing.conversion import Progress, Source, check_absent, silent, write_run
from composer_megatron.importing.gpt import open_gpt
from composer_megatron.importing.llama import open_llama
from composer_megatron.importing.surgery import graft
from composer_megatron.sequence import CompositeSequence


def import_run(
    source: Path,
    run_dir: Path,
    *,
    sequence: CompositeSequence | None = None,
    blocks: str | None = None,
    window: int | None = None,
    drop_rope_scaling: bool = False,
    progress: Progress = silent,
) -> Source:
    """Make a run folder of a trained model, or by surgery of its blocks. It appears whole or not at all.

    Args:
        source: A Hugging Face folder (``config.json`` and weights), of a Llama or exported by us; or a ``torch_dist``
            checkpoint of Megatron's GPTModel.
        run_dir: The folder to make.
        sequence: The sequence of the new model; None for the source's own.
        blocks: Which block comes from where, as `composer_megatron.importing.surgery` writes it; None for ``even``.
        window: Keys that a query of a W block sees; None for 1024, or what the source says.
        drop_rope_scaling: Take a Llama with a scaled rotary embedding without the scaling, so not exactly.
        progress: Told after each parameter how many bytes were taken over, and how many there are.

    Returns:
        What was imported; the architecture's origin says from where, and with surgery block by block.

    Raises:
        UsageError: If `run_dir` exists, or the blocks' map is wrong.
        FileError: If the source is none of these, cannot be read, or is no model that our blocks compute exactly.
        ComposerError: If Megatron-core or safetensors is not installed.
    """
    check_absent(run_dir)
    opened = open_source(source, drop_rope_scaling=drop_rope_scaling)
    if (sequence, blocks, window) != (None, None, None):
        opened = graft(opened, sequence or opened.architecture.sequence, blocks or "even", window)
    write_run(opened, run_dir, progress)
    return opened


def open_source(path: Path, *, drop_rope_scaling: bool = False) -> Source:
    """Read what a trained model says about itself; arguments and errors as for `import_run`."""
    if not path.is_dir():
        raise FileError(f"{path} is no folder: expected a Hugging Face model or a checkpoint of Megatron's")
    if (path / "config.json").is_file():
        kind = read_json(path / "config.json", "a Hugging Face configuration").get("model_type")
        return open_composite(path) if kind == MODEL_TYPE else open_llama(path, drop_rope_scaling=drop_rope_scaling)
    if (path / "metadata.json").is_file() or (path / TRACKER).is_file():
        return open_gpt(path)
    if (path / "checkpoints" / TRACKER).is_file():
        return open_gpt(path / "checkpoints")
    raise FileError(f"{path} holds neither config.json, of a Hugging Face model, nor a checkpoint of Megatron's")
