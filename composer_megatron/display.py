"""How the program shows results: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import filesize
from rich.console import Console
from rich.table import Table

from composer_megatron.architecture import Architecture

if TYPE_CHECKING:
    from composer_megatron.bench_kernels import Verdict

console = Console(highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_costs(architecture: Architecture, seq_len: int) -> None:
    """Print an architecture's counts beside its baseline's."""
    this, baseline = architecture.summary(seq_len), architecture.baseline().summary(seq_len)
    table = Table(title=f"{architecture.sequence.notation} at shape {architecture.shape.name}", title_justify="left")
    for heading in ("", "this", "Llama baseline", "baseline / this"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = {
        "blocks": "blocks",
        "attention blocks": "attention",
        "MLP blocks": "mlp",
        "parameters, no embeddings": "params_non_embedding",
        "parameters, all": "params_total",
        f"training FLOPs a token at {seq_len:,}": "flops_per_token",
        "KV bytes a token (bf16)": "kv_bytes_per_token",
    }
    for label, key in rows.items():
        ratio = f"{baseline[key] / this[key]:.3f}" if this[key] else "-"
        table.add_row(label, f"{this[key]:,}", f"{baseline[key]:,}", ratio)
    console.print(table)


def print_stages(summary: dict[str, Any]) -> None:
    """Print the stages of a plan (`composer_megatron.pipeline.summary`)."""
    table = Table(title=f"pipeline pattern {summary['pattern']}", title_justify="left")
    for heading in ("stage", "blocks", "FLOPs a token", "parameters a rank", "states", "activations"):
        table.add_column(heading, justify="right")
    for number, stage in enumerate(summary["stages"]):
        memory = (filesize.decimal(stage[key]) for key in ("state_bytes", "activation_bytes"))
        table.add_row(
            str(number), stage["blocks"], f"{stage['flops_per_token']:,}", f"{stage['params_per_rank']:,}", *memory
        )
    console.print(table)
    console.print(
        f"balance (mean over slowest stage) {summary['balance']:.3f}; "
        f"with equal block counts {summary['balance_equal_split']:.3f}"
    )


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print kernel results (`composer_megatron.bench_kernels.verdicts`), the cases where a peer is faster in red."""
    table = Table(title="our kernels beside their fastest peers", title_justify="left")
    for heading in ("op", "case", "us", "of limit", "fastest peer", "peer / ours", ""):
        table.add_column(heading, justify="left" if heading in ("op", "case", "fastest peer", "") else "right")
    for verdict in verdicts:
        slower = verdict.advantage is not None and verdict.advantage < 1
        table.add_row(
            verdict.op,
            verdict.case,
            "-" if verdict.seconds is None else f"{verdict.seconds * 1e6:,.1f}",
            "-" if verdict.fraction is None else f"{verdict.fraction:.3f}",
            verdict.peer or "none timed",
            "-" if verdict.advantage is None else f"{verdict.advantage:.2f}",
            verdict.note or ("slower" if slower else ""),
            style="red" if slower else None,
        )
    console.print(table)
