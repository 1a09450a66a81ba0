"""``aggregate`` and ``extrapolate``: from a study to the architecture of a large model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.table import Table
from tyro.conf import Positional

from composer_megatron.commands.options import read_sequence
from composer_megatron.display import console, print_costs, print_json, print_table
from composer_megatron.files import write_json
from composer_megatron.shape import load_shape


def aggregate(study: Positional[Path], *, context: int = 0, clusters: int = 5, json: bool = False) -> None:
    """Vote the best cluster of a study into one robust sequence; writes STUDY/aggregate.json.

    Args:
        study: Folder of a study.
        context: Blocks before a position that a voter must share; 0 is a plain vote, the paper's best.
        clusters: K-means clusters over the scores, or over the values of the study's objective where it has one.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search.aggregate import aggregate as vote
    from composer_search.study import Study

    ranked = [(trial.sequence, trial.value) for trial in Study.load(study).trials if trial.value is not None]
    sequences, values = [sequence for sequence, _ in ranked], [value for _, value in ranked]
    result = vote(sequences, values, context=context, clusters=clusters)
    write_json(study / "aggregate.json", result.as_dict())
    if json:
        print_json(result.as_dict())
        return
    table = Table(title=f"{result.sequence}: vote of the best {len(result.members)}", title_justify="left")
    for heading in ("block", "chosen", "votes", "by"):
        table.add_column(heading, justify="right")
    for block, choice in enumerate(result.votes, start=1):
        counts = "  ".join(f"{count} {letter}" for letter, count in choice.counts.items() if count)
        table.add_row(str(block), choice.letter, counts, choice.decision)
    print_table(table)


def extrapolate(
    source: Positional[str],
    *,
    method: Literal["stack", "stretch"] = "stack",
    shape: str = "1b",
    match: Literal["paper", "parameters"] = "paper",
    seq_len: int = 4096,
    output: Path | None = None,
    baseline_output: Path | None = None,
    json: bool = False,
) -> None:
    """Grow a small sequence to the size of a target, by stacking or stretching.

    Args:
        source: A sequence such as 2A4M, or an aggregate.json.
        method: stack repeats the sequence, stretch lengthens its runs; stack suits up to about 8 blocks.
        shape: A preset (350m, 1b, 3b, 8b, 70b, 60m, demo, tiny) or a JSON file with the widths.
        match: paper rounds up as the paper does; parameters comes closest to the baseline's size.
        seq_len: Tokens in a sequence, for the FLOPs.
        output: Where to write the architecture file.
        baseline_output: Where to write a Llama-style architecture of as many parameters, by its MLP width.
        json: Print one JSON object for programs instead of text.
    """
    from composer_search import extrapolate as rules

    grown = rules.extrapolate(read_sequence(source), load_shape(shape), method=method, match=match)
    written = {output: grown, baseline_output: grown.matched_baseline()}
    for path, architecture in written.items():
        if path:
            architecture.save(path)
    if json:
        print_json(grown.summary(seq_len))
        return
    print_costs(grown, seq_len)
    for path, architecture in written.items():
        if path:
            console.print(
                f"{architecture.sequence.notation}, {architecture.params_total:,} parameters: written to {path}"
            )
