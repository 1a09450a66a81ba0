"""Sequences become Megatron patterns, which Megatron reads as they are meant."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_layer_counts, parse_hybrid_pattern

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout
from composer_megatron.pattern import hybrid_pattern
from composer_megatron.pipeline import plan
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

sequences = st.text("AM", min_size=1, max_size=40).map(CompositeSequence)


@st.composite
def cut_sequences(draw):
    sequence = draw(sequences)
    cuts = sorted(draw(st.lists(st.integers(0, len(sequence)), max_size=5)))
    return sequence, [end - start for start, end in itertools.pairwise([0, *cuts, len(sequence)])]


@pytest.mark.parametrize(
    ("text", "stages", "pattern"),
    [
        ("2A4M", None, "**----"),
        ("2A4M2A", [4, 4], "**--|--**"),
        ("2A5M2A3M", [6, 4, 2], "**----|-**-|--"),
        ("AM", [0, 2, 0], "|*-|"),
    ],
)
def test_known_patterns(text, stages, pattern):
    assert hybrid_pattern(CompositeSequence.parse(text), stages) == pattern


@given(cut_sequences())
def test_patterns_hold_the_same_blocks_in_the_same_stages(case):
    sequence, stages = case
    pattern = hybrid_pattern(sequence, stages)
    assert [len(stage) for stage in pattern.split("|")] == stages
    assert pattern.replace("|", "") == "".join(PRIMITIVES[letter].megatron_symbol for letter in sequence)
    parsed = parse_hybrid_pattern(pattern)  # Megatron accepts it, and sees neither Mamba nor another kind
    counts = get_hybrid_layer_counts(parsed.main_pattern)
    assert (counts["*"], counts["-"]) == (sequence.count("A"), sequence.count("M"))
    assert sum(counts.values()) == len(sequence)


@pytest.mark.parametrize("stages", [[3, 4], [7, -1], [], [5]])
def test_stages_that_are_not_the_sequence(stages):
    with pytest.raises(UsageError, match=r"sum to 6 for 2A4M"):
        hybrid_pattern(CompositeSequence.parse("2A4M"), stages)


def test_a_plan_shows_the_pattern_that_is_trained():
    architecture = Architecture(CompositeSequence.parse("2A4M2A4M"), PRESETS["tiny"])
    found = plan(architecture, Layout(pipeline_parallel=2), multi_token=CompositeSequence("AM"))
    assert found.pattern == f"{hybrid_pattern(architecture.sequence, found.cut.counts)}/*-"


def test_what_megatron_cannot_build_is_not_planned():
    architecture = Architecture(CompositeSequence("AL"), PRESETS["tiny"])
    with pytest.raises(UsageError, match="do not go into one model"):
        _ = plan(architecture, Layout()).pattern
