"""The spec is one that Megatron's own machinery takes, and builds our model."""

import importlib.util

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from composer_megatron.architecture import Architecture
from composer_megatron.backend import get_backend
from composer_megatron.builder import CompositeModelBuilder, CompositeModelConfig
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.model import (
    CompositeModel,
    initialize_single_process,
    initialize_weights,
    transformer_config,
)
from composer_megatron.pattern import hybrid_pattern
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_megatron.specs import LAYERS, composite_stack_spec, stack_spec
from composer_megatron.stack import CompositeStack

torch.set_num_threads(1)


def test_every_primitive_has_a_layer_spec():
    assert set(LAYERS) == set(PRIMITIVES)


def model_config(kind=HybridModelConfig, pattern: str | None = None, mtp_layers: int | None = None, **fields):
    initialize_single_process()
    architecture = Architecture(CompositeSequence.parse("2A4M"), PRESETS["tiny"])
    transformer = transformer_config(
        architecture,
        dtype=torch.float32,
        backend=get_backend("local"),
        on_cpu=True,
        mtp_num_layers=mtp_layers,
        perform_initialization=True,
    )
    return kind(
        transformer=transformer,
        hybrid_layer_pattern=pattern or hybrid_pattern(architecture.sequence),
        vocab_size=architecture.shape.vocab_size,
        share_embeddings_and_output_weights=architecture.shape.tied_embeddings,
        position_embedding_type="rope",
        seq_length=32,
        **fields,
    )


GROUPS = ProcessGroupCollection.use_mpu_process_groups


@pytest.mark.parametrize("suffix", ["", "_local", "_composer"])
def test_megatron_finds_the_spec_and_builds_the_model(suffix):
    """The way of ``--spec composer_megatron.specs composite_stack_spec`` in Megatron's own scripts."""
    spec = import_module(("composer_megatron.specs", f"composite_stack_spec{suffix}"))
    assert isinstance(spec, ModuleSpec)
    config = model_config(hybrid_stack_spec=spec)
    model = HybridModelBuilder(config).build_model(GROUPS())
    assert isinstance(model.decoder, CompositeStack)
    params = Architecture(CompositeSequence.parse("2A4M"), PRESETS["tiny"]).params_total
    assert sum(parameter.numel() for parameter in model.parameters()) == params
    row = get_backend(suffix.removeprefix("_") or None)
    assert type(model.decoder.final_norm) is row.norm.use
    assert type(model.decoder.layers[0].self_attention.core_attention) is row.attention.use


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine is installed")
def test_the_spec_of_a_missing_package_says_so_when_built():
    """When imported it must not fail: Megatron would go on with another spec."""
    config = model_config(hybrid_stack_spec=import_module(("composer_megatron.specs", "composite_stack_spec_te")))
    with pytest.raises(ComposerError, match="backend te needs the package transformer_engine"):
        HybridModelBuilder(config).build_model(GROUPS())


@pytest.mark.parametrize("loss", ["megatron", "cross_entropy", "linear_cross_entropy"])
def test_megatrons_training_builds_our_model_from_our_configuration(loss):
    config = model_config(CompositeModelConfig, hybrid_stack_spec=composite_stack_spec, loss=loss)
    builder = config.get_builder_cls()(config)
    assert type(builder) is CompositeModelBuilder
    model = builder.build_model(GROUPS())
    assert isinstance(model, CompositeModel)
    assert model.loss == loss


@pytest.mark.parametrize("padded", [False, True])
def test_our_builder_passes_on_what_megatrons_does(padded, monkeypatch):
    """Megatron's names the class of the model, so that ours cannot but repeat the list."""
    config = model_config(CompositeModelConfig, hybrid_stack_spec=composite_stack_spec, loss="cross_entropy")
    config.should_pad_vocab, config.make_vocab_size_divisible_by = padded, 100
    config.embedding_rows = True
    monkeypatch.setattr("composer_megatron.builder.CompositeModel", dict)
    monkeypatch.setattr("megatron.training.models.hybrid.HybridModel", dict)
    groups = GROUPS()
    ours = CompositeModelBuilder(config).build_model(groups, vp_stage=0)
    theirs = HybridModelBuilder(config).build_model(groups, vp_stage=0)
    assert ours == theirs | {"loss": "cross_entropy", "embedding_rows": True, "rope_scaling_factor": 1.0}
    assert ours["vocab_size"] == (600 if padded else 512)


def test_our_builder_has_no_default_spec():
    with pytest.raises(UsageError, match="hybrid_stack_spec is not set"):
        CompositeModelBuilder(model_config(CompositeModelConfig)).build_model(GROUPS())


@pytest.mark.parametrize("backend", ["local", "composer"])
@pytest.mark.parametrize("loss", ["megatron", "cross_entropy", "linear_cross_entropy"])
def test_multi_token_prediction_trains(backend, loss):
    """Its blocks are built from the same spec; where it wants logits, the linear loss leaves them alone."""
    spec = stack_spec(get_backend(backend))
    config = model_config(CompositeModelConfig, "*-/*-/*-", mtp_layers=2, hybrid_stack_spec=spec, loss=loss)
    torch.manual_seed(0)
    model = CompositeModelBuilder(config).build_model(GROUPS())
    tokens = torch.randint(0, 512, (2, 12))
    losses = model(
        tokens, torch.arange(12).expand_as(tokens), None, labels=tokens.roll(-1, 1), loss_mask=torch.ones(2, 12)
    )
    assert losses.shape == (2, 12)
    losses.mean().backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in model.named_parameters() if name.startswith("mtp."))
    names = [name for name, _ in model.named_parameters()]
    assert "mtp.layers.1.eh_proj.weight" in names
    initialize_weights(model, 3)
