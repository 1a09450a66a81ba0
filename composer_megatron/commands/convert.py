"""``export`` and ``import``: runs as Hugging Face models, and trained models as runs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from rich.table import Table
from tyro.conf import Positional

from composer_megatron.architecture import Architecture
from composer_megatron.display import console, print_json
from composer_megatron.errors import UsageError


def export(
    run: Positional[Path],
    output: Positional[Path],
    *,
    iteration: int | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    shard_gb: float = 5.0,
) -> None:
    """Write a run as a Hugging Face model that loads with trust_remote_code.

    Args:
        run: Folder of a training run, of any parallel layout.
        output: Folder to make; an existing one is refused.
        iteration: Which checkpoint; the last by default.
        dtype: Type of the weights; that of the checkpoint by default.
        shard_gb: Size of a file of weights, in GB.
    """
    if shard_gb <= 0:
        raise UsageError(f"--shard-gb {shard_gb}; expected a positive number")
    import torch

    from composer_megatron.export_hf import export as export_run
    from composer_megatron.quiet import hush_imports

    hush_imports()
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}
    with _transfer("export") as progress:
        export_run(run, output, iteration, types[dtype], shard_bytes=int(shard_gb * 1e9), progress=progress)
    console.print(f"written to {output}; load it with transformers and trust_remote_code=True")


def import_(
    source: Positional[Path],
    run_dir: Positional[Path],
    *,
    sequence: str | None = None,
    map: str | None = None,
    window: int | None = None,
    drop_rope_scaling: bool = False,
    json: bool = False,
) -> None:
    """Make a run folder of a trained Llama, exactly, or of its blocks in another sequence.

    Args:
        source: A Hugging Face folder, of a Llama or exported by us, or a torch_dist checkpoint of Megatron's GPTModel.
        run_dir: Folder to make; an existing one is refused.
        sequence: Sequence of the new model, such as (2A4M)x4; the source's own by default, for a Llama (AM)xN.
        map: Which block comes from where: even, depth, or lists such as "A:0-3,7 M:0,0,1-6"; even by default.
        window: Tokens that a query of a W block sees.
        drop_rope_scaling: Take a Llama without the scaling of its rotary embedding; not exact.
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.importing.run import import_run
    from composer_megatron.quiet import hush_imports
    from composer_megatron.sequence import CompositeSequence

    hush_imports()
    parsed = None if sequence is None else CompositeSequence.parse(sequence)
    with _transfer("import", quiet=json) as progress:
        found = import_run(
            source,
            run_dir,
            sequence=parsed,
            blocks=map,
            window=window,
            drop_rope_scaling=drop_rope_scaling,
            progress=progress,
        )
    architecture = found.architecture
    if json:
        print_json(architecture.summary(found.sequence_length) | {"origin": architecture.origin})
        return
    if (sequence, map, window) != (None, None, None):
        _print_surgery(architecture)
    size = f"{architecture.params_total:,} parameters, {str(found.dtype).removeprefix('torch.')}"
    console.print(f"{architecture.sequence.notation}, {size}: written to {run_dir}")
    if "dropped" in architecture.origin:
        console.print(
            f"without its {architecture.origin['dropped']}: logits differ from the source's; train it further"
        )
    if found.tokenizer is None:
        console.print(f"no tokenizer.json came with it: copy one to {run_dir} to generate and to evaluate")


def _print_surgery(architecture: Architecture) -> None:
    """Where each run of blocks comes from, what was used more than once, and what was left out."""
    from composer_megatron.importing.surgery import read_map
    from composer_megatron.sequence import CompositeSequence

    origin = architecture.origin
    blocks = read_map(origin["map"], architecture.sequence, CompositeSequence.parse(origin["source_sequence"]))
    table = Table(title=f"map: {blocks}", title_justify="left")
    table.add_column("blocks", justify="right")
    table.add_column(f"from {origin['source']}", overflow="fold")
    names = iter(blocks.names)
    for run in architecture.sequence.runs:
        table.add_row(f"{run.length}{run.symbol}", " ".join(itertools.islice(names, run.length)))
    console.print(table, markup=False)
    repeated = ", ".join(f"{name} x{count}" for name, count in blocks.repeated.items())
    console.print(f"used more than once: {repeated or 'none'}; dropped: {', '.join(blocks.dropped) or 'none'}")


@contextlib.contextmanager
def _transfer(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes; where the output is no terminal, a line each tenth of what takes long."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        bar.update(task, completed=done, total=total)
        if not quiet and not console.is_terminal and total > _LONG and 10 * done // total > told:
            told = 10 * done // total
            console.print(f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield tell


_LONG = 10**9
"""Bytes above which a transfer takes long enough to say how far it is."""
