"""Layouts: what follows from their sizes, and every way to get one wrong."""

from typing import Any

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout, micro_batches_in
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

SIX = Architecture(CompositeSequence.parse("2A4M"), PRESETS["1b"])


def test_sizes() -> None:
    layout = Layout(
        tensor_parallel=2,
        pipeline_parallel=4,
        context_parallel=2,
        data_parallel=8,
        micro_batch_size=3,
        seq_len=8192,
        sequence_parallel=True,
    )
    assert (layout.ranks, layout.replicas, layout.tokens) == (128, 16, 3 * 4096)
    assert (layout.schedule.micro_batches, layout.global_batch_size, layout.hidden_split) == (16, 3 * 16 * 8, 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel=0"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"virtual_stages": 2}, "2 virtual stages on one pipeline rank"),
        ({"virtual_stages": 2, "pipeline_parallel": 4, "micro_batches": 6}, "multiple of 4"),
        ({"context_parallel": 4, "seq_len": 4100}, "no multiple of 8"),
        ({"tensor_parallel": 4, "seq_len": 6, "sequence_parallel": True}, "does not divide 6 tokens"),
    ],
)
def test_impossible(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout(**sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_parallel": 3}, "does not divide num_attention_heads=32"),
        ({"tensor_parallel": 16}, "does not divide num_query_groups=8"),
        ({"pipeline_parallel": 7}, "7 pipeline stages for the 6 blocks of 2A4M"),
        ({"pipeline_parallel": 2, "virtual_stages": 4}, "8 pipeline stages for the 6 blocks of 2A4M"),
    ],
)
def test_unfit_for_an_architecture(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout(**sizes).check(SIX)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({}, "micro-batch 1"),
        ({"pipeline_parallel": 2, "virtual_stages": 4, "data_parallel": 8}, "pp 2, vpp 4, dp 8, micro-batch 1"),
        ({"tensor_parallel": 2, "context_parallel": 4, "micro_batch_size": 3}, "tp 2, cp 4, micro-batch 3"),
        ({"recompute": "full"}, "micro-batch 1, full recompute"),
    ],
)
def test_a_layout_in_a_line(sizes: dict[str, Any], text: str) -> None:
    assert str(Layout(**sizes)) == text


def test_batches() -> None:
    assert micro_batches_in(96, 2, 8) == 6
    with pytest.raises(UsageError, match="no multiple of 16"):
        micro_batches_in(90, 2, 8)
