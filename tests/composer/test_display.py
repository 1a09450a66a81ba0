"""Tables for people: every number whole on a terminal of 80 columns, however large the model."""

import io

import pytest
from rich.console import Console

from composer_megatron import display, pipeline
from composer_megatron.architecture import Architecture
from composer_megatron.layout import Layout
from composer_megatron.planner import estimate
from composer_megatron.roofline import get_device
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS


def recorder(monkeypatch, *, terminal: bool) -> io.StringIO:
    """What the program prints, on a terminal of 80 columns or where there is none."""
    file = io.StringIO()
    console = Console(file=file, width=80, highlight=False, soft_wrap=True, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(display, "console", console)
    return file


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line[:1] in "┏┃┡│└"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_stage_of_a_large_model_is_shown_whole(monkeypatch, terminal):
    output = recorder(monkeypatch, terminal=terminal)
    architecture = Architecture(CompositeSequence.parse("A1M1A1M2A4M2A4M3A3M2A3M(2A4M)x10+4M"), PRESETS["70b"])
    summary = estimate.summary(pipeline.plan(architecture, Layout(pipeline_parallel=2), device=get_device("h100")))
    display.print_costs(architecture, 4096)
    display.print_stages(summary)
    shown = output.getvalue()
    assert "…" not in shown
    assert (max(map(len, table_lines(shown))) <= 80) == terminal
    assert f"{architecture.params_total:,}" in shown
    for stage in summary["stages"]:
        assert f"{stage['params_per_rank'] / 1e9:.1f}B" in shown
        assert f"{stage['forward_seconds'] * 1e3:.2f}" in shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (999, "999"), (1000, "1.0K"), (498_700, "498.7K"), (345_300_000, "345.3M"), (1_235_814_400, "1.2B")],
)
def test_short_counts(count, shown):
    assert display.short_count(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(12.8231, "12,823.10"), (0.006, "6.00"), (1.234e-5, "0.0123"), (0, "0")]
)
def test_short_milliseconds(seconds, shown):
    assert display.short_milliseconds(seconds) == shown
