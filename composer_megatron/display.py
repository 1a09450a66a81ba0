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
    """Print a plan (`composer_megatron.estimate.summary`): its stages, its step, and what that rests on."""
    table = Table(title=f"pipeline pattern {summary['pattern']}", title_justify="left")
    for heading in ("stage", "rank", "blocks", "fwd ms", "bwd ms", "weights", "states", "kept"):
        table.add_column(heading, justify="right")
    for number, stage in enumerate(summary["stages"]):
        times = (f"{stage[key] * 1e3:.2f}" for key in ("forward_seconds", "backward_seconds"))
        memory = (filesize.decimal(stage[key]) for key in ("state_bytes", "activation_bytes"))
        weights = f"{stage['params_per_rank'] / 1e6:,.1f}M"
        blocks = CompositeSequence.parse(stage["blocks"]).notation if stage["blocks"] else "-"
        table.add_row(str(number), str(stage["rank"]), blocks, *times, weights, *memory)
    console.print(table)
    at_least = summary["schedule_time_at_least"]
    schedule = summary["step_time_parts"]["schedule"]
    proven = at_least is not None and at_least >= schedule * (1 - 1e-9)
    known = "no cut is faster" if proven else f"no cut can take less than {(at_least or 0) * 1e3:,.1f} ms"
    peaks = ", ".join(filesize.decimal(peak) for peak in summary["memory_bytes"])
    console.print(
        f"step of {summary['global_batch_size']} sequences: {summary['step_time'] * 1e3:,.1f} ms expected, "
        f"{schedule * 1e3:,.1f} ms of it the pipeline ({known})"
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
    """Print layouts that were compared (`composer_megatron.survey.survey`), best first."""
    first = summaries[0]
    step = f"{first['global_batch_size']} x {first['seq_len']} tokens a step"
    table = Table(title=f"{first['ranks']} GPUs, shape {first['shape']}, {step}: expected", title_justify="left")
    table.add_column("layout")
    for heading in ("step", "bubble", "memory", "tokens/s\n/GPU", "tokens/s", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(
            _layout_text(summary),
            f"{summary['step_time']:.2f} s",
            f"{summary['bubble']:.1%}\n({summary['bubble_equal_split']:.1%})",
            filesize.decimal(max(summary["memory_bytes"])),
            f"{summary['tokens_per_second_per_gpu']:,.0f}",
            f"{summary['tokens_per_second']:,.0f}",
            f"{summary['mfu']:.1%}",
        )
    console.print(table)
    console.print("in brackets the bubble with equal block counts; memory of the fullest GPU")
    for line in dict.fromkeys(line for summary in summaries for line in summary["assumes"]):
        console.print(f"assumes {line}")


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


def _layout_text(summary: dict[str, Any]) -> str:
    """Sizes above one, the micro-batch, and recomputation where there is some."""
    sizes = {"tp": "tensor_parallel", "cp": "context_parallel", "pp": "pipeline_parallel", "vpp": "virtual_stages"}
    parts = [f"{name} {summary[key]}" for name, key in (sizes | {"dp": "data_parallel"}).items() if summary[key] > 1]
    parts.append(f"micro-batch {summary['micro_batch_size']}")
    if summary["recompute"] != "none":
        parts.append(f"{summary['recompute']} recompute")
    return ", ".join(parts)
