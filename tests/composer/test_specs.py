"""Sequences become Megatron patterns, and the spec is one that Megatron's own machinery takes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_layer_counts, parse_hybrid_pattern
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from composer_megatron.architecture import Architecture
from composer_megatron.backend import BACKENDS
from composer_megatron.errors import UsageError
from composer_megatron.model import initialize_single_process, transformer_config
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_megatron.specs import LAYERS, composite_stack_spec, hybrid_pattern
from composer_megatron.stack import CompositeStack

torch.set_num_threads(1)
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
    ours = {row.megatron_symbol: row.symbol for row in PRIMITIVES.values()}
    assert [len(stage) for stage in pattern.split("|")] == stages
    assert "".join(ours[letter] for letter in pattern.replace("|", "")) == sequence.letters
    parsed = parse_hybrid_pattern(pattern)  # Megatron accepts it, and sees neither Mamba nor another kind
    counts = get_hybrid_layer_counts(parsed.main_pattern)
    assert (counts["*"], counts["-"]) == (sequence.count("A"), sequence.count("M"))
    assert sum(counts.values()) == len(sequence)


@pytest.mark.parametrize("stages", [[3, 4], [7, -1], [], [5]])
def test_stages_that_are_not_the_sequence(stages):
    with pytest.raises(UsageError, match=r"sum to 6 for 2A4M"):
        hybrid_pattern(CompositeSequence.parse("2A4M"), stages)


def test_every_primitive_has_a_layer_spec():
    assert set(LAYERS) == set(PRIMITIVES)


def test_megatron_finds_the_spec_and_builds_the_model():
    """The way of ``--spec composer_megatron.specs composite_stack_spec`` in Megatron's own scripts."""
    spec = import_module(("composer_megatron.specs", "composite_stack_spec"))
    assert spec is composite_stack_spec
    assert isinstance(spec, ModuleSpec)
    initialize_single_process()
    architecture = Architecture(CompositeSequence.parse("2A4M"), PRESETS["tiny"])
    transformer = transformer_config(architecture, dtype=torch.float32, backend=BACKENDS["local"], on_cpu=True)
    config = HybridModelConfig(
        transformer=transformer,
        hybrid_stack_spec=spec,
        hybrid_layer_pattern=hybrid_pattern(architecture.sequence),
        vocab_size=architecture.shape.vocab_size,
        share_embeddings_and_output_weights=architecture.shape.tied_embeddings,
        position_embedding_type="rope",
        seq_length=32,
    )
    model = HybridModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    assert isinstance(model.decoder, CompositeStack)
    assert sum(parameter.numel() for parameter in model.parameters()) == architecture.params_total
