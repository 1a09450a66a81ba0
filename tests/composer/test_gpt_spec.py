"""The GPTModel route computes what our HybridModel computes, in one process and cut over two; wrong flags are named."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from composer_megatron import cpu

cpu.skip_compilation()

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig  # noqa: E402

from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.errors import FileError, UsageError  # noqa: E402
from composer_megatron.gpt_spec import ARCHITECTURE_VARIABLE, block_spec, gpt_spec  # noqa: E402
from composer_megatron.model import build_model  # noqa: E402
from composer_megatron.script_flags import gpt_layout  # noqa: E402
from composer_megatron.sequence import CompositeSequence  # noqa: E402
from composer_megatron.shape import Shape  # noqa: E402

torch.set_num_threads(1)

HERE = Path(__file__).parent
SHAPE = Shape(
    name="test",
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=64,
    tied_embeddings=True,  # first and last stage share a matrix
    baseline_pairs=3,
    rope_theta=1000,
    norm_epsilon=1e-4,
    init_std=0.3,  # large: attention must matter
)
ARCHITECTURE = Architecture(CompositeSequence.parse("1M2A4M1A2M"), SHAPE)
TWO = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "even": TWO,
    "first stage larger": TWO | {"num_layers_in_first_pipeline_stage": 7},
    "by a layout": TWO | {"pipeline_model_parallel_layout": gpt_layout([3, 7])},
    "interleaved, with an empty stage": TWO
    | {
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_model_parallel_layout": gpt_layout([4, 0, 1, 5]),
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    },
    "tensor and sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
SAME = 1e-5
"""Of a gradient's largest element: fp32, sums in another order."""


def config(architecture: Architecture = ARCHITECTURE, *, model: dict | None = None, **changes) -> GPTModelConfig:
    shape = architecture.shape
    fields = {
        "num_layers": len(architecture.sequence),
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "init_method_std": shape.init_std,
    }
    beside = {
        "vocab_size": shape.vocab_size,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": shape.rope_theta,
    }
    return GPTModelConfig(transformer=TransformerConfig(**fields | changes), **beside | (model or {}))


@pytest.fixture(scope="module")
def hybrid():
    """Our model, norms not all ones."""
    model = build_model(ARCHITECTURE, max_sequence_length=32, backend="local")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def gpt_model(model_config: GPTModelConfig, backend: str | None = None) -> GPTModel:
    return GPTModel(
        model_config.transformer,
        block_spec(ARCHITECTURE, model_config, backend=backend),
        vocab_size=model_config.vocab_size,
        max_sequence_length=32,
        position_embedding_type="rope",
        rotary_base=model_config.rotary_base,
        share_embeddings_and_output_weights=model_config.share_embeddings_and_output_weights,
    )


def tokens(*size: int) -> torch.Tensor:
    return torch.randint(0, SHAPE.vocab_size, size, generator=torch.Generator().manual_seed(1))


def mean_loss(model, batches: torch.Tensor) -> list[torch.Tensor]:
    positions = torch.arange(batches.shape[-1] - 1).expand(batches.shape[1], -1)
    return [model(batch[:, :-1], positions, None, labels=batch[:, 1:].contiguous()).mean() for batch in batches]


def gradients(model, batches: torch.Tensor) -> tuple[list[float], dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    losses = mean_loss(model, batches)
    torch.stack(losses).mean().backward()
    return [loss.item() for loss in losses], {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("backend", ["local", "composer"])
def test_one_process_computes_what_our_model_computes(hybrid, backend):
    gpt = gpt_model(config(), backend)
    weights = {name.replace("final_norm", "final_layernorm"): value for name, value in hybrid.named_parameters()}
    assert {name: value.shape for name, value in gpt.named_parameters()} == {
        name: value.shape for name, value in weights.items()
    }
    gpt.load_state_dict(weights, strict=False)
    batches = tokens(1, 2, 17)
    positions = torch.arange(17).expand(2, -1)
    with torch.no_grad():
        logits, wanted = (model(batches[0], positions, None) for model in (gpt, hybrid))
    assert wanted.std() > 0.5  # not a comparison of nothing
    torch.testing.assert_close(logits, wanted, atol=1e-6 * float(wanted.abs().max()), rtol=0)
    losses, found = gradients(gpt, batches)
    wanted_losses, wanted_gradients = gradients(hybrid, batches)
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    for name, value in wanted_gradients.items():
        difference = (found[name.replace("final_norm", "final_layernorm")] - value).abs().max()
        assert difference <= SAME * value.abs().max(), name


@pytest.fixture(scope="module")
def steps(hybrid, tmp_path_factory) -> dict[str, list[dict]]:
    """What the two processes wrote in each layout."""
    folder = tmp_path_factory.mktemp("gpt")
    ARCHITECTURE.save(folder / "architecture.json")
    torch.save(dict(hybrid.named_parameters()), folder / "weights.pt")
    torch.save(tokens(4, 2, 17), folder / "tokens.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(HERE / "gpt_spec_worker.py"), str(folder), json.dumps(list(LAYOUTS.values()))],
        env=os.environ
        | {
            "PYTHONPATH": str(HERE.parents[1]),
            "OMP_NUM_THREADS": "1",
            ARCHITECTURE_VARIABLE: str(folder / "architecture.json"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: [torch.load(folder / f"step-{number}-{rank}.pt") for rank in range(2)]
        for number, name in enumerate(LAYOUTS)
    }


@pytest.mark.skipif(cpu.has_gpu(), reason="gloo on a CPU; a GPU machine would use nccl")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_have_the_losses_and_gradients_of_our_model(hybrid, steps, layout):
    losses, wanted = gradients(hybrid, tokens(4, 2, 17))
    ranks = steps[layout]
    assert ranks[1]["losses"] == pytest.approx(losses, rel=1e-6)
    seen = {name: torch.zeros(value.numel(), dtype=torch.bool) for name, value in wanted.items()}
    for rank in ranks:
        for name, (places, gradient) in rank["gradients"].items():
            seen[name][places.flatten()] = True
            difference = (gradient - wanted[name].flatten()[places]).abs().max()
            assert difference <= SAME * wanted[name].abs().max(), name
    assert all(value.all() for value in seen.values())


@pytest.mark.usefixtures("hybrid")
def test_initial_output_projections_are_scaled_for_one_addition_a_layer():
    spread = [
        float(parameter.detach().std())
        for name, parameter in gpt_model(config()).named_parameters()
        if "linear_fc2" in name
    ]
    wanted = SHAPE.init_std / len(ARCHITECTURE.sequence) ** 0.5
    assert sum(spread) / len(spread) == pytest.approx(wanted, rel=0.05)  # 7 matrices of 1536 elements
    own = config(output_layer_init_method=torch.nn.init.zeros_)
    assert not gpt_model(own).decoder.layers[0].mlp.linear_fc2.weight.any()


@pytest.mark.usefixtures("hybrid")
def test_scaled_rotary_embeddings_are_megatrons_own(tmp_path, monkeypatch):
    """``pretrain_gpt.py`` knows of the scaling by its flag, and of no factor but 8."""
    scaled = dataclasses.replace(
        ARCHITECTURE, shape=dataclasses.replace(SHAPE, head_dim=64, rope_theta=500_000, rope_scaling_factor=32.0)
    )
    scaled.save(tmp_path / "architecture.json")
    monkeypatch.setenv(ARCHITECTURE_VARIABLE, str(tmp_path / "architecture.json"))
    with pytest.raises(UsageError, match="--use-rope-scaling: is False, the architecture has True"):
        gpt_spec(config(scaled))
    with pytest.raises(UsageError, match=r"--rope-scaling-factor: is 8\.0, the architecture has 32\.0"):
        block_spec(scaled, config(scaled, model={"rope_scaling": True}))
    model_config = config(scaled, model={"rope_scaling": True})
    model_config.transformer_layer_spec = gpt_spec
    groups = ProcessGroupCollection.use_mpu_process_groups()
    gpt = GPTModelBuilder(model_config).build_model(groups)
    ours = build_model(scaled, max_sequence_length=32, backend="local", draw_weights=False)
    assert torch.equal(gpt.rotary_pos_emb.inv_freq, ours.rotary_pos_emb.inv_freq)
    latent = dataclasses.replace(scaled, sequence=CompositeSequence("LM"))
    with pytest.raises(UsageError, match=r"latent attention \(L\) in Megatron's GPTModel has no rope scaling"):
        block_spec(latent, model_config)


WRONG = {
    "--num-layers: is 9, the architecture has 10": {"num_layers": 9},
    "--hidden-size: is 64, the architecture has 32": {"hidden_size": 64},
    "--ffn-hidden-size: is 96, the architecture has 48": {"ffn_hidden_size": 96},
    "--num-attention-heads: is 8, the architecture has 4": {"num_attention_heads": 8},
    "--num-query-groups: is 4, the architecture has 2": {"num_query_groups": 4},
    "--kv-channels: is 16, the architecture has 8": {"kv_channels": 16},
    "--norm-epsilon: is 1e-05, the architecture has 0.0001": {"layernorm_epsilon": 1e-5},
    "--normalization: is LayerNorm, the architecture has RMSNorm": {"normalization": "LayerNorm"},
    "--swiglu (gate): is False": {"gated_linear_unit": False},
    "--swiglu (activation): is gelu, the architecture has silu": {"activation_func": torch.nn.functional.gelu},
    "--disable-bias-linear (bias): is True": {"add_bias_linear": True},
    "--add-qkv-bias: is True": {"add_qkv_bias": True},
    "--qk-layernorm: is True": {"qk_layernorm": True},
    "--position-embedding-type: is learned_absolute": {"model": {"position_embedding_type": "learned_absolute"}},
    "--rotary-base: is 10000, the architecture has 1000": {"model": {"rotary_base": 10000}},
    "--rotary-percent: is 0.5": {"model": {"rotary_percent": 0.5}},
    "--use-rope-scaling: is True": {"model": {"rope_scaling": True}},
    "(tied): is False, the architecture has True": {"model": {"share_embeddings_and_output_weights": False}},
    "--padded-vocab-size: is 63, the architecture has 64": {"model": {"vocab_size": 63}},
    "--padded-vocab-size: is 128, the architecture has 64": {"model": {"vocab_size": 64, "should_pad_vocab": True}},
}


@pytest.mark.usefixtures("hybrid")
@pytest.mark.parametrize(("named", "changes"), WRONG.items(), ids=WRONG)
def test_flags_of_another_model_are_named(named, changes):
    with pytest.raises(UsageError) as refused:
        block_spec(ARCHITECTURE, config(**changes))
    assert "do not make 1M2A4M1A2M" in str(refused.value)
    assert named in str(refused.value)


@pytest.mark.usefixtures("hybrid")
def test_the_environment_names_the_architecture(monkeypatch, tmp_path):
    monkeypatch.delenv(ARCHITECTURE_VARIABLE, raising=False)
    with pytest.raises(UsageError, match="COMPOSER_ARCHITECTURE is not set"):
        gpt_spec(config())
    monkeypatch.setenv(ARCHITECTURE_VARIABLE, str(tmp_path / "architecture.json"))
    with pytest.raises(FileError, match="is no file"):
        gpt_spec(config())
    ARCHITECTURE.save(tmp_path / "architecture.json")
    assert len(gpt_spec(config()).layer_specs) == 10
    reordered = dataclasses.replace(ARCHITECTURE, sequence=CompositeSequence.parse("3A7M"))
    reordered.save(tmp_path / "architecture.json")
    layers = gpt_spec(config()).layer_specs
    assert [layer.submodules.mlp is IdentityOp for layer in layers] == [letter == "A" for letter in "AAAMMMMMMM"]


@pytest.mark.usefixtures("hybrid")
def test_a_plain_transformer_config_will_do_and_the_backend_can_be_named():
    transformer = config().transformer
    assert len(block_spec(ARCHITECTURE, transformer, backend="local").layer_specs) == 10
    assert transformer.hetereogenous_dist_checkpoint
    with pytest.raises(UsageError, match="unknown backend"):
        block_spec(ARCHITECTURE, config(), backend="lokal")
