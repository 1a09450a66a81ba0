"""``systems``: the systems that a Composite is compared with, what they cost at a shape, and what of them runs."""

from __future__ import annotations

from rich import filesize
from rich.table import Table

from composer_megatron.display import console, print_json, print_table, short_count
from composer_megatron.errors import UsageError
from composer_megatron.shape import load_shape


def systems(*, shape: str = "1b", seq_len: int = 8192, json: bool = False) -> None:
    """List the systems to compare with: their blocks at a shape, counts, and what was seen to run.

    Args:
        shape: A preset or a JSON file: widths, and the size that the systems come close to.
        seq_len: Tokens in a sequence, for the bytes that decoding keeps and for FLOPs.
        json: Print one JSON list for programs instead of a table.
    """
    from composer_megatron.systems import LAYOUTS, table

    if seq_len < 1:
        raise UsageError(f"--seq-len {seq_len}; expected at least 1")
    rows = table(load_shape(shape), seq_len)
    if json:
        print_json(rows)
        return
    shown = Table(box=None)
    for heading in ("system", "sequence"):
        shown.add_column(heading)
    for heading in ("params", "active", "KV and states", "FLOPs a token", "trains on a CPU", *LAYOUTS, "exports"):
        shown.add_column(heading, justify="right")
    for row in rows:
        flags = ["yes" if row[name] else "no" for name in ("trains", *LAYOUTS, "exports")]
        counts = [short_count(row[name]) for name in ("parameters", "active_parameters")]
        state = filesize.decimal(row["state_bytes"])
        shown.add_row(row["title"], row["sequence"], *counts, state, f"{row['flops_per_token']:.2e}", *flags)
    print_table(shown)
    console.print(f"shape {shape}, sequences of {seq_len:,}; active: weights of blocks that a token meets")
