"""A checkpoint of Megatron's own GPTModel becomes a run that computes the same; whatever would not is refused."""

import argparse
import contextlib
import dataclasses
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from composer_megatron import cpu

cpu.skip_compilation()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.checkpoint import load_run  # noqa: E402
from composer_megatron.errors import FileError, UsageError  # noqa: E402
from composer_megatron.gpt_spec import block_spec  # noqa: E402
from composer_megatron.importing.run import import_run  # noqa: E402
from composer_megatron.layers.attention import SDPACoreAttention  # noqa: E402
from composer_megatron.layers.norm import RMSNorm  # noqa: E402
from composer_megatron.model import end_single_process, initialize_single_process  # noqa: E402
from composer_megatron.sequence import CompositeSequence  # noqa: E402
from composer_megatron.shape import Shape  # noqa: E402

torch.set_num_threads(1)

SHAPE = Shape(
    name="imported",
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=64,
    tied_embeddings=False,
    baseline_pairs=3,
    rope_theta=1000,
    norm_epsilon=1e-4,
    init_std=0.3,  # large: attention must matter
)
LLAMA = Architecture(CompositeSequence("AM" * 3), SHAPE)
COMPOSITE = Architecture(CompositeSequence.parse("1M2A3M1A"), SHAPE)
TRAINED_WITH = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "swiglu": True,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-4,
    "position_embedding_type": "rope",
    "rotary_base": 1000,
    "rotary_percent": 1.0,
    "add_bias_linear": False,
    "init_method_std": 0.3,
    "untie_embeddings_and_output_weights": True,
    "seq_length": 32,
    "save": "runs/llama",
}


def gpt_model(
    *, sequence: Architecture | None = None, tied: bool = False, apart: bool = False, **changes
) -> tuple[GPTModel, torch.Tensor]:
    """A random model of Megatron's and its logits: Megatron's own layers, or a Composite's.

    Args:
        sequence: Layers of `composer_megatron.gpt_spec`; None for Megatron's.
        tied: Whether the output layer is the embedding.
        apart: Save each layer under its own name.
        changes: Of the configuration.
    """
    initialize_single_process()
    fields = {
        "num_layers": 3 if sequence is None else len(sequence.sequence),
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-4,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.3,
        "use_cpu_initialization": True,
        "hetereogenous_dist_checkpoint": apart,
    }
    config = TransformerConfig(**fields | changes)
    if sequence is None:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
        # Megatron's own attention makes its mask on a GPU.
        layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
        spec = TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=RMSNorm)
    else:
        spec = block_spec(sequence, config)
    torch.manual_seed(0)
    model = GPTModel(
        config,
        spec,
        vocab_size=64,
        max_sequence_length=32,
        position_embedding_type="rope",
        rotary_base=1000,
        share_embeddings_and_output_weights=tied,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        return model, model(tokens(), positions(), None)


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))


def positions() -> torch.Tensor:
    return torch.arange(20).expand(2, -1)


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Saving waits for a GPU, and asks for a queue that a server process keeps, which takes seconds to start."""
    results: queue.Queue = queue.Queue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem_async, "get_write_results_queue", lambda *_: results)
        if not cpu.has_gpu():
            patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def group_of_one():
    yield
    if torch.distributed.is_initialized():
        end_single_process()


def save(model: GPTModel, folder: Path, *, release: bool = False, **changes) -> Path:
    """Save as Megatron's training loop does, with optimizer state beside the model."""
    checkpoint = folder / ("release" if release else "iter_0000500")
    checkpoint.mkdir(parents=True)
    training = {name: value for name, value in (TRAINED_WITH | changes).items() if value != "absent"}
    moment = dist_checkpointing.ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.decoder.x", torch.ones(3))
    state = {
        "model": model.sharded_state_dict(),
        "optimizer": {"moment": moment},
        "args": argparse.Namespace(**training),
        "iteration": 500,
    }
    if not training:
        del state["args"]
    with saving():
        dist_checkpointing.save(state, str(checkpoint))
    (folder / "latest_checkpointed_iteration.txt").write_text("release" if release else "500")
    return folder


def assert_same_logits(run_dir: Path, wanted: torch.Tensor) -> None:
    """Of the largest: fp32; the same matrices, and norms by other functions."""
    assert wanted.std() > 0.5  # not a comparison of nothing
    with load_run(run_dir) as run, torch.no_grad():
        found = run.model(tokens(), positions(), None)
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "each layer by name"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_llama_of_megatrons_becomes_pairs_of_blocks(tmp_path, apart, tied):
    model, logits = gpt_model(tied=tied, apart=apart)
    names = model.sharded_state_dict().values()
    stacked = any(entry.key == "decoder.layers.mlp.linear_fc1.weight" for entry in names)
    assert stacked != apart
    assert any(entry.key.endswith("linear_qkv.layer_norm_weight") for entry in names)  # Megatron's name of that norm
    save(model, tmp_path / "gpt", untie_embeddings_and_output_weights=not tied)
    imported = import_run(tmp_path / "gpt", tmp_path / "run")
    wanted = dataclasses.replace(LLAMA, shape=dataclasses.replace(SHAPE, tied_embeddings=tied))
    assert imported.architecture == wanted == Architecture.load(tmp_path / "run/architecture.json")
    assert imported.architecture.origin == {"method": "import", "source": "runs/llama"}
    assert_same_logits(tmp_path / "run", logits)


def test_a_composite_keeps_its_sequence(tmp_path):
    model, logits = gpt_model(sequence=COMPOSITE)
    save(model, tmp_path / "gpt", num_layers=7)
    imported = import_run(tmp_path / "gpt", tmp_path / "run")
    assert imported.architecture.sequence == COMPOSITE.sequence
    assert_same_logits(tmp_path / "run", logits)


def test_released_weights_an_iterations_folder_and_no_groups(tmp_path):
    model, logits = gpt_model(num_query_groups=4)
    save(model, tmp_path / "gpt", release=True, group_query_attention=False, num_query_groups=1)
    import_run(tmp_path / "gpt", tmp_path / "run")
    assert_same_logits(tmp_path / "run", logits)
    import_run(tmp_path / "gpt/release", tmp_path / "other")
    assert_same_logits(tmp_path / "other", logits)


def test_bf16_stays_bf16(tmp_path):
    model, _ = gpt_model()
    save(model.bfloat16(), tmp_path / "gpt")
    assert import_run(tmp_path / "gpt", tmp_path / "run").dtype == torch.bfloat16
    with load_run(tmp_path / "run") as run:
        ours = dict(run.model.named_parameters())
        theirs = dict(model.named_parameters())
    assert torch.equal(ours["decoder.layers.3.mlp.linear_fc1.weight"], theirs["decoder.layers.1.mlp.linear_fc1.weight"])


REFUSED = {
    "swiglu=False (ours have True)": {"swiglu": False},
    "normalization='LayerNorm'": {"normalization": "LayerNorm"},
    "position_embedding_type='learned_absolute'": {"position_embedding_type": "learned_absolute"},
    "add_bias_linear=True": {"add_bias_linear": True},
    "use_rope_scaling=True": {"use_rope_scaling": True},
    "rotary_percent=0.5": {"rotary_percent": 0.5},
    "apply_layernorm_1p=True": {"apply_layernorm_1p": True},
    "num_experts=8": {"num_experts": 8},
    "hybrid_layer_pattern='*-*-'": {"hybrid_layer_pattern": "*-*-"},
    "swiglu=None (ours have True)": {"swiglu": "absent"},
    "it lacks hidden_size": {"hidden_size": "absent"},
    "it lacks seq_length": {"seq_length": "absent"},
    "has no args": dict.fromkeys(TRAINED_WITH, "absent"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A Llama of Megatron's; tests change copies of it only."""
    return save(gpt_model()[0], tmp_path_factory.mktemp("gpt") / "gpt")


@pytest.mark.parametrize(("named", "changes"), REFUSED.items(), ids=REFUSED)
def test_what_would_not_be_exact_is_refused_by_name(tmp_path, named, changes):
    save(gpt_model()[0], tmp_path / "gpt", **changes)
    with pytest.raises((FileError, UsageError)) as refused:
        import_run(tmp_path / "gpt", tmp_path / "run")
    assert named in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_tensors_that_ours_have_no_place_for(tmp_path):
    save(gpt_model(qk_layernorm=True)[0], tmp_path / "gpt")
    with pytest.raises(FileError, match=r"no place for decoder\.layers\.self_attention\.[qk]_layernorm\.weight"):
        import_run(tmp_path / "gpt", tmp_path / "run")


def test_tensors_that_are_missing(tmp_path):
    model, _ = gpt_model(apart=True)
    model.decoder.layers[1].pre_mlp_layernorm = torch.nn.Identity()
    save(model, tmp_path / "gpt")
    with pytest.raises(FileError, match=r"has 0 of pre_mlp_layernorm\.weight and .* in layer 1; needs one"):
        import_run(tmp_path / "gpt", tmp_path / "run")
    save(gpt_model(tied=True)[0], tmp_path / "tied")  # whose flags say that it is not
    with pytest.raises(FileError, match=r"lacks output_layer\.weight"):
        import_run(tmp_path / "tied", tmp_path / "run")


def test_folders_that_are_no_checkpoints(saved, tmp_path):
    gpt = Path(shutil.copytree(saved, tmp_path / "gpt"))
    (gpt / "iter_0000500/__0_0.distcp").write_bytes(b"cut")
    with pytest.raises(FileError, match="cannot read the checkpoint"):
        import_run(gpt, tmp_path / "run")
    (gpt / "iter_0000500/.metadata").write_bytes(b"garbage")
    with pytest.raises(FileError, match="cannot read the checkpoint"):
        import_run(gpt, tmp_path / "run")
    (gpt / "iter_0000500/metadata.json").unlink()
    with pytest.raises(FileError, match=r"no whole torch_dist checkpoint; .*ckpt-convert-format"):
        import_run(gpt, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["gpt"]


def test_a_run_of_ours_is_told_from_a_llama(saved, tmp_path):
    import_run(saved, tmp_path / "run")
    with pytest.raises(FileError, match="hybrid_layer_pattern="):
        import_run(tmp_path / "run", tmp_path / "again")
