"""Memory of the parts: parameters add up to the model's, bytes follow from what splits them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.architecture import Architecture
from composer_megatron.layout import Layout
from composer_megatron.planner import memory
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

A, M = PRIMITIVES["A"], PRIMITIVES["M"]


@given(st.text(alphabet="AM", min_size=1, max_size=12), st.sampled_from(list(PRESETS)))
def test_parameters_of_one_rank_are_the_models(letters: str, name: str) -> None:
    architecture = Architecture(CompositeSequence(letters), PRESETS[name])
    parts = [memory.block(PRIMITIVES[letter], architecture.shape, Layout()) for letter in letters]
    parts += [memory.embedding(architecture.shape, Layout()), memory.head(architecture.shape, Layout())]
    assert sum(part.parameters for part in parts) == architecture.params_total


@pytest.mark.parametrize("name", ["1b", "8b", "70b"])
def test_what_splits_what(name: str) -> None:
    """Tensor parallelism splits matrices and what lies inside blocks; sequence parallelism the rest; context all."""
    shape = PRESETS[name]
    whole, split = Layout(), Layout(tensor_parallel=4)
    shared = Layout(tensor_parallel=4, sequence_parallel=True)
    for row in (A, M):
        alone = memory.block(row, shape, whole)
        assert memory.block(row, shape, split).parameters == row.matrix_parameters(shape) // 4 + shape.hidden_size
        assert memory.block(row, shape, shared).kept == alone.kept // 4
        replicated = 2 * memory.input_bytes(shape, whole)
        assert memory.block(row, shape, split).kept == replicated + (alone.kept - replicated) // 4
        halved = Layout(context_parallel=2)
        assert memory.block(row, shape, halved).kept == alone.kept // 2
    copy = memory.head(shape, Layout(pipeline_parallel=2)).parameters
    assert copy == shape.hidden_size + shape.vocab_size * shape.hidden_size


def test_llama_1b_keeps_the_reference_figure() -> None:
    """1.21 MB a token without logits, to its three digits: from another program's arithmetic."""
    shape, layout = PRESETS["1b"], Layout(seq_len=1)
    kept = 16 * sum(memory.block(row, shape, layout).kept for row in (A, M))
    assert kept == pytest.approx(1.21e6, rel=5e-3)
    assert memory.head(shape, layout).kept == 6 * shape.vocab_size + 4 * shape.hidden_size


def test_recomputation() -> None:
    shape = PRESETS["1b"]
    architecture = Architecture(CompositeSequence("AM"), shape)
    plain, selective, full = (Layout(recompute=each) for each in ("none", "selective", "full"))
    assert memory.block(M, shape, full).kept == memory.block(A, shape, full).kept == 2 * 4096 * 2048
    assert memory.block(M, shape, selective) == memory.block(M, shape, plain)
    saved = memory.block(A, shape, plain).kept - memory.block(A, shape, selective).kept
    assert saved == 4 * 4096 * shape.num_attention_heads  # a log-sum-exp in fp32
    assert memory.working_bytes(architecture, plain) == 0
    assert (
        memory.working_bytes(architecture, full) + memory.block(M, shape, full).kept
        == memory.block(M, shape, plain).kept
    )


def test_states() -> None:
    assert memory.state_bytes(1000, Layout(data_parallel=4)) == 18_000
    shared = Layout(data_parallel=4, context_parallel=2, seq_len=4096, distributed_optimizer=True)
    assert memory.state_bytes(1000, shared) == 6_000 + 1_500


def test_multi_token_prediction_reads_its_own_embedding_where_it_must() -> None:
    blocks, last = CompositeSequence("AM"), Layout(pipeline_parallel=2)
    tied, untied = (memory.multi_token_prediction(blocks, PRESETS[name], last).parameters for name in ("3b", "8b"))
    for name, found, copies in (("3b", tied, 0), ("8b", untied, 1)):
        shape = PRESETS[name]
        inner = sum(row.matrix_parameters(shape) + shape.hidden_size for row in (A, M))
        own = 2 * shape.hidden_size**2 + 3 * shape.hidden_size + copies * shape.vocab_size * shape.hidden_size
        assert found == inner + own
