"""How the program shows results: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import filesize
from rich.console import Console
from rich.table import Table

from composer_megatron.architecture import Architecture
from composer_megatron.sequence import CompositeSequence

if TYPE_CHECKING:
    from composer_megatron.bench.kernels import Verdict

console = Console(highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(table: Table) -> None:
    """Print a table within the terminal's width, or as wide as it is where no terminal shows it."""
    wide = console if console.is_terminal else Console(file=console.file, width=10_000, highlight=False)
    wide.print(table)


def short_count(count: int) -> str:
    """A count in thousands, millions or billions, such as 1.2B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:,.1f}{unit}"
    return str(count)


def short_milliseconds(seconds: float) -> str:
    """Seconds in milliseconds, to hundredths, or to three digits where that would show nothing."""
    milliseconds = seconds * 1e3
    return f"{milliseconds:,.2f}" if milliseconds >= 1 else f"{milliseconds:.3g}"


def print_costs(architecture: Architecture, seq_len: int) -> None:
    """Print an architecture's counts beside its baseline's."""
    this, baseline = architecture.summary(seq_len), architecture.baseline().summary(seq_len)
    table = Table(title=f"{architecture.sequence.notation} at shape {architecture.shape.name}", title_justify="left")
    table.add_column("")
    for heading in ("this", "Llama baseline", "baseline / this"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = {
        "blocks": "blocks",
        "attention blocks": "attention",
        "MLP blocks": "mlp",
        "parameters, no embeddings": "params_non_embedding",
        "parameters, all": "params_total",
        f"training FLOPs a token at {seq_len:,}": "flops_per_token",
        "KV bytes a token (bf16)": "kv_bytes_per_token",
    }
    if set(this["counts"]) - {"A", "M"}:  # whose cost these two rows do not add to
        rows["matrices that a token meets"] = "active_parameters"
        rows[f"bytes that decoding keeps of {seq_len:,} tokens (bf16)"] = "state_bytes"
    for label, key in rows.items():
        ratio = f"{baseline[key] / this[key]:.3f}" if this[key] else "-"
        table.add_row(label, f"{this[key]:,}", f"{baseline[key]:,}", ratio)
    print_table(table)


def print_stages(summary: dict[str, Any]) -> None:
    """Print a plan (`composer_megatron.planner.estimate.summary`): its stages, its step, and what that rests on."""
    table = Table(title=f"pipeline pattern {summary['pattern']}", title_justify="left")
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("blocks", overflow="fold", min_width=8)
    for heading in ("fwd ms", "bwd ms", "weights", "states", "kept"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, stage in enumerate(summary["stages"]):
        times = (short_milliseconds(stage[key]) for key in ("forward_seconds", "backward_seconds"))
        memory = (filesize.decimal(stage[key]) for key in ("state_bytes", "activation_bytes"))
        blocks = CompositeSequence.parse(stage["blocks"]).notation if stage["blocks"] else "-"
        table.add_row(str(number), str(stage["rank"]), blocks, *times, short_count(stage["params_per_rank"]), *memory)
    print_table(table)
    at_least = summary["schedule_time_at_least"]
    schedule = summary["step_time_parts"]["schedule"]
    proven = at_least is not None and at_least >= schedule * (1 - 1e-9)
    known = "no cut is faster" if proven else f"no cut can take less than {short_milliseconds(at_least or 0)} ms"
    peaks = ", ".join(filesize.decimal(peak) for peak in summary["memory_bytes"])
    console.print(
        f"step of {summary['global_batch_size']} sequences: {short_milliseconds(summary['step_time'])} ms expected, "
        f"{short_milliseconds(schedule)} ms of it the pipeline ({known})"
    )
    console.print(
        f"bubble {summary['bubble']:.1%}; with equal block counts {summary['bubble_equal_split']:.1%}; "
        f"balance (mean over slowest rank) {summary['balance']:.3f}, {summary['balance_equal_split']:.3f}"
    )
    mfu = "" if summary["mfu"] is None else f", MFU {summary['mfu']:.1%}"
    console.print(
        f"{summary['tokens_per_second']:,.0f} tokens/s expected, "
        f"{summary['tokens_per_second_per_gpu']:,.0f} a rank{mfu}"
    )
    console.print(f"memory a rank: {peaks}")
    for line in [*summary["notes"], *(f"assumes {assumption}" for assumption in summary["assumes"])]:
        console.print(line)


def print_layouts(summaries: list[dict[str, Any]]) -> None:
    """Print layouts that were compared (`composer_megatron.planner.survey.survey`), best first."""
    first = summaries[0]
    step = f"{first['global_batch_size']} x {first['seq_len']} tokens a step"
    table = Table(title=f"{first['ranks']} GPUs, shape {first['shape']}, {step}: expected", title_justify="left")
    table.add_column("layout")
    for heading in ("step", "bubble", "memory", "tokens/s\n/GPU", "tokens/s", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(
            summary["layout"],
            f"{summary['step_time']:.2f} s",
            f"{summary['bubble']:.1%}\n({summary['bubble_equal_split']:.1%})",
            filesize.decimal(max(summary["memory_bytes"])),
            f"{summary['tokens_per_second_per_gpu']:,.0f}",
            f"{summary['tokens_per_second']:,.0f}",
            f"{summary['mfu']:.1%}",
        )
    print_table(table)
    console.print("in brackets the bubble with equal block counts; memory of the fullest GPU")
    for line in dict.fromkeys(line for summary in summaries for line in summary["assumes"]):
        console.print(f"assumes {line}")


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print kernel results (`composer_megatron.bench.kernels.verdicts`), the cases where a peer is faster in red."""
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
    print_table(table)
