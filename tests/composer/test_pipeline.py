"""The pipeline cut against brute force, and a plan whose parts add up to the whole."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron import pipeline
from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.pipeline import Layout, balance, cut_sequence, equal_split, plan
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS


def architecture(letters: str, shape: str = "1b") -> Architecture:
    return Architecture(CompositeSequence.parse(letters), PRESETS[shape])


def all_cuts(blocks: int, stages: int) -> list[list[int]]:
    borders = itertools.combinations(range(1, blocks), stages - 1)
    return [[b - a for a, b in itertools.pairwise((0, *border, blocks))] for border in borders]


@settings(max_examples=60)
@given(
    st.text(alphabet="AM", min_size=1, max_size=10),
    st.integers(1, 6),
    st.sampled_from(["tiny", "1b", "8b"]),
    st.sampled_from([128, 4096, 65536]),
)
def test_no_other_cut_has_a_cheaper_worst_stage(letters: str, stages: int, shape: str, seq_len: int) -> None:
    model = architecture(letters, shape)
    if stages > len(letters):
        with pytest.raises(UsageError, match=f"{stages} pipeline stages for the {len(letters)} blocks"):
            cut_sequence(model, stages)
        return
    cut = cut_sequence(model, stages, seq_len=seq_len)
    assert sum(cut) == len(letters)
    assert len(cut) == stages
    assert min(cut) >= 1
    best = max(balance(model, other, seq_len=seq_len) for other in all_cuts(len(letters), stages))
    assert balance(model, cut, seq_len=seq_len) == pytest.approx(best, rel=1e-12)  # the same integers, one division


@given(st.text(alphabet="AM", min_size=4, max_size=12), st.integers(1, 4), st.sampled_from(["tiny", "350m", "8b"]))
def test_stages_add_up(letters: str, stages: int, shape: str) -> None:
    model = architecture(letters, shape)
    parts = plan(model, Layout(stages=stages, seq_len=2048))
    assert "".join(CompositeSequence.parse(part.blocks).letters for part in parts) == letters
    assert sum(part.flops_per_token for part in parts) == model.flops_per_token(2048)
    second_copy = stages > 1 and model.shape.tied_embeddings
    extra = model.shape.vocab_size * model.shape.hidden_size if second_copy else 0
    assert sum(part.params_per_rank for part in parts) == model.params_total + extra


def test_activations_of_llama_1b_are_the_reference_figure() -> None:
    (stage,) = plan(architecture("(AM)x16"), Layout(seq_len=1))
    logits = 6 * 128_256
    assert stage.activation_bytes - logits == pytest.approx(1.21e6, rel=5e-3)  # 1.21 MB a token, to its three digits
    assert stage.state_bytes == 18 * 1_235_814_400


def test_uneven_costs_beat_equal_counts() -> None:
    model = architecture("(2A4M)x4+1A2M")
    cut = cut_sequence(model, 4)
    assert balance(model, cut) > balance(model, equal_split(27, 4))
    summary = pipeline.summary(model, Layout(stages=4))
    assert summary["pattern"].count("|") == 3
    assert summary["pattern"].replace("|", "") == "**----" * 4 + "*--"
    assert set(summary["pattern"]) <= set("*-|")  # never our letters: Megatron would read M as Mamba


def test_equal_split() -> None:
    assert equal_split(27, 4) == [7, 7, 7, 6]
    assert equal_split(4, 4) == [1, 1, 1, 1]


def test_bad_layouts() -> None:
    with pytest.raises(UsageError, match="stages=0"):
        Layout(stages=0)
    with pytest.raises(UsageError, match="tensor_parallel=3 does not divide num_attention_heads"):
        plan(architecture("2A4M"), Layout(tensor_parallel=3))
    with pytest.raises(UsageError, match="at least 1"):
        cut_sequence(architecture("2A4M"), 0)
