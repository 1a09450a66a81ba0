"""Plans: parts that add up to the whole, cuts that beat equal counts, and what is refused."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout
from composer_megatron.pipeline import cut_sequence, plan
from composer_megatron.roofline import DEVICES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS


def architecture(letters: str, shape: str = "1b") -> Architecture:
    return Architecture(CompositeSequence.parse(letters), PRESETS[shape])


@settings(max_examples=25, deadline=None)
@given(
    st.text(alphabet="AM", min_size=6, max_size=14),
    st.sampled_from([(1, 1), (2, 1), (3, 1), (6, 1), (2, 2), (3, 2), (2, 3)]),
    st.sampled_from(["tiny", "350m", "8b"]),
)
def test_stages_add_up(letters: str, ranks: tuple[int, int], shape: str) -> None:
    model = architecture(letters, shape)
    found = plan(model, Layout(pipeline_parallel=ranks[0], virtual_stages=ranks[1], seq_len=2048), quick=True)
    stages = found.stages
    assert "".join(CompositeSequence.parse(stage.blocks).letters for stage in stages if stage.blocks) == letters
    assert [stage.rank for stage in stages] == [index % ranks[0] for index in range(ranks[0] * ranks[1])]
    assert sum(stage.flops_per_token for stage in stages) == model.flops_per_token(2048)
    second_copy = ranks[0] > 1 and model.shape.tied_embeddings
    extra = model.shape.vocab_size * model.shape.hidden_size if second_copy else 0
    assert sum(found.params_per_rank) == model.params_total + extra
    for rank, peak in enumerate(found.memory_bytes):
        assert peak == sum(stage.state_bytes + stage.activation_bytes for stage in stages[rank :: ranks[0]])


def brute_force(model: Architecture, ranks: int) -> float:
    """The shortest simulated step of all cuts in which only the first and the last stage may have no blocks."""
    found = plan(model, Layout(pipeline_parallel=ranks))
    blocks = len(model.sequence)
    inner = itertools.combinations_with_replacement(range(blocks + 1), ranks - 1)
    cuts = [(0, *borders, blocks) for borders in inner]
    cuts = [cut for cut in cuts if all(a < b for a, b in itertools.pairwise(cut[1:-1]))]
    return min(found.problem.time(np.array(cut)) for cut in cuts) / 1e12


@pytest.mark.parametrize(("letters", "ranks"), [("(2A4M)x2", 4), ("AMMAMMAAAM", 3), ("7M", 4), ("1A6M", 3)])
def test_no_cut_of_a_real_shape_is_faster(letters: str, ranks: int) -> None:
    model = architecture(letters)
    found = plan(model, Layout(pipeline_parallel=ranks))
    assert found.seconds == brute_force(model, ranks)
    assert found.cut.bound == found.cut.time


@pytest.mark.parametrize(("ranks", "virtual"), [(8, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("letters", ["(2A4M)x10+4M", "(AM)x32", "32A32M"])
def test_uneven_costs_beat_equal_counts(letters: str, ranks: int, virtual: int) -> None:
    found = plan(architecture(letters), Layout(pipeline_parallel=ranks, virtual_stages=virtual))
    assert found.bubble(found.seconds) < 0.8 * found.bubble(found.seconds_equal_split)
    assert found.balance > found.balance_equal_split
    assert found.pattern.count("|") == ranks * virtual - 1
    symbols = {"A": "*", "M": "-"}
    assert found.pattern.replace("|", "") == "".join(symbols[letter] for letter in architecture(letters).sequence)


def test_the_loss_head_weighs_on_the_last_stage() -> None:
    """At 350m with 128,256 tokens the head costs about as much as ten blocks: the last stage is left without."""
    assert cut_sequence(architecture("(AM)x6", "350m"), 4)[-1] == 0


def test_memory_limits_move_blocks() -> None:
    """Earlier stages keep more micro-batches: under a limit they hold fewer blocks, and a step takes longer."""
    layout = Layout(pipeline_parallel=4, micro_batch_size=4)
    model = architecture("(AM)x16")
    free = plan(model, layout)
    limit = 0.9 * max(free.memory_bytes)
    held = plan(model, layout, memory_limit=limit)
    assert max(held.memory_bytes) <= limit
    assert held.seconds > free.seconds
    with pytest.raises(UsageError, match=r"within 5\.00 GB: the least possible is .* GB, on pipeline rank \d"):
        plan(model, layout, memory_limit=5e9)


def test_multi_token_prediction() -> None:
    model, layout = architecture("(AM)x16"), Layout(pipeline_parallel=4)
    plain, deep = (plan(model, layout, multi_token=each) for each in (None, CompositeSequence("AM")))
    assert deep.pattern.endswith("/*-")
    assert sum(deep.cut.counts) == 32
    assert deep.cut.counts[-1] <= plain.cut.counts[-1]
    assert deep.stages[-1].forward_seconds > 1.9 * plain.problem.last.forward / 1e12


def test_what_training_takes_is_the_plans_cut() -> None:
    for ranks, virtual in ((4, 1), (4, 2)):
        model = architecture("(2A4M)x4+1A2M")
        found = plan(model, Layout(pipeline_parallel=ranks, virtual_stages=virtual))
        assert cut_sequence(model, ranks, virtual_stages=virtual) == found.cut.counts


def test_impossible() -> None:
    with pytest.raises(UsageError, match="7 pipeline stages for the 6 blocks"):
        cut_sequence(architecture("2A4M"), 7)
    with pytest.raises(UsageError, match="pipeline_parallel=0"):
        cut_sequence(architecture("2A4M"), 0)
    with pytest.raises(UsageError, match="nothing to take the blocks' times from"):
        plan(architecture("2A4M"), Layout(), device=None)


def test_devices_change_times_not_memory() -> None:
    model, layout = architecture("(AM)x16"), Layout(pipeline_parallel=2)
    h100, a100 = (plan(model, layout, device=DEVICES[name]) for name in ("h100", "a100"))
    assert a100.seconds > 2 * h100.seconds
    assert sum(h100.params_per_rank) == sum(a100.params_per_rank)
