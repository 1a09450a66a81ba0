"""``kv``: what decoding keeps in memory, and how many requests fit on a GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import cast

from rich.table import Table
from tyro.conf import Positional

from composer_megatron import kv as counting
from composer_megatron.architecture import Architecture
from composer_megatron.commands.options import read_architecture
from composer_megatron.display import console, print_json
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.files import write_json
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape

_GIGABYTE = 10**9

Trials = list[dict[str, object]]


def kv(
    sequences: Positional[tuple[str, ...]] = (),
    *,
    shapes: tuple[str, ...] = ("350m", "1b", "3b", "8b"),
    contexts: tuple[int, ...] = (2048, 8192, 32_768, 131_072),
    memory: tuple[int, ...] = (80, 141),
    check: bool = False,
    json: bool = False,
    output: Path | None = None,
) -> None:
    """Bytes that decoding keeps of a token, and how many requests fit on a GPU, beside Llama.

    Args:
        sequences: Sequences, whose blocks are taken as given, or architecture files, such as extrapolate writes; by
            default 2A4M stacked and 2A5M2A3M1A3M stretched to each shape.
        shapes: Presets or JSON files, for sequences.
        contexts: Tokens of a request, prompt and continuation.
        memory: Gigabytes (10^9 bytes) of a GPU: 80 for an H100, 141 for an H200.
        check: Allocate and run the batches that are said to fit on this machine's GPU; exit status 1 if one does not.
        json: Print one JSON object for programs instead of text.
        output: Write that object there as well; with --check after every batch, to keep what a run cut short found.
    """
    wanted = models(sequences, shapes)
    memories = [gigabytes * _GIGABYTE for gigabytes in memory]
    rows = [counting.keeping(name, architecture, contexts, memories) for name, architecture in wanted]
    facts = {**_measured_here(check), "rows": [asdict(row) for row in rows]}

    def keep(trials: Trials) -> None:
        if output is not None:
            write_json(output, {**facts, "trials": trials})

    trials = _check(wanted, rows, memories, keep) if check else []
    keep(trials)
    if json:
        print_json({**facts, "trials": trials})
    else:
        _show(rows, wanted, contexts, memory)
    failed = [trial for trial in trials if not trial["holds"]]
    if failed:
        disturbed = max(cast(int, trial["others"]) for trial in failed)
        why = f"; other processes held up to {disturbed / _GIGABYTE:.1f} GB of this GPU, try without them"
        raise ComposerError(
            f"{len(failed)} of {len(trials)} batches did not fit as computed, the first: {failed[0]['said']}"
            + (why if disturbed else "")
        )


def models(sequences: tuple[str, ...], shapes: tuple[str, ...]) -> list[tuple[str, Architecture]]:
    """Llama and the Composites of every shape, with their names; Llama once a shape.

    Args:
        sequences: Sequences or architecture files; without any, 2A4M stacked and 2A5M2A3M1A3M stretched to each shape.
        shapes: Presets or JSON files, for sequences.
    """
    from composer_search.extrapolate import extrapolate

    found: dict[tuple[str, str], Architecture] = {}
    if not sequences:
        for shape in map(load_shape, shapes):
            stacked = extrapolate(CompositeSequence.parse("2A4M"), shape, method="stack")
            stretched = extrapolate(CompositeSequence.parse("2A5M2A3M1A3M"), shape, method="stretch")
            grown = {"llama": stacked.baseline(), "stacked": stacked, "stretched": stretched}
            found |= {(shape.name, name): architecture for name, architecture in grown.items()}
    for source in sequences:
        given = [None] if source.endswith(".json") else shapes
        for architecture in (read_architecture(source, shape) for shape in given):
            found.setdefault((architecture.shape.name, "llama"), architecture.baseline())
            found[architecture.shape.name, source] = architecture
    return [(name, architecture) for (_, name), architecture in found.items()]


def _measured_here(check: bool) -> dict[str, object]:
    """When and on what; nothing where nothing was measured."""
    if not check:
        return {}
    from composer_megatron.env import environment

    return {"date": time.strftime("%Y-%m-%d"), "environment": environment()}


def _show(
    rows: list[counting.Keeping],
    models: list[tuple[str, Architecture]],
    contexts: tuple[int, ...],
    memory: tuple[int, ...],
) -> None:
    table = Table(title="decoding cache, bf16", title_justify="left")
    for heading in ("shape", "model", "sequence"):
        table.add_column(heading)
    for heading in ("bytes a token", "Llama over this"):
        table.add_column(heading, justify="right")
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.shape, row.model, row.sequence, f"{row.bytes_per_token:,}", ratio)
    console.print(table)
    grown = []
    for row, (_, architecture) in zip(rows, models, strict=True):
        blocks, whole = len(architecture.sequence), len(architecture.baseline().sequence)
        if 2 * blocks < whole:
            said = f"{row.model}: {blocks} blocks as given, beside the {whole} of {row.shape}'s Llama"
            console.print(f"{said}; `composer-megatron extrapolate` grows it", markup=False)
        else:
            grown.append(row)
    for shape in dict.fromkeys(row.shape for row in rows):
        mean = counting.mean_ratio([row for row in grown if row.shape == shape])
        if mean is not None:
            console.print(f"{shape}: Llama over Composite {mean:.3f} in the mean")
    for gigabytes in memory:
        _show_batches(rows, contexts, gigabytes)


def _show_batches(rows: list[counting.Keeping], contexts: tuple[int, ...], gigabytes: int) -> None:
    table = Table(title=f"requests at a time in {gigabytes} GB, by their tokens", title_justify="left")
    for heading in ("shape", "model"):
        table.add_column(heading)
    for context in contexts:
        table.add_column(f"{context:,}", justify="right")
    for row in rows:
        table.add_row(row.shape, row.model, *(f"{batch:,}" for batch in row.batches[gigabytes * _GIGABYTE].values()))
    console.print(table)


def _check(
    models: list[tuple[str, Architecture]],
    rows: list[counting.Keeping],
    memories: list[int],
    keep: Callable[[Trials], None],
) -> Trials:
    """Try every batch for memories that this GPU has; what was found is said on standard error and kept as it comes."""
    import torch

    from composer_megatron.inference.fit import try_batch, weights_for
    from composer_megatron.inference.limits import SPARE

    if not torch.cuda.is_available():
        raise UsageError("--check runs on a CUDA GPU, and there is none; leave it out")
    here = torch.cuda.get_device_properties(0).total_memory
    trials: Trials = []
    for (name, architecture), row in zip(models, rows, strict=True):
        weights = weights_for(architecture)
        cases = [
            (memory, context, batch)
            for memory in memories
            for context, batch in row.batches[memory].items()
            if memory <= here and batch and context > SPARE
        ]
        for memory, context, batch in cases:
            trial = try_batch(architecture, weights, batch, context)
            holds = trial.used is not None and trial.used <= memory and trial.cache == trial.cache_formula
            used = "out of memory" if trial.used is None else f"{trial.used / _GIGABYTE:.1f} GB in use"
            if trial.others:
                left = (here - trial.others) / _GIGABYTE
                used += f" (other processes hold {trial.others / _GIGABYTE:.1f} GB and leave {left:.1f})"
            asked = f"{row.shape} {name}: {batch:,} requests of {context:,} tokens in {memory / _GIGABYTE:.0f} GB"
            said = f"{asked}: {used}, cache {trial.cache:,} bytes of {trial.cache_formula:,}"
            print(said, file=sys.stderr, flush=True)
            facts = {"shape": row.shape, "model": name, "memory": memory, "holds": holds, "said": said}
            trials.append(facts | asdict(trial))
            keep(trials)
        del weights
    return trials
